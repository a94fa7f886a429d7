"""What the tests of training share: a tiny model, a tiny data set, and processes that may die."""
import functools
import json
import os
import sys
import traceback
from pathlib import Path

import pytest

import train
import torch

import data
from data.rewards import load_reward

ROOT = os.path.dirname(os.path.abspath(train.__file__))
SHAPE = "--n_layer 1 --n_embd 16 --init_std 0.06 --vocab_size 300 --block_size 64".split()
RUN = ("--batch_size 4 --steps 6 --eval_every 2 --eval_size 6 --save_every 3 --kl_weight 0 "
       "--device cpu").split()
TINY = [*SHAPE, *RUN, *"--base_steps 4 --base_batch 8".split()]
FEW = ("--K", "3")
SETTINGS = {  # every setting, and every flag of the method somewhere
    "mle": (),
    "offline": ("--num_static", "3"),
    "online": (*FEW, "--p_m", "1"),  # which it fixes, and which may be typed
    "full": (*FEW, "--p_m", "0.5"),
    "tail": (*FEW, "--reuse", "1"),
    "masked": FEW,
    "static": FEW,
    "refresh": (*FEW, "--refresh", "2"),
    "offline random": ("--num_static", "2", "--stored", "random", "--kl_weight", "0.1"),
    "online alone": ("--K", "1", "--baseline", "loo", "--kl_weight", "0.1", "--mle_weight", "0"),
    "online reuse": (*FEW, "--reuse", "3", "--temperature", "0.8"),
    "full random": (*FEW, "--stored", "random", "--adv_scale", "none", "--top_k", "5"),
    "tail reuse": (*FEW, "--reuse", "2", "--num_static", "2", "--kl_weight", "0.1"),
    "tail refresh": (*FEW, "--reuse", "2", "--refresh", "4"),
    "masked best": (*FEW, "--stored", "best", "--kl_weight", "0.1"),
    "masked worst": (*FEW, "--stored", "worst", "--baseline", "loo"),
    "masked ranked": (*FEW, "--num_static", "3", "--credit", "0.5"),
    "refresh many": (*FEW, "--refresh", "3", "--num_static", "2", "--top_k", "5"),
}
train.hash_code = functools.cache(train.hash_code)  # the same for all: it takes .2 s


def flags_of(name: str) -> list[str]:
    return ["--settings", name.split()[0], *SETTINGS.get(name, ())]  # one of your own has no flags


def short_records(n: int) -> list[data.Record]:
    """Two references and three vaguer static texts per source, all of a few words."""
    skies = ("rain", "snow", "fog", "sun", "hail")
    records = []
    for i in range(n):
        place, sky = ("Oslo", "Rome", "Kyiv")[i % 3], skies[i % 5]
        records.append(data.Record(
            f"{place} {sky} {i}",
            references=[f"{sky} in {place}, {i} knots", f"{i} knots and {sky} in {place}"],
            target=[f"{sky} here", f"some wind in {place}"],
            static=[f"{sky} in town, some wind",
                    f"some wind in {place}",
                    f"{i} knots and {sky} here"]))
    return records


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """24 / 6 / 6 records on disk."""
    path, records = tmp_path_factory.mktemp("data"), short_records(36)
    for split, part in zip(data.SPLITS, (records[:24], records[24:30], records[30:])):
        data.save_records(part, f"{path}/{split}.jsonl")
    return str(path)


@pytest.fixture(scope="session")
def base(folder, tmp_path_factory):
    """The checkpoint of a base model."""
    out = tmp_path_factory.mktemp("base")
    train_only(merge(*TINY, "--steps", "1", "--settings", "mle", "--data", folder,
                     "--out", str(out)))
    return str(out / "base/best.pt")


def merge(*words: str) -> list[str]:
    """Flags, of which later ones win."""
    flags = {}
    for word in words:
        if word.startswith("--"):
            values = flags[word] = []
        else:
            values.append(word)
    return [word for name, values in flags.items() for word in (name, *values)]


def command(folder, base, out, *flags) -> list[str]:
    """The words of a tiny run of the setting `masked`, or of another that flags name."""
    words = ["--settings", "masked", "--data", folder, "--init", base, "--out", str(out)]
    return merge(*RUN, *words, *flags)


def train_only(words) -> None:
    """The command without its table and figure."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("compare_report", "vary_report"):
            patch.setattr(train.report, name, lambda *_: "")
        train.main(words)


def run(folder, base, out, *flags) -> dict:
    """Train one setting -> its row."""
    train_only(command(folder, base, out, *flags))
    return read_rows(out)[-1]


def read_rows(out, name: str = "results.json") -> list[dict]:
    with open(f"{out}/{name}", encoding="utf-8") as file:
        return json.load(file)


def metrics(out) -> list[dict]:
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def state(path) -> dict:
    return torch.load(path, weights_only=True)


def weights(path) -> dict:
    return state(path)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(path) -> dict[str, bytes]:
    """Everything under a folder."""
    return {str(file.relative_to(path)): file.read_bytes()
            for file in Path(path).rglob("*") if file.is_file()}


def refused(capsys, *flags) -> str:
    """The one line in which a command is refused, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train.main([*flags])
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and len(err.splitlines()) == 1, err
    return err


class Child:
    """work() in a process forked from this one: it may be killed, and starts in no time.

    Its output goes to files in `folder`; stdout may be a descriptor."""

    def __init__(self, work, folder, stdout: int | None = None):
        os.makedirs(folder, exist_ok=True)
        self.paths = [f"{folder}/stdout.txt", f"{folder}/stderr.txt"]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self.body(work, stdout))

    def body(self, work, stdout) -> int:
        out, err = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in self.paths)
        os.dup2(out if stdout is None else stdout, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))
        code = 0
        try:
            work()
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
            code = 99
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 98
        return code

    def end(self) -> tuple[int, str, str]:
        """Wait -> exit code (minus the signal that killed it), stdout, stderr."""
        status = os.waitpid(self.pid, 0)[1]
        texts = []
        for path in self.paths:
            with open(path, encoding="utf-8") as file:
                texts.append(file.read())
        return os.waitstatus_to_exitcode(status), *texts


def after_calls(n: int, action) -> None:
    """Call action() once, when Python has entered or left n more functions in this process."""
    left = [n]

    def count(frame, event, argument):
        left[0] -= 1
        if left[0] == 0:
            sys.setprofile(None)
            action()
    sys.setprofile(count)


def built(name, folder, base, *flags):
    """A run before its first update, and its batches; KL is measured from its base."""
    words = merge(*RUN, *flags_of(name), "--data", folder, *flags)
    cfg = train.make_config(train.parse_args(words, train.Config), name.split()[0])
    policy, before = (train.load_policy(base, torch.device("cpu")) for _ in range(2))
    optimizer, reward = train.make_optimizer(cfg, policy.model), load_reward(cfg.reward)
    run = train.Run(cfg, policy, reward, "", optimizer, before.model)
    records = data.load_dataset(folder)["train"]
    return run, train.Batches(cfg, records, policy, reward, run.written)
