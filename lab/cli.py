"""The command line: flags from a dataclass, and how a command ends.

A mistake of the user's is one line on stderr and exit code 2. An error inside the user's own
reward keeps its traceback. A command that was stopped ends with 130.
"""
import argparse
import difflib
import math
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import field, fields

from data import InputError
from data.rewards import RewardError
from lab import processes, run

RENAMED = {"static": "stored", "static_credit": "credit", "micro_batches": "accumulate",
           "preset": "quick", "observation": "setting", "num": "K", "out_data": "out"}


def flag(default, text: str, choices: tuple = (), kind: type | None = None, least: float = 0,
         most: float = math.inf):
    """A field of the config that is a flag; `kind` is the type of one word of a tuple."""
    more = dict(help=text, choices=choices, kind=kind or type(default), least=least, most=most)
    return field(default=default, metadata=more)


def flags_of(config) -> dict:
    """name -> field, for every field of the config that is a flag."""
    return {f.name: f for f in fields(config) if f.metadata}


def parse_word(f, word: str):
    """One word of the command line as a value of a flag. Raises ArgumentTypeError."""
    kind, choices = f.metadata["kind"], f.metadata["choices"]
    if choices and word not in choices:
        near = difflib.get_close_matches(word, choices, n=1, cutoff=0.3) or choices
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(choices)}; found {word!r}, the nearest is {near[0]}")
    if kind is bool:
        if word.lower() not in ("true", "false", "1", "0"):
            raise argparse.ArgumentTypeError(f"expected true or false, found {word!r}")
        return word.lower() in ("true", "1")
    try:
        return kind(word)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"expected {expected}, found {word!r}") from None


def parse_args(argv: list[str], config, switches: dict[str, str]) -> dict:
    """The flags that were given, by name; a switch (name -> help) is True where it was given.

    Raises InputError for a flag that does not exist, or whose value is of another type."""
    def refuse(message):
        raise InputError(message)

    parser = argparse.ArgumentParser(
        prog="train.py", description="Train, evaluate and compare.", allow_abbrev=False)
    parser.error = refuse
    for name, text in switches.items():
        parser.add_argument("--" + name, action="store_true", default=argparse.SUPPRESS, help=text)
    for name, f in flags_of(config).items():
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        many = {}
        if isinstance(f.default, tuple):
            many = dict(nargs="+")
        elif isinstance(f.default, bool):
            many = dict(nargs="?", const=True)
        choices = f.metadata["choices"]
        parser.add_argument("--" + name, default=argparse.SUPPRESS, help=text, **many,
                            metavar="{" + ",".join(choices) + "}" if choices else None,
                            type=lambda word, f=f: parse_word(f, word))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        if name in RENAMED:
            raise InputError(f"--{name} is called --{RENAMED[name]} now; see train.py -h")
        near = difflib.get_close_matches(name, [*flags_of(config), *switches], n=1, cutoff=0.4)
        hint = f"the nearest is --{near[0]}" if near else "see train.py -h"
        raise InputError(f"unknown flag {unknown[0]!r}; {hint}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in vars(given).items()}


def parse_vary(words: tuple, config, barred) -> tuple[str, list[tuple]]:
    """`FLAG V1 V2 …` -> its name, and each value as typed and as what it means.

    ("", [("", None)]) without words. Raises InputError for a flag in `barred`, or none."""
    if not words:
        return "", [("", None)]
    name, *values = words
    f = flags_of(config).get(name.lstrip("-"))
    if f is None or f.name in barred or not values:
        raise InputError(f"--vary {' '.join(words)}: expected a flag of the method, the "
                         f"optimization, the base or the network, and its values")
    try:
        return f.name, [(word, parse_word(f, word)) for word in dict.fromkeys(values)]
    except argparse.ArgumentTypeError as e:
        raise InputError(f"--vary {f.name}: {e}") from None


def check_tuned(config, layers: dict, settings, barred, shared, where: str) -> dict[str, dict]:
    """What a data set recommends: setting ("" for all) -> flags, their values of the right type.

    Raises InputError for a setting or flag that there is not, that no data may choose, or (the
    `shared` ones) that settings of one comparison cannot have different values of."""
    known, checked = flags_of(config), {}
    for setting, flags in layers.items():
        if setting and setting not in settings:
            raise InputError(f"{where}: expected one of {', '.join(settings)}; found {setting!r}")
        checked[setting] = {}
        for name, value in flags.items():
            if name not in known or name in barred:
                raise InputError(f"{where}: {name!r} is no flag that data may choose")
            if setting and name in shared:
                raise InputError(f"{where}: {name!r} belongs under '', since all settings share "
                                 f"a base; found under {setting!r}")
            kind, choices = known[name].metadata["kind"], known[name].metadata["choices"]
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind or choices and value not in choices:
                expected = " or ".join(choices) or kind.__name__
                raise InputError(f"{where}: {name}: expected {expected}, found {value!r:.40}")
            if name == "reward" and ":" in value:  # a file of data must not run code
                raise InputError(f"{where}: reward: expected built-in ones, found {value!r:.40}")
            checked[setting][name] = value
    return checked


def check_ranges(cfg) -> None:
    """Raises InputError for a number outside its flag's range."""
    for name, f in flags_of(type(cfg)).items():
        values = getattr(cfg, name)
        least, most = f.metadata["least"], f.metadata["most"]
        if f.metadata["kind"] in (int, float):
            for value in values if isinstance(values, tuple) else (values,):
                if not least <= value <= most or value == math.inf:
                    upto = "or more" if most == math.inf else f"to {most}"
                    raise InputError(f"--{name} {value}: expected {least} {upto}")


# --------------------------------------------------------------------------------------------------
# How a command ends


def leave(line: str, code: int):
    with suppress(OSError):  # whoever read stderr may have gone
        print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def fail(program: str, message):
    leave(f"{program}: {' '.join(str(message).split())}", 2)


def run_command(program: str, work) -> None:
    """Call work(), and end the program as its outcome says."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before we began
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):  # an ASCII console shows ? for an accent
            getattr(sys, name).reconfigure(errors="replace")
    try:
        work()
        sys.stdout.flush()
        processes.end()
    except InputError as e:
        if not processes.is_first() and not processes.working_alone:
            time.sleep(5)  # process 0 says the same, unless torchrun ends it before it can
            sys.exit(2)
        only_here = processes.working_alone and processes.size() > 1
        fail(program, f"process {processes.rank()}: {e}" if only_here else e)
    except RewardError as e:
        traceback.print_exception(e.__cause__)
        sys.exit(1)
    except processes.Gone:
        fail(program, "another process of this run has stopped, see what it printed; the last "
                      "saved state is kept, and the same command goes on from there")
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
    except OSError as e:  # a full disk; those of the user's reward are RewardErrors
        fail(program, e)
    except (run.Stopped, KeyboardInterrupt) as e:
        line = f"\n{str(e) or 'stopped'}; the same command goes on from there"
        leave(line if processes.is_first() else "", 130)
    finally:
        run.unlock_all()
