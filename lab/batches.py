"""Which sources and static texts an update learns from.

An update takes n batches (--accumulate) in each of P processes. Batch i of process r has the

    slot      i · P + r                          among the n · P batches of an update
    number    update · n · P + slot              the key of its coins, samples and written texts

so n batches in one process are those of n processes, and every batch is a function of (seed,
update, slot) alone. A batch serves `refresh` updates, or without refresh `reuse`; with `refresh`,
from the second batch on, the policy writes the static texts.
"""
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F

import data
import sorl
from data import Record
from lab import processes
from lab.settings import Config
from lab.task import Policy
from model import finish, generate


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    u = sorl.uniforms((n,), seed, "order", epoch).tolist()
    return sorted(range(n), key=u.__getitem__)


def batch_indices(n: int, size: int, seed: int, number: int) -> list[int]:
    """Batch `number` of an endless walk through n items, which are reshuffled every epoch."""
    places = range(number * size, (number + 1) * size)
    return [permutation(n, seed, place // n)[place % n] for place in places]


def best_first(records: list[Record], texts: list[list[str]], reward) -> list[list[str]]:
    """Each record's texts by falling reward, equal ones in their order. All are scored in one call,
    each against the references but for itself."""
    cases = [(text, r.others(text), r.source) for r, of_r in zip(records, texts) for text in of_r]
    scores = iter(reward(*zip(*cases)) if cases else ())
    ranked = []
    for of_r in texts:
        score = dict(zip(of_r, scores))  # equal texts have equal scores
        ranked.append(sorted(of_r, key=score.get, reverse=True))
    return ranked


def widen(batch: data.Batch, policy: Policy) -> data.Batch:
    """The same texts with room for T tokens."""
    def pad_to_T(ids):
        return F.pad(ids, (0, policy.T - ids.size(-1)), value=policy.tok.pad)
    return replace(batch, static=pad_to_T(batch.static), target=pad_to_T(batch.target))


class Batches:
    """The batches of one run. RL meets every record once per epoch; MLE as often as it has targets,
    so that all pairs of source and target are equally likely.

    written: slot -> the static texts (B,C,T) that the policy wrote last; they are a part of the
    run's state, because later weights would write others."""

    def __init__(self, cfg: Config, records: list[Record], policy: Policy, reward, written: dict):
        self.cfg, self.records, self.policy, self.reward = cfg, records, policy, reward
        self.written = written
        self.order = list(range(len(records)))
        if cfg.p_m + cfg.credit == 0:  # imitation alone
            self.order = [i for i, r in enumerate(records) for _ in r.target]
        self.ranked = {}  # record -> its static texts, best first

    def slot(self, i: int) -> int:
        return i * processes.size() + processes.rank()

    def number(self, update: int, i: int) -> int:
        return update * self.cfg.accumulate * processes.size() + self.slot(i)

    def get(self, step: int, i: int = 0) -> tuple[data.Batch, int]:
        """Batch i of an update, on the policy's device, and the FPs that its texts cost now."""
        cfg, fp = self.cfg, 0
        period = cfg.refresh or cfg.reuse
        batch = self.read(self.number(step // period, i)).to(self.policy.device)
        if cfg.refresh or cfg.observation == "full":  # texts may grow up to T
            batch = widen(batch, self.policy)
        if 0 < cfg.refresh <= step:  # the first texts are stored ones: the base writes no better
            slot = self.slot(i)
            if step % cfg.refresh == 0:
                self.written[slot], fp = self.write(batch, self.number(step, i))
            static = self.written[slot].to(self.policy.device)
            # A text of the policy owes nothing to a stored one: all references may score it.
            references = [[texts] * static.size(1) for texts in batch.all_references]
            batch = replace(batch, static=static, references=references,
                            static_len=finish(static, self.policy.tok.vocab_size)[1])
        return batch, fp

    def read(self, number: int) -> data.Batch:
        """Sources, one target each, and C stored static texts each."""
        cfg = self.cfg
        places = batch_indices(len(self.order), cfg.batch_size, cfg.seed, number)
        chosen = [self.order[place] for place in places]
        u = sorl.uniforms((2, len(chosen)), cfg.seed, number, "texts").tolist()
        records = [self.records[i] for i in chosen]
        targets = [r.target[int(u[0][b] * len(r.target))] for b, r in enumerate(records)]
        statics = self.pick(chosen, u[1])
        return data.make_batch(records, targets, statics, self.policy.tok, self.policy.T)

    def pick(self, chosen: list[int], u: list[float]) -> list[list[str]]:
        """C stored texts per source: the first, the best or worst, or from a random one on."""
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
        """Score the stored texts of records that have not been ranked yet, all in one call."""
        new = [i for i in dict.fromkeys(chosen) if i not in self.ranked]
        records = [self.records[i] for i in new]
        self.ranked |= zip(new, best_first(records, [r.static for r in records], self.reward))

    def write(self, batch: data.Batch, number: int) -> tuple[torch.Tensor, int]:
        """C texts of the policy for each source, ids (B,C,T), and the FPs that they cost. A text
        that has not ended is cut, EOS in its last column."""
        cfg, policy, tok = self.cfg, self.policy, self.policy.tok
        shape = len(batch.sources), cfg.num_static, policy.T
        u = sorl.uniforms(shape, cfg.seed, number, "refresh").to(policy.device)
        tokens = generate(policy.model, batch.src, batch.pad, policy.T, u,
                          temperature=cfg.temperature, top_k=cfg.top_k)  # (B,C,T)
        fp = int(sorl.text_mask(tokens, tok.vocab_size).sum())
        last = tokens[..., -1]
        tokens[..., -1] = torch.where(last < tok.pad, tok.eos, last)
        return tokens, fp
