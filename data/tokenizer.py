"""A byte-level BPE of about 1,000 tokens, trained here, or GPT-2's of 50,256; tiktoken runs both.

Four special ids follow the vocabulary: pad, sep, eos and mask. The ranks are kept in tiktoken's
own text format (base64 token, space, rank; one per line). Texts are encoded with a space in front,
so that a word is the same token everywhere; decoding takes it off again. GPT-2 gets it, too: a
text begins in the middle of a row there, after the separator, and the model has to copy words from
the source, whose first word would otherwise be another token. Left out: normalisation (bytes in,
the same bytes out) and merges across pieces.
"""
import base64
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
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
LONGEST = 64  # characters per piece: the cost of long words and runs of spaces grows with length
PATTERN = "|".join((
    rf" ?[^{SPACE}0-9_{SIGNS}]{{1,{LONGEST}}}",
    " ?[0-9]{1,3}",
    f" ?[{SIGNS}]{{1,{LONGEST}}}",
    f" ?_{{1,{LONGEST}}}",
    f"[{SPACE}]{{1,{LONGEST}}}(?![^{SPACE}])",  # all but the last space before a word
    f"[{SPACE}]"))
NUM_SPECIAL = 4

# GPT-2 cuts contractions, words, numbers, signs, and all but the last space before one of these.
GPT2_LONGEST = 10_000  # a longer run of spaces is cut, since a million of them stop the engine
GPT2_PATTERN = (r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                rf"|\s{{1,{GPT2_LONGEST}}}(?!\S)|\s{{1,{GPT2_LONGEST}}}")
GPT2_END = "<|endoftext|>"


def merge(parts: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """Replace each occurrence of `pair` by `new`, from the left: (1, 2, 1, 2) -> (9, 9)."""
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] = new
        else:
            out.append(part)
    return tuple(out)


def count_pieces(texts: list[str], max_bytes: int) -> dict[bytes, int]:
    """The pieces of the texts and how often each occurs.

    Keeps the most frequent ones, up to `max_bytes` in all: far more than a language with spaces
    has, but without spaces nearly every piece is new."""
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, " " + text))
    kept, size = {}, 0
    for piece, times in counts.most_common():
        size += len(piece.encode())
        if size > max_bytes:
            break
        kept[piece.encode()] = times
    return kept


def train_bpe(texts: list[str], num_tokens: int, max_bytes: int = 1_000_000) -> list[bytes]:
    """The first `num_tokens` tokens of a byte-level BPE (Sennrich et al. 2016).

    The 256 bytes come first; then the most frequent pair of neighbours becomes a token, again and
    again, ties to the lowest ids. Returns fewer when no pair occurs twice any more. Raises
    ValueError for less than the 256 bytes."""
    if num_tokens < 256:
        raise ValueError(f"{num_tokens} tokens: expected the 256 bytes at least")
    counts = count_pieces(texts, max_bytes)
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

    In these files a character stands for a byte: itself if it can be printed in Latin-1, else
    one from 256 on. The ids are those of the 256 bytes, then of the merges, then of the end. Raises
    ValueError if they are not."""
    try:
        vocab = json.loads(Path(folder, "vocab.json").read_text("utf-8"))
        lines = Path(folder, "merges.txt").read_text("utf-8").splitlines()
    except OSError as e:
        raise ValueError(f"{e.filename}: cannot be read ({e.strerror}); expected a folder with "
                         f"vocab.json and merges.txt") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{folder}: expected vocab.json and merges.txt in UTF-8 ({e})") from None
    printed = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    hidden = [byte for byte in range(256) if byte not in printed]
    byte_of = {chr(byte): byte for byte in printed}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(hidden)}
    merges = [line.replace(" ", "") for line in lines if not line.startswith("#version")]
    tokens = [*byte_of, *merges]
    expected = {token: rank for rank, token in enumerate([*tokens, GPT2_END])}
    if vocab != expected or not byte_of.keys() >= set("".join(merges)):
        raise ValueError(f"{folder}: vocab.json and merges.txt do not fit together; expected the "
                         f"256 bytes, then one token per merge, in their order, then {GPT2_END}")
    return "gpt2\n" + ranks_text([bytes(map(byte_of.get, token)) for token in tokens])


def ranks_text(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))


class Tokenizer:
    """Text <-> ids. `vocab_size` counts the special ids pad, sep, eos and mask, its last four."""

    def __init__(self, encoding: tiktoken.Encoding, ranks: str):
        self.encoding = encoding
        self.ranks = ranks  # the text of a ranks file
        self.vocab_size = encoding.n_vocab + NUM_SPECIAL
        self.pad, self.sep, self.eos, self.mask = range(encoding.n_vocab, self.vocab_size)
        self.bytes = [b""] * self.vocab_size  # special ids decode to nothing
        for token in encoding.token_byte_values():
            self.bytes[encoding.encode_single_token(token)] = token

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer of at most `vocab_size` ids, at least 260. Raises ValueError for less."""
        return cls.load(ranks_text(train_bpe(texts, vocab_size - NUM_SPECIAL)))

    @classmethod
    def load(cls, ranks: str) -> "Tokenizer":
        """From the text of a ranks file, or from a folder with GPT-2's vocab.json and merges.txt.

        Raises ValueError when it is neither."""
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
        return self.encoding.encode_ordinary(" " + text)

    def decode(self, ids: list[int]) -> str:
        """Ids up to the first EOS -> text without special ids; broken UTF-8 is replaced."""
        if self.eos in ids:
            ids = ids[:ids.index(self.eos)]
        raw = b"".join([self.bytes[i] for i in ids])
        return raw.decode("utf-8", errors="replace").removeprefix(" ")
