"""Evaluation, and the commands that need no training: it disturbs neither the counts nor the
randomness of a run."""
import functools
import math
import os
import re
from dataclasses import replace

import torch

import data
import sorl
from data import SPLITS, InputError, Record
from data.e2e import has_slots, slot_errors
from data.rewards import bleu, load_reward, rouge
from lab import report
from lab.batches import best_first
from lab.files import write_json
from lab.policy import (Policy, autocast, load, load_policy, pick_device, policy_state, save,
                        score)
from lab.run import Progress, Run
from lab.work import Work, check_lengths
from model import generate, log_probs


def uncounted(function):
    """A function of a policy that has no gradient, and whose passes count as nobody's work."""
    @functools.wraps(function)
    @torch.no_grad()
    def evaluation(policy: Policy, *args, **choices):
        pushed = policy.model.eval().pushed.clone()
        found = function(policy, *args, **choices)
        policy.model.pushed.copy_(pushed)
        return found
    return evaluation


def encode(policy: Policy, sources: list[str]):
    return (t.to(policy.device) for t in data.encode_sources(sources, policy.tok))


def logits_of(policy: Policy, sources: list[str], text: torch.Tensor) -> torch.Tensor:
    """The logits (N,T,V) that predict each text, ids (N,T), after its source."""
    return sorl.target_logits(policy.model.eval(), *encode(policy, sources), text)


def rows_at_once(policy: Policy) -> int:
    """256 texts, or fewer where the logits (rows,T,V) of so many would take more than 512 MB."""
    return max(1, min(256, 2 ** 27 // (policy.T * policy.tok.vocab_size)))


def slices(count: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, count, size)]


@uncounted
def write_texts(policy: Policy, sources: list[str], u=None) -> torch.Tensor:
    """One text for each source, greedy, or sampled by uniforms u (N,1,T) -> ids (N,T)."""
    texts = []
    for part in slices(len(sources), 256):
        src, pad = encode(policy, sources[part])
        rows = None if u is None else u[part].to(policy.device)
        with autocast(policy.device):
            texts.append(generate(policy.model, src, pad, policy.T, rows)[:, 0])
    return torch.cat(texts)


def validate(policy: Policy, records: list[Record], reward):
    """Mean reward of the greedy texts of the records, and the texts."""
    sources = [r.source for r in records]
    texts = policy.texts(write_texts(policy, sources))
    return float(reward(texts, [r.references for r in records], sources).mean()), texts


@uncounted
def validation_loss(policy: Policy, records: list[Record]) -> float:
    """Mean cross-entropy per token of every target of the records; nats."""
    total, count = 0.0, 0
    pairs = [(r.source, text) for r in records for text in r.target]
    for part in slices(len(pairs), rows_at_once(policy)):
        sources, targets = zip(*pairs[part])
        text, lengths = data.encode_texts(targets, policy.tok, policy.T)
        text = text.to(policy.device)
        with autocast(policy.device):
            logits = logits_of(policy, sources, text)
        total += float(sorl.mle_loss(logits, text, lengths.to(policy.device)))
        count += int(lengths.sum())
    return total / count


@uncounted
def copying(policy: Policy, records: list[Record], limit: int = 100) -> float | None:
    """Does the model take words from its source? RL cannot teach that in a few updates.

    Every word of a reference that its own source has and the next record's source has not: is it
    ten times likelier after its own source than after the next? The share of them, teacher-forced;
    None where references repeat nothing. Neither the loss nor the greedy texts tell."""
    records = records[:limit]
    sources = [r.source for r in records]
    others = sources[1:] + sources[:1]
    texts = [" ".join(r.references[0].split()) for r in records]
    columns = []  # (record, column) of the first token of each such word
    for b, text in enumerate(texts):
        begin, repeated = 0, words_of(sources[b]) - words_of(others[b])
        for word in text.split():
            if words_of(word) & repeated and begin < policy.T - 1:
                columns.append((b, begin))
            begin += len(policy.tok.encode(word))
    if not columns:
        return None
    b, t = torch.tensor(columns, device=policy.device).T
    text = data.encode_texts(texts, policy.tok, policy.T)[0].to(policy.device)
    own, other = (log_probs(logits_of(policy, of, text)[b, t]).gather(1, text[b, t][:, None])
                  for of in (sources, others))
    surprising = other < math.log(0.1)  # "snow" after "wet" needs no source
    if not surprising.any():
        return None
    return (own - other > math.log(10))[surprising].float().mean().item()


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def note_copying(base: Policy, records: list[Record]) -> None:
    share = copying(base, records)
    if share is not None and share < 0.95:
        print(f"note: only {share:.0%} of the words that texts take from their source are much "
              f"likelier with the source than with another; RL can hardly teach a base to copy, so "
              f"expect wrong facts; more --base_steps may help")


@uncounted
def spread(policy: Policy, base: Policy | None, sources, tokens) -> dict:
    """Entropy and KL to the base, nats per token, along sampled texts, ids (N,T)."""
    sums, count = {"entropy": 0.0, "kl_to_base": 0.0}, 0
    for part in slices(len(sources), rows_at_once(policy)):
        inside = sorl.text_mask(tokens[part], policy.tok.vocab_size)
        n = int(inside.sum())
        logits = logits_of(policy, sources[part], tokens[part])
        sums["entropy"] += n * float(sorl.entropy(logits, inside))
        if base is not None:
            base_logits = logits_of(base, sources[part], tokens[part])
            sums["kl_to_base"] += n * float(sorl.kl_divergence(logits, base_logits, inside))
        count += n
    return {name: total / max(1, count) for name, total in sums.items()}


def test_policy(policy: Policy, base: Policy | None, records: list[Record], reward, seed: int):
    """What a row of the table says about quality, and the greedy texts.

    BLEU and ROUGE-L are 0..100. slot_error is None unless every source has slots."""
    sources, references = [r.source for r in records], [r.references for r in records]
    test_reward, texts = validate(policy, records, reward)
    row = {"test_reward": test_reward, "bleu": bleu(texts, references),
           "rougeL": 100 * float(rouge(texts, references)[:, 2].mean()), "slot_error": None}
    if all(map(has_slots, sources)):
        errors, slots = slot_errors(texts, sources)
        row["slot_error"] = float(errors.sum() / slots.sum())

    u = sorl.uniforms((len(sources), 1, policy.T), seed, "test")
    tokens = write_texts(policy, sources, u)
    sampled = policy.texts(tokens)
    row["sampled_reward"] = float(reward(sampled, references, sources).mean())
    row["distinct2"] = sorl.distinct(sampled)
    return row | spread(policy, base, sources, tokens), texts


@torch.no_grad()
def diagnose(run: Run, log: dict) -> dict:
    """What a reward curve hides, from one batch of an update (`loss` returns the log)."""
    rollout, logits, mask = log.get("rollout"), log["logits"], log["mask"]
    if rollout is None or not rollout.acted.any():
        return {}
    full = run.cfg.observation == "full"
    row = {"entropy": float(sorl.entropy(logits, rollout.acted.flatten(0, 1) if full else mask))}
    if not full:
        row |= {"fill_accuracy": sorl.fill_accuracy(logits, log["static"], mask),
                "repetition": float(sorl.repetition(rollout.tokens, mask))}
    tok = run.policy.tok
    pays, count = sorl.reward_by_token(rollout, log["A"], tok.vocab_size)
    frequent = torch.nonzero(count > 0.002 * count.sum()).squeeze(1)
    ids = frequent[pays[frequent].argsort(descending=True)].tolist()
    row["words_that_pay"] = [tok.decode([i]) for i in ids[:5]]
    row["words_that_cost"] = [tok.decode([i]) for i in ids[:-6:-1]]
    return row


def is_due(cfg, step: int) -> bool:
    """Every eval_every updates; and after the first ten of RL, in which most is learned."""
    return step % cfg.eval_every == 0 or step <= 10 and cfg.setting != "mle"


def evaluate(run: Run, records: list[Record], reward) -> dict:
    """Validation figures for the log; writes samples.txt, and keeps best.pt.

    The best of an RL run is that of the highest validation reward; a base keeps its last weights,
    because neither its loss nor its greedy texts tell when it has learned to copy."""
    cfg, is_base = run.cfg, run.base is None
    records = records[:cfg.eval_size or None]
    val_reward, texts = validate(run.policy, records, reward)
    row = {"val_reward": val_reward}
    if is_base:
        row["val_loss"] = validation_loss(run.policy, records)
        row["copying"] = copying(run.policy, records)
    lines = [f"step {run.step}  validation reward {val_reward:.4f}\n"]
    for r, text in zip(records[:3], texts):
        lines.append(f"  {r.source}\n    {r.put_names_back(text)}\n")
    run.write("samples.txt", "".join(lines))
    if is_base or val_reward > run.best:
        run.best = val_reward
        save(policy_state(run.policy, cfg) | {"step": run.step}, f"{run.folder}/best.pt")
    return row


def tested(cfg, name: str, folder: str, base: Policy, work: Work) -> dict:
    """The row of a finished run; tested once, and then read from its results.json."""
    if done := report.read_rows(f"{folder}/results.json"):
        return done[0]
    state, policy = load(f"{folder}/ckpt.pt"), load_policy(f"{folder}/best.pt", base.device)
    records = work.dataset["test"]
    row, texts = test_policy(policy, base, records, work.reward, cfg.seed)
    row |= state["counts"] | {
        "name": name, "setting": name, "seed": cfg.seed,
        "val_reward": state["best"], "steps": state["step"]}
    if name not in ("base", "mle"):
        row |= {"p_m": cfg.p_m, "K": cfg.K if cfg.p_m > 0 else cfg.num_static}
    if name not in ("base", "mle", "offline", "online"):
        row |= {"setting": "semi", "observation": cfg.observation, "refresh": cfg.refresh}
    report.write_predictions(folder, records, texts)
    row = {key: row.get(key) for key in report.ROW}
    write_json([row], f"{folder}/results.json")
    return row


# --------------------------------------------------------------------------------------------------
# Commands: eval, candidates, sample


def command(mode: str, config, given: dict) -> None:
    """--mode eval, sample or candidates on --init's policy; what is not given is as in its run."""
    if "init" not in given:
        raise InputError(f"--mode {mode}: expected --init, a checkpoint such as "
                         f"out/refresh/best.pt")
    state = load(given["init"])
    cfg = replace(config(**state["config"]), **given)
    policy = load_policy(cfg.init, pick_device(cfg.device), state)
    print(f"{cfg.init}: data {cfg.data}, reward {cfg.reward}")
    dataset, reward = data.load_dataset(cfg.data), load_reward(cfg.reward)
    check_lengths(dataset, policy)
    modes = {"eval": eval_mode, "sample": sample_mode, "candidates": candidates_mode}
    modes[mode](replace(cfg, out=given.get("out", "")), policy, dataset, reward)


def new_folder(path: str) -> None:
    """Make a folder. Raises InputError when there is something in it already."""
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise InputError(f"--out {path}: holds files already; expected a new folder")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {path}: cannot be made ({e.strerror})") from None


def eval_mode(cfg, policy, dataset, reward) -> None:
    """Quality of a checkpoint's greedy texts on the test split; with --out, the texts too."""
    if cfg.out:
        new_folder(cfg.out)
    row, texts = test_policy(policy, None, dataset["test"], reward, cfg.seed)
    row.pop("kl_to_base")
    for name, value in row.items():
        if value is not None:
            print(f"{name:<15}{value:10.4f}")
    if cfg.out:
        report.write_predictions(cfg.out, dataset["test"], texts)
        print(f"wrote {cfg.out}/predictions.txt")


@torch.no_grad()
def candidates_mode(cfg, policy, dataset, reward) -> None:
    """Write the data again, with K texts of the policy a source, best first, as static texts."""
    if not cfg.out:
        raise InputError("--mode candidates: expected --out, the folder of the new data")
    new_folder(cfg.out)
    made, fp = {split: [] for split in SPLITS}, 0
    for split, records in made.items():
        total, progress = len(dataset[split]), Progress("sample")
        for at in slices(total, max(1, 512 // cfg.K)):
            part = dataset[split][at]
            sources = [r.source for r in part]
            src, pad = encode(policy, sources)
            u = sorl.uniforms((len(part), cfg.K, policy.T), cfg.seed, split, at.start,
                              "candidates")
            with autocast(policy.device):
                tokens = generate(policy.model.eval(), src, pad, policy.T, u.to(policy.device),
                                  temperature=cfg.temperature, top_k=cfg.top_k)
            fp += int(sorl.text_mask(tokens, policy.tok.vocab_size).sum())
            texts = [[text for text in policy.texts(rows) if text.strip()] or r.static
                     for r, rows in zip(part, tokens)]
            references = [[r.references] * len(of_r) for r, of_r in zip(part, texts)]
            ranked = best_first(texts, references, sources, reward)
            records += [replace(r, static=of_r) for r, of_r in zip(part, ranked)]
            progress.show(len(records), total, f"FP {fp:>8,}", len(records) == total)
    for split, records in made.items():  # at the end: who stops before leaves no file
        data.save_records(records, f"{cfg.out}/{split}.jsonl")
    write_json(data.flags_of(cfg.data), f"{cfg.out}/flags.json")
    print(f"wrote {cfg.out}: {cfg.K} candidates a source, {fp:,} FP")


@torch.no_grad()
def sample_mode(cfg, policy, dataset, reward) -> None:
    """The method on one source: static text, what is fed, fills with their rewards, greedy text.

    A source of the data has its static text and references; another starts from the policy's
    greedy text, and there is nothing to compare the fills with."""
    tok, model = policy.tok, policy.model.eval()
    source = os.fsencode(cfg.source).decode("utf-8", "replace").strip()  # in an ASCII locale, too
    source = source or dataset["test"][0].source
    if len(tok.encode(source)) + policy.T > model.config.block_size:
        raise InputError(f"--source: {len(tok.encode(source))} tokens; expected at most "
                         f"{model.config.block_size - policy.T}")
    greedy = policy.texts(write_texts(policy, [source]))[0]
    known = [r for split in SPLITS for r in dataset[split] if r.source == source]
    record = known[0] if known else Record(source, [greedy or source])
    text = record.static[0]
    batch = data.make_batch([record], [text], [[text]], tok, policy.T).to(policy.device)
    static, lengths = batch.static[:, 0], batch.static_len[:, 0]
    T = static.size(1)

    u = sorl.uniforms((1, T), cfg.seed, 0, "mask").to(policy.device)
    mask = sorl.sample_mask(u, lengths, cfg.p_m)
    u = sorl.uniforms((1, cfg.K, T), cfg.seed, 0, "tokens").to(policy.device)
    how = cfg.temperature, cfg.top_k
    fed, decoded = sorl.feed(model, batch.src, batch.pad, static, mask, u, cfg.observation,
                             tok.mask, *how)
    src, pad = (t.repeat_interleave(len(fed), 0) for t in (batch.src, batch.pad))
    logits = sorl.target_logits(model, src, pad, fed)
    rollout = sorl.act(logits, static, mask, u, decoded, *how)
    rewards = score(reward, policy, rollout.tokens, batch)
    A = sorl.advantage(rewards, cfg.baseline, cfg.adv_scale)

    ids = fed[0, :int(lengths[0]) - 1].tolist()
    words = ["[MASK]" if i == tok.mask else tok.decode([i]) for i in ids]
    print(f"source   {source}\nstatic   {text}\nfed      {' '.join(words)}")
    texts = policy.texts(rollout.tokens)
    fills = dict.fromkeys(zip(texts, rewards[0].tolist(), A[0].tolist()))
    for text, R, a in list(fills)[:8]:
        figures = f"   R {R:.3f}  A {a:+.2f}" if known else ""
        print(f"fill     {text}{figures}   ({texts.count(text)} of {cfg.K})")
    print(f"greedy   {greedy}")
