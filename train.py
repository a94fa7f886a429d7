"""Train, evaluate and compare: the settings, the flags, the loss, the update, the loop.

    python train.py                    compare every setting on the embedded task, from one base
    python train.py --mode train       one run; --mode eval, sample, candidates: see the README
    python train.py -h                 every flag

Read `loss`, then `update`, then `fit`. A run that was stopped goes on where it was saved, to the
last bit, by the same command.
"""
import sys
import time
from dataclasses import dataclass, replace

import sorl  # before torch: see model.py
import torch

import data
from data import InputError
from lab import evaluate, processes, report
from lab.batches import Batches
from lab.cli import (check_ranges, check_tuned, flag, flags_of, parse_args, parse_vary,
                     run_command)
from lab.policy import (Policy, autocast, load_policy, machine_of, new_policy, score, weights_hash,
                        write_json)
from lab.run import PLACES, Progress, Run, Stop, check_folder, claim, identity, resumed
from lab.work import Work, can_learn, given_base

# --------------------------------------------------------------------------------------------------
# Settings: what each name of the paper's spectrum is, whatever the flags say

SETTINGS = {
    # Imitation alone, for as many updates: what would more of the base's training have given?
    "mle": dict(p_m=0.0, credit=0.0, refresh=0, num_static=1, kl_weight=0.0, mle_weight=1.0),
    # Nothing is sampled: stored texts are ranked against each other.
    "offline": dict(p_m=0.0, credit=1.0, refresh=0),
    # The policy writes whole texts, a forward propagation a token.
    "online": dict(p_m=1.0, observation="full", credit=0.0, refresh=0, num_static=1),
    # Semi-offline, the model sees its own tokens.
    "full": dict(observation="full", credit=0.0, refresh=0, num_static=1),
    # Semi-offline, [MASK] where the model's own tokens go: the paper's method.
    "masked": dict(refresh=0),
    # The same without [MASK]: the static token stays visible.
    "static": dict(observation="static"),
    # Masked, on static texts that the policy writes anew every few updates.
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
    data: str = flag("forecast", "forecast, forecast2, or a folder with {train,val,test}.jsonl")
    out: str = flag("out", "the folder to write")
    init: str = flag("", "checkpoint to start from, or to use")
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
    num_stored: int = flag(0, "with refresh: how many of the C static texts stay stored ones")
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
    steps: int = flag(100, "updates", least=1)
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


WARMUP, CLIP, MLE_P_M = 0.1, 1.0, 0.3  # share of the updates; gradient norm; M-FT's mask rate
DEFAULTS = {  # where one setting differs from the Config above, on data that nobody tuned
    "offline": dict(num_static=3),
    "online": dict(K=8),
    "full": dict(K=8),
    "refresh": dict(refresh=8),
    "credit": dict(refresh=8, num_static=4, credit=0.3),
    "reuse": dict(refresh=8, num_static=4, credit=1.0),
}
QUICK = {  # --quick: a first look, instead of what the data set recommends
    "": dict(base_steps=120, base_batch=16, eval_size=50, n_layer=2, n_embd=96, eval_every=5,
             batch_size=16, steps=10, mle_weight=0.1, kl_weight=0.0),
    "masked": dict(steps=20, batch_size=32),
    "static": dict(steps=20, batch_size=32),
    "refresh": dict(steps=40),
    "credit": dict(steps=40),
    "reuse": dict(steps=40),
}
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


def make_config(given: dict, name: str = "") -> Config:
    """Lowest first: Config's defaults, DEFAULTS, what the data set recommends, the flags given,
    and what the setting is. Raises InputError for values that no run could use."""
    name, folder = name or setting_of(given), given.get("data", Config.data)
    tuned = QUICK if "quick" in given else data.flags_of(folder)
    tuned = check_tuned(Config, tuned, SETTINGS, NOT_TUNING, f"{folder}/flags.json")
    flags = {}
    for layer in (DEFAULTS, tuned):
        flags |= layer.get("", {}) | layer.get(name, {})
    flags |= {key: value for key, value in given.items() if key != "quick"}
    cfg = replace(Config(), **flags | SETTINGS[name] | {"setting": name})

    check_ranges(cfg)
    for key, holds, expected in (
        ("p_m", name == "mle" or cfg.p_m + cfg.credit > 0, "above 0, or nothing is learned"),
        ("n_embd", cfg.n_embd % cfg.n_head == 0, f"a multiple of {cfg.n_head}"),
        ("max_len", cfg.max_len < cfg.block_size, f"less than block_size = {cfg.block_size}"),
        ("K", cfg.K > 1 or cfg.baseline == "loo" or cfg.p_m == 0,
         "at least 2 (one sample less its own mean is 0), or --baseline loo"),
        ("num_static", cfg.num_static > 1 or cfg.credit == 0,
         "at least 2, so that there is something to rank"),
        ("num_stored", cfg.num_stored < cfg.num_static or cfg.refresh == 0,
         f"less than num_static = {cfg.num_static}"),
        ("refresh", cfg.refresh > 0 or name not in ("refresh", "credit", "reuse"),
         f"at least 1 for {name}"),
    ):
        if not holds:
            raise InputError(f"--{key} {getattr(cfg, key)}: expected {expected}")
    return cfg


def unused_flags(cfg: Config) -> set[str]:
    """The flags that this setting fixes, or that change nothing in it."""
    unused = set(SETTINGS[cfg.setting])
    if cfg.setting == "mle":
        unused |= {"stored", "baseline", "adv_scale", "length_norm", "budget_fp"}
    if cfg.setting == "online":
        unused |= {"stored"}
    if cfg.p_m == 0:
        unused |= {"K"}
    if cfg.p_m == 0 and cfg.refresh == 0:
        unused |= {"temperature", "top_k"}
    if cfg.refresh == 0:
        unused |= {"num_stored"}
    return unused


# --------------------------------------------------------------------------------------------------
# One update


def loss(run: Run, batches: Batches, reward, i: int = 0):
    """The loss of batch i of an update -> a scalar that carries the gradient, and what is logged.

    Imitation, the policy's samples, the ranked static texts, the distance from the base, weighted
    by mle_weight, 1, credit and kl_weight; all from one forward propagation."""
    cfg, policy, model, tok = run.cfg, run.policy, run.policy.model, run.policy.tok
    batch, fp = batches.get(run.step, i)
    B, C, T = batch.static.shape
    static, lengths = batch.static.flatten(0, 1), batch.static_len.flatten()  # (B·C,T) (B·C,)
    how = cfg.temperature, cfg.top_k

    def uniforms(purpose, *shape):
        number = batches.number(run.step, i)
        return sorl.uniforms(shape, cfg.seed, number, purpose).to(policy.device)

    # Coins: which tokens are the model's. Where it decodes, the end is an action, too.
    if cfg.observation == "full":
        lengths = torch.full_like(lengths, T + 1)
    mask = sorl.sample_mask(uniforms("mask", B * C, T), lengths, cfg.p_m)  # (B·C,T)

    # What is fed: the texts of RL, and targets to imitate, some of which have masks.
    u = uniforms("tokens", B * C, cfg.K, T)
    fed, decoded = batch.target[:0], None
    if cfg.setting != "mle":
        fed, decoded = sorl.feed(model, batch.src, batch.pad, static, mask, u,
                                 cfg.observation, tok.mask, *how)
    hidden = sorl.sample_mask(uniforms("mle", B, T), batch.target_len, MLE_P_M)
    hidden &= (uniforms("mle row", B) < (0.5 if run.step >= cfg.masked_from else 0))[:, None]
    n = B if cfg.mle_weight > 0 else 0
    imitated = sorl.observe(batch.target, hidden, "masked", tok.mask)[:n]

    # One forward propagation of all rows: C or K texts a source for RL, then the imitated ones.
    src = torch.cat([batch.src.repeat_interleave(len(fed) // B, 0), batch.src[:n]])
    pad = torch.cat([batch.pad.repeat_interleave(len(fed) // B, 0), batch.pad[:n]])
    logits = sorl.target_logits(model, src, pad, torch.cat([fed, imitated]))
    rl_logits, mle_logits = logits.split([len(fed), n])

    mle = rl = kl = logits.new_zeros(())
    log = {"logits": rl_logits.detach(), "mask": mask, "static": static, "fp_mle": n}
    if n:
        mle = sorl.mle_loss(mle_logits, batch.target, batch.target_len) / batch.target_len.sum()
    if cfg.p_m > 0:
        rollout = sorl.act(rl_logits, static, mask, u, decoded, *how)
        rewards = score(reward, policy, rollout.tokens, batch)  # (B·C,K)
        A = sorl.advantage(rewards, cfg.baseline, cfg.adv_scale)
        rl = sorl.policy_loss(rollout, A, cfg.length_norm)
        log |= {"rollout": rollout, "A": A, "rewards": rewards, "fp_grad": rollout.fp_grad}
        fp = fp + rollout.fp
    if cfg.credit > 0:
        rewards, ranked = rank_static(cfg, policy, batch, rl_logits, mask, reward)
        rl = rl + cfg.credit * ranked
        log = {"rewards": rewards} | log
        fp = fp if cfg.p_m > 0 else fp + len(static)
    if cfg.kl_weight > 0:
        with torch.no_grad():
            base_logits = sorl.target_logits(run.base, src[:len(fed)], pad[:len(fed)], fed)
        inside = sorl.text_mask(static if decoded is None else fed, tok.vocab_size)
        kl = sorl.kl_divergence(rl_logits, base_logits, inside) * inside.sum() / len(fed)
        fp = fp + len(fed)
    total = cfg.mle_weight * mle + rl + cfg.kl_weight * kl
    return total, log | {"mle": mle.detach(), "rl": rl.detach(), "fp": fp}


def rank_static(cfg: Config, policy: Policy, batch: data.Batch, logits, mask, reward):
    """The C static texts of a source against each other: credit for the tokens that they kept.

    logits (B·C,T,V), mask (B·C,T) -> rewards (B,C), loss. Refreshed texts were drawn at the run's
    temperature; top-k is not applied, since a text that exists may hold any token."""
    kept = sorl.text_mask(batch.static, policy.tok.vocab_size) & ~mask.view(batch.static.shape)
    if cfg.refresh:
        kept[..., -1] = False  # an end token there may be a cut
    given = sorl.rollout_given(logits, batch.static, kept, cfg.temperature if cfg.refresh else 1.0)
    rewards = score(reward, policy, batch.static, batch)
    A = sorl.advantage(rewards, cfg.baseline, cfg.adv_scale)
    return rewards, sorl.policy_loss(given, A, cfg.length_norm)


def update(run: Run, batches: Batches, reward) -> list[dict]:
    """One optimizer step: the mean gradient of A batches in each process -> their logs."""
    model, logs = run.policy.model, []
    model.train()
    for i in range(run.cfg.accumulate):
        with autocast(run.policy.device):
            value, log = loss(run, batches, reward, i)
        (value / run.cfg.accumulate).backward()
        logs.append(log)
    processes.average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return logs


# --------------------------------------------------------------------------------------------------
# The loop


def make_optimizer(cfg: Config, model) -> torch.optim.Optimizer:
    how = dict(lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    try:
        return torch.optim.AdamW(model.parameters(), **how, fused=True)
    except RuntimeError:  # not on this device, in this PyTorch
        return torch.optim.AdamW(model.parameters(), **how)


def rate(cfg: Config, done: float) -> float:
    """Learning rate when a share `done` of the run is over: linear warm-up, then linear decay."""
    return cfg.lr * min((done + 1e-3) / WARMUP, (1 - done) / (1 - WARMUP))


def fit(run: Run, work: Work, name: str) -> None:
    """Rate, update, evaluate, log, save, to the end. Raises Stopped where the user stopped it."""
    cfg, first = run.cfg, processes.rank() == 0
    val, reward = work.dataset["val"], work.reward
    run.load()
    batches = Batches(cfg, work.dataset["train"], run.policy, reward)
    progress = Progress(name, run.step)
    if run.saved is None and first:
        row = {"step": 0, "setting": cfg.setting, "reward": None, **run.counts}
        run.log(row | evaluate.evaluate(run, val, reward))
    with Stop() as stop:
        while not run.finished:
            spent = run.counts["fp"] / cfg.budget_fp if cfg.budget_fp else 0.0
            for group in run.optimizer.param_groups:
                group["lr"] = rate(cfg, min(1.0, max(run.step / cfg.steps, spent)))
            begun = time.perf_counter()
            with processes.alone():
                logs = update(run, batches, reward)
            row = {"step": run.step, "setting": cfg.setting, **run.count(logs)}
            run.counts["seconds"] += time.perf_counter() - begun
            row |= {"val_reward": None, **run.counts}

            over = cfg.budget_fp and run.counts["fp"] >= cfg.budget_fp
            run.finished = bool(run.step >= cfg.steps or over)
            if first and (run.finished or evaluate.is_due(cfg, run.step)):
                row |= evaluate.evaluate(run, val, reward)
                row |= evaluate.diagnose(run, logs[-1])
            run.log(row)

            stopping = processes.any_of(stop.asked, run.policy.device)  # all at the same step
            left = -run.step % max(1, cfg.refresh)  # updates to the next refresh
            due = run.step - (run.saved or 0) >= cfg.save_every or stopping
            if run.finished or due and left == 0:
                run.save()
            stop.show(progress, run.step, cfg.steps, run.summary(row), run.finished)
            if stopping and not run.finished:
                stop.answer(run, left)
    run.close()
    processes.first(lambda: None)  # best.pt is there


def base_config(cfg: Config) -> Config:
    """The run of the base model; what does not concern it is reset, so that settings share it."""
    same = ("data", "reward", "seed", "base_steps", "base_masked", "base_lr", "base_batch",
            "n_layer", "n_embd", "block_size", "max_len", "vocab_size", "eval_size")
    return replace(
        Config(), **{name: getattr(cfg, name) for name in same}, **SETTINGS["mle"], mode="train",
        setting="mle", steps=cfg.base_steps, lr=cfg.base_lr, batch_size=cfg.base_batch,
        eval_every=max(1, cfg.base_steps // 6),
        masked_from=round(cfg.base_steps * (1 - cfg.base_masked)))


def make_base(cfg: Config, folder: str, work: Work) -> Policy:
    """The base model in a folder, trained unless it is there already."""
    cfg = base_config(cfg)
    policy = new_policy(cfg, work.dataset, work.device, work.tok)
    processes.first(lambda: claim(folder, cfg, identity(cfg, work.data_hash)))
    fit(Run(cfg, policy, folder, make_optimizer(cfg, policy.model)), work, "base")
    policy = load_policy(f"{folder}/best.pt", work.device)
    evaluate.note_copying(policy, work.dataset["val"])
    return policy


def run_one(cfg: Config, name: str, folder: str, base: Policy, work: Work) -> dict:
    """Train one setting from the base in a folder of its own, and test it -> its row."""
    run_id = identity(cfg, work.data_hash, weights_hash(base))
    processes.first(lambda: claim(folder, cfg, run_id))
    policy = base.copy()
    base.model.pushed.zero_()
    run = Run(cfg, policy, folder, make_optimizer(cfg, policy.model), base.model.eval())
    fit(run, work, name)
    return processes.first(lambda: evaluate.tested(cfg, name, folder, base, work))


# --------------------------------------------------------------------------------------------------
# The comparison, one run, and the command line


def plan(given: dict) -> list[tuple[str, str, str, Config]]:
    """What a comparison runs: (setting, value of the varied flag, name of its folder, config)."""
    settings = given.get("settings", USUAL)
    flag_name, values = parse_vary(given.get("vary", ()), Config, NOT_TUNING)
    runs = []
    for name in SETTINGS:
        for word, value in values if name in settings or "all" in settings else ():
            varied = {flag_name: value} if flag_name else {}
            cfg = make_config(given | varied, name)
            if flag_name and flag_name in unused_flags(cfg):
                if "settings" not in given:
                    continue
                raise InputError(f"--vary {flag_name}: the setting {name} fixes or ignores it")
            runs.append((name, word, f"{name}-{flag_name}_{word}" if flag_name else name, cfg))
    unused = set.intersection(*(unused_flags(cfg) for *_, cfg in runs)) if runs else {flag_name}
    if useless := unused & {*given, flag_name}:
        raise InputError(f"--{useless.pop()}: no setting of this comparison uses it")
    return runs


def compare(given: dict) -> None:
    """Settings, or values of a flag, from the same base for each seed: a table and a figure."""
    runs = plan(given)
    cfg = runs[0][-1]
    work, varied, seeds = Work(cfg), "".join(cfg.vary[:1]), cfg.seeds or (cfg.seed,)
    runs = [run for run in runs if can_learn(run[-1], work, alone=len(runs) == 1)]
    homes = {seed: f"{cfg.out}/seed{seed}" if cfg.seeds or varied else cfg.out for seed in seeds}
    for seed in seeds:  # before any work
        for _, _, folder, config in runs:
            check_folder(f"{homes[seed]}/{folder}",
                         identity(replace(config, seed=seed), work.data_hash))
    work.prepare(new_policy(base_config(cfg), work.dataset, work.device))
    processes.first(lambda: claim(cfg.out, cfg, {}))

    rows, path = [], f"{cfg.out}/" + (f"vary-{varied}.json" if varied else "results.json")
    for seed in seeds:
        for name, value, folder, config in runs:
            config, home = replace(config, seed=seed), f"{homes[seed]}/base"
            if base_config(config) != base_config(replace(cfg, seed=seed)):
                home += f"-{varied}_{value}"
            base = make_base(config, home, work)
            if not varied and not any(r["name"] == "base" and r["seed"] == seed for r in rows):
                rows.append(processes.first(lambda: evaluate.tested(
                    base_config(config), "base", home, base, work)))
            row = run_one(config, name, f"{homes[seed]}/{folder}", base, work)
            rows.append(row | ({"flag": varied, "value": value} if varied else {}))
            processes.first(lambda: write_json(rows, path))
    if processes.rank() == 0 and varied:
        print("\n" + report.vary_report(cfg.out, varied, rows))
    elif processes.rank() == 0:
        machine = machine_of(work.device)
        print("\n" + report.compare_report(cfg.out, rows, work.dataset["test"], machine, cfg.seeds))


def train(given: dict) -> None:
    """One run from OUT/base, from --init, or on from where --resume stopped; prints its row."""
    cfg = resumed(Config, given) if "resume" in given else make_config(given)
    for name in given.keys() & unused_flags(cfg):
        if name not in SETTINGS[cfg.setting] or given[name] != getattr(cfg, name):
            raise InputError(f"--{name}: the setting {cfg.setting} fixes or ignores it")
    work = Work(cfg)
    can_learn(cfg, work, alone=True)
    check_folder(cfg.out, identity(cfg, work.data_hash))
    if cfg.init:
        base = given_base(cfg, given, work)
    else:
        work.prepare(new_policy(base_config(cfg), work.dataset, work.device))
        base = make_base(cfg, f"{cfg.out}/base", work)
    print("\n" + report.run_report(run_one(cfg, cfg.setting, cfg.out, base, work)))


# Which flags a mode uses; the others are refused.
CHECKPOINT = {"mode", "init", "data", "reward", "seed", "device"}
SAMPLING = {"K", "temperature", "top_k"}
USED = {
    "compare": set(flags_of(Config)) - {"setting", "init", "resume", "source"} | {"quick"},
    "train": set(flags_of(Config)) - {"settings", "seeds", "vary", "source"} | {"quick"},
    "eval": CHECKPOINT | {"out"},
    "sample": CHECKPOINT | SAMPLING | {"source", "p_m", "baseline", "adv_scale"},
    "candidates": CHECKPOINT | SAMPLING | {"out"},
}


def command(argv: list[str]) -> None:
    given = parse_args(argv, Config, {"quick": "a first look: a tiny model, about a minute"})
    mode = given.setdefault("mode", "train" if "resume" in given else "compare")
    if unused := given.keys() - USED[mode]:
        raise InputError(f"--{unused.pop()}: --mode {mode} does not use it")
    processes.begin(given.get("device", "auto"))
    if mode == "compare":
        compare(given)
    elif mode == "train":
        train(given)
    elif processes.size() > 1:
        raise InputError(f"--mode {mode}: one process does that; expected python, not torchrun")
    else:
        evaluate.command(mode, Config, given)


def main(argv: list[str]) -> None:
    run_command("train.py", lambda: command(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
