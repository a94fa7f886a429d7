"""Mutated files: a clear error or a correct load; never another exception or a hang.

While developing these were run over 10,000 files (FUZZ_FILES); here over fewer."""
import os
import random

import pytest

import data
from data import Record
from data.tokenizer import Tokenizer

FILES = int(os.environ.get("FUZZ_FILES", 300))
PIECES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\x00", b"\xff", b"\\u", b"-1",
          b"\\ud800", b"null", b"1e999", b'"source"', b'"references": []', b"[[]]", b"NaN", b"=",
          "é".encode(), b"\xef\xbb\xbf", b"[" * 2000, b"9" * 30]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by what parsers stumble over."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 1, 2, 10, 100)))
        kind = rng.randrange(5)
        if kind == 0 and at < len(content):
            content[at] = rng.randrange(256)
        elif kind == 1:
            del content[at:end]
        elif kind == 2:
            content[at:at] = content[at:end]
        elif kind == 3:
            content[at:at] = rng.choice(PIECES)
        else:
            del content[at:]
    return bytes(content)


def test_mutated_records_load_or_are_refused(tmp_path):
    path, outcomes = tmp_path / "some.jsonl", {"loaded": 0, "refused": 0}
    records = [Record(f"source {i}", [f"text {i}", "☃"], ["x"], names={"xname": "é"})
               for i in range(3)]
    data.save_records(records, str(path))
    content = path.read_bytes()
    for i in range(FILES):
        path.write_bytes(mutated(content, random.Random(i)))
        try:
            for r in data.load_records(str(path)):
                assert isinstance(r.source, str) and r.references and r.target and r.static, i
                assert all(isinstance(t, str) for t in (*r.references, *r.target, *r.static)), i
                " ".join((r.source, *r.references)).encode()
            outcomes["loaded"] += 1
        except data.InputError as error:
            assert "some.jsonl" in str(error) and "\n" not in str(error), i
            outcomes["refused"] += 1
    assert min(outcomes.values()) > FILES // 50, outcomes


def test_mutated_flags_load_or_are_refused(tmp_path):
    path, content = tmp_path / "flags.json", b'{"": {"lr": 0.1, "K": 8}, "online": {"a": "b"}}'
    for i in range(FILES):
        path.write_bytes(mutated(content, random.Random(i)))
        try:
            assert all(isinstance(flags, dict) for flags in data.flags_of(str(tmp_path)).values())
        except data.InputError as error:
            assert "flags.json" in str(error) and "\n" not in str(error), i


def test_mutated_tokenizers_work_or_are_refused():
    text = "the cat sat \x00 ☃"
    content, worked = Tokenizer.train([text] * 3, 300).ranks.encode(), 0
    for i in range(FILES):
        ranks = mutated(content, random.Random(i)).decode("utf-8", "replace")
        try:
            tok = Tokenizer.load(ranks)
        except ValueError:
            continue
        assert tok.decode(tok.encode(text)) == text
        worked += 1
    assert 0 < worked < FILES // 2


@pytest.mark.parametrize("value", [None, [], {}, b"x\n", 1, float("nan"), "", "\n", "no encoding"])
def test_tokenizers_of_other_types_are_refused(value):
    with pytest.raises(ValueError):
        Tokenizer.load(value)
