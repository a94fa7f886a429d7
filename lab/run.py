"""One training run and its folder: the lock, the log, the last checkpoint, how it is stopped.

    config.json      the flags and what they were used on    ckpt.pt    the state it goes on from
    metrics.jsonl    a line an update                        best.pt    the weights that are tested
    samples.txt      a few texts at every evaluation

A checkpoint is written only where a refresh begins, so static texts are no part of the state.
"""
import glob
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields

import torch

from data import InputError
from lab import processes
from lab.policy import Policy, load, policy_state, read_json, save, write_json
from lab.report import COSTS
from model import GPT

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What a run is does not depend on these: where things lie, and how its course is watched.
PLACES = {"mode", "data", "out", "init", "pretrained", "resume", "settings", "seeds", "vary",
          "source", "device", "save_every"}


class Stopped(Exception):
    """The user stopped the command; the message says what is saved."""


# --------------------------------------------------------------------------------------------------
# The folder

LOCKS = {}  # folder -> the open file that holds its lock


def lock(folder: str) -> None:
    """Keep other commands out of a folder until this one ends, however it ends (not on Windows)."""
    key = os.path.realpath(folder)
    if fcntl is None or key in LOCKS:
        return
    file = open(f"{folder}/.lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {folder}: another process is at work there; wait for it, or use "
                         f"another --out") from None
    LOCKS[key] = file


def unlock_all() -> None:
    while LOCKS:
        LOCKS.popitem()[1].close()


def identity(cfg, data_hash: str, **hashes: str) -> dict:
    """What makes two runs the same, as config.json holds it beside the places."""
    run = {name: value for name, value in asdict(cfg).items() if name not in PLACES}
    # So many batches an update, however they are shared out.
    run["accumulate"] = cfg.accumulate * processes.size()
    return json.loads(json.dumps(run | {"data_hash": data_hash} | hashes))


def check_folder(folder: str, mode: str, run: dict) -> None:
    """Raises InputError where a folder holds a checkpoint of another run, or of another mode's
    runs, or files of another program. Without a checkpoint there is nothing in it to keep."""
    config = read_json(f"{folder}/config.json")
    if config is None:
        files = os.listdir(folder) if os.path.isdir(folder) else []
        foreign = sorted(set(files) - {".lock", "config.json.tmp"})
        if foreign:
            raise InputError(f"--out {folder}: holds {foreign[0]} but no config.json, so it is no "
                             f"run of train.py; expected a new folder")
    elif not isinstance(config, dict) or not config.keys() >= PLACES:
        raise InputError(f"--out {folder}: holds a config.json of another program; expected a new "
                         f"folder")
    elif config["mode"] != mode and glob.glob(f"{glob.escape(folder)}/**/ckpt.pt", recursive=True):
        raise InputError(f"--out {folder}: belongs to --mode {config['mode']}; expected another "
                         f"--out")
    elif os.path.exists(f"{folder}/ckpt.pt"):
        other = [name for name in run if name not in config or config[name] != run[name]]
        if other:
            raise InputError(f"--out {folder}: holds a run of another config "
                             f"({', '.join(other[:4])}); expected the same flags, or another --out")


def claim(folder: str, cfg, run: dict) -> None:
    """Make and lock the run's folder, and write config.json unless it stands there for good."""
    try:
        os.makedirs(folder, exist_ok=True)
        check_folder(folder, cfg.mode, run)
        lock(folder)
    except OSError as e:
        raise InputError(f"--out {folder}: cannot be written ({e.strerror})") from None
    if not os.path.exists(f"{folder}/ckpt.pt"):
        places = {name: value for name, value in asdict(cfg).items() if name in PLACES}
        write_json(places | run, f"{folder}/config.json")


def resumed(config, given: dict):
    """The config of the run in --resume; places alone may be given anew."""
    folder = given["resume"]
    was = read_json(f"{folder}/config.json")
    if not isinstance(was, dict) or was.get("mode") != "train":
        raise InputError(f"--resume {folder}: no run of --mode train there (a comparison goes on "
                         f"by its own command)")
    flags = {f.name: was[f.name] for f in fields(config) if f.name in was}
    flags = {name: tuple(v) if isinstance(v, list) else v for name, v in flags.items()}
    flags["accumulate"] //= processes.size()
    for name, value in given.items():
        if name not in PLACES - {"out"} and flags.get(name) != value:
            raise InputError(f"--resume {folder}: that run has {name} {flags.get(name)}, not "
                             f"{value}")
    return config(**flags | given | {"out": folder})


# --------------------------------------------------------------------------------------------------
# The run


def open_log(path: str, size: int):
    """Append to a log whose first `size` bytes belong to the saved state; the rest goes."""
    file = open(path, "a+", encoding="utf-8")
    file.truncate(min(size, os.path.getsize(path)))
    file.seek(0, os.SEEK_END)
    return file


@dataclass
class Run:
    """What the loop changes, all of which a checkpoint holds."""
    cfg: object
    policy: Policy
    folder: str
    optimizer: torch.optim.Optimizer
    base: GPT | None = None  # what KL is measured from; the base's own run has none
    step: int = 0
    counts: dict = field(default_factory=lambda: dict.fromkeys(COSTS, 0))
    best: float = -math.inf
    saved: int | None = None  # the step of the last checkpoint
    finished: bool = False
    flat: int = 0  # updates since groups last had different rewards

    def load(self) -> None:
        """Go on from ckpt.pt, if there is one."""
        path, sizes = f"{self.folder}/ckpt.pt", {}
        if os.path.exists(path):
            state = load(path)
            try:
                self.policy.model.load_state_dict(state["model"])
                if not state["finished"]:
                    self.optimizer.load_state_dict(state["optimizer"])
                self.step, self.counts, self.best = state["step"], state["counts"], state["best"]
                self.finished, sizes = state["finished"], state["logs"]
            except (KeyError, RuntimeError, ValueError) as e:
                raise InputError(f"{path}: not the state of this run ({e!s:.100})") from None
            self.saved = self.step
        if processes.rank() == 0:
            self.logs = {name: open_log(f"{self.folder}/{name}", sizes.get(name, 0))
                         for name in ("metrics.jsonl", "samples.txt")}

    def save(self) -> None:
        self.saved = self.step
        if processes.rank() > 0:
            return
        for file in self.logs.values():
            file.flush()
        save(policy_state(self.policy, self.cfg) | {
            "optimizer": None if self.finished else self.optimizer.state_dict(),
            "step": self.step, "counts": self.counts, "best": self.best, "finished": self.finished,
            "logs": {name: file.tell() for name, file in self.logs.items()},
        }, f"{self.folder}/ckpt.pt")

    def count(self, logs: list[dict]) -> dict:
        """What one update did, over all processes, as plain numbers; adds to the counts."""
        tokens = 0
        for model in (self.policy.model, self.base):
            if model is not None:
                tokens += int(model.pushed[1])
                model.pushed.zero_()
        rewards = [log["rewards"] for log in logs if "rewards" in log]  # (R,K) each
        equal = [(r == r[:, :1]).all(1).float().mean() for r in rewards if r.size(1) > 1]
        fp, fp_grad, fp_mle, tokens, n, reward, samples, equal, mle, rl = processes.total([
            float(sum(log["fp"] for log in logs)), sum(log.get("fp_grad", 0) for log in logs),
            sum(log["fp_mle"] for log in logs), tokens, len(logs),
            float(sum(r.sum() for r in rewards)), sum(r.numel() for r in rewards),
            float(sum(equal)), float(sum(log["mle"] for log in logs)),
            float(sum(log["rl"] for log in logs))], self.policy.device)
        for name, value in zip(COSTS, (fp, fp_grad, fp_mle, tokens)):
            self.counts[name] += int(value)
        if not math.isfinite(mle + rl):
            rate = "--lr" if self.base else "--base_lr"
            raise InputError(f"{self.folder}: the loss is not finite at step {self.step}; try a "
                             f"smaller {rate}{' and another --out' if self.saved else ''}")
        row = {"reward": None, "equal_rewards": None, "mle_loss": mle / n, "rl_loss": rl / n}
        if rewards:
            row |= {"reward": reward / samples, "equal_rewards": equal / n}
        return row

    def note_equal(self, row: dict) -> None:
        """Say so when most groups have had equal rewards for ten updates: nothing is learned."""
        flat = row["reward"] is not None and row["equal_rewards"] > 0.9 and row["reward"] < 0.9
        self.flat = self.flat + 1 if flat else 0
        if self.flat == 10:
            print(f"\nnote: for ten updates, more than 90% of the groups of samples have had equal "
                  f"rewards (mean {row['reward']:.2f}), from which nothing can be learned; the "
                  f"base may be too certain, or the reward too coarse")

    def summary(self, row: dict) -> str:
        """A line of the log, for the progress line."""
        if row["reward"] is None:
            return f"mle {row['mle_loss']:.3f}  greedy {self.best:.3f}"
        return f"reward {row['reward']:.3f}  best {self.best:.3f}  FP {row['fp']:>7,}"

    def log(self, row: dict) -> None:
        if processes.rank() == 0:
            self.logs["metrics.jsonl"].write(json.dumps(row) + "\n")
            self.logs["metrics.jsonl"].flush()

    def close(self) -> None:
        for file in self.logs.values():
            file.close()


# --------------------------------------------------------------------------------------------------
# What the user sees, and how the user stops it


class Progress:
    """One line, rewritten in place on a terminal; in a log, a new line every few seconds."""

    def __init__(self, name: str, first: int = 0):
        self.name, self.first = name, first  # first: the step that this process began at
        self.begun, self.last = time.perf_counter(), 0.0

    def show(self, step: int, steps: int, text: str, final: bool = False) -> None:
        now, terminal = time.perf_counter(), sys.stdout.isatty()
        if not final and now - self.last < (0.2 if terminal else 10.0):
            return
        self.last, seconds = now, now - self.begun
        left = seconds / max(1, step - self.first) * (steps - step)
        line = f"{self.name:<8} {step:>4}/{steps}  {text}  {seconds:.0f} s, {left:.0f} s left"
        if not terminal:
            print(line, flush=True)
            return
        line = line[:shutil.get_terminal_size().columns - 1]
        print("\r\x1b[2K" + line, end="\n" if final else "", flush=True)


class Stop:
    """Ctrl-C, SIGTERM, SIGHUP: the first asks the loop to stop, the second leaves at once."""
    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
               if hasattr(signal, name)]

    def __init__(self):
        self.asked = self.answered = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def show(self, progress: Progress, run: Run, row: dict) -> None:
        """Progress whose reader may have gone: a closed stdout asks to stop, too."""
        try:
            run.note_equal(row)
            progress.show(run.step, run.cfg.steps, run.summary(row), run.finished)
        except (OSError, ValueError):
            self.asked, sys.stdout = True, open(os.devnull, "w")

    def answer(self, run: Run, left: int) -> None:
        """Say once how many updates are left. Raises Stopped where there is none, and the run
        has been saved."""
        if left == 0:
            raise Stopped(f"stopped; step {run.step} is saved in {run.folder}")
        if not self.answered and processes.rank() == 0:
            back = f"go back to step {run.saved}" if run.saved else "begin again"
            with suppress(OSError):  # stderr may have gone with stdout
                print(f"\nstopping after {left} more updates; once more to stop now and {back}",
                      file=sys.stderr, flush=True)
        self.answered = True
