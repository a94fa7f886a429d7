"""The README tells the truth: its tables are the files that its commands wrote, and what it names exists."""
import os
import re

import pytest

from test_train import base, folder  # noqa: F401 (fixtures)

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
    import train
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
