"""theory.py: every pinned number of the theory, every proposition, and planted faults that the checks must catch."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import sorl
import theory
from theory import FLAT, Process, copy_task, epsilons, iid, instances, on, optimum, story_values


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wrong(rows) -> list[str]:
    return [f"{r.statement}: {r.predicted} | {r.measured}" for r in rows if not r.ok]


# ---------------------------------------------------------------------------------------------------------------------
# The enumeration itself

def test_sizes_of_the_observations():
    w = theory.worlds(2, 3)
    counts = {phi: sum(theory.sizes(w.codes(phi))) for phi in theory.OBSERVATIONS}
    assert [counts[phi] for phi in ("full", "masked", "static-visible", "no-mask-info", "blind")] == [42, 26, 42, 7, 3]
    assert 3 * theory.sizes(w.codes("lookahead"))[0] == 81


def test_number_of_policies():
    assert {phi: len(theory.fills(2, 3, phi)) for phi in ("masked", "static-visible", "no-mask-info", "blind")} == \
        {"masked": 16, "static-visible": 32, "no-mask-info": 8, "blind": 4}


def test_worlds_by_hand():
    """Text 01, mask (1,0), action sequence 11: position 0 is the model's 1, position 1 the static 1."""
    w = theory.worlds(2, 2)
    context = next(c for c in range(16) if w.y[c, 0].tolist() == [0, 1] and w.M[c, 0].tolist() == [1, 0])
    assert w.ys[context, 3].tolist() == [1, 1] and w.ys[context, 0].tolist() == [0, 1]


@pytest.mark.parametrize("kind", theory.STATIC)
def test_distributions(kind):
    rng = np.random.default_rng(0)
    D = theory.draw_D(kind, 2, 3, rng).reshape(2, 2, 2)
    assert math.isclose(D.sum(), 1)
    if kind == "skip":
        ends = D.sum(1)
        assert np.allclose(ends, np.outer(ends.sum(1), ends.sum(0)))


def test_probabilities_of_the_worlds_sum_to_one():
    for process, rng in instances(10, 0):
        assert math.isclose(process.weights(theory.random_policy(process, "full", rng)).sum(), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Every pinned number

def test_p1_tokens():
    t = theory.tokens_pushed(8, .4, 5)
    assert np.allclose(list(t.values()), [27.2, 10.46, 12.78], atol=.005)


def test_p5_pins():
    R = theory.COPY
    assert theory.gibbs_value(R, 1) == pytest.approx(2.006409, abs=5e-7)
    assert theory.mean_field(R, 1)[0] == pytest.approx(1.886294, abs=5e-7)
    gaps = [theory.gibbs_value(R, t) - theory.copy_masked_value(t) for t in (.1, .25, .5, 1, 2)]
    assert gaps == pytest.approx([.0693, .1680, .2169, .1201, .0619], abs=5e-5)
    assert theory.copy_masked_value(.8) == pytest.approx(.5 + 1.6 * math.log(2))
    assert theory.uniform_gradients() == pytest.approx((0, .25), abs=1e-12)


def test_p6_pins():
    every = ("masked", "full", "static-visible", "no-mask-info", "lookahead", "blind")
    assert story_values("C1", .5, *every) == pytest.approx([.9375, .9375, 1, 1, 1, .75])
    for p in (.1, .35, .9):
        assert story_values("C1", p, "masked") == pytest.approx([1 - p * p * (1 - p) / 2])
        assert story_values("C2", p, "masked", "static-visible") == pytest.approx([1 - p * p / 2, 1])
        assert story_values("C2", p, "blind") == pytest.approx([1 - p / 2])
        assert story_values("C3", p, "masked", "static-visible") == pytest.approx([1 - (1 - p) ** 2] * 2)
        assert story_values("C3", p, "no-mask-info", "blind") == pytest.approx([max(p, 2 * p * (1 - p))] * 2)
    assert story_values("C1 Markov", .5, "masked", "static-visible", "no-mask-info") == pytest.approx([.89, .93, .905])
    assert story_values("C3", .3, "masked", "blind") == pytest.approx([.51, .42])


def test_p6_pairwise_independence_is_not_enough():
    D = on(2, 4, lambda a, b, c, d: d == a ^ c) / 8
    pairs = [D.reshape(2, 2, 2, 2).sum(tuple({0, 1, 2, 3} - {i, j})) for i in range(4) for j in range(i)]
    assert all(np.allclose(q, .25) for q in pairs)
    for p in (.3, .5, .8):
        assert theory.xor_gain(p) == pytest.approx(p * p * (1 - p) ** 2 / 2)


def test_p7_pins():
    worst, mean = epsilons(FLAT, "masked", iid(FLAT))
    assert worst == pytest.approx([0, 1, 1.5]) and mean == pytest.approx([0, .5, .875])
    worst, mean = epsilons(FLAT, "masked", iid(FLAT, (.9, .1)))
    assert worst == pytest.approx([0, 1.8, 1.98]) and mean == pytest.approx([0, .18, .3438], abs=5e-5)
    assert epsilons(FLAT, "masked", iid(FLAT), "history")[0] == pytest.approx([0, 1.5, 1.875])
    assert epsilons(FLAT, "static-visible", iid(FLAT), "history")[0] == pytest.approx([0, 1, 1.5])


def test_p8_pin():
    assert theory.pinned_regret() == pytest.approx((.81, .0713, 3.96), abs=5e-5)


def test_p11_pins():
    regret = theory.coin_regret(.9, 1000, 400, np.random.default_rng(1))
    assert np.all(np.isclose(regret, 0) | np.isclose(regret, .81))
    assert (regret > .4).mean() == pytest.approx(.5, abs=.1)
    assert theory.overfit_bound(copy_task(.9), "masked", 10 ** 5) == pytest.approx(.0227, abs=5e-5)


def test_p12_smaller_observations_tie():
    few = theory.mask_bits(FLAT)
    assert sum(theory.sizes(few)) == 14 and sum(theory.sizes(FLAT.codes("masked"))) == 26
    assert epsilons(FLAT, few, iid(FLAT))[0] == pytest.approx(epsilons(FLAT, "masked", iid(FLAT))[0])


def test_p13_pins():
    assert optimum(theory.threshold_process(.8, .5, 2)) == pytest.approx(.74)
    for T, threshold in ((2, .5), (3, .7071)):
        below, above = (optimum(theory.threshold_process(threshold + e, .5, T)) for e in (-.01, .01))
        assert below == pytest.approx(.5) and above > .501
    assert .5 ** (1 / 19) == pytest.approx(.9642, abs=5e-5)


def test_p14_pins():
    for p, pins in theory.PINS.items():
        for K, pin in zip((2, 4, 8), pins):
            mean, variance = theory.pinned_variance(K, p)
            assert mean == pytest.approx(p / 4, abs=1e-12) and variance == pytest.approx(pin, abs=1e-12)
            assert pin == pytest.approx(p * (1 - p) / 16 + p / (8 * K * (K - 1)), abs=1e-12)
    assert theory.PINS[.5] == pytest.approx((.046875, .0208333, .0167411), abs=5e-8)


def test_p14_formula_gives_the_pins():
    """F, zeta_1 and zeta_2 by enumeration (process of T=1) give the same variances as the estimator itself."""
    for p, pins in theory.PINS.items():
        process = Process(2, 1, np.array([1., 0]), np.array([0., 1]), p)
        s, keep = theory.tabular_scores(process, iid(process))[..., -1:], process.prior > 0    # the logit of token 1
        prob = np.full((2, 2), .5)
        terms = theory.noise(process.prior[keep], prob[:keep.sum()], process.reward[keep],
                             np.tensordot(s[keep], s[keep], (2, 2)))
        assert [terms.variance(K) for K in (2, 4, 8)] == pytest.approx(pins, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Every proposition, small

@pytest.mark.parametrize("name", [n for n in theory.PROPOSITIONS])
def test_proposition(name):
    assert not wrong(theory.PROPOSITIONS[name][0](.1))


@pytest.mark.parametrize("check", [theory.p1_code, theory.p2_code, theory.p1_text])
def test_on_the_code(check):
    assert not wrong(check(.2))


@pytest.mark.parametrize("size", [.2, pytest.param(1, marks=pytest.mark.slow)])
def test_ceilings(size):
    if size == 1:
        assert not wrong(theory.p6_gpt(1))
    else:                                     # 60 updates: no policy of the class is above the best of its class
        curve = theory.ceiling_curve("C3", "static", 60)
        assert curve[-1] < .42 + 1e-6 < curve[-1] + .05


@pytest.mark.slow
@pytest.mark.parametrize("check", [theory.p11_gpt, theory.p13_gpt, theory.p14_gpt])
def test_small_runs(check):
    assert not wrong(check(.2))


@pytest.mark.slow
def test_other_seeds():
    for seed in range(1, 5):
        for name in theory.PROPOSITIONS:
            assert not wrong(theory.PROPOSITIONS[name][0](.2, seed)), (name, seed)


# ---------------------------------------------------------------------------------------------------------------------
# The enumeration on the GPT agrees with the tables and with sampling

def test_exact_value_of_a_gpt_is_what_sampling_gives():
    process = next(instances(1, 3, ("markov",)))[0]
    task, model = theory.Sources([process]), theory.tiny_gpt(2, 5, std=.2)
    n, k = 20000, 2
    y = torch.tensor(np.random.default_rng(0).choice(8, n, p=process.D))
    static, src, pad = theory.with_end(task.texts[y], k), task.prompt.expand(n, -1), torch.zeros(n, dtype=torch.long)
    mask = sorl.sample_mask(sorl.uniforms((n, 4), 1), torch.full((n,), 4), process.p)
    for observation in ("masked", "static"):
        with torch.no_grad():
            logits = sorl.target_logits(model, src, pad, sorl.observe(static, mask, observation, 5))
            tokens = sorl.rollout_one_pass(logits, static, mask, sorl.uniforms((n, 1, 4), 2)).tokens
        exact = theory.gpt_value(model, task, observation)
        assert float(task.R[0][task.ids(tokens)].mean()) == pytest.approx(exact, abs=.01)
    tokens = sorl.decode(model, src, pad, static, mask, sorl.uniforms((n, 1, 4), 3), end=False).tokens
    assert float(task.R[0][task.ids(tokens)].mean()) == pytest.approx(theory.gpt_value(model, task, "full"), abs=.01)
    alone = torch.arange(4).expand(n, -1) < 3
    tokens = sorl.decode(model, src, pad, static, alone, sorl.uniforms((n, 1, 4), 4), end=False).tokens
    assert float(task.R[0][task.ids(tokens)].mean()) == pytest.approx(theory.gpt_deployed(model, task), abs=.01)


# ---------------------------------------------------------------------------------------------------------------------
# Planted faults: the check of the proposition must see them

def test_fault_own_reward_left_in_leave_one_out():
    def faulty(rewards, baseline="loo", greedy=None, scale=False):
        return rewards - rewards.mean(1, keepdim=True)
    rows = theory.p14(.2, advantage=faulty)
    assert any("leave-one-out" in text for text in wrong(rows)) and any("variance" in text for text in wrong(rows))


def test_fault_gradient_pass_counted_as_sampling():
    def faulty(*args, **kwargs):
        rollout = sorl.decode(*args, **kwargs)
        return dataclasses.replace(rollout, fp=rollout.fp + rollout.fp_grad)
    assert wrong(theory.p1_code(decode=faulty)) and not wrong(theory.p1_code())


def test_fault_every_sample_counted_in_the_masked_pass():
    def faulty(logits, static, mask, u):
        rollout = sorl.rollout_one_pass(logits, static, mask, u)
        return dataclasses.replace(rollout, fp=rollout.fp * u.size(1))
    assert wrong(theory.p1_code(one_pass=faulty))


def test_fault_mask_shifted_by_one():
    def faulty(static, mask, observation, mask_id):
        return sorl.observe(static, mask.roll(1, 1), observation, mask_id)
    assert any("masked" in text for text in wrong(theory.p2_code(observe=faulty)))


def test_fault_log_probabilities_not_normalised():
    def faulty(logits, static, mask, u):
        """The special tokens stay in the softmax, though they can never be drawn."""
        rollout = sorl.rollout_one_pass(logits, static, mask, u)
        logp = logits.log_softmax(-1)[:, None].expand(-1, u.size(1), -1, -1)
        logp = logp.gather(-1, rollout.tokens[..., None])[..., 0]
        return dataclasses.replace(rollout, logp=logp.masked_fill(~rollout.acted, 0))
    assert any("sum to 1" in text for text in wrong(theory.p2_code(rollout=faulty)))
    # P14 cannot see it: leave-one-out advantages sum to 0, so a common factor leaves no trace in the gradient
    assert not any("leave-one-out" in text for text in wrong(theory.p14(.2, rollout=faulty)))


def test_fault_loss_of_the_wrong_sign():
    rows = theory.p14(.2, loss=lambda *args: -sorl.policy_loss(*args))
    assert any("gradient p/4" in text for text in wrong(rows))


def test_fault_calls_of_the_text_task_counted_twice(monkeypatch):
    """train.py's counters against masks and lengths: adding every update's counts once more must be seen."""
    theory.text_costs.cache_clear()
    once = theory.train.metrics_of
    monkeypatch.setattr(theory.train, "metrics_of", lambda run, parts: (once(run, parts), once(run, parts))[1])
    assert any("calls a source" in text for text in wrong(theory.p1_text(.2)))
    theory.text_costs.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def test_cli_prints_a_table_and_draws(tmp_path, capsys):
    assert theory.main(["P5", "p7", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2.006" in out and "fails as it should" not in out.split("P7")[1]
    assert (tmp_path / "price.png").stat().st_size > 9000


def test_cli_exits_1_when_something_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(theory.PROPOSITIONS, "P7", (lambda size, seed: [theory.equal("P7", "one is two", 2, 1)],))
    assert theory.main(["P7", "--out", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("argv, hint", [(["P16"], "nearest is P6"), (["Q6"], "P6"), (["--quik"], "--quick"),
                                        (["--seed", "x"], "seed"), (["--plan", "--K", "0"], "at least 2")])
def test_cli_exits_2_with_one_line(argv, hint, capsys):
    with pytest.raises(SystemExit) as e:
        theory.main(argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and hint in err and err.count("\n") == 1


def test_plan(capsys):
    assert theory.main(["--plan", "--T", "8", "--K", "4", "--batch_size", "4", "--budget_seconds", "20"]) == 0
    out = capsys.readouterr().out
    assert "Recommended" in out and all(name in out for name in ("masked", "static", "refresh", "full", "online"))


def test_plan_recommends_online_to_the_rich_and_cheap_passes_to_the_poor():
    poor, rich = (theory.recommend(8, 4, 4, fp, 0) for fp in (400, 10 ** 7))
    pick = lambda lines: next(line for line in lines if line.startswith("Recommended"))
    assert "Recommended: online" in pick(rich) and "Recommended: online" not in pick(poor)
