"""The tokenizer: one way of cutting texts, the textbook's merges, every text back byte for byte."""
import base64
import hashlib
import random
import re
import sys
from collections import Counter

import pytest
import tiktoken

from data import forecast
from data.tokenizer import LONGEST, PATTERN, Tokenizer, count_pieces, merge, train_bpe

EVERY_CHARACTER = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([r.references[0] for r in forecast.generate()["val"]], 400)


# ---- cutting

@pytest.mark.parametrize("number", range(len(PATTERN.split("|"))))
def test_both_engines_agree_on_every_character(number):
    """tiktoken drops what its pattern does not match: what is left must be what Python finds."""
    alternative = PATTERN.split("|")[number]
    encoding = tiktoken.Encoding(
        "t", pat_str=alternative, mergeable_ranks=BYTES, special_tokens={})
    for at in range(0, len(EVERY_CHARACTER), 100_000):
        text = EVERY_CHARACTER[at:at + 100_000]
        found = "".join(re.findall(alternative, text))
        assert found.encode() == bytes(encoding.encode_ordinary(text))


def pieces_of_tiktoken(text: str) -> list[str]:
    """Every part of the text is a token here, so each piece is one token."""
    parts = [text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    ranks = {part: i for i, part in enumerate(dict.fromkeys([*BYTES, *parts]))}
    encoding = tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_single_token_bytes(i).decode()
            for i in encoding.encode_ordinary(text)]


@pytest.mark.parametrize("seed", range(3))
def test_both_engines_cut_the_same_pieces(seed):
    rng = random.Random(seed)
    edges = "a Z09_-!~\t\n\x1c\x7f\x85\xa0é²×‿\u0300\u200b\u200d\u2028ा।क日、ก้\u3000\U0001f600"
    for _ in range(60):
        text = "".join(rng.choice(edges) for _ in range(rng.randrange(14)))
        assert pieces_of_tiktoken(text) == re.findall(PATTERN, text)


@pytest.mark.parametrize("run", ["x", "é", "ा", "日", " ", "\n", "!", "_", "7", "x "])
def test_long_runs_are_cut(run):
    """A word of 60,000 letters, a million spaces: pieces stay short, the text comes back."""
    text = "a" + run * 60_000
    pieces = [piece.decode() for piece in count_pieces([text], 10 ** 9)]
    assert max(map(len, pieces)) <= LONGEST + 1  # the space before it
    tok = Tokenizer.train([text], 300)
    text = run * 1_000_000 + "b"
    assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("text", [
    "मैं हिन्दी में लिखता हूँ", "ที่ นี่ น้ำ ผู้", "tiê\u0301ng viê\u0323t", "سَتَهْطِلُ أَمْطَارٌ",
    "می‌بارد", "naïve café"])
def test_words_of_every_language_become_tokens(text):
    """Combining marks and joiners belong to their word: after training each word is one token."""
    assert len(Tokenizer.train([text] * 5, 600).encode(text)) == len(text.split())


# ---- training

def naive_bpe(texts, num_tokens):
    """The textbook algorithm: recount every pair after every merge."""
    words = Counter(word for text in texts for word in re.findall(PATTERN, " " + text))
    parts = {word: tuple(word.encode()) for word in words}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < num_tokens:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                pairs[pair] += n
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        parts = {word: merge(p, best, len(tokens)) for word, p in parts.items()}
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


@pytest.mark.parametrize("seed", range(6))
def test_bpe_against_the_textbook(seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choice("aab  bc1.é") for _ in range(rng.randrange(40)))
             for _ in range(20)]
    assert train_bpe(texts, 300) == naive_bpe(texts, 300)


def test_merges_go_from_the_left():
    assert merge((1, 1, 1, 2, 1, 1), (1, 1), 9) == (9, 1, 2, 9)


@pytest.mark.parametrize("name, expected", [
    ("forecast", "3bc198b013df436d"), ("forecast2", "dc78755c532b6851")])
def test_vocabularies_of_the_embedded_task_are_frozen(name, expected):
    texts = [text for r in forecast.generate(name)["train"]
             for text in (r.source, *r.references, *r.target)]
    tok = Tokenizer.train(list(dict.fromkeys(texts)), 1000)
    assert hashlib.sha256(tok.ranks.encode()).hexdigest()[:16] == expected


def test_rare_pieces_are_left_out_if_all_are_new_and_less_than_the_bytes_is_refused():
    assert count_pieces(["aa bb aa cc aa bb"], max_bytes=6) == {b" aa": 3, b" bb": 2}
    with pytest.raises(ValueError, match="the 256 bytes at least"):
        Tokenizer.train(["x"], 259)


# ---- the tokenizer

@pytest.mark.parametrize("text", [
    "", " ", "a  b\n\nc", "é ² ‿ _x_ 12345 \u0301 ☃ \t", "Oslo, 3 degrees.", " leading",
    "日本語 \U0001f600", "\0\x1c\x85\ufeff", EVERY_CHARACTER])
def test_every_text_comes_back(tok, text):
    assert tok.decode(tok.encode(text)) == text
    assert tok.decode(tok.encode(text) + [tok.eos, 5, 6]) == text  # nothing after the end token


def test_ranks_are_in_tiktokens_format_and_reload(tok):
    lines = [line.split() for line in tok.ranks.splitlines()]
    rank = {base64.b64decode(token): int(number) for token, number in lines}
    assert sorted(rank.values()) == list(range(len(rank))) and len(rank) + 4 == tok.vocab_size
    first, second = Tokenizer.load(tok.ranks).encode("wind wind")  # one token wherever it stands
    assert [first] == [second] == tok.encode("wind")
    special = (tok.pad, tok.sep, tok.eos, tok.mask)
    assert special == tuple(range(tok.vocab_size - 4, tok.vocab_size))
