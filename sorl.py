"""Semi-offline RL for text generation: section 3 of Chen et al. (ICML 2023, arXiv:2306.09712) in Python.

A static text y exists for a source x. At every position a coin M_t ~ Bernoulli(p_m) decides whether the model samples
the token (an action) or the static text provides it. Feed [MASK] where the model's own tokens go, and one forward
propagation (FP) gives the logits of every action of every one of K samples.

    B sources   C static texts a source   K samples a static text   S source columns   T target columns   V vocabulary
    M_t (mask)  p_m its rate              R reward in [0, 1]        A advantage        FP one row, one pass

Read in order: randomness, mask, what the model observes, rollout, advantage, loss, diagnostics. Tensors and plain
values in, tensors out: no file, no config object, no device name. Inputs are never changed.

Departures from the published algorithm: log-probabilities are those of the distribution that was sampled (special
tokens leave the action space *before* the softmax); rewards enter as A_k = R_k - baseline, not as pairwise differences
(the same thing times K); the static text may be refreshed from the policy, and may get credit itself (README).
"""
import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import GPT, PAD, draw, finish, generate, log_probs

# ---------------------------------------------------------------------------------------------------------------------
# Randomness


def uniforms(shape: tuple[int, ...], *key) -> torch.Tensor:
    """Uniforms in [0, 1) that are a function of the key alone, e.g. (seed, step, "mask"); on the CPU, float32.

    Draw them for the whole global batch and slice: micro-batches and several processes then see the same numbers,
    evaluation cannot disturb training, and resuming needs no saved generator."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(shape, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# Mask: which positions are the model's

def sample_mask(u, lengths, p_m: float, kind: str = "bernoulli", tokens=None, starts_word=None):
    """M_t for texts of the given lengths: u (R,T) uniforms, lengths (R,) with EOS -> bool (R,T).

    Never the end token, never padding. kind: `bernoulli`, every position by its own coin; `count`, exactly
    round(p_m · length) positions; `word`, coins, and a word that was begun is finished (needs the static `tokens` (R,T)
    and `starts_word` (V,) bool: ids that begin a word). Raises ValueError for p_m outside [0, 1]."""
    if not 0 <= p_m <= 1:
        raise ValueError(f"p_m is a probability, in 0..1; got {p_m}")
    inside = torch.arange(u.size(1), device=u.device) < lengths[:, None] - 1  # (R,T) columns before EOS
    if kind == "count":
        n = (p_m * (lengths - 1).clamp(min=0)).round().long()
        rank = u.masked_fill(~inside, 2.0).argsort(1).argsort(1)  # 0 for the smallest uniform of a row
        return inside & (rank < n[:, None])
    mask = (u < p_m) & inside
    if kind == "word":
        goes_on = inside & ~starts_word[tokens]
        for t in range(1, u.size(1)):  # a token inside a word is masked if the one before it is
            mask[:, t] |= mask[:, t - 1] & goes_on[:, t]
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Observation: what the model is fed

def observe(static, mask, observation: str, mask_id: int):
    """The tokens fed in place of the text, (R,T): `masked`, [MASK] where M_t = 1; `static`, the static text as it is."""
    return static.masked_fill(mask, mask_id) if observation == "masked" else static


def target_logits(model: GPT, src, pad, text):
    """One forward propagation a row: src (R,S), pad (R,), text (R,T) as observed -> logits (R,T,V) that predict it.

    The last column of `text` is predicted, never fed."""
    return model(torch.cat([src, text[:, :-1]], 1), pad, start=src.size(1) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts: one record for all settings, which differ only in how they fill it

@dataclass
class Rollout:
    """K texts for each of R static texts (R = B·C), or for each of R = B sources."""
    tokens: torch.Tensor  # (R,K,T) whole texts, EOS included, PAD behind it
    logp: torch.Tensor    # (R,K,T) log π(ŷ_t | o_t), 0 where not acted; carries the gradient
    acted: torch.Tensor   # (R,K,T) bool, M_t
    fp: int | torch.Tensor = 0  # forward propagations that sampled or scored
    fp_grad: int = 0            # further ones, needed for the gradient alone


def rollout_one_pass(logits, static, mask, u, temperature: float = 1.0, top_k: int = 0) -> Rollout:
    """Semi-offline, `masked` or `static`: K samples of all masked positions from one set of logits, 1 FP a static text.

    logits (R,T,V), static (R,T) with PAD behind EOS, mask (R,T), uniforms u (R,K,T). The action space has no special
    tokens, so a sample has the length of its static text."""
    R, K, T = u.shape
    r, t = mask.nonzero(as_tuple=True)  # the N acted positions, shared by the K samples
    logp = log_probs(logits[r, t], temperature, top_k, end=False)  # (N,V)
    drawn = draw(logp.detach(), u[r, :, t])  # (N,K)
    tokens = static[:, None].repeat(1, K, 1)  # (R,K,T)
    tokens[r, :, t] = drawn
    zeros = logp.new_zeros(R, T, K)
    logp = zeros.index_put((r, t), logp.gather(1, drawn)).transpose(1, 2)  # (R,K,T)
    return Rollout(tokens, logp, mask[:, None].expand(R, K, T), fp=R)


def rollout_given(logits, tokens, acted, temperature: float = 1.0, top_k: int = 0, end: bool = True) -> Rollout:
    """Texts that exist already: log-probabilities of tokens (R,K,T) where acted, from logits (R·K,T,V).

    Offline learning (stored candidates, one FP each), the credit of a static text for its unmasked tokens (no FP of its
    own: the logits are there), and the gradient pass of the settings that decode. `end` as when they were sampled: is
    the end token an action?"""
    R, K, T = tokens.shape
    logp = log_probs(logits, temperature, top_k, end).view(R, K, T, -1).gather(-1, tokens[..., None])[..., 0]
    return Rollout(tokens, logp.masked_fill(~acted, 0), acted)


def decode(model: GPT, src, pad, static, mask, u, temperature: float = 1.0, top_k: int = 0, end: bool = True,
           use_cache: bool = True, generate=generate) -> Rollout:
    """Online and `full`: the model sees its own tokens, so a sample costs one FP for every token that it acts on.

    src (B,S), pad (B,), static (B,T), mask (B,T) shared by the K samples, u (B,K,T). Online is mask = 1 everywhere,
    the columns behind the static text included: the model decides itself when to stop. `end=False` takes EOS out of the
    action space (fixed lengths). No gradient: pass the result through `rollout_given`. `generate` is model.py's, or another
    that does the same."""
    tokens = generate(model, src, pad, u.size(2), u, static=static, mask=mask, temperature=temperature, top_k=top_k,
                      end=end, use_cache=use_cache)
    acted = mask[:, None] & (tokens != model.config.vocab_size + PAD)
    return Rollout(tokens, torch.zeros_like(u), acted, fp=acted.sum(), fp_grad=acted.size(0) * acted.size(1))


def text_mask(tokens, vocab_size: int):
    """Which columns belong to the text, EOS included: tokens (..., T) -> bool (..., T)."""
    lengths = finish(tokens, vocab_size)[1]
    return torch.arange(tokens.size(-1), device=tokens.device) < lengths[..., None]


# ---------------------------------------------------------------------------------------------------------------------
# Advantage and loss: once, for every setting

def advantage(rewards, baseline: str = "mean", greedy=None, scale: bool = False):
    """A_k = R_k - baseline: rewards (R,K) -> (R,K).

    `mean` of the K samples, the sample itself included, (1 - 1/K) times the unbiased estimate; `loo`, the mean of the
    others, unbiased (0 for K = 1: plain REINFORCE); `greedy` (R,), the reward of the greedy text (self-critical).
    `scale` divides by the standard deviation of the row (as GRPO does; biased, THEORY P14). Where all rewards of a row
    are equal there is nothing to learn, and A is exactly 0 (but for `greedy`, and `loo` with K = 1)."""
    K = rewards.size(1)
    centred = rewards - rewards.mean(1, keepdim=True)
    if baseline == "greedy":
        A = rewards - greedy[:, None]
    elif baseline == "loo":
        A = centred * (K / (K - 1)) if K > 1 else rewards
    else:
        A = centred
    if scale:  # where there is a spread to divide by
        sd = centred.square().mean(1, keepdim=True).sqrt()
        A = torch.where(sd > 1e-4, A / sd, A)
    nothing = (rewards == rewards[:, :1]).all(1, keepdim=True) & (baseline == "mean" or baseline == "loo" and K > 1)
    return A.masked_fill(nothing, 0)


def policy_loss(rollout: Rollout, A, length_norm: str = "none"):
    """L_RL = - mean over texts of A_k · Σ_{M_t=1} log π(ŷ_t | o_t): rollout (R,K,T), A (R,K) -> scalar.

    length_norm `masked` divides a text's sum by the number of its acted positions. A rollout that never acted gives 0."""
    logp = rollout.logp.sum(2)  # (R,K)
    if length_norm == "masked":
        logp = logp / rollout.acted.sum(2).clamp(min=1)
    return -(A.detach() * logp).mean()


def mle_loss(logits, target, lengths, label_smoothing: float = 0.0):
    """Cross-entropy summed over the tokens of target (R,T), EOS included: logits (R,T,V) -> scalar, nats.

    Divide by the token count of the *whole* batch, so that micro-batches add up to it."""
    inside = torch.arange(target.size(1), device=target.device) < lengths[:, None]
    at = inside.nonzero(as_tuple=True)  # once: it waits for the device
    return F.cross_entropy(logits[at].float(), target[at], label_smoothing=label_smoothing, reduction="sum")


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics: a reward curve alone hides a collapse

def entropy(logits, inside):
    """Mean entropy of the policy per position, nats: logits (..., T, V), inside (..., T) bool -> scalar."""
    logp = log_probs(logits[inside])
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0).sum(-1).mean()


def kl_divergence(logits, base_logits, inside):
    """Mean KL(π ‖ base) per position, nats, exact over the vocabulary at the observed prefixes -> scalar."""
    at = inside.nonzero(as_tuple=True)
    logp, logq = log_probs(logits[at]), log_probs(base_logits[at])
    return torch.where(logp > -torch.inf, logp.exp() * (logp - logq), 0).sum(-1).mean()


def distinct(texts: list[str], n: int = 2) -> float:
    """Distinct n-grams of words as a share of all of them (distinct-2, Li et al. 2016); 0 when there are none."""
    grams = [gram for text in texts for words in [text.split()] for gram in zip(*(words[i:] for i in range(n)))]
    return len(set(grams)) / max(1, len(grams))


def masked_runs(mask):
    """Depth inside a run of consecutive masked positions: mask (R,T) -> int (R,T), 1 for its first, 0 where unmasked."""
    depth = mask.long()
    for t in range(1, mask.size(1)):
        depth[:, t] = (depth[:, t - 1] + 1) * mask[:, t]
    return depth


def fill_accuracy(logits, static, mask, depths: int = 4) -> list[float | None]:
    """How often the greedy fill gives the static token back, by depth inside a masked run (1, 2, … `depths` and deeper).

    Falls with depth, because masked neighbours cannot coordinate; None where a depth does not occur."""
    right = log_probs(logits, end=False).argmax(-1) == static
    depth = masked_runs(mask).clamp(max=depths)
    return [right[depth == d].float().mean().item() if (depth == d).any() else None for d in range(1, depths + 1)]


def repetition(tokens, mask):
    """Share of neighbouring masked positions at which a sample repeats its own token: tokens (R,K,T), mask (R,T)."""
    pairs = (mask[:, 1:] & mask[:, :-1])[:, None].expand(-1, tokens.size(1), -1)
    same = tokens[..., 1:] == tokens[..., :-1]
    return same[pairs].float().mean() if pairs.any() else tokens.new_zeros((), dtype=torch.float)


def reward_by_token(rollout: Rollout, A, vocab_size: int):
    """Mean centred reward of the samples that drew each id, (V,) and how often it was drawn, (V,): the words that pay."""
    ids = rollout.tokens[rollout.acted]
    worth = A[..., None].expand_as(rollout.tokens)[rollout.acted]
    count = torch.zeros(vocab_size, device=ids.device).index_add(0, ids, torch.ones_like(worth))
    total = torch.zeros(vocab_size, device=ids.device).index_add(0, ids, worth)
    return total / count.clamp(min=1), count
