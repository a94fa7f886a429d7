"""Train, evaluate and compare: the config, the loop, checkpoints, the table and its figure.

    python train.py                    compare every setting on the embedded task, from one base model
    python train.py --mode train       one run; --mode eval, sample, candidates: see the README
    python train.py -h                 every flag

A run's folder holds config.json, metrics.jsonl (a line an update), samples.txt, ckpt.pt (the last state) and best.pt (the
best by validation, which is the one that is tested). A run that was stopped goes on, bit for bit, where it was saved.
"""
import argparse
import difflib
import glob
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin make a busy machine 5 times slower

import torch
import torch.nn.functional as F

import data
import parallel
import report
import sorl
from data import InputError, Record, SPLITS
from data.reward_ids import RewardIds
from data.rewards import bleu, has_slots, load_reward, rouge, slot_errors, slot_errors2
from data.tokenizer import Tokenizer
from model import GPT, PAD, GPTConfig, beam_search, generate

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one screen of defaults. argparse is built from it.


def flag(default, text: str, choices: tuple = ()):
    return field(default=default, metadata={"help": text, "choices": choices})


SETTINGS = {  # the names of compare: what each is, whatever the flags say
    "mle": dict(setting="mle", mle_weight=1.0, rl_weight=0.0),
    "offline": dict(setting="offline"),
    "online": dict(setting="online"),
    "reuse": dict(setting="semi", observation="masked", p_m=0.0),  # refresh without masks: online that reuses its texts
    "full": dict(setting="semi", observation="full"),
    "masked": dict(setting="semi", observation="masked"),
    "static": dict(setting="semi", observation="static"),
    "nocredit": dict(setting="semi", observation="masked", static_credit=0.0),  # refresh without static credit
    "refresh": dict(setting="semi", observation="masked"),
}
USUAL = ("mle", "offline", "online", "full", "masked", "static", "refresh")


@dataclass
class Config:
    # what to do
    mode: str = flag("compare", "what to do", ("compare", "train", "eval", "sample", "candidates"))
    preset: str = flag("auto", "tuned defaults; auto picks by the data", ("auto", "forecast", "quick", "e2e", "gpu"))
    data: str = flag("forecast", "forecast, forecast2, or a folder with {train,val,test}.jsonl")
    out: str = flag("out", "the run's folder")
    init: str = flag("", "checkpoint to start from, or to evaluate")
    resume: str = flag("", "folder of a run to go on with")
    # the method
    setting: str = flag("semi", "who provides the tokens", ("mle", "offline", "online", "semi"))
    observation: str = flag("masked", "semi: what the model sees", ("masked", "full", "static"))
    p_m: float = flag(0.2, "probability that the model re-draws a token, 0..1")
    K: int = flag(16, "samples per source (online) or per static text (semi)")
    mask: str = flag("bernoulli", "how positions are chosen", ("bernoulli", "count", "word"))
    static: str = flag("data", "which stored static texts: the first, by reward, or any",
                       ("data", "best", "worst", "random"))
    num_static: int = flag(1, "static texts per source and update (C)")
    static_credit: float = flag(0.0, "weight of the static texts' own policy gradient (ranked against each other)")
    refresh: int = flag(0, "updates per batch of static texts sampled from the policy; 0 = stored texts")
    num_stored: int = flag(0, "with refresh: how many of the C static texts stay stored ones")
    reward: str = flag("rouge", "rouge, bleu, slot, joined by + (their mean), or module:function")
    baseline: str = flag("mean", "what is subtracted from the reward", ("mean", "loo", "greedy"))
    adv_scale: bool = flag(True, "divide advantages by their standard deviation per source")
    length_norm: str = flag("none", "divide a sample's log-probability by its actions", ("none", "masked"))
    mle_weight: float = flag(0.1, "weight of the MLE term during RL")
    rl_weight: float = flag(1.0, "weight of the RL term")
    kl_weight: float = flag(0.0, "weight of KL(policy || base), summed over a text as RL observes it; one more FP a row")
    label_smoothing: float = flag(0.0, "label smoothing of the MLE term")
    temperature: float = flag(1.0, "sampling temperature")
    top_k: int = flag(0, "sample from the k likeliest tokens; 0 = all")
    settings: tuple = flag(USUAL, "compare: which settings", (*SETTINGS, "all"))
    # optimization
    steps: int = flag(0, "updates; 0 = the preset's own for each setting")
    budget_fp: int = flag(0, "stop after this many sampling FPs; 0 = no limit")
    batch_size: int = flag(32, "sources per update")
    micro_batches: int = flag(1, "split a batch into this many, to save memory")
    lr: float = flag(3e-4, "peak learning rate of RL")
    warmup: float = flag(0.1, "share of the updates with rising learning rate; it then falls linearly to 0")
    weight_decay: float = flag(0.0, "AdamW's, on matrices")
    clip: float = flag(1.0, "largest gradient norm")
    seed: int = flag(0, "seed of everything that is drawn")
    seeds: tuple = flag((), "compare: several seeds, each with its own base")
    # the base model
    base_steps: int = flag(400, "updates of maximum likelihood before RL")
    base_lr: float = flag(4e-3, "their peak learning rate")
    base_batch: int = flag(32, "texts per update")
    base_p_m: float = flag(0.3, "half of their rows have inputs masked at this rate, so that [MASK] gets a meaning")
    # the network and its texts
    n_layer: int = flag(3, "blocks")
    n_head: int = flag(4, "attention heads")
    n_embd: int = flag(128, "width")
    block_size: int = flag(128, "context: source, SEP and text, in tokens")
    max_len: int = flag(0, "longest text in tokens with its end (T); 0 = the longest of the first 10,000 records")
    tokenizer: str = flag("bpe", "bpe (trained on the data), or the name of one of tiktoken's encodings")
    vocab_size: int = flag(1000, "largest vocabulary of bpe")
    # evaluation and files
    eval_every: int = flag(10, "updates between evaluations")
    eval_size: int = flag(200, "validation sources used for that; 0 = all")
    save_every: int = flag(100, "updates between checkpoints")
    beam: int = flag(1, "eval: beams; 1 = greedy")
    num: int = flag(16, "candidates: texts per source")
    out_data: str = flag("", "candidates: folder to write")
    source: str = flag("", "sample: a source text")
    reference: str = flag("", "sample: a reference for the reward")
    static_text: str = flag("", "sample: the static text to start from")
    # the machine
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    compile: bool = flag(False, "torch.compile the model; on a GPU, decode by a captured graph")


MANY = dict(num_static=8, static="random", batch_size=16)  # E2E: several references a source, ranked against each other
CREDIT = dict(**MANY, static_credit=8.0, p_m=0.1, lr=1e-4, mle_weight=4.0)
PRESETS = {  # tuned defaults: "" for every setting, then what differs in one
    "forecast": {
        "": dict(lr=1.2e-3),
        "mle": dict(steps=60),
        "offline": dict(steps=60, num_static=3, lr=6e-4),
        "online": dict(steps=60, K=8, mle_weight=0.02),
        "reuse": dict(num_static=8, static_credit=1.0, batch_size=8, refresh=4, lr=6e-4, mle_weight=0.02, kl_weight=0.0),
        "full": dict(steps=10, K=8),
        "masked": dict(steps=120, K=64, static="best"),
        "static": dict(steps=120, K=64, static="best"),
        "nocredit": dict(num_static=1, batch_size=32, kl_weight=0.0),
        "refresh": dict(steps=160, K=64, refresh=8, num_static=4, static_credit=0.3, batch_size=16, kl_weight=0.02),
    },
    "quick": {
        "": dict(base_steps=120, base_batch=16, eval_size=50, n_layer=2, n_embd=96, eval_every=5, batch_size=16),
        "mle": dict(steps=10),
        "offline": dict(steps=10, num_static=3),
        "online": dict(steps=10, K=8),
        "full": dict(steps=10, K=8),
        "masked": dict(steps=20, batch_size=32),
        "static": dict(steps=20, batch_size=32),
        "refresh": dict(steps=40, refresh=8),
        "reuse": dict(static_credit=1.0, num_static=4),
    },
    "e2e": {
        "": dict(reward="rouge+slot", n_layer=4, block_size=96, max_len=48, weight_decay=0.1, base_steps=1500,
                 base_batch=32, base_lr=2e-3, eval_size=0, lr=1.5e-4, mle_weight=0.3),
        "mle": dict(steps=60),
        "offline": dict(steps=40, **MANY, lr=1e-4, mle_weight=1.0),
        "online": dict(steps=40, K=8, lr=3e-4),
        "full": dict(steps=20, K=8),
        "masked": dict(steps=40, **CREDIT),
        "static": dict(steps=40, **CREDIT),
        "refresh": dict(steps=100, **CREDIT, refresh=4, num_stored=4),
    },
}
LARGE = {  # what --preset gpu changes of forecast's: 29M parameters, for one GPU
    "": dict(n_layer=9, n_head=8, n_embd=512, block_size=512, batch_size=512, lr=3e-4, base_lr=6e-4, base_batch=512),
    "offline": dict(lr=3e-4), "nocredit": dict(batch_size=512), "refresh": dict(batch_size=128),
    "reuse": dict(batch_size=64, lr=3e-4)}
PRESETS["gpu"] = {name: flags | LARGE.get(name, {}) for name, flags in PRESETS["forecast"].items()}
NOT_THE_RUN = {"out", "resume", "device", "compile", "save_every", "beam", "num", "out_data", "source", "reference",
               "static_text", "preset", "settings", "seeds"}  # flags that may differ when a run goes on


def fail(message: str, speaks: bool = True):
    """One clear line on stderr, unless another process says it; exit code 2."""
    if speaks:
        print("train.py: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(2)


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() in ("true", "1")


def one_of(choices: tuple):
    """An argparse type: one of these words, or a message that names the nearest."""
    def parse(text: str) -> str:
        if text not in choices:
            near = difflib.get_close_matches(text, choices, n=1, cutoff=0.3) or choices
            raise argparse.ArgumentTypeError(f"expected {', '.join(choices)}; found {text!r}, the nearest is {near[0]}")
        return text
    return parse


def parse_args(argv: list[str]) -> dict:
    """Command line -> the flags that were given, by name. Exits 2 with one line for an unknown or ill-typed flag."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--quick", action="store_const", const="quick", dest="preset", default=argparse.SUPPRESS,
                        help="the same as --preset quick")
    for f in fields(Config):
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        kind = dict(type=type(f.default))
        if isinstance(f.default, bool):
            kind = dict(type=parse_bool, nargs="?", const=True, metavar="BOOL")
        elif isinstance(f.default, tuple):
            kind = dict(type=int, nargs="+", metavar="N")
        if f.metadata["choices"]:
            kind = dict(nargs="+" if isinstance(f.default, tuple) else None, type=one_of(f.metadata["choices"]),
                        metavar="{" + ",".join(f.metadata["choices"]) + "}")
        parser.add_argument("--" + f.name, default=argparse.SUPPRESS, help=text, **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = ["--" + f.name for f in fields(Config)] + ["--quick"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1, cutoff=0.4)
        fail(f"unknown flag {unknown[0]!r}" + (f"; the nearest is {near[0]}" if near else "; see train.py -h"))
    return vars(given)


def make_config(given: dict, name: str = "") -> Config:
    """The flags given over the preset's defaults for this setting over the general defaults.

    `name` is one of compare's settings: flags that make no sense for it are left out, and what defines it stays."""
    given = {key: value for key, value in given.items() if (key, value) != ("steps", 0)}
    if name:
        without = {"refresh", "num_stored"} if name in ("offline", "masked", "static") else set()
        without |= {"refresh", "num_stored", "static_credit", "num_static"} if name in ("mle", "online", "full") else set()
        without |= {"static_credit"} if name == "offline" else set()
        given = {key: value for key, value in given.items() if key not in without} | SETTINGS[name]
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = preset_of(given.get("data", "forecast"))
    name = name or name_of(replace(Config(), **given))
    tuned = PRESETS[preset].get("", {}) | (PRESETS[preset]["refresh"] if name in ("reuse", "nocredit") else {})
    cfg = replace(Config(), **{**tuned, **PRESETS[preset].get(name, {}), **given, **SETTINGS[name], "preset": preset})
    if "num_stored" not in given:  # fewer texts were asked for than the preset would keep
        cfg = replace(cfg, num_stored=max(0, min(cfg.num_stored, cfg.num_static - 1)) if cfg.refresh else 0)
    return checked(cfg)


def preset_of(folder: str) -> str:
    """What a data folder's flags.json recommends ({"preset": "e2e"}), else the embedded task's preset."""
    try:
        with open(os.path.join(folder, "flags.json")) as file:
            preset = json.load(file)["preset"]
    except FileNotFoundError:
        return "forecast"
    except (OSError, ValueError, KeyError, TypeError):
        preset = None
    if preset not in PRESETS:
        raise InputError(f"{folder}/flags.json: expected {{\"preset\": one of {', '.join(PRESETS)}}}")
    return preset


def name_of(cfg: Config) -> str:
    """The name under which compare would list this setting."""
    if cfg.setting != "semi":
        return cfg.setting
    return cfg.observation if not cfg.refresh else "refresh" if cfg.p_m > 0 else "reuse"


def checked(cfg: Config) -> Config:
    """Raises InputError for values that no run could use."""
    one_pass = cfg.setting == "semi" and cfg.observation != "full"
    samples = cfg.setting == "online" or cfg.setting == "semi" and cfg.p_m > 0
    rules = [(name, getattr(cfg, name) >= 1, "at least 1") for name in
             ("K", "num_static", "batch_size", "micro_batches", "base_batch", "base_steps", "n_layer", "n_head",
              "n_embd", "eval_every", "save_every", "beam", "num")]
    rules += [(name, 0 <= getattr(cfg, name) < math.inf, "0 or more") for name in
              ("steps", "refresh", "mle_weight", "rl_weight", "kl_weight", "static_credit", "lr", "base_lr",
               "budget_fp", "eval_size", "max_len", "weight_decay", "clip", "top_k", "seed")]
    rules += [
        ("p_m", 0 <= cfg.p_m <= 1, "a probability, 0 to 1"), ("base_p_m", 0 <= cfg.base_p_m <= 1, "0 to 1"),
        ("warmup", 0 <= cfg.warmup < 1, "a share, 0 to 1"), ("label_smoothing", 0 <= cfg.label_smoothing < 1, "0 to 1"),
        ("temperature", 0 < cfg.temperature < math.inf, "above 0"), ("seed", cfg.seed < 2 ** 63, "less than 2^63"),
        ("n_embd", cfg.n_head > 0 and cfg.n_embd % cfg.n_head == 0, f"a multiple of n_head = {cfg.n_head}"),
        ("vocab_size", cfg.vocab_size >= 260, "at least 260 (256 bytes and 4 special ids)"),
        ("max_len", cfg.max_len < cfg.block_size, f"less than block_size = {cfg.block_size}"),
        ("rl_weight", cfg.rl_weight + cfg.mle_weight > 0, "above 0, or --mle_weight above 0"),
        ("K", cfg.K > 1 or cfg.baseline != "mean" or not samples,
         "at least 2 with --baseline mean (one sample less its own mean is 0); or --baseline loo"),
        ("num_static", cfg.num_static == 1 or not decodes(cfg), "1 where the policy decodes (online, full)"),
        ("num_stored", 0 <= cfg.num_stored < max(1, cfg.num_static) or cfg.refresh == 0,
         f"0 or more, and less than num_static = {cfg.num_static}"),
        ("refresh", cfg.refresh == 0 or one_pass, "0 unless --setting semi with --observation masked or static"),
        ("static_credit", cfg.static_credit == 0 or one_pass, "0 unless --setting semi, masked or static")]
    for name, holds, expected in rules:
        if not holds:
            raise InputError(f"--{name} {getattr(cfg, name)}: expected {expected}")
    return cfg


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {name}: this machine has none, or this PyTorch was built without it; try auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def join_processes(device: str) -> None:
    """Under torchrun: a GPU for each process and nccl between them, or gloo on CPU. Otherwise nothing."""
    gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if gpu and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    parallel.begin("nccl" if gpu else "gloo")


def machine_of(device: torch.device) -> str:
    """Where a run was made, for the report."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    return f"PyTorch {torch.__version__.split('+')[0]}, {name}"


def autocast(device: torch.device, keep_casts: bool = True):
    """bfloat16 where the device is made for it; float32 on CPU, the tested path."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=keep_casts)


def capture(work, pool):
    """Work of no arguments on a GPU, whose tensors stay in their places, as one CUDA graph -> (what it returns, a function
    that does it again into the same place). Graphs of one pool share their memory, and what they return."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()  # what libraries do at their first call cannot be captured
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = work()
    return out, graph.replay


class Captured:
    """`generate` as one graph for each shape of its inputs (--compile on a GPU): the kernels of all T columns start with one
    call instead of one by one. Finished rows stay to the end, so it pays where starting kernels takes longer than running them."""

    def __init__(self, pool=None):
        self.graphs, self.pool = {}, pool

    def __call__(self, model: GPT, src, pad, T: int, u=None, *, static=None, mask=None, **how) -> torch.Tensor:
        S = src.size(1)
        extra = max(0, min(-S % 16, model.config.block_size - (S + T - 1)))  # sources a little wider, where there is room: few shapes
        src, pad = F.pad(src, (extra, 0), value=model.config.vocab_size + PAD), pad + extra
        given = {name: value for name, value in dict(src=src, pad=pad, u=u, static=static, mask=mask).items() if value is not None}
        key = model, T, *((name, value.shape) for name, value in given.items()), *how.items()
        if key not in self.graphs:
            inputs, pushed = {name: value.clone() for name, value in given.items()}, model.pushed.clone()

            def work():
                with autocast(src.device, keep_casts=False):  # or the graph would hold weights of today
                    return generate(model, T=T, **inputs, **how, fixed=True)
            self.graphs[key] = inputs, *capture(work, self.pool)
            model.pushed.copy_(pushed)
        inputs, out, again = self.graphs[key]
        for name, value in given.items():
            inputs[name].copy_(value)
        again()
        return out.clone()


# ---------------------------------------------------------------------------------------------------------------------
# Policy: what is trained, and its checkpoint

@dataclass
class Policy:
    """A model with what is needed to feed it: tokenizer, longest text T, device."""
    model: GPT
    tok: Tokenizer
    T: int
    device: torch.device
    generate: Callable = generate  # how it decodes while it learns

    @cached_property
    def ids(self) -> RewardIds | None:
        """Rewards from its ids, where turning them into strings would be the bottleneck; on a CPU strings are faster."""
        return RewardIds(self.tok, self.device) if self.device.type == "cuda" else None

    @cached_property
    def starts_word(self) -> torch.Tensor:
        """Which ids begin a word, (V,) bool."""
        return torch.tensor(self.tok.starts_word(), device=self.device)

    def texts(self, tokens: torch.Tensor) -> list[str]:
        return [self.tok.decode(ids) for ids in tokens.flatten(0, -2).tolist()]


def save(state: dict, path: str) -> None:
    """Atomically: whoever is killed here, or finds the disk full, leaves the old file. Of several processes, the first
    one writes."""
    if parallel.rank() > 0:
        return
    buffer = io.BytesIO()  # torch.save hides what went wrong with a file
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def write_whole(path: str, content) -> None:
    """Bytes to a file, all of them or none: through a temporary one. Raises InputError where that is not possible."""
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except OSError as e:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise InputError(f"{path}: cannot be written ({e.strerror}); what was there before is kept") from None


def load(path: str) -> dict:
    """A checkpoint's state. Raises InputError when there is none, or it is not one of ours."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; expected a checkpoint file such as {path}/best.pt") from None
    except Exception as e:  # truncated zip, junk, pickles with code: torch raises many types
        raise InputError(f"{path}: not a readable checkpoint, truncated or of another program "
                         f"({str(e).splitlines()[0][:80] if str(e) else type(e).__name__})") from None
    if not isinstance(state, dict) or not {"model", "gpt", "tokenizer", "T", "config"} <= set(state):
        raise InputError(f"{path}: expected a checkpoint of train.py with model, gpt, tokenizer, T and config")
    return state


def load_policy(path: str, device: torch.device, state: dict | None = None) -> Policy:
    """The policy in a checkpoint. Raises InputError when its weights are not of the shape that it states."""
    state = state or load(path)
    try:
        tok = Tokenizer.load(state["tokenizer"])
        model = GPT(GPTConfig(**state["gpt"]))
        model.load_state_dict(state["model"])
        if tok.vocab_size != model.config.vocab_size:
            raise ValueError(f"the tokenizer has {tok.vocab_size} ids, the model {model.config.vocab_size}")
        if not 0 < state["T"] < model.config.block_size:
            raise ValueError(f"texts of {state['T']} tokens in a context of {model.config.block_size}")
        return Policy(model.to(device), tok, int(state["T"]), device)
    except Exception as e:
        raise InputError(f"{path}: a checkpoint of another shape or vocabulary ({str(e).splitlines()[0][:120]})") from None


def policy_state(policy: Policy, cfg: Config) -> dict:
    return {"model": policy.model.state_dict(), "gpt": asdict(policy.model.config), "tokenizer": policy.tok.ranks,
            "T": policy.T, "config": asdict(cfg)}


def make_tokenizer(cfg: Config, train: list[Record]) -> Tokenizer:
    """Learned from the training texts, or the one of tiktoken's that --tokenizer names."""
    if cfg.tokenizer == "bpe":
        return Tokenizer.train(list(dict.fromkeys(text for r in train for text in
                                                  (r.source, *r.references, *r.target, *r.static))), cfg.vocab_size)
    try:
        return Tokenizer.load(cfg.tokenizer)
    except Exception as e:
        raise InputError(f"--tokenizer {cfg.tokenizer}: tiktoken knows it not, or cannot fetch it without a network "
                         f"(set TIKTOKEN_CACHE_DIR to a folder that holds it, or use bpe): {e!s:.80}") from None


def new_policy(cfg: Config, dataset: dict[str, list[Record]], device: torch.device, tok: Tokenizer | None = None) -> Policy:
    """A network of fresh weights; its tokenizer is made from the training texts unless given."""
    train = dataset["train"]
    tok = tok or make_tokenizer(cfg, train)
    T = cfg.max_len or min(cfg.block_size // 2, 1 + max(len(tok.encode(t)) for r in train[:10_000]
                                                   for t in {*r.target, *r.static}))
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(tok.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    return Policy(model.to(device), tok, T, device)


def check_lengths(dataset: dict[str, list[Record]], policy: Policy) -> int:
    """How many texts will be cut to T. Raises InputError for a source that leaves no room for a text of T tokens."""
    room, cut = policy.model.config.block_size - policy.T + 1, 0
    for split, records in dataset.items():
        for i, r in enumerate(records, 1):  # a text has at most one token a byte, and one for the space in front
            if len(r.source.encode()) + 2 > room and len(policy.tok.encode(r.source)) + 1 > room:
                raise InputError(f"{r.where or f'{split} record {i}'}: source of {len(policy.tok.encode(r.source))} tokens; "
                                 f"expected at most {room - 1} (block_size {policy.model.config.block_size} less texts of {policy.T})")
            cut += sum(len(t.encode()) + 2 > policy.T and len(policy.tok.encode(t)) + 1 > policy.T for t in r.target)
    return cut


# ---------------------------------------------------------------------------------------------------------------------
# Batches of a run

@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    return sorted(range(n), key=sorl.uniforms((n,), seed, "order", epoch).tolist().__getitem__)


def batch_indices(n: int, size: int, seed: int, i: int) -> list[int]:
    """Batch number i of an endless walk through n items, reshuffled after every epoch: a function of its arguments."""
    return [permutation(n, seed, at // n)[at % n] for at in range(i * size, (i + 1) * size)]


def pick_static(cfg: Config, record: Record, ranked: list[str] | None, u: float) -> list[str]:
    """C stored static texts: the first ones, the best or worst by reward, or any (chosen by one uniform u)."""
    texts = ranked or record.static
    if cfg.static == "worst":
        texts = texts[::-1]
    start = int(u * len(texts)) if cfg.static == "random" else 0
    return [texts[(start + c) % len(texts)] for c in range(cfg.num_static)]


def best_first(texts: list[list[str]], references: list[list[list[str]]], sources: list[str], reward) -> list[list[str]]:
    """Every source's texts by falling reward, equal ones in their order; each text has its own list of references. All are
    scored in one call."""
    def flat(lists):
        return [item for some in lists for item in some]
    each = flat([source] * len(some) for source, some in zip(sources, texts))
    scores = iter(reward(flat(texts), flat(references), each) if texts else ())
    return [sorted(some, key=lambda _: -next(scores)) for some in texts]


class Batches:
    """The batches of one run, each a function of (seed, number). RL meets every record once an epoch, MLE as often as it
    has targets, so that every source-target pair is as likely as another."""

    def __init__(self, cfg: Config, records: list[Record], policy: Policy, reward):
        self.cfg, self.records, self.policy = cfg, records, policy
        self.pairs = [i for i, r in enumerate(records) for _ in r.target] if cfg.setting == "mle" else range(len(records))
        self.ranked, self.last = {}, (None, None)
        self.reward = reward if cfg.static in ("best", "worst") else None

    def ranking(self, chosen: list[int]) -> list[list[str] | None]:
        """The records' static texts, best first where the flags ask for it. Each is scored once, all new ones together."""
        new = {i: self.records[i] for i in chosen if i not in self.ranked} if self.reward else {}
        self.ranked |= zip(new, best_first([r.static for r in new.values()], [list(map(r.others, r.static)) for r in new.values()],
                                           [r.source for r in new.values()], self.reward))
        return [self.ranked.get(i) for i in chosen]

    def get(self, number: int) -> data.Batch:
        """Batch `number`. The last one is kept, so one can be made before it is needed."""
        if number != self.last[0]:
            self.last = number, self.make(number)
        return self.last[1]

    def make(self, number: int) -> data.Batch:
        cfg = self.cfg
        chosen = [self.pairs[j] for j in batch_indices(len(self.pairs), cfg.batch_size, cfg.seed, number)]
        u = sorl.uniforms((2, len(chosen)), cfg.seed, number, "texts").tolist()
        records = [self.records[i] for i in chosen]
        targets = [r.target[int(u[0][b] * len(r.target))] for b, r in enumerate(records)]
        statics = [pick_static(cfg, r, ranked, u[1][b]) for b, (r, ranked) in enumerate(zip(records, self.ranking(chosen)))]
        own = cfg.num_static - cfg.num_stored if cfg.refresh else int(cfg.setting == "online")
        return data.make_batch(records, targets, statics, self.policy.tok, self.policy.T, own)


# ---------------------------------------------------------------------------------------------------------------------
# One update: batch -> masks -> one forward -> rollout -> reward -> advantage -> loss -> backward

@dataclass
class Draws:
    """The uniforms of one update, for the whole global batch; a micro-batch takes its rows."""
    mask: torch.Tensor      # (B·C,T)
    tokens: torch.Tensor    # (B·C,K,T)
    mle: torch.Tensor       # (B,T)
    mle_row: torch.Tensor   # (B,) whether an MLE row is masked at all

    @classmethod
    def at(cls, cfg: Config, step: int, B: int, C: int, T: int) -> "Draws":
        def u(purpose, *shape):
            return sorl.uniforms(shape, cfg.seed, step, purpose)
        return cls(u("mask", B * C, T), u("tokens", B * C, cfg.K, T), u("mle", B, T), u("mle row", B))

    def rows(self, rows: slice, C: int, device) -> "Draws":
        wide = slice(rows.start * C, rows.stop * C)
        return Draws(*(t.to(device) for t in (self.mask[wide], self.tokens[wide], self.mle[rows], self.mle_row[rows])))


@dataclass
class Learned:
    """The RL part of one micro-batch."""
    loss: torch.Tensor
    rewards: torch.Tensor         # of the texts that it learns from, (R,K) or (B,C)
    fp: int | torch.Tensor = 0
    fp_grad: int = 0
    rollout: sorl.Rollout | None = None  # the sampled texts, with their advantages (R,K)
    A: torch.Tensor | None = None


@dataclass
class Terms:
    """What one micro-batch, `share` of the batch, gives: the loss, and what is logged of it."""
    loss: torch.Tensor            # carries the gradient; micro-batches add up to the batch's loss
    mle: torch.Tensor             # its share of the mean cross-entropy per token
    share: float
    fp_mle: int
    rl: Learned | None = None
    logits: torch.Tensor | None = None  # of the RL rows, detached; for the diagnostics, as are
    mask: torch.Tensor | None = None    # M_t, and
    static: torch.Tensor | None = None  # the static texts (B·C,T)


def decodes(cfg: Config) -> bool:
    """Does the policy see its own tokens, so that it must decode them one after the other?"""
    return cfg.setting == "online" or cfg.setting == "semi" and cfg.observation == "full"


def score(reward, policy: Policy, tokens: torch.Tensor, batch: data.Batch) -> torch.Tensor:
    """Rewards of tokens (R,K,T) -> (R,K): K texts from each static text, R = B·C, or the C static texts, R = B and K = C."""
    references = [texts for some in batch.references for texts in some]  # B·C lists
    sources = [source for source in batch.sources for _ in range(batch.static.size(1))]
    parts = getattr(reward, "parts", ())
    known = policy.ids(parts, tokens.view(len(references), -1, tokens.size(2)), references, sources) if policy.ids else {}
    if parts and known.keys() >= set(parts):  # nothing has to leave the device
        return (sum(known[name] for name in parts) / len(parts)).float().view(tokens.shape[:2])
    times = tokens.size(0) * tokens.size(1) // len(references)
    scores = reward(policy.texts(tokens), [some for some in references for _ in range(times)],
                    [source for source in sources for _ in range(times)],
                    **{name: values.flatten().cpu().numpy() for name, values in known.items()})
    return torch.as_tensor(scores, dtype=torch.float32, device=tokens.device).view(tokens.shape[:2])


def widen(text: torch.Tensor, T: int, value: int) -> torch.Tensor:
    return F.pad(text, (0, T - text.size(-1)), value=value)


def rl_inputs(cfg: Config, policy: Policy, batch: data.Batch, u: Draws):
    """Masks, and what the model is fed for RL -> texts (R,T), mask (B·C,T), and the decoded rollout if it came first."""
    static, tok = batch.static.flatten(0, 1), policy.tok
    if decodes(cfg):
        everywhere = torch.full((len(static),), static.size(1) + 1, device=static.device)  # the end is an action too
        mask = sorl.sample_mask(u.mask, everywhere, 1.0 if cfg.setting == "online" else cfg.p_m)
        decoded = sorl.decode(policy.model, batch.src, batch.pad, static, mask, u.tokens, cfg.temperature, cfg.top_k,
                              generate=policy.generate)
        torch.clear_autocast_cache()  # of weights cast without gradients, which PyTorch up to 2.9 would then learn with
        return decoded.tokens.flatten(0, 1), mask, decoded
    mask = sorl.sample_mask(u.mask, batch.static_len.flatten(), 0.0 if cfg.setting == "offline" else cfg.p_m, cfg.mask,
                            static, policy.starts_word if cfg.mask == "word" else None)
    return sorl.observe(static, mask, cfg.observation, tok.mask), mask, None


def forward(cfg: Config, policy: Policy, base: GPT, batch: data.Batch, u: Draws, reward, share: float,
            mle_tokens: torch.Tensor) -> Terms:
    """One micro-batch, `share` of the global batch of `mle_tokens` target tokens; RL and MLE rows in one forward."""
    B = len(batch.sources)
    fed, mask, decoded = batch.target[:0], None, None
    if cfg.rl_weight > 0:
        fed, mask, decoded = rl_inputs(cfg, policy, batch, u)
    copies, learn = len(fed) // B, B if cfg.mle_weight > 0 else 0
    mle_mask = sorl.sample_mask(u.mle, batch.target_len, cfg.base_p_m) & (u.mle_row < 0.5)[:, None]
    target = sorl.observe(batch.target, mle_mask, "masked", policy.tok.mask)
    src = torch.cat([batch.src.repeat_interleave(copies, 0), batch.src[:learn]])
    pad = torch.cat([batch.pad.repeat_interleave(copies, 0), batch.pad[:learn]])
    logits = sorl.target_logits(policy.model, src, pad, torch.cat([fed, target[:learn]]))

    mle = logits.new_zeros(())
    if learn:
        mle = sorl.mle_loss(logits[len(fed):], batch.target, batch.target_len, cfg.label_smoothing) / mle_tokens
    terms = Terms(cfg.mle_weight * mle, mle.detach(), share, learn)
    if cfg.rl_weight > 0:
        terms.logits, terms.mask, terms.static = logits[:len(fed)].detach(), mask, batch.static.flatten(0, 1)
        terms.rl = rl_part(cfg, policy, batch, logits[:len(fed)], mask, decoded, u, reward)
        terms.loss = terms.loss + cfg.rl_weight * share * terms.rl.loss
        if cfg.kl_weight > 0:
            with torch.no_grad():
                there = sorl.target_logits(base, src[:len(fed)], pad[:len(fed)], fed)
            inside = sorl.text_mask(terms.static if decoded is None else fed, policy.tok.vocab_size)
            kl = sorl.kl_divergence(logits[:len(fed)], there, inside) * inside.sum() / len(fed)  # of a whole text
            terms.loss = terms.loss + cfg.kl_weight * share * kl
            terms.rl.fp = terms.rl.fp + len(fed)
    return terms


def rl_part(cfg: Config, policy: Policy, batch: data.Batch, logits, mask, decoded, u: Draws, reward) -> Learned:
    """Rollout, reward, advantage, loss: of the sampled tokens, and of the static texts' own where they get credit."""
    static, rl = batch.static.flatten(0, 1), Learned(logits.new_zeros(()), logits.new_zeros(()))
    if cfg.setting != "offline":
        if decoded is not None:
            rl.rollout = sorl.rollout_given(logits, decoded.tokens, decoded.acted, cfg.temperature, cfg.top_k)
            rl.fp, rl.fp_grad = decoded.fp, decoded.fp_grad
        else:
            rl.rollout = sorl.rollout_one_pass(logits, static, mask, u.tokens, cfg.temperature, cfg.top_k)
            rl.fp = rl.rollout.fp
        rl.rewards = score(reward, policy, rl.rollout.tokens, batch)
        greedy, fp = greedy_reward(cfg, policy, batch, logits, mask, reward) if cfg.baseline == "greedy" else (None, 0)
        rl.fp = rl.fp + fp
        rl.A = sorl.advantage(rl.rewards, cfg.baseline, greedy, cfg.adv_scale)
        rl.loss = sorl.policy_loss(rl.rollout, rl.A, cfg.length_norm)
    credit = 1.0 if cfg.setting == "offline" else cfg.static_credit
    if credit > 0:
        rewards, loss = static_part(cfg, policy, batch, logits, mask, reward)
        rl.loss = rl.loss + credit * loss
        if cfg.setting == "offline":
            rl.rewards, rl.fp = rewards, len(static)
    return rl


def static_part(cfg: Config, policy: Policy, batch: data.Batch, logits, mask, reward):
    """The C static texts of a source ranked against each other, credit for their unmasked tokens -> rewards (B,C), loss.

    Refreshed texts were drawn at the run's temperature, but for an end token in the last column: that may be a cut. Top-k is
    not applied: what stands in a text that exists may have left the k likeliest since, or never been there."""
    kept = sorl.text_mask(batch.static, policy.tok.vocab_size) & ~mask.view(batch.static.shape)
    if cfg.refresh:
        kept[..., -1] = False
    given = sorl.rollout_given(logits, batch.static, kept, cfg.temperature if cfg.refresh else 1.0)
    rewards = score(reward, policy, batch.static, batch)
    A = sorl.advantage(rewards, "loo" if cfg.baseline == "loo" and cfg.num_static > 1 else "mean", scale=cfg.adv_scale)
    return rewards, sorl.policy_loss(given, A, cfg.length_norm)


def greedy_reward(cfg: Config, policy: Policy, batch: data.Batch, logits, mask, reward):
    """The self-critical baseline (R,), the reward of the greedy text or of the greedy fill of the masks, and its FPs."""
    static, fp = batch.static.flatten(0, 1), 0
    if decodes(cfg):
        tokens = policy.generate(policy.model, batch.src, batch.pad, static.size(1), static=static, mask=mask)
        fp = (mask[:, None] & sorl.text_mask(tokens, policy.tok.vocab_size)).sum()
    else:
        tokens = torch.where(mask, logits[..., :sorl.PAD].argmax(-1), static)[:, None]
    return score(reward, policy, tokens, batch)[:, 0], fp


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: disturbs neither the counts nor the randomness of training

@torch.no_grad()
def write_texts(policy: Policy, sources: list[str], u=None, beam: int = 1, size: int = 256) -> torch.Tensor:
    """One text for each source, greedy, by beam search, or sampled by uniforms u (N,1,T) -> ids (N,T)."""
    policy.model.eval()
    out, pushed = [], policy.model.pushed.clone()
    for at in range(0, len(sources), size):
        src, pad = (t.to(policy.device) for t in data.encode_sources(sources[at:at + size], policy.tok))
        with autocast(policy.device):
            if beam > 1:
                out.append(beam_search(policy.model, src, pad, policy.T, beam))
            else:
                rows = None if u is None else u[at:at + size].to(policy.device)
                out.append(generate(policy.model, src, pad, policy.T, rows)[:, 0])
    policy.model.pushed.copy_(pushed)
    return torch.cat(out)


def validate(policy: Policy, records: list[Record], reward, limit: int) -> tuple[float, list[str]]:
    """Mean reward of the greedy texts of the first `limit` records (0 = all), and the texts."""
    records = records[:limit or None]
    texts = policy.texts(write_texts(policy, [r.source for r in records])[:, None])
    return float(reward(texts, [r.references for r in records], [r.source for r in records]).mean()), texts


@torch.no_grad()
def validation_loss(policy: Policy, records: list[Record], limit: int, size: int = 256) -> float:
    """Mean cross-entropy per token of every target of the first `limit` records, nothing masked; nats."""
    policy.model.eval()
    pushed, total, count = policy.model.pushed.clone(), 0.0, 0
    pairs = [(r, text) for r in records[:limit or None] for text in r.target]
    for at in range(0, len(pairs), size):
        some, targets = zip(*pairs[at:at + size])
        batch = data.make_batch(list(some), list(targets), [[] for _ in some], policy.tok, policy.T).to(policy.device)
        with autocast(policy.device):
            logits = sorl.target_logits(policy.model, batch.src, batch.pad, batch.target)
        total += float(sorl.mle_loss(logits, batch.target, batch.target_len))
        count += int(batch.target_len.sum())
    policy.model.pushed.copy_(pushed)
    return total / count


@torch.no_grad()
def spread(policy: Policy, base: Policy | None, sources: list[str], tokens: torch.Tensor, size: int = 256) -> dict:
    """Entropy and KL to the base, nats per token, along sampled texts tokens (N,T)."""
    sums, count, V = {"entropy": 0.0, "kl_to_base": 0.0}, 0, policy.tok.vocab_size
    for at in range(0, len(sources), size):
        src, pad = (t.to(policy.device) for t in data.encode_sources(sources[at:at + size], policy.tok))
        text = tokens[at:at + size]
        inside = sorl.text_mask(text, V)
        n = int(inside.sum())
        logits = sorl.target_logits(policy.model.eval(), src, pad, text)
        sums["entropy"] += n * float(sorl.entropy(logits, inside))
        if base is not None:
            other = sorl.target_logits(base.model.eval(), src, pad, text)
            sums["kl_to_base"] += n * float(sorl.kl_divergence(logits, other, inside))
        count += n
    return {name: total / max(1, count) for name, total in sums.items()}


def quality(texts: list[str], records: list[Record], reward) -> dict:
    """Reward, BLEU and ROUGE-L (0..100) and, where sources have slots, slot errors by both matchers."""
    sources, references = [r.source for r in records], [r.references for r in records]
    row = {"reward": float(reward(texts, references, sources).mean()), "bleu": bleu(texts, references),
           "rougeL": 100 * float(rouge(texts, references)[:, 2].mean()), "slot_error": None, "slot_error2": None}
    if all(map(has_slots, sources)):
        for name, count in (("slot_error", slot_errors), ("slot_error2", slot_errors2)):
            errors, slots = count(texts, sources)
            row[name] = float(errors.sum() / slots.sum())
    return row


def test_policy(policy: Policy, base: Policy | None, records: list[Record], reward, seed: int, beam: int = 1):
    """Everything a row of the table says about quality -> (dict, greedy texts)."""
    sources = [r.source for r in records]
    texts = policy.texts(write_texts(policy, sources, beam=beam)[:, None])
    row = quality(texts, records, reward)
    tokens = write_texts(policy, sources, sorl.uniforms((len(sources), 1, policy.T), seed, "test"))
    sampled = policy.texts(tokens[:, None])
    row["sampled_reward"] = float(reward(sampled, [r.references for r in records], sources).mean())
    row["distinct2"] = sorl.distinct(sampled)
    return row | spread(policy, base, sources, tokens), texts


# ---------------------------------------------------------------------------------------------------------------------
# A run: its folder, its progress line, its loop

class Interrupted(Exception):
    """Ctrl-C: the run has been saved."""


class Progress:
    """One line, rewritten in place on a terminal; in a log, a new line every few seconds."""

    def __init__(self, name: str, first: int):
        self.name, self.first, self.tty = name, first, sys.stdout.isatty()  # first: the step this process began at
        self.begun, self.last = time.perf_counter(), 0.0

    def show(self, step: int, steps: int, text: str, final: bool = False) -> None:
        now = time.perf_counter()
        if not final and now - self.last < (0.2 if self.tty else 10.0):
            return
        self.last = now
        left = (now - self.begun) / max(1, step - self.first) * (steps - step) if step > self.first else 0
        line = f"{self.name:<8} step {step:>5}/{steps}  {text}  {now - self.begun:5.0f} s, {left:4.0f} s left"
        print("\r\x1b[2K" + line if self.tty else line, end="\n" if final or not self.tty else "", flush=True)


def open_log(path: str, size: int):
    """Append to a log whose first `size` bytes belong to the saved state; what a killed run wrote after them goes."""
    file = open(path, "a+", encoding="utf-8")
    file.truncate(min(size, os.path.getsize(path)))
    file.seek(0, os.SEEK_END)
    return file


def write_json(value, path: str) -> None:
    if parallel.rank() > 0:
        return
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: str):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: expected JSON written by train.py ({e!s:.80})") from None


OURS = ("metrics.jsonl", "samples.txt", "ckpt.pt", "best.pt", "results.json", "command.json", "train.jsonl")


LOCKS = {}  # folder -> the open file that holds its lock


def lock(folder: str) -> None:
    """Keep other processes out of a run's folder until this command ends, however it ends; nothing on Windows."""
    key = os.path.realpath(folder)
    if fcntl and key not in LOCKS:
        file = open(f"{folder}/.lock", "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {folder}: another process is at work there; wait for it, or use another --out") from None
        LOCKS[key] = file


def unlock_all() -> None:
    while LOCKS:
        LOCKS.popitem()[1].close()


def claim(folder: str, cfg: Config, fingerprint: str) -> None:
    """Make the run's folder. Raises InputError when it holds a run of another config, or files that are not of a run."""
    mine = {name: value for name, value in asdict(cfg).items() if name not in NOT_THE_RUN} | {"data_hash": fingerprint}
    mine = json.loads(json.dumps(mine))
    if parallel.rank() > 0:
        return parallel.wait()
    try:
        os.makedirs(folder, exist_ok=True)
        there = read_json(f"{folder}/config.json")
        foreign = [name for name in OURS if os.path.exists(f"{folder}/{name}")]
        if there is None and foreign:
            raise InputError(f"--out {folder}: holds {foreign[0]} but no config.json, so it is not a run of train.py; "
                             f"expected a new folder")
        lock(folder)
        if there is None:
            write_json(mine, f"{folder}/config.json")
    except OSError as e:
        raise InputError(f"--out {folder}: cannot be written ({e.strerror})") from None
    if there is not None and there != mine:
        other = [name for name in mine if not isinstance(there, dict) or there.get(name) != mine[name]] or ["?"]
        raise InputError(f"--out {folder}: holds a run of another config ({', '.join(other[:4])} differ); "
                         f"expected the same flags, or another --out")
    parallel.wait()


@dataclass
class Run:
    """One training run in its folder: what the loop changes, all of which a checkpoint holds."""
    cfg: Config
    policy: Policy
    folder: str
    optimizer: torch.optim.Optimizer
    by_loss: bool                  # the base is chosen by validation loss, RL by validation reward
    base: GPT | None = None        # what KL is measured from
    step: int = 0
    counts: dict = field(default_factory=lambda: dict.fromkeys(report.COSTS, 0))
    best: float = -math.inf
    static: torch.Tensor | None = None  # (B,C,T) the refreshed texts of the current batch
    finished: bool = False
    is_new: bool = True

    def open_logs(self, sizes: dict) -> None:
        self.logs = {name: open_log(f"{self.folder}/{name}", sizes.get(name, 0))
                     for name in ("metrics.jsonl", "samples.txt")}

    def save(self) -> None:
        sizes = {}
        for name, file in self.logs.items():
            file.flush()
            sizes[name] = file.tell()
        save(policy_state(self.policy, self.cfg) | {
            "optimizer": self.optimizer.state_dict(), "step": self.step, "counts": self.counts, "best": self.best,
            "static": self.static, "logs": sizes, "finished": self.finished}, f"{self.folder}/ckpt.pt")

    def load(self) -> None:
        """Go on from ckpt.pt, if there is one."""
        state = load(f"{self.folder}/ckpt.pt") if os.path.exists(f"{self.folder}/ckpt.pt") else None
        self.is_new = state is None
        if state:
            try:
                self.policy.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.step, self.counts, self.best = state["step"], state["counts"], state["best"]
                self.static, self.finished = state["static"], state["finished"]
                if self.static is not None:
                    self.static = self.static.to(self.policy.device)
            except (KeyError, RuntimeError, ValueError) as e:
                raise InputError(f"{self.folder}/ckpt.pt: not the state of this run ({e!s:.100})") from None
        parallel.wait()  # before anyone writes
        if parallel.rank() == 0:
            self.open_logs(state["logs"] if state else {})


def make_optimizer(cfg: Config, model: GPT) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay},
                              {"params": rest, "weight_decay": 0.0}], lr=cfg.lr, betas=(0.9, 0.95))


def rate(cfg: Config, done: float) -> float:
    """Learning rate when a share `done` of the run is over: linear warm-up, then linear decay to 0."""
    return cfg.lr * min((done + 1e-3) / max(cfg.warmup, 1e-3), (1 - done) / (1 - cfg.warmup))


def fresh_static(run: Run, batch: data.Batch) -> torch.Tensor:
    """Static texts sampled from the policy in place of the stored ones, but for the last num_stored of every source:
    (B,C,T). One that has not ended is cut, EOS at its end."""
    cfg, policy, B = run.cfg, run.policy, len(batch.sources)
    stored = widen(batch.static[:, cfg.num_static - cfg.num_stored:], policy.T, policy.tok.pad)
    u = sorl.uniforms((B, cfg.num_static - cfg.num_stored, policy.T), cfg.seed, run.step, "refresh").to(policy.device)
    mine = slice(parallel.my_rows(B).start, parallel.my_rows(B).stop)
    policy.model.eval()
    tokens = policy.generate(policy.model, batch.src[mine], batch.pad[mine], policy.T, u[mine], temperature=cfg.temperature,
                             top_k=cfg.top_k)
    tokens = parallel.all_rows(tokens, B)
    run.counts["fp"] += int(sorl.text_mask(tokens, policy.tok.vocab_size).sum())
    last = tokens[..., -1]
    tokens[..., -1] = torch.where(last < policy.tok.pad, policy.tok.eos, last)
    return torch.cat([tokens, stored], 1)


def number_of(run: Run) -> int:
    """The batch of this update; with refresh, one serves several."""
    return run.step // max(1, run.cfg.refresh)


def next_batch(run: Run, batches: Batches) -> data.Batch:
    """The batch of this update; with refresh, one batch and its static texts, sampled or kept, serve `refresh` updates."""
    cfg, policy = run.cfg, run.policy
    batch = batches.get(number_of(run)).to(policy.device)
    if cfg.refresh:
        if run.step % cfg.refresh == 0:
            run.static = fresh_static(run, batch)
        batch.static, batch.static_len = run.static, sorl.finish(run.static, policy.tok.vocab_size)[1]
    if cfg.refresh or decodes(cfg):  # texts may grow up to T
        batch.target = widen(batch.target, policy.T, policy.tok.pad)
        batch.static = widen(batch.static, policy.T, policy.tok.pad)
    return batch


def update(run: Run, batches: Batches, reward) -> list[Terms]:
    """One optimizer step over the micro-batches of one batch -> their Terms."""
    cfg, policy = run.cfg, run.policy
    with autocast(policy.device):
        batch = next_batch(run, batches)
    B, C, T = batch.static.shape
    draws = Draws.at(cfg, run.step, B, C, T)
    mle_tokens, mine, parts = batch.target_len.sum(), parallel.my_rows(B), []
    size = math.ceil(len(mine) / cfg.micro_batches)
    policy.model.train()
    for at in range(mine.start, mine.stop, size):
        rows = slice(at, min(at + size, mine.stop))
        with autocast(policy.device):
            terms = forward(cfg, policy, run.base, batch.rows(rows), draws.rows(rows, C, policy.device), reward,
                            (rows.stop - rows.start) / B, mle_tokens)
        terms.loss.backward()
        parts.append(terms)
    parallel.sum_gradients(policy.model)
    if cfg.clip > 0:
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), cfg.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if run.step < cfg.steps:
        batches.get(number_of(run))  # for the next update, while a GPU is still busy with this one
    return parts


def metrics_of(run: Run, parts: list[Terms]) -> dict:
    """What one update did, over all processes, as plain numbers; adds to the run's counts."""
    learned = [terms.rl for terms in parts if terms.rl]
    tokens = 0
    for model in (run.policy.model, run.base):
        if model is not None:
            tokens += int(model.pushed[1])
            model.pushed.zero_()
    sums = parallel.total([
        float(sum(rl.fp for rl in learned)), sum(rl.fp_grad for rl in learned), sum(terms.fp_mle for terms in parts), tokens,
        float(sum(rl.rewards.sum() for rl in learned)), sum(rl.rewards.numel() for rl in learned),
        float(sum(terms.mle for terms in parts)),
        float(sum(terms.share * terms.rl.loss.detach() for terms in parts if terms.rl))], run.policy.device)
    for name, value in zip(("fp", "fp_grad", "fp_mle", "tokens"), sums):
        run.counts[name] += int(value)
    return {"reward": sums[4] / sums[5] if learned else None, "mle_loss": sums[6], "rl_loss": sums[7]}


@torch.no_grad()
def diagnose(run: Run, terms: Terms) -> dict:
    """What a reward curve hides, from the last micro-batch of an update (METHOD section 3; the README explains each)."""
    rollout = terms.rl.rollout if terms.rl else None
    if rollout is None or not rollout.acted.any():
        return {}
    if decodes(run.cfg):
        row = {"entropy": float(sorl.entropy(terms.logits, rollout.acted.flatten(0, 1)))}
    else:
        row = {"entropy": float(sorl.entropy(terms.logits, terms.mask)),
               "fill_accuracy": sorl.fill_accuracy(terms.logits, terms.static, terms.mask),
               "repetition": float(sorl.repetition(rollout.tokens, terms.mask))}
    worth, count = sorl.reward_by_token(rollout, terms.rl.A, run.policy.tok.vocab_size)
    often = count > 0.002 * count.sum()
    ids = torch.nonzero(often).squeeze(1)[worth[often].argsort(descending=True)].tolist()
    row["words_that_pay"] = [run.policy.tok.decode([i]) for i in ids[:5]]
    row["words_that_cost"] = [run.policy.tok.decode([i]) for i in ids[:-6:-1]]
    return row


def evaluate(run: Run, records: list[Record], reward, row: dict) -> None:
    """Fill validation figures into a metrics row, write samples.txt, and keep best.pt."""
    cfg = run.cfg
    row["val_reward"], texts = validate(run.policy, records, reward, cfg.eval_size)
    if run.by_loss:
        row["val_loss"] = validation_loss(run.policy, records, cfg.eval_size)
    run.logs["samples.txt"].write(f"step {run.step}  validation reward {row['val_reward']:.4f}\n" + "".join(
        f"  {r.source}\n    {r.put_names_back(text)}\n" for r, text in zip(records[:3], texts)))
    better = -row["val_loss"] if run.by_loss else row["val_reward"]
    if better > run.best:
        run.best = better
        save(policy_state(run.policy, cfg) | {"step": run.step}, f"{run.folder}/best.pt")


def fit(run: Run, dataset: dict[str, list[Record]], reward, name: str) -> None:
    """The loop: rate, update, evaluate, log, save. Raises Interrupted after Ctrl-C, with everything saved."""
    cfg, first = run.cfg, parallel.rank() == 0
    if cfg.batch_size < parallel.size():
        raise InputError(f"batches of {cfg.batch_size} sources: expected at least one for each of the {parallel.size()} "
                         f"processes")
    batches, progress, stop = Batches(cfg, dataset["train"], run.policy, reward), Progress(name, run.step), []
    usual = signal.signal(signal.SIGINT, lambda *_: stop.append(1) or signal.signal(signal.SIGINT, usual))
    if run.is_new and first:
        row = {"step": 0, "setting": cfg.setting, "reward": None, **run.counts}
        evaluate(run, dataset["val"], reward, row)
        run.logs["metrics.jsonl"].write(json.dumps(row) + "\n")
        run.save()
    while not run.finished:
        spent = run.counts["fp"] / cfg.budget_fp if cfg.budget_fp else 0.0
        for group in run.optimizer.param_groups:
            group["lr"] = rate(cfg, min(1.0, max(run.step / cfg.steps, spent)))
        begun = time.perf_counter()
        parts = update(run, batches, reward)
        row = {"step": run.step, "setting": cfg.setting} | metrics_of(run, parts) | {"val_reward": None}
        run.counts["seconds"] += time.perf_counter() - begun
        row |= run.counts
        if not math.isfinite(row["mle_loss"] + row["rl_loss"]):
            raise InputError(f"{run.folder}: the loss is not finite at step {run.step}; try a smaller --lr (the last "
                             f"saved state is kept)")
        over = cfg.budget_fp and run.counts["fp"] >= cfg.budget_fp
        run.finished = run.step >= cfg.steps or bool(over)
        stopping = any(parallel.total([len(stop)], run.policy.device))  # all at the same step
        if (run.step % cfg.eval_every == 0 or run.finished) and first:
            evaluate(run, dataset["val"], reward, row)
            row |= diagnose(run, parts[-1])
        if first:
            run.logs["metrics.jsonl"].write(json.dumps(row) + "\n")
            run.logs["metrics.jsonl"].flush()
        if (run.step % cfg.save_every == 0 or run.finished or stopping) and first:
            run.save()
        text = f"mle {row['mle_loss']:.3f}" if row["reward"] is None else f"reward {row['reward']:.3f}"
        best = f"best val loss {-run.best:.3f}" if run.by_loss else f"best val reward {run.best:.3f}"
        progress.show(run.step, cfg.steps, f"{text}  {best}  FP {run.counts['fp']:>8,}", run.finished)
        if stopping:
            raise Interrupted(run.folder)
    signal.signal(signal.SIGINT, usual)
    if first:
        for file in run.logs.values():
            file.close()
    parallel.wait()  # best.pt is there


def start(cfg: Config, folder: str, policy: Policy, dataset, reward, name: str, base: GPT | None = None,
          by_loss: bool = False) -> Run:
    """Go on from the folder's last checkpoint, if there is one, and train to the end."""
    run = Run(cfg, policy, folder, make_optimizer(cfg, policy.model), by_loss, base)
    run.load()
    fit(run, dataset, reward, name)
    return run


def base_config(cfg: Config) -> Config:
    """The run of the base model; what does not concern it is reset, so that every setting shares it."""
    own = ("data", "seed", "base_steps", "base_lr", "base_batch", "base_p_m", "label_smoothing", "weight_decay", "clip",
           "n_layer", "n_head", "n_embd", "block_size", "max_len", "tokenizer", "vocab_size", "eval_size")
    same = {name: getattr(cfg, name) for name in own}
    return Config(mode="train", setting="mle", steps=cfg.base_steps, lr=cfg.base_lr, batch_size=cfg.base_batch,
                  mle_weight=1.0, rl_weight=0.0, K=1, eval_every=max(1, cfg.base_steps // 6), **same)


def make_base(cfg: Config, folder: str, dataset, reward, device: torch.device, tok: Tokenizer | None = None) -> Policy:
    """The base model in `folder`, trained unless it is there already; the weights of least validation loss."""
    base = base_config(cfg)
    policy = new_policy(base, dataset, device, tok)
    claim(folder, base, data.data_hash(dataset))
    start(base, folder, policy, dataset, reward, "base", by_loss=True)
    return load_policy(f"{folder}/best.pt", device)


def check_data(cfg: Config, dataset, device: torch.device) -> Tokenizer:
    """Before anything is written: do the tokenizer and the network take these data? -> the tokenizer."""
    policy = new_policy(base_config(cfg), dataset, device)
    note_data(dataset, policy)
    return policy.tok


def note_data(dataset, policy: Policy) -> None:
    """Say what a user would not see in the figures."""
    if cut := check_lengths(dataset, policy):
        print(f"note: {cut} targets are longer than {policy.T} tokens and are cut")
    lone = sum(r.static is r.references and len(r.references) == 1 for r in dataset["train"])
    if lone > len(dataset["train"]) / 2:
        print(f"note: {lone} records have one reference and no other static text; stored static texts score 1 against "
              f"themselves there, and nothing can be learned from them; expected several references or texts in static "
              f"(--mode candidates makes some), or --refresh")


def sample_candidates(policy: Policy, records: list[Record], cfg: Config, num: int, reward, split: str):
    """`num` texts for each record, best first by reward -> (records with them as static texts, the FPs spent)."""
    out, fp, size, progress = [], 0, max(1, 512 // num), Progress("sample", 0)
    for at in range(0, len(records), size):
        some = records[at:at + size]
        src, pad = (t.to(policy.device) for t in data.encode_sources([r.source for r in some], policy.tok))
        u = sorl.uniforms((len(some), num, policy.T), cfg.seed, split, at, "candidates").to(policy.device)
        with autocast(policy.device):
            tokens = generate(policy.model.eval(), src, pad, policy.T, u, temperature=cfg.temperature, top_k=cfg.top_k)
        fp += int(sorl.text_mask(tokens, policy.tok.vocab_size).sum())
        texts = [[text for text in policy.texts(ids[None]) if text.strip()] or r.static for r, ids in zip(some, tokens)]
        ranked = best_first(texts, [[r.references] * len(own) for r, own in zip(some, texts)], [r.source for r in some], reward)
        out += [replace(r, static=own) for r, own in zip(some, ranked)]
        progress.show(len(out), len(records), f"FP {fp:>8,}", len(out) == len(records))
    return out, fp


# ---------------------------------------------------------------------------------------------------------------------
# The modes

ROW = ("name", "setting", "observation", "p_m", "K", "refresh", "seed", "val_reward", "test_reward", "sampled_reward",
       "bleu", "rougeL", "slot_error", "slot_error2", "entropy", "kl_to_base", "distinct2", "fp", "fp_grad", "fp_mle",
       "tokens", "seconds", "steps")


def make_row(name: str, cfg: Config, run_state: dict, quality_row: dict) -> dict:
    """One row of results.json."""
    semi, plain = cfg.setting == "semi", cfg.setting in ("mle", "base")
    p_m = None if plain else {"online": 1.0, "offline": 0.0}.get(cfg.setting, cfg.p_m)
    row = {"name": name, "setting": "base" if name == "base" else cfg.setting,
           "observation": cfg.observation if semi else None, "p_m": p_m,
           "K": None if plain else cfg.num_static if cfg.setting == "offline" else cfg.K,
           "refresh": cfg.refresh if semi else None, "seed": cfg.seed, "val_reward": run_state["val_reward"],
           "test_reward": quality_row["reward"], "steps": run_state["step"]}
    row |= {key: quality_row[key] for key in ROW if key in quality_row}
    row |= {key: run_state["counts"][key] for key in report.COSTS}
    return {key: row[key] for key in ROW}


def finish_run(cfg: Config, folder: str, base: Policy | None, dataset, reward, name: str, device) -> dict:
    """Test the best weights of a finished run; write predictions.txt -> its row."""
    row = None
    if parallel.rank() == 0:
        policy = load_policy(f"{folder}/best.pt", device)
        quality_row, texts = test_policy(policy, base, dataset["test"], reward, cfg.seed)
        report.write_predictions(folder, dataset["test"], texts)
        state = load(f"{folder}/ckpt.pt")
        best = state["best"] if name != "base" else validate(policy, dataset["val"], reward, cfg.eval_size)[0]
        row = make_row(name, cfg, state | {"val_reward": best}, quality_row)
    return parallel.same(row)


def run_one(cfg: Config, name: str, folder: str, base: Policy, dataset, reward, device) -> dict:
    """Train one setting from the base in its own folder -> its row."""
    claim(folder, cfg, data.data_hash(dataset))
    policy = Policy(GPT(base.model.config).to(device), base.tok, base.T, device)
    policy.model.load_state_dict(base.model.state_dict())
    base.model.pushed.zero_()
    if cfg.compile:
        policy.model.compile()
        if device.type == "cuda":
            policy.generate = Captured(torch.cuda.graph_pool_handle())
    start(cfg, folder, policy, dataset, reward, name, base.model.eval())
    return finish_run(cfg, folder, base, dataset, reward, name, device)


def compare(given: dict) -> None:
    """Every setting from one base, for each seed; a table, results.json and compare.png. Goes on where it stopped."""
    if clash := [name for name in ("setting", "observation", "init") if name in given]:
        raise InputError(f"--{clash[0]}: compare runs every setting from its own base; expected --mode train with it")
    cfg = make_config(given)
    names = [name for name in SETTINGS if name in cfg.settings or "all" in cfg.settings]
    configs = {name: make_config(given, name) for name in names}  # checked before any work
    device, dataset, reward = pick_device(cfg.device), data.load_dataset(cfg.data), load_reward(cfg.reward)
    tok = check_data(cfg, dataset, device)
    if os.path.isdir(f"{cfg.out}/base") and cfg.seeds or glob.glob(f"{glob.escape(cfg.out)}/seed*/base") and not cfg.seeds:
        raise InputError(f"--out {cfg.out}: holds a comparison {'without' if cfg.seeds else 'with'} --seeds; expected the same, "
                         f"or another --out")
    claim(cfg.out, replace(cfg, mode="compare"), data.data_hash(dataset))
    rows, seeds = read_rows(f"{cfg.out}/results.json"), cfg.seeds or (cfg.seed,)
    for seed in seeds:
        home, done = report.home_of(cfg.out, cfg.seeds, seed), {row["name"] for row in rows if row["seed"] == seed}
        if done >= {"base", *names}:
            continue
        base = make_base(replace(cfg, seed=seed), f"{home}/base", dataset, reward, device, tok)
        for name in ("base", *names):
            if name in done:
                continue
            if name == "base":
                row = finish_run(base_config(replace(cfg, seed=seed)), f"{home}/base", base, dataset, reward, name, device)
            else:
                row = run_one(replace(configs[name], seed=seed), name, f"{home}/{name}", base, dataset, reward, device)
            rows.append(row)
            rows.sort(key=lambda row: (row["seed"], ["base", *SETTINGS].index(row["name"])))
            write_json(rows, f"{cfg.out}/results.json")
    rows = [row for row in rows if row["name"] in ("base", *names) and row["seed"] in seeds]
    if parallel.rank() > 0:
        return
    print("\n" + report.compare_report(cfg.out, cfg.seeds, rows, dataset["test"], reward, machine_of(device)))
    print(f"\nwrote {cfg.out}/results.json, report.txt, outputs.txt and compare.png")


def read_rows(path: str) -> list[dict]:
    """The rows that a comparison has already; [] for a new one."""
    rows = read_json(path) or []
    if not isinstance(rows, list) or any(not isinstance(row, dict) or set(ROW) - set(row) for row in rows):
        raise InputError(f"{path}: expected the rows that train.py writes; move it away to begin again")
    return rows


def train_mode(given: dict) -> None:
    """One run from OUT/base, from --init, or on from where --resume stopped; prints its row."""
    if given.get("resume"):
        given = resumed(given)
    cfg = make_config(given)
    device, dataset, reward = pick_device(cfg.device), data.load_dataset(cfg.data), load_reward(cfg.reward)
    if cfg.init:
        base = given_base(cfg, given, dataset, device)
    else:
        tok = check_data(cfg, dataset, device)
    claim(cfg.out, cfg, data.data_hash(dataset))
    write_json({name: value for name, value in given.items() if name != "resume"}, f"{cfg.out}/command.json")
    if not cfg.init:
        base = make_base(cfg, f"{cfg.out}/base", dataset, reward, device, tok)
    row = run_one(cfg, name_of(cfg), cfg.out, base, dataset, reward, device)
    write_json([row], f"{cfg.out}/results.json")
    print("\n" + report.table([row]))


def given_base(cfg: Config, given: dict, dataset, device: torch.device) -> Policy:
    """The policy in --init. Raises InputError for flags that ask for another shape or vocabulary than it has."""
    base = load_policy(cfg.init, device)
    there = asdict(base.model.config) | {"max_len": base.T}
    for name in ("n_layer", "n_head", "n_embd", "block_size", "max_len", "vocab_size", "tokenizer"):
        if name in given and given[name] != there.get(name):
            raise InputError(f"{cfg.init}: a model of another shape or vocabulary; it has {name} "
                             f"{there.get(name, 'of its own')}, not {given[name]}")
    note_data(dataset, base)
    return base


def resumed(given: dict) -> dict:
    """The flags of the run in --resume, with those given now where they may differ."""
    folder = given["resume"]
    flags, config = read_json(f"{folder}/command.json"), read_json(f"{folder}/config.json")
    if not isinstance(flags, dict) or not isinstance(config, dict):
        raise InputError(f"--resume {folder}: no run of --mode train there (a comparison goes on by its own command)")
    if unknown := set(flags) - {f.name for f in fields(Config)}:
        raise InputError(f"{folder}/command.json: {unknown.pop()!r} is no flag; expected what train.py wrote there")
    for name, value in given.items():
        if name not in NOT_THE_RUN and name != "mode" and config.get(name) != value:
            raise InputError(f"--resume {folder}: that run has {name} {config.get(name)}, not {value}")
    allowed = {name: value for name, value in given.items() if name in NOT_THE_RUN - {"preset", "resume"}}
    return flags | allowed | {"mode": "train", "out": folder}


def eval_mode(given: dict) -> None:
    """Quality of a checkpoint's greedy or beam texts on the test split; predictions next to it in --out."""
    cfg = make_config(given)
    policy, dataset = needed_policy(cfg), data.load_dataset(cfg.data)
    check_lengths(dataset, policy)
    os.makedirs(cfg.out, exist_ok=True)
    row, texts = test_policy(policy, None, dataset["test"], load_reward(cfg.reward), cfg.seed, cfg.beam)
    row.pop("kl_to_base")
    for name, value in row.items():
        if value is not None:
            print(f"{name:<15}{value:10.4f}")
    report.write_predictions(cfg.out, dataset["test"], texts)
    print(f"wrote {cfg.out}/predictions.txt")


def needed_policy(cfg: Config) -> Policy:
    if not cfg.init:
        raise InputError(f"--mode {cfg.mode}: expected --init, the checkpoint to use, such as out/refresh/best.pt")
    return load_policy(cfg.init, pick_device(cfg.device))


def candidates_mode(given: dict) -> None:
    """Sample, score and rank `num` texts a source; write the data again with them as static texts, best first."""
    cfg = make_config(given)
    if not cfg.out_data:
        raise InputError("--mode candidates: expected --out_data, the folder to write")
    if os.path.exists(cfg.out_data) and os.listdir(cfg.out_data):
        raise InputError(f"--out_data {cfg.out_data}: holds files already; expected a new folder")
    policy, dataset, reward = needed_policy(cfg), data.load_dataset(cfg.data), load_reward(cfg.reward)
    check_lengths(dataset, policy)
    os.makedirs(cfg.out_data, exist_ok=True)
    total = 0
    for split in SPLITS:
        records, fp = sample_candidates(policy, dataset[split], cfg, cfg.num, reward, split)
        data.save_records(records, f"{cfg.out_data}/{split}.jsonl")
        total += fp
    write_json({"preset": cfg.preset}, f"{cfg.out_data}/flags.json")
    print(f"wrote {cfg.out_data}: {cfg.num} candidates a source, {total:,} FP")


@torch.no_grad()
def sample_mode(given: dict) -> None:
    """Watch the method on one source: static text, masked input, fills with rewards and advantages, greedy text."""
    cfg = make_config(given)
    policy = needed_policy(cfg)
    if not cfg.source.strip():
        raise InputError("--mode sample: expected --source, the text to write from")
    tok, model = policy.tok, policy.model.eval()
    if len(tok.encode(cfg.source)) + policy.T > model.config.block_size:
        raise InputError(f"--source: {len(tok.encode(cfg.source))} tokens; expected at most "
                         f"{model.config.block_size - policy.T}")
    greedy = policy.texts(write_texts(policy, [cfg.source])[:, None])[0]
    static = cfg.static_text or greedy
    record = Record(cfg.source, [cfg.reference or static], [static], [static])
    batch = data.make_batch([record], [static], [[static]], tok, policy.T).to(policy.device)
    _, _, T = batch.static.shape
    draws = Draws.at(cfg, 0, 1, 1, T).rows(slice(0, 1), 1, policy.device)
    mask = sorl.sample_mask(draws.mask, batch.static_len[0], cfg.p_m)
    logits = sorl.target_logits(model, batch.src, batch.pad, sorl.observe(batch.static[0], mask, "masked", tok.mask))
    rollout = sorl.rollout_one_pass(logits, batch.static[0], mask, draws.tokens, cfg.temperature, cfg.top_k)
    masked = ["[MASK]" if m else tok.decode([i]) for i, m in
              zip(batch.static[0, 0].tolist(), mask[0].tolist())][:int(batch.static_len[0, 0]) - 1]
    print(f"source   {cfg.source}\nstatic   {static}\nmasked   {' '.join(masked)}")
    texts = policy.texts(rollout.tokens)
    rewards = score(load_reward(cfg.reward), policy, rollout.tokens, batch)
    A = sorl.advantage(rewards, "mean", scale=cfg.adv_scale)
    for text, R, a in list(dict.fromkeys(zip(texts, rewards[0].tolist(), A[0].tolist())))[:8]:
        worth = f"   R {R:.3f}  A {a:+.2f}" if cfg.reference else ""
        print(f"fill     {text}{worth}   ({texts.count(text)} of {len(texts)})")
    print(f"greedy   {greedy}")


MODES = {"compare": compare, "train": train_mode, "eval": eval_mode, "sample": sample_mode,
         "candidates": candidates_mode}


def main(argv: list[str]) -> None:
    given = parse_args(argv)
    mode = given.get("mode", "train" if given.get("resume") else "compare")
    join_processes(given.get("device", "auto"))
    try:
        if parallel.size() > 1 and mode not in ("compare", "train"):
            raise InputError(f"--mode {mode}: one process does that; expected python instead of torchrun")
        MODES[mode](given)
        parallel.end()
    except InputError as e:
        fail(str(e), parallel.rank() == 0)
    except parallel.Gone:
        fail("another process of this run has stopped; the last saved state is kept, the same command goes on from there")
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        sys.stderr.close()
    except OSError as e:
        fail(f"{e.filename or 'a file'}: {e.strerror}")
    except (Interrupted, KeyboardInterrupt) as e:
        print(f"\nstopped{f'; saved in {e}' if str(e) else ''}; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    finally:
        unlock_all()


if __name__ == "__main__":
    main(sys.argv[1:])
