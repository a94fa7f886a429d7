"""What all runs of a command share, and what is said of it before any training.

Mistakes are InputErrors; what a user would not see in the figures, such as texts that are cut, is
a note."""
from dataclasses import asdict

import data
from data import InputError, Record
from data.rewards import blind_to, load_reward
from lab.policy import (Policy, load_policy, load_pretrained, new_policy, pick_device,
                        weights_hash)


class Work:
    """The data and their hash, the device, the reward; and the tokenizers that bases share."""

    def __init__(self, cfg):
        self.dataset = data.load_dataset(cfg.data)
        self.data_hash = data.data_hash(self.dataset)
        self.device = pick_device(cfg.device)
        if cfg.pretrained:  # a part of what a run is made from, wherever the folder lies
            self.data_hash += "-" + weights_hash(*load_pretrained(cfg.pretrained))
        self.toks, self.notes = {}, set()
        self.use_reward(cfg.reward)

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
        """Say which texts a policy will cut. Raises InputError for sources that do not fit."""
        for kind, count in check_lengths(self.dataset, policy).items():
            if count:
                self.note(f"{count} {kind} are longer than {policy.T} tokens and are cut")


def check_lengths(dataset: dict[str, list[Record]], policy: Policy) -> dict[str, int]:
    """How many targets and static texts will be cut to T.

    Raises InputError for a source that leaves no room for a text of T tokens."""
    tok, T, block_size = policy.tok, policy.T, policy.model.config.block_size
    room = block_size - T

    def tokens(text: str) -> int:  # with its end; a text has at most one token a byte, and a space
        bound = len(text.encode()) + 2
        return bound if bound <= min(T, room) else len(tok.encode(text)) + 1

    cut = {"targets": 0, "static texts": 0}
    for split, records in dataset.items():
        for number, r in enumerate(records, 1):
            if tokens(r.source) > room + 1:
                place = r.where or f"{split} record {number}"
                raise InputError(
                    f"{place}: source of {tokens(r.source) - 1} tokens; expected at most {room} "
                    f"(block_size {block_size} less texts of {T})")
            cut["targets"] += sum(tokens(text) > T for text in r.target)
            if r.static is not r.target:
                cut["static texts"] += sum(tokens(text) > T for text in r.static)
    return cut


def nothing_to_learn(cfg, work: Work) -> str:
    """Why nothing can be learned from these data in this setting; "" where something can.

    Rewards are compared within a group: the K samples of a static text, the C static texts of a
    source. A group whose texts are equal teaches nothing."""
    train, C = work.dataset["train"], cfg.num_static
    ranked = sum(len(set((r.static * C)[:C] if cfg.stored == "data" else r.static)) > 1
                 for r in train)
    if cfg.credit == 0 or cfg.refresh > 0 or ranked > 0:
        return ""
    reason = (f"{cfg.setting}: no source has two different static texts, so there is nothing to "
              f"rank; expected several texts in static (--mode candidates makes them)")
    if cfg.p_m > 0:
        work.note(reason)
        return ""
    return reason


def given_base(cfg, given: dict, work: Work) -> Policy:
    """The policy in --init. Raises InputError for flags that ask for another shape than it has."""
    base = load_policy(cfg.init, work.device)
    has = asdict(base.model.config) | {"max_len": base.T}
    for name in ("n_layer", "n_embd", "block_size", "max_len", "vocab_size"):
        if name in given and given[name] != has[name]:
            raise InputError(f"{cfg.init}: a model of another shape or vocabulary; it has {name} "
                             f"{has[name]}, not {given[name]}")
    work.check(base)
    return base
