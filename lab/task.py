"""The task of a run: its data, device, reward and policy; checkpoints; what is said beforehand.

User errors are InputErrors. What a user would not see in the figures, such as texts that are cut,
is printed as a note."""
import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain

import torch

import data
from data import InputError, Record
from data.rewards import blind_to, load_reward, source_of
from data.tokenizer import Tokenizer
from lab.files import write_whole
from lab.settings import Config
from model import GPT, GPTConfig, load_gpt2


@dataclass
class Policy:
    """A model, its tokenizer, the longest text T in tokens with its end, and where it runs."""
    model: GPT
    tok: Tokenizer
    T: int
    device: torch.device

    def texts(self, tokens: torch.Tensor) -> list[str]:
        """Ids (..., T) -> as many strings as there are rows."""
        return [self.tok.decode(ids) for ids in tokens.reshape(-1, tokens.size(-1)).tolist()]


class Task:
    """What all runs of a command share: data, device, rewards, --init's policy, tokenizers."""

    def __init__(self, cfg: Config):
        self.dataset = data.load_dataset(cfg.data)
        self.device = pick_device(cfg.device)
        self.init = load_policy(cfg.init, self.device) if cfg.init else None
        self.toks, self.rewards, self.notes = {}, {}, set()
        # A run is identified by its data and first weights, wherever they lie.
        self.hashes = {"data_hash": data.data_hash(self.dataset)}
        if cfg.pretrained:
            self.hashes["data_hash"] += "-" + weights_hash(*load_pretrained(cfg.pretrained))
        if self.init:
            self.hashes["base_hash"] = weights_hash(self.init.model, self.init.tok)
            self.check_lengths(self.init)

    def identity(self, cfg: Config, processes: int) -> dict:
        """What config.json holds: the flags, and hashes of what they are used on."""
        config = asdict(cfg) | self.hashes
        if code := source_of(cfg.reward):
            config["reward_hash"] = hashlib.sha256(code).hexdigest()[:16]
        config["accumulate"] *= processes  # batches per update, however they are shared out
        return json.loads(json.dumps(config))

    def note(self, text: str) -> None:
        """Print what the user should know, once."""
        if text not in self.notes:
            print(f"note: {text}")
        self.notes.add(text)

    def reward(self, name: str):
        """The reward of this name, loaded once."""
        if name not in self.rewards:
            self.rewards[name] = load_reward(name)
            if blind := blind_to(name, [r.references for r in self.dataset["train"]]):
                self.note(blind)
        return self.rewards[name]

    def new_policy(self, cfg: Config) -> Policy:
        """--init's policy, --pretrained's weights, or fresh ones, for which the training texts make
        one tokenizer per size of the vocabulary."""
        if self.init:
            return self.init
        train, size, model = self.dataset["train"], cfg.vocab_size, None
        if cfg.pretrained:
            model, self.toks[size] = load_pretrained(cfg.pretrained)
        elif size not in self.toks:
            texts = [t for r in train for t in (r.source, *r.references, *r.target, *r.static)]
            self.toks[size] = Tokenizer.train(list(dict.fromkeys(texts)), size)
        tok, T = self.toks[size], cfg.max_len
        if T == 0:
            longest = {text for r in train[:10_000] for text in (*r.target, *r.static)}
            longest = 1 + max(len(tok.encode(text)) for text in longest)
            T = min(cfg.block_size // 2, longest)
        torch.manual_seed(cfg.seed)
        shape = GPTConfig(tok.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd,
                          init_std=cfg.init_std)
        policy = Policy((model or GPT(shape)).to(self.device), tok, T, self.device)
        self.check_lengths(policy)
        return policy

    def check_lengths(self, policy: Policy) -> None:
        """Say how many texts a policy will cut. Raises InputError for sources that do not fit."""
        if cut := count_cut_texts(self.dataset, policy):
            self.note(f"{cut} targets and static texts are longer than {policy.T} tokens and are "
                      f"cut")

    def note_ranking(self, cfg: Config) -> None:
        """Say so if the ranking of stored texts teaches nothing: no source has two that differ."""
        groups = [r.static[:cfg.num_static] if cfg.stored == "data" else r.static
                  for r in self.dataset["train"]]
        if cfg.credit > 0 and all(len(set(texts)) < 2 for texts in groups):
            self.note(f"{cfg.setting}: no source has two different static texts, so that their "
                      f"ranking teaches nothing; expected several (--mode candidates makes them)")


def count_cut_texts(dataset: dict[str, list[Record]], policy: Policy) -> int:
    """How many targets and static texts will be cut to T. Raises InputError for sources that leave
    no room for a text of T tokens."""
    T, room = policy.T, policy.model.config.block_size - policy.T

    def is_long(text: str, limit: int) -> bool:  # at most one token per byte, and a space
        return len(text.encode()) >= limit and len(policy.tok.encode(text)) > limit

    records = list(chain(*dataset.values()))
    if long := [r for r in records if is_long(r.source, room)]:
        more = f", and {len(long) - 1} more" if len(long) > 1 else ""
        raise InputError(f"{long[0].where} {long[0].source[:40]!r}{more}: a source of more than "
                         f"{room} tokens, which is block_size minus texts of {T}")
    return sum(is_long(text, T - 1) for r in records for text in {*r.target, *r.static})


# --------------------------------------------------------------------------------------------------
# Device and model


def pick_device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise InputError(f"--device {name}: this machine has none, or this PyTorch was built "
                         f"without it; try auto")
    if name == "cuda":  # cuDNN plans attention anew for every shape, and decoding has many
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def machine_of(device: torch.device) -> str:
    """Where a run was made, for the report."""
    name = f"{device}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"PyTorch {torch.__version__.split('+')[0]}, {name}"


def autocast(device: torch.device):
    """bfloat16 on a GPU that has it in hardware; float32 elsewhere, the tested path."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def load_pretrained(folder: str) -> tuple[GPT, Tokenizer]:
    """GPT-2's weights and vocabulary. Raises InputError for a folder that does not hold them."""
    try:
        model, tok = load_gpt2(folder), Tokenizer.load(folder)
    except ValueError as e:
        raise InputError(f"--pretrained {e}") from None
    if tok.vocab_size != model.config.vocab_size:
        raise InputError(f"--pretrained {folder}: vocab.json has {tok.vocab_size - 3} tokens, the "
                         f"model {model.config.vocab_size - 3}")
    if not is_finite(model):
        raise InputError(f"--pretrained {folder}: some weights are not finite")
    return model, tok


def is_finite(model: GPT) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def score(reward, policy: Policy, tokens, batch: data.Batch, kept=None) -> torch.Tensor:
    """Rewards of ids (N,K,T) -> (N,K): K samples of each of N = B·C static texts, or the C static
    texts of each of N = B sources.

    kept: bool (B·C,), does anything of the static text stand in its samples? If so they are not
    scored against that text, which they would agree with for nothing. None means all do."""
    references = [texts for of_source in batch.references for texts in of_source]  # B·C lists
    C = batch.static.size(1)
    if kept is not None:
        references = [texts if keeps else batch.all_references[n // C]
                      for n, (texts, keeps) in enumerate(zip(references, kept.tolist()))]
    sources = [source for source in batch.sources for _ in range(C)]
    times = tokens.size(0) * tokens.size(1) // len(sources)
    scores = reward(policy.texts(tokens), [texts for texts in references for _ in range(times)],
                    [source for source in sources for _ in range(times)])
    return torch.as_tensor(scores, dtype=torch.float32, device=tokens.device).view(tokens.shape[:2])


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save(state: dict, path: str) -> None:
    """A checkpoint, tensor by tensor: there is no second copy of it in memory."""
    write_whole(path, lambda file: torch.save(state, file))


def policy_state(policy: Policy, cfg: Config) -> dict:
    """What best.pt holds, and a part of ckpt.pt."""
    return {"model": policy.model.state_dict(), "gpt": asdict(policy.model.config),
            "tokenizer": policy.tok.ranks, "T": policy.T, "config": asdict(cfg)}


def load(path: str) -> dict:
    """A checkpoint's state. Raises InputError if it cannot be read, or is not one of ours."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except Exception:  # a text, a truncated zip, a pickle with code: many types
        raise InputError(f"{path}: expected a checkpoint of train.py; this file is none, or only a "
                         f"part of one") from None
    needed = {"model", "gpt", "tokenizer", "T", "config"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise InputError(f"{path}: expected a checkpoint of train.py")
    if not isinstance(state["config"], dict) or "reuse" not in state["config"]:
        raise InputError(f"{path}: a checkpoint of an earlier edition of train.py, or of none")
    return state


def load_policy(path: str, device, state: dict | None = None) -> Policy:
    """The policy in a checkpoint. Raises InputError if its parts do not fit together."""
    state = state or load(path)
    try:
        model, tok = GPT(GPTConfig(**state["gpt"])), Tokenizer.load(state["tokenizer"])
        model.load_state_dict(state["model"])
        with torch.no_grad():  # heads that do not divide the width show here alone
            model(torch.zeros(1, 1, dtype=torch.long))
        fits = (tok.vocab_size == model.config.vocab_size and type(state["T"]) is int
                and 1 < state["T"] < model.config.block_size)
    except Exception as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise InputError(f"{path}: weights and shape do not fit ({reason:.100})") from None
    if not fits:
        raise InputError(f"{path}: its tokenizer or its longest text T does not fit its network")
    if not is_finite(model):
        raise InputError(f"{path}: some weights are not finite")
    return Policy(model.to(device), tok, state["T"], device)


def weights_hash(model: GPT, tok: Tokenizer) -> str:
    """A fingerprint of the weights: a run is one that started from these, wherever they lie."""
    digest = hashlib.sha256(tok.ranks.encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
