"""A course in a box: what students get, how it is graded, and a leaderboard.

    python -m lab.course handout DIR                       the exercises, blank, with their text
    python -m lab.course grade FILE_OR_FOLDER              one submission, or a folder of them
    python -m lab.course leaderboard ENTRY … --secret N    forward propagations (FPs) to .98

lab/EXERCISES.md is for students, lab/TEACHERS.md for teachers. What is blank is made from sorl.py
and train.py, points are read from EXERCISES.md, the checks are those of tests/test_exercises.py.
Grading runs other people's code on this machine. A process for every check keeps accidents apart,
not attacks: use a container.
"""
import argparse
import ast
import csv
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import data
from data import InputError, forecast
from lab.cli import Parser, flags_of, run_command
from lab.files import read_json, write_json
from lab.report import LEVEL, cost_table, first_reach, read_curve
from lab.settings import BASE, NOT_TUNING, Config

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).resolve().parent.parent
HANDED_IN = {"sorl.py": "my_sorl.py", "train.py": "my_update.py"}  # what is written anew -> as


def read(path) -> str:
    return Path(path).read_text(encoding="utf-8")


def exercises() -> dict[str, tuple[str, int]]:
    """number -> the function to write, and its points; from EXERCISES.md."""
    heading = r"^### (\d\d) `(\w+)`: (\d+) points"
    found = re.findall(heading, read(ROOT / "lab/EXERCISES.md"), re.M)
    return {number: (function, int(points)) for number, function, points in found}


# --------------------------------------------------------------------------------------------------
# The handout

UPDATE = '''\
"""Exercise 15."""
import torch

import sorl
from train import MLE_P_M, Batches, Run, rank_static, score


'''
README = """\
Exercises: EXERCISES.md. Write the functions in my_sorl.py, for exercise 15 the one in my_update.py.

In the folder of the project:
    export PYTHONPATH={folder}
    SORL=my_sorl python -m pytest --tb=line tests/test_exercises.py -k exercise_03
    UPDATE=my_update python -m pytest --tb=line tests/test_exercises.py -k exercise_15
    python -m lab.course grade {folder}        all of them, and your points
    SORL=my_sorl python train.py --quick       train with your functions, when 01 to 14 pass

`grade` writes grades.json into the folder in which you are.
Hand in my_sorl.py and my_update.py. Do not import sorl, nor copy from it.
"""


def blanked(source: str, functions) -> str:
    """Source code whose `functions` keep their signature and docstring alone."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            end_of_docstring = node.body[0].end_lineno
            lines[end_of_docstring:node.end_lineno] = ["    raise NotImplementedError\n"]
    return "".join(lines)


def handout(folder: str) -> None:
    """Raises InputError rather than write over what a student may have written."""
    functions = {function for function, _ in exercises().values()}
    loss = r"^def loss.*?NotImplementedError\n"
    update = re.search(loss, blanked(read(ROOT / "train.py"), functions), re.M | re.S).group()
    texts = {"my_sorl.py": blanked(read(ROOT / "sorl.py"), functions),
             "my_update.py": UPDATE + update,
             "EXERCISES.md": read(ROOT / "lab/EXERCISES.md"),
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

SECONDS, WALL = 5, 60  # a check: of the processor (it needs about one), and by the clock
MEMORY = 4 * 2 ** 30  # bytes a check
NO_ANSWER = "no answer: does it loop for ever, or end the program?"
NOT_RUN = "not run: three exercises before it gave no answer"
MODULES = {"sorl.py": {"dataclasses", "functools", "hashlib", "itertools", "math", "model", "numpy",
                       "torch"}}
MODULES["train.py"] = MODULES["sorl.py"] | {"data", "sorl", "train"}
REFUSED = {"builtins", "ctypes", "gc", "importlib", "inspect", "os", "subprocess", "sys",
           "compile", "delattr", "eval", "exec", "getattr", "globals", "open", "setattr", "vars",
           "ag_frame", "cr_frame", "gi_frame", "f_back", "f_builtins", "f_globals", "f_locals"}

OF_OTHERS = ast.Attribute, ast.ImportFrom, ast.MatchClass, ast.alias  # where names come from them


def beyond_the_fence(tree: ast.AST, modules: set[str]) -> str:
    """A word that no solution needs and a cheat would, or "": imports beside `modules`, REFUSED."""
    imported, used = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(node.module or ".")
        hidden = "_" if isinstance(node, OF_OTHERS) else "__"
        used += [word for word in words_of(node) if word in REFUSED or word.startswith(hidden)]
    words = [name for name in imported if name.split(".")[0] not in modules] + used
    return words[0] if words else ""


def words_of(node: ast.AST) -> list[str]:
    """The names in a node of a syntax tree, in whatever field; not what is in quotes."""
    fields = [] if isinstance(node, ast.Constant) else [f for _, f in ast.iter_fields(node)]
    names = fields + [name for field in fields if isinstance(field, list) for name in field]
    return [part for name in names if isinstance(name, str) for part in name.split(".")]


def in_words(error: BaseException, name: str) -> str:
    """What went wrong, for the student, with its place in the student's file."""
    if isinstance(error, NotImplementedError):
        return "not written yet"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename.endswith(name)]
    where = f"line {lines[-1]}: " if lines else ""
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    said = where + kind + (str(error).splitlines() or [""])[0][:200]
    return "".join(filter(str.isprintable, said))


def body_of(tree: ast.Module, function: str) -> str:
    """The code of a function, without its docstring, comments and layout."""
    node = next(node for node in tree.body if getattr(node, "name", "") == function)
    return ast.dump(ast.Module(node.body[bool(ast.get_docstring(node)):], []))


def verdict(checks, sources: dict[str, bytes], number: str) -> tuple[bool, str]:
    """Run one check on files, name -> content -> did it pass, and what is to be said."""
    exercise = checks.EXERCISES[number]
    name, real = HANDED_IN[exercise.file], checks.REAL[exercise.file]
    if name not in sources:
        return False, f"{name} was not handed in"
    try:
        tree = ast.parse(sources[name], name)
        if word := beyond_the_fence(tree, MODULES[exercise.file]):
            return False, f"{name} uses {word}: write it without"
        checks.REAL["train.py"].loss = checks.blank  # exercise 15 may import train, not this
        before = [(part, dict(vars(part))) for part in checks.MADE_OF]
        module = types.ModuleType(name.removesuffix(".py"))
        exec(compile(tree, name, "exec"), vars(module))
        calls = getattr(real, exercise.function).__code__.co_names
        for other in checks.EXERCISES.values():  # what it calls may be another exercise: then ours
            if other.function in calls and other.file == exercise.file:
                setattr(module, other.function, getattr(real, other.function))
        exercise.check(module)
        for part, names in before:
            if any(vars(part).get(key) is not value for key, value in names.items()):
                return False, f"{name} changes what the check is made of"
        ours = ast.parse(read(ROOT / exercise.file))
        if body_of(tree, exercise.function) == body_of(ours, exercise.function):
            return True, "passed, the same code as ours"
    except BaseException as error:
        return False, in_words(error, name)
    return True, "passed"


def examine(sender, *what) -> None:
    """The body of the process: it prints nothing, and the system limits what it takes."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sender.send_bytes(json.dumps(verdict(*what)).encode())


def run_check(*what) -> tuple[bool, str]:
    """verdict(…) from a new process, which may loop, exit or crash."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(False)
    process = fork.Process(target=examine, args=(sender, *what))
    process.start()
    sender.close()
    passed, said = False, NO_ANSWER
    try:
        if receiver.poll(WALL):
            passed, said = json.loads(receiver.recv_bytes())
    except EOFError:
        pass
    process.kill()
    process.join()
    return passed, said


# --------------------------------------------------------------------------------------------------
# Grades


@lru_cache
def load_checks():
    """tests/test_exercises.py, which runs on the module that it is given."""
    os.environ |= {"SORL": "sorl", "UPDATE": "train"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    return importlib.import_module("test_exercises")


def is_submission(path: str) -> bool:
    files = [path] if path.endswith(".py") else [f"{path}/{name}" for name in HANDED_IN.values()]
    return any(map(os.path.isfile, files))


def graded(path: str) -> dict:
    """One submission -> its name, its points, and for each exercise what is said of it."""
    row = {"name": os.path.basename(os.path.abspath(path)), "points": 0}
    files = {name: Path(path, name) for name in HANDED_IN.values()}
    if os.path.isfile(path):
        files["my_sorl.py"] = Path(path)
    # Read once: no check can change what the next one is given.
    sources = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    for number, (_, points) in exercises().items():
        row[number] = NOT_RUN
        if list(row.values()).count(NO_ANSWER) < 3:
            passed, row[number] = run_check(load_checks(), sources, number)
            row["points"] += points * passed
    return row


def table(row: dict) -> str:
    lines = [f"{'exercise':<24}{'points':>6}"]
    for number, (function, points) in exercises().items():
        lines.append(f"{number} {function:<21}{points:>6}  {row[number]}")
    return "\n".join([*lines, f"{row['name']}: {row['points']} points"])


def grade(path: str) -> None:
    if resource is None:
        raise InputError("grade: needs fork; expected Linux, a Mac, or WSL")
    if not is_submission(path) and not os.path.isdir(path):
        raise InputError(f"{path}: expected a my_sorl.py, or a folder of submissions")
    print("note: this runs the code that was handed in; code of others belongs in a container")
    load_checks()  # once: all processes are forked from this one
    if is_submission(path):
        row = graded(path)
        print(table(row))
        write_json(row, "grades.json")
        print("wrote grades.json")
        return
    paths = filter(is_submission, (f"{path}/{name}" for name in sorted(os.listdir(path))))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool, \
            open("grades.csv", "w", newline="", encoding="utf-8") as file:
        sheet = csv.DictWriter(file, ["name", "points", *exercises()])
        sheet.writeheader()
        for row in pool.map(graded, paths):
            sheet.writerow(row)
            print(f"{row['name']:<24}{row['points']:>4}", flush=True)
    print("wrote grades.csv")


# --------------------------------------------------------------------------------------------------
# The leaderboard

OURS = ("offline", "online", "masked", "static", "refresh", "credit")
SEEDS = ("0", "1", "2")  # of training; the median counts
FREE = set(flags_of(Config)) - NOT_TUNING - BASE - {"eval_every"} | {"setting", "sorl"}


def secret_data(secret: int, folder: str) -> None:
    """A forecast data set that nobody has tuned on, as JSONL, with forecast's tuned flags."""
    grammar = forecast.GRAMMARS["forecast"]
    forecast.GRAMMARS["secret"] = replace(grammar, seed=f"leaderboard {secret}")
    os.mkdir(folder)
    for split, records in forecast.generate("secret").items():
        data.save_records(records, f"{folder}/{split}.jsonl")
    write_json({"preset": "forecast"}, f"{folder}/flags.json")


def run_training(words: list[str], sorl: str = "") -> str:
    """train.py with these words, with sorl.py or the given file -> "", or what went wrong."""
    env = dict(os.environ)
    if sorl:
        env |= {"SORL": Path(sorl).stem, "PYTHONPATH": os.path.dirname(os.path.abspath(sorl))}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], env=env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it stopped"])[-1]


def entry_of(path: str) -> dict:
    """What a JSON file says: flags, and under `sorl` the name of a my_sorl.py beside it."""
    flags = read_json(path)
    if not isinstance(flags, dict) or not flags.keys() <= FREE:
        raise InputError(f"{path}: expected a JSON object with {', '.join(sorted(FREE))}")
    if "sorl" in flags:
        flags["sorl"] = os.path.join(os.path.dirname(path), flags["sorl"])
    return {"setting": "masked", "sorl": ""} | flags


def leaderboard(paths: list[str], secret: int) -> None:
    """Run our settings and every entry, on secret data, from one base a seed; print the table."""
    entries = {path: entry_of(path) for path in paths}
    with tempfile.TemporaryDirectory() as home:
        secret_data(secret, f"{home}/data")
        same = ["--data", f"{home}/data", "--seeds", *SEEDS, "--eval_every", "1"]
        ours = f"{home}/ours"
        if wrong := run_training(["--settings", *OURS, *same, "--out", ours]):
            raise InputError(wrong)
        curves = {name: read_curve([f"{ours}/seed{seed}/{name}" for seed in SEEDS])
                  for name in OURS}
        for number, (path, flags) in enumerate(entries.items()):
            out = f"{home}/{number}"
            shutil.copytree(ours, out, ignore=shutil.ignore_patterns(*OURS))  # the bases
            setting, sorl = flags.pop("setting"), flags.pop("sorl")
            words = [f"--{name}={value}" for name, value in flags.items()]
            if wrong := run_training(["--settings", setting, *words, *same, "--out", out], sorl):
                print(f"{path}: {wrong}", flush=True)
            else:
                curves[path] = read_curve([f"{out}/seed{seed}/{setting}" for seed in SEEDS])

    def passes(name: str) -> float:
        at = first_reach(curves[name], LEVEL)
        return at["fp"] if at else math.inf
    print(cost_table({name: curves[name] for name in sorted(curves, key=passes)}))


def command(argv: list[str]) -> None:
    parser = Parser(prog="lab.course", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("handout").add_argument("path", metavar="DIR")
    commands.add_parser("grade").add_argument("path", metavar="FILE_OR_FOLDER")
    board = commands.add_parser("leaderboard")
    board.add_argument("entries", nargs="*", metavar="ENTRY")
    board.add_argument("--secret", type=int, required=True, help="a number that the teacher keeps")
    args = parser.parse_args(argv)
    if args.command == "leaderboard":
        leaderboard(args.entries, args.secret)
    else:
        {"handout": handout, "grade": grade}[args.command](args.path)


def main(argv: list[str]) -> None:
    run_command("lab.course", lambda: command(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
