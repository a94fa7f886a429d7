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
from lab import settings
from runs import (ROOT, TINY, base, command, files, flags_of, folder,  # noqa: F401
                  metrics, refused, run, same, short_records, state, weights)


def config(*words) -> train.Config:
    return train.make_config(train.parse_args(list(words), train.Config))


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
    ("--static best", "--static is called --stored now"),
    ("--static_credit 1", "--static_credit is called --credit now"),
    ("--micro_batches 2", "--micro_batches is called --accumulate now"),
    ("--batch_size many", "--batch_size many: expected a whole number, 1 or more"),
    ("--p_m high", "--p_m high: expected a number, 0 to 1"),
    ("--adv_scale maybe", "--adv_scale maybe: expected true or false"),
    ("--settings of-line", "the nearest is offline"),
    ("--settings nocredit", "--settings nocredit: expected mle, offline"),
    ("--p_m 1.5", "--p_m 1.5: expected a number, 0 to 1"),
    ("--p_m nan", "--p_m nan: expected a number, 0 to 1"),
    ("--lr inf", "--lr inf: expected a number, 0 or more"),
    ("--K 0", "--K 0: expected a whole number, 1 or more"),
    ("--K 1", "--K 1: expected at least 2"),
    ("--seed -1", "--seed -1: expected a whole number, 0 to 9223372036854775807"),
    ("--seed 9223372036854775808", "a whole number, 0 to 9223372036854775807"),
    ("--seeds 0 -3", "--seeds -3: expected a whole number, 0"),
    ("--n_embd 30", "--n_embd 30: expected a multiple of 4"),
    ("--max_len 64 --block_size 64", "--max_len 64: expected less than block_size"),
    ("--vocab_size 100", "--vocab_size 100: expected a whole number, 260 or more"),
    ("--settings credit --num_static 1", "--num_static 1: expected at least 2"),
    ("--settings refresh --refresh 0", "--refresh 0: expected at least 1 for refresh"),
    ("--settings masked --p_m 0", "--p_m 0.0: expected above 0, or nothing is learned"),
    ("--reward roge", "did you mean 'rouge'"),
    ("--data no/such/folder", "no such folder"),
    ("--mode eval --init no/such.pt", "no/such.pt: no checkpoint that can be read ([Errno 2]"),
    ("--mode eval", "expected --init"),
    ("--mode sample", "expected --init"),
    ("--mode candidates --init BASE", "expected --out"),
    ("--mode eval --init BASE --seed -1", "--seed -1: expected a whole number"),
    ("--mode sample --init BASE --K 0", "--K 0: expected a whole number"),
    ("--mode sample --init BASE --temperature 0", "--temperature 0: expected a number, 0.001"),
    ("--mode train --resume nowhere", "no run of --mode train there"),
    ("--mode train --init BASE --n_layer 3", "--n_layer: the setting masked, or a base"),
    ("--out /proc/nowhere", "cannot be written"),
])
def test_bad_flags_are_one_line(capsys, base, folder, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    words = [base if word == "BASE" else word for word in flags.split()]
    if "--data" not in words:
        words += ["--data", folder]
    assert expected in refused(capsys, *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags", [
    "--mode train --settings masked", "--mode train --seeds 0 1", "--mode train --vary K 2 3",
    "--setting masked", "--init BASE", "--resume out", "--source text",
    "--mode eval --init BASE --p_m 0.3", "--mode eval --init BASE --quick",
    "--mode sample --init BASE --out x", "--mode candidates --init BASE --out x --p_m 0.2",
    "--mode train --setting mle --mle_weight 0.5", "--mode train --setting mle --budget_fp 9",
    "--mode train --setting offline --K 4", "--mode train --setting offline --top_k 4",
    "--mode train --setting online --p_m 0.5", "--mode train --setting online --stored best",
    "--mode train --setting masked --refresh 4",
    "--mode train --setting refresh --credit 1",
    "--mode train --setting reuse --K 4", "--mode train --init BASE --base_steps 9",
    "--settings mle --kl_weight 1", "--settings mle offline --K 4", "--settings masked --refresh 2",
    "--settings masked --vary refresh 1 2", "--vary seed 1 2", "--vary data a b", "--vary K",
    "--vary nothing 1", "--vary K 1.5",
])
def test_a_flag_without_effect_is_refused(capsys, base, folder, tmp_path, monkeypatch, flags):
    """By the mode, the setting, or all settings of the comparison; the message names the flag."""
    monkeypatch.chdir(tmp_path)
    words = [base if word == "BASE" else word for word in flags.split()]
    line = refused(capsys, *words, "--data", folder)
    assert line.split()[1].rstrip(":") in words
    assert os.listdir(tmp_path) == []


def test_a_fixed_value_may_be_typed(folder, base, tmp_path):
    """What the setting says anyway is no mistake."""
    run(folder, base, tmp_path, "--setting", "online", "--p_m", "1", "--refresh", "0")


@pytest.mark.parametrize("flags, setting", [
    ("", "masked"), ("--p_m 0.4 --K 8", "masked"), ("--refresh 4", "refresh"),
    ("--refresh 4 --credit 0.5 --num_static 3", "credit"),
    ("--refresh 4 --p_m 0 --num_static 3", "reuse"),
])
def test_semi_is_the_setting_that_the_flags_describe(flags, setting):
    cfg = config("--mode", "train", "--setting", "semi", *flags.split())
    assert cfg.setting == setting
    assert (cfg.refresh > 0) == ("refresh" in flags) and (cfg.credit > 0) == (
        setting in ("credit", "reuse"))


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
    ({"": {"init": "x.pt"}}, "'init' is no flag"), ({"": {"seed": 1}}, "'seed' is no flag"),
    ({"": {"lr": "fast"}}, "flags.json: --lr fast: expected a number"),
    ({"": {"K": 2.5}}, "flags.json: --K 2.5: expected a whole number"), ({"": {"K": True}}, "--K True: expected a whole"),
    ({"": {"stored": "good"}}, "--stored good: expected data, best"),
    ({"": {"reward": "os:system"}}, "reward: expected built-in ones"),
    ({"": {"K": 0}}, "flags.json: --K 0: expected a whole number, 1 or more"),
    ({"nocredit": {}}, "expected one of mle"), ({"masked": [1]}, "flags.json: expected {setting"),
    ({"masked": {"base_lr": 0.1}}, "'base_lr' is no flag that data may choose for one"),
    ({"offline": {"reward": "bleu"}}, "'reward' is no flag that data may choose for one"),
    ([1], "flags.json: expected"), ({"preset": "gpu"}, "flags.json: expected"),
])
def test_what_data_may_not_choose(capsys, tmp_path, flags, expected):
    path = dataset(tmp_path / "d", short_records(3), flags=flags)
    line = refused(capsys, *TINY, "--data", path, "--out", str(tmp_path / "out"))
    assert expected in line and not (tmp_path / "out").exists()


def test_flags_of_every_data_set_are_known():
    """The tuned flags in the house pass the check that those of a folder have to pass."""
    for name in ("forecast", "forecast2"):
        for setting in train.SETTINGS:
            assert train.make_config({"data": name}, setting).setting == setting
            assert train.make_config({"data": name, "quick": True}, setting)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["-h"])
    out = capsys.readouterr().out
    names = settings.flags_of(train.Config)
    assert not e.value.code and all(f"--{name} " in out for name in names) and len(names) <= 46


# --------------------------------------------------------------------------------------------------
# Rewards of the user

ERRORS = {
    "ConnectionError": "raise ConnectionError('no server')",
    "BrokenPipeError": "raise BrokenPipeError('gone')",
    "FileNotFoundError": "open('no such file')",
    "SystemExit": "sys.exit(0)",
    "InputError": "raise data.InputError('theirs')",
    "ZeroDivisionError": "1 / 0",
    "OSError": "raise OSError(28, 'full')",
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_inside_a_reward_keeps_its_traceback(capsys, folder, base, tmp_path, monkeypatch,
                                                      name):
    """Whatever its type, exit code 1: in training, and in a command that only evaluates."""
    module = f"raises_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(
        f"import sys\nimport data\ndef f(hypotheses, references, sources):\n    {ERRORS[name]}\n")
    monkeypatch.chdir(tmp_path)
    reward = ["--reward", f"{module}:f"]
    for words in (command(folder, base, "out", *reward),
                  ["--mode", "eval", "--init", base, *reward]):
        with pytest.raises(SystemExit) as e:
            train.main(words)
        err = capsys.readouterr().err
        assert e.value.code == 1 and "Traceback" in err and f"{module}.py\", line 4" in err
        assert name in err.splitlines()[-1]


def test_a_module_that_fails_to_import_keeps_its_traceback(capsys, folder, base, tmp_path,
                                                           monkeypatch):
    (tmp_path / "fails.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train.main(command(folder, base, "out", "--reward", "fails:f"))
    assert e.value.code == 1 and "No module named 'no_such_package'" in capsys.readouterr().err


@pytest.mark.parametrize("body, expected", [
    ("return [0.5]", "expected 6 finite numbers"), ("return None", "NoneType"),
    ("return [float('nan')] * len(hypotheses)", "nan"), ("return [2] * len(hypotheses)", "0..1")])
def test_what_a_reward_returns_is_checked(capsys, folder, base, tmp_path, monkeypatch, body,
                                          expected):
    name = f"bad{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def f(hypotheses, references, sources):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "--mode", "eval", "--init", base, "--reward", f"{name}:f")
    assert f"{name}:f" in line and expected in line


# --------------------------------------------------------------------------------------------------
# Comparisons and sweeps


def rows_of(path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_comparison_is_reprinted_and_grows(folder, tmp_path, capsys):
    """A setting more trains nothing again; the table keeps those that were there."""
    words = [*TINY, "--data", folder, "--steps", "2", "--out", str(tmp_path), "--settings"]
    train.main([*words, "all", "--kl_weight", "0.1"])
    first = capsys.readouterr().out
    assert [row["name"] for row in rows_of(tmp_path / "results.json")] == ["base", *train.SETTINGS]
    assert {"report.txt", "outputs.txt", "compare.png"} <= set(os.listdir(tmp_path))
    stamp = os.path.getmtime(tmp_path / "reuse/ckpt.pt")
    train.main([*words, "all", "--kl_weight", "0.1"])
    assert capsys.readouterr().out.split("setting ")[1] == first.split("setting ")[1]
    rows = rows_of(tmp_path / "results.json")
    shutil.rmtree(tmp_path / "online")
    train.main([*words, "online", "reuse", "--kl_weight", "0.1"])
    again = rows_of(tmp_path / "results.json")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert os.path.getmtime(tmp_path / "reuse/ckpt.pt") == stamp
    line = refused(capsys, *words, "online", "--lr", "0.5")
    assert "online: holds a run of another config (kl_weight, lr)" in line


def test_seeds_differ_and_one_more_can_be_added(folder, tmp_path):
    words = [*TINY, "--data", folder, "--steps", "1", "--out", str(tmp_path)]
    train.main([*words, "--settings", "mle", "masked", "--seeds", "0", "1"])
    stamp = os.path.getmtime(tmp_path / "seed1/masked/ckpt.pt")
    train.main([*words, "--settings", "mle", "masked", "--seeds", "0", "1", "2"])
    rows = rows_of(tmp_path / "results.json")
    assert [(row["name"], row["seed"]) for row in rows] == [
        (name, seed) for seed in range(3) for name in ("base", "mle", "masked")]
    assert os.path.getmtime(tmp_path / "seed1/masked/ckpt.pt") == stamp
    bases = [weights(tmp_path / f"seed{seed}/base/best.pt") for seed in range(2)]
    assert not same(*bases)


def test_vary_shares_bases_and_grows(folder, tmp_path, capsys):
    """Rows differ in one flag and name it; values, settings and flags can be added later."""
    words = [*TINY, "--data", folder, "--steps", "1", "--out", str(tmp_path)]
    train.main([*words, "--settings", "masked", "--vary", "K", "3", "4"])
    assert "vary-K.txt" in os.listdir(tmp_path) and "4" in capsys.readouterr().out
    stamp = os.path.getmtime(tmp_path / "seed0/masked-K_4/ckpt.pt")
    train.main([*words, "--settings", "masked", "online", "--vary", "K", "4", "5"])
    rows = rows_of(tmp_path / "vary-K.json")
    assert [(r["name"], r["flag"], r["value"], r["K"]) for r in rows] == [
        (name, "K", str(K), K) for name in ("online", "masked") for K in (4, 5)]
    assert os.path.getmtime(tmp_path / "seed0/masked-K_4/ckpt.pt") == stamp
    train.main([*words, "--settings", "masked", "--vary", "p_m", ".1", "0.3"])
    bases = [name for name in os.listdir(tmp_path / "seed0") if name.startswith("base")]
    assert bases == ["base"]
    assert [row["value"] for row in rows_of(tmp_path / "vary-p_m.json")] == [".1", "0.3"]


def test_vary_refuses_settings_that_ignore_the_flag(folder, tmp_path, capsys):
    line = refused(capsys, *TINY, "--data", folder, "--settings", "refresh", "online", "--vary",
                   "refresh", "2", "4", "--out", str(tmp_path / "out"))
    assert "--vary refresh: the setting online fixes or ignores it" in line


@pytest.mark.parametrize("flag, values, differs", [
    ("vocab_size", ("280", "300"), lambda state: len(state["tokenizer"])),
    ("block_size", ("56", "64"), lambda state: state["gpt"]["block_size"]),
    ("reward", ("fixed:low", "fixed:high"), lambda state: state["best"]),
    ("base_lr", ("0.004", "0.001"), lambda state: float(state["model"]["wte.weight"].sum())),
])
def test_a_flag_of_the_base_gets_a_base_a_value(folder, tmp_path, monkeypatch, flag, values,
                                                differs):
    """And the runs from it see that value, too."""
    (tmp_path / "fixed.py").write_text("def low(texts, references, sources):\n"
                                       "    return [0.25] * len(texts)\n"
                                       "def high(texts, references, sources):\n"
                                       "    return [0.75] * len(texts)\n")
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "--data", folder, "--steps", "1", "--out", "out", "--settings", "mle",
             "--vary", flag]
    train.main([*words, *values])
    for name in ("base", "mle"):
        states = [state(f"out/seed0/{name}-{flag}_{value}/ckpt.pt") for value in values]
        assert differs(states[0]) != differs(states[1])
    train.main([*words, values[1]])  # the second alone: its base is there


def test_all_mistakes_of_a_sweep_are_found_before_any_work(folder, tmp_path, capsys):
    """A source that does not fit, or a reward that is none, at the last value."""
    words = [*TINY, "--data", folder, "--out", str(tmp_path / "out"), "--settings", "masked"]
    assert "source of" in refused(capsys, *words, "--vary", "block_size", "64", "8")
    assert "rooge" in refused(capsys, *words, "--vary", "reward", "rouge", "rooge")
    assert "expected a whole number" in refused(capsys, *words, "--vary", "K", "4", "x")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# eval, sample, candidates


def test_a_checkpoint_knows_its_data_and_reward(folder, base, tmp_path, capsys):
    run(folder, base, tmp_path / "run", "--reward", "bleu")
    init = f"{tmp_path}/run/best.pt"
    capsys.readouterr()
    train.main(["--mode", "eval", "--init", init])
    out = capsys.readouterr().out
    assert f"data {folder}, reward bleu" in out
    figures = dict(line.split() for line in out.splitlines()[1:])
    assert set(figures) >= {"test_reward", "bleu", "rougeL", "sampled_reward", "entropy"}
    train.main(["--mode", "eval", "--init", init, "--reward", "rouge"])
    assert "reward rouge" in capsys.readouterr().out
    assert "records" not in refused(capsys, "--mode", "eval", "--init", init, "--data", "gone")


def test_eval_agrees_with_the_row_of_the_run(folder, base, tmp_path, capsys):
    row = run(folder, base, tmp_path / "run", "--lr", "0.05", "--steps", "30", "--setting", "mle")
    assert row["test_reward"] > 0
    capsys.readouterr()
    train.main(["--mode", "eval", "--init", f"{tmp_path}/run/best.pt", "--out", f"{tmp_path}/e"])
    figures = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:-1])
    for name, value in figures.items():
        assert float(value) == pytest.approx(row[name], abs=1e-4)
    texts = [(tmp_path / where / "predictions.jsonl").read_text() for where in ("run", "e")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 6


def test_eval_and_candidates_write_into_new_folders_alone(folder, base, tmp_path, capsys):
    run(folder, base, tmp_path / "run")
    (tmp_path / "file").write_text("")
    before = files(tmp_path)
    for mode in ("eval", "candidates"):
        for out in (tmp_path / "run", tmp_path / "file", os.path.dirname(base)):
            assert "expected a new folder" in refused(
                capsys, "--mode", mode, "--init", f"{tmp_path}/run/best.pt", "--out", str(out))
        line = refused(capsys, "--mode", mode, "--init", base, "--out", "/proc/x")
        assert "cannot be made" in line
    train.main(["--mode", "eval", "--init", base])
    train.main(["--mode", "sample", "--init", base])
    assert files(tmp_path) == before


def test_candidates_are_ranked_and_trained_on(folder, base, tmp_path, capsys):
    """The same data, whose static texts are the policy's, best first, with the data's flags."""
    with_flags = shutil.copytree(folder, tmp_path / "d")
    (with_flags / "flags.json").write_text('{"": {"p_m": 0.4}}')
    new = str(tmp_path / "new")
    train.main(["--mode", "candidates", "--init", base, "--data", str(with_flags), "--K", "3",
                "--temperature", "0.7", "--out", new])
    assert "3 candidates a source" in capsys.readouterr().out
    before, after = data.load_dataset(folder), data.load_dataset(new)
    for old, r in zip(before["train"], after["train"], strict=True):
        assert (r.source, r.references, r.target) == (old.source, old.references, old.target)
        assert len(r.static) == 3
        scores = load_reward("rouge")(r.static, [r.references] * 3, [r.source] * 3)
        assert list(scores) == sorted(scores, reverse=True)
    assert config("--data", new).p_m == 0.4
    run(new, base, tmp_path / "run", *flags_of("offline"))


def test_candidates_that_are_stopped_can_begin_again(folder, base, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt
    words = ["--mode", "candidates", "--init", base, "--out", str(tmp_path / "new"), "--K", "2"]
    with monkeypatch.context() as m:
        m.setattr(train.evaluate, "best_first", stopped)
        with pytest.raises(SystemExit) as e:
            train.main(words)
    assert e.value.code == 130
    train.main(words)
    assert "2 candidates a source" in capsys.readouterr().out


def test_sample_shows_the_method_on_one_source(folder, base, tmp_path, capsys):
    """With the texts of the data where it has the source; else from the greedy text, unscored."""
    run(folder, base, tmp_path, "--p_m", "0.6")
    init, r = f"{tmp_path}/best.pt", data.load_dataset(folder)["val"][2]
    capsys.readouterr()
    train.main(["--mode", "sample", "--init", init, "--source", r.source, "--K", "5"])
    out = capsys.readouterr().out
    assert r.source in out and r.static[0] in out and "[MASK]" in out and "greedy" in out
    fills = [line for line in out.splitlines() if line.startswith("fill")]
    assert 1 < len(fills) <= 5 and all(" R 0." in line and " A " in line for line in fills)
    assert "of 5)" in fills[0]
    train.main(["--mode", "sample", "--init", init, "--source", "Paris hail 99"])
    out = capsys.readouterr().out
    assert "Paris hail 99" in out and " R 0." not in out
    assert "expected at most" in refused(capsys, "--mode", "sample", "--init", init, "--source",
                                         "word " * 99)


def test_bad_checkpoints(capsys, folder, base, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk" * 99)
    (tmp_path / "cut.pt").write_bytes(open(base, "rb").read()[:3000])
    whole = state(base)
    first_edition = {k: v for k, v in whole["config"].items() if k != "init_std"}
    for name, content in (("list", [1]), ("part", {"model": {}}),
                          ("shape", whole | {"gpt": whole["gpt"] | {"n_embd": 32}}),
                          ("first", whole | {"config": first_edition})):
        torch.save(content, tmp_path / f"{name}.pt")
    for name, expected in (("junk", "junk.pt: no checkpoint that can be read"), ("cut", "no checkpoint that can"),
                           ("list", "expected a checkpoint of this edition"),
                           ("part", "expected a checkpoint"), ("shape", "another shape"),
                           ("first", "expected a checkpoint of this edition")):
        path = str(tmp_path / f"{name}.pt")
        assert expected in refused(capsys, "--mode", "eval", "--init", path)
        assert expected in refused(capsys, *command(folder, path, tmp_path / "out"))
    assert "Is a directory" in refused(capsys, "--mode", "eval", "--init", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda(capsys, folder, base, tmp_path):
    line = refused(capsys, *command(folder, base, tmp_path / "out", "--device", "cuda"))
    assert "--device cuda: this machine has none" in line


# --------------------------------------------------------------------------------------------------
# What is said of the data


def one_static(n=12, static=lambda text: [text]) -> list[data.Record]:
    return [data.Record(r.source, r.references, static=static(r.references[0]))
            for r in short_records(n)]


@pytest.mark.parametrize("static", [lambda text: [text], lambda text: [text] * 3])
def test_nothing_to_rank_is_noted_once(capsys, tmp_path, static):
    """One static text a source, or three copies of it: offline has nothing to learn from."""
    path = dataset(tmp_path / "d", one_static(static=static))
    words = [*TINY, "--data", path, "--steps", "1", "--out", str(tmp_path / "out")]
    train.main([*words, "--settings", "offline", "masked", "--seeds", "0", "1"])
    assert capsys.readouterr().out.count("note: offline: no source has two different") == 1


def test_credit_that_ranks_nothing_is_noted(capsys, tmp_path, base):
    path = dataset(tmp_path / "d", one_static())
    run(path, base, tmp_path / "out", "--credit", "0.5", "--num_static", "2")
    assert "note: masked: no source has two different static texts" in capsys.readouterr().out
    assert {line["rl_loss"] for line in metrics(tmp_path / "out")[1:]} != {0.0}  # samples teach


def test_equal_rewards_are_noted_once_they_last(folder, base, tmp_path, monkeypatch, capsys):
    """All samples of a group score the same, ten updates long: nothing is learned."""
    (tmp_path / "flat.py").write_text("def f(hypotheses, references, sources):\n"
                                      "    return [0.25] * len(hypotheses)\n")
    monkeypatch.chdir(tmp_path)
    for steps, times in (("9", 0), ("25", 1)):
        run(folder, base, f"out{steps}", "--reward", "flat:f", "--steps", steps)
        assert capsys.readouterr().out.count("have had equal rewards (mean 0.25)") == times
    assert all(line["equal_rewards"] == 1 and line["rl_loss"] == 0 for line in metrics("out9")[1:])


def test_long_texts_are_cut_and_counted(capsys, folder, base, tmp_path):
    words = [*TINY, "--data", folder, "--steps", "1", "--max_len", "6", "--out"]
    train.main(["--mode", "train", *words, str(tmp_path / "out")])
    out = capsys.readouterr().out
    records = [r for split in data.load_dataset(folder).values() for r in split]
    tok = train.load_policy(f"{tmp_path}/out/best.pt", torch.device("cpu")).tok
    long = sum(len(tok.encode(text)) > 5 for r in records for text in {*r.target, *r.static})
    assert f"note: {long} targets and static texts are longer than 6 tokens and are cut" in out
    train.main([*words, str(tmp_path / "both"), "--settings", "masked", "--seeds", "0", "1"])
    assert capsys.readouterr().out.count("texts are longer than 6") == 1
    line = refused(capsys, "--mode", "train", *TINY, "--data", folder, "--block_size", "12",
                   "--max_len", "10", "--out", str(tmp_path / "no"))
    assert "a source of more than 2 tokens" in line


def test_a_reward_that_cannot_see_is_noted(capsys, tmp_path):
    records = [data.Record(f"北京 {i}", [f"北京 有 雨 {i}", "雨"]) for i in range(8)]
    path = dataset(tmp_path / "d", records)
    train.main(["--mode", "train", *TINY, "--data", path, "--steps", "1", "--out",
                str(tmp_path / "out")])
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


@pytest.mark.slow
@pytest.mark.parametrize("shell", ['"$0" "$@" >&-', '"$0" "$@" >&- 2>&-', '"$0" -OO "$@"'])
def test_closed_streams_and_no_asserts(folder, base, tmp_path, shell):
    """Closed before the start, or Python without asserts and docstrings: a run as any other."""
    done = python("train.py", *command(folder, base, tmp_path / "out"), shell=shell)
    assert done.returncode == 0 and done.stderr == b""
    assert len(metrics(tmp_path / "out")) == 7


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
    done = python("train.py", *TINY, "--data", path, "--settings", "masked", "--steps", "1",
                  "--out", out, **env)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert "Genève 3" in (tmp_path / "aus/outputs.txt").read_text(encoding="utf-8")
    done = python("train.py", "--mode", "sample", "--init", f"{out}/masked/best.pt", "--source",
                  "Zürich 3", **env)
    assert done.returncode == 0 and done.stderr == b"" and b" R 0." in done.stdout
    new = str(tmp_path / "neü")
    done = python("train.py", "--mode", "candidates", "--init", f"{out}/masked/best.pt", "--K", "2",
                  "--out", new, **env)
    assert done.returncode == 0 and data.load_dataset(new)["train"][3].source == "Zürich 3"
