"""theory.py: its enumeration against other ways to count, the propositions that have no row there,
and what its rows must not let pass."""
import math
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import sorl
import theory
from model import SEP, generate, log_probs
from theory import (BET, BRANCH, COINS, COPY, FLAT, ONE_PASS, TELLS, Bigram, Process, best_in_class,
                    epsilon, expected, follow, gradient, one_logit, own_texts, phi_model, plan,
                    planner, random_process, source, table, texts, threshold, tiny_gpt, train_gpt,
                    value, written_alone)


def history(y, M, text, t):
    """The finest state: a static token that was replaced stays part of it."""
    return M[:t + 1], y[:t], text[:t]


@pytest.fixture(autouse=True)
def more_observations(monkeypatch):
    monkeypatch.setitem(theory.SEES, "history", history)
    monkeypatch.setitem(theory.SEES, "coins", lambda y, M, text, t: M[:t + 1])


def random_behaviour(phi, rng, k=2):
    """A random policy that looks at phi and at nothing else."""
    chances = defaultdict(lambda: rng.dirichlet(np.ones(k)))

    def mu(y, M, text, t):
        return chances[t, theory.SEES[phi](y, M, text, t)]
    return mu


def processes(n, seed, **choices):
    rng = np.random.default_rng(seed)
    return [(random_process(rng, **choices), rng) for _ in range(n)]


# --------------------------------------------------------------------------------------------------
# Worlds


def count(process, phi):
    """|Phi|: the observations of all positions together."""
    return sum(len({o for o, _ in layer}) for layer in phi_model(process, phi))


@pytest.mark.parametrize("phi", ["full", *ONE_PASS])
def test_best_policies_are_those_of_brute_force(phi):
    """The planner finds the best policy of full, best_in_class that of a one-pass observation."""
    for process, _ in processes(4, 2, T=2):
        cells = sorted({(t, theory.SEES[phi](y, M, text, t))
                        for _, y, M, _, text in process.worlds() for t in range(2)})
        found = []
        for choice in product(range(2), repeat=len(cells)):
            greedy = [{o: a for (s, o), a in zip(cells, choice) if s == t} for t in range(2)]
            found.append(value(process, follow(greedy, phi)))
        best = best_in_class(process, phi)
        if phi == "full":
            best = value(process, planner(process, phi))
        assert best == pytest.approx(max(found), abs=1e-12)


# --------------------------------------------------------------------------------------------------
# The rows, and what they are made of


TRAINED = ("P6", "P13", "P15", "P16", "P17")  # these train GPTs: the slow test below
ROWS = {name: rows for _, part in theory.PARTS.values() for name, rows in part.items()}


@pytest.mark.parametrize("name", [name for name in ROWS if name not in TRAINED])
def test_rows(name):
    for row in ROWS[name](True):
        assert not row.stated, row
        lines = str(row).split("\n")
        assert lines[0].startswith(f"  [{row.verdict}] ") and max(map(len, lines)) <= 98


@pytest.mark.parametrize("measured", [[1, 2.1], [1, 2, 3], [1, math.nan]])
def test_a_row_sees_what_is_not_equal(measured):
    row = theory.equal("A claim.", "one {}, two {}", measured, [1, 2], .01)
    assert "[UNEXPECTED, stated: 1 2] A claim." in str(row) and "one 1, two" in str(row)
    assert theory.equal("A claim.", "one {}", [1], [1, 2]).stated
    assert theory.equal("A claim.", "{} {}", [1, 2.1], [1, 2], [.2, .01]).stated
    assert not theory.equal("A claim.", "{} {}", [1, 2.1], [1, 2], [.01, .2]).stated


@pytest.mark.parametrize("measured", [[1, 1], [1, 2], [3, 2, 2.5], [1, math.nan]])
def test_a_row_sees_what_does_not_fall(measured):
    assert theory.falls("A claim.", "{} {}", measured).stated
    assert theory.falls("A claim.", "{} {} {}", [3, 2, 1.95], .1).stated
    assert not theory.falls("A claim.", "{} {} {}", [3, 2, 1], .1).stated


# --------------------------------------------------------------------------------------------------
# P5: what masking costs a random policy


@pytest.mark.parametrize("tau, price", [(.1, .0693), (.25, .1680), (.41, .2268), (.43, .2278),
                                        (.45, .2270), (.5, .2169), (1, .1201), (2, .0619)])
def test_p5_price_and_mean_field(tau, price):
    """Masked's optimum is the best of a fine grid; m = tanh(m / 2 tau), not 0 below tau = 1/2."""
    grid = 1 / (1 + np.exp(np.linspace(-14, 14, 401)))
    a, b = np.meshgrid(grid, grid)
    J = a * b + (1 - a) * (1 - b)
    for x in (a, 1 - a, b, 1 - b):
        J = J - tau * x * np.log(x)
    full, masked, m = theory.optima(tau)
    assert masked == pytest.approx(J.max(), abs=1e-4)
    assert math.tanh(m / (2 * tau)) == pytest.approx(m, abs=1e-4) and (m > .1) == (tau < .5)
    assert full - masked == pytest.approx(price, abs=5e-5)


# --------------------------------------------------------------------------------------------------
# P6: static+coins against masked


def gain(process):
    """Best static+coins less best masked, by dynamic programming over states."""
    return value(process, planner(process, "history")) - value(process, planner(process, "full"))


def test_p6_static_and_coins_is_never_worse_and_independent_blocks_make_it_equal():
    for process in (TELLS, COINS, COPY, BET):
        assert best_in_class(process, "static+coins") == pytest.approx(
            value(process, planner(process, "history")), abs=1e-9)
    assert all(gain(process) > -1e-9 for process, _ in processes(20, 6))
    assert all(abs(gain(process)) < 1e-9 for process, _ in processes(20, 7, product_D=True))
    for process, rng in processes(10, 8):  # y_0 and y_2 independent, y_1 on both: still equal
        ends, middle = rng.dirichlet(np.ones(2), 2), rng.dirichlet(np.ones(2), (2, 2))
        D = table(3, lambda a, b, c: ends[0, a] * ends[1, c] * middle[a, c, b])
        assert abs(gain(replace(process, D=D))) < 1e-9


@pytest.mark.parametrize("p", [.3, .5, .8])
def test_p6_pairwise_independence_is_not_enough(p):
    D = table(4, lambda a, b, c, d: (d == a ^ c) / 8)
    process = Process(4, D, table(4, lambda a, b, c, d: b == c ^ d), p)
    assert gain(process) == pytest.approx(p * p * (1 - p) ** 2 / 2, abs=1e-9)


@pytest.mark.parametrize("p", [.2, .5, .9])
def test_p6_closed_forms(p):
    tells, coins = replace(TELLS, p=p), replace(COINS, p=p)
    assert [best_in_class(tells, phi) for phi in ONE_PASS] == pytest.approx(
        [1 - p * p * (1 - p) / 2, 1, 1, 1 - p * (1 - p)])
    one = max(p, 2 * p * (1 - p))
    assert [best_in_class(coins, phi) for phi in ONE_PASS] == pytest.approx(
        [1 - (1 - p) ** 2] * 2 + [one] * 2)


# --------------------------------------------------------------------------------------------------
# P7 to P10, P12: eps, models, planners


def test_p7_other_observations_and_the_finer_state(monkeypatch):
    assert epsilon(FLAT, "blind")[0] == pytest.approx([1, 1.75, 1.9375])
    monkeypatch.setitem(theory.SEES, "full", history)
    assert epsilon(FLAT, "masked")[0] == pytest.approx([0, 1.5, 1.875])
    assert epsilon(FLAT, "static+coins")[0] == pytest.approx([0, 1, 1.5])


def test_p9_at_the_last_action_each_observation_gives_credit_by_what_it_shows():
    """In BET: by 1 where Y_0 = 1 is known and the action counts, by .2 where Y_0 = 0 is."""
    p, q, static = .2, .7, .5  # Pr(coin = 1), Pr(action = 1), Pr(y_0 = 1)
    given_1, alone = 1 - p + p * q, (1 - p) * static + p * q  # Pr(Y_0 = 1 | y_0 = 1), Pr(Y_0 = 1)
    found = [theory.credit(BET, phi)[-1] for phi in ("full", *ONE_PASS)]
    assert found == pytest.approx([1, 1, 1, p * (.2 + .8 * given_1), p * (.2 + .8 * alone)])


def test_p9_a_behaviour_that_knows_a_hidden_static_token_gives_credit():
    def repeats(y, M, text, t):
        return (.5, .5) if t == 0 else (.01, .99) if y[0] else (.99, .01)
    process = Process(3, TELLS.D, table(3, lambda a, b, c: b), .5)
    Q, _ = plan(phi_model(process, "masked", repeats), process.R)
    assert max(abs(q[o, 0] - q[o, 1]) for q in Q[:-1] for o, _ in q) == pytest.approx(.98)


def value_inside(process, phi, P, mu):
    """What mu, a function of phi, is worth in the phi-model."""
    seen = {(t, theory.SEES[phi](y, M, text, t)): mu(y, M, text, t)
            for _, y, M, _, text in process.worlds() for t in range(process.T)}
    start = Counter()
    for w, y, M, _, text in process.worlds():
        start[theory.SEES[phi](y, M, text, 0)] += w
    V = process.R
    for t in reversed(range(process.T)):
        Q = {key: sum(w * V[o] for o, w in to.items()) / to.total() for key, to in P[t].items()}
        V = {o: sum(q * Q[o, a] for a, q in enumerate(seen[t, o])) for o, _ in P[t]}
    return sum(w * V[o] for o, w in start.items())


def test_p10_the_model_is_right_about_the_policy_that_made_it():
    errors = []
    for process, rng in processes(10, 13):
        for phi in ("full", *ONE_PASS):
            pi, mu = random_behaviour(phi, rng), random_behaviour(phi, rng)
            inside = value_inside(process, phi, phi_model(process, phi, pi), pi)
            assert inside == pytest.approx(value(process, pi), abs=1e-12)
            if phi != "full":
                inside = value_inside(process, phi, phi_model(process, phi, mu), pi)
                errors.append(abs(inside - value(process, pi)))
    assert np.median(errors) > .01  # ... and wrong about others


def test_p12_fewer_observations_tie_if_texts_are_uniform():
    """14 observations, the coins alone, have the worst eps of masked's 26; not so if D is skewed."""
    assert count(FLAT, "coins") == 14 and count(FLAT, "masked") == 26
    assert epsilon(FLAT, "coins")[0] == pytest.approx(epsilon(FLAT, "masked")[0])
    assert epsilon(FLAT, "coins")[1][2] > epsilon(FLAT, "masked")[1][2] + .1
    ones = np.array([.7, .6, .5])
    skewed = replace(FLAT, D=table(3, lambda *y: np.prod(np.where(y, ones, 1 - ones))))
    assert epsilon(skewed, "coins")[0] == pytest.approx([0, 1.4, 1.76])
    assert epsilon(skewed, "masked")[0] == pytest.approx([0, 1, 1.5])


# --------------------------------------------------------------------------------------------------
# P11, P13: overfitting and use


def test_p11_inside_the_model_nothing_exceeds_the_bound():
    closest = 0
    for process, rng in processes(8, 14):
        for phi in ("full", "masked", "static", "blind"):
            P = phi_model(process, phi)
            best = value_inside(process, phi, P, follow(plan(P, process.R)[1], phi))
            for n in (10, 100):
                _, greedy = plan(theory.estimated(P, n, rng), process.R)
                lost = best - value_inside(process, phi, P, follow(greedy, phi))
                bound = 6 * math.sqrt(math.log(2 * count(process, phi) * 2 / .05) / (2 * n))
                assert lost >= -1e-12
                closest = max(closest, lost / bound)
    assert 0 < closest < .2


def test_p11_estimates_are_frequencies_of_every_layer():
    P = phi_model(random_process(np.random.default_rng(15)), "masked")
    found = theory.estimated(P, 7, np.random.default_rng(0))
    for layer, exact in zip(found, P, strict=True):
        assert layer.keys() == exact.keys() and all(to.total() == 7 for to in layer.values())
        assert any(to[o] / 7 != exact[key][o] / exact[key].total()
                   for key, to in layer.items() for o in to)


def test_p13_both_uses_write_the_same_text_if_tokens_are_independent():
    """A token of its own may be shown as its own (coin 1) or as if it were static text (coin 0)."""
    def recomputed(process):
        _, greedy = plan(phi_model(process, "full"), process.R)
        text = ()
        for t in range(process.T):
            text += (greedy[t].get(((1,) * (t + 1), text), 0),)
        return text
    for process, _ in processes(20, 13, product_D=True):
        assert recomputed(process) == written_alone(process)
    assert recomputed(threshold(.8, 2)) == (1, 1) != written_alone(threshold(.8, 2))


def test_p13_thresholds():
    for T, at in ((2, .5), (3, .7071), (4, .7937)):
        assert written_alone(threshold(at - .01, T)) == (0,) * T
        assert written_alone(threshold(at + .01, T))[0] == 1
        for p in (.6, .9):
            worth = .6 * ((1 - p) / 2 + p * max(.5, p ** (T - 1)))
            process = threshold(p, T)
            assert value(process, planner(process, "full")) == pytest.approx(worth, abs=1e-12)
        assert theory.loss_and_bound(threshold(.5 ** (1 / (T - 1)), T)) == pytest.approx((.3, .3))
    assert written_alone(replace(BET, p=.4))[0] == 0 and written_alone(replace(BET, p=.6)) == (1, 1)


# --------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("setting, refresh", [("masked", 4), ("static", 0)])
def test_training_feeds_what_it_says_and_refreshes_as_often(setting, refresh, monkeypatch):
    """At updates n, 2n, ... the static texts become what the policy writes then."""
    used, now, seen, feed, exact = [], [], [], sorl.feed, theory.expected

    def watching(model, process, setting):
        used.append(process)
        now.append(own_texts(model, 2))
        return exact(model, process, setting)
    monkeypatch.setattr(theory, "expected", watching)
    monkeypatch.setattr(sorl, "feed", lambda *args: seen.append(args[6]) or feed(*args))
    train_gpt(COINS, setting, refresh)
    assert len(used) == 150 and {process.p for process in used} == {COINS.p}
    assert seen == [setting] * 150 and len({tuple(D.values()) for D in now}) == 150  # all differ
    for update, process in enumerate(used):
        last = update // refresh * refresh if refresh else 0
        assert process.D == (now[last] if last else COINS.D)


def test_deployment_trains_three_policies_at_its_rate_on_its_texts(monkeypatch):
    calls = []

    def recording(process, setting, refresh, seed):
        calls.append((process.p, setting, refresh, seed, *process.D.values()))
        return tiny_gpt(2, 2, seed)
    monkeypatch.setattr(theory, "train_gpt", recording)
    for kept, refresh, D in (("stored", 0, BET.D), ("uniform", 0, dict.fromkeys(BET.D, .25)),
                             ("refreshed", 4, BET.D)):
        lost = theory.lost_alone.__wrapped__(BET, kept, .7)
        assert calls[-3:] == [(.7, "masked", refresh, seed, *D.values()) for seed in range(3)]
        alone = [expected(tiny_gpt(2, 2, seed), BET, "online").item() for seed in range(3)]
        assert lost == pytest.approx(1 - np.mean(alone))


def test_training_climbs_from_the_model_that_its_seed_makes(monkeypatch):
    reached = expected(train_gpt(COINS, "static"), COINS, "static").item()
    assert .41 < reached < .42 + 1e-6  # the best of the class is .42
    monkeypatch.setattr(theory, "climb", lambda model, objective, rate: model)
    first, again, other = (train_gpt(COINS, "static", seed=seed).wte.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --------------------------------------------------------------------------------------------------
# The GPT's law, and its gradient


@pytest.mark.parametrize("setting", ["masked", "static", "full", "online", "tail"])
def test_exact_value_of_a_gpt_is_what_sampling_gives(setting, n=12000):
    process = replace(random_process(np.random.default_rng(16)), p=.6)
    model, every = tiny_gpt(2, 3, std=.3), torch.tensor(texts(3))
    draws = torch.Generator().manual_seed(0)
    D = torch.tensor([process.D[text] for text in texts(3)])
    static = every[torch.multinomial(D, n, replacement=True, generator=draws)]
    p, u = (1. if setting == "online" else process.p), sorl.uniforms((n, 1, 3), 2)
    mask = sorl.sample_mask(sorl.uniforms((n, 3), 1), torch.full((n,), 4), p)
    if setting == "tail":
        mask = sorl.sample_tail(sorl.uniforms((n,), 1), torch.full((n,), 3), 3, p)
    if setting in ("masked", "static"):
        fed, _ = sorl.feed(model, *source(model), static, mask, u, setting)
        tokens = sorl.act(sorl.target_logits(model, *source(model), fed), static, mask, u).tokens
    else:
        src, pad = (x.expand(n, *x.shape[1:]) for x in source(model))
        tokens = generate(model, src, pad, 3, u, static=static, mask=mask, end=False)
    sampled = np.mean([process.R[tuple(text)] for text in tokens[:, 0].tolist()])
    assert sampled == pytest.approx(expected(model, process, setting).item(), abs=.012)


@pytest.mark.parametrize("setting", ["masked", "static", "full", "tail"])
def test_gradient_of_expected_is_its_derivative(setting, h=1e-6):
    process, model = random_process(np.random.default_rng(0)), tiny_gpt(2, 3, std=.3).double()
    torch.manual_seed(0)
    to = [torch.randn_like(w) for w in model.parameters()]

    def at(step):
        with torch.no_grad():
            for w, v in zip(model.parameters(), to):
                w += step * v
            return expected(model, process, setting).item()
    slope = gradient(expected(model, process, setting), model) @ torch.cat([v.ravel() for v in to])
    assert (at(h) - at(-2 * h)) / (2 * h) == pytest.approx(slope.item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# P14: the estimator


@pytest.mark.parametrize("q, p, K", [(.2, .5, 2), (.2, .5, 4), (.8, 1, 8), (.1, .3, 3)])
def test_p14_variance_of_any_logit(q, p, K):
    """A U-statistic: F + 2/(K(K-1)) (2(K-2) zeta_1 + zeta_2); zeta_1 is 0 only at q = 1/2."""
    g = q * (1 - q)
    zeta_1, zeta_2 = g * (1 - 4 * g) / 4, g / 2 - g * g
    assert zeta_1 > 0
    mean, variance = one_logit(q, p, K, baseline="loo")
    assert mean == pytest.approx(p * g, abs=1e-12)
    assert variance == pytest.approx(
        p * (1 - p) * g * g + p * 2 / (K * (K - 1)) * (2 * (K - 2) * zeta_1 + zeta_2), abs=1e-12)


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("baseline", ["loo", "mean"])
def test_p14_unbiased_in_every_context_of_two_tokens(K, baseline):
    """All texts and masks of T = 2, all K-tuples of samples: each gradient is that of its row."""
    rng, every = np.random.default_rng(17), torch.tensor(texts(2))
    R, logits = torch.tensor(rng.random((2, 2))), torch.tensor(rng.normal(0, 1, (16, 2, 6)))
    static, mask = every.repeat_interleave(4, 0), every.bool().repeat(4, 1)
    tuples = every[torch.tensor(list(product(range(4), repeat=K)))]    # (n,K,T)
    n = len(tuples)
    chance = logits[..., :2].softmax(-1)[:, torch.arange(2), tuples]   # (16,n,K,T)
    u = torch.where(tuples == 0, chance / 2, 1 - chance / 2).flatten(0, 1)
    many = logits.repeat_interleave(n, 0).requires_grad_()
    rollout = sorl.act(many, static.repeat_interleave(n, 0), mask.repeat_interleave(n, 0), u)
    A = sorl.advantage(R[rollout.tokens.unbind(-1)], baseline)
    (-len(many) * sorl.policy_loss(rollout, A)).backward()
    mean = torch.einsum("cn,cntv->ctv", chance.flatten(2).prod(-1), many.grad.view(16, n, 2, 6))

    free = logits.clone().requires_grad_()
    joint = log_probs(free, end=False)[:, torch.arange(2), every].sum(-1).exp()  # (16,4)
    text = torch.where(mask[:, None], every, static[:, None])
    (joint * R[text.unbind(-1)]).sum().backward()
    part = 1 if baseline == "loo" else 1 - 1 / K
    assert (mean - part * free.grad).abs().max() < 1e-12
    assert free.grad[3, :, :2].abs().min() > 1e-5  # both masked: both positions learn


# --------------------------------------------------------------------------------------------------
# P17: tail


@pytest.mark.parametrize("q, r", [(.2, .5), (.3, .5), (.4, .5), (.2, .1)])
def test_p17_in_closed_form(q, r, p=.3, s=1 - 1e-9):
    """The opening logit's gradient at s = 1: masked's is negative for q < r / (1 + r)."""
    model = Bigram(q, s)
    assert [*own_texts(model, 2).values()] == pytest.approx([1 - q, 0, 0, q], abs=1e-8)
    process = replace(BRANCH, R={**BRANCH.R, (0, 0): r}, D=own_texts(model, 2), p=p)

    def opening(setting):
        return gradient(expected(model, process, setting), model).view(6, 6)[SEP, 1].item()
    assert opening("online") == pytest.approx(q * (1 - q) * (1 - r), abs=1e-7)
    assert opening("tail") == pytest.approx(.5 ** ((1 - p) / p) * opening("online"), abs=1e-7)
    assert opening("masked") == pytest.approx(p * q * (1 - q) * (q - r * (1 - q)), abs=1e-7)


# --------------------------------------------------------------------------------------------------
# Command line


def test_propositions_and_parts(capsys):
    theory.main(["P5", "P7", "--quick"])
    out = capsys.readouterr().out
    assert "1.338" in out and "CLAIM 2" in out and "\nP7  The surer" in out and out.isascii()
    assert "P8  " not in out and "CLAIM 3" not in out
    theory.main(["cost", "--quick"])
    out = capsys.readouterr().out
    assert all(f"\n{name}  " in out for name in theory.PARTS["cost"][1]) and "P6  " not in out
    assert "0 otherwise than stated" in out and "figure" not in out


def test_exit_code_1(monkeypatch, capsys):
    def wrong(quick):
        """A title"""
        yield theory.equal("One is two.", "one {}", [1], [2])
    monkeypatch.setitem(theory.PARTS["asymptotic"][1], "P8", wrong)
    with pytest.raises(SystemExit, match="1"):
        theory.main(["P8", "P9", "--quick"])
    assert "[UNEXPECTED, stated: 2] One is two." in capsys.readouterr().out


@pytest.mark.parametrize("error, code, says", [
    (KeyboardInterrupt(), 130, "stopped"), (BrokenPipeError(), 1, ""), (OSError(28, "full"), 2, "th")])
def test_it_ends_as_every_command_does(monkeypatch, capsys, error, code, says):
    def stops(quick):
        """A title"""
        raise error
    monkeypatch.setitem(theory.PARTS["asymptotic"][1], "P8", stops)
    monkeypatch.setattr(theory.sys, "stdout", theory.sys.stdout)  # BrokenPipeError replaces it
    with pytest.raises(SystemExit, match=str(code)):
        theory.main(["P8"])
    said = capsys.readouterr().err.strip()
    assert said.startswith(says) and "\n" not in said


@pytest.mark.parametrize("argv, hint", [(["P18"], "P17"), (["costs"], "P5"), (["--quik"], "--q")])
def test_exit_code_2_and_one_line(argv, hint, capsys):
    with pytest.raises(SystemExit) as stopped:
        theory.main(argv)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and hint in message and message.count("\n") == 1


def test_plan(capsys, monkeypatch):
    """32 sources, K = 16, T = 32: a row with gradient takes 10 ms, a sampled token 1 ms."""
    seconds = iter([[.32, .33], [5, 4.096]])  # 32 rows; 32 x 4 x 32 tokens
    monkeypatch.setattr(theory.timeit, "repeat", lambda action, **_: (action(), next(seconds))[1])
    theory.main(["--plan"])
    out = capsys.readouterr().out
    found = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    for line in ("offline 96 128 1.280 46.9 104.2", "masked 32 64 0.640 93.8 312.5",
                 "refresh 160 64 0.768 78.1 62.5", "tail 8,448 544 13.888 4.3 1.2",  # 16.5 of 32
                 "full 3,277 544 21.824 2.7 3.1", "online 16,384 544 21.824 2.7 0.6"):
        assert line.split()[1:] == found[line.split()[0]]
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.slow
def test_everything_quick(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theory.main(["--quick"])
    out = capsys.readouterr().out
    assert "0 otherwise than stated" in out and all(f"\n{name}  " in out for name in ROWS)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out" / "theory").iterdir()}
    assert sizes.keys() == {"deployed.png", "branch.png"} and min(sizes.values()) > 20000
