"""Train and compare: the loss, the update, the loop.

    python train.py                    compare every setting on the embedded task, from one base
    python train.py --mode train       one run; --mode eval, sample, candidates: see the README
    python train.py -h                 every flag

Read `loss`, then `update`, then `fit`. A run that was stopped goes on where it was saved, to the
last bit, by the same command.
"""
import copy
import importlib
import os
import signal
import sys
import time
from dataclasses import fields, replace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports needs no traceback
    if os.environ.get("SORL"):  # a student's file, see lab/EXERCISES.md
        sys.modules["sorl"] = importlib.import_module(os.environ["SORL"])
import sorl  # before torch: see model.py
import torch

import data
from data import InputError
from lab import evaluate, processes, report
from lab.batches import Batches
from lab.cli import parse_args, run_command
from lab.files import read_json, write_json
from lab.policy import Policy, autocast, load_policy, machine_of, score
from lab.run import Progress, Run, Stop, claimed, show
from lab.settings import (BASE, SETTINGS, USED, USUAL, Config, make_config, unused_flags,
                          variants)
from lab.work import Work, note_ranking

WARMUP, CLIP = 0.1, 1.0  # share of the updates; largest norm of the gradient
MLE_P_M = 0.3  # the mask rate of imitated rows

# --------------------------------------------------------------------------------------------------
# One update


def loss(run: Run, batches: Batches, reward, i: int = 0):
    """The loss of batch i of an update -> a scalar that carries the gradient, and what is logged.

    Four parts from one forward propagation: imitation, the policy's samples, the ranking of the
    static texts, the distance from the base; weighted by mle_weight, 1, credit and kl_weight."""
    cfg, policy, model, tok = run.cfg, run.policy, run.policy.model, run.policy.tok
    batch, fp = batches.get(run.step, i)
    B, C, T = batch.static.shape
    static, lengths = batch.static.flatten(0, 1), batch.static_len.flatten()  # (B·C,T) (B·C,)
    how = cfg.temperature, cfg.top_k

    def uniforms(shape, purpose):
        number = batches.number(run.step, i)
        return sorl.uniforms(shape, cfg.seed, number, purpose).to(policy.device)

    # Coins: which tokens are the model's. One that sees its own tokens may write past the end.
    if cfg.observation == "full":
        lengths = torch.full_like(lengths, T + 1)
    mask = sorl.sample_mask(uniforms((B * C, T), "mask"), lengths, cfg.p_m)  # (B·C,T)

    # What is fed: the texts of RL, and the targets to imitate, half of which have masks.
    u = uniforms((B * C, cfg.K, T), "tokens")
    fed, decoded = static[:0], None
    if cfg.p_m + cfg.credit > 0:
        fed, decoded = sorl.feed(model, batch.src, batch.pad, static, mask, u,
                                 cfg.observation, tok.mask, *how)
    p_m = MLE_P_M if run.step >= cfg.masked_from else 0.0
    mle_mask = sorl.sample_mask(uniforms((B, T), "mle"), batch.target_len, p_m)
    mle_mask &= uniforms((B,), "mle row")[:, None] < 0.5
    imitated = sorl.observe(batch.target, mle_mask, "masked", tok.mask)
    imitated = imitated if cfg.mle_weight > 0 else imitated[:0]

    # One forward propagation of all rows; for RL they are C or K texts a source.
    texts, n = len(fed) // B, len(imitated)
    src = torch.cat([batch.src.repeat_interleave(texts, 0), batch.src[:n]])
    pad = torch.cat([batch.pad.repeat_interleave(texts, 0), batch.pad[:n]])
    logits = sorl.target_logits(model, src, pad, torch.cat([fed, imitated]))
    rl_logits, mle_logits = logits.split([len(fed), n])
    log = dict(logits=rl_logits.detach(), mask=mask, static=static, fp_mle=n)

    # The four parts.
    mle = rl = kl = logits.new_zeros(())
    if n:
        mle = sorl.mle_loss(mle_logits, batch.target, batch.target_len) / batch.target_len.sum()
    if cfg.p_m > 0:
        rollout = sorl.act(rl_logits, static, mask, u, decoded, *how)
        rewards = score(reward, policy, rollout.tokens, batch)  # (B·C,K)
        A = sorl.advantage(rewards, cfg.baseline, cfg.adv_scale)
        rl = sorl.policy_loss(rollout, A, cfg.length_norm)
        log |= dict(rollout=rollout, A=A, rewards=rewards, fp_grad=rollout.fp_grad)
    if cfg.credit > 0:
        refreshed = batches.is_refreshed(run.step)
        rewards, ranked = rank_static(cfg, policy, batch, rl_logits, mask, reward, refreshed)
        rl = rl + cfg.credit * ranked
        log.setdefault("rewards", rewards)
    if cfg.kl_weight > 0:
        with torch.no_grad():
            base_logits = sorl.target_logits(run.base, src[:len(fed)], pad[:len(fed)], fed)
        inside = sorl.text_mask(static if decoded is None else fed, tok.vocab_size)
        kl = sorl.kl_divergence(rl_logits, base_logits, inside) * inside.sum() / len(fed)

    # FPs that sample or score: refreshed texts, the rows of RL, the base's.
    fp = fp + (rollout.fp if cfg.p_m > 0 else len(fed)) + (len(fed) if cfg.kl_weight > 0 else 0)
    log |= dict(fp=fp, mle=mle.detach(), rl=rl.detach())
    return cfg.mle_weight * mle + rl + cfg.kl_weight * kl, log


def rank_static(cfg: Config, policy: Policy, batch: data.Batch, logits, mask, reward, refreshed):
    """The C static texts of a source against each other: credit for the tokens that they kept.

    logits (B·C,T,V), mask (B·C,T) -> rewards (B,C), loss. Top-k is not applied, since a text that
    exists may hold any token."""
    kept = sorl.text_mask(batch.static, policy.tok.vocab_size) & ~mask.view(batch.static.shape)
    if refreshed:
        kept[..., -1] = False  # an end token in the last column may be a cut
    temperature = cfg.temperature if refreshed else 1.0
    given = sorl.rollout_given(logits, batch.static, kept, temperature)
    if not refreshed:
        # The policy did not write these. GOLD's weights (Pang and He 2021), each token's own
        # probability, keep what it would never write from dominating, and offline from falling.
        given.logp = given.logp * given.logp.detach().exp()
    rewards = score(reward, policy, batch.static, batch)
    A = sorl.advantage(rewards, cfg.baseline, cfg.adv_scale)
    return rewards, sorl.policy_loss(given, A, cfg.length_norm)


def update(run: Run, batches: Batches, reward) -> list[dict]:
    """One optimizer step: the mean gradient of `accumulate` batches a process -> their logs."""
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
    """Rate, update, evaluate, log, save, to the end; KeyboardInterrupt where the user stops it."""
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
            logs = update(run, batches, reward)
            row = {"step": run.step, "setting": cfg.setting, **run.count(logs)}
            run.counts["seconds"] += time.perf_counter() - begun
            row |= {"val_reward": None, **run.counts}

            over = cfg.budget_fp and run.counts["fp"] >= cfg.budget_fp
            run.finished = bool(run.step >= cfg.steps or over)
            if first and (run.finished or evaluate.is_due(cfg, run.step)):
                row |= evaluate.evaluate(run, val, reward)
                row |= evaluate.diagnose(run, logs[-1])
            del logs  # their logits would stand beside those of the next update
            run.log(row)
            try:
                show(run, progress, row)
            except (OSError, ValueError):  # whoever read our output has gone: that stops it, too
                stop.asked, sys.stdout = True, open(os.devnull, "w")

            asked = processes.total({"stop": stop.asked}, run.policy.device)
            stopping = asked["stop"] > 0  # all at the same step
            left = -run.step % max(1, cfg.refresh)  # updates to the next refresh
            left = 0 if run.finished else min(left, cfg.steps - run.step)
            due = run.finished or stopping or run.step - (run.saved or 0) >= cfg.save_every
            if due and left == 0:
                run.save()
            if stopping:
                stop.answer(run, left)


def base_config(cfg: Config) -> Config:
    """The run of the base model; what does not concern it is reset, so that settings share it."""
    same = {name: getattr(cfg, name) for name in (*BASE, "data", "seed")}
    return replace(
        Config(), **same, **SETTINGS["mle"], mode="base", setting="mle",
        steps=cfg.base_steps, lr=cfg.base_lr, batch_size=cfg.base_batch,
        eval_every=max(1, cfg.base_steps // 6),
        masked_from=round(cfg.base_steps * (1 - cfg.base_masked)))


def make_base(cfg: Config, folder: str, work: Work) -> Policy:
    """The base model in a folder, trained unless it is there already."""
    policy = work.new_policy(cfg)
    fit(Run(cfg, policy, folder, make_optimizer(cfg, policy.model)), work, "base")
    policy = load_policy(f"{folder}/best.pt", work.device)
    evaluate.note_copying(policy, work.dataset["val"])
    return policy


def run_one(cfg: Config, folder: str, base: Policy, work: Work) -> dict:
    """Train one setting from the base in its folder, and test it -> its row."""
    note_ranking(cfg, work)
    base.model.eval().pushed.zero_()
    policy = replace(base, model=copy.deepcopy(base.model))
    run = Run(cfg, policy, folder, make_optimizer(cfg, policy.model), base.model)
    fit(run, work, cfg.setting)
    return processes.first(evaluate.tested, cfg, cfg.setting, folder, base, work)


# --------------------------------------------------------------------------------------------------
# The comparison, one run, and the command line


def plan(given: dict) -> list[tuple[str, Config, str, str]]:
    """What a comparison runs: (value of the varied flag, config, its folder, its base's folder)."""
    names, seeds = given.get("settings", USUAL), given.get("seeds", ())
    varied, values = variants(given.get("vary", ()))
    configs = [(word, make_config(given | flags, name))
               for name in SETTINGS if name in names or "all" in names
               for word, flags in values.items()]
    unused = [unused_flags(cfg, given) for _, cfg in configs]
    for (_, cfg), ignored in zip(configs, unused):
        if varied in ignored:
            raise InputError(f"--vary {varied}: the setting {cfg.setting} fixes or ignores it; "
                             f"--settings says which to run")
    if useless := given.keys() & set.intersection(*unused):
        raise InputError(f"--{min(useless)}: no setting of this comparison uses it")

    runs = []
    for seed in dict.fromkeys(seeds) or (configs[0][1].seed,):
        for word, cfg in configs:
            home = f"{cfg.out}/seed{seed}" if seeds or varied else cfg.out
            suffix = f"-{varied}_{word}" if varied else ""
            base = f"{home}/base{suffix if varied in BASE else ''}"
            runs.append((word, replace(cfg, seed=seed), f"{home}/{cfg.setting}{suffix}", base))
    return runs


def finished_rows(runs: list, varied: str) -> list[dict]:
    """The table of a comparison: all settings that are finished beside these runs, now or before;
    of a sweep, these runs."""
    rows = {f"{os.path.dirname(base)}/{name}": {} for *_, base in runs
            for name in ("base", *SETTINGS)}
    if varied:
        rows = {folder: {"flag": varied, "value": value} for value, _, folder, _ in runs}
    found = {folder: report.read_rows(f"{folder}/results.json") for folder in rows}
    return [found[folder][0] | more for folder, more in rows.items() if found[folder]]


def compare(given: dict) -> None:
    """Settings, or values of a flag, from the same base for each seed: a table and a figure."""
    runs = plan(given)
    cfg = runs[0][1]
    work, varied = Work(cfg), "".join(cfg.vary[:1])
    configs = {folder: config for _, config, folder, _ in runs}
    bases = {folder: base_config(config) for _, config, _, folder in runs}
    for config in bases.values():  # all mistakes before any work
        work.use_reward(config.reward)
        work.new_policy(config)
    folders = {cfg.out: cfg} | bases | configs
    with claimed(folders, work.identity):
        made, table = {}, f"vary-{varied}" if varied else "results"
        for _, config, folder, home in runs:
            work.use_reward(config.reward)
            if home not in made:
                made[home] = make_base(bases[home], home, work)
                if not varied:
                    processes.first(evaluate.tested, bases[home], "base", home, made[home], work)
            run_one(config, folder, made[home], work)
            rows = processes.first(finished_rows, runs, varied)
            processes.first(write_json, rows, f"{cfg.out}/{table}.json")
        if processes.rank() == 0 and varied:
            print("\n" + report.vary_report(cfg.out, varied, rows))
        elif processes.rank() == 0:
            machine, test = machine_of(work.device), work.dataset["test"]
            print("\n" + report.compare_report(cfg.out, rows, test, machine, cfg.seeds))


def resumed(given: dict) -> Config:
    """The config of the run in --resume; only places may be given anew."""
    folder = given["resume"]
    was = read_json(f"{folder}/config.json")
    names = {f.name for f in fields(Config)}
    if not isinstance(was, dict) or was.get("mode") != "train" or not names <= was.keys():
        raise InputError(f"--resume {folder}: no run of --mode train there (a comparison goes on "
                         f"by its own command)")
    flags = {name: was[name] for name in names}
    flags["accumulate"] //= processes.size()
    return Config(**flags | given | {"out": folder})


def train(given: dict) -> None:
    """One run from OUT/base, from --init, or on from where --resume stopped; prints its row."""
    cfg = resumed(given) if "resume" in given else make_config(given)
    if useless := given.keys() & unused_flags(cfg, given):
        raise InputError(f"--{min(useless)}: the setting {cfg.setting}, or a base that is there, "
                         f"fixes or ignores it")
    work = Work(cfg)
    folders = {cfg.out: cfg}
    if not cfg.init:
        folders[f"{cfg.out}/base"] = base_config(cfg)
    with claimed(folders, work.identity):
        base = work.base or make_base(base_config(cfg), f"{cfg.out}/base", work)
        print("\n" + report.run_report(run_one(cfg, cfg.out, base, work)))


def command(argv: list[str]) -> None:
    given = parse_args(argv, Config)
    mode = given.setdefault("mode", "train" if "resume" in given else "compare")
    kind = "resume" if mode == "train" and "resume" in given else f"mode {mode}"
    if unused := given.keys() - USED[kind]:
        raise InputError(f"--{min(unused)}: --{kind} does not use it")
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
