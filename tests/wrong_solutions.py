"""Answers inside: wrong solutions, one for every mistake that a check of tests/test_exercises.py
has to see, and right ones that are written in another way than the project's.

tests/test_course.py runs the checks on all of them."""
import inspect

import torch

import sorl
import train
from model import draw, log_probs
from sorl import Rollout

# One mistake per line, under the number of its exercise: what is wrong :: a part of what the check
# says of it :: a text in the project's function :: what stands in its place; perhaps a second pair.
WRONG = r"""
## 01
masks the end :: the end and padding :: lengths[:, None] - 1 :: lengths[:, None]
the coin upside down :: share of the words :: u < p_m :: u > p_m
coins at p_m = 0 :: p_m=0, a uniform of 0 :: u < p_m :: u <= p_m
takes any number :: p_m=-0.1: got no error :: check_rate(p_m) :: pass
takes NaN :: p_m=nan: got no error :: check_rate(p_m) :: if p_m < 0 or p_m > 1: raise ValueError
numbers :: got float32, expected bool :: & before :: * 1.0 * before
indexes the end :: lengths of T + 1 :: return (u :: u[torch.arange(len(u)), lengths - 1]; return (u
changes its input :: the u that was given :: u < p_m :: u.sub_(p_m) < 0
forgets the device :: made without device= :: , device=u.device ::
## 02
hides the static tokens :: observation=masked at :: fill(mask :: fill(~mask
changes its input :: the static that was given :: masked_fill( :: masked_fill_(
a typo is `static` :: observation=maskd :: observation == "static" :: observation != "full"
a vocabulary of its own :: vocab_size=40 :: vocab_size + MASK :: 13
## 03
one draw for all samples :: shares of the :: u[row, :, t] :: u[row, :1, t].expand(-1, K)
one uniform for all columns :: tokens at :: u[row, :, t] :: u[row, :, 0]
forgets the temperature :: temperature=0.5 :: temperature, top_k, e :: 1.0, top_k, e
of the whole softmax :: logp at :: = logp.g :: = logits[row, t].log_softmax(1).g
no gradient :: got no gradient :: log_probs(logits :: log_probs(logits.detach()
the first text learns :: gradient of logits :: tokens, logp, :: tokens, first(logp),
only k = 0 learns :: gradient of logits :: tokens, logp, :: tokens, first(logp, (slice(None), 0)),
the logarithm of 0 :: got nan :: tokens, logp, :: tokens, log_of_softmax(logits, tokens, mask),
no stack :: nothing masked :: logits[row, t] :: torch.stack([logits[at] for at in zip(row, t)])
rounds :: in bfloat16 :: tokens, logp, :: tokens, logp.to(logits.dtype),
forgets the device :: made without device= :: logp.new_zeros( :: torch.zeros(
counts K passes :: fp, the rows that went through the model :: fp=N :: fp=N * K
counts masked texts :: fp, the rows that went :: fp=N :: fp=mask.any(1).sum()
changes its input :: the u that was given :: return Rollout( :: u.zero_(); return Rollout(
## 04
forgets the temperature :: temperature=0.5 :: logits, temperature :: logits, 1.0
0 at the end token :: logp at :: fill(~acted :: fill(~acted | (tokens == 12)
0 times infinity :: got nan :: logp.masked_fill(~acted, 0) :: logp * acted
log of 0 :: got nan :: logp.masked_fill(~acted, 0) :: torch.where(acted, logp.exp().log(), 0)
the first text learns :: gradient of logits :: Rollout(tokens, logp :: Rollout(tokens, first(logp)
rounds :: in bfloat16 :: ~acted, 0) :: ~acted, 0).to(logits.dtype)
forgets the device :: made without device= :: fill(~ :: fill(torch.zeros(T).bool() | ~
counts its rows :: fp: got 8, expected 0 :: , acted) :: , acted, N * K)
## 05
rewards as they come :: Got: Long :: rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32)) :: pass
`loo` leaves none out :: baseline=loo :: if baseline == "loo": :: if False:
`batch` per row :: scale=batch :: else squares.mean() :: else squares.mean(1, keepdim=True)
clamped at 1e-8 :: 0.50006 :: > 1e-4, A / deviation, :: > -1, A / deviation.clamp(min=1e-8),
equal rewards are subtracted :: equal rewards :: A.masked_fill(equal, 0) :: A
small deviations give 0 :: 0.50006 :: , A) :: , 0.0)
one sample is nan :: K=1 :: (K / (K - 1)) if K > 1 else rewards :: K / (0 * centred + K - 1)
whole numbers :: rewards .2 .4 .9 :: rewards - :: rewards.round() -
a typo is `mean` :: baseline=lo0, scale=none: got no error :: baseline not in ("mean", "loo") or ::
a typo is `batch` :: scale=row: got no error ::  or scale not in ("none", "source", "batch") ::
changes its input :: the rewards that was given :: return A.m :: rewards.zero_(); return A.m
## 06
leaves idle texts out :: random inputs :: sum(2)).m :: sum(2))[rollout.acted.any(2)].m
the reward learns :: gradient of A :: -(A.detach() * :: -(A *
the first text learns :: gradient of rollout :: * rollout.logp. :: * first(rollout.logp).
forgets the device :: made without device= :: -(A.d :: -(torch.ones(A.size(1)) * A.d
no gradient :: got no gradient :: rollout.logp.sum :: rollout.logp.detach().sum
## 07
counts padding :: 14 tokens :: < lengths[:, None] :: < 99 + lengths[:, None]
forgets the end :: 14 tokens :: < lengths[:, None] :: < lengths[:, None] - 1
without special ones :: 14 :: cross_entropy(logits[at].float() :: nll_loss(log_probs(logits[at])
a sum in bfloat16 :: in bfloat16 :: logits[at].float() :: logits[at]
log of 0 :: certain :: cross_entropy(logits[at].float() :: nll_loss(logits[at].softmax(1).log()
the first text learns :: gradient of logits :: logits[at] :: first(logits)[at]
forgets the device :: made without device= :: , device=target.device ::
no gradient :: got no gradient :: logits[at] :: logits.detach()[at]
## 08
special tokens, too :: [0, 0, 1] :: log_probs(logits[inside]) :: logits[inside].log_softmax(-1)
0 · log 0 is nan :: got nan :: torch.special.entr(p) :: (-p * p.log())
rounds :: in bfloat16 :: .exp() :: .exp().to(logits.dtype)
needs a batch :: (T,V): got :: logits[inside] :: logits.flatten(0, 1)[inside.flatten()]
## 09
upside down :: .9 and :: return ( :: return sorl.kl_divergence(base_logits, logits, inside) + 0 * (
0 · infinity is nan :: got nan :: ratio.masked_fill(logp == -torch.inf, 0) :: ratio
the logarithm of 0 :: certain logits :: (base_logits[at]) :: (base_logits[at]).exp().log()
the first text learns :: gradient of logits :: (logits[at]) :: (first(logits)[at])
no gradient :: got no gradient :: (logp.exp() :: (logp.detach().exp()
## 10
never starts again :: mask [1, 1, 0 :: return depth :: return mask.long().cumsum(1) * mask
needs two columns :: one column: got IndexError :: return :: depth[:, 1]; return
forgets the device :: made without device= :: return :: depth + torch.ones(1); return
changes its input :: the mask that was given :: return :: mask.zero_(); return
## 11
nan without pairs :: no two neighbours masked: got nan :: .clamp(min=1) ::
forgets the device :: made without device= :: return :: same & torch.ones(1).bool(); return
## 12
nan for ids never drawn :: mean advantage at [0]: got nan :: .clamp(min=1) ::
no device :: made without device= :: total / count :: total / torch.ones(vocab_size) / count
## 13
always decodes :: expected None :: noise), None :: noise), decode(model, src, pad, static, mask, u)
decodes for online :: got ValueError :: != "full": :: != "full" or not mask.all():
forgets the temperature :: what is fed :: u, temperature, :: u, 1.0,
a typo decodes :: observation=maskd :: != "full" :: in ("masked", "static")
one text per source :: two texts per source :: len(static) // len(src) :: 1
other sources :: two texts per source :: src.repeat_interleave(texts, 0) :: src.repeat(texts, 1)
decodes twice :: rows that :: decoded = d :: decode(model, src, pad, static, mask, u); decoded = d
changes its input :: the static that was given :: return decoded :: static.zero_(); return decoded
## 14
forgets fp :: fp: got 0 :: fp=decoded.fp, ::
acts where the mask says :: logp at :: decoded.acted :: decoded.acted | mask[:, None]
no gradient :: got no gradient :: (given, :: (given, logp=given.logp.detach(),
only k = 0 learns :: gradient :: (given, :: (given, logp=first(given.logp, (slice(None), 0)),
changes its input :: that was given :: return replace :: decoded.logp.fill_(1); return replace
## 15
ends early :: kept :: arange(T, device=u.device) :: arange(T, device=u.device) % lengths[:, None]
the exponent upside down :: p_m=0.1 :: p_m / (1 - p_m) if :: (1 - p_m) / max(p_m, 1e-9) if
may keep the end :: u almost 1 :: .clamp(max=lengths - 1) ::
divides by 0 :: division by zero ::  if p_m < 1 else torch.inf ::
takes NaN :: p_m=nan: got no error :: check_rate(p_m) :: if p_m < 0 or p_m > 1: raise ValueError
takes any number :: p_m=-0.1: got no error :: check_rate(p_m) :: p_m = min(max(p_m, 0), 1)
changes its input :: the u that was given :: u ** q :: u.pow_(q)
forgets the device :: made without device= :: , device=u.device ::
## 16
does not clip :: ratios 1.5, .5 :: ratio.clamp(1 - CLIP, 1 + CLIP) :: ratio
counts what did not act :: log ratios :: push.masked_fill(~rollout.acted, 0) :: push
the ratio upside down :: ratios 1.5, .5 :: before).exp :: before).neg().exp
forgets `before` :: ratios 1.5, .5 :: before is None :: True
the reward learns :: gradient of A :: A = A.detach()[ :: A = A[
no gradient :: got no gradient :: before).exp() :: before).exp().detach()
needs `before` :: no `before`: got TypeError :: before is None :: False
## 17
one update late :: update 2, masked_from=2 :: step >= cfg :: step > cfg
never masks :: update 3, masked_from=0 :: run.step >= cfg.masked_from :: False
fed as the run is :: observation=static :: "masked" :: cfg.observation
no gradient :: got no gradient :: mle_loss(logits :: mle_loss(logits.detach()
two passes over each row :: the rows that went :: sorl.target_logits( :: push_twice(
forgets the device :: made without device= :: uniforms(run, number, "mle", B, T) :: sorl.uniforms((B, T), 0, 0)
## 18
no gradient :: got no gradient :: act(logits, :: act(logits.detach(),
the same uniforms twice :: log[' :: number, "tokens" :: number, "mask"
logs no A :: the log: got no A, expected one :: A=A,  ::
counts K passes :: log['fp'] :: fp=rollout.fp, :: fp=rollout.fp * cfg.K,
two passes over each row :: the rows that went :: sorl.target_logits( :: push_twice(
forgets the device :: made without device= :: uniforms(run, number, "mask", N, T) :: sorl.uniforms((N, T), 0, 0)
## 19
asks for the name :: flags of online :: observation == "full" else :: setting == "online" else
the base learns :: the base: got a gradient, expected none :: distance( :: base_learns(
logs logits as they are :: log['logits']: got a gradient :: logits.detach(), :: logits,
forgets to feed *how :: online, temperature=2.0 :: observation, *how, :: observation,
KL per static text :: kl_weight=0.1 :: cfg.kl_weight * d :: len(fed) / N * cfg.kl_weight * d
KL per token :: kl_weight=0.1 :: logits, inside) :: logits, inside) / inside.sum()
does not count the base :: log['fp'] :: = log["fp"] + len(fed) :: = log["fp"]
ends with the static text :: flags of online :: torch.full_like(lengths, T + 1) :: lengths
coins for tails :: the flags of tail :: cfg.mask == "tail" :: False
always [MASK] :: the flags of static :: cfg.observation, *how :: "masked", *how
always draws anew :: reuse=2, update 1 :: if run.step % cfg.reuse :: if False
forgets the ratio :: reuse=2, update 1 :: old and old["logp"] :: None
samples in one place :: reuse=2, update 1: got KeyError :: samples[slot] =  :: samples[0] =
samples with a gradient :: reuse=2, update 1 :: logp=rollout.logp.detach() :: logp=rollout.logp
forgets what is kept :: log[' :: tokens, batch, kept) :: tokens, batch)
"""


def wrong_solutions() -> list[tuple]:
    """(number, what is wrong, a part of the message, pairs of texts)."""
    found, number = [], ""
    for line in WRONG.strip().splitlines():
        what, *cells = [cell.strip().replace("\\n", "\n") for cell in line.split("::")]
        if cells:
            found.append((number, what, *cells))
        else:
            number = what[3:]
    return found


def edited(function, *changes):
    """The project's function, in whose source old texts are exchanged for new ones.

    Raises LookupError if the function does not have them: a branch may write it anew."""
    source = inspect.getsource(function)
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        if source.count(old) != 1:
            raise LookupError(f"expected {old!r} once in {function.__name__}")
        source = source.replace(old, new)
    names = globals() | vars(inspect.getmodule(function))
    exec(source, names)
    return names[function.__name__]


def first(x, place=0):
    """x, whose gradient flows at one place alone: the first text."""
    learns = torch.zeros_like(x)
    learns[place] = 1
    return x.detach() + learns * (x - x.detach()).masked_fill(x == -torch.inf, 0)


def log_of_softmax(logits, tokens, acted):
    p = log_probs(logits, end=False).exp()[:, None].expand(*tokens.shape, -1)
    return torch.where(acted[:, None], p.gather(-1, tokens[..., None])[..., 0].log(), 0)


def base_learns(run, batch, fed, logits, inside):
    base_logits = sorl.target_logits(run.base, batch.src, batch.pad, fed)
    return sorl.kl_divergence(logits, base_logits, inside) * inside.sum() / len(fed)


def push_twice(*what):
    sorl.target_logits(*what)
    return sorl.target_logits(*what)


def in_two_passes(model, src, pad, text):
    """target_logits, the first source by itself and after the others."""
    n = len(text) // len(src)
    rest = sorl.target_logits(model, src[1:], pad[1:], text[n:])
    return torch.cat([sorl.target_logits(model, src[:1], pad[:1], text[:n]), rest])


# --- right solutions ------------------------------------------------------------------------------

def sample_by_sample(logits, static, mask, u, temperature=1.0, top_k=0):
    logp, tokens, drawn = log_probs(logits, temperature, top_k, end=False), [], []
    for k in range(u.size(1)):
        ids = draw(logp.detach(), u[:, k, :, None])[..., 0]
        tokens.append(torch.where(mask, ids, static))
        drawn.append(logp.gather(-1, ids[..., None])[..., 0] * mask)
    acted = mask[:, None].repeat(1, u.size(1), 1)
    return Rollout(torch.stack(tokens, 1), torch.stack(drawn, 1), acted, len(static))


def advantage_in_double(rewards, baseline="mean", scale="none"):
    if baseline not in ("mean", "loo") or scale not in ("none", "source", "batch"):
        raise ValueError(baseline, scale)
    R, K = rewards.double(), rewards.size(1)
    mean = R.mean(1, keepdim=True)
    others = (R.sum(1, keepdim=True) - R) / max(1, K - 1)
    A = R - (mean if baseline == "mean" else others)
    deviation = (R - mean).pow(2).mean(1, keepdim=True)
    deviation = (deviation.mean() if scale == "batch" else deviation).sqrt()
    if scale != "none":
        A = A / torch.where(deviation > 1e-4, deviation, 1)
    nothing = (R.amax(1) == R.amin(1)) & (K > 1 or baseline == "mean")
    return A.masked_fill(nothing[:, None], 0).float()


def loss_by_sign(rollout, A, before=None):
    A = A.detach().unsqueeze(2)
    if before is None:
        return -(A * rollout.logp).sum() / A.numel()
    ratio = torch.exp(rollout.logp - before)
    bounded = torch.where(A > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8))
    return -(A * bounded)[rollout.acted].sum() / A.numel()


def nll(logits, target, lengths):
    logp = logits.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return -(logp * (torch.ones_like(target).cumsum(1) <= lengths[:, None])).sum()


def kl_where_possible(logits, base_logits, inside):
    p, q = log_probs(logits[inside]), log_probs(base_logits[inside])
    never = p == -torch.inf
    p, q = p.masked_fill(never, 0), q.masked_fill(never, 0)
    return (p.exp() * ~never * (p - q)).sum() / inside.sum()


def runs_by_cummax(mask):
    place = torch.ones_like(mask, dtype=torch.int32).cumsum(1)
    return (place - place.masked_fill(mask, 0).cummax(1).values) * mask


def reward_by_bincount(rollout, A, vocab_size):
    ids = rollout.tokens[rollout.acted]
    count, A = ids.bincount(minlength=vocab_size), (A[..., None] * rollout.acted)[rollout.acted]
    return ids.bincount(A, minlength=vocab_size) / count.clamp(min=1), count


def reinforce_masked(run, batch, number, slot):
    cfg, policy, static = run.cfg, run.policy, batch.static.flatten(0, 1)
    N, T = static.shape
    u = [sorl.uniforms(shape, cfg.seed, number, name).to(policy.device)
         for name, shape in (("mask", (N, T)), ("tokens", (N, cfg.K, T)))]
    mask = sorl.sample_mask(u[0], batch.static_len.flatten(), cfg.p_m)
    fed = sorl.observe(static, mask, "masked", policy.tok.vocab_size)
    logits = in_two_passes(policy.model, batch.src, batch.pad, fed)
    rollout = sorl.act(logits, static, mask, u[1], None, cfg.temperature, cfg.top_k)
    kept = (sorl.text_mask(static, policy.tok.vocab_size) & ~mask).any(1)
    rewards = train.score(run.reward, policy, rollout.tokens, batch, kept)
    A = sorl.advantage(rewards, cfg.baseline, cfg.adv_scale)
    return sorl.policy_loss(rollout, A), dict(A=A, rewards=rewards, fp=N)


PASS = "sorl.target_logits(", "in_two_passes("
RIGHT = {"03": sample_by_sample, "05": advantage_in_double, "06": loss_by_sign, "07": nll,
         "09": kl_where_possible, "10": runs_by_cummax, "12": reward_by_bincount,
         "16": loss_by_sign, "17": edited(train.imitate, *PASS), "18": reinforce_masked,
         "19": edited(train.reinforce, *PASS)}
