"""GPT in one file: a decoder-only transformer, its key/value cache, and how to draw text from it.

Pre-norm blocks, learned positions, tied embeddings, `scaled_dot_product_attention`. The model is
causal: the logits in column t see the columns up to t, and predict column t + 1.

Rows are padded on the left, so that every target starts in the same column; this padding is given
as a count per row, not found by comparing ids. The last four ids of the vocabulary are special, in
the order of the constants below. GPT-2's weights are read from a local folder (`load_gpt2`).
Left out: rotary positions, and anything that only pays above 100M parameters.
"""
import json
import math
import mmap
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
    tanh_gelu: bool = False  # GPT-2's approximation of the GELU
    # Of fresh Linear weights: GPT-2's. With .06 a model of this width learns sooner to copy words
    # of the source; if it sees the texts many times, it then overfits more.
    init_std: float = 0.02


class Cache:
    """Keys and values of the columns pushed so far.

    With `columns`, for decoding, room for so many is taken at the first push, and no more than
    will be used: rows that lie far apart are slow to read. Without, every push concatenates, so
    that gradients flow: autograd would copy a buffer that is written into."""

    def __init__(self, columns: int = 0):
        self.columns, self.length = columns, 0
        self.kv = {}  # (layer, "k" or "v") -> (rows, heads, columns, d)

    def append(self, name: tuple[int, str], new: torch.Tensor):
        """Put keys or values (rows, heads, new, d) after those so far -> those of all columns."""
        old, end = self.kv.get(name, new[:, :, :0]), self.length + new.size(2)
        if self.columns == 0:
            self.kv[name] = torch.cat([old, new], 2)
            return self.kv[name]
        if old.size(2) < end:
            rows, heads, _, d = new.shape
            self.kv[name] = new.new_empty(rows, heads, self.columns, d)
            self.kv[name][:, :, :self.length] = old
        self.kv[name][:, :, self.length:end] = new
        return self.kv[name][:, :, :end]

    def select(self, rows: torch.Tensor, skip: int = 0) -> None:
        """Keep these rows, in this order, without their first `skip` columns.

        An index may repeat (one prompt for several samples)."""
        for name, old in self.kv.items():
            self.kv[name] = old[:, :, skip:self.length].index_select(0, rows)
        self.length, self.columns = self.length - skip, max(0, self.columns - skip)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, visible, layer, cache):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,heads,T,d) each
        if cache is not None:
            k, v = cache.append((layer, "k"), k), cache.append((layer, "v"), v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(approximate="tanh" if config.tanh_gelu else "none"),
            nn.Linear(4 * config.n_embd, config.n_embd))

    def forward(self, x, visible, layer, cache):
        x = x + self.attn(self.ln_1(x), visible, layer, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """`pushed` counts what went through since it was last set to zero: rows with any text in
    them, and tokens that are not PAD (an int64 tensor of two numbers, on the model's device:
    counting does not wait for a GPU)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
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
        column), and the cache grows by them. Raises ValueError for a row of more than block_size
        tokens, its left padding not counted."""
        B, T = ids.shape
        past = cache.length if cache else 0
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
            position = (column - pad[:, None]).masked_fill(~filled, 0)
        # The largest position is read only if it may be too large: reading waits for a GPU.
        if past + T > self.config.block_size and position.max() >= self.config.block_size:
            raise ValueError(f"a row of {int(position.max()) + 1} tokens does not fit block_size "
                             f"{self.config.block_size}")
        x = self.wte(ids) + self.wpe(position)
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
SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
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
        V, T, n_layer, n_head, n_embd = (int(config[name]) for name in SIZES)
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path}: expected GPT-2's configuration ({e!r:.80})") from None
    for name, expected in SAME.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{path}: expected {name} {expected!r}, found {config[name]!r:.40}")
    return GPTConfig(V + 3, T, n_layer, n_head, n_embd, tanh_gelu=True)


def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a file in F32, F16 or BF16, by name, as views of it.

    Its first 8 bytes are the length of the header, the header is JSON (type, shape and place of
    each tensor), the numbers follow. Raises ValueError, of one line, for any other file."""
    tensors = {}
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        begin = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:begin]).items():
            if entry.get("dtype") in DTYPES:
                numbers = torch.frombuffer(
                    content, dtype=DTYPES[entry["dtype"]], count=math.prod(entry["shape"]),
                    offset=begin + entry["data_offsets"][0])
                tensors[name.removeprefix("transformer.")] = numbers.view(entry["shape"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path}: expected a whole safetensors file ({e!r:.80})") from None
    return tensors


@torch.no_grad()
def load_gpt2(folder: str) -> GPT:
    """GPT-2 with the weights in a folder, on the CPU, in float32.

    PAD, SEP and MASK begin as the mean of the embeddings. Raises ValueError, of one line, for
    other tensors than those of the network in config.json."""
    model, path = GPT(gpt2_config(folder)), os.path.join(folder, "model.safetensors")
    tensors = read_safetensors(path)
    for name, p in model.named_parameters():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if name == "wte.weight":
            p = p[:SEP]  # the ids of GPT-2; three more follow
        elif ".c_" in name and p.dim() == 2:
            p = p.T  # GPT-2's layers are (in,out), PyTorch's (out,in)
        weight = tensors.pop(name, None)
        if weight is None or weight.shape != p.shape:
            found = "none in F32, F16 or BF16" if weight is None else tuple(weight.shape)
            raise ValueError(f"{path}: {name}: expected shape {tuple(p.shape)}, found {found}")
        p.copy_(weight)
    if others := [name for name in tensors if not name.endswith(IGNORED)]:
        raise ValueError(f"{path}: {others[0]!r:.80}: the network of config.json has none")
    wte = model.wte.weight
    wte[EOS] = wte[PAD]  # <|endoftext|>
    wte[[PAD, SEP, MASK]] = wte[:SEP].mean(0)
    return model


# --------------------------------------------------------------------------------------------------
# Drawing text

def log_probs(logits, temperature: float = 1.0, top_k: int = 0, end: bool = True):
    """Logits (..., V) -> log-probabilities (..., V) of the distribution that is sampled.

    Temperature, top-k and banned ids act on the logits, before the one log_softmax, so the result
    is always normalised. PAD, SEP and MASK are never actions; EOS is one only if `end` (a text
    may stop). In float32, or in float64 if the logits are."""
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

    The same uniforms give the same tokens at any batch size. A token of probability 0 is never
    drawn: if rounding in a parallel sum leaves it a sliver of the CDF, the likeliest token takes
    its place."""
    cdf = logp.exp().cumsum(-1)
    ids = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)
    ids = ids.clamp(max=logp.size(-1) - 1)  # NaN weights would search past the end
    return torch.where(logp.gather(-1, ids) > -torch.inf, ids, logp.argmax(-1, keepdim=True))


def finish(tokens, vocab_size: int):
    """Put PAD after the first EOS: tokens (..., T) -> tokens (..., T), lengths (...) with EOS."""
    is_end = tokens == vocab_size + EOS
    after = is_end.cumsum(-1) - is_end.long() > 0
    return tokens.masked_fill(after, vocab_size + PAD), (~after).sum(-1)


def join(src, pad, text, kept, pad_id: int):
    """Each source followed by the first tokens of its text -> ids (B,W), pad (B,).

    src (B,S) left-padded, pad (B,), text (B,T), kept (B,) how many tokens of it. The rows are
    left-padded to end in the same column."""
    most = int(kept.max())
    ids = F.pad(torch.cat([src, text[:, :most]], 1), (most, 0), value=pad_id)
    column = torch.arange(src.size(1) + most, device=src.device)
    return ids.gather(1, kept[:, None] + column), pad + most - kept


@torch.no_grad()
def generate(model: GPT, src, pad, T: int, u=None, *, static=None, mask=None,
             temperature: float = 1.0, top_k: int = 0, end: bool = True):
    """Decode K texts of at most T tokens for every source -> ids (B,K,T), PAD after EOS.

    src (B,S) left-padded, pad (B,); uniforms u (B,K,T), or None for one greedy text. If `mask`
    (B,T) is given, only its columns are decoded and the others are taken from `static` (B,T), in
    which a text that has ended goes on reading EOS. What is kept before the first decoded column
    is pushed with the source, in one pass for the K texts; from there each row goes on column by
    column."""
    B, V, K = len(src), model.config.vocab_size, 1 if u is None else u.size(1)
    if mask is None:
        mask = torch.ones(B, T, dtype=torch.bool, device=src.device)
        static = src.new_full((B, T), V + EOS)
    text = static.masked_fill(static == V + PAD, V + EOS)
    mask = mask & (((text == V + EOS) & ~mask).cumsum(1) == 0)  # none after an end that is kept

    # The first and the last column to decode, (B,); 0 and -1 for a text without one.
    first = mask.long().argmax(1)
    last = (mask * torch.arange(1, T + 1, device=src.device)).amax(1) - 1
    steps = 1 + int((last - first).max())
    prompt, pad = join(src, pad, text, first, V + PAD)
    prompt, S = prompt.masked_fill(last[:, None] < 0, V + PAD), prompt.size(1)
    cache = Cache(S + steps - 1)  # the last token is never pushed

    row = torch.arange(B, device=src.device).repeat_interleave(K)  # (B·K,) the source of each text
    out, done = text[row], last[row] < 0  # (B·K,T), (B·K,)
    live = torch.arange(B * K, device=src.device)  # the rows still in the batch
    for step in range(steps):
        source = row[live]
        t = (first[source] + step).clamp(max=T - 1)  # the column that each row decodes
        acts = mask[source, t] & ~done[live]
        if step == 0:
            logits = model(prompt, pad, cache, start=S - 1)[row, 0]
            if K > 1:
                cache.select(row)
        else:
            pushed = out[live, t - 1].masked_fill(done[live], V + PAD)
            logits = model(pushed[:, None], pad[source], cache)[:, 0]

        logp = log_probs(logits, temperature, top_k, end)
        if u is None:
            token = logp.argmax(-1)
        else:
            token = draw(logp, u[source, live % K, t, None])[:, 0]
        out[live, t] = torch.where(acts, token, out[live, t])
        done[live] |= (out[live, t] == V + EOS) | (last[source] <= t)

        # Finished rows leave; not at every column, since that waits for a GPU.
        if step % 4 == 3:
            keep = torch.nonzero(~done[live]).squeeze(1)
            if len(keep) == 0:
                break
            if len(keep) < 0.8 * len(live):
                live = live[keep]
                padding = int(pad[row[live]].min())  # that of all rows is not read any more
                cache.select(keep, padding)
                pad = pad - padding

    # Autocast would keep the weights that it has cast without gradients here, and until PyTorch
    # 2.9 the forward propagation that follows would learn nothing.
    torch.clear_autocast_cache()
    return finish(out, V)[0].view(B, K, T)
