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
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import torch

from data import InputError
from lab import processes
from lab.files import COSTS, read_json, write_json
from lab.policy import Policy, load, policy_state, save
from model import GPT

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What a run is does not depend on these: where things lie, and how its course is watched.
PLACES = {"mode", "quick", "data", "out", "init", "pretrained", "resume", "settings", "seeds",
          "vary", "source", "device", "save_every"}
LOGS = ("metrics.jsonl", "samples.txt")
STATE = ("step", "counts", "best", "finished")

# --------------------------------------------------------------------------------------------------
# The folder


def check_folder(folder: str, config: dict) -> None:
    """Raises InputError where a folder holds what is no run, or the checkpoint of another run or
    of another mode's runs. Without a checkpoint there is nothing in it to keep."""
    files = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    files -= {".lock", "config.json.tmp"}
    was = read_json(f"{folder}/config.json")
    if was is None and not files:
        return
    if not isinstance(was, dict) or "save_every" not in was:
        raise InputError(f"--out {folder}: holds {min(files)}, and is no run of train.py; "
                         f"expected a new folder")
    names = sorted(config.keys() - PLACES) if "ckpt.pt" in files else []
    other = [name for name in ("mode", *names) if was.get(name) != config[name]]
    if other and glob.glob(f"{glob.escape(folder)}/**/ckpt.pt", recursive=True):
        raise InputError(f"--out {folder}: holds a run of another config ({', '.join(other[:4])}); "
                         f"expected the same flags, or another --out")


@contextmanager
def claimed(folders: dict, identity):
    """Keep other commands out of the folders until this one ends, however it ends (not on
    Windows), and write config.json of the runs: folder -> config, whose identity it holds.

    Raises InputError where one of the folders is another's, before anything is written."""
    configs = {folder: identity(config) for folder, config in folders.items()}
    for folder, config in configs.items():
        check_folder(folder, config)
    if processes.rank() > 0:
        yield
        return
    with ExitStack() as locks:
        for folder in configs:
            try:
                os.makedirs(folder, exist_ok=True)
                file = locks.enter_context(open(f"{folder}/.lock", "w"))
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"--out {folder}: another process is at work there; wait for it, "
                                 f"or use another --out") from None
            except OSError as e:
                raise InputError(f"--out {folder}: cannot be written ({e.strerror})") from None
        for folder, config in configs.items():
            if not os.path.exists(f"{folder}/ckpt.pt"):
                write_json(config, f"{folder}/config.json")
        yield


# --------------------------------------------------------------------------------------------------
# The run


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
        """Go on from ckpt.pt, if there is one, and cut the logs back to that step."""
        sizes = dict.fromkeys(LOGS, 0)
        if os.path.exists(f"{self.folder}/ckpt.pt"):
            state = load(f"{self.folder}/ckpt.pt")
            if not state.keys() >= {"optimizer", "logs", *STATE}:
                raise InputError(f"{self.folder}/ckpt.pt: not the state of a run")
            self.policy.model.load_state_dict(state["model"])
            if not state["finished"]:
                self.optimizer.load_state_dict(state["optimizer"])
            for name in STATE:
                setattr(self, name, state[name])
            self.saved, sizes = self.step, state["logs"]
        if processes.rank() == 0:
            for name in LOGS:
                self.write(name, "")
                path = f"{self.folder}/{name}"
                os.truncate(path, min(sizes[name], os.path.getsize(path)))

    def save(self) -> None:
        self.saved = self.step
        if processes.rank() == 0:
            save(policy_state(self.policy, self.cfg) | {
                "optimizer": None if self.finished else self.optimizer.state_dict(),
                "logs": {name: os.path.getsize(f"{self.folder}/{name}") for name in LOGS},
                **{name: getattr(self, name) for name in STATE},
            }, f"{self.folder}/ckpt.pt")

    def write(self, name: str, text: str) -> None:
        """Append to a log."""
        with open(f"{self.folder}/{name}", "a", encoding="utf-8") as file:
            file.write(text)

    def log(self, row: dict) -> None:
        if processes.rank() == 0:
            self.write("metrics.jsonl", json.dumps(row) + "\n")

    def count(self, logs: list[dict]) -> dict:
        """What one update did, over all processes, as plain numbers; adds to the counts."""
        models = [self.policy.model] + ([self.base] if self.base else [])
        sums = {"batches": len(logs), "tokens": sum(int(model.pushed[1]) for model in models)}
        for model in models:
            model.pushed.zero_()
        for name in ("fp", "fp_grad", "fp_mle", "mle", "rl"):
            sums[name] = sum(float(log.get(name, 0)) for log in logs)
        rewards = [log["rewards"] for log in logs if "rewards" in log]  # (R,K) each
        equal = [(r == r[:, :1]).all(1).float().mean() for r in rewards if r.size(1) > 1]
        sums |= {"reward": float(sum(r.sum() for r in rewards)), "equal": float(sum(equal)),
                 "samples": sum(r.numel() for r in rewards)}

        sums = processes.total(sums, self.policy.device)
        for name in ("fp", "fp_grad", "fp_mle", "tokens"):
            self.counts[name] += int(sums[name])
        if not math.isfinite(sums["mle"] + sums["rl"]):
            rate = "--lr" if self.base else "--base_lr"
            raise InputError(f"{self.folder}: the loss is not finite at step {self.step}; try a "
                             f"smaller {rate}{' and another --out' if self.saved else ''}")
        n, samples = sums["batches"], sums["samples"]
        return {"reward": sums["reward"] / samples if samples else None,
                "equal_rewards": sums["equal"] / n if samples else None,
                "mle_loss": sums["mle"] / n, "rl_loss": sums["rl"] / n}


# --------------------------------------------------------------------------------------------------
# What the user sees, and how the user stops it


class Progress:
    """A line at once, every five seconds, and at the end."""

    def __init__(self, name: str, first: int = 0):
        self.name, self.first = name, first  # first: the step that this process began at
        self.begun, self.last = time.perf_counter(), 0.0

    def show(self, step: int, steps: int, text: str, final: bool = False) -> None:
        now = time.perf_counter()
        if final or now - self.last > 5:
            seconds = now - self.begun
            left = seconds / max(1, step - self.first) * (steps - step)
            print(f"{self.name:<8} {step:>4}/{steps}  {text}  {seconds:.0f} s, {left:.0f} s left",
                  flush=True)
            self.last = now


def show(run: Run, progress: Progress, row: dict) -> None:
    """The last update on the progress line; and a note when most groups have had equal rewards
    for ten updates, so that nothing is learned."""
    text = f"mle {row['mle_loss']:.3f}  greedy {run.best:.3f}"
    if row["reward"] is not None:
        text = f"reward {row['reward']:.3f}  best {run.best:.3f}  FP {row['fp']:>7,}"
        flat = row["equal_rewards"] > 0.9 and row["reward"] < 0.9
        run.flat = run.flat + 1 if flat else 0
    if run.flat == 10:
        print(f"\nnote: for ten updates, more than 90% of the groups of samples have had equal "
              f"rewards (mean {row['reward']:.2f}), from which nothing can be learned; the base "
              f"may be too certain, or the reward too coarse")
    progress.show(run.step, run.cfg.steps, text, run.finished)


class Stop:
    """Ctrl-C, SIGTERM, SIGHUP: the first asks the loop to stop, the second leaves at once."""
    SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    asked = answered = False

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

    def answer(self, run: Run, left: int) -> None:
        """Say once how many updates are left to the next checkpoint. Raises KeyboardInterrupt
        where there is none, and the run has been saved."""
        if left == 0:
            raise KeyboardInterrupt(f"stopped; step {run.step} is saved in {run.folder}")
        if not self.answered and processes.rank() == 0:
            back = f"go back to step {run.saved}" if run.saved else "begin again"
            with suppress(OSError):  # stderr may have gone with stdout
                print(f"\nstopping after {left} more updates; once more to stop now and {back}",
                      file=sys.stderr, flush=True)
        self.answered = True
