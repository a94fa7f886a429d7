"""README and RESULTS tell the truth: tables are the files that commands wrote, what they name is
there, and every command of the README runs."""
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from lab import lesson
from lab.cli import flags_of
from runs import TINY, base, folder  # noqa: F401 (fixtures)
from test_e2e import csv_file  # noqa: F401 (fixture)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "assets/RESULTS.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- (assets/\S+) -->\n```\n(.*?)```", README + RESULTS, re.S)
MODULES = ("train", "sorl", "model", "theory", "batches", "policy", "report", "settings")


@pytest.mark.parametrize("path, block", BLOCKS, ids=[f"{path}-{i}" for i, (path, _) in
                                                     enumerate(BLOCKS)])
def test_printed_results_are_those_of_the_file(path, block):
    """Every line of a block stands in the named file, in that order; a line of … leaves some out."""
    lines = iter((ROOT / path).read_text(encoding="utf-8").splitlines())
    for line in block.splitlines():
        if line.strip() != "…":
            found = any(line.rstrip() == other.rstrip() for other in lines)
            assert found, f"{path} has not: {line}"


def test_results_are_shown():
    shown = {path for path, _ in BLOCKS}
    assert shown >= {"assets/main.txt", "assets/forecast.txt", "assets/forecast2.txt"}
    assert all(os.path.exists(ROOT / path) for path in shown)


def test_figures_exist_and_have_alternative_text():
    figures = re.findall(r"!\[(.*?)\]\((.*?)\)", README)
    figures += [(alt, f"assets/{path}") for alt, path in re.findall(r"!\[(.*?)\]\((.*?)\)", RESULTS)]
    assert len(figures) >= 3
    for alt, path in figures:
        assert len(alt) > 30 and os.path.getsize(ROOT / path) > 1000, path


def test_every_asset_is_shown_or_is_the_data_of_one():
    for path in (ROOT / "assets").iterdir():
        named = f"assets/{path.name}" in README + RESULTS or f"]({path.name})" in RESULTS
        table = path.with_suffix(".txt")
        assert named or path.suffix == ".json" and table.exists() or path.name == "RESULTS.md", path


def test_files_and_functions_exist():
    """`module.name` is a name in that module, `Class.method` a method; files that are named exist."""
    for module, name in re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", README):
        if name not in ("py", "txt", "jsonl"):
            home = module if module in ("train", "sorl", "model", "theory") else f"lab.{module}"
            assert hasattr(importlib.import_module(home), name), f"{module}.{name}"
    for method in re.findall(r"`Batches\.(\w+)`", README):
        assert hasattr(importlib.import_module("lab.batches").Batches, method), method
    for path in re.findall(r"`((?:data|tests|assets|lab)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


def test_every_flag_in_a_command_is_known():
    others = {"--quick", "--download", "--plan", "--index-url", "--nproc_per_node", "--figure",
              "--spectrum"}
    known = {f"--{name}" for name in flags_of(train.Config)} | others
    lines = re.findall(r"(?:python|torchrun) [^`\n]*(?:\\\n[^`\n]*)*", README + RESULTS)
    flags = {word for line in lines for word in re.findall(r" (--\w[\w-]*)", line)}
    assert flags <= known, flags - known


def test_the_six_token_example_is_computed():
    assert lesson.example() in README


def test_the_readme_is_read_in_fifteen_minutes():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    assert len(prose.split()) < 3000


def commands() -> list[str]:
    """Every command of the README, in its order: in blocks, tables and sentences."""
    found = re.findall(r"(?:^|&& |`)((?:SORL=\S+ )?(?:python|torchrun)\s(?:[^`\n#]*\\\n)*[^`\n#]*)",
                       re.sub(r"`([^`\n]*)\n([^`\n]*)`", r"`\1 \2`", README), re.M)
    lines = [" ".join(line.replace("\\\n", " ").split()) for line in found if "…" not in line]
    return [line for line in dict.fromkeys(lines) if line != "python"]  # as in ```python


def shortened(line: str, folder: str) -> list[str]:
    """The same command's arguments for python: a tiny model on tiny data, one seed, few updates."""
    program, *words = shlex.split(re.sub(r"(--seeds \d+)[ \d]+", r"\1 ", line))
    if program == "torchrun":
        words = ["-m", "torch.distributed.run", *words]
    if words[0] == "theory.py" and "--plan" not in words:
        words = ["theory.py", "P2", "--quick"]
    if words[:2] == ["-m", "pytest"]:
        words += [f"{ROOT}/tests/test_exercises.py", "-c", f"{ROOT}/pytest.ini", "-p",
                  "no:cacheprovider"]
    if "train.py" in words and not {"-h", "--resume"} & set(words):
        words += [] if "datasets/e2e" in words or "my_folder" in words else ["--data", folder]
        if {"eval", "sample", "candidates"}.isdisjoint(words):
            given = {word for word in words if word.startswith("--")}
            for flag, value in zip(TINY[::2], TINY[1::2]):
                words += [] if flag in given else [flag, value]
    return [f"{ROOT}/{word}" if re.fullmatch(r"\w+\.py", word) else word for word in words]


def test_commands_are_whole():
    """None is cut by the end of a line inside backticks."""
    lines = commands()
    assert len(lines) > 12 and lines[0] == "python train.py"
    assert all(len(shlex.split(line)) > 1 and not line.endswith((" -m", " --out", "="))
               for line in lines)


def own_data(place: Path) -> None:
    """The record and the reward that the README shows, as files."""
    line = re.search(r'^(\{"source": .*?\})$', README, re.M).group(1)
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    (place / "my_folder").mkdir()
    for split in ("train", "val", "test"):
        lines = [line.replace("Oslo", town) + "\n" for town in ("Oslo", "Rome", "Cork")]
        (place / f"my_folder/{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (place / "my_reward.py").write_text(code, encoding="utf-8")


@pytest.mark.slow
def test_every_command_runs(folder, csv_file, tmp_path):  # noqa: F811
    """One after the other in a new folder, as a reader would type them."""
    for name in ("devset.csv", "testset_w_refs.csv"):
        shutil.copy(csv_file, tmp_path / name)
    shutil.copy(ROOT / "sorl.py", tmp_path / "my_sorl.py")
    own_data(tmp_path)
    for line in commands():
        if line == "python -m pytest":  # this is it
            continue
        variables = dict(re.findall(r"^(\w+)=(\S+) ", line))
        words = shortened(re.sub(r"^\w+=\S+ ", "", line), folder)
        environment = os.environ | variables | {"PYTHONPATH": f"{ROOT}:{tmp_path}",
                                                "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, timeout=600,
                              capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}{done.stdout[-500:]}"


def test_own_data_and_own_reward_as_shown(tmp_path, monkeypatch):
    """A run on them reports that reward."""
    own_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    train.main(["--mode", "train", *TINY, "--data", "my_folder", "--batch_size", "3", "--reward",
                "my_reward:short", "--setting", "masked", "--out", "run"])
    lines = (tmp_path / "run/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    words = [len(json.loads(line)["text"].split()) for line in lines]
    expected = sum(1 / n if n else 0 for n in words) / len(words)
    row, = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert row["test_reward"] == pytest.approx(expected)
