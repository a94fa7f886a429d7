"""Which sources and static texts an update learns from.

An update takes n batches (--accumulate) in each of P processes. Batch i of process r has, at
update s,

    number(s, i) = (s · n + i) · P + r         the key of its coins, samples and refreshed texts
    number(s // refresh, i)                    which sources and stored texts it has

so n batches in one process are those of n processes, and every batch is a function of (seed, step)
alone. With `refresh`, one batch and its static texts serve so many updates; from the second batch
on, the policy writes the texts.
"""
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F

import data
import sorl
from data import Record
from lab import processes
from lab.policy import Policy
from model import finish, generate


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    u = sorl.uniforms((n,), seed, "order", epoch).tolist()
    return sorted(range(n), key=u.__getitem__)


def batch_indices(n: int, size: int, seed: int, number: int) -> list[int]:
    """Batch `number` of an endless walk through n items, which are reshuffled every epoch."""
    places = range(number * size, (number + 1) * size)
    return [permutation(n, seed, place // n)[place % n] for place in places]


def best_first(texts, references, sources, reward) -> list[list[str]]:
    """Every source's texts by falling reward, equal ones in their order.

    texts[b][c] is scored against the list references[b][c]; all are scored in one call."""
    flat = [text for of_source in texts for text in of_source]
    refs = [lists for of_source in references for lists in of_source]
    srcs = [source for source, of_source in zip(sources, texts) for _ in of_source]
    scores = iter(reward(flat, refs, srcs) if flat else ())
    ranked = []
    for of_source in texts:
        score = [next(scores) for _ in of_source]
        order = sorted(range(len(of_source)), key=lambda c: -score[c])
        ranked.append([of_source[c] for c in order])
    return ranked


class Batches:
    """The batches of one run. RL meets every record once an epoch; MLE as often as it has targets,
    so that every pair of source and target is as likely as another."""

    def __init__(self, cfg, records: list[Record], policy: Policy, reward):
        self.cfg, self.records, self.policy, self.reward = cfg, records, policy, reward
        self.order = list(range(len(records)))
        if cfg.p_m + cfg.credit == 0:  # imitation alone
            self.order = [i for i, r in enumerate(records) for _ in r.target]
        self.ranked = {}   # record -> its static texts, best first
        self.current = {}  # i -> the batch that serves since the last refresh

    def number(self, step: int, i: int) -> int:
        return (step * self.cfg.accumulate + i) * processes.size() + processes.rank()

    def get(self, step: int, i: int = 0) -> tuple[data.Batch, int]:
        """Batch i of an update, on the policy's device, and the FPs that it took to refresh it."""
        if i in self.current and self.cfg.refresh and step % self.cfg.refresh:
            return self.current[i], 0
        number = self.number(step // max(1, self.cfg.refresh), i)
        batch = self.stored(number, self.is_written(step))
        batch, fp = batch.to(self.policy.device), 0
        if self.cfg.refresh or self.cfg.observation == "full":  # texts may grow up to T
            batch = self.widened(batch)
        if self.is_refreshed(step):
            batch, fp = self.refreshed(batch, self.number(step, i))
        self.current[i] = batch
        return batch, fp

    def is_refreshed(self, step: int) -> bool:
        """Are static texts the policy's? The first ones are stored: the base writes no better."""
        return 0 < self.cfg.refresh <= step

    def is_written(self, step: int) -> bool:
        """Does the policy write whole texts, which owe nothing to a stored one?"""
        return self.is_refreshed(step) or self.cfg.observation == "full" and self.cfg.p_m == 1

    def stored(self, number: int, written: bool = False) -> data.Batch:
        """Sources, one target each, and C stored static texts each."""
        cfg = self.cfg
        places = batch_indices(len(self.order), cfg.batch_size, cfg.seed, number)
        chosen = [self.order[place] for place in places]
        u = sorl.uniforms((2, len(chosen)), cfg.seed, number, "texts").tolist()
        records = [self.records[i] for i in chosen]
        targets = [r.target[int(u[0][b] * len(r.target))] for b, r in enumerate(records)]
        statics = self.pick(chosen, u[1])
        return data.make_batch(records, targets, statics, self.policy.tok, self.policy.T, written)

    def pick(self, chosen: list[int], u: list[float]) -> list[list[str]]:
        """C stored texts a source: the first, the best or worst, or from a random one on."""
        kind, C = self.cfg.stored, self.cfg.num_static
        if kind in ("best", "worst"):
            self.rank(chosen)
        picked = []
        for i, uniform in zip(chosen, u):
            texts = self.ranked.get(i, self.records[i].static)
            texts = texts[::-1] if kind == "worst" else texts
            start = int(uniform * len(texts)) if kind == "random" else 0
            picked.append([texts[(start + c) % len(texts)] for c in range(C)])
        return picked

    def rank(self, chosen: list[int]) -> None:
        """Score the stored texts of records that nobody has ranked yet, all in one call."""
        new = [i for i in dict.fromkeys(chosen) if i not in self.ranked]
        records = [self.records[i] for i in new]
        references = [[r.others(text) for text in r.static] for r in records]
        texts, sources = [r.static for r in records], [r.source for r in records]
        self.ranked |= zip(new, best_first(texts, references, sources, self.reward))

    def widened(self, batch: data.Batch) -> data.Batch:
        def widen(ids):
            return F.pad(ids, (0, self.policy.T - ids.size(-1)), value=self.policy.tok.pad)
        return replace(batch, static=widen(batch.static), target=widen(batch.target))

    def refreshed(self, batch: data.Batch, number: int) -> tuple[data.Batch, int]:
        """Texts of the policy in place of the stored ones. One that has not ended is cut, EOS in
        its last column."""
        cfg, policy, tok = self.cfg, self.policy, self.policy.tok
        shape = len(batch.sources), cfg.num_static, policy.T
        u = sorl.uniforms(shape, cfg.seed, number, "refresh").to(policy.device)
        tokens = generate(policy.model, batch.src, batch.pad, policy.T, u,
                          temperature=cfg.temperature, top_k=cfg.top_k)  # (B,C,T)
        fp = int(sorl.text_mask(tokens, tok.vocab_size).sum())
        last = tokens[..., -1]
        tokens[..., -1] = torch.where(last < tok.pad, tok.eos, last)
        return replace(batch, static=tokens, static_len=finish(tokens, tok.vocab_size)[1]), fp
