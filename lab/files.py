"""Files that are written atomically, JSON and JSONL, and the names of the costs that runs count."""
import json
import os
from contextlib import suppress

from data import InputError

COSTS = ("fp", "fp_grad", "fp_mle", "rows_grad", "tokens", "seconds")
# Fields of rows and of lines of logs: those that hold text (the others numbers), and those that
# are never null.
TEXTS = {"name", "setting", "observation", "source", "text"}
NEEDED = {"name", "seed", "fp", "step", "seconds", "source", "text"}


def write_whole(path: str, write) -> None:
    """Writes a file atomically, by write(binary file): a crash keeps the old file.
    Raises InputError if it cannot be written."""
    try:
        with open(path + ".tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:
        reason = e if isinstance(e, OSError) else e.__context__  # torch.save hides a full disk
        with suppress(OSError):
            os.remove(path + ".tmp")
        raise InputError(f"{path}: cannot be written ({reason}); what was there before is "
                         f"kept") from None


def write_text(path: str, text: str) -> None:
    """Writes UTF-8, with ? for what it cannot encode, such as bytes of a folder's odd name."""
    write_whole(path, lambda file: file.write(text.encode(errors="replace")))


def write_json(value, path: str) -> None:
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path: str):
    """What the file holds; None if there is no such file. Raises InputError if it is not JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: expected JSON written by train.py ({e!s:.80})") from None


def read_fields(value, keys: tuple, where: str) -> dict:
    """A row or a line of a log; of these fields one that is missing is None. Raises InputError,
    which begins with `where`, for a value of another type."""
    row = value if isinstance(value, dict) else {}
    for key in keys:
        found, kind = row.get(key), "text" if key in TEXTS else "a number"
        fits = isinstance(found, str if key in TEXTS else (int, float))
        if not fits and (found is not None or key in NEEDED):
            raise InputError(f"{where}: {key}: expected {kind}, found {found!r:.40}")
    return row | {key: row.get(key) for key in keys}


def read_lines(path: str, *keys: str) -> list[dict]:
    """The lines of a JSONL file, as read_fields gives them. Raises InputError, which names the
    line."""
    lines = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                lines.append(json.loads(line))
    except (OSError, ValueError, RecursionError) as e:
        where = f"{path}:{len(lines) + 1}"
        raise InputError(f"{where}: expected JSON with {', '.join(keys)} ({e!s:.80})") from None
    return [read_fields(line, keys, f"{path}:{number}") for number, line in enumerate(lines, 1)]
