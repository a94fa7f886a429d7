"""A course in a box: what students get, how it is graded, and a leaderboard.

    python -m lab.course handout DIR                       the exercises, blank, with their text
    python -m lab.course grade FILE_OR_FOLDER              one submission, or a folder of them
    python -m lab.course leaderboard ENTRY … --secret N    forward propagations (FPs) to .98

lab/EXERCISES.md is for students, lab/TEACHERS.md for teachers. What is blank is made from sorl.py
and train.py, points and minutes are read from EXERCISES.md, the checks are those of
tests/test_exercises.py. Grading runs other people's code on this machine, a process for every
check: that keeps accidents apart, not attacks. Use a container.
"""
import argparse
import ast
import csv
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import data
from data import InputError, forecast
from lab.cli import flags_of, run_command
from lab.policy import read_json, write_json
from lab.report import LEVEL, first_reach, read_curve
from lab.settings import BASE, NOT_TUNING, Config

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).resolve().parent.parent
HANDED_IN = {"sorl.py": "my_sorl.py", "train.py": "my_update.py"}  # what is written anew -> as
PASSED, TOO_LONG = "passed", "no answer in {} seconds: does it loop for ever?"
SECONDS, STRIKES = 5, 3  # of the processor, a check; after so many that took longer, no more is run


def exercises() -> dict[str, tuple[str, int]]:
    """number -> the function to write, and its points; from EXERCISES.md."""
    text = (ROOT / "lab/EXERCISES.md").read_text(encoding="utf-8")
    found = re.findall(r"^### (\d\d) `(\w+)`: (\d+) points, \d+ minutes$", text, re.M)
    return {number: (function, int(points)) for number, function, points in found}


# --------------------------------------------------------------------------------------------------
# The handout


def blanked(source: str, functions) -> str:
    """Source code whose `functions` keep their signature and docstring alone."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            end_of_docstring = node.body[0].end_lineno
            lines[end_of_docstring:node.end_lineno] = ["    raise NotImplementedError\n"]
    return "".join(lines)


def update_file(source: str) -> str:
    """my_update.py: `loss` of train.py blanked, behind the imports of what it uses."""
    tree = ast.parse(source)
    loss = next(node for node in tree.body if getattr(node, "name", "") == "loss")
    used = {node.id for node in ast.walk(loss) if isinstance(node, ast.Name)}
    imports, defined = [], set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if alias.name in used]
            imports += [ast.unparse(node)] if node.names else []
        elif isinstance(node, (ast.Assign, ast.FunctionDef)) and node is not loss:
            defined |= {node.name} if isinstance(node, ast.FunctionDef) else {
                name.id for target in node.targets for name in ast.walk(target)
                if isinstance(name, ast.Name)}
    imports.append(f"from train import {', '.join(sorted(defined & used))}")
    code = blanked(ast.get_source_segment(source, loss), {"loss"})
    return '"""Exercise 15."""\n' + "\n".join(imports) + "\n\n\n" + code


README = """\
Exercises: EXERCISES.md. Write the functions in my_sorl.py, for exercise 15 the one in my_update.py.

In the folder of the project:
    export PYTHONPATH={folder}
    SORL=my_sorl python -m pytest tests/test_exercises.py -k exercise_03
    UPDATE=my_update python -m pytest tests/test_exercises.py -k exercise_15
    python -m lab.course grade {folder}        all of them, and your points
    SORL=my_sorl python train.py --quick       train with your functions, when 01 to 14 pass

Hand in my_sorl.py and my_update.py. Do not import sorl, nor copy from it.
"""


def handout(folder: str) -> None:
    """Raises InputError rather than write over what a student may have written."""
    functions = {function for function, _ in exercises().values()}
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in HANDED_IN}
    texts = {"my_sorl.py": blanked(sources["sorl.py"], functions),
             "my_update.py": update_file(sources["train.py"]),
             "EXERCISES.md": (ROOT / "lab/EXERCISES.md").read_text(encoding="utf-8"),
             "README.txt": README.format(folder=os.path.abspath(folder))}
    try:
        os.makedirs(folder, exist_ok=True)
        for name, text in texts.items():
            with open(f"{folder}/{name}", "x", encoding="utf-8") as file:
                file.write(text)
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be written ({e.strerror})") from None
    print(f"wrote {', '.join(texts)} into {folder}")


# --------------------------------------------------------------------------------------------------
# One check, in a process of its own

CHECKS, SOLUTIONS = {"test_exercises", "conftest", "runs"}, {"sorl", "train", "lab", "theory"}
FENCE = CHECKS | SOLUTIONS | {"tests", "importlib", "inspect", "runpy", "pathlib", "io", "gc",
                              "ctypes", "builtins", "open", "exec", "eval", "compile", "__import__"}


@lru_cache
def load_checks():
    """tests/test_exercises.py, which runs on the module that it is given."""
    os.environ.pop("SORL", None)
    os.environ.pop("UPDATE", None)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    return importlib.import_module("test_exercises")


def beyond_the_fence(tree: ast.AST, allowed: set[str]) -> str:
    """The first name in a submission that would bring in the solution, or ""."""
    for node in ast.walk(tree):
        names = [node.id] if isinstance(node, ast.Name) else []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        if found := FENCE.intersection(names) - allowed:
            return min(found)
    return ""


def in_words(error: BaseException, path: str) -> str:
    """What went wrong, for the student: a line, with its place in the student's file."""
    said = (str(error).splitlines() or [""])[0][:200]
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = f"line {lines[-1]}: " if lines else ""
    if isinstance(error, NotImplementedError):
        return "not written yet"
    if isinstance(error, SystemExit):
        return f"{where}ends the program instead of returning"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    if isinstance(error, AssertionError) and said:
        return said
    return f"{where}{type(error).__name__}: {said}"


def outcome(checks, folder: str, number: str) -> str:
    """Run one check on the files in a folder -> PASSED, or the first thing that is wrong."""
    exercise = checks.EXERCISES[number]
    name, real = HANDED_IN[exercise.file], checks.REAL[exercise.file]
    path = f"{folder}/{name}"
    if not os.path.exists(path):
        return f"{name} was not handed in"
    hidden, allowed = CHECKS | SOLUTIONS, set()
    if exercise.file == "train.py":  # `loss` is written with them; it finds train's blanked
        hidden, allowed, real.loss = CHECKS, SOLUTIONS, checks.blank
    try:
        source = Path(path).read_text(encoding="utf-8")
        if word := beyond_the_fence(ast.parse(source), allowed):
            return f"{name} uses {word}: write it without"
        for module in list(sys.modules):
            if module.split(".")[0] in hidden:
                sys.modules[module] = None  # to import it is an error
        sys.path.insert(0, folder)
        spec = importlib.util.spec_from_file_location(name[:-3], path)
        module = sys.modules[name[:-3]] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except BaseException as error:
        return f"{name} cannot be imported: {in_words(error, path)}"
    if not callable(getattr(module, exercise.function, None)):
        return f"{name} has no function {exercise.function}"
    if exercise.file == "sorl.py":  # the functions that it calls are other exercises: ours
        calls = set(getattr(real, exercise.function).__code__.co_names)
        for other in checks.EXERCISES.values():
            if other.function in calls:
                setattr(module, other.function, getattr(real, other.function))
    try:
        exercise.check(module)
    except BaseException as error:
        return in_words(error, path)
    return PASSED


def examine(pipe, key: bytes, *what) -> None:
    """The body of the process: its output goes nowhere, its time is limited by the system."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    os.closerange(3, pipe.fileno())  # the grader's other pipes
    os.closerange(pipe.fileno() + 1, 1024)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    pipe.send_bytes(key + outcome(*what).encode(errors="replace"))


def run_check(*what) -> str:
    """outcome(…) in a new process, which may loop, exit or crash."""
    fork, key = multiprocessing.get_context("fork"), os.urandom(16)
    receiver, sender = fork.Pipe(False)
    process = fork.Process(target=examine, args=(sender, key, *what))
    process.start()
    sender.close()
    said, answer = TOO_LONG.format(SECONDS), key
    try:
        if receiver.poll(12 * SECONDS):  # by the clock: other work may go on beside it
            answer = receiver.recv_bytes(2000)
            said = answer.removeprefix(key).decode(errors="replace")
    except (EOFError, OSError):  # it ended without an answer
        process.join()
        if process.exitcode not in (-signal.SIGXCPU, -signal.SIGKILL):
            answer = b""
    if not answer.startswith(key):  # it ended, or wrote the answer itself
        said = "ends the program instead of returning"
    process.kill()
    process.join()
    return said


# --------------------------------------------------------------------------------------------------
# Grades


def code_of(path: str) -> dict[str, str]:
    """function -> its body as a tree, without docstring, comments and layout; {} if unreadable."""
    try:
        nodes = ast.parse(Path(path).read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return {node.name: ast.dump(ast.Module(node.body[bool(ast.get_docstring(node)):], []))
            for node in nodes if isinstance(node, ast.FunctionDef)}


def graded(path: str) -> dict:
    """One submission -> its points, what was said of each exercise, which code is a copy."""
    checks = load_checks()
    row = {"name": os.path.basename(os.path.normpath(path)), "points": 0, "copied": [], "said": {}}
    strikes, alone = 0, "my_update.py" if row["name"] == "my_update.py" else "my_sorl.py"
    with tempfile.TemporaryDirectory() as folder:
        for name in HANDED_IN.values():
            file = path if os.path.isfile(path) and name == alone else f"{path}/{name}"
            if os.path.isfile(file):
                shutil.copy(file, f"{folder}/{name}")
        for number, (function, points) in exercises().items():
            said = f"not run: {STRIKES} exercises gave no answer"
            if strikes < STRIKES:
                said = run_check(checks, folder, number)
            strikes += said == TOO_LONG.format(SECONDS)
            row["said"][number] = said
            row["points"] += points * (said == PASSED)
            ours = checks.EXERCISES[number].file
            handed = code_of(f"{folder}/{HANDED_IN[ours]}").get(function)
            if handed == code_of(f"{ROOT}/{ours}")[function]:
                row["copied"].append(number)
    return row


def is_submission(path: str) -> bool:
    files = [path] if path.endswith(".py") else [f"{path}/{name}" for name in HANDED_IN.values()]
    return any(map(os.path.isfile, files))


def table(row: dict) -> str:
    lines = [f"{'exercise':<24}{'points':>7}"]
    for number, (function, points) in exercises().items():
        said = row["said"][number]
        got = f"{points * (said == PASSED)}/{points}"
        lines.append(f"{number} {function:<21}{got:>7}  {said}")
    total = sum(points for _, points in exercises().values())
    lines.append(f"{row['name']:<24}{row['points']:>3}/{total}")
    if row["copied"]:
        lines.append(f"the same code as ours: {' '.join(row['copied'])}")
    return "\n".join(lines)


def grade(path: str) -> None:
    if resource is None:
        raise InputError("grade: needs fork; expected Linux, a Mac, or WSL")
    print("note: this runs the code that was handed in; code of others belongs in a container")
    if is_submission(path):
        row = graded(path)
        print(table(row))
        write_json(row, "grades.json")
        return print("wrote grades.json")
    if not os.path.isdir(path):
        raise InputError(f"{path}: expected a my_sorl.py, or a folder of submissions")
    paths = [f"{path}/{name}" for name in sorted(os.listdir(path))]
    paths = [entry for entry in paths if is_submission(entry)]
    load_checks()  # once: the processes below are forked from this one
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool, \
            open("grades.csv", "w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file)
        sheet.writerow(["name", "points", *exercises(), "remarks", "the same code as ours"])
        for row in pool.map(graded, paths):
            got = [points * (row["said"][n] == PASSED) for n, (_, points) in exercises().items()]
            remarks = [f"{n}: {said}" for n, said in row["said"].items() if said != PASSED]
            sheet.writerow([row["name"], row["points"], *got, "; ".join(remarks),
                            " ".join(row["copied"])])
            print(f"{row['name']:<24}{row['points']:>4}", flush=True)
    print(f"wrote grades.csv, {len(paths)} submissions")


# --------------------------------------------------------------------------------------------------
# The leaderboard

OURS = ("offline", "online", "masked", "static", "refresh", "credit")
SEEDS = (0, 1, 2)  # of training; the median counts
FREE = set(flags_of(Config)) - NOT_TUNING - BASE - {"eval_every"} | {"setting"}
ALWAYS = {"mode": "train", "eval_every": 1}


def secret_data(secret: int, folder: str) -> None:
    """A forecast data set that nobody has tuned on, as JSONL, with forecast's tuned flags."""
    digest = hashlib.sha256(f"leaderboard {secret}".encode()).digest()
    seed, name = int.from_bytes(digest[:8], "big"), "leaderboard"
    forecast.GRAMMARS[name] = replace(forecast.GRAMMARS["forecast"], seed=seed)
    try:
        for split, records in forecast.generate(name).items():
            data.save_records(records, f"{folder}/{split}.jsonl")
    finally:
        del forecast.GRAMMARS[name]
    write_json({"preset": "forecast"}, f"{folder}/flags.json")


def run_training(flags: dict, sorl: str = "") -> str:
    """train.py with these flags, in place of sorl.py the given file -> "", or what went wrong."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    env = dict(os.environ)
    if sorl:
        env |= {"SORL": Path(sorl).stem, "PYTHONPATH": os.path.dirname(os.path.abspath(sorl))}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], env=env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it stopped"])[-1]


def flags_of_entry(entry: str) -> dict:
    """The flags of NAME.json; those beside NAME.py, or --setting masked."""
    flags = read_json(os.path.splitext(entry)[0] + ".json")
    if flags is None and entry.endswith(".py") and os.path.isfile(entry):
        flags = {"setting": "masked"}
    if not isinstance(flags, dict) or not flags.keys() <= FREE:
        raise InputError(f"{entry}: expected a my_sorl.py, or a JSON object of flags, among "
                         f"{', '.join(sorted(FREE))}")
    return flags


def leaderboard(entries: list[str], secret: int) -> None:
    """Run our settings and every entry, on secret data, from one base a seed; print the table."""
    runs = {f"({name})": ({"setting": name}, "") for name in OURS}
    for entry in entries:
        runs[entry] = flags_of_entry(entry), entry if entry.endswith(".py") else ""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        secret_data(secret, folder)
        for seed in SEEDS:
            base = ALWAYS | {"setting": "mle", "steps": 1, "data": folder, "seed": seed}
            if wrong := run_training(base | {"out": f"{folder}/seed{seed}"}):
                raise InputError(wrong)
        for number, (name, (flags, sorl)) in enumerate(runs.items()):
            outs, wrong = [f"{folder}/{number}-{seed}" for seed in SEEDS], ""
            for seed, out in zip(SEEDS, outs):
                wrong = wrong or run_training(
                    flags | ALWAYS | {"init": f"{folder}/seed{seed}/base/best.pt", "data": folder,
                                      "seed": seed, "out": out}, sorl)
            at = None if wrong else first_reach(read_curve(outs), LEVEL)
            rows.append({"name": name, "fp": at and at["fp"], "tokens": at and at["tokens"],
                         "wrong": wrong})
            print(f"{name}: {wrong or (round(at['fp']) if at else 'never')}", flush=True)
    rows.sort(key=lambda row: (row["fp"] is None, row["fp"]))
    print(f"\n{'':<4}{'entry':<28}{f'FP to {LEVEL}':>12}{'tokens':>12}")
    for place, row in enumerate(rows, 1):
        figures = ["never" if row[key] is None else f"{row[key]:,.0f}" for key in ("fp", "tokens")]
        print(f"{place:<4}{row['name']:<28}{figures[0]:>12}{figures[1]:>12}  {row['wrong']}")
    write_json(rows, "leaderboard.json")


def command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="lab.course", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("handout", "grade", "leaderboard"))
    parser.add_argument("paths", nargs="*", metavar="PATH", help="DIR, FILE_OR_FOLDER, ENTRY …")
    parser.add_argument("--secret", type=int, help="leaderboard: a number that the teacher keeps")

    def refuse(message: str):
        raise InputError(message)

    parser.error = refuse
    args = parser.parse_args(argv)
    if (args.secret is None) == (args.what == "leaderboard"):
        refuse("--secret N: the leaderboard needs it, nothing else uses it")
    if args.what == "leaderboard":
        return leaderboard(args.paths, args.secret)
    if len(args.paths) != 1:
        refuse(f"{args.what}: expected one path")
    {"handout": handout, "grade": grade}[args.what](args.paths[0])


def main(argv: list[str]) -> None:
    run_command("lab.course", lambda: command(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
