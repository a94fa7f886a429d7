"""Records, batches, the tokenizer and the embedded task."""
import base64
import json
import random
import re
from collections import Counter

import pytest
import torch

import data
from data import Record, forecast
from data.tokenizer import PATTERN, Tokenizer, merge, train_bpe


@pytest.mark.parametrize("setting, expected", [("forecast", "a2502775d5f9a1db"), ("forecast2", "09c9b5248fd2188c")])
def test_forecast_is_frozen(setting, expected):
    """Committed before the first RL run: a change here would make every figure of the README incomparable."""
    assert data.data_hash(forecast.generate(setting)) == expected


def test_forecast_splits_share_no_source():
    dataset = forecast.generate("forecast")
    sources = [r.source for split in data.SPLITS for r in dataset[split]]
    assert len(set(sources)) == len(sources) == sum(forecast.SIZES.values())


def test_forecast_drafts_are_vague_three_times_in_four():
    """Five facts in 12,000 drafts; a draft states a fact precisely where its precise phrase stands in it."""
    records = forecast.generate("forecast")["train"]
    precise = total = 0
    for r in records:
        _, _, sky, temperature, wind = r.source.split(" | ")
        for phrase in (sky, f"{temperature} degrees", "wind from the {} at {} knots".format(*wind.split())):
            precise += sum(phrase in text for text in r.target)
            total += len(r.target)
            assert all(phrase in text for text in r.references)
    assert abs(precise / total - 0.25) < 4 * (0.25 * 0.75 / total) ** 0.5


# --- tokenizer -------------------------------------------------------------------------------------------------------

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
    texts = ["".join(rng.choice("aab  bc1.é") for _ in range(rng.randrange(40))) for _ in range(20)]
    assert train_bpe(texts, 300) == naive_bpe(texts, 300)


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([r.references[0] for r in forecast.generate()["val"]], 400)


@pytest.mark.parametrize("text", ["", " ", "a  b\n\nc", "é ² ‿ _x_ 12345 \u0301 ☃ \t", "Oslo, 3 degrees.", " leading", "日本語 \U0001f600"])
def test_every_text_comes_back(tok, text):
    assert tok.decode(tok.encode(text)) == text
    assert tok.decode(tok.encode(text) + [tok.eos, 5, 6]) == text  # nothing after the end token


def test_ranks_are_in_tiktokens_format_and_reload(tok):
    rank = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in tok.ranks.splitlines()}
    assert sorted(rank.values()) == list(range(len(rank))) and len(rank) + 4 == tok.vocab_size
    again = Tokenizer.load(tok.ranks)
    assert again.encode("This evening in Oslo") == tok.encode("This evening in Oslo")
    assert (tok.pad, tok.sep, tok.eos, tok.mask) == tuple(range(tok.vocab_size - 4, tok.vocab_size))


def test_words_are_single_tokens_wherever_they_stand(tok):
    assert tok.encode("wind wind")[0] == tok.encode("wind wind")[1] and len(tok.encode("wind wind")) == 2
    starts = tok.starts_word()
    assert starts[tok.encode("wind")[0]] and not starts[tok.encode("wind.")[1]] and not starts[tok.eos]


# --- records and batches ---------------------------------------------------------------------------------------------

def test_roles_default_to_one_another():
    r = Record("s", ["a"])
    assert r.target == ["a"] and r.static == ["a"]
    assert Record("s", ["a"], target=["b"]).static == ["b"]


def test_records_survive_the_disk(tmp_path):
    records = [Record("s ☃", ["a", "b\nc"]), Record("t", ["a"], ["x"]), Record("u", ["a"], ["x"], ["y"]),
               Record("v", ["a"], names={"xname": "Zizzi"})]
    data.save_records(records, str(tmp_path / "r.jsonl"))
    assert data.load_records(str(tmp_path / "r.jsonl")) == records
    assert "target" not in json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])


def test_names_are_put_back():
    assert Record("s", ["a"], names={"xname": "Zizzi", "xnear": "Mill"}).put_names_back("xname by xnear") == "Zizzi by Mill"


def test_batch_layout(tok):
    """Left-padded sources that end in SEP, right-padded texts that end in EOS, one width for targets and static texts."""
    records = [Record("a b c", ["x"]), Record("a", ["x y"])]
    batch = data.make_batch(records, ["one two", "three"], [["x", "x y z w"], ["", "u"]], tok, 12)
    n = [len(tok.encode(r.source)) for r in records]
    assert batch.pad.tolist() == [0, n[0] - n[1]] and (batch.src[:, -1] == tok.sep).all()
    assert batch.src[1].tolist() == [tok.pad] * (n[0] - n[1]) + tok.encode("a") + [tok.sep]
    assert batch.static.shape[:2] == (2, 2) and batch.static.size(2) == batch.target.size(1) <= 12
    for text, ids, length in (("one two", batch.target[0], batch.target_len[0]), ("u", batch.static[1, 1],
                              batch.static_len[1, 1]), ("", batch.static[1, 0], batch.static_len[1, 0])):
        assert tok.decode(ids.tolist()) == text and ids[length - 1] == tok.eos and (ids[length:] == tok.pad).all()
    part = batch.rows(slice(1, 2))
    assert part.sources == ["a"] and torch.equal(part.static, batch.static[1:])


def test_texts_are_cut_with_their_end(tok):
    ids, lengths = data.encode_texts(["one two three four five six"], tok, 4)
    assert ids.shape == (1, 4) and ids[0, 3] == tok.eos and lengths.tolist() == [4]
