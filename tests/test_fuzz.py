"""Mutated data files and checkpoints: a clear error or a correct load; never another exception, a hang, or code that runs.

While developing these were run over 10,000 files and 1,000 checkpoints (FUZZ_FILES, FUZZ_CHECKPOINTS); here over fewer.
"""
import os
import pickle
import random
import zipfile

import pytest
import torch

import data
import train
from test_train import base, folder  # noqa: F401 (fixtures)

FILES, CHECKPOINTS = int(os.environ.get("FUZZ_FILES", 1000)), int(os.environ.get("FUZZ_CHECKPOINTS", 100))
PIECES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\x00", b"\xff", b"\\u", b"\\ud800", b"null", b"1e999", b"-1",
          b'"source"', b'"references": []', b"[[]]", b"NaN", "é".encode(), b"\xef\xbb\xbf", b"[" * 2000]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by pieces that parsers stumble over."""
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


@pytest.mark.slow
def test_mutated_records_load_or_are_refused(folder, tmp_path):
    content = b"".join(open(f"{folder}/val.jsonl", "rb").readlines()[:3])
    path, outcomes = tmp_path / "some.jsonl", {"loaded": 0, "refused": 0}
    for i in range(FILES):
        path.write_bytes(mutated(content, random.Random(i)))
        try:
            for r in data.load_records(str(path)):
                assert isinstance(r.source, str) and r.references and r.target and r.static, i
                assert all(isinstance(t, str) for t in (*r.references, *r.target, *r.static)), i
                " ".join((r.source, *r.references)).encode()  # what cannot be encoded cannot be trained on
            outcomes["loaded"] += 1
        except data.InputError as e:
            assert "some.jsonl" in str(e), i
            outcomes["refused"] += 1
    assert min(outcomes.values()) > FILES // 50, outcomes


@pytest.mark.slow
def test_mutated_checkpoints_load_or_are_refused(base, tmp_path):
    content, path, refused = open(base, "rb").read(), str(tmp_path / "some.pt"), 0
    for i in range(CHECKPOINTS):
        with open(path, "wb") as file:
            file.write(mutated(content, random.Random(i)))
        try:
            train.load_policy(path, torch.device("cpu"))
        except data.InputError as e:
            assert path in str(e) and "\n" not in str(e), i
            refused += 1
    assert refused > CHECKPOINTS // 10


def test_values_of_other_types_are_refused(base, tmp_path):
    """A well-formed file that states nonsense: each key replaced by values of other types and shapes."""
    state, path = torch.load(base, weights_only=True), str(tmp_path / "some.pt")
    for key in ("model", "gpt", "tokenizer", "T"):
        for value in (None, [], {}, "x", b"x", float("nan"), {"a": 1}, torch.zeros(2), -1):
            torch.save(state | {key: value}, path)
            try:
                policy = train.load_policy(path, torch.device("cpu"))
                assert policy.T > 0
            except data.InputError as e:
                assert path in str(e)


def test_a_checkpoint_runs_no_code(tmp_path):
    """A pickle that would make a file when unpickled is refused, and makes none."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pt", "zip.pt"):
        with pytest.raises(data.InputError):
            train.load(str(tmp_path / name))
    assert not (tmp_path / "made").exists()
