"""A course in a box: what students get, how it is graded, and a leaderboard.

    python -m lab.course handout DIR                       the exercises, blank, with their text
    python -m lab.course grade FILE_OR_FOLDER              one submission, or a folder of them
    python -m lab.course leaderboard ENTRY … --secret N    forward propagations (FPs) to .98

lab/EXERCISES.md is for students, lab/TEACHERS.md for teachers. The handout is made from sorl.py and
train.py, points are read from EXERCISES.md, the checks are those of tests/test_exercises.py.
"""
import argparse
import ast
import csv
import dis
import importlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import data
from data import InputError, forecast
from lab.cli import Parser, flags_of, run_command
from lab.files import read_json, write_json, write_text
from lab.report import LEVEL, first_reach, read_curve
from lab.settings import BASE, NOT_TUNING, Config

ROOT = Path(__file__).resolve().parent.parent
HANDED_IN = {"sorl.py": "my_sorl.py", "train.py": "my_update.py"}  # what is written anew -> as


def read(path) -> str:
    return Path(path).read_text(encoding="utf-8")


def exercises() -> dict[str, tuple[str, int]]:
    """number -> the function to write, and its points; from EXERCISES.md."""
    heading = r"^### (\d\d) `(\w+)`[^:\n]*: (\d+) points"
    found = re.findall(heading, read(ROOT / "lab/EXERCISES.md"), re.M)
    return {number: (function, int(points)) for number, function, points in found}


# --------------------------------------------------------------------------------------------------
# The handout

UPDATE = ('"""Exercises 17 to 19: one update."""\nimport torch\n\nimport data\nimport sorl\n'
          "from train import MLE_P_M, Run, distance, rank_static, score, uniforms")


def blanked(source: str, functions) -> str:
    """Source code whose `functions` keep their signature and docstring alone."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            lines[node.body[0].end_lineno:node.end_lineno] = ["    raise NotImplementedError\n"]
    return "".join(lines)


def handout(folder: str) -> None:
    """Raises OSError rather than write over what a student may have written."""
    functions = {function for function, _ in exercises().values()}
    update = blanked(read(ROOT / "train.py"), functions)
    parts = [ast.get_source_segment(update, node) for node in ast.parse(update).body
             if getattr(node, "name", "") in functions]
    texts = {"my_sorl.py": blanked(read(ROOT / "sorl.py"), functions),
             "my_update.py": "\n\n\n".join([UPDATE, *parts]) + "\n",
             "EXERCISES.md": read(ROOT / "lab/EXERCISES.md")}
    os.makedirs(folder, exist_ok=True)
    for name, text in texts.items():
        with open(f"{folder}/{name}", "x", encoding="utf-8") as file:
            file.write(text)
    print(f"wrote {', '.join(texts)} into {folder}")


# --------------------------------------------------------------------------------------------------
# One check


def verdict(sources: dict[str, bytes], number: str) -> tuple[bool, str]:
    """Run one check on files, name -> content -> did it pass, and what the student is told."""
    checks = importlib.import_module("test_exercises")
    exercise = checks.EXERCISES[number]
    name, function = HANDED_IN[exercise.file], exercise.function
    if name not in sources:
        return False, f"{name} was not handed in"
    # The check compares with a copy of ours. A submission that fetches ours gets this one.
    def taken(*args, **kwargs):
        raise AssertionError("this calls the project's own function; write yours anew")
    real = checks.REAL[exercise.file]
    getattr(real, function).__code__ = taken.__code__
    try:
        module = sys.modules[name[:-3]] = types.ModuleType(name[:-3])
        exec(compile(sources[name], name, "exec"), vars(module))
        for other in checks.EXERCISES.values():  # no exercise depends on another one
            if other.file == exercise.file and other.function != function:
                setattr(module, other.function, getattr(real, other.function))
        exercise.check(module)
        ours = instructions_of(read(ROOT / exercise.file), function)
        copied = instructions_of(sources[name], function) == ours
        return True, "passed, the same code as ours" if copied else "passed"
    except BaseException as error:
        return False, in_words(error, name, sources[name])


def instructions_of(source, function: str):
    """Of a function in a source text, without docstring, layout and the names of variables."""
    for code in compile(source, "source", "exec", optimize=2).co_consts:
        if getattr(code, "co_name", "") == function:
            nothing = bytes((dis.opmap["NOP"], 0))  # what is left of a docstring
            return code.co_code.replace(nothing, b""), code.co_names


def in_words(error: BaseException, name: str, source: bytes) -> str:
    """What went wrong, for the student, with its line in the student's file."""
    said = traceback.format_exception_only(error)[-1].removeprefix("AssertionError: ")
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == name]
    if said.strip() == "NotImplementedError":
        return "not written yet"
    if lines:
        text = source.decode(errors="replace").splitlines()[lines[-1] - 1].strip()
        said = f"line {lines[-1]}, {text}: {said}"
    return "".join(filter(str.isprintable, said.splitlines()[0][:300]))


SECONDS, WALL, MEMORY = 5, 60, 4 * 2 ** 30  # per check: of the processor, by the clock; bytes
NO_ANSWER = "no answer: does it loop for ever, or end the program?"


def run_check(sources: dict[str, bytes], number: str) -> tuple[bool, str]:
    """verdict(…) from a process that may loop, exit or crash. What it started ends with it."""
    answer, deadline = tempfile.TemporaryFile(buffering=0), time.monotonic() + WALL
    pid = os.fork()
    if pid == 0:
        try:
            limit_this_process()
            answer.write(json.dumps(verdict(sources, number)).encode())
        finally:
            os._exit(0)
    try:
        with suppress(OSError):  # the process does this, too, whichever comes first
            os.setpgid(pid, pid)
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        with suppress(OSError):  # nothing of it is left
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    answer.seek(0)
    try:
        return tuple(json.loads(answer.read(10_000)))
    except ValueError:
        return False, NO_ANSWER


def limit_this_process() -> None:
    """A process group of its own, no terminal, and limits that the system keeps."""
    import resource  # not on Windows
    os.setpgid(0, 0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    signal.alarm(WALL)  # for the case that the program that waits has been killed
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


# --------------------------------------------------------------------------------------------------
# Grades

CONTAINER = """\
note: this runs the code that was handed in, with all rights of your account. In a container:
  printf 'FROM python:3.12\\nCOPY requirements.txt .\\nRUN pip install -r requirements.txt\\n' |
    docker build -t sorl -f - {root}
  docker run --rm --network none -v {root}:{root}:ro -v {path}:{path}:ro -v "$PWD":/grades \\
    -w /grades -e PYTHONPATH={root} sorl python -m lab.course grade {path}
"""


def is_submission(path: str) -> bool:
    files = [path] if path.endswith(".py") else [f"{path}/{name}" for name in HANDED_IN.values()]
    return any(map(os.path.isfile, files))


def find_submissions(path: str) -> list[str]:
    """The submissions in a folder, however deep they lie; names the entries that hold none."""
    if is_submission(path):
        return [path]
    found = []
    for entry in sorted(os.listdir(path)) if os.path.isdir(path) else []:
        places = [f"{path}/{entry}"]
        if not is_submission(places[0]):
            places = sorted(home for home, *_ in os.walk(places[0]) if is_submission(home))
        found += places
        if not places and not entry.startswith((".", "grades.")):
            print(f"{entry}: left out, it holds no {' and no '.join(HANDED_IN.values())}")
    if not found:
        raise InputError(f"{path}: expected a my_sorl.py, or a folder of submissions")
    return found


def grade_one(path: str, name: str) -> dict:
    """One submission -> its name, its points, and for each exercise what is said of it."""
    sources = {}  # read once: no check can change what the next one is given
    for file in HANDED_IN.values():
        place = path if os.path.isfile(path) and file == "my_sorl.py" else f"{path}/{file}"
        with suppress(OSError):
            sources[file] = Path(place).read_bytes()
    row = {"name": repr(name)[1:-1], "points": 0}  # escapes what is not UTF-8, or no letter
    for number, (_, points) in exercises().items():
        passed, row[number] = run_check(sources, number)
        row["points"] += points * passed
    return row


def grade(path: str) -> None:
    if not hasattr(os, "fork"):
        raise InputError("grade: needs fork; expected Linux, a Mac, or WSL")
    path = os.path.abspath(path)
    print(CONTAINER.format(root=shlex.quote(str(ROOT)), path=shlex.quote(path)), flush=True)
    found, rows = find_submissions(path), []
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that they end the check that runs, too
        signal.signal(number, signal.default_int_handler)
    os.environ |= {"SORL": "sorl", "UPDATE": "train"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    importlib.import_module("test_exercises")  # once: all processes are forked from this one
    for place in found:
        alone = place == path
        row = grade_one(place, os.path.relpath(place, os.path.dirname(path) if alone else path))
        if alone:
            for number, (function, points) in exercises().items():
                print(f"{number} {function:<20}{points:>3}  {row[number]}")
        print(f"{row['name']:<24}{row['points']:>4} points", flush=True)
        rows.append(row)
    sheet = io.StringIO()
    csv.writer(sheet).writerows([rows[0].keys(), *(row.values() for row in rows)])
    write_text("grades.csv", sheet.getvalue())
    print("wrote grades.csv")


# --------------------------------------------------------------------------------------------------
# The leaderboard

OURS = ("offline", "online", "tail", "masked", "static", "refresh")
SEEDS = ("0", "1", "2")  # of training; the median counts
FREE = set(flags_of(Config)) - NOT_TUNING - BASE - {"eval_every"} | {"setting", "sorl"}


def secret_data(secret: int, folder: str) -> None:
    """A forecast data set that nobody has tuned on, as JSONL, with forecast's tuned flags."""
    forecast.GRAMMARS["secret"] = replace(forecast.GRAMMARS["forecast"], seed=f"secret {secret}")
    os.mkdir(folder)
    for split, records in forecast.generate("secret").items():
        data.save_records(records, f"{folder}/{split}.jsonl")
    write_json(forecast.FLAGS, f"{folder}/flags.json")


def run_training(words: list[str], sorl: str = "") -> None:
    """train.py with these words, with sorl.py or the given file. Raises InputError if it fails."""
    env = os.environ | {"SORL": Path(sorl).stem, "PYTHONPATH": str(Path(sorl).resolve().parent)}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], env=env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise InputError((done.stderr.strip().splitlines() or ["it stopped"])[-1])


def read_entry(path: str) -> dict:
    """What a JSON file says: flags, and under `sorl` the name of a my_sorl.py beside it."""
    flags = read_json(path)
    if not isinstance(flags, dict) or not flags.keys() <= FREE:
        raise InputError(f"{path}: expected a JSON object with {', '.join(sorted(FREE))}")
    if "sorl" in flags:
        flags["sorl"] = os.path.join(os.path.dirname(path), str(flags["sorl"]))
        if not os.path.isfile(flags["sorl"]):
            raise InputError(f"{path}: {flags['sorl']}: no such file")
    return {"setting": "masked", "sorl": ""} | flags


def leaderboard(paths: list[str], secret: int) -> None:
    """Run our settings and every entry on secret data, from the same bases; print the table."""
    entries = {path: read_entry(path) for path in paths}
    with tempfile.TemporaryDirectory() as home:
        secret_data(secret, f"{home}/data")
        same = ["--data", f"{home}/data", "--eval_every", "1"]
        run_training(["--settings", *OURS, *same, "--seeds", *SEEDS, "--out", f"{home}/ours"])
        runs = {name: [f"{home}/ours/seed{seed}/{name}" for seed in SEEDS] for name in OURS}
        for number, (path, flags) in enumerate(entries.items()):
            setting, sorl = flags.pop("setting"), flags.pop("sorl")
            words = ["--settings", setting, *(f"--{name}={flags[name]}" for name in flags), *same]
            try:
                for seed in SEEDS:
                    more = ["--seed", seed, "--init", f"{home}/ours/seed{seed}/base/best.pt"]
                    run_training([*words, *more, "--out", f"{home}/{number}/seed{seed}"], sorl)
                runs[path] = [f"{home}/{number}/seed{seed}/{setting}" for seed in SEEDS]
            except InputError as e:
                print(f"{path}: {e}", flush=True)
        rows = []
        for name, folders in runs.items():
            curves = [read_curve([folder]) for folder in folders]  # each whole, if one diverged
            at = first_reach({"runs": curves}, LEVEL) or {"fp": math.inf, "tokens": math.inf}
            rows.append((at["fp"], at["tokens"], name))
    print(f"{'entry':<24}{'FPs':>9}{'tokens':>12}")
    for fp, tokens, name in sorted(rows):
        print(f"{name:<24}{fp:>9,.0f}{tokens:>12,.0f}")


@run_command("lab.course")
def main(argv: list[str]) -> None:
    parser = Parser(prog="lab.course", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("handout").add_argument("folder", metavar="DIR")
    commands.add_parser("grade").add_argument("path", metavar="FILE_OR_FOLDER")
    board = commands.add_parser("leaderboard")
    board.add_argument("paths", nargs="*", metavar="ENTRY")
    board.add_argument("--secret", type=int, required=True, help="a number that the teacher keeps")
    args = vars(parser.parse_args(argv))
    work = {"handout": handout, "grade": grade, "leaderboard": leaderboard}[args.pop("command")]
    work(**args)


if __name__ == "__main__":
    main(sys.argv[1:])
