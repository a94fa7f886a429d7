"""GPT in one file: a decoder-only transformer, its key/value cache, and how to draw text from it.

Pre-norm blocks, learned positions, tied embeddings, `scaled_dot_product_attention`. The model is
causal: the logits in column t see the columns up to t, and predict column t + 1.

Rows are padded on the left, so that every target starts in the same column; padding is described
by a count per row, never found by comparing ids. The last four ids of the vocabulary are special,
in the order of the constants below. GPT-2's weights are read from a local folder (`load_gpt2`).
Left out: rotary positions, and anything that only pays above 100M parameters.
"""
import json
import math
import operator
import os
from dataclasses import dataclass

# Before torch: threads that spin while they wait make a busy machine five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn as nn
import torch.nn.functional as F

# Offsets from the vocabulary's end: the id of EOS is vocab_size + EOS.
PAD, SEP, EOS, MASK = -4, -3, -2, -1


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 128  # longest row: source, SEP and target together
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    tanh_gelu: bool = False  # GPT-2's approximation of the GELU
    # Of Linear weights. From GPT-2's 0.02 a model of this width learns much later to copy words of
    # the source; where it passes over the texts many times, it overfits less.
    init_std: float = 0.06


class Cache:
    """Keys and values of the columns pushed so far.

    Room for `columns` of them is taken at the first push, and no more than will be used: rows
    that lie far apart are slow to read."""

    def __init__(self, config: GPTConfig, columns: int):
        self.config, self.columns = config, columns
        self.kv, self.length = None, 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Write k, v (rows, heads, new, d) behind the columns so far -> all columns."""
        if self.kv is None:
            rows, heads, _, d = k.shape
            self.kv = k.new_empty(self.config.n_layer, 2, rows, heads, self.columns, d)
        end = self.length + k.size(2)
        self.kv[layer, 0, :, :, self.length:end] = k
        self.kv[layer, 1, :, :, self.length:end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; an index may repeat (one prompt for several samples)."""
        old = self.kv
        self.kv = old.new_empty(*old.shape[:2], len(rows), *old.shape[3:])
        self.kv[..., :self.length, :] = old[..., :self.length, :].index_select(2, rows)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, visible, layer, cache):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,heads,T,d) each
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None,
            dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(approximate="tanh" if config.tanh_gelu else "none"),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.dropout),
        )

    def forward(self, x, visible, layer, cache):
        x = x + self.attn(self.ln_1(x), visible, layer, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """`pushed` counts what really went through since it was last set to zero: rows with any text
    in them, and tokens that are not PAD (an int64 tensor of two numbers, on the model's device,
    so that counting never waits for it)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.register_buffer("pushed", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.apply(self._init)
        for name, p in self.named_parameters():
            # The residual stream adds 2 n_layer terms: keep its variance near 1.
            if name.endswith(("proj.weight", "mlp.2.weight")):
                nn.init.normal_(p, std=config.init_std / math.sqrt(2 * config.n_layer))

    def _init(self, module):
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.init_std)
            nn.init.zeros_(module.bias)

    def forward(self, ids, pad=None, cache=None, start: int = 0):
        """ids (B,T), pad (B,) left-pad columns of each row -> logits (B,T-start,V) from `start` on.

        With a cache, ids are the columns that follow those already in it (all rows at the same
        column), and the cache grows by them. Raises ValueError when a row would be longer than
        block_size."""
        B, T = ids.shape
        past = cache.length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(f"a row of {past + T} columns does not fit block_size "
                             f"{self.config.block_size}")
        filled = ids != self.config.vocab_size + PAD
        self.pushed += torch.stack([filled.any(1).sum(), filled.sum()])

        column = torch.arange(past, past + T, device=ids.device)
        if pad is None and past == 0:
            visible, position = None, column  # plain causal attention, the fast path
        else:
            pad = ids.new_zeros(B) if pad is None else pad
            key = torch.arange(past + T, device=ids.device)
            visible = (key >= pad[:, None, None]) & (key <= column[:, None])  # (B,T,past+T)
            visible = visible | (key == column[:, None])  # padding sees itself, or it is NaN
            visible = visible.unsqueeze(1)  # the same for every head
            position = (column - pad[:, None]).clamp(min=0)
        x = self.drop(self.wte(ids) + self.wpe(position))
        for layer, block in enumerate(self.blocks):
            x = block(x, visible, layer, cache)
        if cache is not None:
            cache.length += T
        return F.linear(self.ln_f(x[:, start:]), self.wte.weight)


# --------------------------------------------------------------------------------------------------
# GPT-2 (Radford et al. 2019) as it is published: config.json and model.safetensors in a folder

SAME = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True}  # with another value it is another network
MOST = {"vocab_size": 10 ** 6, "n_positions": 10 ** 6, "n_layer": 1000, "n_head": 1000,
        "n_embd": 10 ** 5}  # the sizes, and how much of each is believed of a file
NAMES = {"blocks.": "h.", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj",
         "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}  # ours -> GPT-2's
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # causal masks; wte once more
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gpt2_config(folder: str) -> GPTConfig:
    """The network that a folder's config.json describes, with our special ids.

    EOS is <|endoftext|>, the last of GPT-2's ids; PAD, SEP and MASK are three more. Raises
    ValueError, of one line, for any other network."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = {"model_type": None, **json.load(file)}
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: expected a JSON object ({e!s:.80})") from None
    for name, expected in SAME.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{path}: expected {name} {expected!r}, found {config[name]!r:.40}")
    for name, most in MOST.items():
        size = config.get(name)
        if type(size) is not int or not 0 < size <= most:
            raise ValueError(f"{path}: {name}: expected a whole number from 1 to {most:,}, found "
                             f"{size!r:.40}")
    if config["n_embd"] % config["n_head"]:
        raise ValueError(f"{path}: n_embd {config['n_embd']}: expected a multiple of n_head = "
                         f"{config['n_head']}")
    return GPTConfig(config["vocab_size"] + 3, config["n_positions"], config["n_layer"],
                     config["n_head"], config["n_embd"], tanh_gelu=True)


def safetensors_header(file, path: str) -> tuple[dict, int]:
    """What a file holds, name -> (dtype, shape, first byte, end), and where byte 0 of that is.

    8 bytes count those of the header, the header is JSON, then come the numbers, one tensor after
    the other. Raises ValueError where they do not fill the file."""
    size = os.path.getsize(path)
    begin = 8 + int.from_bytes(file.read(8), "little")
    if begin > size:
        raise ValueError(f"{path}: not a safetensors file, or cut short: a header of {begin - 8:,} "
                         f"bytes in a file of {size:,}")
    try:
        entries = {}
        for name, entry in json.loads(file.read(begin - 8)).items():
            if name != "__metadata__":
                first, end = map(operator.index, entry["data_offsets"])
                name = name.removeprefix("transformer.")
                entries[name] = str(entry["dtype"]), tuple(entry["shape"]), first, end
        firsts, ends = zip(*sorted(entry[2:] for entry in entries.values()))
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: not a safetensors header ({e!s:.80})") from None
    if [*firsts, size - begin] != [0, *ends]:
        raise ValueError(f"{path}: cut short, or sizes that are not true: expected tensors one "
                         f"after the other, up to the file's {size:,} bytes; they end at "
                         f"{begin + ends[-1]:,}")
    return entries, begin


def read_safetensors(path: str, shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """The tensors of these names and shapes, in float32.

    All is checked before any is read, and nothing in the file can run. Raises ValueError, of one
    line, for a file that lacks one of them, or that holds others."""
    try:
        file = open(path, "rb")
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror}); weights in several files, or in "
                         f"pytorch_model.bin, are not understood") from None
    with file:
        entries, begin = safetensors_header(file, path)
        for name in sorted(entries.keys() - shapes.keys()):
            if not name.endswith(IGNORED):
                raise ValueError(f"{path}: {name!r:.80}: the network of config.json has none")
        for name, shape in shapes.items():
            dtype, found, first, end = entries.get(name, ("nothing", (), 0, 0))
            width = DTYPES[dtype].itemsize if dtype in DTYPES else 0
            if width == 0 or found != shape or end - first != math.prod(shape) * width:
                raise ValueError(f"{path}: {name}: expected {shape} in F32, F16 or BF16, found "
                                 f"{found!r:.60} in {dtype!r:.20}, {end - first:,} bytes")
        weights = {}
        for name, (dtype, _, first, end) in entries.items():
            if name in shapes:
                raw = torch.empty(end - first, dtype=torch.uint8)
                file.seek(begin + first)
                file.readinto(raw.numpy())
                weights[name] = raw.view(DTYPES[dtype]).view(shapes[name]).float()
    return weights


def load_gpt2(folder: str) -> GPT:
    """GPT-2 with the weights in a folder, on the CPU, in float32.

    PAD, SEP and MASK begin as the mean of the embeddings. Raises ValueError, of one line, for a
    folder that does not hold what is expected."""
    def turned(name, weight):  # GPT-2's layers are (in,out), PyTorch's (out,in)
        return weight.T if ".c_" in name and weight.dim() == 2 else weight

    config = gpt2_config(folder)
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    names, shapes = {}, {}
    for ours, p in model.named_parameters():
        name = ours
        for old, new in NAMES.items():
            name = name.replace(old, new)
        names[ours], shapes[name] = name, tuple(turned(name, p).shape)
    shapes["wte.weight"] = config.vocab_size - 3, config.n_embd

    weights, state = read_safetensors(os.path.join(folder, "model.safetensors"), shapes), {}
    for ours, name in names.items():
        state[ours] = turned(name, weights.pop(name)).contiguous()
    wte = state["wte.weight"]
    mean = wte.mean(0, keepdim=True)
    state["wte.weight"] = torch.cat([wte[:-1], mean, mean, wte[-1:], mean])
    model.load_state_dict(state, assign=True)
    model.pushed = torch.zeros(2, dtype=torch.int64)
    return model


# --------------------------------------------------------------------------------------------------
# Drawing text

def log_probs(logits, temperature: float = 1.0, top_k: int = 0, end: bool = True):
    """Logits (..., V) -> log-probabilities (..., V) of the distribution that is sampled.

    Temperature, top-k and banned ids act on the logits, before the one log_softmax, so the result
    is always normalised. PAD, SEP and MASK are never actions; EOS is one only where `end` (a text
    may stop there). In float32, or float64 where the logits are."""
    V, dtype = logits.size(-1), torch.promote_types(logits.dtype, torch.float32)
    banned = torch.zeros(V, dtype=dtype, device=logits.device)
    banned[PAD:] = -torch.inf
    if end:
        banned[EOS] = 0
    logits = logits + banned  # not masked_fill: the gradient of a sum is no new table
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < V + PAD + end:
        kth = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return logits.log_softmax(-1)


def draw(logp, u):
    """Tokens by inverse CDF: logp (..., V) and uniforms u (..., K) in [0, 1) -> ids (..., K).

    The same uniforms give the same tokens on any batch size. A token of probability 0 is never
    drawn: where a parallel sum rounds, and so leaves it a sliver of the CDF, the likeliest token
    takes its place."""
    cdf = logp.exp().cumsum(-1)
    ids = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)
    ids = ids.clamp(max=logp.size(-1) - 1)  # NaN weights would search past the end
    return torch.where(logp.gather(-1, ids) > -torch.inf, ids, logp.argmax(-1, keepdim=True))


def finish(tokens, vocab_size: int):
    """Put PAD behind the first EOS: tokens (..., T) -> tokens (..., T), lengths (...) with EOS."""
    is_end = tokens == vocab_size + EOS
    after = is_end.cumsum(-1) - is_end.long() > 0
    return tokens.masked_fill(after, vocab_size + PAD), (~after).sum(-1)


@torch.no_grad()
def generate(model: GPT, src, pad, T: int, u=None, *, static=None, mask=None,
             temperature: float = 1.0, top_k: int = 0, end: bool = True, use_cache: bool = True):
    """Decode K texts of at most T tokens for every source -> ids (B,K,T), PAD after EOS.

    src (B,S) left-padded, pad (B,); uniforms u (B,K,T), or None for one greedy text. Where `mask`
    (B,T) is given, only its columns are decoded and the others are taken from `static` (B,T), in
    which a text that has ended goes on reading EOS. `use_cache=False` pushes the whole prefix
    again for each decoded column: slow, and what the cache is tested against."""
    B, S = src.shape
    V, K = model.config.vocab_size, 1 if u is None else u.size(1)
    row = torch.arange(B, device=src.device).repeat_interleave(K)  # (R,) the source of each row
    if mask is None:
        mask = torch.ones(B, T, dtype=torch.bool, device=src.device)
        static = src.new_full((B, T), V + EOS)
    out = static.masked_fill(static == V + PAD, V + EOS)[row]  # (R,T), R = B·K

    # The last column to decode, (B,); -1 where there is none.
    last = (mask * torch.arange(1, T + 1, device=src.device)).amax(1) - 1
    done = last[row] < 0  # (R,)
    live = torch.arange(B * K, device=src.device)  # the rows still in the batch
    cache = Cache(model.config, S + T - 1) if use_cache else None  # the last token is never pushed
    for t in range(T):
        acts = mask[row[live], t] & ~done[live]
        if cache is None:
            prefix = torch.cat([src[row], out[:, :t]], 1).masked_fill(~acts[:, None], V + PAD)
            logits = model(prefix, pad[row], start=S + t - 1)[:, 0]
        elif t == 0:  # the prompt's pass is shared by the K samples of a source
            prompt = src.masked_fill(last[:, None] < 0, V + PAD)
            logits = model(prompt, pad, cache, start=S - 1)[:, 0]
            if K > 1:
                logits = logits.repeat_interleave(K, 0)
                cache.select(row)
        else:
            pushed = out[live, t - 1].masked_fill(done[live], V + PAD)
            logits = model(pushed[:, None], pad[row[live]], cache)[:, 0]

        logp = log_probs(logits, temperature, top_k, end)
        if u is None:
            token = logp.argmax(-1)
        else:
            token = draw(logp, u[row[live], live % K, t, None])[:, 0]
        out[live, t] = torch.where(acts, token, out[live, t])
        done[live] |= (out[live, t] == V + EOS) | (last[row[live]] <= t)

        # Finished rows leave; not at every column, since that waits for the device.
        if t % 4 == 3:
            keep = torch.nonzero(~done[live]).squeeze(1)
            if len(keep) == 0:
                break
            if use_cache and len(keep) < 0.8 * len(live):
                cache.select(keep)
                live = live[keep]

    # Autocast would keep the weights that it has cast without gradients here, and until PyTorch
    # 2.9 the forward propagation that follows would learn nothing.
    torch.clear_autocast_cache()
    return finish(out, V)[0].view(B, K, T)
