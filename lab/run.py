"""One training run and its folder: the lock, the log, the last checkpoint, how it is stopped.

    config.json      the flags, what they were used on, and the code that used them
    metrics.jsonl    one line per update           ckpt.pt    the state from which it continues
    texts.jsonl      texts at every evaluation     best.pt    the weights that are tested
"""
import ast
import hashlib
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
from lab.settings import PLACES, Config
from lab.task import Policy, load, policy_state, save
from model import GPT

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What a run's figures depend on. Flags and settings are compared value by value instead.
CODE = ("train.py", "sorl.py", "model.py", "data/__init__.py", "data/tokenizer.py",
        "data/rewards.py", "data/forecast.py", "data/e2e.py", "lab/batches.py", "lab/evaluate.py",
        "lab/processes.py", "lab/run.py", "lab/task.py")
LOGS = ("metrics.jsonl", "texts.jsonl")
FILES = ("ckpt.pt", "best.pt", "results.json", "predictions.jsonl", *LOGS)
STATE = ("step", "counts", "best", "finished")

# --------------------------------------------------------------------------------------------------
# The folder


def hash_code() -> dict[str, str]:
    """File -> a hash of its code, in which comments, docstrings and layout do not count."""
    hashes = {}
    for name in CODE:
        path = f"{ROOT}/{name}"
        if name == "sorl.py":  # the student's file, if SORL names one
            path = sys.modules["sorl"].__file__
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        if name.startswith("data/"):  # tuned flags are compared value by value
            tree.body = [node for node in tree.body if not ast.unparse(node).startswith("FLAGS =")]
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            is_text = isinstance(body, list) and body and isinstance(body[0], ast.Expr)
            if is_text and isinstance(body[0].value, ast.Constant):
                del body[0]
        hashes[name] = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    return hashes


def check_folder(folder: str, config: dict, anew: bool) -> None:
    """Raises InputError if a folder holds something else than runs of train.py, or the checkpoint
    of another run or of other code. Without a checkpoint there is nothing in it to lose."""
    files = [os.path.relpath(f"{home}/{name}", folder) for home, _, names in os.walk(folder)
             for name in names if name not in (".lock", "config.json.tmp")]  # of a killed start
    was = read_json(f"{folder}/config.json")
    if was is None and not files:
        return
    if not isinstance(was, dict) or "save_every" not in was:
        raise InputError(f"--out {folder}: holds {min(files)}, and is no run of train.py; "
                         f"expected a new folder")
    kinds = [bool(c.get("vary")) for c in (was, config) if c.get("mode") == "compare"]
    if kinds in ([True, False], [False, True]):
        raise InputError(f"--out {folder}: holds a comparison or a sweep, the other of the two; "
                         f"expected another --out")
    names = sorted(config.keys() - PLACES - {"code"}) if "ckpt.pt" in files and not anew else []
    other = [name for name in ("mode", *names) if was.get(name) != config[name]]
    if other and any(os.path.basename(name) == "ckpt.pt" for name in files):
        raise InputError(f"--out {folder}: holds a run of another config ({', '.join(other[:4])}); "
                         f"expected {'' if 'mode' in other else 'the same flags, --anew, or '}"
                         f"another --out")
    code = was.get("code", {})
    changed = [name for name in CODE if names and code.get(name) != config["code"][name]]
    if changed:
        raise InputError(f"--out {folder}: its run was made by another {changed[0]}; expected "
                         f"another --out, or --anew, which starts the runs of this command again")


@contextmanager
def claim(folders: dict[str, dict], anew: bool):
    """Keep other commands out of the folders until this one ends, however it ends (not on
    Windows), and write config.json of the runs that begin: folder -> what config.json holds.

    With `anew` all begin. Raises InputError if a folder is not ours, before anything is written."""
    for folder, config in folders.items():
        check_folder(folder, config, anew)
    processes.meet()  # all have looked before one writes
    with ExitStack() as locks:
        if processes.rank() == 0:
            lock_folders(folders, locks)
            for folder, config in folders.items():
                if anew or not os.path.exists(f"{folder}/ckpt.pt"):
                    begin_folder(folder, config)
        processes.meet()  # and it has written before the others read
        yield


def lock_folders(folders, locks: ExitStack) -> None:
    """Make the folders, and lock each until `locks` is closed. Raises InputError."""
    for folder in folders:
        try:
            os.makedirs(folder, exist_ok=True)
            file = locks.enter_context(open(f"{folder}/.lock", "wb"))
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {folder}: another process is at work there; wait for it, "
                             f"or use another --out") from None
        except OSError as e:
            raise InputError(f"--out {folder}: cannot be written ({e.strerror})") from None


def begin_folder(folder: str, config: dict) -> None:
    """Remove what an earlier run has left, because results must not outlive it; --init's file may
    lie there, and is replaced later."""
    for path in (f"{folder}/{name}" for name in FILES):
        if os.path.realpath(path) != os.path.realpath(config["init"]):
            with suppress(FileNotFoundError):
                os.remove(path)
    write_json(config, f"{folder}/config.json")


# --------------------------------------------------------------------------------------------------
# The run


class Diverged(InputError):
    """A loss that is not finite."""


@dataclass
class Run:
    """What the loop changes, all of which a checkpoint holds."""
    cfg: Config
    policy: Policy
    reward: object  # a function of texts, references and sources
    folder: str
    optimizer: torch.optim.Optimizer
    base: GPT | None = None  # what KL is measured from; the base's own run has none
    step: int = 0
    counts: dict = field(default_factory=lambda: dict.fromkeys(COSTS, 0))
    best: float = -math.inf
    # What the policy wrote last, by the batch's slot: static texts (refresh), samples (reuse).
    written: dict[int, torch.Tensor] = field(default_factory=dict)
    samples: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    finished: bool = False
    flat: int = 0  # updates since groups last had different rewards

    @property
    def done(self) -> float:
        """The share of the run that is over, by updates or by FPs."""
        cfg = self.cfg
        spent = self.counts["fp"] / cfg.budget_fp if cfg.budget_fp else 0.0
        return min(1.0, max(self.step / cfg.steps if cfg.steps else 1.0, spent))

    def load(self) -> None:
        """Continue from ckpt.pt, if there is one, and cut the logs back to that step."""
        sizes, path = dict.fromkeys(LOGS, 0), f"{self.folder}/ckpt.pt"
        if os.path.exists(path):
            state = load(path)
            try:
                self.policy.model.load_state_dict(state["model"])
                if not state["finished"]:
                    self.optimizer.load_state_dict(state["optimizer"])
                for name in STATE:
                    setattr(self, name, state[name])
                sizes = {name: int(state["logs"][name]) for name in LOGS}
                mine = range(processes.rank(), 2 ** 31, processes.size())  # slots
                for name in ("written", "samples"):
                    getattr(self, name).update((i, x) for i, x in state[name].items() if i in mine)
            except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as e:
                raise InputError(f"{path}: not the state of this run ({e!s:.80})") from None
        if processes.rank() == 0:
            for name in LOGS:
                self.write(name, "")
                path = f"{self.folder}/{name}"
                os.truncate(path, min(sizes[name], os.path.getsize(path)))

    def save(self) -> None:
        """Write the whole state; every process calls this, because each has texts of its own."""
        written = {slot: texts.cpu() for slot, texts in self.written.items()}
        samples = {slot: {name: x.cpu() for name, x in held.items()}
                   for slot, held in self.samples.items()}
        state = {"written": processes.gather(written), "samples": processes.gather(samples)}
        if processes.rank() == 0:
            save(policy_state(self.policy, self.cfg) | state | {
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
        networks = filter(None, (self.policy.model, self.base))
        sums = {"batches": len(logs), "tokens": sum(int(net.pushed[1]) for net in networks)}
        for name in ("fp", "fp_grad", "fp_mle", "rows_grad", "mle", "rl"):
            sums[name] = sum(float(log.get(name, 0)) for log in logs)
        rewards = [log["rewards"] for log in logs if "rewards" in log]  # (N,K) each
        equal = [(r == r[:, :1]).all(1).float().mean() for r in rewards if r.size(1) > 1]
        sums |= {"reward": float(sum(r.sum() for r in rewards)), "equal": float(sum(equal)),
                 "samples": sum(r.numel() for r in rewards)}

        sums = processes.total(sums, self.policy.device)
        for name in ("fp", "fp_grad", "fp_mle", "rows_grad", "tokens"):
            self.counts[name] += int(sums[name])
        if not math.isfinite(sums["mle"] + sums["rl"]):
            rate = "--lr" if self.base else "--base_lr"
            raise Diverged(f"{self.folder}: the loss is not finite at step {self.step}; try a "
                           f"smaller {rate}")
        n, samples = sums["batches"], sums["samples"]
        return {"reward": sums["reward"] / samples if samples else None,
                "equal_rewards": sums["equal"] / n if samples else None,
                "mle_loss": sums["mle"] / n, "rl_loss": sums["rl"] / n}


# --------------------------------------------------------------------------------------------------
# What the user sees, and how the user stops it


class Progress:
    """One line at once, then one every five seconds, and one at the end."""

    def __init__(self, name: str, first: int = 0):
        self.name, self.first = name, first  # first: the step that this process began at
        self.begun, self.last = time.perf_counter(), 0.0

    def show(self, step: int, steps: int, text: str, final: bool = False) -> None:
        now = time.perf_counter()
        if final or now - self.last > 5:
            seconds = now - self.begun
            left = seconds / max(1, step - self.first) * (steps - step)
            more = "" if final else f", {left:.0f} s left"
            print(f"{self.name:<8} {step:>4}/{steps}  {text}  {seconds:.0f} s{more}", flush=True)
            self.last = now


def show(run: Run, progress: Progress, row: dict) -> bool:
    """The last update on the progress line; and a note when most groups have had equal rewards
    for ten updates, so that nothing is learned. True if our output is not read any more."""
    text = f"mle {row['mle_loss']:.3f}  greedy {run.best:.3f}"
    if row["reward"] is not None:
        text = f"reward {row['reward']:.3f}  best {run.best:.3f}  FP {row['fp']:>7,}"
        flat = row["equal_rewards"] > 0.9 and row["reward"] < 0.9
        run.flat = run.flat + 1 if flat else 0
    try:
        if run.flat == 10:
            print(f"\nnote: for ten updates, more than 90% of the groups of samples have had equal "
                  f"rewards (mean {row['reward']:.2f}), from which nothing can be learned; the "
                  f"base may be too certain, or the reward too coarse")
        progress.show(run.step, run.cfg.steps, text, run.done == 1)
        return False
    except (OSError, ValueError):  # such as head, which has left
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        return True


class Stop:
    """Ctrl-C, SIGTERM, SIGHUP: the first asks the loop to stop after the update that runs, the
    second leaves at once. One that is ignored, as nohup does, stays so."""
    SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    asked = False

    def __enter__(self):
        heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.ask) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt("stopped at once; what was saved last is kept")
        self.asked = True
