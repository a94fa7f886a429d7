"""Semi-offline RL for text generation: section 3 of Chen et al. (ICML 2023, arXiv:2306.09712).

A static text y exists for a source x. At every position a coin M_t ~ Bernoulli(p_m) decides
whether the model draws the token (an action) or the static text provides it. In the masked setting
[MASK] is fed where the model draws. Nothing that is drawn is fed back, so one forward propagation
(FP) gives the logits of all positions, and K samples can be drawn from them.

    B  sources                  M_t  the mask: does the model act at position t?
    C  static texts a source    p_m  its rate
    K  samples a static text    R_k  reward of sample k, in [0, 1]
    N  rows: B·C static texts   A_k  its advantage: the reward less a baseline
    S  columns of a source      FP   one row through the model, once
    T  columns of a text        π    the policy: the model that is trained
    V  ids of the vocabulary    o_t  what the model has been fed before column t

One update calls, in this order: uniforms, sample_mask, feed, target_logits, act, advantage,
policy_loss; and beside it mle_loss. Tensors and plain values in, tensors out: no file, no config
object, no device name. Inputs are never changed.

Departures from the published algorithm: log-probabilities are those of the distribution that was
sampled (special tokens leave the action space *before* the softmax). Rewards enter as
A_k = R_k - mean R instead of the sum of R_k - R_j over all j, which is K times as much. Static
texts may be sampled anew from the policy (refresh), and may be ranked against each other (credit).
"""
import hashlib
from dataclasses import dataclass, replace

from model import GPT, PAD, draw, finish, generate, log_probs  # first: it prepares torch's threads

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# Randomness


def uniforms(shape: tuple[int, ...], *key) -> torch.Tensor:
    """Uniforms in [0, 1) that are a function of the key alone, e.g. (seed, number, "mask").

    The key is hashed into the seed of a fresh generator; float32, on the CPU. So evaluation cannot
    disturb training, and a run that goes on after a stop needs no saved generator."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(shape, generator=generator)


# --------------------------------------------------------------------------------------------------
# Mask: which positions are the model's


def sample_mask(u, lengths, p_m: float):
    """M_t for texts of the given lengths: uniforms u (N,T), lengths (N,) with EOS -> bool (N,T).

    Every position by its own coin; never the end token, never padding. Raises ValueError for p_m
    outside [0, 1]."""
    if not 0 <= p_m <= 1:
        raise ValueError(f"p_m is a probability, in 0..1; got {p_m}")
    before_end = torch.arange(u.size(1), device=u.device) < lengths[:, None] - 1
    return (u < p_m) & before_end


# --------------------------------------------------------------------------------------------------
# Feed: what the model sees


def observe(static, mask, observation: str, mask_id: int):
    """What is fed in place of the static text: static (N,T), mask (N,T) -> ids (N,T).

    `masked` puts [MASK] where M_t = 1; `static` leaves the old token there. Neither tells the model
    what stands in column t when it draws column t, since a causal model sees only the columns
    before. They differ in what the columns *behind* t see: that something was drawn, or a token
    which is no longer in the text. `static` may return the text itself, which nobody changes.
    Raises ValueError for another observation."""
    if observation == "masked":
        return static.masked_fill(mask, mask_id)
    if observation == "static":
        return static
    raise ValueError(f"expected masked or static; got observation {observation!r}")


def feed(model: GPT, src, pad, static, mask, u, observation: str, mask_id: int,
         temperature: float = 1.0, top_k: int = 0):
    """What the model is fed -> ids (rows,T), and the Rollout that had to be decoded first, or None.

    src (N,S), pad (N,), static (N,T), mask (N,T), uniforms u (N,K,T). `masked` and `static` give N
    rows, and decode nothing. `full` (and online, where every M_t is 1) lets the model see its own
    tokens: K texts are decoded without gradient, and are the N·K rows that are fed. Everything
    but `full` is left to `observe`."""
    if observation != "full":
        return observe(static, mask, observation, mask_id), None
    decoded = decode(model, src, pad, static, mask, u, temperature, top_k)
    return decoded.tokens.flatten(0, 1), decoded


def target_logits(model: GPT, src, pad, text):
    """One forward propagation a row: the logits (N,T,V) that predict every column of a text.

    src (N,S), pad (N,), text (N,T) as fed. The model is causal: the logits of column t come from
    the columns before t, so the last column of `text` is predicted, and never fed."""
    return model(torch.cat([src, text[:, :-1]], 1), pad, start=src.size(1) - 1)


# --------------------------------------------------------------------------------------------------
# Act: K samples


@dataclass
class Rollout:
    """K texts for each of N static texts; every setting fills the same record."""
    tokens: torch.Tensor  # (N,K,T) whole texts, EOS included, PAD behind it
    logp: torch.Tensor    # (N,K,T) log π(ŷ_t | o_t), 0 where not acted; `act` gives it a gradient
    acted: torch.Tensor   # (N,K,T) bool, M_t
    fp: int | torch.Tensor = 0  # FPs that sampled or scored; a tensor, so that nobody waits for it
    fp_grad: int = 0            # further ones, needed for the gradient alone


def act(logits, static, mask, u, decoded: Rollout | None = None,
        temperature: float = 1.0, top_k: int = 0) -> Rollout:
    """The K samples of every static text, with the log-probabilities that carry the gradient.

    logits of what `feed` gave: (N,T,V), or (N·K,T,V) where it decoded; static and mask (N,T),
    uniforms u (N,K,T). Where it decoded, the end token is an action: `end` stays True."""
    if decoded is None:
        return rollout_one_pass(logits, static, mask, u, temperature, top_k)
    given = rollout_given(logits, decoded.tokens, decoded.acted, temperature, top_k)
    return replace(given, fp=decoded.fp, fp_grad=decoded.fp_grad)


def rollout_one_pass(logits, static, mask, u, temperature: float = 1.0, top_k: int = 0) -> Rollout:
    """K samples of all masked positions from one set of logits: 1 FP a static text.

    logits (N,T,V), static (N,T) with PAD behind EOS, mask (N,T), uniforms u (N,K,T). The action
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


def rollout_given(logits, tokens, acted, temperature: float = 1.0, top_k: int = 0,
                  end: bool = True) -> Rollout:
    """Texts that exist already: tokens (N,K,T), acted (N,K,T), logits (N·K,T,V) -> Rollout.

    For the credit of static texts (offline learning is that alone), and for the second pass of
    the settings that decode. `end` says whether the end token is an action."""
    N, K, T = tokens.shape
    logp = log_probs(logits, temperature, top_k, end).view(N, K, T, -1)
    logp = logp.gather(-1, tokens[..., None])[..., 0]
    return Rollout(tokens, logp.masked_fill(~acted, 0), acted)


def decode(model: GPT, src, pad, static, mask, u, temperature: float = 1.0, top_k: int = 0,
           end: bool = True, use_cache: bool = True) -> Rollout:
    """Column by column, the model seeing its own tokens: an FP for every token that it acts on.

    src (N,S), pad (N,), static (N,T), mask (N,T) shared by the K samples, u (N,K,T). Online is
    mask = 1 everywhere, the columns behind the static text included: the model decides itself
    when to stop. `end=False` takes EOS out of the action space (fixed lengths). A step with a
    key/value cache counts as one FP, too. No gradient, logp is 0: `act` computes it again."""
    tokens = generate(model, src, pad, u.size(2), u, static=static, mask=mask,
                      temperature=temperature, top_k=top_k, end=end, use_cache=use_cache)
    acted = mask[:, None] & (tokens != model.config.vocab_size + PAD)
    rows = acted.size(0) * acted.size(1)
    return Rollout(tokens, torch.zeros_like(u), acted, fp=acted.sum(), fp_grad=rows)


def text_mask(tokens, vocab_size: int):
    """Which columns belong to the text, EOS included: tokens (..., T) -> bool (..., T)."""
    lengths = finish(tokens, vocab_size)[1]
    return torch.arange(tokens.size(-1), device=tokens.device) < lengths[..., None]


# --------------------------------------------------------------------------------------------------
# Advantage and loss: once, for every setting


def advantage(rewards, baseline: str = "mean", scale: bool = False):
    """A_k = R_k - baseline: rewards (N,K) -> (N,K). Above 0, a sample's tokens become likelier.

    `mean` of the K samples, the sample itself included: (1 - 1/K) times the unbiased estimate.
    `loo`, leave-one-out, the mean of the others: unbiased (for K = 1 it is 0: plain REINFORCE).
    `scale` divides by the population standard deviation of the row, as GRPO does, which is biased;
    with `loo`, too, it is that of all K rewards. Rows whose deviation is below 1e-4, and K = 1,
    are not divided. Where all rewards of a row are equal there is nothing to learn, and A is
    exactly 0 (but for `loo` with K = 1). Any other baseline need not be caught."""
    K = rewards.size(1)
    A = centred = rewards - rewards.mean(1, keepdim=True)
    if baseline == "loo":
        A = centred * (K / (K - 1)) if K > 1 else rewards
    if scale:
        deviation = centred.square().mean(1, keepdim=True).sqrt()
        A = torch.where(deviation > 1e-4, A / deviation, A)
    if baseline == "loo" and K == 1:
        return A
    # Not left to the subtraction: the mean of three times .1 is not .1 in floating point.
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return A.masked_fill(equal, 0)


def policy_loss(rollout: Rollout, A, length_norm: bool = False):
    """L_RL = - mean over texts of A_k · Σ_{M_t=1} log π(ŷ_t | o_t): A (N,K) -> scalar.

    `length_norm` divides a text's sum by the number of its acted positions. A text without acted
    positions counts as 0 in the mean and is not left out."""
    logp = rollout.logp.sum(2)  # (N,K)
    if length_norm:
        logp = logp / rollout.acted.sum(2).clamp(min=1)
    return -(A.detach() * logp).mean()


def mle_loss(logits, target, lengths):
    """Cross-entropy summed over the tokens of target (N,T), EOS included: logits (N,T,V) -> scalar.

    In nats; lengths (N,). Divide by lengths.sum() for the mean per token."""
    inside = torch.arange(target.size(1), device=target.device) < lengths[:, None]
    at = inside.nonzero(as_tuple=True)  # once: it waits for the device
    return F.cross_entropy(logits[at].float(), target[at], reduction="sum")


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
    """Depth inside a run of masked positions: mask (N,T) -> int (N,T), 1 for its first, else 0."""
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
