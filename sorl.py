"""Semi-offline RL for text generation: section 3 of Chen et al. (ICML 2023, arXiv:2306.09712).

A static text y exists for a source x. At every position a coin M_t ~ Bernoulli(p_m) decides
whether the model samples the token (an action) or the static text provides it. Feed [MASK] where
the model's own tokens go, and one forward propagation (FP) gives the logits of every action of
every one of K samples.

    B  sources                  M_t  the mask: does the model act at position t?
    C  static texts a source    p_m  its rate
    K  samples a static text    R    reward in [0, 1]; as a size: rows, B·C or B·K
    S  columns of a source      A    advantage
    T  columns of a text        FP   one row through the model, once
    V  ids of the vocabulary    π    the policy, that is, the model that is trained

One update reads: uniforms, sample_mask, feed, target_logits, act, (the reward,) advantage,
policy_loss; and beside it mle_loss. Tensors and plain values in, tensors out: no file, no config
object, no device name. Inputs are never changed.

Departures from the published algorithm: log-probabilities are those of the distribution that was
sampled (special tokens leave the action space *before* the softmax); rewards enter as
A_k = R_k - baseline, not as pairwise differences (the same thing times K); the static text may be
refreshed from the policy, and may get credit itself (README).
"""
import hashlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from model import GPT, PAD, draw, finish, generate, log_probs

# --------------------------------------------------------------------------------------------------
# Randomness


def uniforms(shape: tuple[int, ...], *key) -> torch.Tensor:
    """Uniforms in [0, 1) that are a function of the key alone, e.g. (seed, number, "mask").

    float32, on the CPU. Evaluation cannot disturb training, every process knows its own numbers,
    and a run that goes on after a stop needs no saved generator."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(shape, generator=generator)


# --------------------------------------------------------------------------------------------------
# Mask: which positions are the model's


def sample_mask(u, lengths, p_m: float):
    """M_t for texts of the given lengths: uniforms u (R,T), lengths (R,) with EOS -> bool (R,T).

    Every position by its own coin; never the end token, never padding. Raises ValueError for p_m
    outside [0, 1]."""
    if not 0 <= p_m <= 1:
        raise ValueError(f"p_m is a probability, in 0..1; got {p_m}")
    before_end = torch.arange(u.size(1), device=u.device) < lengths[:, None] - 1
    return (u < p_m) & before_end


# --------------------------------------------------------------------------------------------------
# Feed: what the model sees


def observe(static, mask, observation: str, mask_id: int):
    """What is fed in place of the static text: static (R,T), mask (R,T) -> ids (R,T).

    `masked` puts [MASK] where M_t = 1. `static` leaves the static text as it is."""
    if observation == "masked":
        return static.masked_fill(mask, mask_id)
    return static


def feed(model: GPT, src, pad, static, mask, u, observation: str, mask_id: int,
         temperature: float = 1.0, top_k: int = 0):
    """The texts that the model is fed -> ids (rows,T), and the Rollout that was decoded or None.

    src (R,S), pad (R,), static (R,T), mask (R,T), uniforms u (R,K,T). `masked` and `static` only
    observe, and give R rows. `full` (and online, where every M_t is 1) lets the model see its own
    tokens, so it decodes K texts first, and gives R·K rows."""
    if observation != "full":
        return observe(static, mask, observation, mask_id), None
    decoded = decode(model, src, pad, static, mask, u, temperature, top_k)
    # Weights that autocast has cast without gradients would stay in its cache, and until
    # PyTorch 2.9 the forward propagation that follows would learn nothing.
    torch.clear_autocast_cache()
    return decoded.tokens.flatten(0, 1), decoded


def target_logits(model: GPT, src, pad, text):
    """One forward propagation a row: the logits (R,T,V) that predict every column of a text.

    src (R,S), pad (R,), text (R,T) as fed. The model is causal: the logits of column t come from
    the columns before t, so the last column of `text` is predicted, and never fed."""
    return model(torch.cat([src, text[:, :-1]], 1), pad, start=src.size(1) - 1)


# --------------------------------------------------------------------------------------------------
# Act: K samples


@dataclass
class Rollout:
    """K texts for each of R static texts; every setting fills the same record."""
    tokens: torch.Tensor  # (R,K,T) whole texts, EOS included, PAD behind it
    logp: torch.Tensor    # (R,K,T) log π(ŷ_t | o_t), 0 where not acted; carries the gradient
    acted: torch.Tensor   # (R,K,T) bool, M_t
    fp: int | torch.Tensor = 0  # forward propagations that sampled or scored
    fp_grad: int = 0            # further ones, needed for the gradient alone


def act(logits, static, mask, u, decoded: Rollout | None = None,
        temperature: float = 1.0, top_k: int = 0) -> Rollout:
    """The K samples of every static text, with the log-probabilities that carry the gradient.

    logits of what `feed` gave: (R,T,V), or (R·K,T,V) where it decoded; static and mask (R,T),
    uniforms u (R,K,T)."""
    if decoded is None:
        return rollout_one_pass(logits, static, mask, u, temperature, top_k)
    given = rollout_given(logits, decoded.tokens, decoded.acted, temperature, top_k)
    return replace(given, fp=decoded.fp, fp_grad=decoded.fp_grad)


def rollout_one_pass(logits, static, mask, u, temperature: float = 1.0, top_k: int = 0) -> Rollout:
    """K samples of all masked positions from one set of logits: 1 FP a static text.

    logits (R,T,V), static (R,T) with PAD behind EOS, mask (R,T), uniforms u (R,K,T). The action
    space has no special tokens, so a sample has the length of its static text."""
    R, K, T = u.shape
    r, t = mask.nonzero(as_tuple=True)  # the N masked positions, shared by the K samples
    logp = log_probs(logits[r, t], temperature, top_k, end=False)  # (N,V)
    drawn = draw(logp.detach(), u[r, :, t])  # (N,K)

    tokens = static[:, None].repeat(1, K, 1)  # (R,K,T)
    tokens[r, :, t] = drawn
    at_mask = logp.gather(1, drawn)  # (N,K)
    logp = logp.new_zeros(R, T, K).index_put((r, t), at_mask).transpose(1, 2)  # (R,K,T)
    return Rollout(tokens, logp, mask[:, None].expand(R, K, T), fp=R)


def rollout_given(logits, tokens, acted, temperature: float = 1.0, top_k: int = 0,
                  end: bool = True) -> Rollout:
    """Texts that exist already: tokens (R,K,T), acted (R,K,T), logits (R·K,T,V) -> Rollout.

    For the credit of static texts (offline learning is that alone), and for the second pass of
    the settings that decode. `end`: is the end token an action, as when they were sampled?"""
    R, K, T = tokens.shape
    logp = log_probs(logits, temperature, top_k, end).view(R, K, T, -1)
    logp = logp.gather(-1, tokens[..., None])[..., 0]
    return Rollout(tokens, logp.masked_fill(~acted, 0), acted)


def decode(model: GPT, src, pad, static, mask, u, temperature: float = 1.0, top_k: int = 0,
           end: bool = True, use_cache: bool = True) -> Rollout:
    """Column by column, the model seeing its own tokens: an FP for every token that it acts on.

    src (R,S), pad (R,), static (R,T), mask (R,T) shared by the K samples, u (R,K,T). Online is
    mask = 1 everywhere, the columns behind the static text included: the model decides itself
    when to stop. `end=False` takes EOS out of the action space (fixed lengths). No gradient:
    `act` computes the log-probabilities again, with one."""
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
    """A_k = R_k - baseline: rewards (R,K) -> (R,K).

    `mean` of the K samples, the sample itself included: (1 - 1/K) times the unbiased estimate.
    `loo`, leave-one-out, the mean of the others: unbiased (for K = 1 it is 0: plain REINFORCE).
    `scale` divides by the population standard deviation of the row, as GRPO does, which is biased;
    rows whose deviation is below 1e-4 are not divided. Where all rewards of a row are equal there
    is nothing to learn, and A is exactly 0 (but for `loo` with K = 1)."""
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
    """L_RL = - mean over texts of A_k · Σ_{M_t=1} log π(ŷ_t | o_t): A (R,K) -> scalar.

    `length_norm` divides a text's sum by the number of its acted positions. A rollout that never
    acted gives 0."""
    logp = rollout.logp.sum(2)  # (R,K)
    if length_norm:
        logp = logp / rollout.acted.sum(2).clamp(min=1)
    return -(A.detach() * logp).mean()


def mle_loss(logits, target, lengths):
    """Cross-entropy summed over the tokens of target (R,T), EOS included: logits (R,T,V) -> scalar.

    In nats; lengths (R,). Divide by lengths.sum() for the mean per token."""
    inside = torch.arange(target.size(1), device=target.device) < lengths[:, None]
    at = inside.nonzero(as_tuple=True)  # once: it waits for the device
    return F.cross_entropy(logits[at].float(), target[at], reduction="sum")


# --------------------------------------------------------------------------------------------------
# Diagnostics: a reward curve alone hides a collapse


def entropy(logits, inside):
    """Mean entropy of the policy per position, nats: logits (..., T, V), inside (..., T) bool."""
    logp = log_probs(logits[inside])
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0).sum(-1).mean()


def kl_divergence(logits, base_logits, inside):
    """Mean KL(π ‖ base) per position, nats, exact over the vocabulary at the fed prefixes."""
    at = inside.nonzero(as_tuple=True)
    logp, logq = log_probs(logits[at]), log_probs(base_logits[at])
    return torch.where(logp > -torch.inf, logp.exp() * (logp - logq), 0).sum(-1).mean()


def distinct(texts: list[str], n: int = 2) -> float:
    """Distinct n-grams of words as a share of all of them (distinct-2, Li et al. 2016)."""
    grams = []
    for text in texts:
        words = text.split()
        grams += zip(*(words[i:] for i in range(n)))
    return len(set(grams)) / max(1, len(grams))


def masked_runs(mask):
    """Depth inside a run of masked positions: mask (R,T) -> int (R,T), 1 for its first, else 0."""
    depth = mask.long()
    for t in range(1, mask.size(1)):
        depth[:, t] = (depth[:, t - 1] + 1) * mask[:, t]
    return depth


def fill_accuracy(logits, static, mask, depths: int = 4) -> list[float | None]:
    """How often the likeliest fill gives the static token back, by depth inside a masked run.

    One figure for depth 1, 2, … and for `depths` and deeper; None where a depth does not occur.
    It falls with depth, because masked neighbours cannot coordinate."""
    right = log_probs(logits, end=False).argmax(-1) == static
    depth = masked_runs(mask).clamp(max=depths)
    figures = []
    for d in range(1, depths + 1):
        at = depth == d
        figures.append(right[at].float().mean().item() if at.any() else None)
    return figures


def repetition(tokens, mask):
    """Share of neighbouring masked positions at which a sample repeats its own token.

    tokens (R,K,T), mask (R,T) -> scalar."""
    pairs = (mask[:, 1:] & mask[:, :-1])[:, None].expand(-1, tokens.size(1), -1)
    if not pairs.any():
        return tokens.new_zeros((), dtype=torch.float)
    same = tokens[..., 1:] == tokens[..., :-1]
    return same[pairs].float().mean()


def reward_by_token(rollout: Rollout, A, vocab_size: int):
    """Which words pay: the mean advantage of the samples that drew each id, and how often it was.

    A (R,K) -> (V,) and (V,)."""
    ids = rollout.tokens[rollout.acted]
    A = A[..., None].expand_as(rollout.tokens)[rollout.acted]
    count = torch.zeros(vocab_size, device=ids.device).index_add(0, ids, torch.ones_like(A))
    total = torch.zeros(vocab_size, device=ids.device).index_add(0, ids, A)
    return total / count.clamp(min=1), count
