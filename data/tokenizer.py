"""A byte-level BPE of about 1,000 tokens, trained here and run by tiktoken; four special ids follow its vocabulary.

The ranks are kept in tiktoken's own text format (base64 token, space, rank, a line each). Texts are encoded with a
space in front, so that a word is one token wherever it stands; decoding takes it off again. Left out: normalisation
(bytes in, bytes out) and merges across words.
"""
import base64
import re
from collections import Counter, defaultdict

import tiktoken

# Letters, up to three digits, or other signs, each with the space before it; then white space. Every character is in
# one of the classes, or tiktoken would drop it silently. Python's and tiktoken's regular expressions agree on it.
PATTERN = r" ?[^\W\d_]+| ?\d{1,3}| ?[^\w\s]+| ?_+|\s+(?!\S)|\s"
NUM_SPECIAL = 4


def merge(parts: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """Replace each occurrence of `pair` by `new`, from the left: merge((1, 2, 1, 2), (1, 2), 9) = (9, 9)."""
    out, i = [], 0
    while i < len(parts):
        if parts[i:i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return tuple(out)


def train_bpe(texts, num_tokens: int, max_bytes: int = 10_000_000) -> list[bytes]:
    """The first `num_tokens` tokens of a byte-level BPE, most frequent pair first, ties to the lowest ids.

    At most `max_bytes` of the texts are read; with more text an even sample of them is taken. Fewer tokens come back
    when no pair occurs twice any more. Source: Sennrich et al. 2016, over words counted once."""
    stride = 1 + sum(len(text) for text in texts) // max_bytes
    counts = Counter(word for text in texts[::stride] for word in re.findall(PATTERN, " " + text))
    words = [tuple(word.encode()) for word in counts]
    weight = list(counts.values())
    tokens = [bytes([b]) for b in range(256)]
    pairs, where = Counter(), defaultdict(set)  # how often a pair occurs; in which words
    for w, parts in enumerate(words):
        for pair in zip(parts, parts[1:]):
            pairs[pair] += weight[w]
            where[pair].add(w)
    while len(tokens) < num_tokens and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        for w in where.pop(best):  # recount only the words that change
            for pair in zip(words[w], words[w][1:]):
                pairs[pair] -= weight[w]
            words[w] = merge(words[w], best, len(tokens))
            for pair in zip(words[w], words[w][1:]):
                pairs[pair] += weight[w]
                where[pair].add(w)
        pairs.pop(best)
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


class Tokenizer:
    """Text <-> ids. `vocab_size` counts the four special ids pad, sep, eos and mask, which are its last four."""

    def __init__(self, encoding: tiktoken.Encoding, ranks: str):
        self.encoding, self.ranks = encoding, ranks  # ranks: the text format, or the name of a tiktoken encoding
        self.pad, self.sep, self.eos, self.mask = range(encoding.n_vocab, encoding.n_vocab + NUM_SPECIAL)
        self.vocab_size = encoding.n_vocab + NUM_SPECIAL
        self.bytes = [b""] * self.vocab_size  # special ids (and gaps in tiktoken's vocabularies) decode to nothing
        for token in encoding.token_byte_values():
            self.bytes[encoding.encode_single_token(token)] = token

    @classmethod
    def train(cls, texts, vocab_size: int) -> "Tokenizer":
        tokens = train_bpe(texts, vocab_size - NUM_SPECIAL)
        return cls.load("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))

    @classmethod
    def load(cls, ranks: str) -> "Tokenizer":
        """From the text of a ranks file, or from the name of one of tiktoken's encodings (which it may download).

        Raises ValueError with the reason when it is neither."""
        if "\n" not in ranks:
            return cls(tiktoken.get_encoding(ranks), ranks)
        pairs = (line.split() for line in ranks.splitlines())
        mergeable = {base64.b64decode(token): int(rank) for token, rank in pairs}
        return cls(tiktoken.Encoding("sorl", pat_str=PATTERN, mergeable_ranks=mergeable, special_tokens={}), ranks)

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(" " + text)

    def decode(self, ids) -> str:
        """Ids up to the first EOS -> text; special ids are left out, broken UTF-8 is replaced."""
        raw = b"".join([self.bytes[i] for i in (ids[:ids.index(self.eos)] if self.eos in ids else ids)])
        return raw.decode("utf-8", errors="replace").removeprefix(" ")

    def starts_word(self) -> list[bool]:
        """For every id: does it begin a new word, that is, with white space?"""
        return [token[:1].isspace() for token in self.bytes]
