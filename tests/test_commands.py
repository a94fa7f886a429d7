"""What people type: flags, bad input, rewards of their own, comparisons and sweeps, eval, sample,
candidates, and odd places to run in."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import GPUS
import train
import torch

import data
from data.rewards import load_reward
from lab import sample, settings, task
from runs import (ROOT, TINY, base, command, files, flags_of, folder, merge,  # noqa: F401
                  metrics, read_rows, refused, run, same, short_records, state, train_only, weights)


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


# --- Flags ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, expected", [
    ("--bath_size 3", "unrecognized arguments: --bath_size 3"),
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
    ("--block_size 100000000000", "expected a whole number, 4 to 1000000"),
    ("--seed 9223372036854775808", "a whole number, 0 to 9223372036854775807"),
    ("--n_embd 30", "--n_embd 30: expected a multiple of 4"),
    ("--max_len 64 --block_size 64", "--max_len 64: expected 0, or from 2 to less than block_size"),
    ("--settings offline --num_static 1", "--num_static 1: expected at least 2"),
    ("--settings refresh --refresh 0", "--refresh 0: expected at least 1 for refresh"),
    ("--settings tail --refresh 3 --reuse 2", "--refresh 3: expected a multiple of reuse = 2"),
    ("--settings masked --p_m 0", "--p_m 0.0: expected above 0, or nothing is learned"),
    ("--reward roge", "reward 'roge': expected rouge, bleu"),
    ("--settings masked --vary K 4 x", "--vary: --K x: expected a whole number"),
    ("--settings masked --vary reward rouge roge", "reward 'roge': expected"),
    ("--settings masked --vary block_size 128 6", "more: a source of more than 3 tokens"),
    ("--data no/such/folder", "no such folder"),
    ("--device cuda", "--device cuda: this machine has none"),
    ("--mode eval --init no/such.pt", "no/such.pt: cannot be read (No such file"),
    ("--mode candidates --init BASE", "expected --out"),
    ("--mode candidates --init BASE --out /proc/x", "--out /proc/x: cannot be made"),
    ("--mode candidates --init BASE --out BASE", "holds files already; expected a new folder"),
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
    "--source text", "--mode eval --init BASE --out x", "--mode eval --init BASE --quick",
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
    ({"": {"lr": "fast"}}, "flags.json: --lr fast: expected a number"),
    ({"": {"K": 2.5}}, "flags.json: --K 2.5: expected a whole number"),
    ({"": {"stored": "good"}}, "--stored good: expected one of data, best"),
    ({"": {"reward": "os:system"}}, "reward: expected built-in ones"),
    ({"nocredit": {}}, "expected one of mle"), ({"masked": [1]}, "flags.json: expected {setting"),
    ({"masked": {"base_lr": 0.1}}, "'base_lr' is no flag that data may choose for one"),
])
def test_what_data_may_not_choose(capsys, tmp_path, flags, expected):
    path = dataset(tmp_path / "d", short_records(3), flags=flags)
    line = refused(capsys, *TINY, "--data", path, "--out", str(tmp_path / "out"))
    assert expected in line and not (tmp_path / "out").exists()


# --- Rewards of the user --------------------------------------------------------------------------

@pytest.mark.parametrize("error", ["BrokenPipeError", "SystemExit", "data.InputError"])
def test_an_error_inside_a_reward_keeps_its_traceback(capsys, folder, base, tmp_path, monkeypatch,
                                                      error):
    """Whatever its type, also those that end our own commands, with exit code 1."""
    module = f"raises_{error[:4]}"
    (tmp_path / f"{module}.py").write_text(
        f"import data\ndef f(hypotheses, references, sources):\n    raise {error}('theirs')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train.main(command(folder, base, "out", "--reward", f"{module}:f"))
    err = capsys.readouterr().err
    assert e.value.code == 1 and "Traceback" in err and f"{module}.py\", line 3" in err
    assert f"{error}: theirs" in err.splitlines()[-1]


# --- Comparisons and sweeps -----------------------------------------------------------------------

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


def test_a_sweep_shares_bases_and_grows(folder, tmp_path, capsys):
    """Rows differ in one flag and name it; values, settings, seeds and flags can be added later."""
    words = merge(*TINY, "--data", folder, "--steps", "1", "--out", str(tmp_path))
    train.main([*words, "--settings", "masked", "--vary", "K", "3", "4", "--seeds", "0", "1"])
    assert "vary-K.txt" in os.listdir(tmp_path) and "4" in capsys.readouterr().out
    old, before = ("seed1/base", "seed1/masked-K_4"), files(tmp_path)
    train_only([*words, "--settings", "masked", "online", "--vary", "K", "4", "5",
                "--seeds", "0", "1", "2"])
    rows = read_rows(tmp_path, "vary-K.json")
    assert [(row["seed"], row["name"], row["value"], row["K"]) for row in rows] == [
        (seed, name, K, int(K)) for seed in range(3) for name in ("online", "masked") for K in "45"]
    train_only([*words, "--settings", "masked", "--vary", "p_m", ".1", "0.3", "--seeds", "1"])
    assert [row["value"] for row in read_rows(tmp_path, "vary-p_m.json")] == [".1", "0.3"]
    after = files(tmp_path)
    assert all(after[name] == before[name] for name in before if name.startswith(old))
    assert [name for name in os.listdir(tmp_path / "seed1") if "base" in name] == ["base"]
    assert not same(*(weights(tmp_path / f"seed{seed}/base/best.pt") for seed in range(2)))


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
        assert [*rows] == [*values] and rows["1e-3"]["val_reward"] is not None
        assert rows["1e30"]["val_reward"] is rows["1e30"]["test_reward"] is None
        line = f"{name}-{flag}_1e30: the loss is not finite at step 2; try a smaller --{flag}"
        assert capsys.readouterr().out.count(line) == 1


# --- eval, sample, candidates ---------------------------------------------------------------------

def test_eval_knows_its_data_and_reward_and_agrees_with_the_row(folder, base, tmp_path, capsys):
    row = run(folder, base, tmp_path / "run", "--lr", "0.05", "--steps", "30", "--settings", "mle",
              "--reward", "bleu")
    assert row["test_reward"] > 0
    init = f"{tmp_path}/run/mle/best.pt"
    capsys.readouterr()
    train.main(["--mode", "eval", "--init", init])
    head, *lines = capsys.readouterr().out.splitlines()
    assert f"data {folder}, reward bleu" in head
    figures = dict(line.split() for line in lines)
    assert set(figures) >= {"test_reward", "bleu", "rougeL", "sampled_reward", "entropy"}
    for name, value in figures.items():
        assert float(value) == pytest.approx(row[name], abs=1e-4)
    content = state(init)
    content["config"]["device"] = "cuda"  # where it was trained; this machine has none
    torch.save(content, init)
    train.main(["--mode", "eval", "--init", init, "--reward", "rouge"])
    assert "reward rouge" in capsys.readouterr().out


def test_candidates_are_ranked_and_trained_on(folder, base, tmp_path, capsys, monkeypatch):
    """The same data, whose static texts are the policy's, best first, with the data's flags. A
    command that is stopped leaves nothing that stands in its way."""
    records = data.load_dataset(folder)["train"]
    path, new = dataset(tmp_path / "d", records, flags={"": {"p_m": 0.4}}), str(tmp_path / "new")
    words = ["--mode", "candidates", "--init", base, "--data", path, "--K", "3", "--out", new]

    def stopped(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(sample, "best_first", stopped)
        train.main(words)
    assert e.value.code == 130 and os.listdir(new) == []
    train.main(words)
    assert "3 candidates per source" in capsys.readouterr().out
    assert f"{new}: holds files already" in refused(capsys, *words)
    for old, r in zip(records, data.load_dataset(new)["train"], strict=True):
        assert train.replace(old, static=r.static) == r and len(r.static) == 3
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
    tok, tokens = task.load_policy(base, "cpu").tok, logs[-1][1]["rollout"].tokens
    assert (tokens != tok.pad).sum(2).max() > len(tok.encode(r.static[0])) + 1


NONE = "expected a checkpoint of train.py"
NO_FILE = f"{NONE}; this file is none, or only a part of one"
NO_FIT = "weights and shape do not fit ("


@pytest.mark.parametrize("content, expected", [
    (b"", NO_FILE), (b"hello", NO_FILE), (b"<!DOCTYPE html><html>", NO_FILE),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", NO_FILE),
    (torch.nn.Linear(2, 2), NO_FILE), ([1], NONE), ({"T": None, "part": True}, NONE),
    ({"config": [1]}, "a checkpoint of an earlier edition"),
    ({"gpt": {"n_embd": 32}}, NO_FIT), ({"gpt": {"n_head": 3}}, NO_FIT),
    ({"gpt": {"n_head": 0}}, NO_FIT), ({"tokenizer": 5}, NO_FIT),
    ({"T": 64}, "its longest text T does not fit"), ({"T": "9"}, "longest text T does not fit"),
    ({"model": {"ln_f.bias": torch.full((16,), torch.nan)}}, "some weights are not finite"),
    ({"config": {"K": -3}}, "bad.pt: its config: --K -3: expected a whole number"),
    ({"config": {"temperature": "hot"}}, "its config: --temperature hot: expected a number"),
    ({"config": {"more": 1}}, "its config: other flags than this edition's"),
])
def test_bad_checkpoints(capsys, folder, base, tmp_path, content, expected):
    """One line that says what the file is not, in whatever command uses it."""
    path, whole = tmp_path / "bad.pt", state(base)
    if isinstance(content, dict):  # changes of a good one
        changed = {key: whole[key] | value if isinstance(value, dict) else value
                   for key, value in content.items()}
        content = changed if "part" in content else whole | changed
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    commands = [["--mode", "sample", "--init", str(path)]]
    if "its config" not in expected:  # which training from it does not use
        commands.append(command(folder, str(path), tmp_path / "o"))
    for words in commands:
        line = refused(capsys, *words)
        assert f"{path}: " in line and expected in line
    assert os.listdir(tmp_path) == ["bad.pt"]


# --- What is said of the data ---------------------------------------------------------------------

def test_what_is_said_of_the_data_is_said_once(capsys, tmp_path):
    """One static text per source has no other to be ranked against; Chinese is nothing to ROUGE, so
    that all rewards are equal, which is said when it has lasted for ten updates; texts are cut."""
    records = [data.Record(f"北京 {i}", ["北京 有 雨"], static=["北京 有"] * 3) for i in range(8)]
    path, out = dataset(tmp_path / "d", records), tmp_path / "out"
    words = merge(*TINY, "--data", path, "--out", str(out), "--settings", "offline", "masked",
                  "--seeds", "0", "1", "--max_len", "6", "--credit", "0.5", "--num_static", "2")
    train_only(merge(*words, "--steps", "9"))
    said = capsys.readouterr().out
    tok = task.load_policy(out / "seed0/base/best.pt", "cpu").tok
    cut = sum(len(tok.encode(text)) > 5 for text in ("北京 有 雨", "北京 有")) * 3 * len(records)
    for note in ("note: offline: no source has two different static texts",
                 "note: masked: no source has two different static texts",
                 f"note: {cut} targets and static texts are longer than 6 tokens and are cut",
                 "chrf reads every script"):
        assert said.count(note) == 1, note
    assert "have had equal rewards" not in said
    train_only(merge(*words, "--settings", "masked", "--steps", "25", "--anew"))
    assert capsys.readouterr().out.count("have had equal rewards (mean 0.00)") == 2  # of two runs
    lines = metrics(out / "seed1/masked")[1:]
    assert all(line["equal_rewards"] == 1 and line["rl_loss"] == 0 for line in lines)


# --- Odd places. Each starts Python anew ----------------------------------------------------------

def python(*words, shell="", **env) -> subprocess.CompletedProcess:
    """python train.py words, in a shell line where $0 is Python and $@ the words."""
    start = [sys.executable, *words]
    if shell:
        start = ["bash", "-c", shell, *start]
    return subprocess.run(start, cwd=ROOT, capture_output=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


@pytest.mark.slow
def test_a_gpu_runs_the_same_code(folder, tmp_path):
    """Every setting, and what it saved is used on a CPU; skipped without a GPU."""
    words = merge(*TINY, "--data", folder, "--out", str(tmp_path), "--device", "cuda")
    for _ in range(2):  # the second time it only prints
        done = python("train.py", *words, CUDA_VISIBLE_DEVICES=GPUS)
        if b"this machine has none" in done.stderr:
            pytest.skip("no GPU")
        assert done.returncode == 0 and done.stderr == b"", done.stderr
    rows = {row["name"]: row for row in read_rows(tmp_path)}
    assert all(0 <= row["test_reward"] <= 1 for row in rows.values())
    assert rows["masked"]["fp"] == rows["static"]["fp"] == 6 * 4 < rows["online"]["fp"]
    for name in train.SETTINGS:
        done = python("train.py", "--mode", "eval", "--init", f"{tmp_path}/{name}/best.pt")
        assert done.returncode == 0 and done.stderr == b"", done.stderr


def test_sorl_that_names_no_module_is_one_line():
    done = python("train.py", SORL="nomod")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"train.py: SORL=nomod: no such module")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_ctrl_c_while_modules_are_imported_says_nothing():
    process = subprocess.Popen([sys.executable, "train.py", "-h"], cwd=ROOT, stderr=subprocess.PIPE)
    while b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=600)[1] == b"" and process.returncode == -signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("shell, env", [
    ('"$0" "$@" >&-', {}), ('"$0" "$@" >&- 2>&-', {}), ('"$0" -OO "$@"', {}),
    ("", {"LC_ALL": "C", "PYTHONUTF8": "0"}), ("", {"LC_ALL": "C.UTF-8"})])
def test_odd_places(tmp_path, shell, env):
    """Streams that were closed before the start, no asserts and docstrings, and umlauts and Chinese
    in texts, names, folder and command line in an ASCII locale: what a console cannot show is a ?,
    and files are UTF-8."""
    records = [data.Record(f"Zürich {i}", [f"北京 wünscht Schnee {i}", f"Föhn in Zürich {i}"],
                           names={"Zürich": "Genève"}) for i in range(8)]
    words = merge(*TINY, "--data", dataset(tmp_path / "Dätä", records), "--settings", "masked",
                  "--out", str(tmp_path / "aüs"))
    done = python("train.py", *words, shell=shell, **env)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert "Genève 3" in (tmp_path / "aüs/outputs.txt").read_text(encoding="utf-8")
    done = python("train.py", "--mode", "sample", "--init", f"{tmp_path}/aüs/masked/best.pt",
                  "--source", "Zürich 3", **env)
    assert done.returncode == 0 and done.stderr == b"" and b" R 0." in done.stdout
