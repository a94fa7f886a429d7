"""What keeps this repository small: who imports whom, how long a function is, how wide a line.

Not collected by a plain `python -m pytest`, so that it never stands in the way of a branch that
tries an idea; .ci/run asks for it by name: python -m pytest tests/house.py

Four floors, imports go down alone: model, data <- sorl <- lab <- train."""
import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

from lab.cli import flags_of
from lab.run import CODE
from lab.settings import Config

ROOT = Path(__file__).parent.parent
FILES = sorted(file for pattern in ("*.py", "data/*.py", "lab/*.py") for file in ROOT.glob(pattern))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
MAY_IMPORT = {  # a module or package of the house -> the ones that it may import
    "model": (),
    "data": ("data",),
    "data.e2e": ("data", "lab.cli"),  # its command, and in it alone
    "sorl": ("model",),
    "lab": ("model", "data", "sorl", "lab"),
    "train": ("model", "data", "sorl", "lab"),
    "theory": ("model", "sorl", "lab.cli", "lab.plots", "data.rewards"),
}
FLOORS = (  # of lab/, the lowest first: a room imports rooms of lower floors alone
    ("files", "plots", "processes", "cli"), ("settings",), ("task",), ("batches", "report"),
    ("run",), ("evaluate",), ("sample",),
    ("course", "lesson", "page"),  # doors of their own: nothing imports them
)
PACKAGES = {"numpy", "torch", "tiktoken", "matplotlib", "pytest"}


def module_of(file: Path) -> str:
    """data/e2e.py -> data.e2e, data/__init__.py -> data."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


HOUSE = {module_of(file): file for file in FILES}


def imports(tree: ast.AST, inside_functions: bool = True) -> set[str]:
    """The modules that a file imports: house ones as they are named, of others the package."""
    found, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & set(HOUSE)  # from lab import run; else a name from node.module
            found |= modules | ({node.module} if names - modules else set())
        elif inside_functions or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def within(module: str, packages) -> bool:
    """Is it one of them, or a module of one of them?"""
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("module", HOUSE)
def test_imports_go_down(module):
    floor = MAY_IMPORT.get(module, MAY_IMPORT.get(module.split(".")[0]))
    assert floor is not None, f"{module} has no floor in MAY_IMPORT"
    mine = {name for name in imports(parsed(HOUSE[module])) if within(name, MAY_IMPORT)}
    assert not {name for name in mine if not within(name, floor)}


def test_rooms_of_lab_import_lower_floors_alone():
    floor = {f"lab.{room}": i for i, rooms in enumerate(FLOORS) for room in rooms}
    mine = {module: file for module, file in HOUSE.items() if module.startswith("lab.")}
    assert mine.keys() <= floor.keys()
    up = [f"{module} imports {name}" for module, file in mine.items()
          for name in imports(parsed(file)) if floor.get(name, -1) >= floor[module]]
    assert up == []
    doors = {f"lab.{room}" for room in FLOORS[-1]}
    assert not doors & set().union(*(imports(parsed(file)) for file in FILES))


def test_a_run_knows_the_code_that_it_depends_on():
    """What training imports, but for flags, which are compared one by one, and what only shows."""
    found, nodes = set(), ["train"]
    while nodes:
        module = nodes.pop()
        found.add(module)
        nodes += imports(parsed(HOUSE[module])) & HOUSE.keys() - found
    shown = {f"lab.{room}" for room in ("cli", "files", "plots", "report", "sample", "settings")}
    assert {module_of(ROOT / name) for name in CODE} == found - shown - {"lab"}


def test_every_command_ends_in_one_way():
    """Ctrl-C, a closed pipe and user errors: by run_command."""
    mains = [node for file in FILES for node in parsed(file).body
             if getattr(node, "name", "") == "main"]
    assert len(mains) > 6 and all("run_command(" in ast.unparse(node) for node in mains)


def test_no_circle_of_imports():
    """Counting what is imported at once; a data set's module is, by data, when it is asked for."""
    graph = {module: {name for name in imports(parsed(file), False) if name in HOUSE}
             for module, file in HOUSE.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_sorl_touches_no_file_no_config_no_device():
    tree = parsed(ROOT / "sorl.py")
    assert imports(tree) == {"hashlib", "dataclasses", "torch", "model"}
    words = set(re.findall(r"\w+", ast.unparse(tree)))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not words & {"open", "print", "input", "save", "load", "cuda", "mps", "cfg", "Config"}
    assert not strings & {"cpu", "cuda", "mps"}


@pytest.mark.parametrize("name", ["train.py", "sorl.py"])
def test_no_long_function(name):
    """At most 60 lines."""
    lengths = {node.name: node.end_lineno - node.lineno + 1
               for node in ast.walk(parsed(ROOT / name)) if isinstance(node, ast.FunctionDef)}
    assert {function: n for function, n in lengths.items() if n > 60} == {}


def test_lines_are_short():
    lines = [(f"{file.relative_to(ROOT)}:{number}", line) for file in FILES
             for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)]
    assert [place for place, line in lines if len(line) > 100] == []


def test_at_most_46_flags():
    assert len(flags_of(Config)) <= 46


@pytest.mark.parametrize("file", FILES + TESTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_five_packages(file):
    """Beside the standard library."""
    known = PACKAGES | set(sys.stdlib_module_names) | {module.split(".")[0] for module in HOUSE}
    known |= {test.stem for test in TESTS} | {"tests"}
    assert {name.split(".")[0] for name in imports(parsed(file))} <= known


def test_requirements_are_those_packages():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert {re.match(r"\w+", line).group() for line in lines} == PACKAGES
