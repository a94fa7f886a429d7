"""The command line: flags from a dataclass, and how a command ends.

User errors print one line to stderr and exit with 2. An error inside the user's own reward keeps
its traceback and exits with 1. A command that was stopped exits with 130.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import field, fields

from data import InputError
from data.rewards import RewardError


def flag(default, text: str, choices: tuple = (), kind: type | None = None, least: float = 0,
         most: float = math.inf):
    """A field of the config that is a flag; `kind` is the type of one word of a tuple."""
    more = dict(help=text, choices=choices, kind=kind or type(default), least=least, most=most)
    return field(default=default, metadata=more)


def flags_of(config) -> dict:
    """name -> field, for every field of the config that is a flag."""
    return {f.name: f for f in fields(config) if f.metadata}


def value_of(f, word: str, where: str = ""):
    """A word as the value of a flag. Raises InputError for another type, range or choice."""
    kind, choices = f.metadata["kind"], f.metadata["choices"]
    least, most = f.metadata["least"], f.metadata["most"]
    value, expected = word, ""
    if choices and word not in choices:
        expected = f"one of {', '.join(choices)}"
    elif kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(word.lower())
        expected = "true or false" if value is None else ""
    elif kind in (int, float):
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            expected = "a whole number, " if kind is int else "a number, "
            expected += f"{least} or more" if most == math.inf else f"{least} to {most}"
    if expected:
        raise InputError(f"{where}--{f.name} {word}: expected {expected}")
    return value


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors, one line each."""

    def error(self, message):
        raise InputError(message)


class Once(argparse.Action):
    """Store a value; a flag that is given twice is an error, since one of the two would be lost."""

    def __call__(self, parser, namespace, values, option=None):
        if hasattr(namespace, self.dest):
            raise InputError(f"{option}: given twice")
        setattr(namespace, self.dest, values)


def parse_args(argv: list[str], config) -> dict:
    """The flags that were given, by name. Raises InputError for unknown flags and bad values."""
    known = flags_of(config)
    parser = Parser(prog="train.py", description="Train, evaluate and compare.", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for name, f in known.items():
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        choices = ",".join(f.metadata["choices"])
        nargs = {tuple: "+", bool: "?"}.get(type(f.default))  # a bool alone is true
        parser.add_argument(f"--{name}", help=text, nargs=nargs, const="true" if nargs == "?" else
                            None, metavar=f"{{{choices}}}" if choices else None, action=Once)
    given = parser.parse_args(argv)
    return {name: tuple(value_of(known[name], word) for word in words) if isinstance(words, list)
            else value_of(known[name], words) for name, words in vars(given).items()}


# --------------------------------------------------------------------------------------------------
# How a command ends


def leave(line: str, code: int):
    with suppress(OSError):  # stderr may be closed
        print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)
    sys.exit(code)


def tell_torchrun(reason: str) -> None:
    """torchrun ends with the reason of the process that failed first, if this file holds it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        second = int(time.time()) - 1  # the others fail within the same one
        more = {"py_callstack": reason, "timestamp": str(second)}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:  # the disk may be full
            json.dump({"message": {"message": reason, "extraInfo": more}}, file)


@contextmanager
def run_command(program: str):
    """Around a command's work, or its function: ends the program as the outcome says."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before we began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if hasattr(getattr(sys, name), "reconfigure"):  # an ASCII console shows ? for an accent
            getattr(sys, name).reconfigure(errors="replace")
    process = int(os.environ.get("RANK", 0))  # torchrun's, which may start several of us
    try:
        yield
        sys.stdout.flush()
    except RewardError as e:
        traceback.print_exception(e.__cause__)
        tell_torchrun(traceback.format_exception_only(e.__cause__)[-1].strip())
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output, such as head, has left
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        sys.exit(1)
    except (InputError, OSError) as e:  # such as a full disk; the user's reward raises RewardError
        who = f"process {process}: " if process else ""
        leave(f"{program}: {who}{' '.join(str(e).split())}", 2)
    except KeyboardInterrupt as e:
        leave("" if process else f"\n{str(e) or 'stopped'}", 130)
