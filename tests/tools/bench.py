"""What an update costs: two things timed against each other, as ratios with their quartiles.

    python -m tests.tools.bench     some minutes; not a test

Figures are medians over 7 paired runs. The two sides of a ratio take turns, so that other work on
the machine slows both.
"""
import time

import numpy as np

import train  # before torch: it tells torch's threads to wait quietly
import torch

import data
from data.rewards import load_reward
from lab.batches import Batches
from lab.policy import machine_of, new_policy, pick_device
from lab.run import Run
from lab.settings import make_config

PAIRS = 7
PLAIN = dict(mle_weight=0.0, stored="data")  # RL rows alone, as many as MLE's; no ranking of texts


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def time_pairs(a, b) -> list[list[float]]:
    """Seconds of a and of b, which take turns, after one run of each to warm up: (PAIRS,2)."""
    a(), b()
    return [[seconds(a), seconds(b)] for _ in range(PAIRS)]


def show(what: str, target: str, pairs) -> None:
    """One line: the ratio of the first of each pair to the second, and the medians of both."""
    pairs = np.array(pairs)
    low, median, high = np.percentile(pairs[:, 0] / pairs[:, 1], (25, 50, 75))
    sides = " : ".join(f"{side:.4g}" for side in np.median(pairs, 0))
    print(f"{what:<50} {median:6.2f} [{low:.2f}, {high:.2f}]  target {target}  ({sides} s)",
          flush=True)


class Bench:
    """The default model on the default task, untrained: weights do not change what it costs."""

    def __init__(self):
        self.device, self.reward = pick_device("auto"), load_reward("rouge")
        self.dataset = data.load_dataset("forecast")
        self.tok = new_policy(make_config({}, "masked"), self.dataset, self.device).tok

    def updater(self, name: str, **flags):
        """A function that does the next update of a run of this setting."""
        cfg = make_config(flags, name)
        policy = new_policy(cfg, self.dataset, self.device, self.tok)
        run = Run(cfg, policy, "", train.make_optimizer(cfg, policy.model))
        batches = Batches(cfg, self.dataset["train"], policy, self.reward)
        return lambda: train.update(run, batches, self.reward)


def compare_updates(bench: Bench) -> None:
    """The masked update against maximum likelihood on as many rows, and against K = 1."""
    masked = bench.updater("masked", K=64, **PLAIN)
    one = bench.updater("masked", K=1, baseline="loo", **PLAIN)
    show("masked update, K = 64 : MLE update", "<= 1.45", time_pairs(masked, bench.updater("mle")))
    show("masked update, K = 64 : K = 1", "<= 1.35", time_pairs(masked, one))
    for name in ("online", "full"):
        show(f"{name} update, K = 8 : masked, K = 64", "none",
             time_pairs(bench.updater(name, K=8), masked))


def time_scoring(bench: Bench) -> None:
    """The share of a masked update that goes into scoring."""
    spent, usual = [], train.score

    def score(*args):
        scores = []
        spent.append(seconds(lambda: scores.append(usual(*args))))
        return scores[0]

    train.score = score
    step = bench.updater("masked", K=64, **PLAIN)
    whole = [seconds(step) for _ in range(PAIRS + 1)]
    train.score = usual
    show("scoring : masked update, K = 64", "<= 0.25", list(zip(spent[1:], whole[1:])))


if __name__ == "__main__":
    bench = Bench()
    print(machine_of(bench.device))
    compare_updates(bench)
    time_scoring(bench)
