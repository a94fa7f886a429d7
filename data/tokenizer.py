"""A byte-level BPE of about 1,000 tokens, trained here, or GPT-2's of 50,256; tiktoken runs both.

Four special ids follow the vocabulary: pad, sep, eos and mask. The ranks are kept in tiktoken's
own text format (base64 token, space, rank, a line each). Texts are encoded with a space in front,
so that a word is one token wherever it stands; decoding takes it off again. GPT-2 gets it, too: a
text begins in the middle of a row there, behind the separator, and words are to be copied from
the source, whose first word would otherwise be another token. Left out: normalisation (bytes in,
the same bytes out) and merges across pieces.
"""
import base64
import json
import os
import re
from collections import Counter, defaultdict

import tiktoken

# A text is cut into pieces first, and no token reaches across two of them. Python's `re` cuts
# while the BPE is trained and tiktoken's engine while it runs, so both must cut alike. They differ
# in what \w, \d and \s mean (combining marks, superscripts), hence these plain ranges: each
# character is white space, a digit, an underscore, a sign, or else a letter, in any language.
SPACE = "\\t-\\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
ASCII_SIGNS = r"\x00-\x08\x0e-\x1f!-/:-@\[-\^`{-\x7f"
SIGNS = ASCII_SIGNS + (
    "\x80-\x84\x86-\x9f\xa1-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf×÷"  # Latin-1, without ª, µ and º
    "،؛؟۔।॥"  # Arabic and Indic punctuation
    "\u200b\u200e-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2bff"  # dashes, quotes, ¤, arrows, …
    "\u3001-\u3004\u3008-\u3020\u3030\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    "\U0001f000-\U0001faff")  # emoji
LONGEST = 64  # characters a piece: long words and runs of spaces cost time that grows with length
PATTERN = "|".join((
    rf" ?[^{SPACE}0-9_{SIGNS}]{{1,{LONGEST}}}",
    " ?[0-9]{1,3}",
    f" ?[{SIGNS}]{{1,{LONGEST}}}",
    f" ?_{{1,{LONGEST}}}",
    f"[{SPACE}]{{1,{LONGEST}}}(?![^{SPACE}])",  # all but the last space before a word
    f"[{SPACE}]"))
NUM_SPECIAL = 4

# GPT-2 cuts contractions, words, numbers, signs, and all but the last space before one of these.
GPT2_PATTERN = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# No piece is too long for it, but a million spaces stop the engine: longer runs are cut before.
GPT2_LONGEST = 10_000
GPT2_RUN = re.compile(rf"[{SPACE}]{{1,{GPT2_LONGEST}}}|[^{SPACE}]{{1,{GPT2_LONGEST}}}")
GPT2_END = "<|endoftext|>"


def merge(parts: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """Replace each occurrence of `pair` by `new`, from the left: (1, 2, 1, 2) -> (9, 9)."""
    out, i = [], 0
    while i < len(parts):
        if parts[i:i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return tuple(out)


def count_pieces(texts: list[str], max_chars: int, max_bytes: int) -> dict[bytes, int]:
    """The pieces of the texts and how often each occurs.

    Of more than about `max_chars` characters an even sample is read. The most frequent pieces are
    kept, `max_bytes` in all, far more than a language with spaces has: where clauses are written
    without a space, nearly every piece is new."""
    stride = 1 + sum(len(text) for text in texts) // max_chars
    counts = Counter()
    for text in texts[::stride]:
        counts.update(re.findall(PATTERN, " " + text))
    kept, size = {}, 0
    for piece, times in counts.most_common():
        size += len(piece.encode())
        if size > max_bytes:
            break
        kept[piece.encode()] = times
    return kept


def train_bpe(texts: list[str], num_tokens: int, max_chars: int = 10_000_000,
              max_bytes: int = 1_000_000) -> list[bytes]:
    """The first `num_tokens` tokens of a byte-level BPE (Sennrich et al. 2016).

    The 256 bytes come first; then the most frequent pair of neighbours becomes a token, again and
    again, ties to the lowest ids. Fewer tokens come back when no pair occurs twice any more."""
    counts = count_pieces(texts, max_chars, max_bytes)
    pieces = [tuple(piece) for piece in counts]
    weight = list(counts.values())
    tokens = [bytes([byte]) for byte in range(256)]
    pairs = Counter()  # how often a pair occurs
    where = defaultdict(set)  # in which pieces
    for p, parts in enumerate(pieces):
        for pair in zip(parts, parts[1:]):
            pairs[pair] += weight[p]
            where[pair].add(p)
    while len(tokens) < num_tokens and pairs:
        most = max(pairs.values())
        if most < 2:
            break
        best = min(pair for pair, times in pairs.items() if times == most)
        for p in where.pop(best):  # recount only the pieces that change
            for pair in zip(pieces[p], pieces[p][1:]):
                pairs[pair] -= weight[p]
            pieces[p] = merge(pieces[p], best, len(tokens))
            for pair in zip(pieces[p], pieces[p][1:]):
                pairs[pair] += weight[p]
                where[pair].add(p)
        pairs.pop(best)
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def gpt2_ranks(folder: str) -> str:
    """The ranks in a folder with GPT-2's vocab.json and merges.txt, below a line that says `gpt2`.

    In these files a character stands for a byte: itself where it can be printed in Latin-1, else
    one from 256 on. The files say the same twice, as ids and as merges; tiktoken needs ids in the
    order of the merges. Raises ValueError where they are not."""
    vocab_path, merges_path = (os.path.join(folder, name) for name in ("vocab.json", "merges.txt"))
    try:
        with open(vocab_path, encoding="utf-8") as file:
            vocab = json.load(file)
        with open(merges_path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as e:
        raise ValueError(f"{e.filename}: cannot be read ({e.strerror}); expected a folder with "
                         f"vocab.json and merges.txt") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{folder}: expected vocab.json and merges.txt in UTF-8 ({e})") from None
    printed = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    hidden = [byte for byte in range(256) if byte not in printed]
    byte_of = {chr(byte): byte for byte in printed}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(hidden)}
    merges = ["".join(line.split(" ")) for line in lines if not line.startswith("#version")]

    if not isinstance(vocab, dict) or not all(type(rank) is int for rank in vocab.values()):
        raise ValueError(f"{vocab_path}: expected an object of tokens and their ids")
    tokens = sorted(vocab, key=vocab.get)
    if (sorted(vocab.values()) != [*range(len(vocab))] or {*tokens[:256]} != byte_of.keys()
            or tokens[256:] != [*merges, GPT2_END] or not {*"".join(merges)} <= byte_of.keys()):
        raise ValueError(f"{folder}: vocab.json and merges.txt do not fit together; expected the "
                         f"256 bytes, then a token a merge, in their order, then {GPT2_END}")
    raw = [bytes(map(byte_of.get, token)) for token in tokens[:-1]]
    return "gpt2\n" + ranks_text(raw)


def ranks_text(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))


class Tokenizer:
    """Text <-> ids. `vocab_size` counts the special ids pad, sep, eos and mask, its last four."""

    def __init__(self, encoding: tiktoken.Encoding, ranks: str):
        self.encoding = encoding
        self.ranks = ranks  # the text of a ranks file
        self.is_gpt2 = encoding.name == "gpt2"
        self.vocab_size = encoding.n_vocab + NUM_SPECIAL
        self.pad, self.sep, self.eos, self.mask = range(encoding.n_vocab, self.vocab_size)
        self.bytes = [b""] * self.vocab_size  # special ids decode to nothing
        for token in encoding.token_byte_values():
            self.bytes[encoding.encode_single_token(token)] = token

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer of at most `vocab_size` ids, and of at least the 256 bytes."""
        return cls.load(ranks_text(train_bpe(texts, vocab_size - NUM_SPECIAL)))

    @classmethod
    def load(cls, ranks: str) -> "Tokenizer":
        """From the text of a ranks file, or from a folder with GPT-2's vocab.json and merges.txt.

        Raises ValueError with the reason when it is neither."""
        if not isinstance(ranks, str):
            raise ValueError(f"expected a tokenizer's ranks as text, found {type(ranks).__name__}")
        if "\n" not in ranks:
            ranks = gpt2_ranks(ranks)
        name, pattern, lines = "sorl", PATTERN, ranks.splitlines()
        if lines[0] == "gpt2":
            name, pattern, lines = "gpt2", GPT2_PATTERN, lines[1:]
        pairs = [line.split() for line in lines]
        mergeable = {base64.b64decode(token): int(rank) for token, rank in pairs}
        single_bytes = {bytes([byte]) for byte in range(256)}
        if sorted(mergeable.values()) != [*range(len(pairs))] or single_bytes - mergeable.keys():
            raise ValueError("expected ranks 0, 1, 2, ... and every single byte among the tokens")
        encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=mergeable, special_tokens={})
        return cls(encoding, ranks)

    def encode(self, text: str) -> list[int]:
        text, begin, ids = " " + text, 0, []
        if self.is_gpt2 and len(text) > GPT2_LONGEST:
            for run in GPT2_RUN.finditer(text):
                if run.end() - run.start() == GPT2_LONGEST:
                    ids += self.encoding.encode_ordinary(text[begin:run.end()])
                    begin = run.end()
        return ids + self.encoding.encode_ordinary(text[begin:])

    def decode(self, ids: list[int]) -> str:
        """Ids up to the first EOS -> text; special ids are left out, broken UTF-8 is replaced."""
        if self.eos in ids:
            ids = ids[:ids.index(self.eos)]
        raw = b"".join([self.bytes[i] for i in ids])
        return raw.decode("utf-8", errors="replace").removeprefix(" ")
