"""The course: what is handed out, what a grade says, and what no submission can do to it."""
import csv
import importlib.util
import json
import os
import re
import sys

import pytest

import data
import test_exercises
import torch
from data import forecast
from lab import course

ROOT = course.ROOT
OURS = (ROOT / "sorl.py").read_text(encoding="utf-8")
LOSS = "from train import MLE_P_M, rank_static\n\n\n" + re.search(
    r"^def loss.*?(?=^def )", (ROOT / "train.py").read_text(encoding="utf-8"), re.M | re.S).group()
IMPORTS = "import sorl\nimport torch\nfrom lab.batches import Batches\nfrom lab.policy import " \
          "score\nfrom lab.run import Run\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("SORL", "UPDATE"):
        monkeypatch.setenv(name, "")  # so that what is taken from the environment comes back


def with_body(function: str, body: str, source: str = OURS) -> str:
    """sorl.py with another body of a function."""
    blank = course.blanked(source, {function})
    return blank.replace("    raise NotImplementedError\n", f"    {body}\n", 1)


def refused(capsys, *words) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        course.main(list(words))
    assert e.value.code == 2
    return capsys.readouterr().err.strip()


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_text_has_every_exercise_and_100_points():
    found = course.exercises()
    assert {n: f for n, (f, _) in found.items()} == {
        n: e.function for n, e in test_exercises.EXERCISES.items()}
    assert sum(points for _, points in found.values()) == 100


def test_the_handout_imports_and_every_exercise_is_blank(tmp_path, capsys):
    course.main(["handout", "box"])
    box = tmp_path / "box"
    assert set(os.listdir(box)) == {"my_sorl.py", "my_update.py", "EXERCISES.md", "README.txt"}
    modules = {"sorl.py": load(box / "my_sorl.py"), "train.py": load(box / "my_update.py")}
    for e in test_exercises.EXERCISES.values():
        module, real = modules[e.file], test_exercises.REAL[e.file]
        function, ours = getattr(module, e.function), getattr(real, e.function)
        assert function.__doc__ == ours.__doc__ and len(function.__doc__) > 20
        arguments = function.__code__.co_argcount
        assert arguments == ours.__code__.co_argcount
        with pytest.raises(NotImplementedError):
            function(*[None] * arguments)
    kept = {name for name in vars(test_exercises.real) if not name.startswith("_")}
    assert kept <= set(vars(modules["sorl.py"]))  # what is no exercise is there whole
    theirs, ours = (m.uniforms((2, 3), 1) for m in (modules["sorl.py"], test_exercises.real))
    assert torch.equal(theirs, ours)
    assert str(box) in (box / "README.txt").read_text(encoding="utf-8")
    assert "cannot be written" in refused(capsys, "handout", "box")  # a student's work is kept


FORGE = """

def alive(fd):
    try:
        return os.fstat(fd) is not None
    except OSError:
        return False
"""
SUBMISSIONS = {  # file -> its text, and what is said of exercises; the others pass, but for 15
    # Every way to stop a grading, or to disturb it.
    "loops.py": (with_body("observe", "while True: pass"), {"02": "does it loop for ever?"}),
    "exits.py": (with_body("observe", "raise SystemExit(0)"), {"02": "ends the program"}),
    "leaves.py": ("import os\n" + with_body("observe", "os._exit(0)"), {"02": "ends the program"}),
    "prints.py": (with_body("observe", "print('x' * 99999)"), {"02": "got None, expected"}),
    "syntax.py": (OURS + "\ndef f(:", {"all": "cannot be imported: line"}),
    "empty.py": ("", {"all": "has no function"}),
}
MORE = {
    "wrong.py": (with_body("masked_runs", "return mask.long()"),
                 {"10": "mask [1, 1, 0, 1, 1, 1, 0] at [1]: got 1, expected 2"}),
    "crashes.py": (with_body("observe", "return static[99]"), {"02": ": IndexError: index 99"}),
    "missing.py": (OURS.replace("def entropy", "def entropie"), {"08": "has no function entropy"}),
    "fails.py": (OURS + "\n1 / 0", {"all": "cannot be imported: line"}),
    "binary.py": ("\0\udcff", {"all": "cannot be imported"}),
    "imports.py": (with_body("observe", "import sorl; return sorl.observe(static, mask)"),
                   {"all": "uses sorl: write it without"}),
    "forges.py": ("import os\n" + with_body(
        "observe", "[os.write(fd, b'\\0\\0\\0\\6passed') for fd in range(3, 99) if alive(fd)]; "
        "os._exit(0)") + FORGE, {"02": "ends the program"}),
    "finds.py": ("import sys\n" + with_body(
        "observe", "return sys.modules['sorl'].observe(static, mask, observation, mask_id)"),
        {"02": "AttributeError: 'NoneType'"}),
    "finds2.py": ("import sys\n" + with_body(
        "observe", "return sys.modules['lab.batches'].sorl.observe(static, mask, observation, 13)"),
        {"02": "AttributeError: 'NoneType'"}),
}


@pytest.mark.parametrize("submissions", [
    SUBMISSIONS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["disturbing", "wrong"])
def test_a_folder_of_submissions(tmp_path, monkeypatch, capsys, submissions):
    """None stops the grading, prints into it, or loses more than what it did not solve."""
    monkeypatch.setattr(course, "SECONDS", 2)
    os.mkdir("class")
    for name, (text, _) in submissions.items():
        (tmp_path / "class" / name).write_bytes(text.encode(errors="surrogateescape"))
    os.mkdir("class/whole")
    (tmp_path / "class/whole/my_sorl.py").write_text(OURS, encoding="utf-8")
    (tmp_path / "class/whole/my_update.py").write_text(IMPORTS + LOSS, encoding="utf-8")
    os.mkdir("class/update")
    (tmp_path / "class/update/my_update.py").write_text(
        "import train\n\n\ndef loss(*args):\n    return train.loss(*args)\n", encoding="utf-8")
    os.mkdir("class/no submission")
    course.main(["grade", "class"])
    printed = capsys.readouterr().out
    assert "container" in printed and "xxx" not in printed
    with open("grades.csv", encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*submissions, "whole", "update"}
    assert rows["whole"]["points"] == "100" and rows["whole"]["remarks"] == ""
    assert len(rows["whole"]["the same code as ours"].split()) == 15
    assert rows["update"]["points"] == "0" and "15: not written yet" in rows["update"]["remarks"]
    points = {n: p for n, (_, p) in course.exercises().items()}
    for name, (_, expected) in submissions.items():
        row = rows[name]
        remarks = dict(r.split(": ", 1) for r in row["remarks"].split("; ") if r[:2].isdigit())
        lost = set(remarks) - {"15"}
        assert lost == (set(points) - {"15"} if "all" in expected else set(expected)), name
        for number in lost:
            assert expected.get("all", expected.get(number)) in remarks[number], (name, remarks)
        assert int(row["points"]) == sum(p for n, p in points.items() if n not in remarks)


def test_one_submission_and_its_table(tmp_path, capsys):
    (tmp_path / "kim.py").write_text(with_body("advantage", "return rewards - rewards.mean()"),
                                     encoding="utf-8")
    course.main(["grade", "kim.py"])
    printed = capsys.readouterr().out
    said = r"baseline=mean, scale=False, rewards .*: got .*, expected"
    for line in (rf"^05 advantage +0/8  {said}", r"^03 rollout_one_pass +12/12  passed$",
                 r"^kim.py +80/100$"):
        assert re.search(line, printed, re.M), line
    with open("grades.json", encoding="utf-8") as file:
        row = json.load(file)
    assert row["points"] == 80 and row["said"]["01"] == "passed" and "05" not in row["copied"]


def test_an_exercise_does_not_pay_for_another(tmp_path, monkeypatch):
    """act calls 03 and 04, feed calls 02: they are given ours. And who loops is given up."""
    monkeypatch.setattr(course, "SECONDS", 1)
    functions = {function for function, _ in course.exercises().values()} - {"feed", "act"}
    source = course.blanked(OURS, functions)
    source = source.replace("    raise NotImplementedError\n", "    while True: pass\n", 4)
    (tmp_path / "lee.py").write_text(source, encoding="utf-8")
    row = course.graded("lee.py")
    assert row["said"]["01"] == row["said"]["02"] == row["said"]["03"] == course.TOO_LONG.format(1)
    assert row["said"]["13"] == "not run: 3 exercises gave no answer"
    (tmp_path / "lee.py").write_text(course.blanked(OURS, functions), encoding="utf-8")
    row = course.graded("lee.py")
    assert [n for n, said in row["said"].items() if said == "passed"] == ["13", "14"]


def test_what_is_refused(tmp_path, capsys):
    (tmp_path / "reward.json").write_text('{"setting": "masked", "reward": "bleu"}')
    (tmp_path / "list.json").write_text("[]")
    for words, expected in (
            (["grade", "nobody"], "nobody: expected a my_sorl.py, or a folder of submissions"),
            (["grade"], "expected one path"), (["handout", "a", "b"], "expected one path"),
            (["leaderboard"], "--secret N"), (["grade", "x", "--secret", "1"], "--secret N"),
            (["leaderboard", "reward.json", "--secret", "1"], "a JSON object of flags, among"),
            (["leaderboard", "list.json", "--secret", "1"], "a JSON object of flags, among"),
            (["leaderboard", "none.json", "--secret", "1"], "none.json: expected")):
        assert expected in refused(capsys, *words), words


def test_secret_data_are_forecasts_of_another_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "SIZES", {"train": 30, "val": 5, "test": 5})
    made = []
    for secret in (7, 7, 8):
        course.secret_data(secret, str(tmp_path))
        made.append(data.load_dataset(str(tmp_path)))
    assert made[0] == made[1] != made[2] != forecast.generate("forecast")
    assert all(forecast.stated(r.references[0], r.source) == dict.fromkeys(
        forecast.stated(r.references[0], r.source), True) for r in made[2]["train"])
    assert data.flags_of(str(tmp_path)) == forecast.FLAGS and set(forecast.GRAMMARS) == {
        "forecast", "forecast2"}


TINY = dict(n_layer=1, n_embd=16, vocab_size=300, base_steps=4, base_batch=4, eval_size=4)


@pytest.mark.slow
def test_a_leaderboard(tmp_path, monkeypatch, capsys):
    """Entries are run on the secret data, ours among them; who never gets there stands last."""
    monkeypatch.setattr(forecast, "SIZES", {"train": 30, "val": 5, "test": 5})
    monkeypatch.setattr(course, "OURS", ("masked",))
    monkeypatch.setattr(course, "SEEDS", (0,))
    monkeypatch.setattr(course, "LEVEL", 0.0)
    monkeypatch.setattr(course, "ALWAYS", course.ALWAYS | dict(device="cpu"))
    write = course.secret_data

    def tiny_data(secret, folder):
        write(secret, folder)
        with open(f"{folder}/flags.json", "w") as file:
            json.dump({"": TINY | dict(steps=2, batch_size=2, kl_weight=0.0)}, file)
    monkeypatch.setattr(course, "secret_data", tiny_data)
    (tmp_path / "flags.json").write_text('{"setting": "online", "K": 2}')
    (tmp_path / "bad.json").write_text('{"setting": "masked", "K": 0}')
    (tmp_path / "blank.py").write_text(course.blanked(OURS, {"act"}), encoding="utf-8")
    (tmp_path / "mine.py").write_text(OURS, encoding="utf-8")
    course.main(["leaderboard", "flags.json", "bad.json", "blank.py", "mine.py", "--secret", "5"])
    with open("leaderboard.json", encoding="utf-8") as file:
        rows = json.load(file)
    rows = {row["name"]: row for row in rows}
    assert rows["(masked)"]["fp"] == rows["mine.py"]["fp"] == 0 == rows["flags.json"]["fp"]
    assert "--K 0: expected" in rows["bad.json"]["wrong"] and rows["bad.json"]["fp"] is None
    assert "NotImplementedError" in rows["blank.py"]["wrong"] and rows["blank.py"]["fp"] is None
