"""The exercises of the README: a check each, run on the module that SORL names, and proof that the checks can fail.

    cp sorl.py my_sorl.py          blank a function in it, write it again, then
    SORL=my_sorl python -m pytest -k exercise_03

A check takes the module and raises where the function is wrong. Every check passes on sorl.py, fails on the blanked
function, and fails on the plausible mistakes listed beside it.
"""
import math
import types
from dataclasses import dataclass
from typing import Callable

import pytest
import torch
import torch.nn.functional as F

import sorl as real
from conftest import sorl
from model import log_probs

MASK_ID, EOS_ID, PAD_ID, V = 13, 12, 10, 14  # of the tiny vocabulary: 10 words, PAD 10, SEP 11, EOS 12, MASK 13
TEXT = torch.tensor([[3, 1, 4, 1, 5, EOS_ID, PAD_ID], [2, 7, EOS_ID, PAD_ID, PAD_ID, PAD_ID, PAD_ID]])
LENGTHS = torch.tensor([6, 3])
COINS = torch.tensor([[False, True, False, True, True, False, False], [True, False, False, False, False, False, False]])


def logits_of(*shape, seed=0):
    return 2 * torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed))


def check_01(sorl):
    """sample_mask: coins at rate p_m on the words; never the end token, never padding."""
    u = torch.rand(4000, 7, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([6, 3]).repeat(2000)
    words = torch.arange(7) < lengths[:, None] - 1
    mask = sorl.sample_mask(u, lengths, 0.3)
    assert mask.dtype == torch.bool and not mask[~words].any()
    assert abs(mask[words].float().mean() - 0.3) < 0.02
    assert torch.equal(sorl.sample_mask(u, lengths, 1.0), words) and not sorl.sample_mask(u, lengths, 0.0).any()
    assert (sorl.sample_mask(u, lengths, 0.6) | ~mask).all()  # the same uniforms: a larger p_m masks more, never others


def check_02(sorl):
    """observe: [MASK] where the model acts; the static text as it is in `static`; the input unchanged."""
    before = TEXT.clone()
    assert sorl.observe(TEXT, COINS, "masked", MASK_ID).tolist() == [
        [3, 13, 4, 13, 13, 12, 10], [13, 7, 12, 10, 10, 10, 10]]
    assert torch.equal(sorl.observe(TEXT, COINS, "static", MASK_ID), before) and torch.equal(TEXT, before)


def check_03(sorl):
    """rollout_one_pass: K texts from one set of logits, drawn with the probabilities that are reported."""
    logits, K = logits_of(2, 7), 4000
    u = torch.rand(2, K, 7, generator=torch.Generator().manual_seed(1))
    r = sorl.rollout_one_pass(logits, TEXT, COINS, u)
    assert r.tokens.shape == r.logp.shape == r.acted.shape == (2, K, 7) and r.fp == 2
    assert torch.equal(r.acted, COINS[:, None].expand(2, K, 7))
    assert (r.tokens == TEXT[:, None])[~r.acted].all() and (r.logp[~r.acted] == 0).all()
    assert (r.tokens[r.acted] < V - 4).all()  # no special token is an action
    p = F.softmax(logits[0, 1, :V - 4], 0)
    share = torch.bincount(r.tokens[0, :, 1], minlength=V)[:V - 4] / K
    assert (share - p).abs().max() < 0.04
    assert torch.allclose(r.logp[0, :, 1], p.log()[r.tokens[0, :, 1]], atol=1e-5)


def check_04(sorl):
    """rollout_given: log-probabilities of texts that exist, at the temperature they were drawn at; 0 where not acted."""
    logits, tokens = logits_of(4, 7), TEXT[:, None].expand(2, 2, 7)
    acted = COINS[:, None].expand(2, 2, 7)
    r = sorl.rollout_given(logits, tokens, acted, temperature=0.5)
    expected = log_probs(logits / 0.5).view(2, 2, 7, V).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(r.logp[acted], expected[acted], atol=1e-5) and (r.logp[~acted] == 0).all()


def check_05(sorl):
    """advantage: R - mean of all, or of the others; exactly 0 where all are equal."""
    R = torch.tensor([[0.2, 0.4, 0.9], [0.5, 0.5, 0.5]])
    assert torch.allclose(sorl.advantage(R, "mean")[0], torch.tensor([-0.3, -0.1, 0.4]), atol=1e-6)
    assert torch.allclose(sorl.advantage(R, "loo")[0], torch.tensor([-0.45, -0.15, 0.6]), atol=1e-6)
    assert all((sorl.advantage(R, b, scale=s)[1] == 0).all() for b in ("mean", "loo") for s in (False, True))
    assert torch.allclose(sorl.advantage(R, "mean", scale=True)[0].square().mean(), torch.tensor(1.0))


def check_06(sorl):
    """policy_loss: minus the mean over texts of A_k times the text's summed log-probability. By hand: the log-probabilities
    sum to -3 and -1, A is +1 and -1: -(1·(-3) + (-1)·(-1)) / 2 = 1; over acted positions, -(-1.5 + 1) / 2 = 0.25."""
    logp = torch.tensor([[[-1.0, -2.0, 0.0], [-1.0, 0.0, 0.0]]], requires_grad=True)
    acted = torch.tensor([[[True, True, False], [True, False, False]]])
    A = torch.tensor([[1.0, -1.0]], requires_grad=True)
    rollout = real.Rollout(torch.zeros(1, 2, 3, dtype=torch.long), logp, acted)
    assert abs(sorl.policy_loss(rollout, A).item() - 1.0) < 1e-6
    assert abs(sorl.policy_loss(rollout, A, "masked").item() - 0.25) < 1e-6
    sorl.policy_loss(rollout, A).backward()
    assert A.grad is None and torch.allclose(logp.grad[0, :, 0], torch.tensor([-0.5, 0.5]))


def check_07(sorl):
    """mle_loss: cross-entropy summed over the words and the end token, not over padding."""
    logits = logits_of(2, 7)
    expected = sum(-F.log_softmax(logits[r, t], 0)[TEXT[r, t]].item() for r in range(2) for t in range(LENGTHS[r]))
    assert abs(sorl.mle_loss(logits, TEXT, LENGTHS).item() - expected) < 1e-4


def check_08(sorl):
    """entropy: log 10 for a uniform policy over 10 words, 0 for a certain one; the mean over the given positions, nats."""
    flat, sure = torch.full((V,), -1e9), torch.full((V,), -1e9)
    flat[:10], sure[3] = 0.0, 0.0
    logits = torch.stack([flat, sure, flat])[None]
    for inside, expected in (([True, True, False], math.log(10) / 2), ([False, True, False], 0.0), ([True, False, True], math.log(10))):
        assert abs(sorl.entropy(logits, torch.tensor([inside])).item() - expected) < 1e-4


def check_09(sorl):
    """kl_divergence: KL(π ‖ base), in that order, exact over the vocabulary."""
    a, b = logits_of(1, 3, seed=1), logits_of(1, 3, seed=2)
    inside = torch.tensor([[True, True, False]])
    p, q = (log_probs(x[inside]).exp() for x in (a, b))
    expected = (p * (p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log())).sum(-1).mean()
    assert abs(sorl.kl_divergence(a, b, inside) - expected) < 1e-4
    assert abs(sorl.kl_divergence(a, a, inside).item()) < 1e-6


def check_10(sorl):
    """masked_runs: how deep inside a run of masks a position is, 0 outside."""
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0, 1]]).bool()
    assert sorl.masked_runs(mask).tolist() == [[1, 2, 0, 1, 2, 3, 0], [0, 1, 0, 0, 1, 0, 1]]


def check_11(sorl):
    """repetition: of the neighbouring masked pairs, how many hold the same token twice. Sample 1 repeats in both pairs, sample
    2 in one: 3 of 4; pairs with an unmasked member do not count."""
    mask = torch.tensor([[True, True, True, False]])
    tokens = torch.tensor([[[5, 5, 5, 5], [6, 6, 7, 7]]])
    assert abs(sorl.repetition(tokens, mask) - 0.75) < 1e-6
    assert sorl.repetition(tokens, torch.tensor([[True, False, True, False]])) == 0


def check_12(sorl):
    """reward_by_token: 7 was drawn with advantages +1 and -.5, 8 with -1: means .25 and -1; static tokens do not count."""
    tokens, acted = torch.tensor([[[7, 1], [7, 1], [8, 1]]]), torch.tensor([[[True, False]] * 3])
    worth, count = sorl.reward_by_token(real.Rollout(tokens, torch.zeros(1, 3, 2), acted), torch.tensor([[1.0, -0.5, -1.0]]), V)
    assert count.tolist() == [0] * 7 + [2, 1] + [0] * 5
    assert abs(worth[7] - 0.25) < 1e-6 and abs(worth[8] + 1) < 1e-6 and worth[1] == 0


@dataclass
class Exercise:
    function: str
    check: Callable
    wrong: dict[str, Callable]  # plausible mistakes, by what they get wrong


def same_draw_for_all(logits, static, mask, u, *rest):
    return real.rollout_one_pass(logits, static, mask, u[:, :1].expand_as(u), *rest)


def specials_allowed(logits, static, mask, u, *rest):
    r, logp = real.rollout_one_pass(logits, static, mask, u, *rest), log_probs(logits)
    return real.Rollout(r.tokens, logp[:, None].expand(-1, u.size(1), -1, -1).gather(-1, r.tokens[..., None])[..., 0] * r.acted,
                        r.acted, r.fp)


def everything_drawn(logits, static, mask, u, *rest):
    return real.rollout_one_pass(logits, static, torch.ones_like(mask), u, *rest)


def runs_never_reset(mask):
    return mask.long().cumsum(1) * mask


def loo_of_all(R, baseline="mean", greedy=None, scale=False):
    return real.advantage(R, "mean", greedy, scale)


def inside_of(lengths, T):
    return torch.arange(T) < lengths[:, None]


def per_token(rollout, A, length_norm="none"):
    return -(A.detach()[..., None] * rollout.logp).mean()


EXERCISES = {
    "01": Exercise("sample_mask", check_01, {
        "masks the end token": lambda u, lengths, p_m, *a: (u < p_m) & inside_of(lengths, u.size(1)),
        "masks padding": lambda u, lengths, p_m, *a: u < p_m,
        "the coin the wrong way round": lambda u, lengths, p_m, *a: (u > p_m) & inside_of(lengths - 1, u.size(1))}),
    "02": Exercise("observe", check_02, {
        "hides the static tokens": lambda s, m, o, i: s.masked_fill(~m, i) if o == "masked" else s,
        "changes its input": lambda s, m, o, i: s.masked_fill_(m, i) if o == "masked" else s,
        "always hides": lambda s, m, o, i: s.masked_fill(m, i)}),
    "03": Exercise("rollout_one_pass", check_03, {
        "one draw for all samples": same_draw_for_all, "special tokens share the probability": specials_allowed,
        "static positions are drawn too": everything_drawn}),
    "04": Exercise("rollout_given", check_04, {
        "forgets the temperature": lambda l, t, a, temperature=1.0, *r: real.rollout_given(l, t, a),
        "static tokens get log-probabilities": lambda l, t, a, *r, **k: real.rollout_given(l, t, torch.ones_like(a), *r, **k)}),
    "05": Exercise("advantage", check_05, {
        "leaves nobody out": loo_of_all,
        "no baseline": lambda R, *a, **k: R,
        "divides by K + 1": lambda R, baseline="mean", greedy=None, scale=False: R - R.sum(1, keepdim=True) / (R.size(1) + 1)}),
    "06": Exercise("policy_loss", check_06, {
        "climbs down": lambda r, A, n="none": -real.policy_loss(r, A, n),
        "mean over tokens": per_token,
        "a gradient into the reward": lambda r, A, n="none": -(A * r.logp.sum(2) / (r.acted.sum(2) if n == "masked" else 1)).mean()}),
    "07": Exercise("mle_loss", check_07, {
        "counts padding": lambda l, t, n, *a: F.cross_entropy(l.flatten(0, 1), t.flatten(), reduction="sum"),
        "a mean": lambda l, t, n, *a: real.mle_loss(l, t, n) / n.sum(),
        "forgets the end": lambda l, t, n, *a: real.mle_loss(l, t, n - 1)}),
    "08": Exercise("entropy", check_08, {
        "bits": lambda l, i: real.entropy(l, i) / math.log(2),
        "the sign": lambda l, i: -real.entropy(l, i),
        "every position": lambda l, i: real.entropy(l, torch.ones_like(i))}),
    "09": Exercise("kl_divergence", check_09, {
        "the other way round": lambda a, b, i: real.kl_divergence(b, a, i),
        "every position": lambda a, b, i: real.kl_divergence(a, b, torch.ones_like(i))}),
    "10": Exercise("masked_runs", check_10, {
        "never starts again": runs_never_reset,
        "counts from 0": lambda m: (real.masked_runs(m) - 1).clamp(min=0)}),
    "11": Exercise("repetition", check_11, {
        "unmasked neighbours too": lambda t, m: (t[..., 1:] == t[..., :-1]).float().mean(),
        "one member is enough": lambda t, m: real.repetition(t, m | torch.roll(m, 1, 1))}),
    "12": Exercise("reward_by_token", check_12, {
        "sums instead of means": lambda r, A, v: (lambda w, c: (w * c, c))(*real.reward_by_token(r, A, v)),
        "static tokens too": lambda r, A, v: real.reward_by_token(real.Rollout(r.tokens, r.logp, torch.ones_like(r.acted)), A, v)}),
}


@pytest.mark.parametrize("number", EXERCISES, ids=[f"exercise_{number}_{e.function}" for number, e in EXERCISES.items()])
def test_solved(number):
    EXERCISES[number].check(sorl)


def blank(*args, **kwargs):
    raise NotImplementedError("your turn")


MISTAKES = [(number, name, f) for number, e in EXERCISES.items() for name, f in ({"blank": blank} | e.wrong).items()]


@pytest.mark.parametrize("number, name, mistake", MISTAKES, ids=[f"check {number} sees: {name}" for number, name, _ in MISTAKES])
def test_a_mistake_is_seen(number, name, mistake):
    """The check passes on sorl.py and fails on a copy with this one function replaced."""
    e = EXERCISES[number]
    e.check(real)
    copy = types.SimpleNamespace(**vars(real) | {e.function: mistake})
    text = TEXT.clone()
    with pytest.raises((AssertionError, NotImplementedError)):
        e.check(copy)
    TEXT.copy_(text)  # a mistake may have changed it


def test_exercises_are_enough():
    assert len(EXERCISES) >= 10 and all(len(e.wrong) >= 2 for e in EXERCISES.values())
