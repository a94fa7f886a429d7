"""The course: what is handed out, what a grade says, and what a submission can do to it."""
import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress

import pytest

import data
import test_exercises
import wrong_solutions
from data import forecast
from lab import course
from lab.files import write_json
from runs import Child

ROOT = course.ROOT
EXERCISES, REAL = test_exercises.EXERCISES, test_exercises.REAL
POINTS = {number: points for number, (_, points) in course.exercises().items()}
OURS = (ROOT / "sorl.py").read_text(encoding="utf-8")
LOSS = re.search(r"^def imitate.*?(?=^def distance)", course.read(ROOT / "train.py"), re.M | re.S)
UPDATE = f"{course.UPDATE}\n\n\n{LOSS.group()}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("SORL", "UPDATE"):
        monkeypatch.setenv(name, "")  # so that what is changed in the environment comes back
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def with_body(function: str, body: str) -> str:
    """sorl.py with another body of a function."""
    blank = course.blanked(OURS, {function})
    return blank.replace("    raise NotImplementedError\n", f"    {body}\n", 1)


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as e:
        course.main(list(words))
    assert e.value.code == 2
    return capsys.readouterr().err


# --- exercises and handout ------------------------------------------------------------------------

def module_with(number: str, function) -> types.SimpleNamespace:
    """The project's module with another function; pairs of texts are exchanged in ours."""
    e = EXERCISES[number]
    if not callable(function):
        function = wrong_solutions.edited(getattr(REAL[e.file], e.function), *function)
    return types.SimpleNamespace(**vars(REAL[e.file]) | {e.function: function})


WRONG = wrong_solutions.wrong_solutions()


@pytest.mark.parametrize("number, what, says, changes", [(*row[:3], row[3:]) for row in WRONG],
                         ids=[f"{number} {what}" for number, what, *_ in WRONG])
def test_a_wrong_solution_is_refused(number, what, says, changes):
    """The message names what was wrong."""
    try:
        module = module_with(number, changes)
    except LookupError as e:  # another branch
        pytest.skip(str(e))
    with pytest.raises(Exception) as caught:
        EXERCISES[number].check(module)
    assert says in str(caught.value)


def test_most_wrong_solutions_can_be_made():
    made = 0
    for number, _, _, *changes in WRONG:
        with suppress(LookupError):
            made += bool(module_with(number, changes))
    assert made >= 120 and len(wrong_solutions.RIGHT) >= 10


@pytest.mark.parametrize("number", wrong_solutions.RIGHT)
def test_a_right_solution_passes(number):
    EXERCISES[number].check(module_with(number, wrong_solutions.RIGHT[number]))


def test_the_text_has_every_exercise_and_100_points():
    found = course.exercises()
    assert {n: f for n, (f, _) in found.items()} == {n: e.function for n, e in EXERCISES.items()}
    assert sum(POINTS.values()) == 100 and {row[0] for row in WRONG} == set(POINTS)


def test_the_handout_imports_and_every_exercise_is_blank(tmp_path, capsys):
    course.main(["handout", "box"])
    assert set(os.listdir("box")) == {"my_sorl.py", "my_update.py", "EXERCISES.md"}
    for ours, name in course.HANDED_IN.items():
        spec = importlib.util.spec_from_file_location(name[:-3], tmp_path / "box" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for e in (e for e in EXERCISES.values() if e.file == ours):
            blank, real = getattr(module, e.function), getattr(REAL[ours], e.function)
            assert blank.__doc__ == real.__doc__ and len(blank.__doc__) > 20
            with pytest.raises(NotImplementedError):
                blank(*[None] * real.__code__.co_argcount)
            needed = {name for name in real.__code__.co_names if name in vars(REAL[ours])}
            assert needed <= set(vars(module))  # what is no exercise is at hand
    assert "File exists: 'box/my_sorl.py'" in refused(capsys, "handout", "box")


# --- one check ------------------------------------------------------------------------------------

RENAMED = with_body("masked_runs", """d = mask.long()  # copied
    for i in range(1, mask.size(1)):
        d[:, i] = (d[:, i - 1] + 1) * mask[:, i]
    return d""")
RENAMED = re.sub(r'(def masked_runs.*?\n) *""".*?"""', r"\1", RENAMED)
ALONE = course.blanked(OURS, {e.function for e in EXERCISES.values()} - {"feed", "act"})
FETCHED = OURS + "\nfrom sys import modules\nobserve = modules['sorl'].observe\n"


@pytest.mark.parametrize("number, text, passes, says", [
    ("02", OURS, True, "passed, the same code as ours"),
    ("10", RENAMED, True, "passed, the same code as ours"),
    ("10", with_body("masked_runs", "return real(mask)") + "\nfrom wrong_solutions import "
     "runs_by_cummax as real", True, "passed"),
    ("02", with_body("observe", "import sorl; return sorl.observe(static, mask, 'static', 14)"),
     False, "14): this calls the project's own function; write yours anew"),
    ("02", FETCHED, False, "this calls the project's own function"),
    ("03", with_body("rollout_one_pass", "return act(logits, static, mask, u, None)"), False,
     "this calls the project's own function"),  # act is given to 03, and calls the project's 03
    ("13", ALONE, True, "same code"), ("14", ALONE, True, "same code"), ("01", ALONE, False, "not"),
    ("10", with_body("masked_runs", "return mask.long()"), False,
     "mask [1, 1, 0, 1, 1, 1, 0] at [1]: got 1, expected 2"),
    ("02", with_body("observe", "assert static.dim() == 3"), False,
     ", assert static.dim() == 3: AssertionError"),
    ("02", with_body("observe", "return static[99]"), False, "static[99]: IndexError: index 99"),
    ("02", OURS.replace("def observe", "def obserfe"), False, "has no attribute 'observe'"),
    ("02", course.blanked(OURS, {"observe"}), False, "not written yet"),
    ("02", OURS + "\ndef f(:", False, "SyntaxError: invalid syntax"),
    ("02", OURS + "\n1 / 0", False, "1 / 0: ZeroDivisionError: division by zero"),
    ("02", "\0\udcff", False, "SyntaxError"), ("02", "(" * 10_000, False, ": "),
    ("02", "", False, "my_sorl.py was not handed in"), ("17", OURS, False, "my_update.py was not"),
    ("02", with_body("observe", "import os; os.write(1, b'x'); exit()"), False, "SystemExit"),
    ("02", with_body("observe", "raise ValueError('\\x1b[2J')"), False, "ValueError: [2J"),
    ("02", with_body("observe", "torch.empty(2 ** 33, dtype=torch.uint8)"), False,
     "can't allocate memory"),
    ("02", with_body("observe", "import signal; signal.alarm(0); torch.futures.Future().wait()"),
     False, course.NO_ANSWER),
    ("02", with_body("observe", "import os; os._exit(0)"), False, course.NO_ANSWER)])
def test_what_is_said_of_one_exercise(monkeypatch, capfd, number, text, passes, says):
    if says == course.NO_ANSWER:
        monkeypatch.setattr(course, "WALL", 4)
    source = text.encode(errors="surrogateescape")
    passed, said = course.run_check({"my_sorl.py": source} if text else {}, number)
    assert passed is passes and says in said, said
    assert capfd.readouterr() == ("", "")


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_submission_starts_ends_with_its_check(tmp_path, monkeypatch):
    """A check that loops ends long before its limit by the clock."""
    monkeypatch.setattr(course, "SECONDS", 1)
    begun = time.monotonic()
    body = ("import subprocess; child = subprocess.Popen(['sleep', '99'])\n"
            f"    open('{tmp_path}/pid', 'w').write(str(child.pid))\n    while True: pass")
    answer = course.run_check({"my_sorl.py": with_body("observe", body).encode()}, "02")
    assert answer == (False, course.NO_ANSWER) and time.monotonic() - begun < course.WALL
    time.sleep(0.1)
    assert not is_alive(int((tmp_path / "pid").read_text()))


# --- grades ---------------------------------------------------------------------------------------

def hand_in(folder, sorl: str = "", update: str = "") -> None:
    folder.mkdir(parents=True)
    for name, text in (("my_sorl.py", sorl), ("my_update.py", update)):
        if text:
            (folder / name).write_text(text, encoding="utf-8")


def test_a_folder_of_submissions(tmp_path, capsys):
    """Deep ones are found, entries that hold none are named, names need not be UTF-8."""
    one = with_body("observe", "pass")
    hand_in(tmp_path / "class/whole", OURS, UPDATE)
    hand_in(tmp_path / "class/lee/week 3/final", one)
    hand_in(tmp_path / os.fsdecode(b"class/caf\xe9"), "", UPDATE)
    (tmp_path / "class/kim.py").write_text(one, encoding="utf-8")
    (tmp_path / "class/notes").mkdir()
    (tmp_path / "class/kim.zip").write_text("")
    course.main(["grade", "class"])
    printed = capsys.readouterr().out
    for left_out in ("kim.zip", "notes"):
        assert f"{left_out}: left out, it holds no my_sorl.py and no my_update.py" in printed
    with open("grades.csv", encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    points = {name: int(row["points"]) for name, row in rows.items()}
    late = POINTS["17"] + POINTS["18"] + POINTS["19"]
    rest = 100 - late - POINTS["02"]
    assert points == {"whole": 100, "lee/week 3/final": rest, "kim.py": rest, "caf\\udce9": late}
    assert {rows["whole"][number] for number in POINTS} == {"passed, the same code as ours"}
    assert "got None, expected a number" in rows["kim.py"]["02"]


def test_one_submission_and_its_table(tmp_path, capsys):
    (tmp_path / "kim.py").write_text(with_body("advantage", "return rewards - rewards.mean()"))
    course.main(["grade", "kim.py"])
    printed = capsys.readouterr().out
    for line in (r"^05 advantage +7  baseline=mean, scale=none, rewards .*: got .*, expected",
                 r"^03 rollout_one_pass +10  passed", r"^kim.py +73 points$"):
        assert re.search(line, printed, re.M), line


def test_the_command_for_a_container_grades(tmp_path):
    """What docker would run, in another folder with the project on the path."""
    hand_in(tmp_path / "a class/kim", with_body("observe", "return static"))
    os.mkdir("grades")
    text = course.CONTAINER.format(root=ROOT, path=f"'{tmp_path}/a class'").replace("\\\n", "")
    command = re.search(r"--network none .* -e (PYTHONPATH=\S+) sorl python (.*)", text)
    command = f"cd grades; {command[1]} {sys.executable} {command[2]} | tail -2"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert re.match(r"kim +76 points\nwrote grades.csv\n$", done.stdout), done
    assert os.path.exists("grades/grades.csv")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_keeps_the_grades_and_leaves_no_process(tmp_path, number):
    (tmp_path / "grades.csv").write_text("old")
    hand_in(tmp_path / "class/kim", f"import os, time\nopen('{tmp_path}/pid', 'w').write("
            "str(os.getpid()))\ntime.sleep(99)")
    child = Child(lambda: course.main(["grade", "class"]), tmp_path / "log")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    os.kill(child.pid, number)
    code, _, err = child.end()
    assert code == 130 and err == "\nstopped\n"
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert (tmp_path / "grades.csv").read_text() == "old"


def test_what_is_refused(capsys):
    for name, entry in (("reward", {"reward": "bleu"}), ("list", []), ("file", {"sorl": "x.py"})):
        write_json(entry, f"{name}.json")
    os.mkdir("empty")
    for words, expected in (
            (["grade", "none"], "none: expected a my_sorl.py, or a folder of submissions"),
            (["grade", "empty"], "empty: expected a my_sorl.py, or a folder of submissions"),
            (["grade"], "FILE_OR_FOLDER"), (["handout", "a", "b"], "unrecognized arguments: b"),
            (["leaderboard"], "--secret"), (["grade", "x", "--secret", "1"], "unrecognized"),
            (["leaderboard", "reward.json", "--secret", "1"], "expected a JSON object with K,"),
            (["leaderboard", "list.json", "--secret", "1"], "expected a JSON object with K,"),
            (["leaderboard", "file.json", "--secret", "1"], "file.json: x.py: no such file"),
            (["leaderboard", "none.json", "--secret", "1"], "none.json: expected")):
        assert expected in refused(capsys, *words), words


# --- leaderboard ----------------------------------------------------------------------------------

@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(forecast, "SIZES", {"train": 30, "val": 5, "test": 5})
    monkeypatch.setattr(forecast, "GRAMMARS", dict(forecast.GRAMMARS))


def test_secret_data_are_forecasts_of_another_seed(tmp_path, few):
    made = []
    for i, secret in enumerate((7, 7, 8)):
        course.secret_data(secret, str(tmp_path / str(i)))
        made.append(data.load_dataset(str(tmp_path / str(i))))
    assert made[0] == made[1] != made[2] != forecast.generate("forecast")
    assert all(all(forecast.stated(r.references[0], r.source).values()) for r in made[2]["train"])
    assert data.flags_of(str(tmp_path / "0")) == forecast.FLAGS


@pytest.mark.slow
def test_a_leaderboard(tmp_path, monkeypatch, capsys, few):
    """Entries are run on the secret data, beside ours; a failure is named, and the rest runs."""
    for name, value in (("OURS", ("masked",)), ("SEEDS", ("0",)), ("LEVEL", 0.0)):
        monkeypatch.setattr(course, name, value)
    flags = {"": dict(n_layer=1, n_embd=16, vocab_size=300, base_steps=4, base_batch=4, eval_size=4,
                      steps=2, batch_size=2, kl_weight=0.0)}
    monkeypatch.setattr(course, "write_json", lambda value, path: write_json(flags, path))
    entries = {"flags": {"setting": "online", "K": 2}, "bad": {"K": 0},
               "blank": {"sorl": "blank.py"}, "mine": {"sorl": "mine.py"}}
    for name, entry in entries.items():
        write_json(entry, f"{name}.json")
    (tmp_path / "blank.py").write_text(course.blanked(OURS, {"act"}), encoding="utf-8")
    (tmp_path / "mine.py").write_text(OURS, encoding="utf-8")
    course.main(["leaderboard", *(f"{name}.json" for name in entries), "--secret", "5"])
    printed = capsys.readouterr().out
    for name in ("masked", "flags.json", "mine.json"):
        assert re.search(rf"^{name} +0 +0$", printed, re.M), printed
    for name, wrong in (("bad", "--K 0: expected"), ("blank", "NotImplementedError")):
        assert re.search(rf"^{name}.json: .*{wrong}", printed, re.M), printed
