"""README and the pages beside it tell the truth: tables are the files that commands wrote, code is
what train.py does, what they name exists, and every command runs."""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
import torch

import data
import sorl
from lab import lesson
from lab.cli import flags_of
from runs import TINY, base, built, folder, merge  # noqa: F401 (fixtures)
from test_e2e import csv_file  # noqa: F401 (fixture)

ROOT = Path(__file__).parent.parent
PAGES = {path: (ROOT / path).read_text(encoding="utf-8") for path in (
    "README.md", "assets/RESULTS.md", "lab/LESSON.md", "lab/TROUBLESHOOTING.md")}
README, EVERYTHING = PAGES["README.md"], "\n".join(PAGES.values())
BLOCKS = re.findall(r"<!-- (assets/\S+) -->\n```\n(.*?)```", EVERYTHING, re.S)
LINKS = [(path, text, target) for path, page in PAGES.items()
         for text, target in re.findall(r"\[([^]]*)\]\(([^):#]+)(?:#\S*)?\)", page)]
MODULES = ("train", "sorl", "model", "theory")


@pytest.mark.parametrize("path, block", BLOCKS, ids=[f"{path}-{i}" for i, (path, _) in
                                                     enumerate(BLOCKS)])
def test_printed_results_are_those_of_the_file(path, block):
    """Every line of a block is in the named file, in that order; a line of … leaves some out."""
    lines = iter((ROOT / path).read_text(encoding="utf-8").splitlines())
    for line in block.splitlines():
        if line.strip() != "…":
            found = any(line.rstrip() == other.rstrip() for other in lines)
            assert found, f"{path} has not: {line}"


def test_links_lead_to_files_and_figures_have_alternative_text():
    assert len(LINKS) > 10
    for page, text, target in LINKS:
        file = (ROOT / page).parent / target
        assert file.exists(), f"{page}: {target}"
        if target.endswith(".png"):
            assert len(text) > 30 and file.stat().st_size > 1000, target


def test_every_asset_is_shown_or_is_the_data_of_one():
    linked = {((ROOT / page).parent / target).resolve() for page, _, target in LINKS}
    for path in (ROOT / "assets").iterdir():
        named = f"assets/{path.name}" in EVERYTHING or path in linked
        assert named or path.suffix == ".json" and path.with_suffix(".txt").exists(), path


def test_files_and_functions_exist():
    """`module.name` is a name in that module; files that are named exist."""
    for module, name in re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", EVERYTHING):
        found = name in ("py", "txt", "jsonl") or hasattr(importlib.import_module(module), name)
        assert found, f"{module}.{name}"
    tree = README.split("## Files\n\n```\n")[1].split("```")[0]
    paths = re.findall(r"`((?:data|tests|assets|lab)/[\w./]+)`", EVERYTHING)
    for path in paths + re.findall(r"^\S+", tree, re.M):
        assert (ROOT / path).exists(), path


def test_every_flag_is_known():
    others = {"--quick", "--download", "--plan", "--index-url", "--nproc_per_node", "--figure"}
    known = {f"--{name}" for name in flags_of(train.Config)} | others
    flags = set(re.findall(r"(?<![\w-])--\w[\w-]*", EVERYTHING))
    assert flags <= known, flags - known


def test_settings_of_the_table_are_those_of_the_trainer():
    table = README.split("## The settings\n\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| \W*`(\w+)`", table, re.M) == list(train.SETTINGS)


def test_the_readme_is_read_in_fifteen_minutes():
    """With its code and tables."""
    assert sum(bool(re.search(r"\w", word)) for word in README.split()) <= 3000


def test_the_example_is_computed():
    assert lesson.example() in README


@pytest.mark.parametrize("update", [3, 4, 5])
def test_one_update_of_masked_is_what_train_does(folder, base, update):  # noqa: F811
    """The README's code has at most fifteen lines; its loss and gradients are train.loss's."""
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 15

    run, batches = built("masked", folder, base, "--mle_weight", "0.4", "--batch_size", "20")
    run.step = update
    batch, _ = batches.get(update)
    B, model = len(batch.target), run.policy.model
    names = dict(
        sorl=sorl, model=model, V=run.policy.tok.vocab_size, B=B, K=run.cfg.K, p_m=run.cfg.p_m,
        mle_weight=run.cfg.mle_weight, seed=run.cfg.seed, update=update, src=batch.src,
        pad=batch.pad, static=batch.static[:, 0], static_len=batch.static_len[:, 0],
        target=batch.target, target_len=batch.target_len,
        reward=lambda tokens: train.score(run.reward, run.policy, tokens, batch))
    exec(code, names)

    found = []
    for value in (names["loss"], train.loss(run, batches)[0]):
        gradients = torch.autograd.grad(value, [*model.parameters()])
        found.append(torch.cat([value.view(1), *(g.flatten() for g in gradients)]).detach())
    assert found[1].abs().max() > 0.01
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_the_record_that_is_shown_is_read(tmp_path):
    own_data(tmp_path)
    record = data.load_dataset(str(tmp_path / "my_folder"))["val"][0]
    assert (record.source, len(record.static), record.references) == (
        "Oslo | 3", 2, ["3 degrees in Oslo."])


def own_data(place: Path) -> None:
    """The record of the README, as the splits of my_folder."""
    line = re.search(r'^(\{"source": .*?\})$', README, re.M).group(1)
    lines = [line.replace("Oslo", town) + "\n" for town in ("Oslo", "Rome", "Cork")]
    (place / "my_folder").mkdir()
    for split in data.SPLITS:
        (place / f"my_folder/{split}.jsonl").write_text("".join(lines), encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Commands


def commands() -> list[str]:
    """Every command of README and TROUBLESHOOTING, in its order: in blocks, tables, sentences."""
    page = re.sub(r"`([^`\n]*)\n([^`\n]*)`", r"`\1 \2`", README + PAGES["lab/TROUBLESHOOTING.md"])
    found = re.findall(r"(?:^|&& |`)((?:\w+=\S+ )*(?:python|torchrun) [^`\n#]*)", page, re.M)
    return [*dict.fromkeys(line.strip() for line in found)]


def test_commands_are_whole():
    """None is cut by the end of a line inside backticks."""
    lines = commands()
    assert len(lines) > 15 and lines[0] == "python train.py"
    assert all(len(shlex.split(line)) > 1 and not line.endswith((" -m", " --out", "="))
               for line in lines)


def shortened(line: str, folder: str) -> list[str]:
    """The same command's arguments for python: a tiny model on tiny data, one seed, few updates."""
    program, *words = shlex.split(re.sub(r"(--seeds \d+)[ \d]+", r"\1 ", line))
    if program == "torchrun":
        words = ["-m", "torch.distributed.run", *words]
    if words[0] == "theory.py" and "--plan" not in words:
        words = ["theory.py", "P2", "--quick"]
    if "pytest" in words:
        words += ["-c", f"{ROOT}/pytest.ini", "-p", "no:cacheprovider"]
    for program in {"train.py", "tests.tools.bench"} & {*words}:
        at = words.index(program) + 1
        given = [] if "--mode" in words or "--init" in words else TINY
        flags = merge(*given, *words[at:])
        if "my_folder" not in flags:
            flags = merge(*flags, "--data", folder)
        words[at:] = flags
    return [f"{ROOT}/{word}" if re.fullmatch(r"(tests/)?\w+\.py", word) else word
            for word in words]


@pytest.mark.slow
def test_every_command_runs(folder, csv_file, tmp_path):  # noqa: F811
    """One after the other in a new folder, as a reader would type them. None of our files is opened
    in the locale's encoding."""
    for name in ("devset.csv", "testset_w_refs.csv"):
        shutil.copy(csv_file, tmp_path / name)
    own_data(tmp_path)
    for line in commands():
        if line == "python -m pytest":  # this is it
            continue
        variables, words = re.fullmatch(r"((?:\w+=\S+ )*)(.*)", line).groups()
        given = dict(pair.split("=") for pair in variables.split())
        path = f"{ROOT}:{tmp_path}:{tmp_path / given.pop('PYTHONPATH', '')}"
        environment = os.environ | given | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1",
                                            "PYTHONWARNDEFAULTENCODING": "1"}
        done = subprocess.run([sys.executable, *shortened(words, folder)], cwd=tmp_path,
                              env=environment, timeout=600, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}{done.stdout[-500:]}"
        assert not re.search(rf"^{ROOT}/.*EncodingWarning", done.stderr, re.M), done.stderr
        if "handout" in line:  # a student who has written it all
            shutil.copy(ROOT / "sorl.py", tmp_path / "my_course/my_sorl.py")
