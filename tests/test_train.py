"""The loss, the update and the loop on a tiny model: what each setting learns from and counts."""
import os

import pytest

import train
import torch

import data
import sorl
from data.rewards import load_reward
from data.tokenizer import Tokenizer
from lab.batches import batch_indices
from model import generate, log_probs
from runs import SETTINGS, base, built, flags_of, folder, metrics, run, same, weights  # noqa: F401

SOURCES, UPDATES, ROWS = 4, 6, 24  # a batch, a run, and their product
SAMPLING = [name for name in SETTINGS if name.split()[0] not in ("mle", "offline")]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_fills_its_folder_and_counts(folder, base, tmp_path, name):
    """Six updates. A row through the model is an FP when it samples or scores; rows for the
    gradient alone and rows of imitation are counted apart."""
    row, setting = run(folder, base, tmp_path, *flags_of(name)), name.split()[0]
    out = tmp_path / setting
    assert set(os.listdir(out)) >= {"config.json", "metrics.jsonl", "texts.jsonl", "ckpt.pt",
                                    "best.pt", "predictions.jsonl"}
    assert not same(weights(base), weights(out / "ckpt.pt")) and row["steps"] == UPDATES
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(UPDATES + 1))
    assert lines[4]["val_reward"] is not None and lines[6]["val_reward"] is not None

    flags = dict(zip(SETTINGS[name][::2], SETTINGS[name][1::2]))
    C, K = int(flags.get("--num_static", 1)), int(flags.get("--K", 1))
    texts = 0 if name == "mle" else C * ROWS
    kl = texts if "--kl_weight" in flags else 0  # the base reads them, too
    if setting in ("online", "full", "tail"):  # those decode; at least one token of each sample
        kl *= K
        assert row["fp_grad"] == row["rows_grad"] == K * texts
        every = K * texts // int(flags.get("--reuse", 1))
        assert row["fp"] > kl + (every if setting != "full" else 0)
    else:
        assert row["rows_grad"] == texts and row["fp_grad"] == 0
        assert row["fp"] > texts if setting == "refresh" else row["fp"] == texts + kl
    assert row["fp_mle"] == (0 if name == "online alone" else ROWS)
    assert row["setting"] == row["name"] == setting


@pytest.mark.parametrize("name", ["online", "full", "full random", "tail", "tail reuse",
                                  "tail refresh", "refresh", "refresh many"])
def test_fp_of_an_update_are_those_of_the_texts_really_drawn(folder, base, name):
    """An FP for every token that was sampled, recomputed here from the uniforms, and one for every
    static text that is read. A second update on the same texts pays for the reading alone, one on
    the same samples nothing."""
    runner, batches = built(name, folder, base, "--kl_weight", "0")
    cfg, policy = runner.cfg, runner.policy
    runner.step = cfg.refresh  # the first texts are stored ones
    stored = batches.read(1 if cfg.refresh else 0)
    N, T, pad = SOURCES * cfg.num_static, policy.T, policy.tok.pad
    how = dict(temperature=cfg.temperature, top_k=cfg.top_k)

    def uniforms(purpose, *shape):
        return sorl.uniforms(shape, cfg.seed, runner.step, purpose)
    sampled, read = 0, 0
    static = torch.full((N, T), pad)
    static[:, :stored.static.size(2)] = stored.static.flatten(0, 1)
    if cfg.refresh:
        u = uniforms("refresh", SOURCES, cfg.num_static, T)
        static = generate(policy.model, stored.src, stored.pad, T, u, **how).flatten(0, 1)
        sampled += (static != pad).sum()
        static[static[:, -1] < pad, -1] = policy.tok.eos
    if cfg.observation == "full":
        acts = uniforms("mask", N, T) < cfg.p_m
        if cfg.mask == "tail":  # p_m = 1/2: the cut is uniform
            lengths, first = (static != pad).sum(1).tolist(), uniforms("mask", N, T)[:, 0]
            cuts = [min(L - 1, int(L * u)) for L, u in zip(lengths, first.tolist())]
            acts = torch.tensor([[t >= cut for t in range(T)] for cut in cuts])
        u = uniforms("tokens", N, cfg.K, T)
        src, left = (x.repeat_interleave(cfg.num_static, 0) for x in (stored.src, stored.pad))
        tokens = generate(policy.model, src, left, T, u, static=static, mask=acts, **how)
        sampled += ((tokens != pad) & acts[:, None]).sum()
    else:
        read = N
    assert runner.count(train.update(runner, batches))
    assert runner.counts["fp"] == sampled + read and sampled > 0
    if cfg.refresh > cfg.reuse or cfg.reuse > 1:
        runner.count(train.update(runner, batches))
        assert runner.counts["fp"] == sampled + 2 * read


@pytest.mark.parametrize("name", SAMPLING)
def test_every_setting_that_samples_learns_what_is_rewarded(folder, base, tmp_path, monkeypatch,
                                                            name):
    """A reward for e's: twelve updates raise that of the samples."""
    (tmp_path / "letters.py").write_text(
        "def share(hypotheses, references, sources):\n"
        "    return [text.count('e') / max(1, len(text)) for text in hypotheses]\n")
    monkeypatch.chdir(tmp_path)
    runner, batches = built(name, folder, base, "--reward", "letters:share", "--lr", "0.03",
                            "--mle_weight", "0", "--batch_size", "8", "--p_m", "0.6")
    updates = 36 if name == "tail refresh" else 12  # its texts are short at first, and cuts late
    rewards = [runner.count(train.update(runner, batches))["reward"] for _ in range(updates)]
    assert print(rewards) or sum(rewards[-4:]) > 1.1 * sum(rewards[:4]) > 0


@pytest.mark.parametrize("name", ["online", "full", "tail"])
def test_samples_serve_again_with_the_clipped_ratio(folder, base, name):
    """The first update has the gradient without reuse, to the bit. The second reads the same
    samples for no FP and N·K rows; its loss is PPO's, by hand. The third draws new ones."""
    flags = ["--mle_weight", "0", "--num_static", "2"]
    first = []
    for reuse in ("1", "2"):
        runner, batches = built(name, folder, base, *flags, "--reuse", reuse)
        value, log = train.loss(runner, batches)
        first.append(torch.autograd.grad(value, runner.policy.model.wpe.weight)[0])
    assert torch.equal(*first) and first[0].any()
    N, K, T = log["rollout"].tokens.shape
    tokens, acted = log["rollout"].tokens, log["rollout"].acted
    batch = batches.get(0)[0]

    def log_prob(model):
        logits = log_probs(sorl.target_logits(model, batch.src, batch.pad, tokens.flatten(0, 1)))
        return logits.view(N, K, T, -1).gather(-1, tokens[..., None])[..., 0].detach()
    before = log_prob(runner.policy.model)
    runner.optimizer = torch.optim.SGD(runner.policy.model.parameters(), lr=2.0)
    train.update(runner, batches)
    ratio = (log_prob(runner.policy.model) - before).exp()
    runner.counts["fp"] = runner.counts["rows_grad"] = 0
    logs = train.update(runner, batches)
    runner.count(logs)
    assert torch.equal(logs[0]["rollout"].tokens, tokens)
    assert runner.counts["fp"] == 0 and runner.counts["rows_grad"] == N * K
    A = log["A"][..., None].expand_as(ratio)[acted]
    ratio = ratio[acted]
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and A.any()
    push = torch.where(A > 0, A * ratio.clamp(max=1.2), A * ratio.clamp(min=0.8))
    expected = -push.sum() / (N * K)
    assert logs[0]["rl"].item() == pytest.approx(expected.item(), rel=1e-4)
    again = train.update(runner, batches)[0]["rollout"]
    assert not torch.equal(again.tokens, tokens)


def test_a_tail_is_not_scored_against_the_text_that_it_continues(folder, base):
    """Two references, one of which gives the prefix: a tail that copies the rest of it earns
    nothing for that. What keeps nothing of it (cut 0) is scored against both, and every sample
    against those of its own source."""
    runner, batches = built("tail", folder, base, "--p_m", "0.8", "--num_static", "2")
    records = [data.Record(f"s {i}", [f"u v w x {i}", f"f g h i {i}"]) for i in range(4)]
    batches.records, batches.order, given = records, list(range(4)), []

    def copies(texts, references, sources):
        given.extend(zip(references, sources))
        return [float(texts[0].startswith("u")) for texts in references]
    runner.reward = copies
    batch = batches.get(0)[0]
    log = train.reinforce(runner, batch, number=0, slot=0)[1]
    kept = [not acts for acts in log["mask"][:, 0].tolist()]
    assert 0 < sum(kept) < 8
    for n, keeps in enumerate(kept):  # static text n % 2 of source n // 2
        source = batch.sources[n // 2]
        both = next(r.references for r in records if r.source == source)
        expected = both[1 - n % 2:][:1] if keeps else both
        assert given[3 * n:3 * n + 3] == [(expected, source)] * 3
        assert log["rewards"][n].tolist() == [float(expected[0].startswith("u"))] * 3


def test_the_loss_is_the_weighted_sum_of_its_parts(folder, base):
    """Imitation, reinforcement and KL each alone; then all, by their weights."""
    def value(**weights):
        flags = [word for key, v in weights.items() for word in ("--" + key, str(v))]
        runner, batches = built("masked", folder, base, *flags)
        with torch.no_grad():
            runner.base.wte.weight.mul_(1.3)  # a base that differs, so that KL is not 0
        return train.loss(runner, batches)[0].item()
    rl = value(mle_weight=0)
    mle, kl = value(mle_weight=1) - rl, value(mle_weight=0, kl_weight=1) - rl
    assert mle > 1 and kl > 0.1 and abs(rl) > 1e-3
    expected = rl + 0.3 * mle + 0.2 * kl
    assert value(mle_weight=0.3, kl_weight=0.2) == pytest.approx(expected, rel=1e-4)


def test_stored_texts_get_credit_for_the_tokens_that_they_kept(folder, base):
    """By hand: log-probabilities of the unmasked tokens, with GOLD's weights, each token's own
    probability, through which no gradient goes."""
    runner, batches = built("masked ranked", folder, base, "--adv_scale", "none")
    batch = batches.get(2)[0]
    (B, C, T), V = batch.static.shape, runner.policy.tok.vocab_size
    logits = torch.randn(B * C, T, V, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    mask = torch.rand(B * C, T, generator=torch.Generator().manual_seed(1)) < 0.3
    scores, value = train.rank_static(runner, batch, logits, mask)
    assert torch.equal(scores, train.score(runner.reward, runner.policy, batch.static, batch))
    found, = torch.autograd.grad(value, logits)

    never = torch.zeros(V).index_fill(0, torch.tensor([V - 4, V - 3, V - 1]), -torch.inf)
    logp = (logits + never).log_softmax(-1).gather(-1, batch.static.view(B * C, T, 1))[..., 0]
    total = 0.0
    for b in range(B):
        for c in range(C):
            A = scores[b, c] - scores[b].mean()
            for t in range(batch.static_len[b, c]):
                if not mask[b * C + c, t]:
                    term = logp[b * C + c, t]
                    total = total - A * term * term.detach().exp() / (B * C)
    assert value.item() == pytest.approx(total.item(), rel=1e-4) and abs(total) > 1e-3
    expected, = torch.autograd.grad(total, logits)
    assert torch.allclose(found, expected.nan_to_num(0), atol=1e-6)


def test_evaluation_disturbs_nothing(folder, base, tmp_path, monkeypatch):
    """After every update or at the end alone: the same weights, the same counts."""
    rows, outs = [], [tmp_path / "often/tail", tmp_path / "last/tail"]
    for out, often in zip(outs, (True, False)):
        monkeypatch.setattr(train.evaluate, "is_due", lambda cfg, step, often=often: often)
        rows.append(run(folder, base, out.parent, *flags_of("tail refresh")))
        evaluated = [line["val_reward"] is not None for line in metrics(out)]
        assert sum(evaluated) == (7 if often else 2)
    assert same(*(weights(out / "ckpt.pt") for out in outs))
    assert all(rows[0][key] == rows[1][key] for key in ("fp", "fp_grad", "fp_mle", "tokens"))


def test_a_budget_stops_a_run_and_bends_its_rate(folder, base, tmp_path):
    """4 FPs per update: the fourth one crosses 13. The rate rises, then falls with the budget."""
    row = run(folder, base, tmp_path, "--budget_fp", "13", "--steps", "50")
    assert row["fp"] == 16 and row["steps"] == 4
    rates = [train.rate(train.Config(lr=2.0), done) for done in (0, 0.05, 0.1, 0.55, 12 / 13, 1)]
    assert 0 < rates[0] < 0.05 and rates[1:] == pytest.approx([1, 2, 1, 0.17, 0], abs=0.03)


def test_half_of_the_imitated_rows_have_masks_from_masked_from_on(folder, base, monkeypatch):
    """A base reads plain texts first; then [MASK] gets a meaning."""
    seen, observe = [], sorl.observe
    monkeypatch.setattr(sorl, "observe", lambda text, mask, *more: seen.append(mask.any(1)) or
                        observe(text, mask, *more))
    runner, batches = built("mle", folder, base, "--batch_size", "24")
    runner.cfg = train.replace(runner.cfg, masked_from=1)
    for _ in range(5):
        train.update(runner, batches)
    assert not seen[0].any()
    share = torch.cat(seen[1:]).float().mean()
    assert 0.3 < share < 0.7


# --- Batches --------------------------------------------------------------------------------------

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

    def references(setting, step=0, **flags):
        cfg = train.make_config(dict(batch_size=2, num_static=3) | flags, setting)
        written = {0: torch.full((2, cfg.num_static, 9), tok.eos)}
        batch, _ = train.Batches(cfg, records, policy, reward, written).get(step)
        found = dict(zip(batch.sources, batch.references))
        assert found["t"] == [["u v"]] * cfg.num_static
        return found["s"]
    assert references("offline") == others
    assert references("masked", num_static=1) == others[:1]
    assert references("masked", num_static=1, stored="worst") == others[2:]  # agrees with none
    assert references("refresh", refresh=2, step=1) == others  # before the first refresh
    assert references("refresh", refresh=2, step=3) == [r.references] * 3


def test_best_worst_and_random_stored_texts(folder):
    dataset, reward = data.load_dataset(folder), load_reward("rouge")
    r = dataset["train"][0]
    assert len(set(r.static)) == 3
    scores = dict(zip(r.static, reward(r.static, [r.references] * 3, [r.source] * 3)))

    def picked(stored, C, uniform):
        cfg = train.replace(train.Config(), stored=stored, num_static=C)
        return train.Batches(cfg, dataset["train"], None, reward, {}).pick([0], [uniform])[0]
    falling = sorted(r.static, key=scores.__getitem__, reverse=True)
    assert picked("best", 2, 0.9) == falling[:2] and picked("worst", 2, 0.9) == falling[:0:-1]
    assert picked("data", 4, 0.9) == [*r.static, r.static[0]]
    assert [picked("random", 1, u)[0] for u in (0, 0.4, 0.99)] == r.static
    assert picked("random", 2, 0.99) == [r.static[2], r.static[0]]


def test_refreshed_texts_serve_until_the_next_refresh(folder, base):
    """The first texts are the record's; a text of the policy that is cut ends in EOS."""
    runner, batches = built("refresh many", folder, base)  # every 3 updates
    first, no_fp = batches.get(0)
    texts = batches.read(0).static
    assert no_fp == 0 and torch.equal(first.static[..., :texts.size(2)], texts)
    stored, (batch, fp) = batches.read(1), batches.get(3)
    T, tok = stored.static.size(2), batches.policy.tok
    assert not (batch.static[..., :T] == stored.static).all(2).any() and fp > 0
    ends = batch.static.gather(2, batch.static_len[..., None] - 1)
    assert (ends == tok.eos).all()
    assert torch.equal(runner.written[0], batch.static)  # so that a checkpoint has them
    for step in (4, 5):
        again, no_fp = batches.get(step)
        assert no_fp == 0 and again.sources == batch.sources
        assert torch.equal(again.static, batch.static)
    later, fp = batches.get(6)
    assert later.sources != batch.sources and fp > 0
