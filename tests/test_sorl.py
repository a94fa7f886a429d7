"""The method, against exact enumeration, cases worked by hand, and the pieces that `feed` and `act`
are made of. SORL=module tests another implementation."""
import itertools
import math

import pytest
import torch

from conftest import V, prompts, sorl, texts_of, uniform
from model import EOS, PAD, draw, generate, log_probs


def batch(lengths=(8, 6), T=9, p_m=0.5, seed=0, end=False):
    """Sources, static texts and coins; with `end` the end and the columns after it, too."""
    src, pad = prompts([4, 7, 2][:len(lengths)], seed)
    text, length = texts_of(lengths, T)
    mask = sorl.sample_mask(uniform(len(lengths), T, seed=seed),
                            torch.full_like(length, T + 1) if end else length, p_m)
    return src, pad, text, mask


# --- coins and uniforms ---------------------------------------------------------------------------

def test_uniforms_are_a_function_of_the_key():
    a = sorl.uniforms((4, 3), 0, 7, "mask")
    torch.rand(5)  # the global generator has no say
    assert torch.equal(a, sorl.uniforms((4, 3), 0, 7, "mask"))
    for key in ((0, 8, "mask"), (0, 7, "tokens"), (1, 7, "mask")):
        assert not torch.equal(a, sorl.uniforms((4, 3), *key))
    assert 0 <= a.min() and a.max() < 1 and a.dtype == torch.float32


@pytest.mark.parametrize("p_m, counts", [(0.0, [0, 0, 0, 0]), (1.0, [0, 1, 4, 8])])
def test_mask_never_the_end_never_padding(p_m, counts):
    mask = sorl.sample_mask(uniform(4, 9), torch.tensor([1, 2, 5, 9]), p_m)
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == counts
    assert not mask[torch.arange(9) >= torch.tensor([[0], [1], [4], [8]])].any()


@pytest.mark.parametrize("p_m", [-0.1, 1.1, float("nan")])
def test_mask_refuses_what_is_no_probability(p_m):
    with pytest.raises(ValueError, match="p_m"):
        sorl.sample_mask(uniform(1, 3), torch.tensor([3]), p_m)


# --- tails ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("p_m", [1 / 3, 0.5, 0.75])
@pytest.mark.parametrize("L", [1, 2, 7, 20])
def test_the_cut_by_its_definition(p_m, L):
    """c = min(L - 1, ⌊L·u^q⌋): every share of the cuts is that of its uniforms, and the share that
    the model writes is p_m to within 1/L."""
    u = (torch.arange(10_000) + 0.5) / 10_000
    mask = sorl.sample_tail(u, torch.full((10_000,), L), 22, p_m)
    cuts = (~mask).sum(1)
    assert (mask == (torch.arange(22) >= cuts[:, None])).all() and mask[:, -1].all()
    for c in range(L):  # c ≤ L·u^q, so c or a later cut comes with 1 - Pr(u < (c/L)^(1/q))
        expected = 1 - (c / L) ** ((1 - p_m) / p_m)
        assert (cuts >= c).float().mean() == pytest.approx(expected, abs=2e-4), c
    written = 1 - cuts.float().mean() / L
    assert p_m - 1e-3 < written < p_m + 1 / L + 1e-3


def test_no_tail_and_a_whole_one():
    """p_m = 0 draws nothing; p_m = 1 is online's mask, the columns after the text included."""
    u, lengths = torch.tensor([0.0, 0.4, 0.9999999]), torch.tensor([1, 5, 8])
    assert not sorl.sample_tail(u, lengths, 9, 0.0).any()
    assert sorl.sample_tail(u, lengths, 9, 1.0).all()
    kept = (~sorl.sample_tail(u, lengths, 9, 1e-6)).sum(1)  # at least the end is drawn
    assert kept.tolist() == [0, 4, 7]
    for p_m in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="p_m"):
            sorl.sample_tail(u, lengths, 9, p_m)


# --- feed and act ---------------------------------------------------------------------------------

SETTINGS = {"masked": ("masked", 0.5, False), "static": ("static", 0.5, False),
            "full": ("full", 0.4, True), "online": ("full", 1.0, True),
            "nobody acts": ("masked", 0.0, False), "nobody acts, full": ("full", 0.0, True),
            "everything masked": ("masked", 1.0, False)}


def one_update(model, name, K=3, temperature=1.3, top_k=5, lengths=(8, 6, 3)):
    """What a setting does: the inputs, what is fed, what was decoded, the logits, the rollout."""
    observation, p_m, end = SETTINGS[name]
    src, pad, text, mask = inputs = batch(lengths, p_m=p_m, end=end)
    u = uniform(len(lengths), K, 9, seed=1)
    before = [tensor.clone() for tensor in (*inputs, u)]
    fed, decoded = sorl.feed(model, src, pad, text, mask, u, observation, temperature, top_k)
    logits = sorl.target_logits(model, src, pad, fed)
    rollout = sorl.act(logits, text, mask, u, decoded, temperature, top_k)
    assert all(map(torch.equal, before, (*inputs, u)))  # nothing that was given is changed
    return (*inputs, u), fed, decoded, logits, rollout


@pytest.mark.parametrize("name", SETTINGS)
def test_act_reports_the_probabilities_of_what_was_drawn(tiny, name):
    """Column by column from the uncached model: the token is the inverse CDF of its uniform, given
    the columns before it as they were fed; log π is that of the same distribution."""
    (src, pad, text, mask, u), fed, _, _, rollout = one_update(tiny, name)
    end = SETTINGS[name][2]
    fed = fed.view(3, -1, 9).expand(3, 3, 9)
    for r, k, t in itertools.product(range(3), range(3), range(9)):
        row = torch.cat([src[r], fed[r, k, :t]])[None]
        token = rollout.tokens[r, k, t]
        if rollout.acted[r, k, t]:
            logp = log_probs(tiny(row, pad[r:r + 1])[0, -1], 1.3, 5, end)
            assert token == draw(logp, u[r, k, t:t + 1])[0]
            assert rollout.logp[r, k, t].item() == pytest.approx(logp[token].item(), abs=1e-4)
        else:
            assert rollout.logp[r, k, t] == 0
            ended = (rollout.tokens[r, k, :t] == V + EOS).any()
            static = text[r, t] if text[r, t] != V + PAD or not end else V + EOS
            assert token == (V + PAD if ended else static)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", ["masked", "static", "full", "online"])
def test_act_carries_the_gradient_to_every_weight(tiny, name, bfloat16):
    """Decoding has no gradients; the weights that it cast to bfloat16 must not be used again
    (tests/test_model.py has the half of this that the newest PyTorch can show)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        *_, rollout = one_update(tiny, name)
    sorl.policy_loss(rollout, torch.tensor([[1.0, -2, 1]] * 3)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tiny.parameters())


@pytest.mark.parametrize("K", [1, 4])
def test_a_source_is_pushed_once_for_its_texts(tiny, K):
    """With the logits and the gradient of pushing it again for each text, in float64."""
    model = tiny.double()
    src, pad = prompts([4, 7, 2])
    text, lengths = texts_of([8, 6, 3, 9, 1, 2] * K, 9)
    row = torch.arange(3).repeat_interleave(2 * K)
    whole = model(torch.cat([src[row], text[:, :-1]], 1), pad[row], start=src.size(1) - 1)
    model.pushed.zero_()
    shared = sorl.target_logits(model, src, pad, text)
    fed = (lengths - (lengths == 9).long()).sum()  # the last column is not fed
    assert model.pushed[1] == (src.size(1) - pad).sum() + fed
    assert torch.allclose(shared, whole, atol=1e-12)
    out = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)).double()
    grads = [torch.autograd.grad((logits * out).sum(), [*model.parameters()])
             for logits in (shared, whole)]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*grads))


# --- rollouts -------------------------------------------------------------------------------------

def test_one_pass_costs_one_row_a_static_text(tiny):
    """Measured by the model's own counter, whatever K is."""
    for K in (1, 16):
        tiny.pushed.zero_()
        *_, rollout = one_update(tiny, "masked", K)
        assert rollout.fp == 3 == tiny.pushed[0] and rollout.fp_grad == 0


def test_one_pass_by_enumeration():
    """Two masked positions, ten words: each of the 100 fills comes as often as the product of its
    probabilities says, within 5 standard errors of 40,000 samples."""
    n, mask = 40_000, torch.tensor([[True, False, True, False]])
    logits = torch.randn(1, 4, V, generator=torch.Generator().manual_seed(0))
    u = uniform(1, n, 4)
    tokens = sorl.rollout_one_pass(logits, texts_of([4], 4)[0], mask, u).tokens[0]
    measured = (tokens[:, 0] * 10 + tokens[:, 2]).bincount(minlength=100) / n
    p = logits[0, :, :10].softmax(-1)
    exact = (p[0, :, None] * p[2, None]).flatten()
    assert ((measured - exact).abs() < 5 * (exact / n).sqrt()).all()


@pytest.mark.parametrize("K", [1, 4])
def test_online_is_plain_sampling(tiny, K):
    """p_m = 1 draws the tokens that `generate` draws from the same uniforms, the end included."""
    src, pad, text, mask = batch((8, 6, 3), p_m=1.0, end=True)
    u = uniform(3, K, 9, seed=1)
    rollout = sorl.decode(tiny, src, pad, text, mask, u)
    assert torch.equal(rollout.tokens, generate(tiny, src, pad, 9, u))
    assert (rollout.tokens == V + EOS).any()  # or nothing is said about the end token
    assert torch.equal(rollout.acted, rollout.tokens != V + PAD)


@pytest.mark.parametrize("p_m", [0.0, 0.4, 1.0])
def test_decoding_costs_a_pass_for_every_token_that_is_drawn(tiny, p_m):
    src, pad, text, mask = batch((8, 6, 3), p_m=p_m, end=True)
    rollout = sorl.decode(tiny, src, pad, text, mask, uniform(3, 2, 9, seed=1))
    drawn = (mask[:, None] & (rollout.tokens != V + PAD)).sum()
    assert rollout.fp == drawn == rollout.acted.sum() and rollout.fp_grad == 6


@pytest.mark.parametrize("seed", range(9))
def test_random_shapes(tiny, seed):
    """Down to empty texts, one source, K = 1, at p_m 0, .5 and 1: shapes, zeros, finite numbers."""
    g = torch.Generator().manual_seed(seed)
    R, K, T = (int(torch.randint(1, n, (1,), generator=g)) for n in (5, 5, 12))
    src, pad = prompts(torch.randint(0, 6, (R,), generator=g).tolist(), seed)
    text, length = texts_of(torch.randint(1, T + 1, (R,), generator=g).tolist(), T, seed)
    mask = sorl.sample_mask(uniform(R, T, seed=seed), length, [0.0, 0.5, 1.0][seed % 3])
    u, rewards = uniform(R, K, T, seed=seed + 1), uniform(R, K, seed=seed)
    for observation in ("masked", "static", "full"):
        fed, decoded = sorl.feed(tiny, src, pad, text, mask, u, observation)
        logits = sorl.target_logits(tiny, src, pad, fed)
        rollout = sorl.act(logits, text, mask, u, decoded)
        for tensor in (rollout.tokens, rollout.logp, rollout.acted):
            assert tensor.shape == (R, K, T)
        assert (rollout.logp[~rollout.acted] == 0).all() and torch.isfinite(rollout.logp).all()
        loss = sorl.policy_loss(rollout, sorl.advantage(rewards, "loo", "source"))
        assert loss.shape == () and torch.isfinite(loss)
        lengths = sorl.text_mask(rollout.tokens, V).sum(-1)
        assert (lengths == length[:, None]).all() or observation == "full"


# --- advantage and loss ---------------------------------------------------------------------------

SCALES = ("none", "source", "batch")


def test_advantage_by_hand():
    """Rewards 0, .5, 1 beside .4, .5, .6: the means are .5; the others' means .75, .5, .25 and .55,
    .5, .45; the deviations .4082 and .0816, of all six .2944."""
    R = torch.tensor([[0.0, 0.5, 1.0], [0.4, 0.5, 0.6]])
    for (baseline, scale), expected in {
            ("mean", "none"): (0.5, 0.1), ("mean", "source"): (1.2247, 1.2247),
            ("mean", "batch"): (1.6984, 0.3397),
            ("loo", "none"): (0.75, 0.15), ("loo", "source"): (1.8371, 1.8371),
            ("loo", "batch"): (2.5476, 0.5095)}.items():
        A = sorl.advantage(R, baseline, scale)
        by_hand = torch.tensor([[-a, 0, a] for a in expected])
        assert torch.allclose(A, by_hand, atol=1e-4), (baseline, scale)
    for scale in SCALES:  # K = 1: plain REINFORCE, and no deviation to divide by
        assert sorl.advantage(torch.tensor([[0.75]]), "loo", scale).item() == 0.75


@pytest.mark.parametrize("baseline, scale", [("lo0", "none"), ("mean", "sources"),
                                             ("median", "batch"), ("mean", True)])
def test_advantage_refuses_what_it_does_not_know(baseline, scale):
    with pytest.raises(ValueError, match="expected baseline mean or loo"):
        sorl.advantage(torch.rand(2, 3), baseline, scale)


def test_observe_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="observation 'statik'"):
        sorl.observe(torch.zeros(1, 2).long(), torch.zeros(1, 2).bool(), "statik", V)


@pytest.mark.parametrize("baseline, scale", [*itertools.product(["mean", "loo"], SCALES)])
@pytest.mark.parametrize("reward, K", [(0.1, 3), (0.3, 7), (0.9, 64)])
def test_equal_rewards_give_exactly_zero(baseline, scale, reward, K):
    """.1 + .1 + .1 is not 3 · .1 in floating point; a scaled rounding error would be a gradient."""
    R = torch.full((2, K), reward)
    assert (sorl.advantage(R, baseline, scale) == 0).all()
    R[0, 0] += 1e-6  # almost equal: not divided by their deviation
    assert sorl.advantage(R, baseline, scale).abs().max() < 1e-5


def test_policy_loss_by_hand():
    """A = 1 and -2, log π sums -3 and -1: -(1·-3 + -2·-1)/2 = .5; 0 if no token was drawn."""
    logp = torch.tensor([[[-1.0, -2.0, 0.0], [0.0, -1.0, 0.0]]])
    rollout = sorl.Rollout(torch.zeros(1, 2, 3, dtype=torch.long), logp, logp != 0)
    none_drawn = sorl.Rollout(rollout.tokens, 0 * logp, logp > 0)
    A = torch.tensor([[1.0, -2.0]])
    assert sorl.policy_loss(rollout, A).item() == pytest.approx(0.5)
    assert sorl.policy_loss(none_drawn, A).item() == 0
    assert sorl.policy_loss(none_drawn, A, logp).item() == 0


@pytest.mark.parametrize("A, ratio, push, slope", [
    (1.0, 1.1, 1.1, 1.1), (1.0, 1.3, 1.2, 0.0), (1.0, 0.5, 0.5, 0.5),
    (-1.0, 0.9, -0.9, -0.9), (-1.0, 0.7, -0.8, 0.0), (-1.0, 2.0, -2.0, -2.0)])
def test_the_clipped_ratio_by_hand(A, ratio, push, slope):
    """One token: min(A·ρ, A·clip(ρ, .8, 1.2)). Its push ends once it has moved by ε with A, and
    never if it moved against it."""
    before = torch.tensor([[[-1.5, 0.0]]])
    logp = (before + math.log(ratio)).requires_grad_()
    rollout = sorl.Rollout(torch.zeros(1, 1, 2).long(), logp, torch.tensor([[[True, False]]]))
    loss = sorl.policy_loss(rollout, torch.tensor([[A]]), before)
    loss.backward()
    assert loss.item() == pytest.approx(-push) and logp.grad[0, 0, 1] == 0
    assert logp.grad[0, 0, 0].item() == pytest.approx(-slope)


def test_policy_gradient_by_enumeration(tiny):
    """On the network: the expected leave-one-out gradient over all fills of a masked position is
    the gradient of the expected reward. The fills are drawn by choosing the uniforms."""
    src, pad = prompts([3])
    text, mask = texts_of([4], 4)[0], torch.tensor([[False, True, False, False]])
    reward = torch.linspace(0, 1, 10).roll(3)
    fed, _ = sorl.feed(tiny, src, pad, text, mask, None, "masked")
    logits = sorl.target_logits(tiny, src, pad, fed)
    logp = log_probs(logits[0, 1], end=False)[:10]
    weight = tiny.blocks[0].attn.qkv.weight
    exact = torch.autograd.grad(logp.exp() @ reward, weight, retain_graph=True)[0]
    middle = logp.detach().exp().cumsum(0) - logp.detach().exp() / 2  # a uniform that draws each
    loss = 0
    for a, b in itertools.product(range(10), repeat=2):
        u = middle[[a, b]].view(1, 2, 1).expand(1, 2, 4)
        rollout = sorl.act(logits, text, mask, u)
        assert rollout.tokens[0, :, 1].tolist() == [a, b]
        A = sorl.advantage(reward[[a, b]][None], "loo")
        loss = loss + (logp[a] + logp[b]).exp().detach() * sorl.policy_loss(rollout, A)
    estimate = -torch.autograd.grad(loss, weight)[0]
    assert torch.allclose(estimate, exact, atol=1e-6) and exact.abs().max() > 1e-4


def test_mle_loss_by_hand():
    """Uniform logits over V ids: ln V a token, EOS included, padding excluded."""
    loss = sorl.mle_loss(torch.zeros(2, 5, V), *texts_of([3, 1], 5))
    assert loss.item() == pytest.approx(4 * math.log(V), rel=1e-5)


# --- diagnostics ----------------------------------------------------------------------------------

def test_entropy_and_kl_by_hand():
    """11 actions at equal logits: entropy ln 11. KL from there to one action at logit 2."""
    logits, inside = torch.zeros(1, 2, V), torch.tensor([[True, False]])
    assert sorl.entropy(logits, inside).item() == pytest.approx(math.log(11), rel=1e-5)
    assert sorl.kl_divergence(logits, logits, inside).item() == pytest.approx(0, abs=1e-6)
    other = logits.clone()
    other[..., 0] = 2.0
    expected = math.log((math.exp(2) + 10) / 11) - 2 / 11
    kl = sorl.kl_divergence(logits, other, inside).item()
    assert kl == pytest.approx(expected, rel=1e-4)


def test_distinct():
    assert sorl.distinct(["a b a b", "a b"]) == 2 / 4  # ab ba ab, ab: two of four
    assert sorl.distinct([""]) == 0


def test_masked_runs_repetition_and_fill_accuracy_by_hand():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool()
    assert sorl.masked_runs(mask).tolist() == [[1, 2, 0, 1, 2, 3]]
    tokens = torch.tensor([[[5, 5, 5, 1, 1, 2], [5, 6, 5, 1, 2, 3]]])  # 3 masked pairs a sample
    assert sorl.repetition(tokens, mask).item() == pytest.approx(2 / 6)
    likeliest = torch.tensor([[[5], [6], [0], [7], [1], [2]]])
    logits = torch.zeros(1, 6, V).scatter_(-1, likeliest, 9.0)
    static = torch.tensor([[5, 5, 5, 1, 1, 2]])
    assert sorl.fill_accuracy(logits, static, mask) == [0.5, 0.5, 1.0, None]


def test_reward_by_token_by_hand():
    tokens, acted = torch.tensor([[[3, 4], [3, 5]]]), torch.tensor([[[True, True], [True, False]]])
    rollout = sorl.Rollout(tokens, torch.zeros(1, 2, 2), acted)
    mean, count = sorl.reward_by_token(rollout, torch.tensor([[1.0, -3.0]]), 8)
    assert mean.tolist() == [0, 0, 0, -1, 1, 0, 0, 0]
    assert count.tolist() == [0, 0, 0, 2, 1, 0, 0, 0]
