"""The settings and the flags: what a run can be.

A setting is a dict of flags, and no update asks for its name. To add one, add a line to SETTINGS,
where `like` names the setting whose tuned flags it takes. To add a flag, add a line to Config.
"""
from dataclasses import asdict, dataclass, replace

import data
from data import InputError
from lab.cli import flag, flags_of, value_of
from model import gpt2_config

STORED = dict(refresh=0, reuse=1)  # static texts as they are stored; every update draws anew
SETTINGS = {
    # Imitation alone: what would more of the base's training have given?
    "mle": dict(STORED, p_m=0.0, credit=0.0, num_static=1, kl_weight=0.0, mle_weight=1.0),
    # Nothing is sampled: stored texts are ranked against each other.
    "offline": dict(STORED, p_m=0.0, credit=1.0),
    # The policy writes whole texts, one forward propagation per token.
    "online": dict(p_m=1.0, observation="full", credit=0.0, refresh=0, num_static=1),
    # Semi-offline, the model sees its own tokens.
    "full": dict(observation="full", credit=0.0, refresh=0, num_static=1),
    # A stored text is kept up to a cut, and the policy writes the rest.
    "tail": dict(observation="full", mask="tail", credit=0.0),
    # Semi-offline, [MASK] where the model's own tokens go: the paper's method.
    "masked": dict(STORED),
    # The same without [MASK]: the old token stays visible to the columns after it.
    "static": dict(STORED, observation="static", like="masked"),
    # Masked, on static texts that the policy writes anew every few updates (the first are stored).
    "refresh": dict(credit=0.0, reuse=1),
}
QUICK = ("offline", "online", "masked")  # what --quick compares


@dataclass
class Config:
    # what to do
    mode: str = flag("compare", "what to do", ("compare", "eval", "sample", "candidates"))
    quick: bool = flag(False, "a first look: three settings, about a minute")
    anew: bool = flag(False, "start the runs of this command again, the base included")
    data: str = flag("forecast", "forecast, forecast2, or a folder with {train,val,test}.jsonl")
    out: str = flag("out", "the folder to write")
    init: str = flag("", "checkpoint to start from, or to use")
    pretrained: str = flag("", "folder with GPT-2's config.json, model.safetensors, vocab.json and "
                           "merges.txt, from which the base starts")
    settings: tuple = flag(tuple(SETTINGS), "compare: which settings", tuple(SETTINGS), str)
    vary: tuple = flag((), "compare: a flag and its values, one row for each", (), str)
    seed: int = flag(0, "seed of everything that is drawn", most=2 ** 63 - 1)
    seeds: tuple = flag((), "compare: several seeds, each with a base of its own", (), int,
                        most=2 ** 63 - 1)
    # the method
    p_m: float = flag(0.2, "share of the tokens that the model draws", most=1)
    K: int = flag(16, "samples per source (online) or per static text (semi-offline)", least=1,
                  most=10 ** 6)
    stored: str = flag("data", "which stored static texts: the first, by reward, or any",
                       ("data", "best", "worst", "random"))
    num_static: int = flag(1, "static texts per source and update (C)", least=1, most=10 ** 6)
    refresh: int = flag(0, "updates that static texts written by the policy serve; 0: stored texts")
    reuse: int = flag(1, "updates that the samples of a setting that decodes serve, with PPO's "
                      "clipped ratio", least=1)
    credit: float = flag(0.0, "weight of the ranking of stored texts against each other")
    reward: str = flag("rouge", "rouge, bleu, chrf, slot, joined by + (their mean), or "
                       "module:function")
    baseline: str = flag("mean", "what is subtracted from the reward", ("mean", "loo"))
    adv_scale: str = flag("source", "divide advantages by one standard deviation per source, by "
                          "one for the batch, or not", ("none", "source", "batch"))
    mle_weight: float = flag(0.3, "weight of imitation during RL")
    kl_weight: float = flag(0.1, "weight of KL(policy || base), summed over a text as RL feeds it")
    temperature: float = flag(1.0, "sampling temperature", least=1e-3)
    top_k: int = flag(0, "sample from the k likeliest tokens; 0: from all")
    # optimization
    steps: int = flag(60, "updates", least=1)
    budget_fp: int = flag(0, "stop after this many sampling FPs; 0: no limit")
    batch_size: int = flag(32, "sources per batch", least=1, most=10 ** 6)
    accumulate: int = flag(1, "batches per update and process", least=1)
    lr: float = flag(3e-4, "peak learning rate of RL")
    # the base model
    base_steps: int = flag(500, "updates of imitation before RL", least=1)
    base_masked: float = flag(0.3, "the share of them, the last, in which [MASK] gets a meaning",
                             most=1)
    base_lr: float = flag(4e-3, "their peak learning rate")
    base_batch: int = flag(32, "texts per update", least=1, most=10 ** 6)
    # the network and its texts
    n_layer: int = flag(3, "blocks", least=1, most=1000)
    n_embd: int = flag(128, "width", least=1, most=10 ** 5)
    init_std: float = flag(0.02, "standard deviation of its fresh Linear weights")
    block_size: int = flag(128, "context: source, SEP and text, in tokens", least=4,
                           most=10 ** 6)
    max_len: int = flag(0, "longest text in tokens with its end (T); 0: the longest of the data")
    vocab_size: int = flag(1000, "largest vocabulary: 256 bytes, merges, 4 special ids", least=260,
                           most=10 ** 6)
    # evaluation and files
    eval_every: int = flag(10, "updates between evaluations; RL also has one after each of the "
                           "first ten", least=1)
    eval_size: int = flag(200, "validation sources used for that; 0: all")
    save_every: int = flag(100, "updates between checkpoints", least=1)
    source: str = flag("", "sample: a source text; by default the first of the test split")
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    # no flags: what the setting or the base defines
    setting: str = "masked"
    mask: str = "coins"  # or tail
    observation: str = "masked"
    n_head: int = 4
    masked_from: int = 0  # the update from which half of the imitated rows have masks


DEFAULTS = {  # how one setting differs from the Config above; a data set's flags come over them
    "offline": dict(num_static=3),
    "online": dict(K=8),
    "full": dict(K=8),
    "tail": dict(K=8, p_m=0.5, reuse=2, adv_scale="batch"),
    "refresh": dict(refresh=8),
}
# --pretrained: rates that keep what is known; usual ones, not tuned here.
PRETRAINED = dict(base_lr=1e-4, lr=1e-5)
NETWORK = {"n_layer", "n_head", "n_embd", "init_std", "block_size", "max_len", "vocab_size"}
# What a base depends on, so that settings which share a base share these.
BASE = NETWORK | {"base_steps", "base_masked", "base_lr", "base_batch", "accumulate", "pretrained",
                  "reward", "eval_size"}
# These do not identify a run: they say where things lie, and how it is watched.
PLACES = {"mode", "quick", "anew", "data", "out", "init", "pretrained", "settings", "seeds", "vary",
          "source", "device", "save_every"}
NOT_TUNING = PLACES | {"seed"}  # flags that no data set may choose


def tuned_flags(folder: str) -> dict[str, dict]:
    """What a data set recommends: setting ("" for all) -> flags. Raises InputError for an unknown
    setting or flag, and for flags that no data may choose: a place, code to run, a base for one
    setting."""
    known, tuned, where = flags_of(Config), {}, f"{folder}/flags.json"
    names = [name for name, flags in SETTINGS.items() if "like" not in flags]
    for setting, flags in data.flags_of(folder).items():
        if setting not in ("", *names):
            raise InputError(f"{where}: expected one of {', '.join(names)}; found {setting!r}")
        barred = NOT_TUNING | (BASE if setting else set())
        for name, value in flags.items():
            if name not in known or name in barred:
                raise InputError(f"{where}: {name!r} is no flag that data may choose"
                                 f"{' for one setting' if name in BASE else ''}")
            if name == "reward" and ":" in str(value):  # the user's code
                raise InputError(f"{where}: reward: expected built-in ones, found {value!r:.40}")
        tuned[setting] = {name: value_of(known[name], str(value), f"{where}: ")
                          for name, value in flags.items()}
    return tuned


def pretrained_shape(folder: str) -> dict[str, int]:
    """The flags of --pretrained's network. Raises InputError for a folder that describes none."""
    try:
        shape = asdict(gpt2_config(folder))
    except ValueError as e:
        raise InputError(f"--pretrained {e}") from None
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    return {name: shape[name] for name in names}


def make_config(given: dict, setting: str) -> Config:
    """The flags of one setting, lowest first: Config's defaults, DEFAULTS, what the data set
    recommends, the flags that were given, and what defines the setting.

    Raises InputError for values that no run could use."""
    fixed = dict(SETTINGS[setting])
    like = fixed.pop("like", setting)
    tuned = tuned_flags(given.get("data", Config.data))
    flags = DEFAULTS.get(like, {}) | tuned.get("", {}) | tuned.get(like, {})
    if given.get("pretrained"):
        flags |= PRETRAINED | pretrained_shape(given["pretrained"])
    cfg = replace(Config(), **flags | given | fixed | {"setting": setting})

    for key, holds, expected in (
        ("p_m", setting == "mle" or cfg.p_m + cfg.credit > 0, "above 0, or nothing is learned"),
        ("n_embd", cfg.n_embd % cfg.n_head == 0, f"a multiple of {cfg.n_head}"),
        ("max_len", cfg.max_len != 1 and cfg.max_len < cfg.block_size,
         f"0, or from 2 to less than block_size = {cfg.block_size}"),
        ("K", cfg.K > 1 or cfg.baseline == "loo" or cfg.p_m == 0,
         "at least 2 (one sample minus its own mean is 0), or --baseline loo"),
        ("num_static", cfg.num_static > 1 or cfg.credit == 0,
         "at least 2, so that there is something to rank"),
        ("refresh", cfg.refresh > 0 or setting != "refresh", "at least 1 for refresh"),
        ("refresh", cfg.refresh % cfg.reuse == 0, f"a multiple of reuse = {cfg.reuse}"),
    ):
        if not holds:
            raise InputError(f"--{key} {getattr(cfg, key)}: expected {expected}")
    return cfg


def unused_flags(cfg: Config, given: dict) -> set[str]:
    """The flags that the setting fixes, or that change nothing in it; except values that it has
    anyway."""
    fixed = SETTINGS[cfg.setting]
    unused = set(fixed)
    if cfg.setting == "mle":
        unused |= {"stored", "baseline", "adv_scale", "budget_fp"}
    if cfg.setting == "online":
        unused |= {"stored"}
    if cfg.p_m == 0:
        unused |= {"K", "temperature", "top_k"}
    if cfg.init:
        unused |= BASE - {"accumulate", "reward", "eval_size"}
    if cfg.pretrained:
        unused |= NETWORK - {"max_len"}
    return {name for name in unused if name not in fixed or given.get(name) != fixed[name]}


def variants(words: tuple) -> tuple[str, dict[str, dict]]:
    """`FLAG V1 V2 …` of --vary -> the flag's name, and for each value as typed {flag: value}."""
    if not words:
        return "", {"": {}}
    name, *values = words
    f = flags_of(Config).get(name)
    if f is None or f.name in NOT_TUNING or not values:
        raise InputError(f"--vary {' '.join(words)}: expected a flag of the method, the "
                         f"optimization, the base or the network, and its values")
    return f.name, {word: {f.name: value_of(f, word, "--vary: ")} for word in values}


# Which flags a mode uses; others are refused.
CHECKPOINT = {"mode", "init", "data", "reward", "seed", "device"}
SAMPLING = {"K", "temperature", "top_k"}
USED = {
    "compare": set(flags_of(Config)) - {"source"},
    "eval": CHECKPOINT,
    "sample": CHECKPOINT | SAMPLING | {"source", "p_m", "baseline", "adv_scale"},
    "candidates": CHECKPOINT | SAMPLING | {"out"},
}
