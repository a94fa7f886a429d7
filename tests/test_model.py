"""The network: padding, cache, sampling, beam search, counters."""
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import EOS, GPT, MASK, PAD, SEP, Cache, GPTConfig, beam_search, draw, finish, generate, log_probs

V = 14  # the tiny model: ids 0..9 are ordinary; PAD 10, SEP 11, EOS 12, MASK 13


def prompts(lengths, seed=0):
    """Random left-padded sources that end in SEP."""
    g, S = torch.Generator().manual_seed(seed), max(lengths) + 1
    src = torch.full((len(lengths), S), V + PAD)
    for row, n in zip(src, lengths):
        row[S - 1 - n:] = torch.cat([torch.randint(0, V + PAD, (n,), generator=g), torch.tensor([V + SEP])])
    return src, S - 1 - torch.tensor(lengths)


@pytest.mark.parametrize("pads", [(0, 0), (0, 3), (2, 5)])
def test_cached_and_uncached_logits_agree(tiny, pads):
    """Columns pushed one at a time, in chunks or all at once give the same logits, on padded rows too."""
    src, pad = prompts([9 - p for p in pads])
    src, pad = torch.cat([torch.full((2, 10 - src.size(1)), V + PAD), src], 1), torch.tensor(pads)
    whole = tiny(src, pad)
    for cuts in ([1] * 10, [4, 1, 5], [10]):
        cache, parts, at = Cache(tiny.config, 10), [], 0
        for n in cuts:
            parts.append(tiny(src[:, at:at + n], pad, cache))
            at += n
        inside = torch.arange(10) >= pad[:, None]  # logits of padding mean nothing
        assert (torch.cat(parts, 1) - whole)[inside].abs().max() < 1e-5


@pytest.mark.parametrize("extra", [1, 4, 11])
def test_extra_left_padding_changes_nothing(tiny, extra):
    src, pad = prompts([3, 7])
    wider = torch.cat([torch.full((2, extra), V + PAD), src], 1)
    difference = (tiny(wider, pad + extra)[:, extra:] - tiny(src, pad))[torch.arange(8) >= pad[:, None]]
    assert difference.abs().max() < 1e-5
    assert (tiny(src[1:], None) - tiny(src[1:], pad[1:])).abs().max() < 1e-5  # the fast path without padding


def test_a_row_of_nothing_but_padding_is_finite(tiny):
    assert torch.isfinite(tiny(torch.full((1, 5), V + PAD), torch.tensor([5]))).all()


def test_the_future_is_invisible(tiny):
    src, pad = prompts([9])
    other = src.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 10
    assert torch.equal(tiny(src, pad)[:, :6], tiny(other, pad)[:, :6])


def test_too_long_a_row_is_refused(tiny):
    with pytest.raises(ValueError, match="33 columns does not fit block_size 32"):
        tiny(torch.zeros(1, 33, dtype=torch.long))


def test_log_probs_normalise_and_ban():
    """Exponentials sum to 1 whatever is banned or cut, a constant changes nothing, banned ids have probability 0."""
    g = torch.Generator().manual_seed(1)
    for shape, temperature, top_k, end in itertools.product([(V,), (3, V), (2, 3, V)], [0.3, 1.0, 2.0], [0, 1, 4, 99],
                                                            [True, False]):
        logits = 5 * torch.randn(shape, generator=g)
        logp = log_probs(logits, temperature, top_k, end)
        assert torch.allclose(logp.exp().sum(-1), torch.ones(shape[:-1]), atol=1e-6)
        assert torch.allclose(log_probs(logits + 7.5, temperature, top_k, end), logp, atol=1e-5)
        never = [V + PAD, V + SEP, V + MASK] + ([] if end else [V + EOS])
        assert (logp[..., never] == -torch.inf).all()
        if 0 < top_k < 10:
            assert ((logp > -torch.inf).sum(-1) == top_k).all()


def test_draw_by_hand():
    """p = (.2, 0, .5, .3): u below .2 draws 0, below .7 draws 2, else 3; id 1 never."""
    logp = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    u = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2 ** -24])
    assert draw(logp, u).tolist() == [0, 0, 2, 2, 3, 3]


def test_draw_has_the_right_frequencies():
    """100,000 draws: every frequency within 4 standard errors."""
    g = torch.Generator().manual_seed(0)
    logp = torch.randn(V, generator=g).log_softmax(-1)
    n = 100_000
    frequency = draw(logp, torch.rand(n, generator=g)).bincount(minlength=V) / n
    assert ((frequency - logp.exp()).abs() < 4 * (logp.exp() / n).sqrt()).all()


def test_finish_by_hand():
    tokens, lengths = finish(torch.tensor([[1, 12, 3, 12], [1, 2, 3, 4], [12, 12, 12, 12]]), V)
    assert tokens.tolist() == [[1, 12, 10, 10], [1, 2, 3, 4], [12, 10, 10, 10]]
    assert lengths.tolist() == [2, 4, 1]


@pytest.mark.parametrize("K, T, temperature, top_k", [(1, 9, 1.0, 0), (3, 12, 1.5, 0), (4, 20, 0.7, 3), (2, 1, 1.0, 0)])
def test_generate_with_and_without_cache(tiny, K, T, temperature, top_k):
    """The same texts, and as many rows pushed without a cache as tokens were drawn: FP, measured."""
    src, pad = prompts([5, 2, 9, 1])
    u = torch.rand(4, K, T, generator=torch.Generator().manual_seed(2))
    cached = generate(tiny, src, pad, T, u, temperature=temperature, top_k=top_k)
    tiny.pushed.zero_()
    assert torch.equal(generate(tiny, src, pad, T, u, temperature=temperature, top_k=top_k, use_cache=False), cached)
    assert tiny.pushed[0] == (cached != V + PAD).sum()
    tiny.pushed.zero_()


def test_generate_draws_what_the_model_says(tiny):
    """Each token is the inverse CDF of its uniform under the uncached logits of the text before it."""
    src, pad = prompts([4, 6])
    u = torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(3))
    tokens = generate(tiny, src, pad, 8, u)
    for b, k, t in itertools.product(range(2), range(2), range(8)):
        if tokens[b, k, t] != V + PAD:
            logits = tiny(torch.cat([src[b], tokens[b, k, :t]])[None], pad[b:b + 1])[0, -1]
            assert tokens[b, k, t] == draw(log_probs(logits), u[b, k, t:t + 1])[0]


def test_a_row_does_not_depend_on_its_neighbours(tiny):
    src, pad = prompts([4, 6, 1])
    u = torch.rand(3, 2, 10, generator=torch.Generator().manual_seed(4))
    together = generate(tiny, src, pad, 10, u)
    for b in range(3):
        assert torch.equal(generate(tiny, src[b:b + 1], pad[b:b + 1], 10, u[b:b + 1]), together[b:b + 1])


class NoCopies(TorchDispatchMode):
    """Raises where a tensor is made of the host's values: by torch.tensor (seen on a CPU alone), or moved to a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        moved = function.name() == "aten::_to_copy" and torch.device((kwargs or {}).get("device", args[0].device)) != args[0].device
        assert function.name() != "aten::lift_fresh" and not moved, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [{}, dict(top_k=3, temperature=1.3, end=False), dict(static=(3, 9), mask=(3, 9))])
def test_fixed_decoding_never_waits_for_the_device(tiny, given):
    """The same texts with finished rows kept; and it runs on tensors without values, where whatever looks at one raises, and
    without a copy from the host."""
    src, pad = prompts([4, 6, 1])
    g = torch.Generator().manual_seed(5)
    u = torch.rand(3, 2, 9, generator=g)
    if "static" in given:
        given = dict(static=torch.randint(0, 10, (3, 9), generator=g), mask=torch.rand(3, 9, generator=g) < 0.5)
    with NoCopies():
        tokens = generate(tiny, src, pad, 9, u, **given, fixed=True)
        for copy in (lambda: torch.tensor([1, 2]), lambda: torch.ones(2).to("meta")):
            with pytest.raises(AssertionError):
                copy()
    assert torch.equal(tokens, generate(tiny, src, pad, 9, u, **given))

    def bare(x):
        return x.to("meta") if isinstance(x, torch.Tensor) else x
    there = GPT(tiny.config).to("meta"), bare(src), bare(pad), 9, bare(u)
    given = {name: bare(value) for name, value in given.items()}
    with NoCopies():
        assert generate(*there, **given, fixed=True).shape == (3, 2, 9)
    with pytest.raises(NotImplementedError):
        generate(*there, **given)


def test_beam_search(tiny):
    """Width 1 is greedy; a beam as wide as the tree finds the best text of all by mean log-probability."""
    src, pad = prompts([4, 6, 1])
    assert torch.equal(beam_search(tiny, src, pad, 12, 1), generate(tiny, src, pad, 12)[:, 0])
    best, T = -math.inf, 2
    for text in [(V + EOS,)] + [(a, b) for a in range(10) for b in [*range(10), V + EOS]]:
        logits = tiny(torch.cat([src[:1], torch.tensor([text[:-1]], dtype=torch.long)], 1), pad[:1], start=6)
        logp = log_probs(logits[0]).gather(-1, torch.tensor(text)[:, None]).mean().item()
        if logp > best:
            best, expected = logp, list(text) + [V + PAD] * (T - len(text))
    assert beam_search(tiny, src[:1], pad[:1], T, 121)[0].tolist() == expected


def test_tied_embeddings_and_parameter_count():
    model = GPT(GPTConfig(vocab_size=100, block_size=16, n_layer=2, n_head=2, n_embd=8))
    block = 4 * 8 + 3 * 8 * 8 + 3 * 8 + 8 * 8 + 8 + 2 * 8 * 32 + 32 + 8  # two norms, qkv, proj, mlp
    assert sum(p.numel() for p in model.parameters()) == 100 * 8 + 16 * 8 + 2 * block + 2 * 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose parallel sums round")
def test_draw_on_a_gpu_never_gives_a_token_of_probability_0():
    g = torch.Generator().manual_seed(0)
    logp = torch.randn(64, 50_000, generator=g)
    logp = logp.masked_fill(torch.rand(logp.shape, generator=g) < 0.5, -torch.inf).log_softmax(-1).cuda()
    ids = draw(logp, torch.rand(64, 10_000, generator=g).cuda())
    assert (logp.gather(-1, ids) > -torch.inf).all()
