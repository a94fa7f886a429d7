"""Train and compare: the loss, the update, the loop.

    python train.py                                       compare every setting, from one base
    python train.py --settings refresh --out out/one      train one of them
    python train.py --mode eval|sample|candidates --init out/masked/best.pt
    python train.py -h                                    every flag

Read `loss`, then `update`, then `fit`. A run that was stopped continues where it was saved, on a
CPU to the last bit, by the same command.
"""
import copy
import importlib.util
import os
import signal
import sys
import time
from dataclasses import replace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports needs no traceback
    if name := os.environ.get("SORL"):  # a student's file, see lab/EXERCISES.md
        if "." in name or importlib.util.find_spec(name) is None:
            print(f"train.py: SORL={name}: no such module; expected my_sorl for my_sorl.py here",
                  file=sys.stderr)
            sys.exit(2)
        sys.modules["sorl"] = importlib.import_module(name)
import sorl  # before torch: see model.py
import torch

import data
from data import InputError
from lab import evaluate, processes, report, sample
from lab.batches import Batches
from lab.cli import parse_args, run_command
from lab.files import read_json, write_json
from lab.run import Diverged, Progress, Run, Stop, claim, hash_code, show
from lab.settings import (BASE, PLACES, QUICK, SETTINGS, USED, Config, make_config,
                          unused_flags, variants)
from lab.task import Policy, Task, autocast, load_policy, machine_of, score

WARMUP, MAX_NORM = 0.1, 1.0  # share of the updates; largest norm of the gradient
MLE_P_M = 0.3  # the mask rate of imitated rows

# --------------------------------------------------------------------------------------------------
# One update


def loss(run: Run, batches: Batches, i: int = 0):
    """The loss of batch i of an update -> a scalar that carries the gradient, and what is logged.

    Imitation of the targets, with weight mle_weight, and reinforcement."""
    cfg = run.cfg
    batch, fp = batches.get(run.step, i)
    value, log = torch.zeros((), device=run.policy.device), {}
    if cfg.mle_weight > 0:
        mle = imitate(run, batch, batches.number(run.step, i))
        value = value + cfg.mle_weight * mle
        log |= dict(mle=mle.detach(), fp_mle=len(batch.target))
    if cfg.p_m + cfg.credit > 0:
        first = run.step - run.step % cfg.reuse  # the update in which these samples were drawn
        rl, more = reinforce(run, batch, batches.number(first, i), batches.slot(i))
        value, log = value + rl, log | more
    log["fp"] = fp + log.get("fp", 0)
    return value, log


def uniforms(run: Run, number: int, purpose: str, *shape):
    """sorl.uniforms of the run's seed, a batch's number and a purpose, on the policy's device."""
    return sorl.uniforms(shape, run.cfg.seed, number, purpose).to(run.policy.device)


def imitate(run: Run, batch: data.Batch, number: int):
    """Cross-entropy of the targets, nats per token -> scalar. number: the key of the uniforms.

    Half of the rows have masks, from the update masked_from on, so that [MASK] has a meaning."""
    cfg, policy, (B, T) = run.cfg, run.policy, batch.target.shape

    p_m = MLE_P_M if run.step >= cfg.masked_from else 0.0
    mask = sorl.sample_mask(uniforms(run, number, "mle", B, T), batch.target_len, p_m)
    mask &= uniforms(run, number, "mle row", B)[:, None] < 0.5
    fed = sorl.observe(batch.target, mask, "masked", policy.tok.vocab_size)
    logits = sorl.target_logits(policy.model, batch.src, batch.pad, fed)
    return sorl.mle_loss(logits, batch.target, batch.target_len) / batch.target_len.sum()


def reinforce(run: Run, batch: data.Batch, number: int, slot: int):
    """The policy gradient from B·C = N static texts, in the order of the README -> a scalar that
    carries the gradient, and what is logged.

    number: the key of the uniforms; slot: the batch's place among those of one update."""
    cfg, policy, how = run.cfg, run.policy, (run.cfg.temperature, run.cfg.top_k)
    static, lengths = batch.static.flatten(0, 1), batch.static_len.flatten()  # (N,T), (N,)
    N, T = static.shape

    # The mask: which tokens are the model's? The K samples of a text share it.
    u = uniforms(run, number, "mask", N, T)
    if cfg.mask == "tail":
        mask = sorl.sample_tail(u[:, 0], lengths, T, cfg.p_m)
    elif cfg.mask == "coins":  # a model that sees its own tokens may also write past the end
        reach = torch.full_like(lengths, T + 1) if cfg.observation == "full" else lengths
        mask = sorl.sample_mask(u, reach, cfg.p_m)
    else:
        raise ValueError(f"expected mask coins or tail; got {cfg.mask!r}")

    # What is fed. Samples that had to be decoded serve `reuse` updates, so they may be older.
    u, old = uniforms(run, number, "tokens", N, cfg.K, T), None
    if run.step % cfg.reuse:
        old = {name: x.to(policy.device) for name, x in run.samples[slot].items()}
        decoded = sorl.Rollout(old["tokens"], old["logp"], old["acted"], fp_grad=N * cfg.K)
        fed = old["tokens"].flatten(0, 1)
    else:
        noise = uniforms(run, number, "observe", N, T)
        fed, decoded = sorl.feed(policy.model, batch.src, batch.pad, static, mask, u,
                                 cfg.observation, *how, noise=noise)

    # One forward propagation of it carries the gradient, and gives the K samples.
    logits = sorl.target_logits(policy.model, batch.src, batch.pad, fed)
    rollout = sorl.act(logits, static, mask, u, decoded, *how)
    log = dict(logits=logits.detach(), mask=mask, static=static, fed=fed, fp=len(fed),
               rows_grad=len(fed))
    rl = logits.new_zeros(())

    # Drawn tokens are pushed by their sample's advantage: is it better than the others?
    if cfg.p_m > 0:
        kept = (sorl.text_mask(static, policy.tok.vocab_size) & ~mask).any(1)
        rewards = old["rewards"] if old else score(run.reward, policy, rollout.tokens, batch, kept)
        A = sorl.advantage(rewards, cfg.baseline, cfg.adv_scale)  # (N,K)
        rl = sorl.policy_loss(rollout, A, old and old["logp"])
        log |= dict(rollout=rollout, A=A, rewards=rewards, fp=rollout.fp, fp_grad=rollout.fp_grad)
        if cfg.reuse > 1 and not old:
            run.samples[slot] = dict(tokens=rollout.tokens, acted=rollout.acted,
                                     logp=rollout.logp.detach(), rewards=rewards)
    # Kept tokens of stored texts are pushed by the advantage of their text among the C.
    if cfg.credit > 0:
        rewards, ranked = rank_static(run, batch, logits, mask)
        rl = rl + cfg.credit * ranked
        log.setdefault("rewards", rewards)
    log["rl"] = rl.detach()
    if cfg.kl_weight > 0:
        inside = sorl.text_mask(fed if decoded else static, policy.tok.vocab_size)
        rl = rl + cfg.kl_weight * distance(run, batch, fed, logits, inside)
        log["fp"] = log["fp"] + len(fed)
    return rl, log


def distance(run: Run, batch: data.Batch, fed, logits, inside):
    """KL from the base, summed over a text, for what was fed: (F,T), (F,T,V), (F,T) -> scalar."""
    with torch.no_grad():
        base_logits = sorl.target_logits(run.base, batch.src, batch.pad, fed)
    return sorl.kl_divergence(logits, base_logits, inside) * inside.sum() / len(fed)


def rank_static(run: Run, batch: data.Batch, logits, mask):
    """The C stored texts of a source against each other: credit for the tokens that they kept.

    logits (B·C,T,V), mask (B·C,T) -> rewards (B,C), loss. The policy did not write these texts.
    GOLD's weights (Pang and He 2021), each token's own probability, keep what it would never write
    from dominating, and offline from falling. Top-k is not applied: a text that exists may hold any
    token."""
    inside = sorl.text_mask(batch.static, run.policy.tok.vocab_size)
    given = sorl.rollout_given(logits, batch.static, inside & ~mask.view(inside.shape))
    given.logp = given.logp * given.logp.detach().exp()
    rewards = score(run.reward, run.policy, batch.static, batch)
    A = sorl.advantage(rewards, run.cfg.baseline, run.cfg.adv_scale)
    return rewards, sorl.policy_loss(given, A)


def update(run: Run, batches: Batches) -> list[dict]:
    """One optimizer step: the mean gradient of `accumulate` batches per process -> their logs."""
    model, logs = run.policy.model, []
    for network in filter(None, (model, run.base)):
        network.pushed.zero_()  # evaluation has pushed texts, too
    for i in range(run.cfg.accumulate):
        with autocast(run.policy.device):
            value, log = loss(run, batches, i)
        (value / run.cfg.accumulate).backward()
        if logs:
            logs[-1].pop("logits", None)  # the last batch's are diagnosed, the others' only stay
        logs.append(log)
    processes.average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return logs


# --------------------------------------------------------------------------------------------------
# The loop


def make_optimizer(cfg: Config, model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0,
                             fused=True)


def rate(cfg: Config, done: float) -> float:
    """Learning rate when a share `done` of the run is over: linear warm-up, then linear decay."""
    return cfg.lr * min((done + 1e-3) / WARMUP, (1 - done) / (1 - WARMUP))


def fit(run: Run, task: Task, name: str) -> None:
    """Rate, update, evaluate, log, save, to the end. Raises KeyboardInterrupt if the user stops it,
    after the update that runs, when all is saved."""
    cfg, val, first = run.cfg, task.dataset["val"], processes.rank() == 0
    run.load()
    batches = Batches(cfg, task.dataset["train"], run.policy, run.reward, run.written)
    progress = Progress(name, run.step)
    if first and run.step == 0 and not run.finished:
        row = {"step": 0, "setting": cfg.setting, "reward": None, **run.counts}
        run.log(row | evaluate.evaluate(run, val))
    with Stop() as stop:
        while run.done < 1:
            for group in run.optimizer.param_groups:
                group["lr"] = rate(cfg, run.done)
            begun = time.perf_counter()
            logs = update(run, batches)
            row = {"step": run.step, "setting": cfg.setting, **run.count(logs)}
            run.counts["seconds"] += time.perf_counter() - begun
            row |= {"val_reward": None, **run.counts}

            if first and (run.done == 1 or evaluate.is_due(cfg, run.step)):
                row |= evaluate.evaluate(run, val) | evaluate.diagnose(run, logs[-1])
            del logs  # their logits would stand beside those of the next update
            run.log(row)
            stop.asked |= show(run, progress, row)
            stopping = processes.total({"asked": stop.asked}, run.policy.device)["asked"] > 0
            if stopping or run.done < 1 and run.step % cfg.save_every == 0:
                run.save()
            if stopping:
                again = "the same command without --anew" if cfg.anew else "the same command"
                raise KeyboardInterrupt(f"stopped; step {run.step} is saved in {run.folder}; "
                                        f"{again} goes on from there")
    if not run.finished:
        run.finished = True
        run.save()


def base_config(cfg: Config) -> Config:
    """The run of the base model. Flags that do not concern it are reset, so that settings share it;
    --init's policy is a base that needs no update."""
    same = (*BASE, "data", "init", "seed", "anew", "save_every")
    steps = 0 if cfg.init else cfg.base_steps
    return replace(
        Config(), **{name: getattr(cfg, name) for name in same}, **SETTINGS["mle"],
        mode="base", setting="mle", steps=steps, lr=cfg.base_lr, batch_size=cfg.base_batch,
        eval_every=max(1, steps // 6),
        masked_from=round(steps * (1 - cfg.base_masked)))


def train_base(cfg: Config, folder: str, task: Task, only: bool) -> Policy | None:
    """The base model in a folder, trained unless it is there already, and its row in the table.

    None if it diverged and there are other bases; if it is the only one, raises Diverged."""
    policy = task.new_policy(cfg)
    run = Run(cfg, policy, task.reward(cfg.reward), folder, make_optimizer(cfg, policy.model))
    try:
        fit(run, task, "base")
    except Diverged as e:
        processes.first(evaluate.write_diverged_row, folder, cfg, "base", run)
        if only:
            raise
        task.note(str(e))
        return None
    policy = load_policy(f"{folder}/best.pt", task.device)
    evaluate.note_copying(policy, task.dataset["val"])
    processes.first(evaluate.test_run, cfg, "base", folder, policy, task)
    return policy


def train_setting(cfg: Config, folder: str, base: Policy | None, task: Task) -> None:
    """Train one setting from its base, and test it. If it or its base diverges, it gets a row that
    says so, and the others run."""
    run = None
    if base:
        task.note_ranking(cfg)
        policy = replace(base, model=copy.deepcopy(base.model))
        run = Run(cfg, policy, task.reward(cfg.reward), folder,
                  make_optimizer(cfg, policy.model), base.model)
        try:
            fit(run, task, cfg.setting)
            processes.first(evaluate.test_run, cfg, cfg.setting, folder, base, task)
            return
        except Diverged as e:
            task.note(str(e))
    processes.first(evaluate.write_diverged_row, folder, cfg, cfg.setting, run)


# --------------------------------------------------------------------------------------------------
# The comparison, and the command line


def plan(given: dict) -> list[tuple[str, Config, str, str]]:
    """What a comparison runs: (value of the varied flag, config, its folder, its base's folder)."""
    names = given.get("settings", QUICK if given.get("quick") else SETTINGS)
    seeds = given.get("seeds", ())
    varied, values = variants(given.get("vary", ()))
    for one, other in (("seed", "seeds"), ("settings", "quick"), (varied, "vary")):
        if one in given and given.get(other):
            raise InputError(f"--{one}: given beside --{other}; expected one of them")
    configs = [(word, make_config(given | flags, name))
               for name in SETTINGS if name in names for word, flags in values.items()]
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
            runs.append((word, replace(cfg, mode="run", seed=seed),
                         f"{home}/{cfg.setting}{suffix}", base))
    return runs


def read_finished(runs: list, varied: str, claimed: dict[str, dict]) -> list[dict]:
    """The rows of a comparison: all settings that are finished beside these runs, now or before;
    of a sweep, these runs. Rows of other code, or from another base, are left out."""
    rows = {f"{os.path.dirname(base)}/{name}": (base, {}) for *_, base in runs
            for name in ("base", *SETTINGS)}
    if varied:
        rows = {folder: (base, {"flag": varied, "value": word}) for word, _, folder, base in runs}
    hashes = {"seed", "code", "data_hash", "base_hash", "reward_hash"}
    same, found = (BASE - PLACES) | hashes, []
    for folder, (base, more) in rows.items():
        config = read_json(f"{folder}/config.json") or {}
        if all(config.get(key) == claimed[base].get(key) for key in same):
            found += [row | more for row in report.read_rows(f"{folder}/results.json")]
    return found


def compare(given: dict) -> None:
    """Settings, or values of a flag, from the same base for each seed: a table and a figure."""
    runs = plan(given)
    cfg = runs[0][1]
    task, varied, code = Task(cfg), "".join(cfg.vary[:1]), hash_code()
    configs = {cfg.out: replace(cfg, mode="compare")}
    bases = {base: base_config(config) for _, config, _, base in runs}
    configs |= bases | {folder: config for _, config, folder, _ in runs}
    for config in bases.values():  # all mistakes before any work
        task.reward(config.reward)
        task.new_policy(config)
    claimed = {folder: task.identity(config, processes.size()) | {"code": code}
               for folder, config in configs.items()}
    with claim(claimed, cfg.anew):
        made, table = {}, f"vary-{varied}" if varied else "results"
        for _, config, folder, base in runs:
            if base not in made:
                made[base] = train_base(configs[base], base, task, only=len(bases) == 1)
            train_setting(config, folder, made[base], task)
            rows = processes.first(read_finished, runs, varied, claimed)
            processes.first(write_json, rows, f"{cfg.out}/{table}.json")
        if processes.rank() == 0 and varied:
            print("\n" + report.vary_report(cfg.out, varied, rows))
        elif processes.rank() == 0:
            machine, test = machine_of(task.device), task.dataset["test"]
            print("\n" + report.compare_report(cfg.out, rows, test, machine, cfg.seeds))


@run_command("train.py")
def main(argv: list[str]) -> None:
    given = parse_args(argv, Config)
    mode = given.setdefault("mode", "compare")
    if unused := given.keys() - USED[mode]:
        raise InputError(f"--{min(unused)}: --mode {mode} does not use it")
    processes.begin(given.get("device", "auto"))
    if mode == "compare":
        compare(given)
    elif processes.size() > 1:
        raise InputError(f"--mode {mode}: one process does that; expected python, not torchrun")
    else:
        sample.run_mode(mode, given, reinforce)
    sys.stdout.flush()
    processes.end()


if __name__ == "__main__":
    main(sys.argv[1:])
