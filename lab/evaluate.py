"""Evaluation: it disturbs neither the counts nor the randomness of a run."""
import json
import math
import re

import torch

import data
import sorl
from data import Record
from data.e2e import parse_slots, slot_errors
from data.rewards import bleu, rouge
from lab import report
from lab.files import COSTS, write_json
from lab.run import Run
from lab.settings import Config
from lab.task import Policy, Task, autocast, load, load_policy, policy_state, save
from model import generate, log_probs


def encode(policy: Policy, sources: list[str]):
    return (t.to(policy.device) for t in data.encode_sources(sources, policy.tok))


def logits_of(policy: Policy, sources: list[str], text: torch.Tensor) -> torch.Tensor:
    """The logits (N,T,V) that predict each text, ids (N,T), after its source."""
    return sorl.target_logits(policy.model, *encode(policy, sources), text)


def slices(count: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, count, size)]


@torch.no_grad()
def write_texts(policy: Policy, sources: list[str], u=None, **how) -> torch.Tensor:
    """K texts for each source, sampled by uniforms u (N,K,T), or a greedy one -> ids (N,K,T)."""
    texts = []
    for part in slices(len(sources), 256):
        src, pad = encode(policy, sources[part])
        rows = None if u is None else u[part].to(policy.device)
        with autocast(policy.device):
            texts.append(generate(policy.model, src, pad, policy.T, rows, **how))
    return torch.cat(texts)


def validate(policy: Policy, records: list[Record], reward):
    """Mean reward of the greedy texts of the records, and the texts."""
    sources = [r.source for r in records]
    texts = policy.texts(write_texts(policy, sources))
    return float(reward(texts, [r.references for r in records], sources).mean()), texts


@torch.no_grad()
def copying(policy: Policy, records: list[Record], limit: int = 100) -> float | None:
    """Does the model take words from its source? RL cannot teach that in a few updates.

    Every word of a reference that its own source has and the next record's source has not: is it
    ten times likelier after its own source than after the next? The share of them, teacher-forced;
    None if references repeat nothing. Neither the loss nor the greedy texts tell."""
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


@torch.no_grad()
def spread(policy: Policy, base: Policy | None, sources, tokens) -> dict:
    """Entropy and KL to the base, nats per token, along sampled texts, ids (N,T)."""
    sums, count = {"entropy": 0.0, "kl_to_base": 0.0}, 0
    rows = 2 ** 27 // (policy.T * policy.tok.vocab_size)  # whose logits take 512 MB
    for part in slices(len(sources), max(1, min(256, rows))):
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
    if all(map(parse_slots, sources)):
        errors, slots = slot_errors(texts, sources)
        row["slot_error"] = float(errors.sum() / slots.sum())

    u = sorl.uniforms((len(sources), 1, policy.T), seed, "test")
    tokens = write_texts(policy, sources, u)[:, 0]
    sampled = policy.texts(tokens)
    row["sampled_reward"] = float(reward(sampled, references, sources).mean())
    row["distinct2"] = sorl.distinct(sampled)
    return row | spread(policy, base, sources, tokens), texts


@torch.no_grad()
def diagnose(run: Run, log: dict) -> dict:
    """What a reward curve hides, from one batch of an update (`loss` returns the log)."""
    if "rollout" not in log or not log["rollout"].acted.any():
        return {}
    rollout, logits, mask = log["rollout"], log["logits"], log["mask"]
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


def is_due(cfg: Config, step: int) -> bool:
    """Every eval_every updates; and after the first ten of RL, in which most is learned."""
    return step % cfg.eval_every == 0 or step <= 10 and cfg.setting != "mle"


def evaluate(run: Run, records: list[Record]) -> dict:
    """Validation figures for the log; writes texts.jsonl, and keeps best.pt.

    The best of an RL run is that of the highest validation reward; a base keeps its last weights,
    because neither its loss nor its greedy texts tell when it has learned to copy."""
    cfg, is_base = run.cfg, run.base is None
    records = records[:cfg.eval_size or None]
    val_reward, texts = validate(run.policy, records, run.reward)
    row = {"val_reward": val_reward}
    if is_base:
        row["copying"] = copying(run.policy, records)
    line = json.dumps({"step": run.step, "texts": texts[:20]}, ensure_ascii=False)
    run.write("texts.jsonl", line + "\n")
    if is_base or val_reward > run.best:
        run.best = val_reward
        save(policy_state(run.policy, cfg), f"{run.folder}/best.pt")
    return row


def test_run(cfg: Config, name: str, folder: str, base: Policy, task: Task) -> None:
    """Test the kept weights of a finished run, unless its results.json is there, and write it."""
    rows = report.read_rows(f"{folder}/results.json")
    if rows and rows[0]["val_reward"] is not None:  # None: it diverged, on another device perhaps
        return
    state, policy = load(f"{folder}/ckpt.pt"), load_policy(f"{folder}/best.pt", base.device)
    records = task.dataset["test"]
    row, texts = test_policy(policy, base, records, task.reward(cfg.reward), cfg.seed)
    row |= state["counts"] | {
        "name": name, "val_reward": state["best"], "steps": state["step"]}
    report.write_predictions(folder, records, texts)
    write_row(folder, cfg, row)


def write_diverged_row(folder: str, cfg: Config, name: str, run: Run | None = None) -> None:
    """A row without rewards, which says that the run diverged; None: its base did."""
    counts = run.counts if run else dict.fromkeys(COSTS, 0)
    write_row(folder, cfg, counts | {"name": name, "steps": run.step if run else 0})


def write_row(folder: str, cfg: Config, row: dict) -> None:
    """results.json: what is known of a run, and the flags that its table shows."""
    row = row | {"setting": row["name"], "seed": cfg.seed}
    if row["name"] not in ("base", "mle"):
        row |= {"p_m": cfg.p_m, "K": cfg.K if cfg.p_m > 0 else cfg.num_static}
    if row["name"] not in ("base", "mle", "offline", "online"):
        row |= {"observation": cfg.observation, "refresh": cfg.refresh}
    if cfg.observation == "full":
        row |= {"reuse": cfg.reuse}
    write_json([{key: row.get(key) for key in report.ROW}], f"{folder}/results.json")
