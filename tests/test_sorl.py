"""The method, against exact enumeration and hand-worked cases. `SORL=module` tests another implementation."""
import itertools

import pytest
import torch

from conftest import sorl
from model import EOS, MASK, PAD, SEP, generate, log_probs
from tests.test_model import V, prompts


def statics(lengths, T, seed=5):
    """Random texts (R,T) of these lengths, EOS included, PAD behind."""
    g = torch.Generator().manual_seed(seed)
    text = torch.full((len(lengths), T), V + PAD)
    for row, n in zip(text, lengths):
        row[:n] = torch.cat([torch.randint(0, V + PAD, (n - 1,), generator=g), torch.tensor([V + EOS])])
    return text, torch.tensor(lengths)


def u(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- randomness ------------------------------------------------------------------------------------------------------

def test_uniforms_are_a_function_of_the_key():
    a = sorl.uniforms((4, 3), 0, 7, "mask")
    torch.rand(5)  # the global generator has no say
    assert torch.equal(a, sorl.uniforms((4, 3), 0, 7, "mask"))
    assert not torch.equal(a, sorl.uniforms((4, 3), 0, 8, "mask"))
    assert not torch.equal(a, sorl.uniforms((4, 3), 0, 7, "tokens"))
    assert 0 <= a.min() and a.max() < 1


# --- mask ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["bernoulli", "count", "word"])
@pytest.mark.parametrize("p_m", [0.0, 0.3, 1.0])
def test_mask_never_the_end_never_padding(kind, p_m):
    text, lengths = statics([1, 2, 5, 9], 9)
    starts = torch.rand(V, generator=torch.Generator().manual_seed(1)) < 0.6
    mask = sorl.sample_mask(u(4, 9), lengths, p_m, kind, text, starts)
    assert not mask[torch.arange(9) >= lengths[:, None] - 1].any()
    assert mask.dtype == torch.bool and not mask[0].any()
    if p_m == 1:
        assert mask.sum(1).tolist() == [0, 1, 4, 8]
    if p_m == 0:
        assert not mask.any()


def test_mask_rate():
    """20,000 coins at p_m = .3: within 4 standard errors."""
    mask = sorl.sample_mask(u(2000, 11), torch.full((2000,), 11), 0.3)
    assert abs(mask[:, :10].float().mean() - 0.3) < 4 * (0.21 / 20000) ** 0.5


def test_mask_count_is_exact():
    lengths = torch.tensor([1, 4, 8, 11])
    assert sorl.sample_mask(u(4, 11), lengths, 0.4, "count").sum(1).tolist() == [0, 1, 3, 4]  # round(.4 · 0, 3, 7, 10)


def test_mask_word_by_hand():
    """Tokens a b c d, where b and d go on with a word: masking a masks b, masking b alone leaves a."""
    starts = torch.tensor([True, False, True, False] + [True] * 10)
    text, lengths = torch.tensor([[0, 1, 2, 3, V + EOS]]), torch.tensor([5])
    for coins, expected in (([.1, .9, .9, .9, 0], [1, 1, 0, 0, 0]), ([.9, .1, .9, .9, 0], [0, 1, 0, 0, 0]),
                            ([.9, .9, .1, .9, 0], [0, 0, 1, 1, 0])):
        assert sorl.sample_mask(torch.tensor([coins]), lengths, 0.5, "word", text, starts)[0].int().tolist() == expected


@pytest.mark.parametrize("p_m", [-0.1, 1.1, float("nan")])
def test_mask_refuses_what_is_no_probability(p_m):
    with pytest.raises(ValueError, match="p_m"):
        sorl.sample_mask(u(1, 3), torch.tensor([3]), p_m)


# --- observation -----------------------------------------------------------------------------------------------------

def test_masked_hides_the_token_and_static_shows_it(tiny):
    """Under `masked`, changing a masked token's true value changes no logit; under `static`, it does."""
    src, pad = prompts([4, 7])
    text, lengths = statics([8, 6], 8)
    mask = sorl.sample_mask(u(2, 8), lengths, 0.5)
    assert mask[:, :4].any(1).all()
    other = torch.where(mask, (text + 1) % 10, text)
    logits = {}
    for name, fed in itertools.product(["masked", "static"], [text, other]):
        observed = sorl.observe(fed, mask, name, V + MASK)
        logits.setdefault(name, []).append(sorl.target_logits(tiny, src, pad, observed))
    assert torch.equal(*logits["masked"])
    assert not torch.allclose(*logits["static"])


def test_target_logits_are_those_of_the_whole_row(tiny):
    src, pad = prompts([4, 7])
    text, _ = statics([8, 6], 8)
    whole = tiny(torch.cat([src, text], 1), pad)[:, src.size(1) - 1:-1]
    assert (sorl.target_logits(tiny, src, pad, text) - whole).abs().max() < 1e-5


# --- rollouts --------------------------------------------------------------------------------------------------------

def one_pass(tiny, K=3, p_m=0.5, seed=0):
    src, pad = prompts([4, 7])
    text, lengths = statics([8, 6], 8)
    mask = sorl.sample_mask(u(2, 8, seed=seed), lengths, p_m)
    logits = sorl.target_logits(tiny, src, pad, sorl.observe(text, mask, "masked", V + MASK))
    return text, mask, logits, sorl.rollout_one_pass(logits, text, mask, u(2, K, 8, seed=seed + 1))


def test_one_pass_fills_the_masked_positions_only(tiny):
    text, mask, logits, rollout = one_pass(tiny)
    kept = ~mask[:, None].expand_as(rollout.tokens)
    assert torch.equal(rollout.tokens[kept], text[:, None].expand_as(rollout.tokens)[kept])
    assert (rollout.tokens[~kept] < V + PAD).all()  # special tokens are never drawn
    assert (rollout.logp[kept] == 0).all() and (rollout.logp[~kept] < 0).all()
    assert torch.equal(rollout.acted, ~kept)
    expected = log_probs(logits, end=False)[:, None].expand(-1, 3, -1, -1).gather(-1, rollout.tokens[..., None])[..., 0]
    assert torch.allclose(rollout.logp[~kept], expected[~kept])


def test_one_pass_costs_one_row_a_static_text(tiny):
    """Measured by the model's own counter, whatever K is."""
    for K in (1, 16):
        tiny.pushed.zero_()
        *_, rollout = one_pass(tiny, K)
        assert rollout.fp == 2 == tiny.pushed[0] and rollout.fp_grad == 0


def test_one_pass_by_enumeration(tiny):
    """The frequency of every fill of two masked positions is the product of their probabilities: 40,000 samples, every
    one of the 100 fills within 5 standard errors."""
    src, pad = prompts([3])
    text, _ = statics([4], 4)
    mask = torch.tensor([[True, False, True, False]])
    logits = sorl.target_logits(tiny, src, pad, sorl.observe(text, mask, "masked", V + MASK))
    n = 40_000
    tokens = sorl.rollout_one_pass(logits, text, mask, u(1, n, 4)).tokens[0]
    measured = (tokens[:, 0] * 10 + tokens[:, 2]).bincount(minlength=100) / n
    p = log_probs(logits[0], end=False).exp()
    exact = (p[0, :10, None] * p[2, None, :10]).flatten()
    assert ((measured - exact).abs() < 5 * (exact / n).sqrt() + 1e-9).all()


def test_special_tokens_are_never_drawn_in_one_pass(tiny):
    """Even where the network wants nothing else."""
    text, lengths = statics([8, 6], 8)
    mask = sorl.sample_mask(u(2, 8), lengths, 0.7)
    logits = torch.zeros(2, 8, V)
    logits[..., PAD:] = 50.0
    rollout = sorl.rollout_one_pass(logits, text, mask, u(2, 50, 8))
    assert (rollout.tokens[rollout.acted] < V + PAD).all() and torch.isfinite(rollout.logp).all()


@pytest.mark.parametrize("K", [1, 4])
def test_full_at_one_is_online(tiny, K):
    """p_m = 1 with `full` draws the same tokens as plain sampling from the same uniforms, end token included."""
    src, pad = prompts([4, 7, 2])
    text, lengths = statics([8, 6, 3], 9)
    mask = sorl.sample_mask(u(3, 9), torch.full((3,), 10), 1.0)
    numbers = u(3, K, 9, seed=1)
    rollout = sorl.decode(tiny, src, pad, text, mask, numbers)
    assert torch.equal(rollout.tokens, generate(tiny, src, pad, 9, numbers))
    assert (rollout.tokens == V + EOS).any()  # or the test says nothing about the end token
    assert torch.equal(rollout.acted, rollout.tokens != V + PAD)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("p_m", [0.0, 0.4, 1.0])
def test_full_counts_its_masked_positions(tiny, p_m, use_cache):
    """One FP for each acted position of each sample, which is what the model pushes when nothing is cached."""
    src, pad = prompts([4, 7, 2])
    text, lengths = statics([8, 6, 3], 9)
    mask = sorl.sample_mask(u(3, 9), torch.full((3,), 10), p_m)
    tiny.pushed.zero_()
    rollout = sorl.decode(tiny, src, pad, text, mask, u(3, 2, 9, seed=1), use_cache=use_cache)
    assert rollout.fp == rollout.acted.sum() and rollout.fp_grad == 6
    if not use_cache:
        assert tiny.pushed[0] == rollout.fp
    kept = ~mask[:, None].expand_as(rollout.tokens) & sorl.text_mask(rollout.tokens, V)
    going = torch.where(text == V + PAD, V + EOS, text)[:, None].expand_as(rollout.tokens)
    assert torch.equal(rollout.tokens[kept], going[kept])


def test_full_without_end_keeps_the_length(tiny):
    src, pad = prompts([4, 7])
    text, lengths = statics([8, 8], 8)
    mask = sorl.sample_mask(u(2, 8), lengths, 0.6)
    rollout = sorl.decode(tiny, src, pad, text, mask, u(2, 20, 8), end=False)
    assert (rollout.tokens[..., 7] == V + EOS).all() and (rollout.tokens[..., :7] < V + PAD).all()


def test_given_texts_get_the_log_probabilities_of_the_sampler(tiny):
    """The gradient pass of online: log π of the drawn tokens, at the temperature and top-k they were drawn with."""
    src, pad = prompts([4, 7])
    mask = torch.ones(2, 9, dtype=torch.bool)
    full = sorl.decode(tiny, src, pad, statics([9, 9], 9)[0], mask, u(2, 3, 9), temperature=1.3, top_k=5)
    logits = sorl.target_logits(tiny, src.repeat_interleave(3, 0), pad.repeat_interleave(3, 0), full.tokens.flatten(0, 1))
    rollout = sorl.rollout_given(logits, full.tokens, full.acted, 1.3, 5)
    assert torch.isfinite(rollout.logp).all()
    for b, k in itertools.product(range(2), range(3)):
        n = int(full.acted[b, k].sum())
        alone = tiny(torch.cat([src[b], full.tokens[b, k, :n - 1]])[None], pad[b:b + 1])[0, src.size(1) - 1:]
        expected = log_probs(alone, 1.3, 5).gather(-1, full.tokens[b, k, :n, None])[:, 0]
        assert torch.allclose(rollout.logp[b, k, :n], expected, atol=1e-5)


def test_a_constant_on_all_logits_changes_no_log_probability(tiny):
    text, mask, logits, rollout = one_pass(tiny)
    shifted = sorl.rollout_one_pass(logits + 3.0, text, mask, u(2, 3, 8, seed=1))
    assert torch.equal(shifted.tokens, rollout.tokens) and torch.allclose(shifted.logp, rollout.logp, atol=1e-5)


# --- advantage and loss ----------------------------------------------------------------------------------------------

def test_advantage_by_hand():
    """Rewards 0, .5, 1: mean .5; the others' means .75, .5, .25; population standard deviation .4082."""
    R = torch.tensor([[0.0, 0.5, 1.0]])
    assert torch.allclose(sorl.advantage(R), torch.tensor([[-0.5, 0, 0.5]]))
    assert torch.allclose(sorl.advantage(R, "loo"), torch.tensor([[-0.75, 0, 0.75]]))
    assert torch.allclose(sorl.advantage(R, "greedy", torch.tensor([0.8])), torch.tensor([[-0.8, -0.3, 0.2]]))
    assert torch.allclose(sorl.advantage(R, scale=True), torch.tensor([[-1.2247, 0, 1.2247]]), atol=1e-4)
    assert torch.equal(sorl.advantage(torch.tensor([[0.7]]), "loo"), torch.tensor([[0.7]]))  # K = 1: REINFORCE
    assert torch.equal(sorl.advantage(torch.tensor([[0.7]]), "loo", scale=True), torch.tensor([[0.7]]))  # no spread
    flat = sorl.advantage(torch.tensor([[0.5, 0.5]]), "greedy", torch.tensor([0.4]), scale=True)
    assert torch.allclose(flat, torch.tensor([[0.1, 0.1]]))


@pytest.mark.parametrize("baseline, scale", list(itertools.product(["mean", "loo"], [False, True])))
def test_equal_rewards_give_exactly_zero(tiny, baseline, scale):
    """Exactly: .1 + .1 + .1 is not 3 · .1 in floating point, and a scaled rounding error would be a gradient of 1."""
    A = sorl.advantage(torch.full((2, 3), 0.1), baseline, scale=scale)
    assert (A == 0).all()
    *_, rollout = one_pass(tiny)
    loss = sorl.policy_loss(rollout, A)
    loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in tiny.parameters())
    tiny.zero_grad(set_to_none=True)


def test_policy_loss_by_hand():
    """Two samples, A = 1 and -2, log π sums -3 and -1, two and one actions: -(1·-3 + -2·-1)/2 = .5, and normalised
    -(1·-1.5 + -2·-1)/2 = -.25."""
    logp = torch.tensor([[[-1.0, -2.0, 0.0], [0.0, -1.0, 0.0]]])
    rollout = sorl.Rollout(torch.zeros(1, 2, 3, dtype=torch.long), logp, logp != 0)
    A = torch.tensor([[1.0, -2.0]])
    assert sorl.policy_loss(rollout, A).item() == pytest.approx(0.5)
    assert sorl.policy_loss(rollout, A, "masked").item() == pytest.approx(-0.25)


def test_an_empty_mask_has_no_loss(tiny):
    text, mask, logits, rollout = one_pass(tiny, p_m=0.0)
    assert not rollout.acted.any()
    assert sorl.policy_loss(rollout, torch.tensor([[1.0, -1, 0], [1, -1, 0]])).item() == 0
    assert sorl.policy_loss(rollout, torch.tensor([[1.0, -1, 0], [1, -1, 0]]), "masked").item() == 0


@pytest.mark.parametrize("K", [2, 3])
def test_leave_one_out_is_unbiased_by_enumeration(K):
    """Expectation over all 3^K draws of the gradient of the loss, against that of the exact expected reward; the mean
    baseline gives (1 - 1/K) of it. One masked position, three tokens, float64."""
    reward = torch.tensor([0.1, 0.9, 0.4], dtype=torch.float64)
    exact = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    (exact.softmax(0) @ reward).backward()
    for baseline, factor in (("loo", 1.0), ("mean", 1 - 1 / K)):
        w = exact.detach().clone().requires_grad_()
        expected = 0
        for draws in itertools.product(range(3), repeat=K):
            ids = torch.tensor(draws)
            p = w.detach().softmax(0)[ids].prod()
            rollout = sorl.Rollout(ids.view(1, K, 1), w.log_softmax(0)[ids].view(1, K, 1), torch.ones(1, K, 1).bool())
            expected = expected + p * sorl.policy_loss(rollout, sorl.advantage(reward[ids].view(1, K), baseline))
        expected.backward()
        assert torch.allclose(-w.grad, factor * exact.grad, atol=1e-12)


def test_policy_gradient_by_enumeration(tiny):
    """On the real network: the expected leave-one-out gradient over all fills of a masked position equals the gradient
    of the expected reward."""
    src, pad = prompts([3])
    text, _ = statics([4], 4)
    mask = torch.tensor([[False, True, False, False]])
    reward = torch.linspace(0, 1, 10).roll(3)
    logits = sorl.target_logits(tiny, src, pad, sorl.observe(text, mask, "masked", V + MASK))
    logp = log_probs(logits[0, 1], end=False)[:10]
    exact = torch.autograd.grad(logp.exp() @ reward, tiny.blocks[0].attn.qkv.weight, retain_graph=True)[0]
    loss = 0
    for a, b in itertools.product(range(10), repeat=2):
        tokens = text[:, None].repeat(1, 2, 1)
        tokens[0, :, 1] = torch.tensor([a, b])
        rollout = sorl.Rollout(tokens, torch.stack([logp[a], logp[b]]).view(1, 2, 1) * mask, mask[:, None].expand(1, 2, 4))
        A = sorl.advantage(reward[torch.tensor([[a, b]])], "loo")
        loss = loss + (logp[a] + logp[b]).exp().detach() * sorl.policy_loss(rollout, A)
    estimate = -torch.autograd.grad(loss, tiny.blocks[0].attn.qkv.weight)[0]
    assert torch.allclose(estimate, exact, atol=1e-6) and exact.abs().max() > 1e-4


def test_mle_loss_by_hand():
    """Uniform logits over V ids: ln V a token, EOS included, padding excluded; smoothing changes nothing there."""
    target, lengths = statics([3, 1], 5)
    for smoothing in (0.0, 0.1):
        loss = sorl.mle_loss(torch.zeros(2, 5, V), target, lengths, smoothing)
        assert loss.item() == pytest.approx(4 * torch.tensor(float(V)).log().item(), rel=1e-5)


# --- diagnostics -----------------------------------------------------------------------------------------------------

def test_entropy_and_kl_by_hand():
    """11 actions at equal logits: entropy ln 11. KL of that from a policy with one action at p: by the formula."""
    logits, inside = torch.zeros(1, 2, V), torch.tensor([[True, False]])
    assert sorl.entropy(logits, inside).item() == pytest.approx(torch.tensor(11.0).log().item(), rel=1e-5)
    assert sorl.kl_divergence(logits, logits, inside).item() == pytest.approx(0, abs=1e-6)
    other = logits.clone()
    other[..., 0] = 2.0
    q = torch.tensor([2.0] + [0.0] * 10).softmax(0)
    assert sorl.kl_divergence(logits, other, inside).item() == pytest.approx((1 / 11 * (1 / 11 / q).log()).sum().item(),
                                                                             rel=1e-4)


def test_distinct():
    assert sorl.distinct(["a b a b", "a b"]) == 2 / 4  # ab ba ab, ab: two of four
    assert sorl.distinct([""]) == 0


def test_masked_runs_repetition_and_fill_accuracy_by_hand():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool()
    assert sorl.masked_runs(mask).tolist() == [[1, 2, 0, 1, 2, 3]]
    tokens = torch.tensor([[[5, 5, 5, 1, 1, 2], [5, 6, 5, 1, 2, 3]]])  # neighbours both masked: 3 a sample
    assert sorl.repetition(tokens, mask).item() == pytest.approx(2 / 6)
    logits = torch.zeros(1, 6, V).scatter_(-1, torch.tensor([[[5], [6], [0], [7], [1], [2]]]), 9.0)
    static = torch.tensor([[5, 5, 5, 1, 1, 2]])
    assert sorl.fill_accuracy(logits, static, mask) == [0.5, 0.5, 1.0, None]


def test_reward_by_token_by_hand():
    tokens = torch.tensor([[[3, 4], [3, 5]]])
    rollout = sorl.Rollout(tokens, torch.zeros(1, 2, 2), torch.tensor([[[True, True], [True, False]]]))
    worth, count = sorl.reward_by_token(rollout, torch.tensor([[1.0, -3.0]]), 8)
    assert worth.tolist() == [0, 0, 0, -1, 1, 0, 0, 0] and count.tolist() == [0, 0, 0, 2, 1, 0, 0, 0]


# --- properties ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(tiny, seed):
    """Lengths down to an empty text, K = 1, one source, p_m in {0, 1}: shapes, zeros, finiteness; inputs unchanged."""
    g = torch.Generator().manual_seed(seed)
    R, K, T = (int(torch.randint(1, n, (1,), generator=g)) for n in (5, 5, 12))
    lengths = torch.randint(1, T + 1, (R,), generator=g).tolist()
    src, pad = prompts(torch.randint(0, 6, (R,), generator=g).tolist(), seed)
    text, length = statics(lengths, T, seed)
    p_m = [0.0, 0.5, 1.0][seed % 3]
    numbers = u(R, T, seed=seed), u(R, K, T, seed=seed + 1)
    before = [t.clone() for t in (src, pad, text, length, *numbers)]
    mask = sorl.sample_mask(numbers[0], length, p_m)
    for name in ("masked", "static"):
        logits = sorl.target_logits(tiny, src, pad, sorl.observe(text, mask, name, V + MASK))
        rollout = sorl.rollout_one_pass(logits, text, mask, numbers[1])
        assert rollout.tokens.shape == rollout.logp.shape == rollout.acted.shape == (R, K, T)
        assert (rollout.logp[~rollout.acted] == 0).all() and torch.isfinite(rollout.logp).all()
        assert torch.equal(sorl.text_mask(rollout.tokens, V).sum(-1), length[:, None].expand(R, K))
    full = sorl.decode(tiny, src, pad, text, mask, numbers[1])
    assert full.tokens.shape == (R, K, T) and full.fp == full.acted.sum()
    sorl.policy_loss(rollout, sorl.advantage(torch.rand(R, K, generator=g)))
    assert all(torch.equal(a, b) for a, b in zip(before, (src, pad, text, length, *numbers)))
