"""What people type: flags, bad input, rewards of their own, comparisons and sweeps, eval, sample,
candidates, and odd places to run in."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import train
import torch

import data
from data.rewards import load_reward
from lab import sample, settings, task
from model import GPT, GPTConfig
from runs import (ROOT, TINY, base, command, files, flags_of, folder, merge,  # noqa: F401
                  metrics, read_rows, refused, run, same, short_records, state, train_only, weights)


no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def config(*words) -> train.Config:
    return train.make_config(train.parse_args(list(words), train.Config), "masked")


def dataset(path, records, **flags) -> str:
    """A folder of data with these records in every split, and perhaps a flags.json."""
    os.makedirs(path, exist_ok=True)
    for split in data.SPLITS:
        data.save_records(records, f"{path}/{split}.jsonl")
    if flags:
        (path / "flags.json").write_text(json.dumps(flags["flags"]), encoding="utf-8")
    return str(path)


# --------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("flags, expected", [
    ("--bath_size 3", "unknown flag '--bath_size'; the nearest is --batch_size"),
    ("--steps 3 --steps 4", "--steps: given twice"),
    ("--seed 1 --seeds 1 2", "--seed: given beside --seeds; expected one of them"),
    ("--device gpu", "--device gpu: expected one of auto, cpu, cuda, mps"),
    ("--settings of-line", "--settings of-line: expected one of mle, offline"),
    ("--adv_scale maybe", "--adv_scale maybe: expected one of none, source, batch"),
    ("--anew maybe", "--anew maybe: expected true or false"),
    ("--p_m nan", "--p_m nan: expected a number, 0 to 1"),
    ("--lr inf", "--lr inf: expected a number, 0 or more"),
    ("--K 1", "--K 1: expected at least 2"),
    ("--K 10000000000000000000000", "expected a whole number, 1 to 1000000"),
    ("--block_size 100000000000", "expected a whole number, 0 to 1000000"),
    ("--seed 9223372036854775808", "a whole number, 0 to 9223372036854775807"),
    ("--n_embd 30", "--n_embd 30: expected a multiple of 4"),
    ("--max_len 64 --block_size 64", "--max_len 64: expected less than block_size"),
    ("--settings offline --num_static 1", "--num_static 1: expected at least 2"),
    ("--settings refresh --refresh 0", "--refresh 0: expected at least 1 for refresh"),
    ("--settings tail --refresh 3 --reuse 2", "--refresh 3: expected a multiple of reuse = 2"),
    ("--settings masked --p_m 0", "--p_m 0.0: expected above 0, or nothing is learned"),
    ("--reward roge", "did you mean 'rouge'"),
    ("--data no/such/folder", "no such folder"),
    pytest.param("--device cuda", "--device cuda: this machine has none", marks=no_cuda),
    ("--mode eval --init no/such.pt", "no/such.pt: cannot be read (No such file"),
    ("--mode candidates --init BASE", "expected --out"),
    ("--mode sample --init BASE --temperature 0", "--temperature 0: expected a number, 0.001"),
])
def test_bad_flags_are_one_line(capsys, base, folder, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    words = [base if word == "BASE" else word for word in flags.split()]
    if "--data" not in words:
        words += ["--data", folder]
    assert expected in refused(capsys, *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags", [
    "--source text", "--mode eval --init BASE --p_m 0.3", "--mode eval --init BASE --quick",
    "--mode sample --init BASE --out x", "--mode candidates --init BASE --out x --p_m 0.2",
    "--settings mle --mle_weight 0.5", "--settings mle --budget_fp 9", "--settings mle --reuse 2",
    "--settings mle --kl_weight 1", "--settings mle offline --K 4", "--settings offline --top_k 4",
    "--settings online --p_m 0.5", "--settings online --stored best", "--settings tail --credit 1",
    "--settings masked --refresh 4", "--settings masked --reuse 2", "--settings refresh --reuse 2",
    "--init BASE --base_steps 9", "--init BASE --n_layer 3", "--init BASE --vary vocab_size 300",
    "--settings masked --vary refresh 1 2", "--settings refresh online --vary refresh 2 4",
    "--vary seed 1 2", "--vary data a b", "--vary K", "--vary nothing 1", "--vary K 1.5",
])
def test_a_flag_without_effect_is_refused(capsys, base, folder, tmp_path, monkeypatch, flags):
    """By the mode, the setting, or all settings of the comparison; the message names the flag."""
    monkeypatch.chdir(tmp_path)
    words = [base if word == "BASE" else word for word in flags.split()]
    line = refused(capsys, *words, "--data", folder)
    assert line.split()[1].rstrip(":") in words
    assert os.listdir(tmp_path) == []


def test_flags_in_order_lowest_first(tmp_path):
    """Defaults, what the data set recommends for all and for one setting, the command line, and
    what defines a setting."""
    path = dataset(tmp_path / "d", short_records(3), flags={
        "": {"lr": 1, "p_m": 0.5, "K": 5},
        "masked": {"K": 6, "refresh": 3},
        "offline": {"p_m": 0.7}})

    def values(name, *words):
        given = train.parse_args(["--data", path, *words], train.Config)
        cfg = train.make_config(given, name)
        return cfg.lr, cfg.p_m, cfg.K, cfg.refresh
    assert values("masked") == (1.0, 0.5, 6, 0)
    assert values("full") == (1.0, 0.5, 5, 0) and values("static")[2] == 6  # like masked
    assert values("masked", "--K", "7", "--p_m", "0.1") == (1.0, 0.1, 7, 0)
    assert values("offline")[1] == 0
    assert values("refresh")[3] == settings.DEFAULTS["refresh"]["refresh"]


@pytest.mark.parametrize("flags, expected", [
    ({"": {"learning_rate": 1}}, "'learning_rate' is no flag that data may choose"),
    ({"": {"out": "/tmp"}}, "'out' is no flag that data may choose"),
    ({"": {"seed": 1}}, "'seed' is no flag"),
    ({"": {"lr": "fast"}}, "flags.json: --lr fast: expected a number"),
    ({"": {"K": 2.5}}, "flags.json: --K 2.5: expected a whole number"),
    ({"": {"K": True}}, "--K True: expected a whole"),
    ({"": {"stored": "good"}}, "--stored good: expected one of data, best"),
    ({"": {"reward": "os:system"}}, "reward: expected built-in ones"),
    ({"nocredit": {}}, "expected one of mle"), ({"masked": [1]}, "flags.json: expected {setting"),
    ({"masked": {"base_lr": 0.1}}, "'base_lr' is no flag that data may choose for one"),
    ([1], "flags.json: expected"), ({"preset": "gpu"}, "flags.json: expected"),
])
def test_what_data_may_not_choose(capsys, tmp_path, flags, expected):
    path = dataset(tmp_path / "d", short_records(3), flags=flags)
    line = refused(capsys, *TINY, "--data", path, "--out", str(tmp_path / "out"))
    assert expected in line and not (tmp_path / "out").exists()


def test_every_flag_is_known(capsys):
    """To -h; and the tuned flags in the house pass the check that those of a folder have to."""
    with pytest.raises(SystemExit) as e:
        train.main(["-h"])
    out = capsys.readouterr().out
    assert not e.value.code and all(f"--{name} " in out for name in settings.flags_of(train.Config))
    for setting in train.SETTINGS:
        assert train.make_config({"data": "forecast", "quick": True}, setting).setting == setting


# --------------------------------------------------------------------------------------------------
# Rewards of the user


@pytest.mark.parametrize("name, body", [
    ("ConnectionError", "raise ConnectionError('no server')"),
    ("BrokenPipeError", "raise BrokenPipeError('gone')"),
    ("SystemExit", "sys.exit(0)"),
    ("InputError", "raise data.InputError('theirs')"),
])
def test_an_error_inside_a_reward_keeps_its_traceback(capsys, folder, base, tmp_path, monkeypatch,
                                                      name, body):
    """Whatever its type, with exit code 1."""
    module = f"raises_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(
        f"import sys\nimport data\ndef f(hypotheses, references, sources):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train.main(command(folder, base, "out", "--reward", f"{module}:f"))
    err = capsys.readouterr().err
    assert e.value.code == 1 and "Traceback" in err and f"{module}.py\", line 4" in err
    assert name in err.splitlines()[-1]


# --------------------------------------------------------------------------------------------------
# Comparisons and sweeps


def test_a_comparison_is_reprinted_and_grows(folder, tmp_path, capsys, monkeypatch):
    """What is there trains nothing again; the table keeps the settings that were there."""
    words = merge(*TINY, "--data", folder, "--steps", "2", "--out", str(tmp_path))
    train.main(words)
    first = capsys.readouterr().out
    rows = read_rows(tmp_path)
    assert [row["name"] for row in rows] == ["base", *train.SETTINGS]
    assert {"report.txt", "outputs.txt", "compare.png"} <= set(os.listdir(tmp_path))
    before = files(tmp_path / "tail")
    assert state(tmp_path / "tail/ckpt.pt")["optimizer"] is None  # a finished run is small
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", None)
        patch.setattr(train.evaluate, "test_policy", None)
        train.main(words)
    assert capsys.readouterr().out.split("setting ")[1] == first.split("setting ")[1]
    shutil.rmtree(tmp_path / "online")
    train_only([*words, "--settings", "online", "tail"])
    again = read_rows(tmp_path)
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert files(tmp_path / "tail") == before
    (tmp_path / "tail/results.json").write_text('{"a": 1}')
    assert "tail/results.json: expected" in refused(capsys, *words)


def test_seeds_differ_and_one_more_can_be_added(folder, tmp_path):
    words = merge(*TINY, "--data", folder, "--steps", "1", "--out", str(tmp_path),
                  "--settings", "mle", "masked")
    train_only([*words, "--seeds", "0", "1"])
    before = files(tmp_path / "seed1")
    train_only([*words, "--seeds", "0", "1", "2"])
    assert [(row["name"], row["seed"]) for row in read_rows(tmp_path)] == [
        (name, seed) for seed in range(3) for name in ("base", "mle", "masked")]
    assert files(tmp_path / "seed1") == before
    assert not same(*(weights(tmp_path / f"seed{seed}/base/best.pt") for seed in range(2)))


def test_vary_shares_bases_and_grows(folder, base, tmp_path, capsys):
    """Rows differ in one flag and name it; values, settings and flags can be added later."""
    words = command(folder, base, tmp_path, "--steps", "1")
    train.main([*words, "--vary", "K", "3", "4"])
    assert "vary-K.txt" in os.listdir(tmp_path) and "4" in capsys.readouterr().out
    before = files(tmp_path / "seed0/masked-K_4")
    train_only(merge(*words, "--settings", "masked", "online", "--vary", "K", "4", "5"))
    assert [(r["name"], r["flag"], r["value"], r["K"]) for r in read_rows(tmp_path, "vary-K.json")
            ] == [(name, "K", str(K), K) for name in ("online", "masked") for K in (4, 5)]
    assert files(tmp_path / "seed0/masked-K_4") == before
    train_only([*words, "--vary", "p_m", ".1", "0.3"])
    bases = [name for name in os.listdir(tmp_path / "seed0") if name.startswith("base")]
    assert bases == ["base"]
    assert [row["value"] for row in read_rows(tmp_path, "vary-p_m.json")] == [".1", "0.3"]


@pytest.mark.parametrize("flag, values, differs", [
    ("vocab_size", ("280", "300"), lambda state: len(state["tokenizer"])),
    ("block_size", ("56", "64"), lambda state: state["gpt"]["block_size"]),
    ("reward", ("rouge", "chrf"), lambda state: state["best"]),
])
def test_a_flag_of_the_base_gets_a_base_per_value(folder, tmp_path, flag, values, differs):
    """And the runs from it see that value, too."""
    train_only(merge(*TINY, "--data", folder, "--steps", "1", "--out", str(tmp_path),
                     "--settings", "mle", "--vary", flag, *values))
    for name in ("base", "mle"):
        states = [state(tmp_path / f"seed0/{name}-{flag}_{value}/ckpt.pt") for value in values]
        assert differs(states[0]) != differs(states[1])


@pytest.mark.parametrize("values", [("1e30", "1e-3"), ("1e-3", "1e30")])
@pytest.mark.parametrize("flag, name", [("lr", "masked"), ("base_lr", "base")])
def test_a_run_that_diverges_in_a_sweep_does_not_keep_the_others(folder, tmp_path, capsys, flag,
                                                                 name, values):
    """It is a row that says so, in either order, on a rerun, too; a base takes its runs along."""
    words = merge(*TINY, "--data", folder, "--settings", "masked", "--out", str(tmp_path),
                  "--vary", flag, *values)
    for _ in range(2):
        train_only(words)
        rows = {row["value"]: row for row in read_rows(tmp_path, f"vary-{flag}.json")}
        assert [*rows] == [*values] and not rows["1e-3"]["diverged"]
        assert rows["1e30"]["diverged"] and rows["1e30"]["test_reward"] is None
        line = f"{name}-{flag}_1e30: the loss is not finite at step 2; try a smaller --{flag}"
        assert capsys.readouterr().out.count(line) == 1


def test_all_mistakes_of_a_sweep_are_found_before_any_work(folder, tmp_path, capsys):
    """Sources that do not fit, or a reward that is none, at the last value."""
    words = [*TINY, "--data", folder, "--out", str(tmp_path / "out"), "--settings", "masked"]
    line = refused(capsys, *merge(*words, "--vary", "block_size", "64", "8"))
    assert "train.jsonl:5 'Rome hail 4', and 11 more: a source of more than" in line
    assert "rooge" in refused(capsys, *words, "--vary", "reward", "rouge", "rooge")
    assert "expected a whole number" in refused(capsys, *words, "--vary", "K", "4", "x")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# eval, sample, candidates


def test_eval_knows_its_data_and_reward_and_agrees_with_the_row(folder, base, tmp_path, capsys):
    row = run(folder, base, tmp_path / "run", "--lr", "0.05", "--steps", "30", "--settings", "mle",
              "--reward", "bleu")
    assert row["test_reward"] > 0
    init = f"{tmp_path}/run/mle/best.pt"
    capsys.readouterr()
    train.main(["--mode", "eval", "--init", init, "--out", f"{tmp_path}/e"])
    head, *lines, _ = capsys.readouterr().out.splitlines()
    assert f"data {folder}, reward bleu" in head
    figures = dict(line.split() for line in lines)
    assert set(figures) >= {"test_reward", "bleu", "rougeL", "sampled_reward", "entropy"}
    for name, value in figures.items():
        assert float(value) == pytest.approx(row[name], abs=1e-4)
    texts = [(tmp_path / where / "predictions.jsonl").read_text() for where in ("run/mle", "e")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 6
    train.main(["--mode", "eval", "--init", init, "--reward", "rouge"])
    assert "reward rouge" in capsys.readouterr().out


def test_eval_and_candidates_write_into_new_folders_alone(folder, base, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for mode in ("eval", "candidates"):
        for out in (tmp_path, tmp_path / "file", os.path.dirname(base)):
            line = refused(capsys, "--mode", mode, "--init", base, "--out", str(out))
            assert "expected a new folder" in line
        line = refused(capsys, "--mode", mode, "--init", base, "--out", "/proc/x")
        assert "cannot be made" in line
    train.main(["--mode", "eval", "--init", base])
    assert os.listdir(tmp_path) == ["file"]


def test_candidates_are_ranked_and_trained_on(folder, base, tmp_path, capsys, monkeypatch):
    """The same data, whose static texts are the policy's, best first, with the data's flags. A
    command that is stopped leaves nothing that stands in its way."""
    with_flags = shutil.copytree(folder, tmp_path / "d")
    (with_flags / "flags.json").write_text('{"": {"p_m": 0.4}}')
    new = str(tmp_path / "new")
    words = ["--mode", "candidates", "--init", base, "--data", str(with_flags), "--K", "3",
             "--temperature", "0.7", "--out", new]

    def stopped(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(sample, "best_first", stopped)
        train.main(words)
    assert e.value.code == 130 and os.listdir(new) == []
    train.main(words)
    assert "3 candidates per source" in capsys.readouterr().out
    before, after = data.load_dataset(folder), data.load_dataset(new)
    for old, r in zip(before["train"], after["train"], strict=True):
        assert (r.source, r.references, r.target) == (old.source, old.references, old.target)
        assert len(r.static) == 3
        scores = load_reward("rouge")(r.static, [r.references] * 3, [r.source] * 3)
        assert list(scores) == sorted(scores, reverse=True)
    assert config("--data", new).p_m == 0.4
    run(new, base, tmp_path / "run", *flags_of("offline"))


def test_sample_shows_the_method_on_one_source(folder, base, tmp_path, capsys, monkeypatch):
    """With the texts of the data if it has the source; else from the greedy text, unscored. An
    online run shows whole samples, which may be longer than the stored text."""
    def lines_of(name, source, *words):
        run(folder, base, tmp_path / name, "--settings", name)
        capsys.readouterr()
        train.main(["--mode", "sample", "--init", f"{tmp_path}/{name}/{name}/best.pt", "--source",
                    source, *words])
        return capsys.readouterr().out.splitlines()[1:]
    r = data.load_dataset(folder)["val"][2]
    source, static, fed, *samples, greedy = lines_of("masked", r.source, "--K", "5", "--p_m", "0.6")
    assert r.source in source and r.static[0] in static and "[MASK]" in fed
    assert greedy.startswith("greedy")
    assert 1 < len(samples) <= 5 and all(" R 0." in line and " A " in line for line in samples)
    assert "of 5)" in samples[0]
    *lines, _ = lines_of("masked", "Paris hail 99")
    assert "Paris hail 99" in lines[0] and " R 0." not in "".join(lines)
    assert "expected at most" in refused(capsys, "--mode", "sample", "--init", base, "--source",
                                         "word " * 99)
    logs, reinforce = [], train.reinforce
    monkeypatch.setattr(train, "reinforce", lambda run, *args, **more: logs.append(
        reinforce(run, *args, **more)) or logs[-1])
    lines_of("online", r.source)
    tok = task.load_policy(base, "cpu").tok
    assert (logs[-1][1]["rollout"].tokens != tok.pad).sum(2).max() > len(tok.encode(r.static[0])) + 1


def bad_checkpoints(whole: dict) -> dict:
    """Name -> (content, what the line about it says)."""
    gpt, flags, weights = whole["gpt"], whole["config"], whole["model"]
    nan = weights | {"wte.weight": weights["wte.weight"] * float("nan")}
    old = {name: value for name, value in flags.items() if name != "reuse"}
    none = "expected a checkpoint of train.py; this file is none"
    return {
        "text": (b"hello", none), "html": (b"<!DOCTYPE html><html>", none), "empty": (b"", none),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", none),
        "code": (torch.nn.Linear(2, 2), none),
        "list": ([1], "expected a checkpoint of train.py"),
        "part": ({"model": {}}, "expected a checkpoint of train.py"),
        "old": (whole | {"config": old}, "a checkpoint of an earlier edition"),
        "width": (whole | {"gpt": gpt | {"n_embd": 32}}, "weights and shape do not fit"),
        "heads": (whole | {"gpt": gpt | {"n_head": 3}}, "weights and shape do not fit"),
        "no heads": (whole | {"gpt": gpt | {"n_head": 0}}, "weights and shape do not fit"),
        "tokenizer": (whole | {"tokenizer": 5}, "do not fit (expected a tokenizer's"),
        "long": (whole | {"T": 64}, "its longest text T does not fit"),
        "words": (whole | {"T": "9"}, "its longest text T does not fit"),
        "nan": (whole | {"model": nan}, "some weights are not finite"),
        "K": (whole | {"config": flags | {"K": -3}}, "its config: --K -3: expected a whole"),
        "hot": (whole | {"config": flags | {"temperature": "hot"}}, "hot: expected a number"),
        "more": (whole | {"config": flags | {"more": 1}}, "its config: other flags than this"),
    }


NAMES = bad_checkpoints(dict(gpt={}, config={}, model={"wte.weight": torch.ones(1)}))


@pytest.mark.parametrize("name", NAMES)
def test_bad_checkpoints(capsys, folder, base, tmp_path, name):
    """One line that says what the file is not, in whatever command uses it."""
    content, expected = bad_checkpoints(state(base))[name]
    path = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    commands = [["--mode", "sample", "--init", str(path)], command(folder, str(path), tmp_path / "o")]
    for words in commands[:1] if name in ("K", "hot", "more") else commands:
        line = refused(capsys, *words)
        assert f"{path}: " in line and expected in line
    assert os.listdir(tmp_path) == ["bad.pt"]


def test_pretrained_weights_that_are_not_finite(monkeypatch):
    """The line does not advise a smaller rate, which could not help."""
    model = GPT(GPTConfig(300, 32, 1, 2, 8))
    torch.nn.init.constant_(model.ln_f.bias, float("nan"))
    tok = task.Tokenizer.train(["a"], 300)
    monkeypatch.setattr(task, "load_gpt2", lambda _: model)
    monkeypatch.setattr(task.Tokenizer, "load", lambda _: tok)
    model.config.vocab_size = tok.vocab_size
    with pytest.raises(data.InputError, match="--pretrained here: some weights are not finite"):
        task.load_pretrained("here")


# --------------------------------------------------------------------------------------------------
# What is said of the data


@pytest.mark.parametrize("copies", [1, 3])
def test_nothing_to_rank_is_noted_once(capsys, tmp_path, copies):
    """One static text per source, or copies of it: their ranking teaches nothing. Samples do."""
    records = [data.Record(r.source, r.references, static=r.references[:1] * copies)
               for r in short_records(12)]
    path = dataset(tmp_path / "d", records)
    words = merge(*TINY, "--data", path, "--steps", "1", "--credit", "0.5", "--num_static", "2",
                  "--out", str(tmp_path / "out"), "--settings", "offline", "masked")
    train_only([*words, "--seeds", "0", "1"])
    out = capsys.readouterr().out
    for name in ("offline", "masked"):
        assert out.count(f"note: {name}: no source has two different static texts") == 1
    assert metrics(tmp_path / "out/seed0/masked")[1]["rl_loss"] != 0


def test_equal_rewards_are_noted_once_they_last(folder, base, tmp_path, monkeypatch, capsys):
    """All samples of a group score the same, ten updates long: nothing is learned."""
    (tmp_path / "flat.py").write_text("def f(hypotheses, references, sources):\n"
                                      "    return [0.25] * len(hypotheses)\n")
    monkeypatch.chdir(tmp_path)
    for steps, times in (("9", 0), ("25", 1)):
        run(folder, base, f"out{steps}", "--reward", "flat:f", "--steps", steps)
        assert capsys.readouterr().out.count("have had equal rewards (mean 0.25)") == times
    lines = metrics("out9/masked")[1:]
    assert all(line["equal_rewards"] == 1 and line["rl_loss"] == 0 for line in lines)


def test_long_texts_are_cut_and_counted_once(capsys, folder, tmp_path):
    words = merge(*TINY, "--data", folder, "--steps", "1", "--max_len", "6", "--settings", "masked",
                  "--seeds", "0", "1", "--out", str(tmp_path / "out"))
    train_only(words)
    out = capsys.readouterr().out
    records = [r for split in data.load_dataset(folder).values() for r in split]
    tok = train.load_policy(f"{tmp_path}/out/seed0/base/best.pt", torch.device("cpu")).tok
    long = sum(len(tok.encode(text)) > 5 for r in records for text in {*r.target, *r.static})
    assert out.count(f"note: {long} targets and static texts are longer than 6 tokens") == 1


def test_a_reward_that_cannot_see_is_noted(capsys, base, tmp_path):
    records = [data.Record(f"北京 {i}", [f"北京 有 雨 {i}", "雨"]) for i in range(8)]
    path = dataset(tmp_path / "d", records)
    run(path, base, tmp_path / "out", "--steps", "1")
    assert "chrf reads every script" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Odd places. Each starts Python anew.


def python(*words, shell="", **env) -> subprocess.CompletedProcess:
    """python train.py words, in a shell line where $0 is Python and $@ the words."""
    start = [sys.executable, *words]
    if shell:
        start = ["bash", "-c", shell, *start]
    return subprocess.run(start, cwd=ROOT, capture_output=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def test_sorl_that_names_no_module_is_one_line():
    done = python("train.py", SORL="nomod")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"train.py: SORL=nomod: no such module")


@pytest.mark.slow
@pytest.mark.parametrize("shell", ['"$0" "$@" >&-', '"$0" "$@" >&- 2>&-', '"$0" -OO "$@"'])
def test_closed_streams_and_no_asserts(folder, base, tmp_path, shell):
    """Closed before the start, or Python without asserts and docstrings: a run as any other."""
    done = python("train.py", *command(folder, base, tmp_path / "out"), shell=shell)
    assert done.returncode == 0 and done.stderr == b""
    assert len(metrics(tmp_path / "out/masked")) == 7


@pytest.mark.slow
def test_ctrl_c_while_modules_are_imported_says_nothing():
    process = subprocess.Popen([sys.executable, "train.py", "-h"], cwd=ROOT, stderr=subprocess.PIPE)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_head(folder, base, tmp_path):
    words = command(folder, base, tmp_path / "out", "--steps", "300", "--eval_every", "300")
    done = python("train.py", *words, shell='set -o pipefail; "$0" -u "$@" | head -n 1')
    assert done.returncode in (1, 130) and b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr and done.stdout.count(b"\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}])
def test_other_scripts_in_an_ascii_locale(tmp_path, env):
    """Umlauts and Chinese in texts, names, folder and command line: what a console cannot show is
    a ?, and files are UTF-8."""
    records = [data.Record(f"Zürich {i}", [f"北京 wünscht Schnee {i}", f"Föhn in Zürich {i}"],
                           names={"Zürich": "Genève"}) for i in range(8)]
    path = dataset(tmp_path / "Dätä", records)
    out = str(tmp_path / "aus")
    done = python("train.py", *merge(*TINY, "--data", path, "--settings", "masked", "--steps", "1",
                                     "--out", out), **env)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert "Genève 3" in (tmp_path / "aus/outputs.txt").read_text(encoding="utf-8")
    done = python("train.py", "--mode", "sample", "--init", f"{out}/masked/best.pt", "--source",
                  "Zürich 3", **env)
    assert done.returncode == 0 and done.stderr == b"" and b" R 0." in done.stdout
    new = str(tmp_path / "neü")
    done = python("train.py", "--mode", "candidates", "--init", f"{out}/masked/best.pt", "--K", "2",
                  "--out", new, **env)
    assert done.returncode == 0 and data.load_dataset(new)["train"][3].source == "Zürich 3"
