"""The network: padding, cache, sampling, counters. Ids 0..9 are ordinary, PAD 10, SEP 11, EOS 12,
MASK 13."""
import itertools

import pytest
import torch

from conftest import V, prompts, texts_of, uniform
from model import EOS, GPT, MASK, PAD, SEP, Cache, GPTConfig, draw, finish, generate, log_probs


@pytest.mark.parametrize("columns", [0, 10])
@pytest.mark.parametrize("pads", [(0, 0), (0, 3), (2, 5)])
def test_cached_and_uncached_logits_agree(tiny, pads, columns):
    """Columns pushed one at a time, in chunks or all at once, on padded rows too."""
    src, pad = (uniform(2, 10) * 10).long(), torch.tensor(pads)
    inside = torch.arange(10) >= pad[:, None]  # logits of padding mean nothing
    src[~inside] = V + PAD
    whole = tiny(src, pad)
    for cuts in ([1] * 10, [4, 1, 5], [10]):
        cache = Cache(columns)
        parts = [tiny(columns, pad, cache) for columns in src.split(cuts, 1)]
        assert (torch.cat(parts, 1) - whole)[inside].abs().max() < 1e-5


@pytest.mark.parametrize("extra", [1, 11])
def test_extra_left_padding_changes_nothing(tiny, extra):
    src, pad = prompts([3, 7])
    wider = torch.cat([torch.full((2, extra), V + PAD), src], 1)
    difference = tiny(wider, pad + extra)[:, extra:] - tiny(src, pad)
    assert difference[torch.arange(8) >= pad[:, None]].abs().max() < 1e-5
    fast = tiny(src[1:], None)  # without padding
    assert (fast - tiny(src[1:], pad[1:])).abs().max() < 1e-5


def test_a_row_of_padding_alone_is_finite(tiny):
    assert torch.isfinite(tiny(torch.full((1, 5), V + PAD), torch.tensor([5]))).all()


def test_the_future_is_invisible(tiny):
    src, pad = prompts([9])
    other = src.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 10
    assert torch.equal(tiny(src, pad)[:, :6], tiny(other, pad)[:, :6])
    assert not torch.allclose(tiny(src, pad)[:, 6:], tiny(other, pad)[:, 6:])


def test_what_was_pushed_is_counted(tiny):
    """Rows with any text in them, and tokens that are not padding."""
    src = torch.full((3, 8), V + PAD)
    src[:2] = prompts([3, 7])[0]
    tiny(src, torch.tensor([4, 0, 8]))
    tiny(src[:, -1:], None)
    assert tiny.pushed.tolist() == [2 + 2, 4 + 8 + 2]


def test_too_long_a_row_is_refused(tiny):
    """Left padding is no part of a row."""
    row = torch.zeros(1, 33, dtype=torch.long)
    for pad in (None, torch.tensor([0])):
        with pytest.raises(ValueError, match="33 tokens does not fit block_size 32"):
            tiny(row, pad)
    row[:, 0] = V + PAD
    assert torch.allclose(tiny(row, torch.tensor([1]))[:, 1:], tiny(row[:, 1:]), atol=1e-5)


def test_tied_embeddings_and_parameter_count():
    model = GPT(GPTConfig(vocab_size=100, block_size=16, n_layer=2, n_head=2, n_embd=8))
    block = 4 * 8 + 3 * 8 * 8 + 3 * 8 + 8 * 8 + 8 + 2 * 8 * 32 + 32 + 8  # norms, qkv, proj, mlp
    expected = 100 * 8 + 16 * 8 + 2 * block + 2 * 8
    assert sum(p.numel() for p in model.parameters()) == expected


# --- sampling -------------------------------------------------------------------------------------

@pytest.mark.parametrize("top_k", [0, 1, 4, 99])
@pytest.mark.parametrize("end", [True, False])
def test_log_probs_normalise_and_ban(top_k, end):
    """Probabilities sum to 1 whatever is banned or cut; a constant changes none of them."""
    for shape, temperature in itertools.product([(V,), (2, 3, V)], [0.3, 1.0, 2.0]):
        logits = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
        logp = log_probs(logits, temperature, top_k, end)
        assert torch.allclose(logp.exp().sum(-1), torch.ones(shape[:-1]), atol=1e-6)
        assert torch.allclose(log_probs(logits + 7.5, temperature, top_k, end), logp, atol=1e-5)
        never = [V + PAD, V + SEP, V + MASK] + ([] if end else [V + EOS])
        assert (logp[..., never] == -torch.inf).all()
        kept = top_k if 0 < top_k < 10 else 10 + end
        assert ((logp > -torch.inf).sum(-1) == kept).all()
        for given, dtype in ((torch.bfloat16, torch.float32), (torch.double, torch.double)):
            assert log_probs(logits.to(given), temperature, top_k, end).dtype == dtype
        likelier = logits[..., :1] - logits[..., 1:2]  # the ratio of two that are kept
        both = (logp[..., :2] > -torch.inf).all(-1)
        ratio = (logp[..., :1] - logp[..., 1:2])[both]
        assert torch.allclose(ratio, (likelier / temperature)[both], atol=1e-4)


def test_draw_by_hand():
    """p = (.2, 0, .5, .3): u below .2 draws 0, below .7 draws 2, else 3; id 1 never. The largest
    uniform draws the last token that has a probability."""
    logp = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    u = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2 ** -24])
    assert draw(logp, u).tolist() == [0, 0, 2, 2, 3, 3]
    assert draw(torch.tensor([0.6, 0.4, 0.0]).log(), u[-1:]).tolist() == [1]


def test_finish_by_hand():
    tokens, lengths = finish(torch.tensor([[1, 12, 3, 12], [1, 2, 3, 4], [12, 12, 12, 12]]), V)
    assert tokens.tolist() == [[1, 12, 10, 10], [1, 2, 3, 4], [12, 10, 10, 10]]
    assert lengths.tolist() == [2, 4, 1]


def by_definition(model, src, pad, u, static, mask, end):
    """Every column of every text from the logits of the whole row before it."""
    row = torch.arange(len(src)).repeat_interleave(u.size(1))
    tokens = static.masked_fill(static == V + PAD, V + EOS)[row]
    for t in range(u.size(2)):
        logits = model(torch.cat([src[row], tokens[:, :t]], 1), pad[row])[:, -1]
        drawn = draw(log_probs(logits, end=end), u.flatten(0, 1)[:, t, None])[:, 0]
        tokens[:, t] = torch.where(mask[row, t], drawn, tokens[:, t])
    return finish(tokens, V)[0].view(u.shape)


def masks(T):
    """Columns to decode in three texts, by name."""
    column, coins = torch.arange(T), uniform(3, T, seed=7)
    return {"all": torch.ones(3, T, dtype=torch.bool), "none": coins < 0, "coins": coins < 0.5,
            "few": coins < 0.15, "tails": column >= torch.tensor([[0], [T // 2], [T - 1]]),
            "one": column == torch.tensor([[0], [T], [T - 1]])}


@pytest.mark.parametrize("name", masks(1))
@pytest.mark.parametrize("K, T, end", [(2, 23, False), (1, 8, True), (3, 8, True), (2, 1, True)])
def test_generate_by_definition(tiny, name, K, T, end):
    """In rows as long as the model takes; nothing that is given changes."""
    src, pad = prompts([5, 2, 9])
    lengths = [T, (T + 1) // 2, T] if end else [T] * 3
    inputs = src, pad, uniform(3, K, T, seed=3), texts_of(lengths, T)[0], masks(T)[name]
    before = [tensor.clone() for tensor in inputs]
    *_, u, static, mask = inputs
    tokens = generate(tiny, src, pad, T, u, static=static, mask=mask, end=end)
    assert torch.equal(tokens, by_definition(tiny, *inputs, end))
    assert all(map(torch.equal, before, inputs))


def test_generate_without_mask_or_uniforms(tiny):
    """Every column is decoded; without uniforms the likeliest tokens, in one text."""
    (src, pad), u = prompts([4, 6]), uniform(2, 2, 8)
    how = dict(static=texts_of([8, 8], 8)[0], mask=torch.ones(2, 8, dtype=torch.bool))
    assert torch.equal(generate(tiny, src, pad, 8, u), generate(tiny, src, pad, 8, u, **how))
    sharp = generate(tiny, src, pad, 8, u[:, :1], temperature=1e-4)
    assert torch.equal(generate(tiny, src, pad, 8), sharp)


@pytest.mark.parametrize("name", masks(1))
@pytest.mark.parametrize("K", [1, 3])
def test_what_is_kept_before_the_first_drawn_token_is_pushed_once(tiny, name, K):
    """With the source, for its K texts; then each text, up to its last drawn token. A source
    without a token to draw is not pushed."""
    (src, pad), mask, expected = prompts([5, 2, 9]), masks(9)[name], 0
    for length, columns in zip((6, 3, 10), mask):
        drawn = columns.nonzero().flatten().tolist()
        if drawn:
            expected += length + drawn[0] + K * (drawn[-1] - drawn[0])
    static = (uniform(3, 9) * 10).long()  # none ends
    generate(tiny, src, pad, 9, uniform(3, K, 9), static=static, mask=mask, end=False)
    assert tiny.pushed[1] == expected


def test_nothing_is_decoded_after_an_end_that_is_kept(tiny):
    src, pad = prompts([4, 6])
    static, mask = texts_of([3, 9], 9)[0], torch.arange(9) >= torch.tensor([[3], [9]])
    tokens = generate(tiny, src, pad, 9, uniform(2, 2, 9), static=static, mask=mask)
    assert torch.equal(tokens, static[:, None].expand(2, 2, 9)) and not tiny.pushed.any()


def test_finished_rows_leave(tiny):
    """At every fourth column, if they are a fifth of the batch."""
    (src, pad), rows = prompts([4, 6, 2]), []
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 0], mask[1, 2:] = True, True
    hook = tiny.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    static = texts_of([9] * 3, 9)[0]
    generate(tiny, src, pad, 9, uniform(3, 2, 9), static=static, mask=mask, end=False)
    hook.remove()
    assert rows == [3, 6, 6, 6, 2, 2, 2]


def test_a_row_does_not_depend_on_its_neighbours(tiny):
    src, pad = prompts([4, 6, 1])
    u = uniform(3, 2, 10, seed=4)
    together = generate(tiny, src, pad, 10, u)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(generate(tiny, src[one], pad[one], 10, u[one]), together[one])


def test_decoding_leaves_no_weights_without_gradients(tiny, monkeypatch):
    """Under autocast the weights are cast once and kept. Those that decoding casts carry no
    gradient. From PyTorch 2.9 on they are not used where one is needed, and only the call of
    clear_autocast_cache shows that they are gone; before, the gradients do, too."""
    cleared, clear = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(clear()))
    src, pad = prompts([4, 6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(tiny, src, pad, 6, uniform(2, 2, 6))
        assert cleared
        loss = tiny(src, pad).float().logsumexp(-1).sum()
    loss.backward()
    missing = [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
