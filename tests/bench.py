"""What an update costs: two things timed against each other in one run, ratios with their spread. Not a test.

    python -m tests.bench                        all of it, some minutes
    python -m tests.bench update reward          some
    python -m tests.bench --json bench.json      also to a file

Numbers are medians over 7 paired runs (memory: 3 processes each, growth: 5), with the quartiles in brackets; the two sides
of a ratio take turns, so that a machine that is busy is busy for both. rouge-score and transformers are compared with where
they are installed, and are never needed otherwise.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import train  # first: it tells torch's threads to wait quietly
import torch

import data
import report
from data.rewards import load_reward, rouge

PAIRS = 7


def wait() -> None:
    """For what a GPU has still to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(a, b, pairs: int = PAIRS) -> np.ndarray:
    """Seconds of a and of b, taking turns, after one run of each to warm up: (pairs,2)."""
    a(), b()
    times = []
    for _ in range(pairs):
        row = []
        for f in (a, b):
            begun = time.perf_counter()
            f()
            wait()
            row.append(time.perf_counter() - begun)
        times.append(row)
    return np.array(times)


def ratio(what: str, target: str, times: np.ndarray) -> dict:
    """A row of the report: the ratio of the first column to the second, and the medians of both sides."""
    r = times[:, 0] / times[:, 1]
    low, median, high = np.percentile(r, (25, 50, 75))
    return dict(what=what, target=target, ratio=float(median), low=float(low), high=float(high),
                sides=[float(t) for t in np.median(times, 0)])


class Bench:
    """The default model on the default task, untrained: weights do not change what an update costs."""

    def __init__(self, device: str):
        self.device = train.pick_device(device)
        self.dataset, self.reward = data.load_dataset("forecast"), load_reward("rouge")
        self.cfg = train.make_config({}, "masked")
        policy = train.new_policy(self.cfg, self.dataset, self.device)
        self.tok = policy.tok

    def updater(self, name: str = "masked", T: int = 0, **flags):
        """A function that does the next update of a run of this setting, and says how many FPs the run has had; with T, on texts
        of that many tokens."""
        cfg, records = train.replace(train.make_config({}, name), max_len=T, **flags), self.dataset["train"]
        if T:
            words = self.tok.decode(self.tok.encode(" ".join(records[0].references * T))[:T - 1])
            records = [train.replace(r, target=[words], static=[words]) for r in records]
        policy = train.new_policy(cfg, self.dataset, self.device, self.tok)
        run = train.Run(cfg, policy, "", train.make_optimizer(cfg, policy.model), False)
        batches = train.Batches(cfg, records, policy, None)

        def step():
            train.metrics_of(run, train.update(run, batches, self.reward))
            return sum(run.counts[name] for name in ("fp", "fp_grad", "fp_mle"))
        return step


def update(bench: Bench) -> list[dict]:
    """The masked update against maximum likelihood on the same batch, and its growth with K."""
    plain = dict(mle_weight=0.0, static="data")
    rows = [ratio("masked update, K = 64 : MLE update", "<= 1.5",
                  paired(bench.updater(K=64, **plain), bench.updater("mle")))]
    rows.append(ratio("masked update, K = 64 : K = 1", "<= 1.4",
                      paired(bench.updater(K=64, **plain), bench.updater(K=1, baseline="loo", **plain))))
    for name in ("online", "full"):
        rows.append(ratio(f"{name} update, K = 8 : masked, K = 64", "", paired(bench.updater(name, K=8), bench.updater(K=64, **plain))))
    return rows


def memory(bench: Bench) -> list[dict]:
    """Peak memory of one update above what the process held before it: K = 64 against K = 1, a process for each figure."""
    def peak(K: int) -> float:
        out = subprocess.run([sys.executable, "-m", "tests.bench", "--peak", str(K), "--device", bench.device.type], text=True,
                             stdout=subprocess.PIPE, check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
        return float(out.stdout)
    if bench.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return [dict(what="memory", target="", skipped="needs Linux's /proc")]
    return [ratio("peak memory of a masked update, K = 64 : K = 1 (MiB)", "<= 1.5",
                  np.array([[peak(64), peak(1)] for _ in range(3)]))]


def print_peak(bench: Bench, K: int) -> None:
    """MiB that one update takes above what was held before it. On a CPU the largest of five, each from the resident set
    that the last one left; glibc is told to give freed tensors back, so that the figure is not its hoard."""
    step = bench.updater(K=K, baseline="loo", mle_weight=0.0, static="data")
    step()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return print((torch.cuda.max_memory_allocated() - before) / 2 ** 20)

    def held(key: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))  # KiB

    peaks = []
    for _ in range(5):
        before = held("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again from here
        step()
        peaks.append(held("VmHWM") - before)
    print(max(peaks) / 1024)


def reward(bench: Bench) -> list[dict]:
    """The share of a K = 64 update that goes into scoring, and ROUGE against rouge-score."""
    spent = [0.0]

    def timed(*args):
        wait()
        begun = time.perf_counter()
        scores = usual(*args)
        wait()
        spent[0] += time.perf_counter() - begun
        return scores
    usual, train.score = train.score, timed
    step, times = bench.updater(K=64, mle_weight=0.0, static="data"), []
    step()
    for _ in range(PAIRS):
        spent[0], begun = 0.0, time.perf_counter()
        step()
        times.append((spent[0], time.perf_counter() - begun))
    train.score = usual
    rows = [ratio("scoring : masked update, K = 64", "<= 0.25", np.array(times))]
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return rows + [dict(what="rouge-score", target=">= 20", skipped="not installed")]
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(400)]
    pairs = [[" ".join(rng.choice(words, 24)) for _ in range(2)] for _ in range(4096)]
    ours, theirs = rouge([h for h, _ in pairs], [[r] for _, r in pairs]), RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [theirs.score(r, h) for h, r in pairs]
    worst = max(abs(ours[i, j] - s[name].fmeasure) for i, s in enumerate(scores) for j, name in enumerate(("rouge1", "rouge2", "rougeL")))

    def fresh():  # new texts every time: nothing that was scored before helps
        mark = str(rng.integers(1 << 30))
        rouge([f"{h} {mark}" for h, _ in pairs], [[r] for _, r in pairs])
    rows.append(ratio(f"rouge-score : rouge, unseen texts (largest difference {worst:.0e})", ">= 20",
                      paired(lambda: [theirs.score(r, h) for h, r in pairs], fresh)))
    return rows


def ids(bench: Bench) -> list[dict]:
    """Rewards from token ids, as a GPU scores them, against the same from strings; texts that nobody has scored before."""
    from data.reward_ids import RewardIds
    from tests.test_reward_ids import random_source, slot_texts
    R, K, rng = (512 if bench.device.type == "cuda" else 32), 64, np.random.default_rng(0)
    policy, rewards, rows = train.new_policy(bench.cfg, bench.dataset, bench.device, bench.tok), RewardIds(bench.tok, bench.device), []
    records = bench.dataset["train"][:R]
    words = sorted({word for r in records for text in r.references for word in text.split()})

    def rouge_texts():
        texts = [r.static[0].split() for r in records for _ in range(K)]
        return [" ".join(word if u > 0.2 else rng.choice(words) for word, u in zip(text, rng.random(len(text)))) for text in texts]
    for name, make, references, sources in (
            ("rouge", rouge_texts, [r.references for r in records], [r.source for r in records]),
            ("slot", lambda: slot_texts(R * K, 8, rng), [["x"]] * R, [random_source(rng) for _ in range(R)])):
        fresh = [data.encode_texts(make(), bench.tok, 128)[0].view(R, K, -1).to(bench.device) for _ in range(PAIRS + 1)]
        left, reward = ([*fresh], [*fresh]), load_reward(name)
        many = [some for some in references for _ in range(K)], [source for source in sources for _ in range(K)]
        rows.append(ratio(f"{name} of {R * K:,} samples, from strings : from ids", "", paired(
            lambda: reward(policy.texts(left[0].pop()), *many), lambda: rewards([name], left[1].pop(), references, sources)[name].cpu())))
    return rows


@torch.no_grad()
def sampler(bench: Bench) -> list[dict]:
    """Decoding against the generate method of transformers, GPT-2 of the same size; and finished rows."""
    from model import generate
    cfg = bench.cfg
    policy = train.new_policy(cfg, bench.dataset, bench.device, bench.tok)
    model, B, S, T = policy.model.eval(), 256, 24, 48
    src = torch.randint(0, policy.tok.pad, (B, S), device=bench.device)
    pad = torch.zeros(B, dtype=torch.long, device=bench.device)
    u = torch.rand(B, 1, T, device=bench.device)

    def ours():
        generate(model, src, pad, T, u, end=False)
    rows = []
    static = torch.full((B, T), policy.tok.pad, device=bench.device)
    static[:, 0] = policy.tok.eos
    mask = (torch.arange(B, device=bench.device) < B // 4)[:, None].expand(B, T)  # the other rows end at once
    rows.append(ratio("decode, three rows in four finished : none", "about 0.25 and overhead",
                      paired(lambda: generate(model, src, pad, T, u, static=static, mask=mask, end=True), ours)))
    if bench.device.type == "cuda":
        captured = train.Captured(torch.cuda.graph_pool_handle())
        with train.autocast(bench.device):
            rows.append(ratio("decode, kernel by kernel : captured", "", paired(ours, lambda: captured(model, src, pad, T, u, end=False))))
    else:
        rows.append(dict(what="decode, kernel by kernel : captured", target="", skipped="needs a GPU"))
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return rows + [dict(what="transformers", target=">= 1.5", skipped="not installed")]
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=policy.tok.vocab_size, n_positions=128, n_embd=cfg.n_embd, n_layer=cfg.n_layer,
                                        n_head=cfg.n_head)).eval().to(bench.device)

    def hugging():
        theirs.generate(src, attention_mask=torch.ones_like(src), do_sample=True, top_k=0, min_new_tokens=T, max_new_tokens=T,
                        pad_token_id=policy.tok.pad)
    rows.append(ratio("transformers' generate : generate, 256 rows of 48 tokens", ">= 1.5", paired(hugging, ours)))
    return rows


GROWTH = {"K": (2, 4, 8, 16, 32), "T": (16, 32, 64, 128), "batch_size": (8, 16, 32, 64), "n_embd": (64, 128, 256)}
ONE = dict(num_static=1, mle_weight=0.0)
GROWING = {"mle": {}, "offline": dict(mle_weight=0.0), "online": ONE, "full": ONE, "masked": ONE, "static": ONE,
           "refresh": ONE | dict(refresh=1, static_credit=0.0, kl_weight=0.0)}  # a text sampled for every update


def growth(bench: Bench) -> list[dict]:
    """Seconds an update against K (offline: stored texts), T, sources and width, beside what its count of forward propagations
    predicts; growth.png."""
    plt = report.pyplot()
    fig, axes = plt.subplots(1, 4, figsize=(15, 4.4), sharey=True)
    rows = []
    for axis, (key, values) in zip(axes, GROWTH.items()):
        for name, own in GROWING.items():
            if name == "mle" and key == "K":
                continue
            usual = dict(K=8, T=32, batch_size=16, n_embd=128, static="data", p_m=0.2, block_size=256) | own
            flags = [usual | {key: value} for value in values]
            steps = [bench.updater(name, **(some | {"num_static": some["K"]} if name == "offline" else some)) for some in flags]
            before, times = [step() for step in steps], []
            for _ in range(5):  # taking turns
                times.append([])
                for step in steps:
                    begun = time.perf_counter()
                    step()
                    times[-1].append(time.perf_counter() - begun)
            fp = np.array([step() for step in steps]) - before  # of six updates
            seconds = np.median(times, 0)
            slopes = [float(np.polyfit(np.log(values), np.log(y), 1)[0]) for y in (seconds, fp)]
            axis.plot(values, seconds, label=name, **report.STYLE[name])
            axis.plot(values, seconds[0] * fp / fp[0], ":", lw=1, color=report.STYLE[name]["color"])
            rows.append(dict(what=f"growth of a {name} update with {key}", slope=slopes[0], seconds=seconds.tolist(),
                             target=f"FPs: slope {abs(round(slopes[1], 2)):.2f}"))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        report.tidy(axis, key, "seconds an update" if key == "K" else "")
    handles, labels = axes[1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    fig.suptitle("Cost of an update; dotted: what the count of forward propagations predicts", fontsize=10)
    report.finish(fig, "growth.png", rect=(0, 0.07, 1, 1))
    return rows


def scale(bench: Bench) -> list[dict]:
    """The preset for a GPU: the whole masked update against its forward and backward alone, and the share of the machine's
    own matrix rate that these reach. On a CPU in a tiny batch, to exercise the code: the figures mean nothing there."""
    gpu = bench.device.type == "cuda"
    cfg = train.make_config({"preset": "gpu"} | ({} if gpu else dict(batch_size=4, K=4)), "masked")
    policy = train.new_policy(cfg, bench.dataset, bench.device, bench.tok)
    batches = train.Batches(cfg, bench.dataset["train"], policy, None)
    run = train.Run(cfg, policy, "", train.make_optimizer(cfg, policy.model), False)
    batch = batches.get(0).to(bench.device)
    rows = torch.cat([batch.static[:, 0], batch.target]) if cfg.mle_weight > 0 else batch.static[:, 0]
    copies = len(rows) // len(batch.sources)

    def alone():
        with train.autocast(bench.device):
            logits = train.sorl.target_logits(policy.model, batch.src.repeat(copies, 1), batch.pad.repeat(copies), rows)
            loss = logits.float().square().mean()
        loss.backward()
        run.optimizer.zero_grad()
    whole = paired(lambda: train.metrics_of(run, train.update(run, batches, bench.reward)), alone)
    size = 4096 if gpu else 512
    a = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16 if gpu else torch.float32)
    rate = paired(lambda: [a @ a for _ in range(20)], alone)
    parameters = sum(p.numel() for p in policy.model.parameters()) - policy.model.wpe.weight.numel()
    flops = np.array([20 * 2 * size ** 3, 6 * parameters * rows.size(0) * (batch.src.size(1) + rows.size(1) - 1)])
    return [ratio(f"update of {parameters / 1e6:.0f}M parameters, {len(rows)} rows, K = {cfg.K} : forward and backward", "<= 2", whole),
            ratio("seconds a FLOP, a matrix product : forward and backward", ">= 0.2", rate / flops)]


def records(bench: Bench, n: int = 1_000_000) -> list[dict]:
    """A million JSONL records: seconds to load them, make the tokenizer and draw the first batch, and the memory it took."""
    import resource
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps(dict(source=r.source, references=r.references, target=r.target)) for r in bench.dataset["train"]]
        for split, count in (("train", n), ("val", 100), ("test", 100)):
            with open(f"{folder}/{split}.jsonl", "w") as file:
                for i in range(count):
                    file.write(lines[i % len(lines)].replace('"source": "', f'"source": "{i} ', 1) + "\n")
        size, begun = Path(f"{folder}/train.jsonl").stat().st_size, time.perf_counter()
        dataset = data.load_dataset(folder)
        policy = train.new_policy(bench.cfg, dataset, bench.device)
        train.check_lengths(dataset, policy)
        train.Batches(bench.cfg, dataset["train"], policy, None).get(0)
        data.data_hash(dataset)
    return [dict(what=f"{n:,} records, {size / 2 ** 20:.0f} MB", target="<= 120 s, <= 4096 MiB", seconds=[time.perf_counter() - begun],
                 mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)]


BENCHES = {f.__name__: f for f in (update, memory, reward, ids, sampler, growth, scale, records)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="{" + ",".join(BENCHES) + "}")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peak", type=int, metavar="K", help="print the peak memory of one update, in MiB, and stop")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(BENCHES):
        parser.error(f"no bench {unknown.pop()!r}; there are {', '.join(BENCHES)}")
    bench, rows = Bench(args.device), []
    if args.peak:
        return print_peak(bench, args.peak)
    print(train.machine_of(bench.device))
    for name in args.names or BENCHES:
        for row in BENCHES[name](bench):
            rows.append(row | {"bench": name})
            value = (f"skipped: {row['skipped']}" if "skipped" in row else f"slope {row['slope']:.2f}" if "slope" in row
                     else f"{row['seconds'][0]:.0f} s, {row['mib']:.0f} MiB" if "mib" in row
                     else f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]   ({row['sides'][0]:.4g} : {row['sides'][1]:.4g})")
            print(f"{row['what']:<70} {value}" + (f"   target {row['target']}" if row["target"] else ""), flush=True)
    if args.json:
        train.write_json(rows, args.json)


if __name__ == "__main__":
    main(sys.argv[1:])
