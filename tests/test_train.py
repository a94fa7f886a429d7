"""The trainer end to end on a tiny model and a tiny data set: modes, resume, counts, errors."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import sorl
import train
from data import forecast
from data.reward_ids import RewardIds
from data.rewards import load_reward, rouge
from data.tokenizer import Tokenizer

TINY = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--base_steps", "4", "--base_batch", "8", "--batch_size", "4",
        "--K", "3", "--vocab_size", "300", "--steps", "6", "--eval_every", "2", "--eval_size", "6", "--block_size", "160",
        "--save_every", "3", "--device", "cpu"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A data set of 24 / 6 / 6 records on disk."""
    path = tmp_path_factory.mktemp("data")
    for split, records in forecast.generate("forecast").items():
        data.save_records(records[:24 if split == "train" else 6], str(path / f"{split}.jsonl"))
    return str(path)


@pytest.fixture(scope="session")
def base(folder, tmp_path_factory):
    """A base checkpoint of the tiny model."""
    out = str(tmp_path_factory.mktemp("base") / "run")
    train.main(["--mode", "train", "--setting", "mle", *TINY, "--data", folder, "--out", out])
    return f"{out}/base/best.pt"


def run(folder, base, out, *flags):
    train.main(["--mode", "train", *TINY, "--data", folder, "--init", base, "--out", str(out), *flags])
    return json.load(open(f"{out}/results.json"))[0]


def metrics(out):
    return [json.loads(line) for line in open(f"{out}/metrics.jsonl")]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SETTINGS = {
    "mle": ("--setting", "mle"),
    "offline": ("--setting", "offline", "--num_static", "3"),
    "online": ("--setting", "online"),
    "full": ("--setting", "semi", "--observation", "full", "--p_m", "0.5"),
    "masked": ("--setting", "semi"),
    "static": ("--setting", "semi", "--observation", "static"),
    "refresh": ("--setting", "semi", "--refresh", "2", "--num_static", "2", "--static_credit", "0.5"),
    "mixed": ("--setting", "semi", "--refresh", "2", "--num_static", "3", "--num_stored", "1", "--static_credit", "0.5"),
    "top_k": ("--setting", "semi", "--refresh", "2", "--num_static", "3", "--num_stored", "1", "--static_credit", "0.5", "--top_k", "5"),
    "greedy": ("--setting", "semi", "--baseline", "greedy", "--mask", "word", "--length_norm", "masked"),
    "count": ("--setting", "semi", "--baseline", "loo", "--mask", "count", "--static", "worst", "--top_k", "5"),
    "random": ("--setting", "semi", "--static", "random", "--adv_scale", "false", "--mle_weight", "0"),
    "kl": ("--setting", "semi", "--kl_weight", "0.1"),
    "best": ("--setting", "semi", "--static", "best", "--temperature", "0.8"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_and_counts(folder, base, tmp_path, name):
    """A run of 6 updates changes the weights, fills its folder, and counts what METHOD's table says it costs."""
    row = run(folder, base, tmp_path / "run", *SETTINGS[name])
    out = tmp_path / "run"
    assert {"config.json", "metrics.jsonl", "samples.txt", "ckpt.pt", "best.pt", "results.json"} <= set(os.listdir(out))
    assert not same(weights(base), weights(f"{out}/ckpt.pt")) and row["steps"] == 6
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[6]["val_reward"] is not None and lines[5]["val_reward"] is None
    sources, updates = 4, 6
    if name in ("masked", "static", "greedy", "count", "random"):
        assert row["fp"] == sources * updates and row["fp_grad"] == 0
    if name == "mle":
        assert row["fp"] == 0 and row["fp_mle"] == sources * updates
    if name == "offline":
        assert row["fp"] == 3 * sources * updates  # one FP a candidate
    if name == "online":
        assert row["fp_grad"] == 3 * sources * updates < row["fp"]
    if name == "refresh":
        assert row["fp"] > 2 * sources * updates  # the masked passes, and the tokens of 3 · 8 sampled texts
    if name in ("mixed", "top_k"):
        assert row["fp"] > 3 * sources * updates
    if name != "mle" and name != "random":
        assert row["fp_mle"] == sources * updates


def test_rewards_from_ids_equal_rewards_from_texts(folder, base, tmp_path, monkeypatch):
    """The path that a GPU takes, rewards from token ids, gives the same run on the CPU, with and without another part."""
    (tmp_path / "brief.py").write_text("def short(hypotheses, references, sources):\n"
                                       "    return [1 / (1 + len(text)) for text in hypotheses]\n")
    monkeypatch.chdir(tmp_path)
    pubs = [data.Record(f"name[xname], eatType[pub], food[{food}]", [f"xname, a {food} pub", f"xname pub. {food} food"])
            for food in ("Indian", "French", "English", "Italian")]
    for split in data.SPLITS:
        os.makedirs("pubs", exist_ok=True)
        data.save_records(pubs, f"pubs/{split}.jsonl")
    ids = RewardIds(train.load_policy(base, torch.device("cpu")).tok, "cpu")
    for where, spec, name in ((folder, "rouge", "refresh"), (folder, "rouge", "full"), (folder, "rouge+brief:short", "mixed"),
                              (folder, "rouge+brief:short", "full"), ("pubs", "rouge+slot", "masked"), ("pubs", "slot", "mixed")):
        out, flags = tmp_path / f"{spec.replace(':', '')}{name}", (*SETTINGS[name], "--steps", "2", "--reward", spec)
        run(where, base, f"{out}1", *flags)
        with monkeypatch.context() as m:
            m.setattr(train.Policy, "ids", property(lambda self: ids))
            m.setattr(train.Policy, "texts", counted(train.Policy.texts, calls := []))
            run(where, base, f"{out}2", *flags)
        assert same(weights(f"{out}1/ckpt.pt"), weights(f"{out}2/ckpt.pt"))
        assert 0 < metrics(f"{out}1")[1]["reward"] < 1
        sampled = [shape for shape in calls if len(shape) == 3 and shape[1] > 1]
        assert (len(sampled) > 0) == ("brief" in spec)  # strings are made only for who reads them


def counted(method, calls):
    return lambda self, tokens: calls.append(tokens.shape) or method(self, tokens)


@pytest.mark.parametrize("name", ["mle", "offline", "online", "full", "masked", "static", "greedy", "kl"])
def test_every_parameter_learns_under_autocast(folder, base, monkeypatch, name):
    """What a GPU does, on the CPU: bfloat16, where weights cast while decoding must not be the ones that learn."""
    monkeypatch.setattr(train, "autocast", lambda device, keep_casts=True: torch.autocast("cpu", torch.bfloat16, cache_enabled=keep_casts))
    given = train.parse_args([*TINY, *SETTINGS[name], "--data", folder, "--batch_size", "4"])
    cfg = train.make_config(given | {"mode": "train"})
    policy, model = train.load_policy(base, torch.device("cpu")), train.load_policy(base, torch.device("cpu")).model
    runner = train.Run(cfg, policy, "", train.make_optimizer(cfg, policy.model), False, model)
    batches = train.Batches(cfg, data.load_dataset(folder)["train"], policy, load_reward("rouge"))
    with train.autocast(policy.device):
        batch = train.next_batch(runner, batches)
    draws = train.Draws.at(cfg, 0, *batch.static.shape).rows(slice(0, 4), batch.static.size(1), policy.device)
    with train.autocast(policy.device):
        terms = train.forward(cfg, policy, model, batch, draws, load_reward("rouge"), 1.0, batch.target_len.sum())
    terms.loss.backward()
    for parameter, p in policy.model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, parameter


class Waits(TorchDispatchMode):
    """Counts the operations that a GPU's host would have to wait for: those whose value or shape depends on data."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        by_bool = name.startswith(("aten::index", "aten::_index")) and isinstance(args[1], list) and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
        self.count += by_bool or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return function(*args, **(kwargs or {}))


def test_an_update_hardly_waits_for_the_device(folder, base):
    """As a GPU does it, rewards from ids: where the tokens of MLE are, where masks are, the longest text in characters, the most
    words (and those of the references, which are cut on the CPU, so they are no wait). Counted up to the optimizer, whose step
    counts lie on the CPU; copies to the device are not counted."""
    with Waits() as w:
        torch.arange(3)[torch.tensor([True, False, True])], torch.ones(2).sum().item(), torch.ones(2).nonzero()
    assert w.count == 3
    cfg = train.make_config({"data": folder, "batch_size": 4, "steps": 6}, "masked")
    policy = train.load_policy(base, torch.device("cpu"))
    policy.ids = RewardIds(policy.tok, "cpu")
    batch = train.Batches(cfg, data.load_dataset(folder)["train"], policy, load_reward("rouge")).get(0)
    draws = train.Draws.at(cfg, 0, *batch.static.shape).rows(slice(0, 4), 1, policy.device)
    with Waits() as w:
        train.forward(cfg, policy, policy.model, batch, draws, load_reward("rouge"), 1.0, batch.target_len.sum()).loss.backward()
    assert w.count == 5


def test_a_static_text_is_no_reference_for_itself(tmp_path):
    """Stored texts that are references are scored against the others; the policy's own texts against all of them."""
    r = data.Record("s", ["a b c", "a b d", "x y z"])
    assert r.others("a b c") == ["a b d", "x y z"] and r.others("q") == r.references
    assert data.Record("s", ["a b c"]).others("a b c") == ["a b c"]  # one is better than none
    records, reward = [r, data.Record("t", ["u v"], static=["w"])], load_reward("rouge")
    tok = Tokenizer.train(["a b c d x y z s t u v w"] * 2, 300)
    for flags, expected in ((dict(setting="offline", num_static=3), [["a b d", "x y z"], ["a b c", "x y z"], ["a b c", "a b d"]]),
                            (dict(), [["a b d", "x y z"]]), (dict(setting="online"), [r.references]),
                            (dict(refresh=2, num_static=2), [r.references] * 2),
                            (dict(refresh=2, num_static=3, num_stored=1), [r.references, r.references, ["a b c", "a b d"]]),
                            (dict(static="worst"), [["a b c", "a b d"]])):  # x y z agrees with neither
        cfg = train.Config(batch_size=2, **flags)
        policy = train.Policy(None, tok, 9, torch.device("cpu"))
        batch = train.Batches(cfg, records, policy, reward).get(0)
        both = dict(zip(batch.sources, batch.references))
        assert both["s"] == expected and both["t"] == [["u v"]] * cfg.num_static
    batch = train.Batches(train.Config(batch_size=2, setting="offline", num_static=3), records, policy, reward).get(0)
    abc, one = float(rouge(["a b c"], [["a b d"]]).mean()), batch.static.repeat_interleave(2, 1).view(6, 2, -1)
    for ids in (None, RewardIds(tok, "cpu")):
        policy.ids = ids
        scores = dict(zip(batch.sources, train.score(reward, policy, batch.static, batch).tolist()))  # (B,C,T)
        assert scores["s"] == pytest.approx([abc, abc, 0]) and scores["t"] == [0, 0, 0]  # and not 1 for itself
        each = train.score(reward, policy, one, batch).view(2, 6)  # (B·C,K,T)
        assert dict(zip(batch.sources, each.tolist()))["s"] == pytest.approx([abc, abc, abc, abc, 0, 0])


def test_some_static_texts_stay_stored_ones(folder, base):
    """With num_stored the last columns are the record's own texts; the others are sampled, and only those cost FPs."""
    cfg = train.make_config({"refresh": 2, "num_static": 3, "num_stored": 1, "batch_size": 4, "steps": 6, "data": folder})
    policy = train.load_policy(base, torch.device("cpu"))
    runner = train.Run(cfg, policy, "", train.make_optimizer(cfg, policy.model), False)
    batches = train.Batches(cfg, data.load_dataset(folder)["train"], policy, None)
    stored, batch = batches.get(0), train.next_batch(runner, batches)
    T = stored.static.size(2)
    assert torch.equal(batch.static[:, 2, :T], stored.static[:, 2])
    assert (batch.static[:, 2, T:] == policy.tok.pad).all() and not torch.equal(batch.static[:, 0, :T], stored.static[:, 0])
    sampled = sorl.text_mask(batch.static[:, :2], policy.tok.vocab_size)
    assert runner.counts["fp"] == sampled.sum() and (batch.static_len == sorl.text_mask(batch.static, policy.tok.vocab_size).sum(2)).all()
    runner.step = 1
    assert torch.equal(train.next_batch(runner, batches).static, batch.static)  # until the next refresh


@pytest.mark.parametrize("name", ["online", "full"])
def test_decoding_counts_the_rows_really_sampled(folder, base, name):
    """FP of one update = acted positions of the texts that were really drawn, recomputed here from the uniforms."""
    given = dict(zip(["setting", "observation", "p_m", "K"], ["online" if name == "online" else "semi", "full", 0.5, 3]))
    cfg = train.make_config(given | {"batch_size": 4, "steps": 6, "data": folder})
    policy = train.load_policy(base, torch.device("cpu"))
    runner = train.Run(cfg, policy, "", train.make_optimizer(cfg, policy.model), False)
    batches = train.Batches(cfg, data.load_dataset(folder)["train"], policy, None)
    batch = train.next_batch(runner, batches)
    draws = train.Draws.at(cfg, 0, 4, 1, policy.T)
    p = 1.0 if name == "online" else 0.5
    mask = sorl.sample_mask(draws.mask, torch.full((4,), policy.T + 1), p)
    expected = sorl.decode(policy.model, batch.src, batch.pad, batch.static[:, 0], mask, draws.tokens)
    parts = train.update(runner, batches, load_reward("rouge"))
    assert parts[0].rl.fp == expected.acted.sum() == (expected.tokens != policy.tok.pad)[mask[:, None].expand_as(
        expected.tokens)].sum()


@pytest.mark.parametrize("name", ["online", "full", "masked", "refresh", "mixed", "offline", "greedy", "kl"])
def test_micro_batches_draw_the_same_and_leave_the_gradient(folder, base, name):
    """A batch of 5 in one part, in 3 + 2, or one by one: the same rewards drawn, the same losses logged, the same gradient
    to 1e-6."""
    gradients, rewards, losses = [], [], []
    for parts in (1, 2, 5):
        given = train.parse_args([*TINY, *SETTINGS[name], "--data", folder, "--batch_size", "5",
                                  "--micro_batches", str(parts)])
        cfg = train.make_config(given)
        policy = train.load_policy(base, torch.device("cpu"))
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)  # the step is the gradient
        before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
        other = train.new_policy(train.base_config(cfg), data.load_dataset(folder), policy.device).model.eval()
        runner = train.Run(train.replace(cfg, clip=0.0), policy, "", optimizer, False, other)  # untrained: KL > 0
        terms = train.update(runner, train.Batches(cfg, data.load_dataset(folder)["train"], policy, None),
                             load_reward("rouge"))
        rewards.append(torch.cat([t.rl.rewards for t in terms]))
        row = train.metrics_of(runner, terms)
        losses.append(torch.tensor([row["rl_loss"], row["mle_loss"]]))
        gradients.append({n: before[n] - p.detach() for n, p in policy.model.named_parameters()})
    for other, loss, gradient in zip(rewards[1:], losses[1:], gradients[1:]):
        assert torch.equal(other, rewards[0]) and torch.allclose(loss, losses[0], atol=1e-4)
        assert all((gradient[n] - gradients[0][n]).abs().max() < 1e-6 for n in gradient)
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-3


def test_kl_holds_the_policy_to_the_base(folder, base, tmp_path):
    """With a large weight the policy stays where the base is; each row then costs a second FP, whose tokens count too."""
    free = run(folder, base, tmp_path / "free", "--lr", "0.01")
    held = run(folder, base, tmp_path / "held", "--lr", "0.01", "--kl_weight", "100")
    assert held["kl_to_base"] < free["kl_to_base"] / 3 and held["fp"] == 2 * free["fp"]
    assert free["tokens"] < held["tokens"] < 2 * free["tokens"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("name, at", [("refresh", 6), ("refresh", 10), ("mixed", 10), ("online", 5), ("masked", 9)])
def test_resume_equals_uninterrupted(folder, base, tmp_path, name, at):
    """Stopped anywhere and resumed: weights, metrics and samples are those of the run that was not stopped, bit for bit
    (seconds aside). The stop comes between two saves, so the logs hold lines that the resumed run writes again."""
    run(folder, base, tmp_path / "whole", *SETTINGS[name])

    calls = [0]

    def bomb(hypotheses, references, sources):
        calls[0] += 1
        if calls[0] == bomb.at:
            raise Stop
        return load_reward("rouge")(hypotheses, references, sources)

    given = train.parse_args(["--mode", "train", *TINY, *SETTINGS[name], "--data", folder, "--init", base,
                              "--out", str(tmp_path / "cut")])
    cfg, device = train.make_config(given), torch.device("cpu")
    bomb.at = at  # the call of the reward at which the run dies
    dataset, policy = data.load_dataset(folder), train.load_policy(base, device)
    train.claim(str(tmp_path / "cut"), cfg, data.data_hash(dataset))
    with pytest.raises(Stop):
        train.start(cfg, str(tmp_path / "cut"), policy, dataset, bomb, name, train.load_policy(base, device).model.eval())
    assert len(metrics(tmp_path / "cut")) < 7
    train.write_json(given, str(tmp_path / "cut" / "command.json"))
    train.main(["--mode", "train", "--resume", str(tmp_path / "cut")])

    for file in ("ckpt.pt", "best.pt"):
        assert same(weights(tmp_path / "whole" / file), weights(tmp_path / "cut" / file))
    def timeless(out):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(out)]
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")
    assert (tmp_path / "whole/samples.txt").read_text() == (tmp_path / "cut/samples.txt").read_text()


def test_a_save_that_is_killed_leaves_the_old_file(tmp_path):
    """kill -9 in the middle of writing: the checkpoint is still the one before, and loads."""
    path = str(tmp_path / "ckpt.pt")
    train.save({"step": 1}, path)
    code = ("import os, signal, train\n"
            "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"  # written, and not yet in its place
            f"train.save({{'weights': [0.0] * 100000}}, {path!r})")
    killed = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(train.__file__), capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.mark.slow
@pytest.mark.parametrize("delay, kind", [(0.0, signal.SIGINT), (0.5, signal.SIGINT), (0.3, signal.SIGKILL)])
def test_a_stopped_process_goes_on(folder, base, tmp_path, delay, kind):
    """Ctrl-C saves, says how to go on and exits 130; kill -9 loses at most what came after the last save."""
    flags = [*TINY, "--data", folder, "--init", base]
    flags[flags.index("--steps") + 1] = "400"
    command = [sys.executable, "train.py", "--mode", "train", *flags, "--out"]
    root = os.path.dirname(train.__file__)
    subprocess.run([*command, str(tmp_path / "whole")], cwd=root, check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "cut")], cwd=root, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)
    while not os.path.exists(tmp_path / "cut/ckpt.pt") and process.poll() is None:
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(kind)
    _, message = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -kind), message
    assert kind == signal.SIGKILL or "goes on" in message
    subprocess.run([sys.executable, "train.py", "--mode", "train", "--resume", str(tmp_path / "cut")], cwd=root,
                   check=True, capture_output=True)
    assert same(weights(tmp_path / "whole/ckpt.pt"), weights(tmp_path / "cut/ckpt.pt"))
    assert [line["step"] for line in metrics(tmp_path / "cut")] == list(range(401))


# --- modes -----------------------------------------------------------------------------------------------------------

def test_eval_sample_and_candidates(folder, base, tmp_path, capsys):
    train.main(["--mode", "eval", "--init", base, "--data", folder, "--beam", "2", "--out", str(tmp_path / "eval")])
    assert "bleu" in capsys.readouterr().out
    r = data.load_dataset(folder)["test"][0]
    train.main(["--mode", "sample", "--init", base, "--source", r.source, "--reference", r.references[0],
                "--static_text", r.static[0]])
    out = capsys.readouterr().out
    assert all(word in out for word in ("source", "static", "[MASK]", "fill", " R ", " A ", "greedy"))
    new = str(tmp_path / "candidates")
    train.main(["--mode", "candidates", "--init", base, "--data", folder, "--num", "3", "--out_data", new])
    record = data.load_dataset(new)["train"][0]
    scores = load_reward("rouge")(record.static, [record.references] * 3, [record.source] * 3)
    assert len(record.static) == 3 and list(scores) == sorted(scores, reverse=True)
    assert record.target == data.load_dataset(folder)["train"][0].target


def test_best_and_worst_follow_the_reward(folder):
    dataset = data.load_dataset(folder)
    reward = load_reward("rouge")
    r = dataset["train"][0]
    scores = dict(zip(r.static, reward(r.static, [r.references] * 3, [r.source] * 3)))
    for static, expected in (("best", max(scores.values())), ("worst", min(scores.values()))):
        batches = train.Batches(train.Config(static=static), dataset["train"], None, reward)
        assert scores[train.pick_static(batches.cfg, r, batches.ranking([0])[0], 0.5)[0]] == expected
    assert train.pick_static(train.Config(num_static=2), r, None, 0.9) == r.static[:2]
    assert train.pick_static(train.Config(static="random"), r, None, 0.99) == r.static[2:]


def test_compare_continues_reprints_and_refuses(folder, tmp_path, capsys):
    """All settings; run again it reprints without training; with other flags it exits 2 and changes nothing."""
    flags = [*TINY, "--data", folder, "--out", str(tmp_path)]
    flags[flags.index("--steps") + 1] = "2"
    train.main(flags)
    first = capsys.readouterr().out
    rows = json.load(open(tmp_path / "results.json"))
    assert [row["name"] for row in rows] == ["base", *train.USUAL] and os.path.exists(tmp_path / "compare.png")
    assert rows[0]["setting"] == "base" and rows[0]["p_m"] is None and set(rows[0]) == set(train.ROW)
    stamp = os.path.getmtime(tmp_path / "masked/ckpt.pt")
    train.main(flags)
    assert capsys.readouterr().out.split("name ")[1] == first.split("name ")[1]
    os.remove(tmp_path / "results.json")  # an interrupted comparison: finished runs are not trained again
    train.main(flags)
    assert os.path.getmtime(tmp_path / "masked/ckpt.pt") == stamp
    assert "another config (seed" in refused(capsys, *flags, "--seed", "1")
    assert "another config (mode" in refused(capsys, *flags, "--mode", "train")  # a run would overwrite its results
    assert len(json.load(open(tmp_path / "results.json"))) == 8
    (tmp_path / "results.json").write_text('{"a": 1}')
    assert "expected the rows" in refused(capsys, *flags)


def test_compare_with_seeds(folder, tmp_path, capsys):
    """Each seed has a base and a folder of its own, and what a flag cannot mean for a setting is left out there."""
    flags = [*TINY, "--data", folder, "--out", str(tmp_path), "--seeds", "0", "1", "--refresh", "2", "--num_static", "2"]
    flags[flags.index("--steps") + 1] = "2"
    train.main(flags)
    rows = json.load(open(tmp_path / "results.json"))
    assert [row["seed"] for row in rows] == [0] * 8 + [1] * 8 and os.path.exists(tmp_path / "seed1/online/best.pt")
    assert [row["refresh"] for row in rows[:8]] == [None, None, None, None, 0, 0, 0, 2]
    assert not same(weights(tmp_path / "seed0/base/best.pt"), weights(tmp_path / "seed1/base/best.pt"))
    stamp, flags = os.path.getmtime(tmp_path / "seed1/online/ckpt.pt"), [*flags, "--settings", "mle", "online"]
    flags.insert(flags.index("1", flags.index("--seeds")) + 1, "2")
    train.main(flags)  # a seed more
    assert {row["seed"] for row in json.load(open(tmp_path / "results.json"))} == {0, 1, 2}
    assert os.path.getmtime(tmp_path / "seed1/online/ckpt.pt") == stamp
    at = flags.index("--seeds")
    assert "holds a comparison with --seeds" in refused(capsys, *flags[:at], *flags[at + 4:])


def test_a_stop_during_the_base_can_be_resumed(folder, tmp_path, monkeypatch):
    """The command is on disk before the base is trained; --resume alone then does the rest."""
    (tmp_path / "stops.py").write_text("calls = [0]\ndef score(hypotheses, references, sources):\n    calls[0] += 1\n"
                                       "    if calls[0] == 3:\n        raise KeyboardInterrupt\n"
                                       "    return [0.5] * len(hypotheses)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="130"):
        train.main(["--mode", "train", *TINY, "--data", folder, "--out", "run", "--reward", "stops:score"])
    assert os.path.exists("run/base/ckpt.pt") and not os.path.exists("run/ckpt.pt")
    train.main(["--resume", "run"])
    assert [line["step"] for line in metrics("run")] == list(range(7))


@pytest.mark.skipif(sys.platform != "linux", reason="limits a file's size with Linux's ulimit, in place of a full disk")
def test_a_full_disk_loses_nothing(folder, base, tmp_path):
    """Writing fails half-way through a checkpoint: one line, exit 2, the old state is there, and the run can be finished."""
    out = tmp_path / "run"
    flags = ["--mode", "train", *TINY, "--data", folder, "--init", base, "--out", str(out)]
    limited = subprocess.run(["bash", "-c", "trap '' XFSZ; ulimit -f 100; exec \"$0\" train.py \"$@\"", sys.executable, *flags],
                             capture_output=True, text=True, cwd=os.path.dirname(train.__file__))
    assert limited.returncode == 2 and "ckpt.pt: cannot be written" in limited.stderr
    assert limited.stderr.count("\n") == 1 and not list(out.glob("*.tmp"))
    row = run(folder, base, out)
    assert row["steps"] == 6


def test_a_place_that_cannot_be_written(capsys, folder, base):
    err = refused(capsys, "--mode", "train", *TINY, "--data", folder, "--init", base, "--out", "/proc/nowhere")
    assert "/proc/nowhere: cannot be written" in err


def test_two_runs_at_once_are_refused(folder, base, tmp_path, capsys):
    """While another process holds the folder; once it has gone, the command runs."""
    fcntl = pytest.importorskip("fcntl")
    flags = ["--mode", "train", *TINY, "--data", folder, "--init", base, "--out", str(tmp_path / "o")]
    os.makedirs(tmp_path / "o")
    with open(tmp_path / "o/.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is at work there" in refused(capsys, *flags)
        assert os.listdir(tmp_path / "o") == [".lock"]
    train.main(flags)
    assert os.path.exists(tmp_path / "o/results.json") and not train.LOCKS


def test_a_run_keeps_out_of_what_is_not_its_own(folder, base, tmp_path, capsys):
    """Another checkpoint to start from is another run; a folder with a data set or foreign files is no run at all."""
    run(folder, base, tmp_path / "run")
    other = str(tmp_path / "other.pt")
    torch.save(torch.load(base, weights_only=True), other)
    assert "another config (init" in refused(capsys, "--mode", "train", *TINY, "--data", folder, "--init", other, "--out",
                                             str(tmp_path / "run"))
    assert "holds train.jsonl but no config" in refused(capsys, "--mode", "train", *TINY, "--data", folder, "--out", folder)
    assert "p_m 0.2, not 0.9" in refused(capsys, "--resume", str(tmp_path / "run"), "--p_m", "0.9")


# --- bad input: one line, exit 2, nothing overwritten ------------------------------------------------------------------

def refused(capsys, *flags):
    with pytest.raises(SystemExit) as e:
        train.main([*flags])
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("flags, expected", [
    (["--bath_size", "3"], "the nearest is --batch_size"),
    (["--batch_size", "many"], "--batch_size"),
    (["--setting", "of-line"], "the nearest is offline"),
    (["--p_m", "1.5"], "--p_m 1.5: expected a probability"),
    (["--p_m", "nan"], "--p_m nan"),
    (["--K", "0"], "--K 0: expected at least 1"),
    (["--reward", "roge"], "roge"),
    (["--data", "no/such/folder"], "no such folder"),
    (["--mode", "eval", "--init", "no/such.pt"], "no such checkpoint"),
    (["--mode", "eval"], "expected --init"),
    (["--mode", "sample", "--init", "BASE"], "expected --source"),
    (["--mode", "train", "--resume", "nowhere"], "no run of --mode train there"),
    (["--out", "/proc/nowhere"], "cannot be written"),
    (["--n_embd", "30", "--n_head", "4"], "a multiple of n_head"),
    (["--mode", "train", "--setting", "online", "--refresh", "3"], "--refresh 3"),
    (["--tokenizer", "gpt7"], "tokenizer gpt7"),
    (["--n_head", "0"], "--n_head 0: expected at least 1"),
    (["--mode", "train", "--mle_weight", "0", "--rl_weight", "0"], "--rl_weight 0.0: expected above 0"),
    (["--seed", "99999999999999999999"], "--seed"),
    (["--max_len", "200", "--block_size", "160"], "--max_len 200: expected less than"),
    (["--mode", "train", "--K", "1"], "--K 1: expected at least 2"),
    (["--setting", "online"], "--setting: compare runs every setting"),
    (["--init", "BASE"], "--init: compare runs"),
])
def test_bad_flags(capsys, base, tmp_path, flags, expected):
    flags = [base if flag == "BASE" else flag for flag in flags]
    if "--out" not in flags:
        flags = [*flags, "--out", str(tmp_path / "out")]
    assert expected in refused(capsys, *flags)


def test_num_stored_beside_other_flags():
    """What the preset keeps gives way to fewer texts, and to no refresh; what was typed is checked."""
    for given, expected in ((dict(), 4), (dict(num_static=4), 3), (dict(num_static=1), 0), (dict(refresh=0), 0)):
        assert train.make_config(given | {"preset": "e2e"}, "refresh").num_stored == expected
    assert train.make_config({"num_stored": 2, "num_static": 4}).num_stored == 2  # compare's own, which names no setting
    with pytest.raises(data.InputError, match="num_stored 2: expected"):
        train.make_config({"num_stored": 2, "num_static": 2, "refresh": 4})


def test_the_preset_for_a_gpu_has_its_size():
    for name in train.SETTINGS:
        cfg = train.make_config({"preset": "gpu"}, name)
        with torch.device("meta"):
            model = train.GPT(train.GPTConfig(1000, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
        assert 25e6 < sum(p.numel() for p in model.parameters()) < 35e6 and cfg.block_size == 512 and cfg.batch_size >= 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda(capsys, tmp_path):
    assert "--device cuda" in refused(capsys, "--device", "cuda", "--out", str(tmp_path))


@pytest.mark.parametrize("line, expected", [
    ("{", "train.jsonl:2: expected one JSON object a line"),
    ("[1]", "train.jsonl:2: expected a JSON object"),
    ('{"references": ["a"]}', "train.jsonl:2: field 'source'"),
    ('{"source": "", "references": ["a"]}', "train.jsonl:2: field 'source'"),
    ('{"source": "a", "references": []}', "train.jsonl:2: field 'references'"),
    ('{"source": "a", "references": "b"}', "train.jsonl:2: field 'references'"),
    ('{"source": "a", "references": ["b"], "static": [3]}', "train.jsonl:2: field 'static'"),
    ('{"source": "a", "references": ["b"], "extra": 1}', "train.jsonl:2: unknown field 'extra'"),
    ('{"source": "\\ud800", "references": ["b"]}', "train.jsonl:2: expected text"),
    ('{"source": "a", "references": ["b"], "names": {"x": "\\ud800"}}', "train.jsonl:2: expected text"),
    ('{"source": ' + "9" * 5000 + "}", "train.jsonl:2: expected one JSON object"),
    ('\n{"source": "' + "".join(chr(0x4e00 + 7 * i) for i in range(90)) + '", "references": ["b"]}', "train.jsonl:3: source of"),
    ('{"source": "' + "word " * 400 + '", "references": ["b"]}', "train.jsonl:2: source of"),
])
def test_bad_records(capsys, tmp_path, line, expected):
    good = '{"source": "a", "references": ["b c d"]}'
    for split in data.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(good + "\n" + (line if split == "train" else good) + "\n")
    assert expected in refused(capsys, "--data", str(tmp_path), "--out", str(tmp_path / "out"))


def test_missing_empty_and_binary_files(capsys, tmp_path):
    flags = "--data", str(tmp_path), "--out", str(tmp_path / "out")
    assert "train.jsonl: no such file" in refused(capsys, *flags)
    (tmp_path / "train.jsonl").write_text("\n")
    assert "train.jsonl: empty" in refused(capsys, *flags)
    (tmp_path / "train.jsonl").write_bytes(b'{"source": "a", "references": ["b"]}\n' * 9 + b"\xff\xfe\x00")
    assert "train.jsonl:10: expected UTF-8" in refused(capsys, *flags)
    assert os.listdir(tmp_path) == ["train.jsonl"]  # nothing was written


def test_bad_checkpoints(capsys, folder, base, tmp_path):
    whole = open(base, "rb").read()
    cases = {"truncated": whole[:len(whole) // 2], "junk": b"not a checkpoint", "empty": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        assert name in refused(capsys, "--mode", "eval", "--init", str(tmp_path / name), "--data", folder)
    state = torch.load(base, weights_only=True)
    torch.save(state | {"gpt": state["gpt"] | {"n_embd": 32}}, tmp_path / "shape.pt")
    assert "another shape" in refused(capsys, "--mode", "eval", "--init", str(tmp_path / "shape.pt"), "--data", folder)
    other = data.tokenizer.Tokenizer.train(["some other text"], 262)
    torch.save(state | {"tokenizer": other.ranks}, tmp_path / "vocabulary.pt")
    assert "vocabulary" in refused(capsys, "--mode", "eval", "--init", str(tmp_path / "vocabulary.pt"), "--data", folder)
    assert "another shape" in refused(capsys, "--mode", "train", "--init", base, "--n_layer", "3", "--data", folder,
                                      "--out", str(tmp_path / "out"))


@pytest.mark.parametrize("body, expected", [("return [0.5]", "expected"), ("return [float('nan')] * len(hypotheses)", "nan"),
                                            ("return [2.0] * len(hypotheses)", "0..1")])
def test_bad_rewards(capsys, folder, base, tmp_path, monkeypatch, body, expected):
    (tmp_path / "own_reward.py").write_text(f"def score(hypotheses, references, sources):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_reward", None)
    message = refused(capsys, "--mode", "eval", "--init", base, "--data", folder, "--reward", "own_reward:score",
                      "--out", str(tmp_path / "out"))
    assert "own_reward:score" in message and expected in message


def test_an_error_inside_a_reward_keeps_its_traceback(folder, base, tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("def score(hypotheses, references, sources):\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        train.main(["--mode", "eval", "--init", base, "--data", folder, "--reward", "broken_reward:score"])


def test_lone_references_are_noted(capsys, base):
    dataset = {"train": [data.Record("a", ["b c"])] * 3 + [data.Record("a", ["b", "c"])]}
    train.note_data(dataset, train.load_policy(base, torch.device("cpu")))
    assert "note: 3 records have one reference" in capsys.readouterr().out


def test_long_targets_are_cut_and_counted(capsys, folder, tmp_path):
    train.main(["--mode", "train", "--setting", "mle", *TINY, "--steps", "1", "--max_len", "8", "--data", folder,
                "--out", str(tmp_path)])
    assert "targets are longer than 8 tokens and are cut" in capsys.readouterr().out


def test_evaluation_disturbs_nothing(folder, base, tmp_path):
    """Evaluating after every update or never: the same weights, the same counts."""
    often = run(folder, base, tmp_path / "often", "--eval_every", "1")
    never = run(folder, base, tmp_path / "never", "--eval_every", "99")
    assert same(weights(tmp_path / "often/ckpt.pt"), weights(tmp_path / "never/ckpt.pt"))
    assert all(often[name] == never[name] for name in ("fp", "fp_grad", "fp_mle", "tokens"))


def test_budget_stops_a_run(folder, base, tmp_path):
    row = run(folder, base, tmp_path / "run", "--budget_fp", "13", "--steps", "50")
    assert row["fp"] == 16 and row["steps"] == 4  # 4 sources an update: the fourth crosses 13


def test_rate_warms_up_and_falls():
    cfg = train.Config(lr=1.0, warmup=0.2)
    rates = [train.rate(cfg, x) for x in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates[0] < 0.01 and rates[1] == pytest.approx(0.5, abs=0.01) and rates[2] == pytest.approx(1.0)
    assert rates[3] == pytest.approx(0.5) and rates[4] == 0


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; on the CPU only what surrounds the graph is tried"))])
def test_captured_decoding(base, monkeypatch, device):
    """The same texts and counts as `generate`, for every width of the sources, with and without static texts, with the weights of
    the moment; one graph for a shape, for a model, for a temperature. On a CPU the captured work is simply done again."""
    captured, results = [], []
    if device == "cpu":
        monkeypatch.setattr(train, "capture", lambda work, pool: (out := work(), lambda: out.copy_(work())))
    monkeypatch.setattr(train, "capture", lambda *args, usual=train.capture: captured.append(1) or usual(*args))
    decode, g = train.Captured(torch.cuda.graph_pool_handle() if device == "cuda" else None), torch.Generator().manual_seed(0)
    policy, other = (train.load_policy(base, torch.device(device)) for _ in range(2))
    other.model.wte.weight.data *= 2
    longest = policy.model.config.block_size - 10  # with texts of 11 tokens, the last of which is never pushed
    both = {name: 0 for name in ("static", "mask")}
    for width, who, given, graphs in (
            (9, policy, {}, 1), (16, policy, {}, 1), (12, policy, {}, 1), (17, policy, {}, 2), (5, policy, {}, 2), (5, other, {}, 3),
            (longest - 1, policy, {}, 4), (longest, policy, {}, 4), (9, policy, dict(temperature=2.0), 5), (9, policy, both, 6), (9, policy, both, 6)):
        src = torch.randint(0, policy.tok.pad, (4, width), generator=g).to(device)
        pad, u = torch.randint(0, 5, (4,), generator=g).to(device), torch.rand(4, 3, 11, generator=g).to(device)
        src = src.masked_fill(torch.arange(width, device=device) < pad[:, None], policy.tok.pad)
        if given is both:
            given = dict(static=torch.randint(0, policy.tok.pad, (4, 11), generator=g).to(device), mask=(torch.rand(4, 11, generator=g) < 0.5).to(device))
        model = who.model.eval()
        with torch.no_grad():
            model.wte.weight.mul_(1.1)  # a step of training
        model.pushed.zero_()
        with train.autocast(policy.device):
            expected, counted = train.generate(model, src, pad, 11, u, **given), model.pushed.clone()
            model.pushed.zero_()
            results.append((decode(model, src, pad, 11, u, **given), expected))
        assert device != "cpu" or torch.equal(model.pushed, counted)
        assert len(captured) == graphs
    for got, expected in results:  # also after later calls
        assert (got == expected).float().mean() >= (1 if device == "cpu" else 0.95)  # bfloat16 rounds by the batch


@pytest.mark.parametrize("setting", [("--setting", "semi"), ("--setting", "online"), ("--setting", "mle")])
def test_weights_that_are_no_numbers_any_more_end_a_run_with_one_line(folder, base, tmp_path, capsys, setting):
    assert "the loss is not finite" in refused(capsys, "--mode", "train", *TINY, *setting, "--data", folder, "--init", base, "--lr", "1e30",
                                               "--out", str(tmp_path / "out"))


def test_no_batch_is_made_behind_the_last_update(folder, base, tmp_path, monkeypatch):
    """A reward that would fail on the next batch's static texts does not reach into a finished run."""
    (tmp_path / "picky.py").write_text("calls = []\ndef f(hypotheses, references, sources):\n    calls.append(list(sources))\n"
                                       "    return [0.5] * len(hypotheses)\n")
    monkeypatch.chdir(tmp_path)
    run(folder, base, tmp_path / "out", "--setting", "semi", "--static", "best", "--steps", "2", "--reward", "picky:f")
    cfg = train.make_config({"data": folder, "batch_size": 4, "steps": 2, "static": "best"}, "masked")
    records = data.load_dataset(folder)["train"]
    ranked = [source for call in sys.modules["picky"].calls for source in call if source in {r.source for r in records}]
    third = {records[i].source for i in train.batch_indices(len(records), 4, cfg.seed, 2)}
    assert ranked and not third & set(ranked)


@pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="torch.compile needs a "
                    "C++ compiler on CPU")
def test_a_compiled_model_learns_the_same(folder, base, tmp_path):
    """--compile changes the time, not what is drawn or learned (to rounding)."""
    plain = run(folder, base, tmp_path / "plain", "--steps", "2")
    compiled = run(folder, base, tmp_path / "compiled", "--steps", "2", "--compile")
    assert plain["fp"] == compiled["fp"] and plain["tokens"] == compiled["tokens"]
    a, b = (weights(tmp_path / name / "ckpt.pt") for name in ("plain", "compiled"))
    assert a.keys() == b.keys() and all((a[name] - b[name]).abs().max() < 1e-3 for name in a)
