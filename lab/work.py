"""What all runs of a command share, and what is said of it before any training.

Mistakes are InputErrors; what a user would not see in the figures, such as texts that are cut, is
a note."""
import hashlib
import json
from dataclasses import asdict
from itertools import chain

import data
from data import InputError, Record
from data.rewards import blind_to, load_reward, source_of
from lab import processes
from lab.policy import (Policy, load_policy, load_pretrained, new_policy, pick_device,
                        weights_hash)


class Work:
    """The data, the device, the reward, --init's policy, and the tokenizers that bases share."""

    def __init__(self, cfg):
        self.dataset = data.load_dataset(cfg.data)
        self.device = pick_device(cfg.device)
        self.toks, self.notes, self.base = {}, set(), None
        self.use_reward(cfg.reward)
        # A run is one on these data from these weights, wherever they lie.
        self.hashes = {"data_hash": data.data_hash(self.dataset)}
        if cfg.pretrained:
            self.hashes["data_hash"] += "-" + weights_hash(*load_pretrained(cfg.pretrained))
        if cfg.init:
            self.base = load_policy(cfg.init, self.device)
            self.hashes["base_hash"] = weights_hash(self.base.model, self.base.tok)
            self.check(self.base)

    def identity(self, cfg) -> dict:
        """What config.json holds: the flags, and hashes of what they are used on."""
        config = asdict(cfg) | self.hashes
        if code := source_of(cfg.reward):
            config["reward_hash"] = hashlib.sha256(code).hexdigest()[:16]
        # So many batches an update, however they are shared out.
        config["accumulate"] *= processes.size()
        return json.loads(json.dumps(config))

    def note(self, text: str) -> None:
        """Print what the user should know, once."""
        if text not in self.notes:
            print(f"note: {text}")
        self.notes.add(text)

    def use_reward(self, name: str) -> None:
        self.reward = load_reward(name)
        if blind := blind_to(name, [r.references for r in self.dataset["train"]]):
            self.note(blind)

    def new_policy(self, cfg) -> Policy:
        """Fresh weights, or --pretrained's; a tokenizer is learned once for a vocabulary."""
        policy = new_policy(cfg, self.dataset, self.device, self.toks.get(cfg.vocab_size))
        self.toks[cfg.vocab_size] = policy.tok
        self.check(policy)
        return policy

    def check(self, policy: Policy) -> None:
        """Say how many texts a policy will cut. Raises InputError for sources that do not fit."""
        if cut := check_lengths(self.dataset, policy):
            self.note(f"{cut} targets and static texts are longer than {policy.T} tokens and are "
                      f"cut")


def check_lengths(dataset: dict[str, list[Record]], policy: Policy) -> int:
    """How many targets and static texts will be cut to T. Raises InputError for a source that
    leaves no room for a text of T tokens."""
    T, room = policy.T, policy.model.config.block_size - policy.T

    def is_long(text: str, limit: int) -> bool:  # a text has at most a token a byte, and a space
        return len(text.encode()) >= limit and len(policy.tok.encode(text)) > limit

    cut = 0
    for r in chain(*dataset.values()):
        if is_long(r.source, room):
            raise InputError(f"{r.where} {r.source[:40]!r}: a source of more than {room} tokens, "
                             f"which is block_size less texts of {T}")
        cut += sum(is_long(text, T - 1) for text in {*r.target, *r.static})
    return cut


def note_ranking(cfg, work: Work) -> None:
    """Say so where the ranking of static texts teaches nothing: no source has two that differ."""
    groups = [r.static[:cfg.num_static] if cfg.stored == "data" else r.static
              for r in work.dataset["train"]]
    if cfg.credit > 0 and cfg.refresh == 0 and all(len(set(texts)) < 2 for texts in groups):
        work.note(f"{cfg.setting}: no source has two different static texts, so that their ranking "
                  f"teaches nothing; expected several (--mode candidates makes them)")
