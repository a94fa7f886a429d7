"""The settings and the flags: what a run can be.

A setting is a dict of flags, and no update asks for its name. To add one, add a line to SETTINGS,
where `like` names the setting whose tuned flags it takes. To add a flag, add a line to Config.
"""
from dataclasses import dataclass, replace

import data
from data import InputError
from data.rewards import is_built_in
from lab.cli import flag, flags_of, value_of
from lab.policy import pretrained_shape
from lab.run import PLACES

SETTINGS = {
    # Imitation alone: what would more of the base's training have given?
    "mle": dict(p_m=0.0, credit=0.0, refresh=0, num_static=1, kl_weight=0.0, mle_weight=1.0),
    # Nothing is sampled: stored texts are ranked against each other.
    "offline": dict(p_m=0.0, credit=1.0, refresh=0),
    # The policy writes whole texts, a forward propagation a token.
    "online": dict(p_m=1.0, observation="full", credit=0.0, refresh=0, num_static=1),
    # Semi-offline, the model sees its own tokens.
    "full": dict(observation="full", credit=0.0, refresh=0, num_static=1),
    # Semi-offline, [MASK] where the model's own tokens go: the paper's method.
    "masked": dict(refresh=0),
    # The same without [MASK]: the old token stays visible to the columns behind it.
    "static": dict(observation="static", like="masked"),
    # Masked, on static texts that the policy writes anew every few updates (the first are stored).
    "refresh": dict(credit=0.0),
    # The same, and the static texts are ranked against each other, too.
    "credit": dict(),
    # That ranking alone, without masks: online learning that reuses its texts.
    "reuse": dict(p_m=0.0),
}
USUAL = ("mle", "offline", "online", "full", "masked", "static", "refresh", "credit")


@dataclass
class Config:
    # what to do
    mode: str = flag("compare", "what to do", ("compare", "train", "eval", "sample", "candidates"))
    quick: bool = flag(False, "a first look: a tiny model, about a minute")
    data: str = flag("forecast", "forecast, forecast2, or a folder with {train,val,test}.jsonl")
    out: str = flag("out", "the folder to write")
    init: str = flag("", "checkpoint to start from, or to use")
    pretrained: str = flag("", "folder with GPT-2's config.json, model.safetensors, vocab.json and "
                           "merges.txt, from which the base starts")
    resume: str = flag("", "folder of a run to go on with")
    setting: str = flag("masked", "train: who provides the tokens; semi: as --refresh, --credit "
                        "and --p_m say", ("semi", *SETTINGS))
    settings: tuple = flag(USUAL, "compare: which settings", (*SETTINGS, "all"), str)
    vary: tuple = flag((), "compare: a flag and its values, a row for each", (), str)
    seed: int = flag(0, "seed of everything that is drawn", most=2 ** 63 - 1)
    seeds: tuple = flag((), "compare: several seeds, each with a base of its own", (), int,
                        most=2 ** 63 - 1)
    # the method
    p_m: float = flag(0.2, "probability that the model draws a token", most=1)
    K: int = flag(16, "samples per source (online) or per static text (semi-offline)", least=1)
    stored: str = flag("data", "which stored static texts: the first, by reward, or any",
                       ("data", "best", "worst", "random"))
    num_static: int = flag(1, "static texts per source and update (C)", least=1)
    refresh: int = flag(0, "updates that static texts sampled from the policy serve; 0 = stored")
    credit: float = flag(0.0, "weight of the ranking of the static texts against each other")
    reward: str = flag("rouge", "rouge, bleu, chrf, slot, joined by + (their mean), or "
                       "module:function")
    baseline: str = flag("mean", "what is subtracted from the reward", ("mean", "loo"))
    adv_scale: bool = flag(True, "divide advantages by their standard deviation per source")
    length_norm: bool = flag(False, "divide a sample's log-probability by its actions")
    mle_weight: float = flag(0.3, "weight of imitation during RL")
    kl_weight: float = flag(0.1, "weight of KL(policy || base), summed over a text as RL feeds it")
    temperature: float = flag(1.0, "sampling temperature", least=1e-3)
    top_k: int = flag(0, "sample from the k likeliest tokens; 0 = all")
    # optimization
    steps: int = flag(60, "updates", least=1)
    budget_fp: int = flag(0, "stop after this many sampling FPs; 0 = no limit")
    batch_size: int = flag(32, "sources per batch", least=1)
    accumulate: int = flag(1, "batches per update and process", least=1)
    lr: float = flag(3e-4, "peak learning rate of RL")
    # the base model
    base_steps: int = flag(500, "updates of imitation before RL", least=1)
    base_masked: float = flag(0.3, "the share of them, the last, in which [MASK] gets a meaning",
                             most=1)
    base_lr: float = flag(4e-3, "their peak learning rate")
    base_batch: int = flag(32, "texts per update", least=1)
    # the network and its texts
    n_layer: int = flag(3, "blocks", least=1)
    n_embd: int = flag(128, "width", least=1)
    init_std: float = flag(0.02, "standard deviation of its fresh Linear weights")
    block_size: int = flag(128, "context: source, SEP and text, in tokens")
    max_len: int = flag(0, "longest text in tokens with its end (T); 0 = the longest of the data")
    vocab_size: int = flag(1000, "largest vocabulary: 256 bytes, merges, 4 special ids", least=260)
    # evaluation and files
    eval_every: int = flag(10, "updates between evaluations", least=1)
    eval_size: int = flag(200, "validation sources used for that; 0 = all")
    save_every: int = flag(100, "updates between checkpoints, at least", least=1)
    source: str = flag("", "sample: a source text; by default the first of the test split")
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    # no flags: what the setting or the base defines
    observation: str = "masked"
    n_head: int = 4
    masked_from: int = 0  # the update from which half of the imitated rows have masks


DEFAULTS = {  # where one setting differs from the Config above, on data that nobody tuned
    "offline": dict(num_static=3),
    "online": dict(K=8),
    "full": dict(K=8),
    "refresh": dict(refresh=8),
    "credit": dict(refresh=8, num_static=4, credit=0.3),
    "reuse": dict(refresh=8, num_static=4, credit=1.0),
}
QUICK = {  # --quick: a first look, instead of what the data set recommends
    "": dict(base_steps=120, base_batch=16, init_std=0.06, eval_size=50, n_layer=2,
             n_embd=96, eval_every=5, batch_size=16, steps=10, mle_weight=0.1,
             kl_weight=0.0),
    "masked": dict(steps=20, batch_size=32),
    "refresh": dict(steps=40),
    "credit": dict(steps=40),
    "reuse": dict(steps=40),
}
# --pretrained: rates that leave in place what is known; usual ones, not tuned here.
PRETRAINED = dict(base_lr=1e-4, lr=1e-5)
NETWORK = {"n_layer", "n_head", "n_embd", "init_std", "block_size", "max_len", "vocab_size"}
# What a base depends on, so that settings which share a base share these.
BASE = NETWORK | {"base_steps", "base_masked", "base_lr", "base_batch", "accumulate", "pretrained",
                  "reward", "eval_size"}
NOT_TUNING = PLACES | {"setting", "seed"}  # flags that no data set may choose


def setting_of(given: dict) -> str:
    """The setting of --mode train; `semi` is the one that the other flags describe."""
    name = given.get("setting", Config.setting)
    if name != "semi":
        return name
    if not given.get("refresh"):
        return "masked"
    if given.get("p_m") == 0:
        return "reuse"
    return "credit" if given.get("credit") else "refresh"


def tuned_flags(folder: str) -> dict[str, dict]:
    """What a data set recommends: setting ("" for all) -> flags. Raises InputError for a setting or
    flag that there is not, or that no data may choose: a place, code to run, a base for one."""
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
            if name == "reward" and not is_built_in(str(value)):
                raise InputError(f"{where}: reward: expected built-in ones, found {value!r:.40}")
        tuned[setting] = {name: value_of(known[name], str(value), f"{where}: ")
                          for name, value in flags.items()}
    return tuned


def make_config(given: dict, name: str = "") -> Config:
    """The flags of one setting, lowest first: Config's defaults, DEFAULTS, what the data set
    recommends, the flags that were given, and what defines the setting.

    Raises InputError for values that no run could use."""
    name = name or setting_of(given)
    fixed = dict(SETTINGS[name])
    like = fixed.pop("like", name)
    tuned = QUICK if given.get("quick") else tuned_flags(given.get("data", Config.data))
    flags = DEFAULTS.get(like, {}) | tuned.get("", {}) | tuned.get(like, {})
    if given.get("pretrained"):
        flags |= PRETRAINED | pretrained_shape(given["pretrained"])
    cfg = replace(Config(), **flags | given | fixed | {"setting": name})

    for key, holds, expected in (
        ("p_m", name == "mle" or cfg.p_m + cfg.credit > 0, "above 0, or nothing is learned"),
        ("n_embd", cfg.n_embd % cfg.n_head == 0, f"a multiple of {cfg.n_head}"),
        ("max_len", cfg.max_len < cfg.block_size, f"less than block_size = {cfg.block_size}"),
        ("K", cfg.K > 1 or cfg.baseline == "loo" or cfg.p_m == 0,
         "at least 2 (one sample less its own mean is 0), or --baseline loo"),
        ("num_static", cfg.num_static > 1 or cfg.credit == 0,
         "at least 2, so that there is something to rank"),
        ("refresh", cfg.refresh > 0 or name not in ("refresh", "credit", "reuse"),
         f"at least 1 for {name}"),
    ):
        if not holds:
            raise InputError(f"--{key} {getattr(cfg, key)}: expected {expected}")
    return cfg


def unused_flags(cfg: Config, given: dict) -> set[str]:
    """The flags that the setting fixes, or that change nothing in it; but for what is given as it
    is anyway."""
    fixed = SETTINGS[cfg.setting]
    unused = set(fixed)
    if cfg.setting == "mle":
        unused |= {"stored", "baseline", "adv_scale", "length_norm", "budget_fp"}
    if cfg.setting == "online":
        unused |= {"stored"}
    if cfg.p_m == 0:
        unused |= {"K"}
    if cfg.p_m == 0 and cfg.refresh == 0:
        unused |= {"temperature", "top_k"}
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
    "mode compare": set(flags_of(Config)) - {"setting", "init", "resume", "source"},
    "mode train": set(flags_of(Config)) - {"settings", "seeds", "vary", "source", "resume"},
    "resume": {"mode", "resume", "data", "init", "pretrained", "device", "save_every"},
    "mode eval": CHECKPOINT | {"out"},
    "mode sample": CHECKPOINT | SAMPLING | {"source", "p_m", "baseline", "adv_scale"},
    "mode candidates": CHECKPOINT | SAMPLING | {"out"},
}
