"""The loss, the update and the loop on a tiny model: what each setting learns from and counts."""
import os

import pytest

import train
import torch

import data
import sorl
from data.rewards import load_reward, rouge
from data.tokenizer import Tokenizer
from lab import evaluate
from lab.batches import batch_indices
from model import generate
from runs import SETTINGS, base, built, flags_of, folder, metrics, run, same, weights  # noqa: F401

SOURCES, UPDATES, ROWS = 4, 6, 24  # a batch, a run, and their product


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_fills_its_folder_and_counts(folder, base, tmp_path, name):
    """Six updates. A row through the model is an FP when it samples or scores; rows for the
    gradient alone and rows of imitation are counted apart."""
    row = run(folder, base, tmp_path, *flags_of(name))
    assert set(os.listdir(tmp_path)) >= {"config.json", "metrics.jsonl", "samples.txt", "ckpt.pt",
                                         "best.pt", "predictions.jsonl", "predictions.txt"}
    assert not same(weights(base), weights(tmp_path / "ckpt.pt")) and row["steps"] == UPDATES
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(UPDATES + 1))
    assert lines[4]["val_reward"] is not None and lines[6]["val_reward"] is not None

    exact = {"mle": 0, "offline": 3 * ROWS, "masked": ROWS, "static": ROWS, "masked worst": ROWS,
             "masked ranked": 3 * ROWS, "masked best": 2 * ROWS}  # the last one's base is read, too
    more_than = {"online": 3 * ROWS, "full": 0, "refresh": ROWS, "credit": 3 * ROWS,
                 "reuse": 3 * ROWS, "online alone": 2 * ROWS, "full random": 0}
    assert row["fp"] == exact[name] if name in exact else row["fp"] > more_than[name]
    gradient = {"online": 3 * ROWS, "full": 3 * ROWS, "online alone": ROWS, "full random": 3 * ROWS}
    assert row["fp_grad"] == gradient.get(name, 0)
    assert row["fp_mle"] == (0 if name == "online alone" else ROWS)
    assert row["setting"] == (name if name in ("mle", "offline", "online") else
                              "online" if name == "online alone" else "semi")


@pytest.mark.parametrize("name", ["online", "full", "full random", "refresh", "credit", "reuse"])
def test_fp_of_an_update_are_those_of_the_texts_really_drawn(folder, base, name):
    """An FP for every token that was sampled, recomputed here from the uniforms, and one for every
    static text that is read. A second update on refreshed texts pays for the reading alone."""
    runner, batches, reward = built(name, folder, base)
    cfg, policy = runner.cfg, runner.policy
    runner.step = cfg.refresh  # the first texts are stored ones
    stored = batches.stored(1 if cfg.refresh else 0)
    C, T, vocab_size = cfg.num_static, policy.T, policy.tok.vocab_size

    def uniforms(purpose, *shape):
        return sorl.uniforms(shape, cfg.seed, runner.step, purpose)
    if cfg.refresh:
        u = uniforms("refresh", SOURCES, C, T)
        tokens = generate(policy.model, stored.src, stored.pad, T, u,
                          temperature=cfg.temperature, top_k=cfg.top_k)
        sampled, read = (tokens != vocab_size - 4).sum(), SOURCES * C  # not PAD
    else:
        wide = torch.full((SOURCES, T), vocab_size - 4)
        wide[:, :stored.static.size(2)] = stored.static[:, 0]
        acts = uniforms("mask", SOURCES, T) < cfg.p_m
        u = uniforms("tokens", SOURCES, 3, T)
        tokens = generate(policy.model, stored.src, stored.pad, T, u,
                          static=wide, mask=acts, top_k=cfg.top_k)
        sampled, read = ((tokens != vocab_size - 4) & acts[:, None]).sum(), 0
    assert runner.count(train.update(runner, batches, reward))
    assert runner.counts["fp"] == sampled + read and sampled > 0
    if cfg.refresh:
        runner.count(train.update(runner, batches, reward))
        assert runner.counts["fp"] == sampled + 2 * read


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("mle", "offline")])
def test_every_setting_that_samples_learns_what_is_rewarded(folder, base, tmp_path, monkeypatch,
                                                            name):
    """A reward for e's: twelve updates raise that of the samples or of refreshed texts."""
    (tmp_path / "letters.py").write_text(
        "def share(hypotheses, references, sources):\n"
        "    return [text.count('e') / max(1, len(text)) for text in hypotheses]\n")
    monkeypatch.chdir(tmp_path)
    runner, batches, reward = built(name, folder, base, "--reward", "letters:share", "--lr", "0.03",
                                    "--mle_weight", "0", "--batch_size", "8", "--p_m", "0.6")
    rewards = [runner.count(train.update(runner, batches, reward))["reward"] for _ in range(12)]
    assert print(rewards) or sum(rewards[-4:]) > 1.1 * sum(rewards[:4]) > 0


def test_offline_learns_to_prefer_the_better_text(folder, base):
    """Two static texts a source: the better one's log-probability rises against the other's."""
    runner, batches, reward = built("offline", folder, base, "--lr", "0.01", "--mle_weight", "0",
                                    "--num_static", "2", "--batch_size", "24")
    batch = batches.stored(0)

    @torch.no_grad()
    def preference():
        src, pad = (t.repeat_interleave(2, 0) for t in (batch.src, batch.pad))
        logits = sorl.target_logits(runner.policy.model, src, pad, batch.static.flatten(0, 1))
        logp = logits.log_softmax(-1).gather(-1, batch.static.flatten(0, 1)[..., None])[..., 0]
        inside = sorl.text_mask(batch.static, runner.policy.tok.vocab_size)
        logp = (logp.view_as(inside) * inside).sum(-1)  # (B,2)
        rewards = train.score(reward, runner.policy, batch.static, batch)
        return ((logp[:, 0] - logp[:, 1]) * (rewards[:, 0] - rewards[:, 1]).sign()).mean()
    before = preference()
    for _ in range(20):
        train.update(runner, batches, reward)
    assert preference() > before + 1


def test_the_loss_is_the_weighted_sum_of_its_parts(folder, base):
    """Imitation, reinforcement and KL each alone; then all, by their weights."""
    def value(**weights):
        flags = [word for key, v in weights.items() for word in ("--" + key, str(v))]
        runner, batches, reward = built("masked", folder, base, *flags)
        with torch.no_grad():
            runner.base.wte.weight.mul_(1.3)  # a base that differs, so that KL is not 0
        return train.loss(runner, batches, reward)[0].item()
    rl = value(mle_weight=0)
    mle, kl = value(mle_weight=1) - rl, value(mle_weight=0, kl_weight=1) - rl
    assert mle > 1 and kl > 0.1 and abs(rl) > 1e-3
    expected = rl + 0.3 * mle + 0.2 * kl
    assert value(mle_weight=0.3, kl_weight=0.2) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("refreshed", [True, False])
def test_ranked_texts_get_credit_for_the_tokens_that_they_kept(folder, base, refreshed):
    """By hand: log-probabilities of the unmasked tokens. Refreshed texts at the temperature that
    they were drawn at, without a last column, whose end may be a cut; stored ones with GOLD's
    weights, each token's own probability, through which no gradient goes."""
    runner, batches, reward = built("credit", folder, base, "--adv_scale", "false",
                                    "--temperature", "0.8")
    batch = batches.get(2)[0]
    (B, C, T), V = batch.static.shape, runner.policy.tok.vocab_size
    logits = torch.randn(B * C, T, V, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    mask = torch.rand(B * C, T, generator=torch.Generator().manual_seed(1)) < 0.3
    scores, value = train.rank_static(runner.cfg, runner.policy, batch, logits, mask, reward,
                                      refreshed)
    assert torch.equal(scores, train.score(reward, runner.policy, batch.static, batch))
    found, = torch.autograd.grad(value, logits)

    never = torch.zeros(V).index_fill(0, torch.tensor([V - 4, V - 3, V - 1]), -torch.inf)
    logp = ((logits + never) / (0.8 if refreshed else 1)).log_softmax(-1)
    logp = logp.gather(-1, batch.static.view(B * C, T, 1))[..., 0]
    total = 0.0
    for b in range(B):
        for c in range(C):
            A = scores[b, c] - scores[b].mean()
            for t in range(min(T - 1 if refreshed else T, batch.static_len[b, c])):
                if not mask[b * C + c, t]:
                    term = logp[b * C + c, t]
                    total = total - A * term * (1 if refreshed else term.detach().exp()) / (B * C)
    assert value.item() == pytest.approx(total.item(), rel=1e-4) and abs(total) > 1e-3
    expected, = torch.autograd.grad(total, logits)
    assert torch.allclose(found, expected.nan_to_num(0), atol=1e-6)


def test_kl_holds_the_policy_to_the_base(folder, base):
    """With a large weight the policy stays; each row costs a second FP, whose tokens count too."""
    found = []
    for weight in ("0", "30"):
        runner, batches, reward = built("masked", folder, base, "--lr", "0.01",
                                        "--kl_weight", weight)
        for _ in range(10):
            runner.count(train.update(runner, batches, reward))
        batch = batches.stored(0)
        before = train.Policy(runner.base, runner.policy.tok, runner.policy.T, runner.policy.device)
        far = evaluate.spread(runner.policy, before, batch.sources, batch.static[:, 0])
        found.append((far["kl_to_base"], runner.counts))
    (free, cheap), (held, dear) = found
    assert 0 < held < free / 3 and dear["fp"] == 2 * cheap["fp"] == 80
    assert cheap["tokens"] < dear["tokens"] < 2 * cheap["tokens"]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_parameter_learns_under_autocast(folder, base, monkeypatch, name):
    """What a GPU does, on the CPU: bfloat16, where weights that were cast while decoding (or for
    a refresh) must not be the ones that learn."""
    monkeypatch.setattr(train, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    runner, batches, _ = built(name, folder, base)
    runner.step = runner.cfg.refresh  # where the first texts are sampled

    def reward(texts, references, sources):
        return torch.linspace(0.1, 1, len(texts))  # never equal: there is something to learn

    with train.autocast(None):
        train.loss(runner, batches, reward)[0].backward()
    for parameter, p in runner.policy.model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), parameter


def test_evaluation_disturbs_nothing(folder, base, tmp_path, monkeypatch):
    """After every update or at the end alone: the same weights, the same counts."""
    rows = []
    for often in (True, False):
        monkeypatch.setattr(train.evaluate, "is_due", lambda cfg, step, often=often: often)
        rows.append(run(folder, base, tmp_path / str(often), *flags_of("credit")))
        evaluated = [line["val_reward"] is not None for line in metrics(tmp_path / str(often))]
        assert sum(evaluated) == (7 if often else 2)
    assert same(weights(tmp_path / "True/ckpt.pt"), weights(tmp_path / "False/ckpt.pt"))
    assert all(rows[0][key] == rows[1][key] for key in ("fp", "fp_grad", "fp_mle", "tokens"))


def test_a_budget_stops_a_run_and_bends_its_rate(folder, base, tmp_path):
    """4 FPs an update: the fourth update crosses 13."""
    row = run(folder, base, tmp_path, "--budget_fp", "13", "--steps", "50")
    assert row["fp"] == 16 and row["steps"] == 4
    last = train.rate(train.Config(lr=1.0), 12 / 13)
    assert last < 0.1


def test_rate_rises_then_falls():
    rates = [train.rate(train.Config(lr=2.0), done) for done in (0, 0.05, 0.1, 0.55, 1)]
    assert 0 < rates[0] < 0.05 and rates[1:] == pytest.approx([1, 2, 1, 0], abs=0.03)


def test_half_of_the_imitated_rows_have_masks_from_masked_from_on(folder, base, monkeypatch):
    """A base reads plain texts first; then [MASK] gets a meaning."""
    seen, observe = [], sorl.observe
    monkeypatch.setattr(sorl, "observe", lambda text, mask, *more: seen.append(mask.any(1)) or
                        observe(text, mask, *more))
    runner, batches, reward = built("mle", folder, base, "--batch_size", "24")
    runner.cfg = train.replace(runner.cfg, masked_from=1)
    for _ in range(5):
        train.update(runner, batches, reward)
    assert not seen[0].any()
    share = torch.cat(seen[1:]).float().mean()
    assert 0.3 < share < 0.7


# --------------------------------------------------------------------------------------------------
# Batches


def test_an_epoch_meets_every_record_once_and_epochs_differ():
    epochs = [sum((batch_indices(24, 4, 0, 6 * epoch + i) for i in range(6)), [])
              for epoch in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    third = batch_indices(10, 5, 7, 4)
    assert sorted(batch_indices(10, 25, 7, 0)) == sorted([*range(10)] * 2 + third)


def test_a_static_text_is_no_reference_for_itself():
    """Stored texts that are references are scored against the others, the policy's against all."""
    r = data.Record("s", ["a b c", "a b d", "x y z"])
    records, reward = [r, data.Record("t", ["u v"], static=["w"])], load_reward("rouge")
    tok = Tokenizer.train(["a b c d x y z s t u v w"] * 2, 300)
    policy = train.Policy(None, tok, 9, torch.device("cpu"))
    others = [["a b d", "x y z"], ["a b c", "x y z"], ["a b c", "a b d"]]

    def references(setting, step=2, **flags):
        given = dict(batch_size=2, setting=setting, refresh=2, num_static=3) | flags
        cfg = train.make_config(given)
        batches = train.Batches(cfg, records, policy, reward)
        batch = batches.stored(0, batches.is_written(step))
        found = dict(zip(batch.sources, batch.references))
        assert found["t"] == [["u v"]] * cfg.num_static
        return found["s"]
    assert references("offline") == others
    assert references("masked", num_static=1) == others[:1]
    assert references("masked", num_static=1, stored="worst") == others[2:]  # agrees with none
    assert references("online") == references("refresh", num_static=1) == [r.references]
    assert references("credit") == [r.references] * 3
    assert references("credit", step=1) == others  # before the first refresh


def test_samples_are_scored_with_the_references_of_their_static_text():
    """ids (B,C,T) and (B·C,K,T) alike; rewards of the wrong source or column would differ."""
    records = [data.Record("s", ["a b c", "a b d", "x y z"]),
               data.Record("t", ["u v"], static=["w"])]
    tok = Tokenizer.train(["a b c d x y z s t u v w"] * 2, 300)
    policy = train.Policy(None, tok, 9, torch.device("cpu"))
    texts = [r.static * 3 for r in records]
    batch = data.make_batch(records, ["q", "q"], [row[:3] for row in texts], tok, 9)
    abc = float(rouge(["a b c"], [["a b d"]]).mean())
    each = train.score(load_reward("rouge"), policy, batch.static, batch)
    assert each.tolist() == [pytest.approx([abc, abc, 0]), [0, 0, 0]]
    twice = batch.static.repeat_interleave(2, 1).view(6, 2, -1)
    found = train.score(load_reward("rouge"), policy, twice, batch)
    assert torch.equal(found, each.flatten()[:, None].expand(6, 2))


def test_best_worst_and_random_stored_texts(folder):
    dataset, reward = data.load_dataset(folder), load_reward("rouge")
    r = dataset["train"][0]
    assert len(set(r.static)) == 3
    scores = dict(zip(r.static, reward(r.static, [r.references] * 3, [r.source] * 3)))

    def picked(stored, C, uniform):
        cfg = train.replace(train.Config(), stored=stored, num_static=C)
        return train.Batches(cfg, dataset["train"], None, reward).pick([0], [uniform])[0]
    falling = sorted(r.static, key=scores.__getitem__, reverse=True)
    assert picked("best", 2, 0.9) == falling[:2] and picked("worst", 2, 0.9) == falling[:0:-1]
    assert picked("data", 4, 0.9) == [*r.static, r.static[0]]
    assert [picked("random", 1, u)[0] for u in (0, 0.4, 0.99)] == r.static
    assert picked("random", 2, 0.99) == [r.static[2], r.static[0]]


def test_refreshed_texts_serve_until_the_next_refresh(folder, base):
    """The first texts are the record's; a text of the policy that is cut ends in EOS."""
    _, batches, _ = built("credit", folder, base)
    first, no_fp = batches.get(0)
    texts = batches.stored(0).static
    assert no_fp == 0 and torch.equal(first.static[..., :texts.size(2)], texts)
    stored, (batch, fp) = batches.stored(1), batches.get(2)
    T, tok = stored.static.size(2), batches.policy.tok
    assert not (batch.static[..., :T] == stored.static).all(2).any() and fp > 0
    ends = batch.static.gather(2, batch.static_len[..., None] - 1)
    assert (ends == tok.eos).all()
    same_batch, no_fp = batches.get(3)
    assert same_batch is batch and no_fp == 0
    later, _ = batches.get(4)
    assert later.sources != batch.sources
