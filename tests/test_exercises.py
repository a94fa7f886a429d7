"""The exercises: one check per exercise, run on the module that SORL names.

    SORL=my_sorl python -m pytest tests/test_exercises.py -k exercise_03

A check says at the first property that does not hold what was tried, what came out, and what was
expected. Most inputs are random, and the project's own function says what is expected of them:
results, gradients, errors, and inputs that stay as they are. tests/wrong_solutions.py shows that
every check can fail. Read it when you have solved the exercises, since it holds answers.
"""
import copy
import importlib
import inspect
import itertools
import math
import os
import types
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable

import numpy
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import data
import sorl as real
import train
from conftest import V, prompts, sorl, texts_of, tiny_model, uniform
from data.tokenizer import Tokenizer
from lab.task import Policy
from model import GPT, GPTConfig, log_probs

PAD, EOS, MASK = 10, 12, 13  # of the tiny vocabulary: ten words, PAD, SEP, EOS, MASK
TEXT = torch.tensor([[3, 1, 4, 1, 5, EOS, PAD], [2, 7, EOS, PAD, PAD, PAD, PAD]])
WORDS = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]).bool()  # without the end
LENGTHS = torch.tensor([6, 3])
COINS = torch.tensor([[0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()
UPDATE = importlib.import_module(os.environ.get("UPDATE", "train"))
STUDENTS = {"sorl.py": sorl, "train.py": UPDATE}
REAL = {"sorl.py": real, "train.py": train}


@dataclass
class Exercise:
    function: str
    check: Callable
    file: str


# --- what a check is made of ----------------------------------------------------------------------

def holds(tried: str, got, expected: str, true: bool) -> None:
    """One property that is no equation."""
    assert true, f"{tried}: got {got}, expected {expected}"


def plain(tried: str, value) -> numpy.ndarray:
    """A number or a tensor as float64."""
    if type(value) is Tensor:
        value = value.detach().double().numpy()
    try:
        return numpy.array(value if value is not None else "None", float)
    except (TypeError, ValueError, RuntimeError):
        holds(tried, f"{value!r:.40}", "a number or a tensor", False)


def same(tried: str, got, expected, within: float = 0.0) -> None:
    """One property: `got` is `expected`, a tensor, or one number for all of it. `within` is
    relative for numbers above 1."""
    got, expected = plain(tried, got), plain(tried, expected)
    if expected.ndim == 0:
        expected = numpy.broadcast_to(expected, got.shape)
    holds(tried, f"the shape {got.shape}", f"{expected.shape}", got.shape == expected.shape)
    with numpy.errstate(invalid="ignore"):  # of infinities
        close = abs(got - expected) <= within * numpy.maximum(1, abs(expected))
    close = numpy.where(numpy.isfinite(expected), close, False) | (got == expected)
    if not close.all():
        place = tuple(numpy.argwhere(~close)[0].tolist())
        where = f" at {list(place)}" if place else ""
        holds(tried + where, f"{got[place]:.4g}", f"{expected[place]:.4g}", False)


def unseen(*shape):
    """Uniforms that are new every time, so that what comes out cannot be written down before."""
    generator = torch.Generator()
    generator.seed()
    return torch.rand(shape, generator=generator)


def logits_of(*shape, spread=4.0):
    """Random logits that want a gradient; with a spread of 300 most probabilities are 0."""
    return (spread * (unseen(*shape, V) - 0.5)).requires_grad_()


def three_logits(*shape):
    return (("random inputs", logits_of(*shape)),
            ("certain logits", logits_of(*shape, spread=300.0)),
            ("logits in bfloat16", logits_of(*shape).bfloat16().detach()))


def tensors_in(value) -> list[Tensor]:
    """The tensors of nested lists, tuples, and Rollouts."""
    parts = list(vars(value).values()) if hasattr(value, "acted") else value
    if isinstance(parts, (list, tuple)):
        return [tensor for part in parts for tensor in tensors_in(part)]
    return [value] if isinstance(value, Tensor) else []


class AnotherDevice(TorchFunctionMode):
    """Finds without a GPU what fails on one: a tensor made without device= that meets an input.

    Indices may lie elsewhere than what they index, and single numbers anywhere."""
    TAKES_INDICES = Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put, Tensor.index_put_

    def __torch_function__(self, function, types, args=(), kwargs=None):
        more = list((kwargs or {}).values())
        result, given = function(*args, **(kwargs or {})), tensors_in([*args, *more])
        here = [hasattr(tensor, "made_here") for tensor in given if tensor.dim() > 0]
        if any(isinstance(word, (torch.device, str)) for word in (*args, *more)):
            return result.view_as(result) if isinstance(result, Tensor) else result  # moved
        if function in self.TAKES_INDICES and not here[0]:
            return result
        if any(here) and not all(here):
            raise RuntimeError("a tensor made without device= meets one of the inputs")
        if all(here) and (here or not given):
            for tensor in tensors_in(result):
                tensor.made_here = True
        return result


def attempt(tried: str, function, *args):
    """Call a function of the student's, as if the inputs were on a GPU."""
    try:
        with AnotherDevice():
            return function(*args)
    except Exception as error:
        name, message = type(error).__name__, (str(error).splitlines() or [""])[0]
        if not message:  # such as that of an exercise that is not written yet
            raise
        raise AssertionError(f"{tried}: got {name}: {message}, expected no error") from error


def as_ours(sorl, function: str, *args, label="random inputs", within=1e-4) -> None:
    """The function does what the project's does with copies of these arguments."""
    ours, theirs = copy.deepcopy(args), copy.deepcopy(args)
    names = list(inspect.signature(OURS[function]).parameters)
    tried = ", ".join([label, *(f"{name}={value}" for name, value in zip(names, args)
                                if isinstance(value, (str, int, float)))])
    try:
        expected = OURS[function](*ours)
    except ValueError:
        try:
            getattr(sorl, function)(*theirs)
            outcome = "no error"
        except Exception as error:
            outcome = type(error).__name__
        holds(tried, outcome, "ValueError", outcome == "ValueError")
        return

    got = attempt(tried, getattr(sorl, function), *theirs)
    compare(tried, got, expected, RESULTS.get(function, ()), within)
    for name, given, other, before in zip(names, theirs, ours, args):
        if isinstance(given, GPT):
            same(f"{tried}, the rows that went through it", given.pushed[0], other.pushed[0])
        for now, then in zip(tensors_in(given), tensors_in(before)):
            same(f"{tried}, the {name} that was given", now, then)
    for name, given, wanted in zip(names, gradients(got, theirs), gradients(expected, ours)):
        for now, then in zip(given, wanted):
            same(f"{tried}, gradient of {name}", now, then, within)


RESULTS = {"feed": ("what is fed", "decoded"), "reward_by_token": ("mean advantage", "count")}


def compare(tried: str, got, expected, names=(), within=0.0) -> None:
    """Results: values, kind of numbers, and whether they carry a gradient."""
    if isinstance(expected, tuple):
        holds(tried, type(got).__name__, "a tuple", isinstance(got, tuple))
        for name, mine, theirs in zip(names, got, expected, strict=True):
            compare(f"{tried}, {name}", mine, theirs, (), within)
    elif hasattr(expected, "acted"):
        for name, value in vars(expected).items():
            compare(f"{tried}, {name}", getattr(got, name, None), value, (), within)
    elif expected is None:
        holds(tried, type(got).__name__, "None", got is None)
    else:
        same(tried, got, expected, within)
        if isinstance(expected, Tensor) and isinstance(got, Tensor):
            holds(f"{tried}, its device", "that of a tensor made without device=",
                  "that of the inputs", not hasattr(got, "made_here"))
            kinds = kind(got), kind(expected)
            fine = kinds[0] == kinds[1] or kinds == ("whole", "float32")
            holds(f"{tried}, its numbers", *kinds, fine)
            carries = [("no gradient", "a gradient")[x.requires_grad] for x in (got, expected)]
            holds(tried, *carries, carries[0] == carries[1])


def kind(tensor: Tensor) -> str:
    """What its numbers are. Wider ones than expected do no harm."""
    if tensor.is_floating_point():
        return "float32" if tensor.dtype == torch.float64 else str(tensor.dtype)[6:]
    return "bool" if tensor.dtype == torch.bool else "whole"


def gradients(results, args) -> list[list[Tensor]]:
    """Of a sum of all results with different weights, for each argument; 0 where there is none."""
    results = [result for result in tensors_in(results) if result.requires_grad]
    total = sum((result * (uniform(*result.shape, seed=7) + 0.5)).sum() for result in results)
    found = []
    for arg in args:
        leaves = [tensor for tensor in tensors_in(arg) if tensor.requires_grad]
        grads = [None] * len(leaves)
        if results and leaves:
            grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        found.append([torch.zeros_like(leaf) if grad is None else grad
                      for leaf, grad in zip(leaves, grads)])
    return found


def random_texts(N: int, T: int):
    """Texts (N,T) and coins (N,T), in the first text none, in the second one all of its words."""
    lengths = [T, T - 1, *torch.randint(1, T + 1, (N - 2,)).tolist()]
    text, _ = texts_of(lengths, T, seed=int(1e6 * unseen()))
    mask = (unseen(N, T) < 0.5) & (text < PAD)
    mask[0], mask[1] = False, text[1] < PAD
    return text, mask


# --- the checks -----------------------------------------------------------------------------------

def check_01(sorl):
    """sample_mask: coins at rate p_m on the words; never the end token, never padding."""
    u, lengths, words = uniform(4000, 7), LENGTHS.repeat(2000), WORDS.repeat(2000, 1)
    mask, more = (sorl.sample_mask(u.clone(), lengths, p_m) for p_m in (0.3, 0.6))
    holds("p_m=.3, its numbers", kind(mask), "bool", kind(mask) == "bool")
    same("p_m=.3, the end and padding", mask & ~words, False)
    same("p_m=.3, share of the words", mask[words].float().mean(), 0.3, 0.02)
    both = (mask[:, 0] & mask[:, 1]).float().mean()
    same("p_m=.3, share of pairs of words that are both masked", both, 0.09, 0.02)
    same("the same uniforms at p_m=.6: no position of p_m=.3 is left out", more | ~mask, True)
    same("p_m=0, a uniform of 0", sorl.sample_mask(0 * u, lengths, 0.0), False)
    for p_m in (0.0, 0.3, 1.0, -0.1, 1.5, math.nan):
        as_ours(sorl, "sample_mask", unseen(5, 7), torch.tensor([1, 2, 5, 7, 7]), p_m)
        as_ours(sorl, "sample_mask", unseen(2, 7), torch.tensor([8, 8]), p_m,
                label="lengths of T + 1, as online has them")


def check_02(sorl):
    """observe: [MASK] where the model acts; the static text as it is in `static`."""
    hidden = torch.tensor([[3, MASK, 4, MASK, MASK, EOS, PAD], [MASK, 7, EOS, PAD, PAD, PAD, PAD]])
    same("observation=masked", sorl.observe(TEXT.clone(), COINS, "masked", V), hidden)
    same("observation=static", sorl.observe(TEXT.clone(), COINS, "static", V), TEXT)
    for observation in ("masked", "static", "full", "maskd", ""):
        text, mask = random_texts(4, 6)
        as_ours(sorl, "observe", text, mask, observation, V)
        as_ours(sorl, "observe", text, mask, observation, 40)
        as_ours(sorl, "observe", text, mask & False, observation, V, label="nothing masked")


SAMPLED = ((1.0, 0), (0.5, 0), (1.0, 3), (2.0, 4))  # temperature and top-k


def check_03(sorl):
    """rollout_one_pass: K texts from one set of logits, drawn with the probabilities reported."""
    logits, u = 4 * uniform(2, 7, V) - 2, uniform(2, 2000, 7, seed=1)
    for how in SAMPLED:
        tried = "2000 samples, temperature={}, top_k={}".format(*how)
        tokens = sorl.rollout_one_pass(logits, TEXT.clone(), COINS, u.clone(), *how).tokens
        same(f"{tried}, special tokens drawn", (tokens[0][:, COINS[0]] >= PAD).sum(), 0)
        p = log_probs(logits, *how, end=False).exp()
        share = tokens[0, :, 1].bincount(minlength=V) / 2000
        same(f"{tried}, shares of the tokens drawn", share, p[0, 1], 0.04)
        both = ((tokens[0, :, 1] == 0) & (tokens[0, :, 3] == 0)).float().mean()
        same(f"{tried}, share of 0 at two positions at once", both, p[0, 1, 0] * p[0, 3, 0], 0.04)

    model, (src, pad) = tiny_model(), prompts([4, 7])
    logits = real.target_logits(model, src, pad, TEXT).detach()
    mask = COINS & torch.tensor([[True], [False]])
    r = sorl.rollout_one_pass(logits, TEXT.clone(), mask, unseen(2, 5, 7))
    same("fp, the rows that went through the model; one has no mask", r.fp, model.pushed[0])
    as_ours_in_one_pass(sorl, "rollout_one_pass")


def as_ours_in_one_pass(sorl, function: str, *decoded) -> None:
    """rollout_one_pass, or act, whose arguments are the same but for `decoded`."""
    text, mask = random_texts(5, 6)
    for how in SAMPLED:
        as_ours(sorl, function, logits_of(5, 6), text, mask, unseen(5, 3, 6), *decoded, *how)
    for label, logits in three_logits(5, 6):
        as_ours(sorl, function, logits, text, mask, unseen(5, 3, 6), label=label)
    for label, texts, K, acts in (("one text", 1, 2, True), ("K=1", 4, 1, True),
                                  ("nothing masked", 4, 3, False)):
        rows = slice(1, 1 + texts)  # the first of them has masks on all words
        as_ours(sorl, function, logits_of(5, 6)[rows].detach(), text[rows], mask[rows] & acts,
                unseen(texts, K, 6), label=label)


def check_04(sorl):
    """rollout_given: log-probabilities of texts that exist; 0 where nothing was acted."""
    tokens = random_texts(8, 6)[0].view(4, 2, 6)
    for how in ((1.0, 0), (0.5, 0), (1.0, 8)):
        acted = (unseen(4, 2, 6) < 0.7) & (tokens != PAD)
        for label, logits in three_logits(8, 6):
            as_ours(sorl, "rollout_given", logits, tokens, acted, *how, label=label)
        as_ours(sorl, "rollout_given", logits_of(8, 6), tokens, acted & False, *how,
                label="nothing acted")
        as_ours(sorl, "rollout_given", logits_of(4, 6), tokens[:, :1], acted[:, :1], *how,
                label="K=1")


def check_05(sorl):
    """advantage: R less the mean of all, or of the others; exactly 0 where all are equal."""
    R = torch.tensor([[0.2, 0.4, 0.9], [0.6, 0.1, 0.2]])  # deviations .2944, .2160; of both .2582
    by_hand = {"none": [[-.3, -.1, .4], [.3, -.2, -.1]],
               "source": [[-1.0190, -.3397, 1.3587], [1.3887, -.9258, -.4629]],
               "batch": [[-1.1619, -.3873, 1.5492], [1.1619, -.7746, -.3873]]}
    for (scale, expected), baseline in itertools.product(by_hand.items(), ("mean", "loo")):
        tried, factor = f"baseline={baseline}, scale={scale}", 1.5 if baseline == "loo" else 1
        A = sorl.advantage(R.clone(), baseline, scale)
        same(f"{tried}, rewards .2 .4 .9 and .6 .1 .2", A, factor * torch.tensor(expected), 1e-3)
        for reward, K in ((0.5, 2), (0.1, 3), (0.3, 7), (0.9, 64)):
            A = sorl.advantage(torch.full((2, K), reward), baseline, scale)
            same(f"{tried}, equal rewards ({K} times {reward})", A, 0.0)
        for rewards in ([[.5, .5, .50006]], [[.50, .52]], [[.3, .3], [.3, .9]], [[1., 0., 0., 1.]]):
            as_ours(sorl, "advantage", torch.tensor(rewards), baseline, scale,
                    label=f"rewards {rewards}", within=1e-6)
        as_ours(sorl, "advantage", torch.tensor([[0.75], [0.0]]), baseline, scale, label="K=1")
        as_ours(sorl, "advantage", unseen(3, 6), baseline, scale)
    for baseline, scale in (("lo0", "none"), ("mean", "row"), ("mean", False)):
        as_ours(sorl, "advantage", unseen(3, 6), baseline, scale)
    A = sorl.advantage(torch.tensor([[1, 0, 0]]))
    same("integer rewards 1 0 0", A, torch.tensor([[2 / 3, -1 / 3, -1 / 3]]), 1e-5)


def random_rollout(*shape):
    acted = unseen(*shape) < 0.7
    acted[0, 0] = False  # a text in which nothing is acted
    logp = (-3 * unseen(*shape) * acted).requires_grad_()
    return real.Rollout((10 * unseen(*shape)).long(), logp, acted)


def check_06(sorl):
    """policy_loss: minus the mean over texts of A_k times the text's summed log-probability. By
    hand: the sums are -3 and -1, A is 1 and -1: -(1·(-3) + (-1)·(-1)) / 2 = 1."""
    logp = torch.tensor([[[-1.0, -2.0, 0.0], [-1.0, 0.0, 0.0]]])
    rollout = real.Rollout(torch.zeros(1, 2, 3, dtype=torch.long), logp, logp < 0)
    same("A = 1, -1; sums -3, -1", sorl.policy_loss(rollout, torch.tensor([[1.0, -1]])), 1.0, 1e-6)
    for shape in ((3, 4, 5), (1, 1, 1)):
        A = (unseen(*shape[:2]) - 0.5).requires_grad_()
        as_ours(sorl, "policy_loss", random_rollout(*shape), A)


def check_07(sorl):
    """mle_loss: cross-entropy summed over the words and the end token, not over padding."""
    flat = torch.zeros(2, 7, V)
    same("14 tokens equally likely, texts of 6 and 3", sorl.mle_loss(flat, TEXT, LENGTHS),
         9 * math.log(14), 1e-5)
    text, lengths = texts_of([7, 1, 4, 2], 7, seed=int(1e6 * unseen()))
    for label, logits in three_logits(4, 7):
        as_ours(sorl, "mle_loss", logits, text, lengths, label=label)


def check_08(sorl):
    """entropy: ln 10 for ten words equally likely, 0 for a certain one; a mean of nats."""
    flat, sure = torch.full((2, V), -torch.inf)
    flat[:10], sure[3] = 0.0, 0.0
    special = flat.clone()
    special[[PAD, MASK]] = 5.0  # never actions
    logits = torch.stack([flat, sure, special])[None]
    for inside, expected in (([1, 0, 0], math.log(10)), ([0, 1, 0], 0.0),
                             ([1, 1, 0], math.log(10) / 2), ([0, 0, 1], math.log(10))):
        got = sorl.entropy(logits, torch.tensor([inside]).bool())
        same(f"positions {inside} of (ten words, one word, ten words)", got, expected, 1e-4)
    for label, logits in three_logits(2, 7):
        as_ours(sorl, "entropy", logits.detach(), TEXT != PAD, label=label)
        as_ours(sorl, "entropy", logits[0].detach(), TEXT[0] != PAD, label=f"{label}, (T,V)")


def check_09(sorl):
    """kl_divergence: KL(π ‖ base), in that order, exact over the vocabulary."""
    logits = torch.full((2, 1, 1, V), -torch.inf)
    logits[..., :2] = torch.tensor([[[[0.9, 0.1]]], [[[0.5, 0.5]]]]).log()
    got = sorl.kl_divergence(*logits, torch.tensor([[True]]))
    same("a policy of .9 and .1 from a base of .5 and .5", got, 0.3681, 1e-3)
    for (label, logits), (_, base) in zip(three_logits(2, 7), three_logits(2, 7)):
        as_ours(sorl, "kl_divergence", logits, base.detach(), TEXT != PAD, label=label)
        as_ours(sorl, "kl_divergence", logits, logits.detach(), TEXT != PAD,
                label="a policy from itself")


def check_10(sorl):
    """masked_runs: how deep inside a run of masks a position is, 0 outside."""
    got = sorl.masked_runs(torch.tensor([[1, 1, 0, 1, 1, 1, 0]]).bool())
    same("mask [1, 1, 0, 1, 1, 1, 0]", got[0], torch.tensor([1, 2, 0, 1, 2, 3, 0]))
    as_ours(sorl, "masked_runs", unseen(20, 12) < 0.7)
    as_ours(sorl, "masked_runs", unseen(4, 1) < 0.5, label="one column")


def check_11(sorl):
    """repetition: the share of neighbouring masked pairs that hold the same token twice."""
    mask = torch.tensor([[True, True, True, False]])
    tokens = torch.tensor([[[5, 5, 5, 5], [6, 6, 7, 7]]])
    same("5 5 5 and 6 6 7, all masked, then one not", sorl.repetition(tokens, mask), 0.75, 1e-6)
    apart = torch.tensor([[True, False, True, False]])
    same("no two neighbours masked", sorl.repetition(tokens, apart), 0.0)
    for K in (1, 4):
        as_ours(sorl, "repetition", (3 * unseen(20, K, 12)).long(), unseen(20, 12) < 0.7)
    as_ours(sorl, "repetition", tokens[..., :1], mask[:, :1], label="one column")


def check_12(sorl):
    """reward_by_token: 7 was drawn with A = 1 and -.5, 8 with -1; static tokens do not count."""
    tokens, acted = torch.tensor([[[7, 1], [7, 1], [8, 1]]]), torch.tensor([[[1, 0]] * 3]).bool()
    rollout = real.Rollout(tokens, torch.zeros(1, 3, 2), acted)
    mean, count = sorl.reward_by_token(rollout, torch.tensor([[1.0, -0.5, -1.0]]), V)
    same("how often", count, torch.tensor([0.0] * 7 + [2, 1] + [0] * 5))
    same("mean advantage", mean, torch.tensor([0.0] * 7 + [0.25, -1] + [0] * 5), 1e-6)
    tokens, acted = (10 * unseen(3, 4, 6)).long(), unseen(3, 4, 6) < 0.5
    for label, acted in (("random inputs", acted), ("nothing acted", acted & False)):
        drawn = real.Rollout(tokens, -unseen(3, 4, 6) * acted, acted)
        as_ours(sorl, "reward_by_token", drawn, unseen(3, 4) - 0.5, V, label=label)


def check_13(sorl):
    """feed: what the model sees. It decodes where it sees its own tokens, else it observes."""
    model, (src, pad) = tiny_model(), prompts([4, 7])
    model.pushed.zero_()
    u, ones = unseen(2, 3, 7), torch.ones_like(COINS)
    for observation in ("masked", "static", "maskd"):
        as_ours(sorl, "feed", model, src, pad, TEXT, COINS, u, observation)
        as_ours(sorl, "feed", model, src, pad, TEXT, COINS & False, u, observation,
                label="nothing masked")
    for how in SAMPLED:
        as_ours(sorl, "feed", model, src, pad, TEXT, COINS, u, "full", *how)
    for label, mask in (("everything masked", ones), ("nothing masked", COINS & False)):
        as_ours(sorl, "feed", model, src, pad, TEXT, mask, u[:, :1], "full",
                label=f"{label}, K=1")
        decoded = sorl.feed(model, src, pad, TEXT.clone(), mask, u, "full")[1]
        same(f"full, {label}, fp, one for every token that is drawn",
             decoded.fp, (mask[:, None] & (decoded.tokens != PAD)).sum())
    texts, coins = random_texts(4, 7)
    as_ours(sorl, "feed", model, src, pad, texts, coins, unseen(4, 3, 7), "full",
            label="two texts per source")


def check_14(sorl):
    """act: K samples from the logits of what was fed, with log-probabilities that can learn."""
    as_ours_in_one_pass(sorl, "act", None)
    for how in ((1.0, 0), (0.5, 0), (1.0, 8)):
        tokens, mask = random_texts(6, 6)[0].view(2, 3, 6), unseen(2, 6) < 0.7
        mask[:, -1] = True
        acted = mask[:, None] & (tokens != PAD)
        for label, acted in (("decoded", acted), ("decoded, nothing acted", acted & False)):
            decoded = real.Rollout(tokens, torch.zeros(2, 3, 6), acted, acted.sum(), 6)
            for spread in (4.0, 300.0):
                as_ours(sorl, "act", logits_of(6, 6, spread=spread), TEXT[:, :6], mask,
                        unseen(2, 3, 6), decoded, *how, label=label)


def check_15(sorl):
    """sample_tail: the model writes from a cut to the last column. By hand: at p_m = 1/2 the cut is
    the whole part of length times u."""
    u, lengths = torch.tensor([0.0, 0.5, 0.99, 0.5]), torch.tensor([6, 6, 6, 3])
    for p_m, cuts in ((0.5, [0, 3, 5, 1]), (1.0, [0, 0, 0, 0]), (0.0, [8, 8, 8, 8])):
        mask = sorl.sample_tail(u.clone(), lengths, 8, p_m)
        holds(f"p_m={p_m}, its numbers", kind(mask), "bool", kind(mask) == "bool")
        same(f"p_m={p_m}, texts of 6 6 6 3, uniforms 0 .5 .99 .5, the columns that are kept",
             (~mask).sum(1), torch.tensor(cuts))
    almost = torch.full((2,), 1 - 2 ** -24)  # the largest uniform
    for p_m in (0.0, 0.1, 0.5, 0.8, 1.0, -0.1, 1.5, math.nan):
        as_ours(sorl, "sample_tail", unseen(5), torch.tensor([1, 2, 5, 7, 7]), 9, p_m)
        as_ours(sorl, "sample_tail", almost, torch.tensor([4, 9]), 9, p_m, label="u almost 1")


def check_16(sorl):
    """policy_loss with `before`: PPO's clipped ratio. By hand: the ratios of both samples are 1.5
    and .5; A = 1 counts 1.2 and .5, A = -1 counts -1.5 and -.8: -(1.7 - 2.3) / 2 = .3."""
    logp, acted = torch.tensor([[[1.5, 0.5, 1.0]] * 2]).log(), torch.tensor([[[1, 1, 0]] * 2])
    rollout = real.Rollout(acted, logp, acted.bool())
    got = sorl.policy_loss(rollout, torch.tensor([[1.0, -1.0]]), 0 * logp)
    same("A = 1, -1; ratios 1.5, .5", got, 0.3, 1e-5)
    for spread in (0.0, 0.1, 2.0):
        rollout, A = random_rollout(3, 4, 5), (unseen(3, 4) - 0.5).requires_grad_()
        moved = spread * (unseen(3, 4, 5) - 0.5) * rollout.acted
        as_ours(sorl, "policy_loss", rollout, A, rollout.logp.detach() - moved,
                label=f"log ratios within {spread / 2}")
    as_ours(sorl, "policy_loss", random_rollout(3, 4, 5), A, label="no `before`")


# --- one update -----------------------------------------------------------------------------------

@lru_cache
def tiny_update():
    """Records whose static texts are among their references, a tokenizer, and two models."""
    records, models = [], []
    for i, sky in enumerate(("rain", "snow", "fog", "sun", "hail", "wind")):
        texts = [f"{sky} in Oslo, {i} knots", f"{i} knots and {sky}", f"some {sky} here"]
        records.append(data.Record(f"Oslo {sky} {i}", texts, target=texts[:2], static=texts))
    tok = Tokenizer.train([text for r in records for text in (r.source, *r.references)], 300)
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(GPT(GPTConfig(tok.vocab_size, 64, 1, 2, 16, init_std=0.06)))
        with torch.no_grad():
            for p in models[-1].parameters():
                p.mul_(3.0)
    return records, tok, *models


def reward(texts, references, sources) -> list[float]:
    """Tells texts apart that no real reward does, and their references and sources, too."""
    told = [repr(of_text).encode() for of_text in zip(texts, references, sources)]
    return [zlib.crc32(words) % 11 / 10 for words in told]


def new_run(cfg, step: int):
    """A run before one of its updates, and the batch of that."""
    records, tok, *models = tiny_update()
    model, base = copy.deepcopy(models)
    policy = Policy(model, tok, 12, torch.device("cpu"))
    run = train.Run(cfg, policy, reward, "", None, base, step=step)
    batches = train.Batches(cfg, records, policy, run.reward, run.written)
    batch, _ = batches.get(step)
    model.pushed.zero_()
    return run, batch


def learn_as_ours(tried: str, got, expected, ours, theirs) -> None:
    """A loss: its value, the gradients of the policy and of the base, and the rows it took."""
    same(f"{tried}, the loss", got, expected, 1e-5)
    holds(f"{tried}, the loss", "no gradient", "one to the model", got.requires_grad)
    grads = []
    for loss, run in ((got, theirs), (expected, ours)):
        attempt(tried, loss.backward)
        grads.append(torch.cat([p.grad.flatten() for p in run.policy.model.parameters()
                                if p.grad is not None]))
        given = any(p.grad is not None for p in run.base.parameters())
        holds(f"{tried}, the base", "a gradient", "none", not given)
    size = grads[1].abs().max()
    same(f"{tried}, the gradient, its largest number as 1", grads[0] / size, grads[1] / size, 1e-3)
    for name, mine, limit in (("policy", theirs.policy.model, ours.policy.model),
                              ("base", theirs.base, ours.base)):
        rows, most = int(mine.pushed[0]), int(limit.pushed[0])
        holds(f"{tried}, the rows that went through the {name}", rows, f"{most}", rows <= most)


def config_of(setting: str, **flags):
    """Flags without the setting's name, which an update does not ask for."""
    given = dict(batch_size=6, kl_weight=0.0, mle_weight=0.4, K=3, p_m=0.4) | flags
    return replace(train.make_config(given, setting), setting="any")


def check_17(update):
    """imitate: cross-entropy per token; half of the rows have masks, from masked_from on."""
    for setting, step, masked_from in (("masked", 3, 0), ("masked", 2, 2), ("masked", 1, 2),
                                       ("static", 3, 0), ("online", 3, 0)):
        cfg = replace(config_of(setting), masked_from=masked_from)
        tried = f"observation={cfg.observation}, update {step}, {masked_from=}"
        for number in (1, 2):
            (ours, batch), (theirs, mine) = new_run(cfg, step), new_run(cfg, step)
            got = attempt(tried, update.imitate, theirs, mine, number)
            learn_as_ours(tried, got, OURS["imitate"](ours, batch, number), ours, theirs)


def reinforce_as_ours(update, setting: str, step: int = 0, keys=(), **flags) -> None:
    """reinforce at one update, or at that and the next one, for which weights have changed."""
    cfg = config_of(setting, **flags)
    (ours, batch), (theirs, mine) = new_run(cfg, step), new_run(cfg, step)
    for late in range(cfg.reuse):
        tried = ", ".join([f"the flags of {setting}", *(f"{key}={flags[key]}" for key in flags),
                           f"update {step + late}"])
        expected, logged = OURS["reinforce"](ours, batch, 7, 2)
        got, log = attempt(tried, update.reinforce, theirs, mine, 7, 2)
        for key in keys or logged:
            holds(f"{tried}, the log", f"no {key}", "one", key in log)
            if key == "rollout":
                same(f"{tried}, log['rollout'].tokens", log[key].tokens, logged[key].tokens)
            else:
                same(f"{tried}, log[{key!r}]", log[key], logged[key], 1e-4)
                holds(f"{tried}, log[{key!r}]", "a gradient", "none",
                      not getattr(log[key], "requires_grad", False))
        learn_as_ours(tried, got, expected, ours, theirs)
        for run in (ours, theirs):
            run.step += 1
            with torch.no_grad():
                for p in run.policy.model.parameters():
                    p.grad = p.mul_(1.1).grad.zero_()


def check_18(update):
    """reinforce for `masked` alone: the loss, its gradient, and A, rewards and fp in the log."""
    for flags in ({}, dict(num_static=2), dict(baseline="loo", adv_scale="none"),
                  dict(adv_scale="batch"), dict(temperature=2.0, top_k=9), dict(p_m=0.9)):
        reinforce_as_ours(update, "masked", keys=("A", "rewards", "fp"), **flags)


def check_19(update):
    """reinforce for every setting: the loss, its gradient and all of the log."""
    for setting, flags in (
            ("masked", {}), ("masked", dict(kl_weight=0.1, num_static=2)),
            ("masked", dict(credit=0.5, num_static=3, kl_weight=0.1)), ("static", {}),
            ("static", dict(temperature=2.0, top_k=9)), ("offline", dict(num_static=3)),
            ("online", {}), ("online", dict(kl_weight=0.1)), ("online", dict(baseline="loo", K=1)),
            ("online", dict(temperature=2.0, top_k=5)), ("online", dict(reuse=2)),
            ("full", dict(kl_weight=0.1, stored="random")), ("tail", dict(p_m=0.5, reuse=1)),
            ("tail", dict(p_m=0.5, reuse=2, num_static=2, kl_weight=0.1)),
            ("tail", dict(p_m=0.9, reuse=1, num_static=2, stored="best"))):
        reinforce_as_ours(update, setting, **flags)
    reinforce_as_ours(update, "refresh", 2, refresh=2, num_static=2)


EXERCISES = {}  # number -> what is to be written; the docstring of a check begins with the function
for name, check in list(globals().items()):
    if name.startswith("check_"):
        file = "sorl.py" if name <= "check_16" else "train.py"
        EXERCISES[name[6:]] = Exercise(check.__doc__.split()[0].rstrip(":"), check, file)


def copy_of(function) -> Callable:
    """`grade` blanks the project's function while it runs a check: whoever calls it has not
    written it. The check goes on with this one."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__,
                              function.__defaults__)


OURS = {e.function: copy_of(getattr(REAL[e.file], e.function)) for e in EXERCISES.values()}


@pytest.mark.parametrize(
    "number", EXERCISES, ids=[f"exercise_{n}_{e.function}" for n, e in EXERCISES.items()])
def test_solved(number):
    e = EXERCISES[number]
    e.check(STUDENTS[e.file])
