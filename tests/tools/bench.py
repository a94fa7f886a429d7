"""Where the seconds of an update go, in settings that take turns; not a test.

    python -m tests.tools.bench --data datasets/e2e --settings online tail masked [--init BASE]

Flags are train.py's. Means over ROUNDS updates of each setting, after one to warm up. Without
--init, of a base that has learned nothing, which writes longer texts.
"""
import copy
import sys
import time

import numpy as np

import train  # before torch: it tells torch's threads to wait quietly
import torch

import sorl
from lab.batches import Batches
from lab.cli import parse_args, run_command
from lab.task import Task, machine_of

ROUNDS = 8  # a multiple of every --reuse
PARTS = {"decode": (sorl, "feed"), "forward": (sorl, "target_logits"), "score": (train, "score"),
         "backward": (torch.Tensor, "backward")}
spent = {}


def timed(part: str, function):
    def call(*args, **more):
        begun = time.perf_counter()
        found = function(*args, **more)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[part] = spent.get(part, 0.0) + time.perf_counter() - begun
        return found
    return call


@run_command("bench")
def main(argv: list[str]) -> None:
    configs = [cfg for _, cfg, *_ in train.plan(parse_args(argv, train.Config))]
    task, runs = Task(configs[0]), {}
    for cfg in configs:
        policy = task.new_policy(train.base_config(cfg))
        policy = train.replace(policy, model=copy.deepcopy(policy.model))
        run = train.Run(cfg, policy, task.reward(cfg.reward), "",
                        train.make_optimizer(cfg, policy.model), copy.deepcopy(policy.model))
        batches = Batches(cfg, task.dataset["train"], policy, run.reward, run.written)
        runs[cfg.setting] = timed("all", lambda run=run, batches=batches: run.count(
            train.update(run, batches)))
    for part, (where, name) in PARTS.items():
        setattr(where, name, timed(part, getattr(where, name)))

    rows = {name: [] for name in runs}
    for _ in range(1 + ROUNDS):
        for name, update in runs.items():
            spent.clear()
            update()
            rows[name].append([spent.get(part, 0.0) for part in ("all", *PARTS)])
    print(f"seconds per update; {machine_of(task.device)}\n{'setting':<9}",
          *(f"{part:>9}" for part in ("all", *PARTS)))
    for name, seconds in rows.items():
        print(f"{name:<9}", *(f"{x:>9.3f}" for x in np.mean(seconds[1:], 0)))


if __name__ == "__main__":
    main(sys.argv[1:])
