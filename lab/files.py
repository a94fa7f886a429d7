"""Files that are whole or not there, JSON, and the names of the costs that every run counts."""
import json
import os
from contextlib import suppress

from data import InputError

COSTS = ("fp", "fp_grad", "fp_mle", "rows_grad", "tokens", "seconds")


def write_whole(path: str, write) -> None:
    """All of a file, by write(binary file), or none of it: whoever is killed here leaves the old
    one. Raises InputError where it cannot be written."""
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
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(value, path: str) -> None:
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path: str):
    """What the file holds, None without the file. Raises InputError for what is not JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: expected JSON written by train.py ({e!s:.80})") from None
