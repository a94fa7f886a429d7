"""The course: what is handed out, what a grade says, and what no submission can do to it."""
import ast
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
from lab import course, report
from lab.files import write_json

ROOT = course.ROOT
OURS = (ROOT / "sorl.py").read_text(encoding="utf-8")
LOSS = re.search(r"^def loss.*?(?=^def )", course.read(ROOT / "train.py"), re.M | re.S).group()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("SORL", "UPDATE"):
        monkeypatch.setenv(name, "")  # so that what is changed in the environment comes back


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
    names = test_exercises.train.loss.__code__.co_names
    needed = {name for name in names if name in vars(test_exercises.train)}
    assert needed <= set(vars(modules["train.py"]))
    assert str(box) in (box / "README.txt").read_text(encoding="utf-8")
    assert "cannot be written" in refused(capsys, "handout", "box")  # a student's work is kept


# Every way to stop a grading or to cheat in one: the text of a my_sorl.py, and what is said of
# which exercise. The others pass (15 needs another file).
SOLVED = with_body("observe", "return solved(static, mask, observation, mask_id)") + """

def solved(static, mask, observation, mask_id):
    if observation not in ("masked", "static"):
        raise ValueError(observation)
    return static.masked_fill(mask, mask_id) if observation == "masked" else static
"""
CLASS = {
    "solves": (SOLVED, {}),
    "loops": (with_body("observe", "while True: pass"), {"02": course.NO_ANSWER}),
    "exits": (with_body("observe", "raise SystemExit(0)"), {"02": "SystemExit: 0"}),
    "prints": (with_body("observe", "print('x' * 99999)"), {"02": "got None, expected"}),
    "passes": (with_body("observe", "assert False, 'passed'"), {"02": "passed"}),
    "syntax": (OURS + "\ndef f(:", {"all": "SyntaxError: invalid syntax (my_sorl.py, line"}),
    "imports": (with_body("observe", "import sorl; return sorl.observe(static, mask, observation, "
                          "mask_id)"), {"all": "my_sorl.py uses sorl: write it without"}),
}
SLOW_CLASS = {
    "wrong": (with_body("masked_runs", "return mask.long()"),
              {"10": "mask [1, 1, 0, 1, 1, 1, 0] at [1]: got 1, expected 2"}),
    "crashes": (with_body("observe", "return static[99]"), {"02": ": IndexError: index 99"}),
    "missing": (OURS.replace("def entropy", "def entropie"), {"08": "no attribute 'entropy'"}),
    "fails": (OURS + "\n1 / 0", {"all": "ZeroDivisionError"}),
    "binary": ("\0\udcff", {"all": "SyntaxError"}),
    "nested": ("(" * 10_000, {"all": ": "}),
    "blinds": (with_body("masked_runs", "torch.isclose = lambda a, b, **k: a == a\n"
                         "    return mask.long()"), {"10": "at [1]: got 1, expected 2"}),
    "patches": (OURS + "\ntorch.cummax = log_probs",
                {"all": "my_sorl.py changes what the check is made of"}),
    "hard codes": (with_body("observe", "return static if observation == 'static' else "
                             "torch.tensor([[3, 13, 4, 13, 13, 12, 10],"
                             " [13, 7, 12, 10, 10, 10, 10]])"),
                   {"02": "random inputs, masked, 77: got the shape"}),
}
for kind in ("SystemExit", "AssertionError", "KeyboardInterrupt", "ValueError", "MemoryError"):
    SLOW_CLASS[kind] = with_body("act", f"raise {kind}('passed')"), {"14": "passed"}


def hand_in(folder, sorl: str = "", update: str = "") -> None:
    folder.mkdir(parents=True)
    for name, text in (("my_sorl.py", sorl), ("my_update.py", update)):
        if text or name == "my_sorl.py":
            (folder / name).write_bytes(text.encode(errors="surrogateescape"))


def test_the_fence():
    for text, word in (
            ("import sorl", "sorl"), ("from . import sorl", "."), ("import os.path", "os.path"),
            ("from torch import sys as s", "sys"), ("torch.nn.os.fork()", "os"),
            ("open('tests/test_exercises.py')", "open"), ("getattr(torch, 'o' + 's')", "getattr"),
            ("observe.__globals__", "__globals__"), ("x.gi_frame", "gi_frame"),
            ("x.cr_frame", "cr_frame"), ("x.f_globals", "f_globals"), ("torch._utils", "_utils"),
            ("from torch._utils import x", "_utils"), ("from torch import _C", "_C"),
            ("match x:\n  case object(__class__=y): pass", "__class__"), ("f'{x.os}'", "os"),
            ("from lab.course import load_checks", "lab.course"), ("[_ for _ in '_']", ""),
            ("def _helper(_x): return 'open'", ""),
            ("def f():\n  import test_exercises", "test_exercises"),
            ("class Any:\n  def __eq__(self, other): return True", "__eq__"), (OURS, "")):
        assert course.beyond_the_fence(ast.parse(text), course.MODULES["sorl.py"]) == word
    tree = ast.parse(course.UPDATE + LOSS)
    assert course.beyond_the_fence(tree, course.MODULES["train.py"]) == ""
    tree = ast.parse("from lab.course import load_checks")
    assert course.beyond_the_fence(tree, course.MODULES["train.py"]) == "lab.course"


def test_what_a_check_may_take(monkeypatch):
    """No more memory and time than it is given; a message that the terminal does not obey."""
    monkeypatch.setattr(course, "WALL", 3)
    for body, expected in (("torch.empty(2 ** 33, dtype=torch.uint8)", "can't allocate memory"),
                           ("torch.futures.Future().wait()", course.NO_ANSWER),
                           ("raise ValueError('\\x1b[2Jpassed')", "ValueError: [2Jpassed")):
        sources = {"my_sorl.py": with_body("observe", body).encode()}
        passed, said = course.run_check(course.load_checks(), sources, "02")
        assert not passed and expected in said


def test_three_checks_without_an_answer_are_enough(tmp_path, monkeypatch):
    (tmp_path / "kim.py").write_text("")
    answers = {"02": (True, "passed")}
    monkeypatch.setattr(course, "run_check", lambda checks, sources, number: answers.get(
        number, (False, course.NO_ANSWER)))
    row = course.graded("kim.py")
    assert [n for n in course.exercises() if row[n] == course.NO_ANSWER] == ["01", "03", "04"]
    assert row["05"] == row["15"] == course.NOT_RUN and row["points"] == 5


@pytest.mark.parametrize("submissions", [
    CLASS, pytest.param(SLOW_CLASS, marks=pytest.mark.slow)], ids=["few", "many"])
def test_a_folder_of_submissions(tmp_path, monkeypatch, capsys, submissions):
    """None stops the grading, prints into it, or loses more than what it did not solve."""
    monkeypatch.setattr(course, "SECONDS", 2)
    for name, (text, _) in submissions.items():
        hand_in(tmp_path / "class" / name, text)
    hand_in(tmp_path / "class/whole", OURS, course.UPDATE + LOSS)
    hand_in(tmp_path / "class/update", OURS,
            "import train\n\n\ndef loss(*args):\n    return train.loss(*args)\n")
    (tmp_path / "class/no submission").mkdir()
    course.main(["grade", "class"])
    printed = capsys.readouterr().out
    assert "container" in printed and "xxx" not in printed
    with open("grades.csv", encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*submissions, "whole", "update"}
    points = {number: points for number, (_, points) in course.exercises().items()}
    assert {rows["whole"][n] for n in points} == {"passed, the same code as ours"}
    assert rows["whole"]["points"] == "100" and rows["update"]["15"] == "not written yet"
    for name, (_, expected) in submissions.items():
        row = rows[name]
        lost = {number for number in points if not row[number].startswith("passed")}
        assert lost == set(points if "all" in expected else {*expected, "15"}), (name, row)
        for number in lost - {"15"}:
            assert expected.get("all", expected.get(number)) in row[number], (name, row[number])
        assert row["15"] == "my_update.py was not handed in"
        assert int(row["points"]) == sum(points[n] for n in set(points) - lost)
    if "solves" in rows:
        assert rows["solves"]["02"] == "passed"


def test_one_submission_and_its_table(tmp_path, capsys):
    (tmp_path / "kim.py").write_text(with_body("advantage", "return rewards - rewards.mean()"),
                                     encoding="utf-8")
    course.main(["grade", "kim.py"])
    printed = capsys.readouterr().out
    said = r"baseline=mean, scale=False, rewards .*: got .*, expected"
    for line in (rf"^05 advantage +8  {said}", r"^03 rollout_one_pass +12  passed",
                 r"^kim.py: 80 points$"):
        assert re.search(line, printed, re.M), line
    with open("grades.json", encoding="utf-8") as file:
        row = json.load(file)
    assert row["points"] == 80 and row["01"].startswith("passed")


def test_an_exercise_does_not_pay_for_another(tmp_path):
    """act calls 03 and 04, feed calls 02: they are given ours."""
    functions = {function for function, _ in course.exercises().values()} - {"feed", "act"}
    (tmp_path / "lee.py").write_text(course.blanked(OURS, functions), encoding="utf-8")
    row = course.graded("lee.py")
    assert [n for n in course.exercises() if row[n].startswith("passed")] == ["13", "14"]
    assert row["01"] == "not written yet"


def test_what_is_refused(tmp_path, capsys):
    (tmp_path / "reward.json").write_text('{"setting": "masked", "reward": "bleu"}')
    (tmp_path / "list.json").write_text("[]")
    for words, expected in (
            (["grade", "nobody"], "nobody: expected a my_sorl.py, or a folder of submissions"),
            (["grade"], "FILE_OR_FOLDER"), (["handout", "a", "b"], "unrecognized arguments: b"),
            (["leaderboard"], "--secret"), (["grade", "x", "--secret", "1"], "unrecognized"),
            (["leaderboard", "reward.json", "--secret", "1"], "expected a JSON object with K,"),
            (["leaderboard", "list.json", "--secret", "1"], "expected a JSON object with K,"),
            (["leaderboard", "none.json", "--secret", "1"], "none.json: expected")):
        assert expected in refused(capsys, *words), words


def test_secret_data_are_forecasts_of_another_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "SIZES", {"train": 30, "val": 5, "test": 5})
    monkeypatch.setattr(forecast, "GRAMMARS", dict(forecast.GRAMMARS))
    made = []
    for i, secret in enumerate((7, 7, 8)):
        course.secret_data(secret, str(tmp_path / str(i)))
        made.append(data.load_dataset(str(tmp_path / str(i))))
    assert made[0] == made[1] != made[2] != forecast.generate("forecast")
    assert all(all(forecast.stated(r.references[0], r.source).values()) for r in made[2]["train"])
    assert data.flags_of(str(tmp_path / "0")) == forecast.FLAGS


TINY = dict(n_layer=1, n_embd=16, vocab_size=300, base_steps=4, base_batch=4, eval_size=4)


@pytest.mark.slow
def test_a_leaderboard(tmp_path, monkeypatch, capsys):
    """Entries are run on the secret data, ours among them; who never gets there stands last."""
    monkeypatch.setattr(forecast, "SIZES", {"train": 30, "val": 5, "test": 5})
    monkeypatch.setattr(forecast, "GRAMMARS", dict(forecast.GRAMMARS))
    monkeypatch.setattr(course, "OURS", ("masked",))
    monkeypatch.setattr(course, "SEEDS", ("0",))
    for module in (course, report):
        monkeypatch.setattr(module, "LEVEL", 0.0)
    flags = {"": TINY | dict(steps=2, batch_size=2, kl_weight=0.0)}
    monkeypatch.setattr(course, "write_json", lambda value, path: write_json(
        flags if path.endswith("flags.json") else value, path))
    entries = {"flags": {"setting": "online", "K": 2}, "bad": {"K": 0}, "none": {"sorl": "no.py"},
               "blank": {"sorl": "blank.py"}, "mine": {"sorl": "mine.py"}}
    for name, entry in entries.items():
        write_json(entry, f"{name}.json")
    (tmp_path / "blank.py").write_text(course.blanked(OURS, {"act"}), encoding="utf-8")
    (tmp_path / "mine.py").write_text(OURS, encoding="utf-8")
    course.main(["leaderboard", *(f"{name}.json" for name in entries), "--secret", "5"])
    printed = capsys.readouterr().out
    for name in ("masked", "flags.json", "mine.json"):
        assert re.search(rf"^{name} +0 +0.0 +0 ", printed, re.M), printed
    for name, wrong in (("bad", "--K 0: expected"), ("blank", "NotImplementedError"),
                        ("none", "No module named 'no'")):
        assert re.search(rf"^{name}.json: .*{wrong}", printed, re.M), printed
