"""The policy: a model with what is needed to feed it, its checkpoint, and its texts' rewards."""
import hashlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch

import data
from data import InputError
from data.tokenizer import Tokenizer
from lab.files import write_whole
from model import GPT, GPTConfig, gpt2_config, load_gpt2


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


def pick_device(name: str) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise InputError(f"--device {name}: this machine has none, or this PyTorch was built "
                         f"without it; try auto")
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


def pretrained_shape(folder: str) -> dict[str, int]:
    """The flags of --pretrained's network."""
    try:
        shape = asdict(gpt2_config(folder))
    except ValueError as e:
        raise InputError(f"--pretrained {e}") from None
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    return {name: shape[name] for name in names}


def load_pretrained(folder: str) -> tuple[GPT, Tokenizer]:
    """GPT-2's weights and vocabulary. Raises InputError for a folder that does not hold them."""
    try:
        model, tok = load_gpt2(folder), Tokenizer.load(folder)
    except ValueError as e:
        raise InputError(f"--pretrained {e}") from None
    if tok.vocab_size != model.config.vocab_size:
        raise InputError(f"--pretrained {folder}: vocab.json has {tok.vocab_size - 3} tokens, the "
                         f"model {model.config.vocab_size - 3}")
    return model, tok


def new_policy(cfg, dataset, device, tok: Tokenizer | None = None) -> Policy:
    """Fresh weights, or --pretrained's; else the tokenizer is learned from the training texts
    unless given."""
    train, model = dataset["train"], None
    if cfg.pretrained:
        model, tok = load_pretrained(cfg.pretrained)
    elif tok is None:
        texts = [text for r in train for text in (r.source, *r.references, *r.target, *r.static)]
        tok = Tokenizer.train(list(dict.fromkeys(texts)), cfg.vocab_size)
    T = cfg.max_len
    if T == 0:
        texts = {text for r in train[:10_000] for text in (*r.target, *r.static)}
        T = min(cfg.block_size // 2, 1 + max(len(tok.encode(text)) for text in texts))
    torch.manual_seed(cfg.seed)
    shape = GPTConfig(tok.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd,
                      init_std=cfg.init_std)
    return Policy((model or GPT(shape)).to(device), tok, T, device)


def score(reward, policy: Policy, tokens, batch: data.Batch) -> torch.Tensor:
    """Rewards of ids (R,K,T) -> (R,K): K samples of each of R = B·C static texts, or the C static
    texts of each of R = B sources."""
    references = [texts for of_source in batch.references for texts in of_source]  # B·C lists
    sources = [source for source in batch.sources for _ in range(batch.static.size(1))]
    times = tokens.size(0) * tokens.size(1) // len(sources)
    scores = reward(policy.texts(tokens), [texts for texts in references for _ in range(times)],
                    [source for source in sources for _ in range(times)])
    return torch.as_tensor(scores, dtype=torch.float32, device=tokens.device).view(tokens.shape[:2])


# --------------------------------------------------------------------------------------------------
# Files


def save(state: dict, path: str) -> None:
    """A checkpoint, tensor by tensor: there is no second copy of it in memory."""
    write_whole(path, lambda file: torch.save(state, file))


def policy_state(policy: Policy, cfg) -> dict:
    """What best.pt holds, and a part of ckpt.pt."""
    return {"model": policy.model.state_dict(), "gpt": asdict(policy.model.config),
            "tokenizer": policy.tok.ranks, "T": policy.T, "config": asdict(cfg)}


def load(path: str) -> dict:
    """A checkpoint's state. Raises InputError when there is none, or it is not one of ours."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # no file, a folder, a truncated zip, pickles with code: many types
        raise InputError(f"{path}: no checkpoint that can be read ({first_line(e)})") from None
    needed = {"model", "gpt", "tokenizer", "T", "config"}
    if not isinstance(state, dict) or not needed <= set(state) or "init_std" not in state["config"]:
        raise InputError(f"{path}: expected a checkpoint of this edition of train.py")
    return state


def load_policy(path: str, device, state: dict | None = None) -> Policy:
    """The policy in a checkpoint. Raises InputError for weights of another shape than it states."""
    state = state or load(path)
    try:
        model, tok = GPT(GPTConfig(**state["gpt"])), Tokenizer.load(state["tokenizer"])
        model.load_state_dict(state["model"])
    except Exception as e:
        raise InputError(f"{path}: a checkpoint of another shape ({first_line(e)})") from None
    return Policy(model.to(device), tok, state["T"], device)


def first_line(e: Exception) -> str:
    return (str(e) or type(e).__name__).splitlines()[0][:100]


def weights_hash(model: GPT, tok: Tokenizer) -> str:
    """A fingerprint of the weights: a run is one that started from these, wherever they lie."""
    digest = hashlib.sha256(tok.ranks.encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
