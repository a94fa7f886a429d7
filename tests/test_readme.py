"""The README tells the truth: its tables are the files that its commands wrote, and what it names exists."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import train

from test_e2e import csv_file  # noqa: F401 (fixtures)
from test_train import TINY, base, folder  # noqa: F401

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = open(f"{ROOT}/README.md", encoding="utf-8").read()
BLOCKS = re.findall(r"<!-- (assets/\S+) -->\n```\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("path, block", BLOCKS, ids=[f"{path}-{i}" for i, (path, _) in enumerate(BLOCKS)])
def test_printed_results_are_those_of_the_file(path, block):
    """Every line of a block stands in the named file, in that order (a line of … leaves some out)."""
    lines = iter(line.rstrip() for line in open(f"{ROOT}/{path}", encoding="utf-8"))
    for line in block.splitlines():
        assert line.strip() == "…" or any(line.rstrip() == there for there in lines), f"{path} has not: {line}"


def test_results_are_shown():
    assert {path for path, _ in BLOCKS} >= {"assets/forecast.txt", "assets/forecast2.txt", "assets/e2e.txt"}


def test_figures_exist_and_have_alternative_text():
    figures = re.findall(r"!\[(.*?)\]\((.*?)\)", TEXT)
    assert figures and all(len(alt) > 30 and os.path.getsize(f"{ROOT}/{path}") > 1000 for alt, path in figures)


def test_files_and_functions_exist():
    """`module.name` in the README is a name in that module, and every file that is named is there."""
    import data.rewards, experiments, model, report, sorl, theory, train  # noqa: E401
    modules = dict(train=train, sorl=sorl, model=model, theory=theory, report=report, experiments=experiments)
    for module, name in re.findall(r"`(train|sorl|model|theory|report|experiments)\.(\w+)`", TEXT):
        assert name in ("py", "txt", "jsonl", "json") or hasattr(modules[module], name), f"{module}.{name}"
    for path in re.findall(r"`((?:data|tests|assets)/[\w./]+)`", TEXT):
        assert os.path.exists(f"{ROOT}/{path}"), path


def test_every_flag_in_a_command_is_known():
    known = {"--" + f.name for f in train.fields(train.Config)} | {"--quick", "--download", "--plan", "--index-url", "--nproc_per_node", "--json"}
    flags = {word for line in re.findall(r"^(?:python|torchrun) .*(?:\\\n.*)*", TEXT, re.M) for word in re.findall(r"--\w[\w-]*", line)}
    assert flags <= known, flags - known


def test_the_six_token_example_is_computed():
    """The block in the README is what the command prints; its rewards by hand: 'some rain in town today on' against
    'some rain in town today' has ROUGE-1 and L of 10/11 and ROUGE-2 of 8/9, mean .902."""
    import lesson
    assert lesson.example() in TEXT
    assert f"{(10 / 11 + 8 / 9 + 10 / 11) / 3:.3f}" == "0.902" and "R = 0.902" in lesson.example()


def test_the_picture_of_the_settings_is_drawn(tmp_path, base):
    import lesson
    lesson.main(["picture", "--init", base, "--out", str(tmp_path / "settings.png")])
    assert os.path.getsize(tmp_path / "settings.png") > 20_000
    with pytest.raises(SystemExit, match="2"):
        lesson.main(["picture", "--init", str(tmp_path / "none.pt")])


def commands() -> list[str]:
    """Every command of the README, in its order: in blocks, tables and sentences."""
    found = re.findall(r"(?:^|&& |`)((?:SORL=\S+ )?(?:python|torchrun) (?:[^`\n]*\\\n)*[^`\n]*)", TEXT, re.M)
    return list(dict.fromkeys(re.sub(r"\\\n\s*|\s+#.*", " ", command).strip() for command in found if "…" not in command))


SHORT = {"--steps": "2", "--base_steps": "4", "--n_layer": "1", "--n_embd": "16", "--n_head": "2", "--vocab_size": "300", "--K": "2",
         "--block_size": "160", "--batch_size": "2", "--base_batch": "4", "--eval_size": "4", "--device": "cpu"}


def shortened(line: str, folder: str) -> list[str]:
    """The same command's arguments for python: a tiny model on tiny data, one seed, a few updates; one proposition, one
    experiment."""
    program, *words = shlex.split(re.sub(r"(--seeds \d+)[ \d]+", r"\1 ", line))
    if program == "torchrun":
        words = ["-m", "torch.distributed.run", *words]
    if words[0] == "theory.py" and "--plan" not in words:
        words = ["theory.py", "P2", "--quick"]
    if words[0] == "experiments.py":
        words = ["experiments.py", "mle", *words[min(i for i, word in enumerate(words) if word.startswith("--")):]]
    if words[:2] == ["-m", "tests.bench"]:
        words += ["--peak", "2"]
    if words[:2] == ["-m", "pytest"]:
        words += [f"{ROOT}/tests/test_exercises.py", "-c", f"{ROOT}/pytest.ini", "-p", "no:cacheprovider"]
    if {"train.py", "experiments.py"} & set(words) and not {"-h", "--resume"} & set(words):
        words += [] if "datasets/e2e" in words else ["--data", folder]
        if {"eval", "sample", "candidates"}.isdisjoint(words):
            words += [word for flag, value in SHORT.items() if flag not in words for word in (flag, value)]
    return [f"{ROOT}/{word}" if re.fullmatch(r"\w+\.py", word) else word for word in words]


def test_commands_are_whole():
    """None is cut by the end of a line inside backticks."""
    assert all(len(shlex.split(line)) > 1 and not line.endswith((" -m", " --out", "=")) for line in commands())


@pytest.mark.slow
def test_every_command_runs(folder, csv_file, tmp_path):
    """One after the other in a new folder, as a reader would type them: later ones use what earlier ones wrote."""
    for name in ("devset.csv", "testset_w_refs.csv"):
        shutil.copy(csv_file, tmp_path / name)
    shutil.copy(f"{ROOT}/sorl.py", tmp_path / "my_sorl.py")
    lines, ran = commands(), 0
    assert len(lines) > 18 and lines[0] == "python train.py"
    for line in lines:
        if line == "python -m pytest":  # this is it
            continue
        variables = dict(re.findall(r"^(\w+)=(\S+) ", line))
        words = shortened(re.sub(r"^\w+=\S+ ", "", line), folder)
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                              env=os.environ | variables | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}{done.stdout[-500:]}"
        ran += 1
    assert ran == len(lines) - 1


def test_own_data_and_own_reward_as_shown(tmp_path, monkeypatch):
    """The record and the reward that the README shows are a data set and a reward: a run on them reports that reward."""
    line, code = re.search(r'^(\{"source": .*\})$', TEXT, re.M).group(1), re.search(r"```python\n(.*?)```", TEXT, re.S).group(1)
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(line.replace("Oslo", place) + "\n" for place in ("Oslo", "Rome", "Cork")))
    (tmp_path / "my_reward.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    flags = [*TINY, "--data", str(tmp_path), "--batch_size", "3"]
    train.main(["--mode", "train", *flags, "--reward", "my_reward:short", "--out", str(tmp_path / "run")])
    sys.modules.pop("my_reward")
    predicted = [json.loads(row)["text"] for row in open(tmp_path / "run/predictions.jsonl")]
    expected = sum(1 / (1 + len(text.split())) for text in predicted) / 3
    assert json.load(open(tmp_path / "run/results.json"))[0]["test_reward"] == pytest.approx(expected)
