"""What an update costs: two things timed against each other, ratios with their quartiles.

    python -m tests.bench                   all of it, some minutes; not a test
    python -m tests.bench update reward     a part

Figures are medians over 7 paired runs (memory: 3 processes each). The two sides of a ratio take
turns, so that a busy machine is busy for both. rouge-score and transformers are compared with where
they are installed, and are needed nowhere else.
"""
import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import train  # before torch: it tells torch's threads to wait quietly
import torch

import data
from data.rewards import load_reward, rouge
from data.tokenizer import NUM_SPECIAL, Tokenizer, ranks_text
from lab.batches import Batches
from lab.policy import machine_of, new_policy, pick_device
from lab.run import Run
from lab.settings import make_config
from model import generate

PAIRS = 7
PLAIN = dict(mle_weight=0.0, stored="data")  # RL rows alone, as many as MLE's; no ranking of texts
GPT2_IDS = 50_260


def wait() -> None:
    """For what a GPU has still to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def paired(a, b) -> np.ndarray:
    """Seconds of a and of b, taking turns, after one run of each to warm up: (PAIRS,2)."""
    a(), b()
    return np.array([[seconds(a), seconds(b)] for _ in range(PAIRS)])


def show(what: str, target: str, pairs, unit: str = "s") -> None:
    """A line: the ratio of the first of each pair to the second, and both sides' medians."""
    pairs = np.array(pairs)
    low, median, high = np.percentile(pairs[:, 0] / pairs[:, 1], (25, 50, 75))
    sides = " : ".join(f"{side:.4g}" for side in np.median(pairs, 0))
    print(f"{what:<58} {median:6.2f} [{low:.2f}, {high:.2f}]  target {target}  ({sides} {unit})",
          flush=True)


def enlarged(tok: Tokenizer, V: int) -> Tokenizer:
    """The same tokenizer with V ids, the further ones for bytes that no text has."""
    tokens = tok.bytes[:tok.pad]
    tokens += [b"\xff" + i.to_bytes(2, "big") for i in range(V - NUM_SPECIAL - len(tokens))]
    return Tokenizer.load(ranks_text(tokens))


class Bench:
    """The default model on the default task, untrained: weights do not change what it costs."""

    def __init__(self):
        self.device, self.reward = pick_device("auto"), load_reward("rouge")
        self.dataset, self.cfg = data.load_dataset("forecast"), make_config({}, "masked")
        self.tok = self.policy(self.cfg, None).tok

    def policy(self, cfg, tok):
        return new_policy(cfg, self.dataset, self.device, tok)

    def updater(self, name: str, V: int = 0, **flags):
        """A function that does the next update of a run of this setting; with V ids if given."""
        cfg = make_config(flags, name)
        policy = self.policy(cfg, enlarged(self.tok, V))
        run = Run(cfg, policy, "", train.make_optimizer(cfg, policy.model))
        batches = Batches(cfg, self.dataset["train"], policy, self.reward)
        return lambda: train.update(run, batches, self.reward)


def update(bench: Bench) -> None:
    """The masked update against maximum likelihood on as many rows, and against K = 1."""
    masked = bench.updater("masked", K=64, **PLAIN)
    show("masked update, K = 64 : MLE update", "<= 1.45", paired(masked, bench.updater("mle")))
    one = bench.updater("masked", K=1, baseline="loo", **PLAIN)
    show("masked update, K = 64 : K = 1", "<= 1.35", paired(masked, one))
    for name in ("online", "full"):
        show(f"{name} update, K = 8 : masked, K = 64", "none",
             paired(bench.updater(name, K=8), masked))


def reward(bench: Bench) -> None:
    """The share of a K = 64 update that goes into scoring, and ROUGE against rouge-score."""
    spent, usual = [], train.score

    def timed(*args):
        wait()
        begun = time.perf_counter()
        scores = usual(*args)
        wait()
        spent.append(time.perf_counter() - begun)
        return scores

    train.score = timed
    step = bench.updater("masked", K=64, **PLAIN)
    whole = [seconds(step) for _ in range(PAIRS + 1)][1:]
    train.score = usual
    show("scoring : masked update, K = 64", "<= 0.25", list(zip(spent[1:], whole)))

    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return print("rouge-score : rouge   skipped, rouge-score is not installed")
    rng, kinds = np.random.default_rng(0), ("rouge1", "rouge2", "rougeL")
    words, scorer = [f"w{i}" for i in range(400)], RougeScorer(kinds)
    texts, references = ([" ".join(rng.choice(words, 24)) for _ in range(4096)] for _ in range(2))

    def theirs(hypotheses=texts):
        scores = [scorer.score(r, h) for r, h in zip(references, hypotheses)]
        return np.array([[score[kind].fmeasure for kind in kinds] for score in scores])

    def ours(hypotheses=texts):
        return rouge(hypotheses, [[r] for r in references])

    worst = np.abs(ours() - theirs()).max()
    unseen = ([f"{text} {i}" for text in texts] for i in range(PAIRS + 1))  # no cache helps
    show(f"rouge-score : rouge, unseen texts (differ by {worst:.0e})", ">= 20",
         paired(theirs, lambda: ours(next(unseen))))


@torch.no_grad()
def sampler(bench: Bench) -> None:
    """Decoding when most rows have finished, and against transformers' GPT-2 of the same size."""
    policy, (B, S, T) = bench.policy(bench.cfg, bench.tok), (256, 24, 48)
    model, tok, device = policy.model.eval(), policy.tok, bench.device
    src = torch.randint(0, tok.pad, (B, S), device=device)
    pad, u = src.new_zeros(B), torch.rand(B, 1, T, device=device)
    static = src.new_full((B, T), tok.pad)
    static[:, 0] = tok.eos
    mask = (torch.arange(B, device=device) < B // 4)[:, None].expand(B, T)  # others end at once

    def ours():
        generate(model, src, pad, T, u, end=False)

    def finished():
        generate(model, src, pad, T, u, static=static, mask=mask, end=False)

    show("decoding, three rows in four finished : none", "<= 0.65", paired(finished, ours))
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return print("transformers' generate : generate   skipped, it is not installed")
    cfg = model.config
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
        n_layer=cfg.n_layer, n_head=cfg.n_head, bos_token_id=None,
        eos_token_id=None)).eval().to(device)

    def hugging():
        theirs.generate(src, attention_mask=torch.ones_like(src), do_sample=True, top_k=0,
                        min_new_tokens=T, max_new_tokens=T, pad_token_id=tok.pad)

    show("transformers' generate : generate, 256 rows of 48 tokens", ">= 1.5, two threads",
         paired(hugging, ours))


def memory(bench: Bench) -> None:
    """Peak memory of an update above what the process held before, a process for each figure."""
    if bench.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return print("memory   skipped, it needs Linux's /proc or a GPU")
    show("peak memory of a masked update, K = 64 : K = 1", "<= 1.5",
         [[peak(64), peak(1)] for _ in range(3)], "MiB")


def vocabulary(bench: Bench) -> None:
    """The masked update with as many ids as GPT-2 has, against the default 1,000."""
    large = bench.updater("masked", GPT2_IDS, K=64, **PLAIN)
    show("masked update, V = 50,260 : V = 1,000", "none",
         paired(large, bench.updater("masked", K=64, **PLAIN)))
    if bench.device.type == "cuda" or Path("/proc/self/clear_refs").exists():
        show("its peak memory", "none", [[peak(64, GPT2_IDS), peak(64)]], "MiB")


def peak(K: int, V: int = 0) -> float:
    """MiB that a masked update takes, measured in a process of its own."""
    # glibc is told to give freed tensors back, so that the figure is not its hoard.
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--peak", str(K), str(V)], check=True, text=True,
        stdout=subprocess.PIPE, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    return float(done.stdout)


def print_peak(bench: Bench, K: int, V: int) -> None:
    """MiB that one update takes; on a CPU the largest of five."""
    step = bench.updater("masked", V, K=K, baseline="loo", **PLAIN)
    step()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return print((torch.cuda.max_memory_allocated() - before) / 2 ** 20)

    def held(key: str) -> int:  # KiB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    peaks = []
    for _ in range(5):
        before = held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        step()
        peaks.append(held("VmHWM") - before)
    print(max(peaks) / 1024)


BENCHES = {work.__name__: work for work in (update, reward, sampler, memory, vocabulary)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="{" + ",".join(BENCHES) + "}")
    parser.add_argument("--peak", type=int, nargs=2, metavar=("K", "V"),
                        help="MiB that an update takes, alone")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(BENCHES):
        parser.error(f"no bench {unknown.pop()!r}; there are {', '.join(BENCHES)}")
    bench = Bench()
    if args.peak:
        return print_peak(bench, *args.peak)
    print(machine_of(bench.device))
    for name in args.names or BENCHES:
        BENCHES[name](bench)


if __name__ == "__main__":
    main(sys.argv[1:])
