"""Semi-offline RL for text generation: section 3 of Chen et al. (ICML 2023, arXiv:2306.09712).

A static text y exists for a source x. At every position a coin M_t ~ Bernoulli(p_m) decides
whether the model draws the token (an action) or the static text provides it. In the masked setting
[MASK] is fed where the model draws. Nothing that is drawn is fed back, so one forward propagation
(FP) gives the logits of all positions, and K samples can be drawn from them.

    B  sources                    M_t  the mask: does the model act at position t?
    C  static texts per source    p_m  the share of positions at which it does
    K  samples per static text    R_k  reward of sample k, in [0, 1]
    N  static texts: N = B·C      A_k  its advantage: the reward minus a baseline
    S  columns of a source        FP   one row through the model, once
    T  columns of a text          π    the policy: the model that is trained
    V  ids of the vocabulary      o_t  what the model has been fed before column t
    F  rows that are fed: N, or N·K if the K samples of a text differ in what is fed

One update calls, in this order: uniforms, sample_mask or sample_tail, feed, target_logits, act,
advantage, policy_loss; and beside them mle_loss. Tensors and plain values in, tensors out: no file,
no config object, no device name. Inputs are never changed.

Departures from the published algorithm: log-probabilities are those of the distribution that was
sampled (special tokens leave the action space *before* the softmax). Rewards enter as
A_k = R_k - mean R instead of the sum of R_k - R_j over all j, which is K times as much. Beyond the
paper: static texts that the policy writes itself (refresh), the ranking of stored texts (credit),
masks that cut a text's tail off, and samples that serve several updates (reuse).
"""
import hashlib
from dataclasses import dataclass, replace

from model import (GPT, MASK, PAD, Cache, draw, finish, generate,  # before torch: see there
                   log_probs)

import torch

# --------------------------------------------------------------------------------------------------
# Randomness


def uniforms(shape: tuple[int, ...], *key) -> torch.Tensor:
    """Uniforms in [0, 1) that are a function of the key alone, e.g. (seed, number, "mask").

    The key is hashed into the seed of a fresh generator; float32, on the CPU. So evaluation cannot
    disturb training, and a run that continues after a stop needs no saved generator."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(shape, generator=generator)


# --------------------------------------------------------------------------------------------------
# Mask: which positions are the model's


def sample_mask(u, lengths, p_m: float):
    """Coins: M_t for texts of the given lengths. Uniforms u (N,T), lengths (N,) with EOS -> (N,T).

    Each position has its own coin; the end token, which a length counts, and padding are never
    masked; with T + 1 for a length all columns have coins. Raises ValueError for p_m outside
    [0, 1]."""
    check_rate(p_m)
    before_end = torch.arange(u.size(1), device=u.device) < lengths[:, None] - 1
    return (u < p_m) & before_end


def sample_tail(u, lengths, T: int, p_m: float):
    """A tail: the text is kept up to a cut c, and the model writes the rest and decides where it
    ends. Uniforms u (N,), lengths (N,) with EOS -> M_t (N,T), 1 from column c to the last one.

    c = min(L - 1, ⌊L·u^q⌋) for a text of length L, with q = p_m / (1 - p_m), so that the expected
    share that the model writes is p_m, to within 1/L. At p_m = 1/2 the cut is uniform; below that,
    nearly all cuts fall near the end, and only the last tokens learn (theory.py, P16). p_m = 1 is
    online; at p_m = 0 nothing is drawn. Raises ValueError for p_m outside [0, 1]."""
    check_rate(p_m)
    q = p_m / (1 - p_m) if p_m < 1 else torch.inf
    cut = (lengths * u ** q).long().clamp(max=lengths - 1)
    return (torch.arange(T, device=u.device) >= cut[:, None]) & (p_m > 0)


def check_rate(p_m: float) -> None:
    if not 0 <= p_m <= 1:  # NaN, too
        raise ValueError(f"p_m is a probability, in 0..1; got {p_m}")


# --------------------------------------------------------------------------------------------------
# Feed: what the model sees


def observe(static, mask, observation: str, vocab_size: int, noise=None):
    """What is fed in place of the static text: static (N,T), mask (N,T) -> ids (N,T).

    `masked` puts [MASK] where M_t = 1; `static` leaves the old token there. Neither tells the model
    what stands in column t when it draws column t, since a causal model sees only the columns
    before. They differ in what the columns *after* t see: that something was drawn, or a token
    which is no longer in the text. `static` may return the text itself, which is never changed.
    noise: uniforms (N,T) for an observation of your own that needs chance; these two need none.
    Raises ValueError for another observation."""
    if observation == "masked":
        return static.masked_fill(mask, vocab_size + MASK)
    if observation == "static":
        return static
    raise ValueError(f"expected masked or static; got observation {observation!r}")


def feed(model: GPT, src, pad, static, mask, u, observation: str, temperature: float = 1.0,
         top_k: int = 0, noise=None):
    """What the model is fed -> ids (F,T), and the Rollout that had to be decoded first, or None.

    src (B,S), pad (B,), static (N,T), mask (N,T), uniforms u (N,K,T). `full` (online, tails) lets
    the model see its own tokens: K texts are decoded without gradient, and are the F = N·K rows
    that are fed. Any other observation is made by `observe`, with F = N rows, and decodes nothing.
    """
    if observation != "full":
        return observe(static, mask, observation, model.config.vocab_size, noise), None
    texts = len(static) // len(src)  # per source
    src, pad = src.repeat_interleave(texts, 0), pad.repeat_interleave(texts, 0)
    decoded = decode(model, src, pad, static, mask, u, temperature, top_k)
    return decoded.tokens.flatten(0, 1), decoded


def target_logits(model: GPT, src, pad, text):
    """One forward propagation per row: the logits (F,T,V) that predict every column of a text.

    src (B,S), pad (B,), text (F,T) as fed, F / B texts for each source. The model is causal: the
    logits of column t come from the columns before t, so the last column of `text` is predicted,
    and never fed."""
    if len(text) == len(src):
        return model(torch.cat([src, text[:, :-1]], 1), pad, start=src.size(1) - 1)
    # A source is pushed once for all of its texts, which are then the columns that follow it.
    row = torch.arange(len(src), device=src.device).repeat_interleave(len(text) // len(src))
    cache = Cache()
    first = model(src, pad, cache, start=src.size(1) - 1)  # (B,1,V)
    cache.select(row)
    return torch.cat([first[row], model(text[:, :-1], pad[row], cache)], 1)


# --------------------------------------------------------------------------------------------------
# Act: K samples


@dataclass
class Rollout:
    """K texts for each of N static texts; every setting fills the same record."""
    tokens: torch.Tensor  # (N,K,T) whole texts, EOS included, PAD after it
    logp: torch.Tensor    # (N,K,T) log π(ŷ_t | o_t), 0 where not acted; `act` gives it a gradient
    acted: torch.Tensor   # (N,K,T) bool, M_t
    fp: int | torch.Tensor = 0  # FPs that sampled or scored; a tensor avoids a GPU sync
    fp_grad: int = 0            # further ones, needed for the gradient alone


def act(logits, static, mask, u, decoded: Rollout | None = None,
        temperature: float = 1.0, top_k: int = 0) -> Rollout:
    """The K samples of every static text, with the log-probabilities that carry the gradient.

    logits of what `feed` gave: (N,T,V), or (N·K,T,V) if it decoded; static and mask (N,T),
    uniforms u (N,K,T)."""
    if decoded is None:
        return rollout_one_pass(logits, static, mask, u, temperature, top_k)
    given = rollout_given(logits, decoded.tokens, decoded.acted, temperature, top_k)
    return replace(given, fp=decoded.fp, fp_grad=decoded.fp_grad)


def rollout_one_pass(logits, static, mask, u, temperature: float = 1.0, top_k: int = 0) -> Rollout:
    """K samples of all masked positions from one set of logits: 1 FP per static text.

    logits (N,T,V), static (N,T) with PAD after EOS, mask (N,T), uniforms u (N,K,T). The action
    space has no special tokens, so a sample has the length of its static text. `fp` is N, even
    for a text in which nothing is masked."""
    N, K, T = u.shape
    row, t = mask.nonzero(as_tuple=True)  # the m masked positions, shared by the K samples
    logp = log_probs(logits[row, t], temperature, top_k, end=False)  # (m,V)
    drawn = draw(logp.detach(), u[row, :, t])  # (m,K)

    tokens = static[:, None].repeat(1, K, 1)  # (N,K,T)
    tokens[row, :, t] = drawn
    at_mask = logp.gather(1, drawn)  # (m,K)
    logp = logp.new_zeros(N, T, K).index_put((row, t), at_mask).transpose(1, 2)  # (N,K,T)
    return Rollout(tokens, logp, mask[:, None].expand(N, K, T), fp=N)


def rollout_given(logits, tokens, acted, temperature: float = 1.0, top_k: int = 0) -> Rollout:
    """Texts that exist already: tokens (N,K,T), acted (N,K,T), logits (N·K,T,V) -> Rollout.

    For the ranking of stored texts (offline learning is that alone), and for the second pass of
    the settings that decode. The end token is an action, too."""
    N, K, T = tokens.shape
    logp = log_probs(logits, temperature, top_k).view(N, K, T, -1)
    logp = logp.gather(-1, tokens[..., None])[..., 0]
    return Rollout(tokens, logp.masked_fill(~acted, 0), acted)


def decode(model: GPT, src, pad, static, mask, u, temperature: float = 1.0,
           top_k: int = 0) -> Rollout:
    """Column by column, the model seeing its own tokens: one FP for every token that it draws.

    src (N,S), pad (N,), static (N,T), mask (N,T) shared by the K samples, u (N,K,T). Online is
    mask = 1 everywhere, the columns after the static text included: the model decides itself
    when to stop. A step with a key/value cache counts as one FP, too. No gradient, logp is 0:
    `act` computes it again."""
    tokens = generate(model, src, pad, u.size(2), u, static=static, mask=mask,
                      temperature=temperature, top_k=top_k)
    acted = mask[:, None] & (tokens != model.config.vocab_size + PAD)
    rows = acted.size(0) * acted.size(1)
    return Rollout(tokens, torch.zeros_like(u), acted, fp=acted.sum(), fp_grad=rows)


def text_mask(tokens, vocab_size: int):
    """Which columns belong to the text, EOS included: tokens (..., T) -> bool (..., T)."""
    lengths = finish(tokens, vocab_size)[1]
    return torch.arange(tokens.size(-1), device=tokens.device) < lengths[..., None]


# --------------------------------------------------------------------------------------------------
# Advantage and loss: once, for every setting


def advantage(rewards, baseline: str = "mean", scale: str = "none"):
    """A_k = R_k - baseline: rewards (N,K) -> (N,K). Above 0, a sample's tokens become likelier.

    baseline  mean    of the K samples, the sample itself included: (1 - 1/K) times the unbiased
                      estimate
              loo     leave-one-out, the mean of the others: unbiased (at K = 1 it is 0: plain
                      REINFORCE)
    scale     none
              source  divide by the population standard deviation of the row's K rewards, as GRPO
                      does; biased, and it blows the small differences of one exchanged token up
                      to the size of all others
              batch   divide by one such deviation, of all N·K centred rewards

    Deviations below 1e-4, and rows of K = 1, are not divided. If all rewards of a row are equal,
    there is nothing to learn, and A is exactly 0 (except for `loo` with K = 1). Raises ValueError
    for another baseline or scale."""
    if baseline not in ("mean", "loo") or scale not in ("none", "source", "batch"):
        raise ValueError(f"expected baseline mean or loo, scale none, source or batch; "
                         f"got {baseline!r}, {scale!r}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))  # 0 and 1 may be ints
    K = rewards.size(1)
    A = centred = rewards - rewards.mean(1, keepdim=True)
    if baseline == "loo":
        A = centred * (K / (K - 1)) if K > 1 else rewards
    if scale != "none":
        squares = centred.square()
        variance = squares.mean(1, keepdim=True) if scale == "source" else squares.mean()
        deviation = variance.sqrt()
        A = torch.where(deviation > 1e-4, A / deviation, A)
    if baseline == "loo" and K == 1:
        return A
    # Not left to the subtraction: the mean of three times .1 is not .1 in floating point.
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return A.masked_fill(equal, 0)


CLIP = 0.2  # ε: how far from 1 a token's ratio may go before its push ends


def policy_loss(rollout: Rollout, A, before=None):
    """L_RL = - mean over texts of A_k · Σ_{M_t=1} log π(ŷ_t | o_t): A (N,K) -> scalar.

    A text without acted positions counts as 0 in the mean and is not left out.

    before (N,K,T): for samples that an earlier policy drew (`reuse`), the log-probabilities that
    it gave them. A token's term is then PPO's min(A·ρ, A·clip(ρ, 1-ε, 1+ε)), ρ = π / π_before: it
    stops pushing once the token has moved by ε in the direction of A. At ρ = 1 the gradient is
    that of the plain form, so with the scale `source` and n updates per sample, online is GRPO with
    n inner updates, but for its division by a text's length (Shao et al. 2024, arXiv:2402.03300).
    """
    if before is None:
        return -(A.detach() * rollout.logp.sum(2)).mean()
    A = A.detach()[..., None]  # (N,K,1)
    ratio = (rollout.logp - before).exp()  # (N,K,T)
    push = torch.minimum(A * ratio, A * ratio.clamp(1 - CLIP, 1 + CLIP))
    return -push.masked_fill(~rollout.acted, 0).sum(2).mean()


def mle_loss(logits, target, lengths):
    """Cross-entropy summed over the tokens of target (N,T), EOS included: logits (N,T,V) -> scalar.

    In nats; lengths (N,). Divide by lengths.sum() for the mean per token."""
    inside = torch.arange(target.size(1), device=target.device) < lengths[:, None]
    at = inside.nonzero(as_tuple=True)  # once: it waits for the device
    return torch.nn.functional.cross_entropy(logits[at].float(), target[at], reduction="sum")


# --------------------------------------------------------------------------------------------------
# Distance from the base, and diagnostics: a reward curve alone hides a collapse


def entropy(logits, inside):
    """Mean entropy of the policy per position, nats: logits (..., T, V), inside (..., T) bool."""
    p = log_probs(logits[inside]).exp()
    return torch.special.entr(p).sum(-1).mean()  # -p ln p, and 0 for p = 0


def kl_divergence(logits, base_logits, inside):
    """Mean KL(π ‖ base) per position, nats: both logits (N,T,V), inside (N,T) bool -> scalar.

    Exact over the vocabulary, at temperature 1, with the end token, for the prefixes that were
    fed; a loss term (--kl_weight) as well as a diagnostic."""
    at = inside.nonzero(as_tuple=True)
    logp = log_probs(logits[at])
    # The ratio needs no gradient of its own: the sum of p ∇log p = ∇p over the vocabulary is 0.
    ratio = logp.detach() - log_probs(base_logits[at])
    ratio = ratio.masked_fill(logp == -torch.inf, 0)
    return (logp.exp() * ratio).sum(-1).mean()


def distinct(texts: list[str], n: int = 2) -> float:
    """Distinct n-grams of words as a share of all of them (distinct-2, Li et al. 2016)."""
    grams = []
    for text in texts:
        words = text.split()
        grams += zip(*(words[i:] for i in range(n)))
    return len(set(grams)) / max(1, len(grams))


def masked_runs(mask):
    """Depth inside a run of masked positions: mask (N,T) -> int (N,T): 1, 2, … in a run, else 0."""
    depth = mask.long()
    for t in range(1, mask.size(1)):
        depth[:, t] = (depth[:, t - 1] + 1) * mask[:, t]
    return depth


def fill_accuracy(logits, static, mask, depths: int = 4) -> list[float | None]:
    """How often the likeliest fill gives the static token back, by depth inside a masked run.

    logits (N,T,V), static and mask (N,T) -> a share for depth 1, 2, … and for `depths` or more,
    None where a depth does not occur. It falls with depth, because the columns just before are
    hidden, too."""
    right = logits[..., :PAD].argmax(-1) == static
    depth = masked_runs(mask).clamp(max=depths)
    figures = []
    for d in range(1, depths + 1):
        at = depth == d
        figures.append(right[at].float().mean().item() if at.any() else None)
    return figures


def repetition(tokens, mask):
    """Share of neighbouring masked positions at which a sample repeats its own token.

    tokens (N,K,T), mask (N,T) -> scalar."""
    pairs = (mask[:, 1:] & mask[:, :-1])[:, None]  # (N,1,T-1)
    same = pairs & (tokens[..., 1:] == tokens[..., :-1])  # (N,K,T-1)
    return same.sum() / (pairs.sum() * tokens.size(1)).clamp(min=1)


def reward_by_token(rollout: Rollout, A, vocab_size: int):
    """Which words pay: the mean advantage of the samples that drew each id, and how often it was.

    A (N,K) -> (V,) and (V,)."""
    ids = rollout.tokens[rollout.acted]
    A = A[..., None].expand_as(rollout.tokens)[rollout.acted]
    count = torch.zeros(vocab_size, device=ids.device).index_add(0, ids, torch.ones_like(A))
    total = torch.zeros(vocab_size, device=ids.device).index_add(0, ids, A)
    return total / count.clamp(min=1), count
