"""Mutated files: a clear error or a correct load; never another exception or a hang.

While developing these were run over 10,000 files (FUZZ_FILES); here over fewer."""
import os
import random

import pytest

import data
from data.tokenizer import Tokenizer

FILES = int(os.environ.get("FUZZ_FILES", 300))
PIECES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\x00", b"\xff", b"\\u", b"-1",
          b"\\ud800", b"null", b"1e999", b'"source"', b'"references": []', b"[[]]", b"NaN", b"=",
          "é".encode(), b"\xef\xbb\xbf", b"[" * 2000, b"9" * 30]
TEXT = "the cat sat \x00 ☃"


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


def load(path) -> None:
    """What people do with the file, and what must hold then."""
    if path.name == "some.jsonl":
        for r in data.load_records(str(path)):
            assert r.source and r.references and r.target and r.static
            " ".join((r.source, *r.references, *r.target, *r.static)).encode()
    elif path.name == "flags.json":
        flags = data.flags_of(str(path.parent))
        assert all(isinstance(values, dict) for values in flags.values())
    else:
        tok = Tokenizer.load(path.read_text("utf-8", "replace"))
        assert tok.decode(tok.encode(TEXT)) == TEXT


@pytest.mark.parametrize("name, content", [
    ("some.jsonl", '{"source": "a source of many words", "references": ["a text of words", "☃"], '
     '"target": ["x"], "names": {"xname": "é"}}\n' * 3),
    ("flags.json", '{"": {"lr": 0.1, "K": 8}, "online": {"a": "b"}}'),
    ("ranks", Tokenizer.train([TEXT] * 3, 300).ranks)])
def test_mutated_files_load_or_are_refused(tmp_path, name, content):
    path, outcomes = tmp_path / name, {"loaded": 0, "refused": 0}
    for i in range(FILES):
        path.write_bytes(mutated(content.encode(), random.Random(i)))
        try:
            load(path)
            outcomes["loaded"] += 1
        except data.InputError if name != "ranks" else ValueError as error:
            assert name == "ranks" or name in str(error) and "\n" not in str(error), i
            outcomes["refused"] += 1
    assert min(outcomes.values()) > FILES // 50, outcomes
