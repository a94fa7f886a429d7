"""The exercises: a check each, run on the module that SORL names, and proof that it can fail.

    cp sorl.py my_sorl.py          blank a function in it, write it again, then
    SORL=my_sorl python -m pytest -k exercise_03

Exercise 15 is `loss` of train.py, in the module that UPDATE names. A check takes the module, and
says at the first property that does not hold what was tried, what came out and what was expected.
Every check passes on ours, fails on the blanked function, and fails on the plausible mistakes
listed beside it.
"""
import copy
import importlib
import math
import os
import types
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable

import model
import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sorl as real
import train
from conftest import V, prompts, sorl, tiny_model, uniform
from data.rewards import load_reward
from lab.policy import new_policy
from model import draw, generate, log_probs
from runs import RUN, TINY, flags_of, short_records

PAD, EOS, MASK = 10, 12, 13  # of the tiny vocabulary: ten words, PAD, SEP, EOS, MASK
TEXT = torch.tensor([[3, 1, 4, 1, 5, EOS, PAD], [2, 7, EOS, PAD, PAD, PAD, PAD]])
LENGTHS = torch.tensor([6, 3])
COINS = torch.tensor([[0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()


def logits_of(*shape, seed=0):
    return 2 * torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed))


# What results are compared with, bound before a submission is imported: it may exchange functions.
MADE_OF = torch, Tensor, F, numpy, model, real, train
ARRAY, EXPAND, PLACES = numpy.asarray, numpy.broadcast_to, numpy.ndindex
DETACH, DOUBLE, NUMPY = Tensor.detach, Tensor.double, Tensor.numpy


def plain(tried: str, value) -> numpy.ndarray:
    """A number or a tensor as float64, out of torch's reach."""
    if isinstance(value, Tensor):
        kind = type(value)
        assert kind is Tensor, f"{tried}: got a {kind.__name__}, expected a number or a tensor"
        value = NUMPY(DOUBLE(DETACH(value)))
    return ARRAY(value, float)


def same(tried: str, got, expected, within: float = 0.0) -> None:
    """One property: `got` is `expected`, a number for all of it or a tensor, to within `within`."""
    assert got is not None, f"{tried}: got None, expected a number or a tensor"
    got, expected = plain(tried, got), plain(tried, expected)
    if expected.ndim == 0:
        expected = EXPAND(expected, got.shape)
    shapes = f"got the shape {got.shape}, expected {expected.shape}"
    assert got.shape == expected.shape, f"{tried}: {shapes}"
    with numpy.errstate(invalid="ignore"):  # of infinities
        close = (got == expected) | (abs(got - expected) <= within)
    if not close.all():
        place = next(place for place in PLACES(got.shape) if not close[place])
        where = f" at {list(place)}" if place else ""
        numbers = f"got {got[place]:.4g}, expected {expected[place]:.4g}"
        raise AssertionError(f"{tried}{where}: {numbers}")


def holds(tried: str, got, expected: str, true: bool) -> None:
    """One property that is no equation."""
    assert true, f"{tried}: got {got}, expected {expected}"


def unseen(*shape):
    """Uniforms that are new every time, so that what comes out cannot be written down before."""
    generator = torch.Generator()
    generator.seed()
    return torch.rand(shape, generator=generator)


def as_ours(sorl, function: str, *args) -> None:
    """The same result as ours, to 1e-4; for random inputs."""
    expected = getattr(real, function)(*args)
    got = getattr(sorl, function)(*copy.deepcopy(args))  # theirs: they may spoil them
    if isinstance(expected, tuple):
        got, expected = (torch.stack([x.float() for x in part]) for part in (got, expected))
    more = [str(argument) for argument in args if not isinstance(argument, (Tensor, real.Rollout))]
    tried = ", ".join(["random inputs", *more])
    same(tried, got, expected, 1e-4)
    holds(tried, got.dtype, expected.dtype, got.is_floating_point() == expected.is_floating_point())


# --- the checks -----------------------------------------------------------------------------------

def check_01(sorl):
    """sample_mask: coins at rate p_m on the words; never the end token, never padding."""
    u, lengths = uniform(4000, 7), LENGTHS.repeat(2000)
    words = torch.arange(7) < lengths[:, None] - 1
    mask = sorl.sample_mask(u, lengths, 0.3)
    holds("p_m=.3", mask.dtype, "bool", mask.dtype == torch.bool)
    same("p_m=.3, the end and padding", mask & ~words, False)
    same("p_m=.3, share of the words", mask[words].float().mean(), 0.3, 0.02)
    same("p_m=.3, share of pairs of words that are both masked",
         (mask[:, 0] & mask[:, 1]).float().mean(), 0.09, 0.02)
    same("p_m=1", sorl.sample_mask(u, lengths, 1.0), words)
    same("p_m=0", sorl.sample_mask(u, lengths, 0.0), False)
    same("p_m=0, a uniform of 0", sorl.sample_mask(0 * u, lengths, 0.0), False)
    same("the same uniforms at p_m=.6: no position of p_m=.3 is left out",
         sorl.sample_mask(u, lengths, 0.6) | ~mask, True)
    for p_m in (-0.1, 1.5):
        try:
            outcome = sorl.sample_mask(u, lengths, p_m).float().mean()
        except ValueError:
            outcome = "ValueError"
        holds(f"p_m={p_m}", outcome, "ValueError", outcome == "ValueError")


def check_02(sorl):
    """observe: [MASK] where the model acts; the static text as it is in `static`."""
    before = TEXT.clone()
    hidden = torch.tensor([[3, MASK, 4, MASK, MASK, EOS, PAD], [MASK, 7, EOS, PAD, PAD, PAD, PAD]])
    same("masked", sorl.observe(TEXT, COINS, "masked", MASK), hidden)
    same("masked, the text that was given", TEXT, before)
    same("static", sorl.observe(TEXT, COINS, "static", MASK), before)
    as_ours(sorl, "observe", (10 * unseen(3, 5)).long(), unseen(3, 5) < 0.5, "masked", 77)
    try:
        sorl.observe(TEXT, COINS, "full", MASK)
        outcome = "no error"
    except ValueError:
        outcome = "ValueError"
    holds("observation=full", outcome, "ValueError", outcome == "ValueError")


def check_03(sorl):
    """rollout_one_pass: K texts from one set of logits, drawn with the probabilities reported."""
    K, static, acted = 4000, TEXT.clone(), COINS[:, None].expand(2, 4000, 7)
    logits, u = logits_of(2, 7).requires_grad_(), uniform(2, K, 7, seed=1)
    for how in ((1.0, 0), (0.5, 0), (1.0, 3), (2.0, 4)):
        tried = "temperature={}, top_k={}".format(*how)
        r = sorl.rollout_one_pass(logits, static, COINS, u, *how)
        same(f"{tried}, the static text that was given", static, TEXT)
        same(f"{tried}, acted", r.acted, acted)
        texts = len(r.tokens[0].unique(dim=0))
        holds(f"{tried}, different texts in {K} samples", texts, "more than one", texts > 1)
        same(f"{tried}, static positions",
             r.tokens.masked_fill(acted, 0), TEXT[:, None].expand(2, K, 7).masked_fill(acted, 0))
        same(f"{tried}, special tokens drawn", (r.tokens[acted] >= PAD).sum(), 0)
        logp = log_probs(logits, *how, end=False).detach()
        share = r.tokens[0, :, 1].bincount(minlength=V) / K
        same(f"{tried}, shares of the tokens drawn", share, logp[0, 1].exp(), 0.04)
        both = ((r.tokens[0, :, 1] == 0) & (r.tokens[0, :, 3] == 0)).float().mean()
        same(f"{tried}, share of 0 at two positions at once",
             both, logp[0, 1, 0].exp() * logp[0, 3, 0].exp(), 0.04)
        tokens = draw(logp, u.transpose(1, 2).contiguous()).transpose(1, 2)
        same(f"{tried}, draw(log_probs, u), 0 where not acted",
             r.tokens.masked_fill(~acted, 0), tokens.masked_fill(~acted, 0))
        drawn = logp[:, None].expand(-1, K, -1, -1).gather(-1, r.tokens[..., None])[..., 0]
        same(f"{tried}, logp of the drawn tokens, 0 where not acted",
             r.logp, drawn.masked_fill(~acted, 0), 1e-5)
    same("fp, forward propagations of 2 static texts", r.fp, 2)
    same("fp_grad", r.fp_grad, 0)
    r = sorl.rollout_one_pass(logits, static, COINS, u[:, :1])
    holds("logp", "no gradient", "one to the logits", r.logp.requires_grad)
    r.logp.sum().backward()
    onehot = F.one_hot(r.tokens[0, 0, 1], V) - F.pad(logits[0, 1, :PAD].softmax(0), (0, 4))
    same("gradient of logp", logits.grad[0, 1], onehot.detach(), 1e-5)
    same("gradient of logp where not acted", logits.grad[0, 0], 0.0)


def check_04(sorl):
    """rollout_given: log-probabilities of texts that exist; 0 where nobody acted."""
    logits, tokens = logits_of(4, 7).requires_grad_(), TEXT[:, None].expand(2, 2, 7)
    acted = torch.stack([COINS, ~COINS & (TEXT < PAD)], 1)  # two samples, other positions
    for how in ((1.0, 0, True), (0.5, 0, True), (1.0, 8, True), (1.0, 0, False)):
        tried = "temperature={}, top_k={}, end={}".format(*how)
        r = sorl.rollout_given(logits, tokens, acted, *how)
        expected = log_probs(logits, *how).view(2, 2, 7, V).gather(-1, tokens[..., None])[..., 0]
        same(f"{tried}, tokens", r.tokens, tokens)
        same(f"{tried}, acted", r.acted, acted)
        same(f"{tried}, logp, 0 where not acted", r.logp, expected.masked_fill(~acted, 0), 1e-5)
    holds("logp", "no gradient", "one to the logits", r.logp.requires_grad)
    got, grad = (torch.autograd.grad(logp.sum(), logits)[0] for logp in (r.logp, expected[acted]))
    same("gradient of logp", got, grad, 1e-5)


def check_05(sorl):
    """advantage: R less the mean of all, or of the others; exactly 0 where all are equal."""
    R = torch.tensor([[0.2, 0.4, 0.9], [0.6, 0.1, 0.2]])  # deviations .2944 and .2160
    table = {("mean", False): [[-.3, -.1, .4], [.3, -.2, -.1]],
             ("loo", False): [[-.45, -.15, .6], [.45, -.3, -.15]],
             ("mean", True): [[-1.0190, -.3397, 1.3587], [1.3887, -.9258, -.4629]],
             ("loo", True): [[-1.5286, -.5095, 2.0381], [2.0831, -1.3887, -.6944]]}
    for (baseline, scale), expected in table.items():
        tried, before = f"baseline={baseline}, scale={scale}", R.clone()
        A = sorl.advantage(R, baseline, scale)
        same(f"{tried}, rewards .2 .4 .9 and .6 .1 .2", A, torch.tensor(expected), 1e-3)
        same(f"{tried}, the rewards that were given", R, before)
        as_ours(sorl, "advantage", unseen(3, 6), baseline, scale)
        for reward, K in ((0.5, 2), (0.1, 3), (0.3, 7), (0.9, 64)):
            A = sorl.advantage(torch.full((2, K), reward), baseline, scale)
            same(f"{tried}, equal rewards ({K} times {reward})", A, 0.0)
        A = sorl.advantage(torch.tensor([[0.5, 0.5, 0.50006]]), baseline, scale)
        expected = torch.tensor([[-2e-5, -2e-5, 4e-5]]) * (1.5 if baseline == "loo" else 1)
        same(f"{tried}, rewards .5 .5 .50006", A, expected, 1e-6)
        A = sorl.advantage(torch.tensor([[0.50, 0.52]]), baseline, scale)
        factor = (100 if scale else 1) * (2 if baseline == "loo" else 1)
        same(f"{tried}, rewards .50 .52", A, torch.tensor([[-.01, .01]]) * factor, 1e-3 * factor)
    for scale in (False, True):
        A = sorl.advantage(torch.tensor([[0.75], [0.0]]), "loo", scale)
        same(f"baseline=loo, scale={scale}, one sample", A, torch.tensor([[0.75], [0.0]]))
        A = sorl.advantage(torch.tensor([[0.75], [0.0]]), "mean", scale)
        same(f"baseline=mean, scale={scale}, one sample", A, 0.0)


def check_06(sorl):
    """policy_loss: minus the mean over texts of A_k times the text's summed log-probability. By
    hand: the sums are -3 and -1, A is 1 and -1: -(1·(-3) + (-1)·(-1)) / 2 = 1; over acted
    positions, -(-1.5 + 1) / 2 = .25."""
    logp = torch.tensor([[[-1.0, -2.0, 0.0], [-1.0, 0.0, 0.0]]], requires_grad=True)
    acted = torch.tensor([[[True, True, False], [True, False, False]]])
    A = torch.tensor([[1.0, -1.0]], requires_grad=True)
    rollout = real.Rollout(torch.zeros(1, 2, 3, dtype=torch.long), logp, acted)
    same("A = 1, -1; sums -3, -1", sorl.policy_loss(rollout, A), 1.0, 1e-6)
    same("A = 1, -1; sums -3, -1; length_norm", sorl.policy_loss(rollout, A, True), 0.25, 1e-6)
    nobody = replace(rollout, logp=0 * logp, acted=acted & False)
    same("nobody acted", sorl.policy_loss(nobody, A), 0.0)
    same("nobody acted; length_norm", sorl.policy_loss(nobody, A, True), 0.0)
    acted = unseen(3, 4, 5) < 0.5
    drawn = real.Rollout(acted, -unseen(3, 4, 5) * acted, acted)
    for length_norm in (False, True):
        as_ours(sorl, "policy_loss", drawn, unseen(3, 4) - 0.5, length_norm)
    loss = sorl.policy_loss(rollout, A)
    holds("loss", "no gradient", "one to logp", loss.requires_grad)
    loss.backward()
    holds("gradient of A", A.grad, "none", A.grad is None)
    same("gradient of logp", logp.grad[0, :, 0], torch.tensor([-0.5, 0.5]), 1e-6)


def check_07(sorl):
    """mle_loss: cross-entropy summed over the words and the end token, not over padding."""
    logits = logits_of(2, 7).requires_grad_()
    expected = -sum(F.log_softmax(logits[r, t], 0)[TEXT[r, t]]
                    for r in range(2) for t in range(LENGTHS[r]))
    got = sorl.mle_loss(logits, TEXT, LENGTHS)
    same("sum over 6 and 3 tokens", got, expected, 1e-4)
    holds("loss", "no gradient", "one to the logits", got.requires_grad)
    as_ours(sorl, "mle_loss", 4 * unseen(2, 7, V), TEXT, LENGTHS)
    rounded = logits.detach().bfloat16()
    half, expected = (sorl.mle_loss(x, TEXT, LENGTHS) for x in (rounded, rounded.float()))
    same("logits in bfloat16", half, expected, 1e-3)
    holds("logits in bfloat16", half.dtype, "float32", half.dtype == torch.float32)


def check_08(sorl):
    """entropy: ln 10 for ten words equally likely, 0 for a certain one; a mean of nats."""
    flat, sure = torch.full((V,), -torch.inf), torch.full((V,), -torch.inf)
    flat[:10], sure[3] = 0.0, 0.0
    special = flat.clone()
    special[[PAD, MASK]] = 5.0  # never actions
    logits = torch.stack([flat, sure, special])[None]
    for inside, expected in (([1, 0, 0], math.log(10)), ([0, 1, 0], 0.0),
                             ([1, 1, 0], math.log(10) / 2), ([0, 0, 1], math.log(10))):
        got = sorl.entropy(logits, torch.tensor([inside]).bool())
        same(f"positions {inside} of (ten words, one word, ten words)", got, expected, 1e-4)
    as_ours(sorl, "entropy", 4 * unseen(2, 7, V), TEXT != PAD)


def check_09(sorl):
    """kl_divergence: KL(π ‖ base), in that order, exact over the vocabulary."""
    a, b = logits_of(1, 3, seed=1).requires_grad_(), logits_of(1, 3, seed=2)
    inside = torch.tensor([[True, True, False]])
    p, q = (F.softmax(torch.cat([x[inside][:, :PAD], x[inside][:, [EOS]]], 1), 1) for x in (a, b))
    expected = (p * (p / q).log()).sum(-1).mean()
    got = sorl.kl_divergence(a, b, inside)
    same("two random policies", got.detach(), expected.detach(), 1e-4)
    as_ours(sorl, "kl_divergence", 4 * unseen(2, 7, V), 4 * unseen(2, 7, V), TEXT != PAD)
    same("a policy from itself", sorl.kl_divergence(b, b, inside), 0.0, 1e-6)
    holds("KL", "no gradient", "one to the policy's logits", got.requires_grad)
    got.backward()
    grad, = torch.autograd.grad(expected, a)
    same("gradient", a.grad, grad, 1e-4)


def check_10(sorl):
    """masked_runs: how deep inside a run of masks a position is, 0 outside."""
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0, 1]]).bool()
    before = mask.clone()
    for row, expected in ((0, [1, 2, 0, 1, 2, 3, 0]), (1, [0, 1, 0, 0, 1, 0, 1])):
        tried = f"mask {mask[row].int().tolist()}"
        same(tried, sorl.masked_runs(mask)[row], torch.tensor(expected))
    same("the mask that was given", mask, before)
    as_ours(sorl, "masked_runs", unseen(20, 12) < 0.7)


def check_11(sorl):
    """repetition: the share of neighbouring masked pairs that hold the same token twice."""
    mask = torch.tensor([[True, True, True, False]])
    tokens = torch.tensor([[[5, 5, 5, 5], [6, 6, 7, 7]]])
    same("5 5 5 and 6 6 7, all masked, then one not", sorl.repetition(tokens, mask), 0.75, 1e-6)
    apart = torch.tensor([[True, False, True, False]])
    same("no two neighbours masked", sorl.repetition(tokens, apart), 0.0)
    as_ours(sorl, "repetition", (3 * unseen(20, 4, 12)).long(), unseen(20, 12) < 0.7)


def check_12(sorl):
    """reward_by_token: 7 was drawn with A = 1 and -.5, 8 with -1; static tokens do not count."""
    tokens, acted = torch.tensor([[[7, 1], [7, 1], [8, 1]]]), torch.tensor([[[1, 0]] * 3]).bool()
    rollout = real.Rollout(tokens, torch.zeros(1, 3, 2), acted)
    mean, count = sorl.reward_by_token(rollout, torch.tensor([[1.0, -0.5, -1.0]]), V)
    same("how often", count, torch.tensor([0.0] * 7 + [2, 1] + [0] * 5))
    same("mean advantage", mean, torch.tensor([0.0] * 7 + [0.25, -1] + [0] * 5), 1e-6)
    drawn = real.Rollout((10 * unseen(3, 4, 6)).long(), -unseen(3, 4, 6), unseen(3, 4, 6) < 0.5)
    as_ours(sorl, "reward_by_token", drawn, unseen(3, 4) - 0.5, V)


def check_13(sorl):
    """feed: what the model sees. It decodes where it sees its own tokens, else it observes."""
    model, (src, pad), static, K = tiny_model(), prompts([4, 7]), TEXT.clone(), 3
    u, hidden = uniform(2, K, 7, seed=1), real.observe(TEXT, COINS, "masked", 9)
    for observation, expected in (("masked", hidden), ("static", TEXT)):
        model.pushed.zero_()
        fed, decoded = sorl.feed(model, src, pad, static, COINS, u, observation, 9)
        same(f"{observation}, fed", fed, expected)
        same(f"{observation}, the static text that was given", static, TEXT)
        holds(f"{observation}, decoded", type(decoded).__name__, "None", decoded is None)
        same(f"{observation}, rows that went through the model", model.pushed[0], 0)
    for mask, (temperature, top_k) in ((COINS, (1.0, 0)), (torch.ones_like(COINS), (1.0, 0)),
                                       (torch.ones_like(COINS), (2.0, 3)), (COINS & False, (1, 0))):
        tried = f"full, share of coins {mask.float().mean():.2f}, {temperature=}, {top_k=}"
        fed, decoded = sorl.feed(model, src, pad, static, mask, u, "full", MASK, temperature, top_k)
        tokens = generate(model, src, pad, 7, u, static=static, mask=mask,
                          temperature=temperature, top_k=top_k)
        holds(f"{tried}, decoded", type(decoded).__name__, "Rollout", decoded is not None)
        same(f"{tried}, decoded tokens", decoded.tokens, tokens)
        same(f"{tried}, fed, K rows a source", fed, tokens.flatten(0, 1))
        same(f"{tried}, acted", decoded.acted, mask[:, None] & (tokens != PAD))
        same(f"{tried}, fp", decoded.fp, decoded.acted.sum())
        same(f"{tried}, fp_grad, one a text", decoded.fp_grad, 2 * K)
        same(f"{tried}, the static text that was given", static, TEXT)


def check_14(sorl):
    """act: K samples from the logits of what was fed, with log-probabilities that can learn."""
    K, u = 3, uniform(2, 3, 7, seed=1)
    for how in ((1.0, 0), (0.5, 0), (1.0, 3)):
        tried = "nothing decoded, temperature={}, top_k={}".format(*how)
        logits = logits_of(2, 7).requires_grad_()
        r, expected = (module.act(logits, TEXT, COINS, u, None, *how) for module in (sorl, real))
        holds(f"{tried}, logp", "no gradient", "one to the logits", r.logp.requires_grad)
        same(f"{tried}, tokens", r.tokens, expected.tokens)
        same(f"{tried}, logp", r.logp, expected.logp, 1e-5)
        same(f"{tried}, acted", r.acted, COINS[:, None].expand(2, K, 7))
        same(f"{tried}, fp", r.fp, 2)
        same(f"{tried}, fp_grad", r.fp_grad, 0)

    # One source; it was decoded to an end before the static text's, with K FPs for gradients.
    tokens = torch.tensor([[[3, 8, 4, EOS, PAD], [3, 2, 4, 9, EOS], [3, 0, 4, 1, 6]]])
    static, mask = torch.tensor([[3, 1, 4, 1, EOS]]), torch.tensor([[0, 1, 0, 1, 1]]).bool()
    acted = mask[:, None] & (tokens != PAD)
    decoded = real.Rollout(tokens, torch.zeros(1, K, 5), acted, fp=acted.sum(), fp_grad=K)
    for how in ((1.0, 0), (0.5, 0), (1.0, 10)):
        tried = "decoded, temperature={}, top_k={}".format(*how)
        logits = logits_of(K, 5, seed=3).requires_grad_()
        logp = log_probs(logits, *how).gather(-1, tokens[0, ..., None])[None, ..., 0]
        r = sorl.act(logits, static, mask, u[:1, :, :5], decoded, *how)
        holds(f"{tried}, logp", "no gradient", "one to the logits", r.logp.requires_grad)
        same(f"{tried}, tokens", r.tokens, tokens)
        same(f"{tried}, acted", r.acted, acted)
        same(f"{tried}, logp", r.logp, logp.masked_fill(~acted, 0), 1e-5)
        got, grad = (torch.autograd.grad(x[acted].sum(), logits)[0] for x in (r.logp, logp))
        same(f"{tried}, gradient of logp", got, grad, 1e-5)
        same(f"{tried}, fp, as decoding counted", r.fp, decoded.fp)
        same(f"{tried}, fp_grad", r.fp_grad, K)
        same(f"{tried}, logp of what was decoded, which is not to be changed", decoded.logp, 0.0)


LOSS_OF_A_BATCH = train.loss


@lru_cache
def two_policies():
    """The policy and the base that KL is measured from: other weights, one tokenizer."""
    records, policies = short_records(24), []
    for seed in (0, 1):
        cfg = train.make_config(train.parse_args([*TINY, "--seed", str(seed)], train.Config))
        policies.append(new_policy(cfg, {"train": records}, torch.device("cpu")))
        with torch.no_grad():
            for p in policies[-1].model.parameters():
                p.mul_(3.0)
    return policies


def step_of(loss, cfg, step: int, i: int):
    """One call of a `loss` -> its value, the gradient of all weights in a row, and the log."""
    policy, base = two_policies()
    policy.model.zero_grad()
    run = train.Run(cfg, policy, "", None, base.model.eval(), step=step)
    reward = load_reward(cfg.reward)
    value, log = loss(run, train.Batches(cfg, short_records(24), policy, reward), reward, i)
    holds(f"the loss in the setting {cfg.setting}", "no gradient", "one to the model",
          value.requires_grad)
    value.backward()
    grads = [p.grad for p in policy.model.parameters() if p.grad is not None]
    return value.detach(), torch.cat([grad.flatten() for grad in grads]), log


def check_15(update):
    """loss: in every setting, the value, the gradient and the counts of train.py's, to 1e-6."""
    for name, step, i, more in (
            ("mle", 1, 0, {}), ("masked", 3, 0, {}), ("masked", 1, 0, dict(masked_from=2)),
            ("masked", 1, 1, dict(accumulate=2)), ("masked", 1, 0, dict(temperature=2.0, top_k=9)),
            ("static", 0, 0, {}), ("masked worst", 0, 0, {}), ("masked best", 2, 0, {}),
            ("offline", 0, 0, {}), ("masked ranked", 1, 0, {}), ("online", 1, 0, {}),
            ("online alone", 2, 0, {}), ("full random", 0, 0, {}), ("refresh", 0, 0, {}),
            ("credit", 2, 0, {}), ("credit", 3, 0, {}), ("reuse", 2, 0, dict(kl_weight=0.1))):
        words = [*RUN, "--mle_weight", "0.4", *flags_of(name)]
        cfg = replace(train.make_config(train.parse_args(words, train.Config)), **more)
        tried = f"{' '.join(flags_of(name))}, update {step}, batch {i}"
        tried += "".join(f", {key}={flag}" for key, flag in more.items())
        expected, grad, expected_log = step_of(LOSS_OF_A_BATCH, cfg, step, i)
        got, got_grad, log = step_of(update.loss, cfg, step, i)
        for key in expected_log:
            holds(f"{tried}, the log", f"no {key}", "what train.py's loss logs", key in log)
            if key != "rollout":
                within = 1e-4 if key == "logits" else 1e-6
                same(f"{tried}, log[{key!r}]", log[key], expected_log[key], within)
        same(f"{tried}, the loss", got, expected, 1e-6)
        same(f"{tried}, the length of its gradient", got_grad.norm(), grad.norm(), 1e-5)
        same(f"{tried}, its gradient", got_grad, grad, 1e-6)


# --- plausible mistakes ---------------------------------------------------------------------------

@dataclass
class Exercise:
    function: str
    check: Callable
    wrong: dict[str, Callable]  # what it gets wrong -> the function with this mistake
    file: str = "sorl.py"  # where the function is


def result(name: str, change: Callable) -> Callable:
    """The function of sorl.py with its result changed."""
    return lambda *args: change(getattr(real, name)(*args))


def log_prob_of(logits, tokens):
    """logits (R,T,V), tokens (R,K,T) -> log-probabilities (R,K,T), special tokens included."""
    logp = logits.log_softmax(-1)[:, None].expand(*tokens.shape[:2], -1, -1)
    return logp.gather(-1, tokens[..., None])[..., 0]


def specials_share(logits, static, mask, u, *how):
    r = real.rollout_one_pass(logits, static, mask, u, *how)
    return replace(r, logp=log_prob_of(logits, r.tokens) * r.acted)


def specials_drawn(logits, static, mask, u, *how):
    tokens = draw(logits.log_softmax(-1), u.transpose(1, 2).contiguous()).transpose(1, 2)
    acted = mask[:, None].expand_as(tokens)
    tokens = torch.where(acted, tokens, static[:, None])
    return real.Rollout(tokens, log_prob_of(logits, tokens) * acted, acted, len(static))


def log_prob_of_static(logits, static, mask, u, *how):
    r = real.rollout_one_pass(logits, static, mask, u, *how)
    logp = log_probs(logits, *how).gather(-1, static[..., None])[..., 0]
    return replace(r, logp=logp[:, None].expand_as(r.logp).masked_fill(~r.acted, 0))


def likeliest(logits, static, mask, u, *how):
    r = real.rollout_one_pass(logits, static, mask, u, *how)
    logp, tokens = log_probs(logits, *how, end=False).max(-1)
    return replace(r, tokens=torch.where(r.acted, tokens[:, None], static[:, None]),
                   logp=logp[:, None] * r.acted)


def written_into_static(logits, static, mask, u, *how):
    r = real.rollout_one_pass(logits, static, mask, u, *how)
    static.copy_(r.tokens[:, -1])
    return r


def random_numbers_of_its_own(logits, static, mask, u, *how):
    return real.rollout_one_pass(logits, static, mask, torch.rand_like(u), *how)


def leave_one_out(R, baseline="mean", scale=False):
    """Right but for one sample: 0/0."""
    if baseline == "loo":
        A = R - (R.sum(1, keepdim=True) - R) / (R.size(1) - 1)
        A = A.masked_fill((R == R[:, :1]).all(1, keepdim=True) & (R.size(1) > 1), 0)
        return A / deviation_of(R) if scale else A
    return real.advantage(R, baseline, scale)


def deviation_of(R):
    """Population deviation (R,1); 1 for rows that are not divided."""
    deviation = R.std(1, keepdim=True, correction=0)
    return torch.where(deviation > 1e-4, deviation, 1.0)


def scaled(divide: Callable) -> Callable:
    """The advantage, its scale written as divide(A, R)."""
    def function(R, baseline="mean", scale=False):
        A = real.advantage(R, baseline)
        return divide(A, R) if scale else A
    return function


def clamped(R, baseline="mean", scale=False):
    A = R - R.mean(1, keepdim=True)
    if baseline == "loo":
        A = A * (R.size(1) / (R.size(1) - 1)) if R.size(1) > 1 else R
    deviation = R.std(1, keepdim=True, correction=0).clamp(min=1e-8)
    return A / deviation if scale and R.size(1) > 1 else A


def in_place(R, *how):
    A = real.advantage(R, *how)
    R.copy_(A)
    return A


def wrong_norm(rollout, A, length_norm=False):
    return real.policy_loss(rollout, A) / (rollout.acted.size(2) if length_norm else 1)


def nobody_acted_is_nan(rollout, A, length_norm=False):
    logp = rollout.logp.sum(2)
    return -(A.detach() * (logp / rollout.acted.sum(2) if length_norm else logp)).mean()


def entropy_of_everything(logits, inside):
    logp = logits[inside].log_softmax(-1)
    return -torch.where(logp > -torch.inf, logp.exp() * logp, 0).sum(-1).mean()


def zero_times_infinity(logits, inside):
    logp = log_probs(logits[inside])
    return -(logp.exp() * logp).sum(-1).mean()


def nothing_in_common(rollout, A, vocab_size):
    ids = rollout.tokens[rollout.acted]
    count = ids.bincount(minlength=vocab_size).float()
    total = torch.zeros(vocab_size).index_add(0, ids, A[..., None].expand_as(rollout.tokens)[
        rollout.acted])
    return total / count, count


def runs_from_the_right(mask):
    return real.masked_runs(mask.flip(1)).flip(1)


def feed_with(change: Callable) -> Callable:
    """feed, with (model, src, pad, static, mask, u, observation, mask_id, *how) changed first."""
    return lambda *args: real.feed(*change(*args))


def order_of_samples(model, src, *args):
    fed, decoded = real.feed(model, src, *args)
    if decoded is not None:
        fed = decoded.tokens.transpose(0, 1).flatten(0, 1)
    return fed, decoded


def static_is_fed(model, src, pad, static, mask, u, observation, *more):
    fed, decoded = real.feed(model, src, pad, static, mask, u, observation, *more)
    return (static if decoded is None or observation != "full" else
            static.repeat_interleave(u.size(1), 0)) if observation != "masked" else fed, decoded


def masks_after_decoding(model, src, pad, static, mask, u, observation, mask_id, *how):
    fed, decoded = real.feed(model, src, pad, static, mask, u, observation, mask_id, *how)
    if decoded is not None:
        fed = fed.masked_fill(decoded.acted.flatten(0, 1), mask_id)
    return fed, decoded


def always_decodes(model, src, pad, static, mask, u, observation, mask_id, *how):
    fed, _ = real.feed(model, src, pad, static, mask, u, observation, mask_id, *how)
    return fed, real.decode(model, src, pad, static, mask, u, *how)


def only_online_decodes(model, src, pad, static, mask, u, observation, mask_id, *how):
    if observation == "full" and not mask.all():
        return static, None
    return real.feed(model, src, pad, static, mask, u, observation, mask_id, *how)


def one_text_a_source(model, src, pad, static, mask, u, *more):
    return real.feed(model, src, pad, static, mask, u[:, :1], *more)


def observes_in_place(model, src, pad, static, mask, u, observation, mask_id, *how):
    fed = real.feed(model, src, pad, static, mask, u, observation, mask_id, *how)
    if observation == "masked":
        static.masked_fill_(mask, mask_id)
    return fed


def draws_again(logits, static, mask, u, decoded=None, *how):
    return real.rollout_one_pass(logits[:len(static)], static, mask, u, *how)


def no_gradient_of_decoding(logits, static, mask, u, decoded=None, *how):
    return decoded or real.act(logits, static, mask, u, None, *how)


def given(change: Callable) -> Callable:
    """act; where texts were decoded, change(logits, decoded, mask, *how) instead."""
    def function(logits, static, mask, u, decoded=None, *how):
        if decoded is None:
            return real.act(logits, static, mask, u, None, *how)
        r = change(logits, decoded, mask, *how)
        return replace(r, fp=decoded.fp, fp_grad=decoded.fp_grad)
    return function


def costs_forgotten(logits, static, mask, u, decoded=None, *how):
    if decoded is None:
        return real.act(logits, static, mask, u, None, *how)
    return real.rollout_given(logits, decoded.tokens, decoded.acted, *how)


def decoded_in_place(logits, static, mask, u, decoded=None, *how):
    r = real.act(logits, static, mask, u, decoded, *how)
    if decoded is not None:
        decoded.logp.copy_(r.logp.detach())
    return r


def flags_changed(**flags) -> Callable:
    """loss, with other flags: what forgets a flag, or takes it for another."""
    return lambda run, *args: LOSS_OF_A_BATCH(replace(run, cfg=replace(run.cfg, **flags)), *args)


def loss_changed(change: Callable) -> Callable:
    """loss, its value and its log changed."""
    return lambda *args: change(*LOSS_OF_A_BATCH(*args))


def words_and_end(u, lengths):
    return torch.arange(u.size(1)) < lengths[:, None]


ONE_PASS, ADVANTAGE, LOSS, MASKS = (getattr(real, name) for name in (
    "rollout_one_pass", "advantage", "policy_loss", "sample_mask"))

EXERCISES = {
    "01": Exercise("sample_mask", check_01, {
        "masks the end token": lambda u, n, p: (u < p) & words_and_end(u, n),
        "masks padding": lambda u, n, p: u < p,
        "the coin the wrong way round": lambda u, n, p: (u > p) & words_and_end(u, n - 1),
        "one coin a text": lambda u, n, p: MASKS(u[:, :1].expand_as(u), n, p),
        "coins at p_m = 0": lambda u, n, p: MASKS(u, n, p) | (u <= p) & words_and_end(u, n - 1),
        "coins of its own": lambda u, n, p: MASKS(torch.rand_like(u), n, p),
        "takes any number for a probability": lambda u, n, p: MASKS(u, n, min(max(p, 0), 1)),
        "numbers instead of bool": lambda u, n, p: MASKS(u, n, p).float()}),
    "02": Exercise("observe", check_02, {
        "hides the static tokens": lambda s, m, o, i: s.masked_fill(~m, i) if o == "masked" else s,
        "changes its input": lambda s, m, o, i: s.masked_fill_(m, i) if o == "masked" else s,
        "always hides": lambda s, m, o, i: s.masked_fill(m, i),
        "never hides": lambda s, m, o, i: s,
        "takes any other observation": lambda s, m, o, i: s.masked_fill(m, i) if o == "masked"
            else s,
        "floating-point ids": result("observe", torch.Tensor.float),
        "hides the column behind": lambda s, m, o, i: real.observe(s, m.roll(1, 1), o, i)}),
    "03": Exercise("rollout_one_pass", check_03, {
        "one draw for all samples":
            lambda l, s, m, u, *how: ONE_PASS(l, s, m, u[:, :1].expand_as(u), *how),
        "one uniform for all positions":
            lambda l, s, m, u, *how: ONE_PASS(l, s, m, u[..., :1].expand_as(u), *how),
        "one row's uniforms for all rows":
            lambda l, s, m, u, *how: ONE_PASS(l, s, m, u[:1].expand_as(u), *how),
        "random numbers of its own": random_numbers_of_its_own,
        "the likeliest token": likeliest,
        "no temperature": lambda l, s, m, u, t=1.0, k=0: ONE_PASS(l, s, m, u, 1.0, k),
        "no top-k": lambda l, s, m, u, t=1.0, k=0: ONE_PASS(l, s, m, u, t),
        "no temperature, no top-k": lambda l, s, m, u, *how: ONE_PASS(l, s, m, u),
        "special tokens share the probability": specials_share,
        "special tokens are drawn": specials_drawn,
        "static positions are drawn, too":
            lambda l, s, m, u, *how: ONE_PASS(l, s, torch.ones_like(m), u, *how),
        "the static token's log-probability": log_prob_of_static,
        "probabilities, not their logarithm":
            result("rollout_one_pass", lambda r: replace(r, logp=r.logp.exp() * r.acted)),
        "1 where not acted":
            result("rollout_one_pass", lambda r: replace(r, logp=r.logp.masked_fill(~r.acted, 1))),
        "log-probabilities without gradient":
            result("rollout_one_pass", lambda r: replace(r, logp=r.logp.detach())),
        "counts K passes": result("rollout_one_pass", lambda r: replace(r, fp=r.fp * 4000)),
        "writes into the static text": written_into_static}),
    "04": Exercise("rollout_given", check_04, {
        "forgets the temperature":
            lambda l, t, a, temperature, *how: real.rollout_given(l, t, a, 1.0, *how),
        "forgets top-k":
            lambda l, t, a, temp, k, end: real.rollout_given(l, t, a, temp, 0, end),
        "forgets `end`": lambda l, t, a, temp, k, end: real.rollout_given(l, t, a, temp, k),
        "static tokens get log-probabilities":
            lambda l, t, a, *how: replace(
                real.rollout_given(l, t, torch.ones_like(a), *how), acted=a),
        "the likeliest token's log-probability":
            lambda l, t, a, *how: real.Rollout(
                t, log_probs(l, *how).amax(-1).view(t.shape).masked_fill(~a, 0), a),
        "one sample's positions for all":
            lambda l, t, a, *how: replace(
                real.rollout_given(l, t, a[:, :1].expand_as(a), *how), acted=a),
        "a gradient of 0":
            lambda l, t, a, *how: replace(r := real.rollout_given(l, t, a, *how),
                                          logp=r.logp.detach() + 0 * l.sum()),
        "log-probabilities without gradient":
            result("rollout_given", lambda r: replace(r, logp=r.logp.detach()))}),
    "05": Exercise("advantage", check_05, {
        "leaves nobody out": lambda R, b="mean", scale=False: ADVANTAGE(R, "mean", scale),
        "always leaves one out": lambda R, b="mean", scale=False: ADVANTAGE(R, "loo", scale),
        "no baseline": lambda R, *how: R,
        "the wrong sign": lambda R, *how: -ADVANTAGE(R, *how),
        "divides by K + 1": lambda R, *how: R - R.sum(1, keepdim=True) / (R.size(1) + 1),
        "one baseline for all rows": lambda R, *how: R - R.mean(),
        "never scales": lambda R, b="mean", scale=False: ADVANTAGE(R, b),
        "always scales": lambda R, b="mean", scale=False: ADVANTAGE(R, b, True),
        "divides by the variance": scaled(lambda A, R: A / deviation_of(R) ** 2),
        "sample deviation": scaled(lambda A, R: A / R.std(1, keepdim=True)),
        "one deviation for all rows": scaled(lambda A, R: A / deviation_of(R.view(1, -1))),
        "deviation clamped at 1e-8": clamped,
        "1e-8 added to the deviation": scaled(
            lambda A, R: A / (R.std(1, keepdim=True, correction=0) + 1e-8)),
        "equal rewards left to the subtraction":
            lambda R, b="mean", scale=False: clamped(R, b) / (deviation_of(R) if scale else 1),
        "rows of a small deviation are 0": scaled(
            lambda A, R: torch.where(deviation_of(R) == 1, 0, A / deviation_of(R))),
        "small spreads are not divided": scaled(
            lambda A, R: torch.where(R.std(1, keepdim=True) > 0.1, A / deviation_of(R), A)),
        "leave-one-out of one sample is nan": leave_one_out,
        "leave-one-out of one sample is 0": lambda R, *how: ADVANTAGE(R, *how) * (R.size(1) > 1),
        "changes its input": in_place}),
    "06": Exercise("policy_loss", check_06, {
        "climbs down": result("policy_loss", lambda loss: -loss),
        "mean over tokens": lambda r, A, n=False: -(A.detach()[..., None] * r.logp).mean(),
        "sum over texts": lambda r, A, n=False: LOSS(r, A, n) * 2,
        "never normalises": lambda r, A, n=False: LOSS(r, A),
        "normalises by T": wrong_norm,
        "nan where nobody acted": nobody_acted_is_nan,
        "a gradient into the reward": lambda r, A, n=False: -(
            A * r.logp.sum(2) / (r.acted.sum(2).clamp(min=1) if n else 1)).mean(),
        "no gradient": result("policy_loss", torch.Tensor.detach)}),
    "07": Exercise("mle_loss", check_07, {
        "counts padding":
            lambda l, t, n: F.cross_entropy(l.flatten(0, 1), t.flatten(), reduction="sum"),
        "a mean over tokens": lambda l, t, n: real.mle_loss(l, t, n) / n.sum(),
        "a mean over texts": lambda l, t, n: real.mle_loss(l, t, n) / len(n),
        "forgets the end": lambda l, t, n: real.mle_loss(l, t, n - 1),
        "the wrong sign": result("mle_loss", lambda loss: -loss),
        "one column late": lambda l, t, n: real.mle_loss(l.roll(1, 1), t, n),
        "a sum in bfloat16": lambda l, t, n: real.mle_loss(l, t, n).to(l.dtype).float(),
        "no gradient": result("mle_loss", torch.Tensor.detach)}),
    "08": Exercise("entropy", check_08, {
        "bits": result("entropy", lambda h: h / math.log(2)),
        "the sign": result("entropy", lambda h: -h),
        "a sum": lambda l, i: real.entropy(l, i) * i.sum(),
        "every position": lambda l, i: real.entropy(l, torch.ones_like(i)),
        "special tokens, too": entropy_of_everything,
        "0 · log 0 is nan": zero_times_infinity}),
    "09": Exercise("kl_divergence", check_09, {
        "the other way round": lambda a, b, i: real.kl_divergence(b, a, i),
        "every position": lambda a, b, i: real.kl_divergence(a, b, torch.ones_like(i)),
        "a sum": lambda a, b, i: real.kl_divergence(a, b, i) * i.sum(),
        "no gradient": result("kl_divergence", torch.Tensor.detach),
        "only entropy": lambda a, b, i: -real.entropy(a, i)}),
    "10": Exercise("masked_runs", check_10, {
        "never starts again": lambda m: m.long().cumsum(1) * m,
        "counts from 0": lambda m: (real.masked_runs(m) - 1).clamp(min=0),
        "from right to left": runs_from_the_right,
        "the mask itself": lambda m: m.long()}),
    "11": Exercise("repetition", check_11, {
        "unmasked neighbours too": lambda t, m: (t[..., 1:] == t[..., :-1]).float().mean(),
        "one member is enough": lambda t, m: real.repetition(t, m | torch.roll(m, 1, 1)),
        "a count": lambda t, m: real.repetition(t, m) * 4,
        "the last and the first are neighbours": lambda t, m: (
            (t == t.roll(1, -1)) & (m & m.roll(1, 1))[:, None]).sum() / (
            t.size(1) * (m & m.roll(1, 1)).sum()).clamp(min=1),
        "nan without pairs": lambda t, m: (t[..., 1:] == t[..., :-1])[
            (m[:, 1:] & m[:, :-1])[:, None].expand(-1, t.size(1), -1)].float().mean()}),
    "12": Exercise("reward_by_token", check_12, {
        "sums instead of means": result("reward_by_token", lambda out: (out[0] * out[1], out[1])),
        "static tokens too": lambda r, A, v: real.reward_by_token(
            replace(r, acted=torch.ones_like(r.acted)), A, v),
        "shares instead of counts":
            result("reward_by_token", lambda out: (out[0], out[1] / out[1].sum())),
        "nan for ids never drawn": nothing_in_common}),
    "13": Exercise("feed", check_13, {
        "decodes always": always_decodes,
        "decodes for online alone": only_online_decodes,
        "feeds the static text, not what was decoded": static_is_fed,
        "hides what was decoded": masks_after_decoding,
        "samples before sources": order_of_samples,
        "one text a source": one_text_a_source,
        "forgets temperature and top-k":
            lambda *args: real.feed(*args[:8]),
        "hides the static tokens": feed_with(
            lambda m, s, p, y, mask, u, o, *more: (
                m, s, p, y, ~mask if o == "masked" else mask, u, o, *more)),
        "`static` is hidden, too": feed_with(
            lambda m, s, p, y, mask, u, o, *more: (
                m, s, p, y, mask, u, "masked" if o == "static" else o, *more)),
        "decodes every column": feed_with(
            lambda m, s, p, y, mask, u, o, *more: (
                m, s, p, y, mask | (o == "full"), u, o, *more)),
        "changes its input": observes_in_place}),
    "14": Exercise("act", check_14, {
        "draws again what was decoded": draws_again,
        "what was decoded, as it is": no_gradient_of_decoding,
        "forgets the costs of decoding": costs_forgotten,
        "never an end": given(lambda l, d, m, *how: real.rollout_given(
            l, d.tokens, d.acted, *how, end=False)),
        "acted wherever the mask says": given(lambda l, d, m, *how: real.rollout_given(
            l, d.tokens, m[:, None].expand_as(d.acted), *how)),
        "credit for static tokens": given(lambda l, d, m, *how: real.rollout_given(
            l, d.tokens, d.tokens != PAD, *how)),
        "decoded: forgets temperature and top-k": given(lambda l, d, m, *how: real.rollout_given(
            l, d.tokens, d.acted)),
        "masked: forgets temperature and top-k": lambda l, s, m, u, d=None, *how: (
            real.act(l, s, m, u) if d is None else real.act(l, s, m, u, d, *how)),
        "no gradient": result("act", lambda r: replace(r, logp=r.logp.detach())),
        "decoded: a gradient of 0": given(lambda l, d, m, *how: replace(
            r := real.rollout_given(l, d.tokens, d.acted, *how),
            logp=r.logp.detach() + 0 * l.sum())),
        "writes into what was decoded": decoded_in_place}),
    "15": Exercise("loss", check_15, {
        "climbs down": loss_changed(lambda value, log: (-value, log)),
        "no gradient": loss_changed(lambda value, log: (value.detach(), log)),
        "a sum, not a weighted one": flags_changed(mle_weight=1.0),
        "no imitation": flags_changed(mle_weight=0.0),
        "no ranking of static texts": flags_changed(credit=0.0),
        "ranking at full weight, always": flags_changed(credit=1.0),
        "no distance from the base": flags_changed(kl_weight=0.0),
        "always the mean as baseline": flags_changed(baseline="mean"),
        "never scales": flags_changed(adv_scale=False),
        "never normalises": flags_changed(length_norm=False),
        "forgets the temperature": flags_changed(temperature=1.0),
        "forgets top-k": flags_changed(top_k=0),
        "always [MASK]": flags_changed(observation="masked"),
        "never [MASK]": flags_changed(observation="static"),
        "a rate of its own": flags_changed(p_m=0.2),
        "masks imitated rows from the first update on": flags_changed(masked_from=0),
        "never masks imitated rows": flags_changed(masked_from=10 ** 6),
        "other random numbers": flags_changed(seed=7),
        "always the first batch": lambda run, batches, reward, i=0: LOSS_OF_A_BATCH(
            run, batches, reward, 0),
        "always the first update": lambda run, *args: LOSS_OF_A_BATCH(replace(run, step=0), *args),
        "logs no mask": loss_changed(lambda value, log: (
            value, {key: log[key] for key in log if key != "mask"})),
        "counts no FP": loss_changed(lambda value, log: (value, log | dict(fp=0)))},
        file="train.py"),
}
UPDATE = importlib.import_module(os.environ.get("UPDATE", "train"))
STUDENTS = {"sorl.py": sorl, "train.py": UPDATE}
REAL = {"sorl.py": real, "train.py": train}


# --- the tests ------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "number", EXERCISES, ids=[f"exercise_{n}_{e.function}" for n, e in EXERCISES.items()])
def test_solved(number):
    e = EXERCISES[number]
    e.check(STUDENTS[e.file])


def blank(*args, **kwargs):
    raise NotImplementedError("your turn")


MISTAKES = [(number, name, mistake) for number, e in EXERCISES.items()
            for name, mistake in ({"blank": blank} | e.wrong).items()]


@pytest.mark.parametrize("number, name, mistake", MISTAKES,
                         ids=[f"check {number} sees: {name}" for number, name, _ in MISTAKES])
def test_a_mistake_is_seen(number, name, mistake):
    """The check passes on sorl.py, and fails, saying why, where this function has the mistake."""
    e = EXERCISES[number]
    copy = types.SimpleNamespace(**vars(REAL[e.file]) | {e.function: mistake})
    text = TEXT.clone()
    error = NotImplementedError if mistake is blank else AssertionError
    try:
        with pytest.raises(error) as caught:
            e.check(copy)
    finally:
        TEXT.copy_(text)  # a mistake may have changed it
    assert mistake is blank or ": got " in str(caught.value) and ", expected " in str(caught.value)


def test_what_a_student_reads():
    mistake = EXERCISES["05"].wrong["leave-one-out of one sample is nan"]
    with pytest.raises(AssertionError) as caught:
        check_05(types.SimpleNamespace(advantage=mistake))
    assert str(caught.value) == (
        "baseline=loo, scale=False, one sample at [0, 0]: got nan, expected 0.75")


def test_a_comparison_is_out_of_the_reach_of_a_submission(monkeypatch):
    class Any(Tensor):
        __torch_function__ = classmethod(lambda *args: torch.ones(2))
    with pytest.raises(AssertionError, match="got a Any, expected a number or a tensor"):
        same("tried", torch.zeros(2).as_subclass(Any), torch.ones(2))
    for function in ("detach", "double", "numpy", "expand_as"):
        monkeypatch.setattr(Tensor, function, lambda *args: torch.ones(2))
    with pytest.raises(AssertionError, match=r"at \[0\]: got 0, expected 1"):
        same("tried", torch.zeros(2), torch.ones(2))
    spoils = types.SimpleNamespace(masked_runs=lambda mask: mask.zero_().long())
    with pytest.raises(AssertionError, match="got 0, expected"):
        as_ours(spoils, "masked_runs", unseen(20, 12) < 0.7)


def test_exercises_are_enough():
    counts = {e.function: len(e.wrong) for e in EXERCISES.values()}
    assert len(EXERCISES) == 15 and min(counts.values()) >= 4
    assert min(counts["rollout_one_pass"], counts["advantage"]) >= 10
    assert min(counts["feed"], counts["act"]) >= 6
