"""A run and its folder: kill -9, Ctrl-C and closed pipes at any time, whose folder it is, and
where things lie."""
import errno
import os
import random
import shutil
import signal
import sys

import pytest

import train
import torch

import data
from lab import policy
from runs import (RUN, SETTINGS, TINY, Child, after_calls, base, command, files,  # noqa: F401
                  flags_of, folder, metrics, refused, run, same, state, weights)

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that die are forked")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def same_run(a, b) -> bool:
    """To the last bit: weights that go on, weights that are tested, log (seconds apart), texts."""
    def timeless(out):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(out)]
    texts = [(path / "samples.txt").read_text(encoding="utf-8") for path in (a, b)]
    return (all(same(weights(a / name), weights(b / name)) for name in ("ckpt.pt", "best.pt"))
            and timeless(a) == timeless(b) and texts[0] == texts[1])


# --------------------------------------------------------------------------------------------------
# Killed

CUT = {name: flags_of(name) for name in SETTINGS if " " not in name} | {
    "one refresh": [*flags_of("refresh"), "--refresh", "64", "--save_every", "1"],
    "budget between": [*flags_of("credit"), "--refresh", "4", "--budget_fp", "250",
                       "--save_every", "1", "--steps", "12"],
}


def kill_and_go_on(folder, base, tmp_path, name, times, seed):
    """Killed before a random call of a function, then resumed by the same command, so many times;
    at last it is finished, and is the run that nobody killed."""
    calls, words = [0], CUT[name]
    sys.setprofile(lambda *_: calls.__setitem__(0, calls[0] + 1))
    try:
        run(folder, base, tmp_path / "whole", *words)
    finally:
        sys.setprofile(None)
    if name == "budget between":
        assert state(tmp_path / "whole/ckpt.pt")["step"] % 4 > 0
    rng, died = random.Random(f"{name} {seed}"), 0
    for i in range(times):
        n = rng.randrange(calls[0] // 10, calls[0])

        def work():
            after_calls(n, die)
            run(folder, base, tmp_path / "cut", *words)
        died += Child(work, tmp_path / f"child{i}").end()[0] == -signal.SIGKILL
    assert died
    run(folder, base, tmp_path / "cut", *words)
    assert same_run(tmp_path / "whole", tmp_path / "cut")


@needs_fork
@pytest.mark.parametrize("name", CUT)
def test_a_killed_run_goes_on_to_the_last_bit(folder, base, tmp_path, name):
    kill_and_go_on(folder, base, tmp_path, name, times=1, seed=0)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_a_run_killed_again_and_again_goes_on_to_the_last_bit(folder, base, tmp_path, name):
    kill_and_go_on(folder, base, tmp_path, name, times=6, seed=1)


@needs_fork
@pytest.mark.parametrize("number", range(1, 9))
def test_killed_at_a_save(folder, base, tmp_path, monkeypatch, number):
    """A checkpoint is all there or not: killed before the new file is in place, or just after."""
    run(folder, base, tmp_path / "whole", *flags_of("refresh"))

    def work():
        calls, replace = [0], os.replace

        def kills(*paths):
            calls[0] += 1
            if calls[0] == (number + 1) // 2 and number % 2:
                die()
            replace(*paths)
            if calls[0] == (number + 1) // 2:
                die()
        monkeypatch.setattr(policy.os, "replace", kills)
        run(folder, base, tmp_path / "cut", *flags_of("refresh"))
    assert Child(work, tmp_path / "child").end()[0] == -signal.SIGKILL
    run(folder, base, tmp_path / "cut", *flags_of("refresh"))
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    assert not [name for name in files(tmp_path / "cut") if name.endswith(".tmp")]


def test_a_full_disk_is_one_line_and_loses_nothing(folder, base, tmp_path, capsys, monkeypatch):
    """The second checkpoint cannot be written: the first stays, and the run can be finished."""
    fsync, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)
    monkeypatch.setattr(policy.os, "fsync", full)
    words = command(folder, base, tmp_path, "--save_every", "1", "--eval_every", "99")
    line = refused(capsys, *words)
    assert "cannot be written ([Errno 28] No space left on device); what was there" in line
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    before = state(tmp_path / "ckpt.pt")["step"]
    train.main(words)
    assert 0 < before < 6 == state(tmp_path / "ckpt.pt")["step"]


def test_a_full_disk_at_the_log_is_one_line(folder, base, tmp_path, capsys, monkeypatch):
    def full(self, row):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(train.Run, "log", full)
    assert "No space left on device" in refused(capsys, *command(folder, base, tmp_path))


# --------------------------------------------------------------------------------------------------
# Stopped

STOPPED = [*flags_of("refresh"), "--refresh", "4", "--steps", "12", "--save_every", "1"]


def signalled(folder, base, out, steps, kind=signal.SIGINT, words=STOPPED, **more):
    """The run in a child, which gets the signal in these updates -> exit code, stdout, stderr."""
    def work():
        log = train.Run.log

        def log_and_signal(self, row):
            log(self, row)
            if row["step"] in steps:
                os.kill(os.getpid(), kind)
        train.Run.log = log_and_signal
        train.main(command(folder, base, out, *words))
    return Child(work, f"{out}-child", **more).end()


@needs_fork
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_where_the_next_refresh_begins(folder, base, tmp_path, kind):
    code, _, err = signalled(folder, base, tmp_path / "cut", [5], kind)
    assert code == 130 and err.split("\n")[1:] == [
        "stopping after 3 more updates; once more to stop now and go back to step 4", "",
        f"stopped; step 8 is saved in {tmp_path}/cut; the same command goes on from there", ""]
    assert state(tmp_path / "cut/ckpt.pt")["step"] == 8
    run(folder, base, tmp_path / "cut", *STOPPED)
    run(folder, base, tmp_path / "whole", *STOPPED)
    assert same_run(tmp_path / "whole", tmp_path / "cut")


@needs_fork
def test_a_second_signal_leaves_at_once(folder, base, tmp_path):
    code, _, err = signalled(folder, base, tmp_path / "cut", [5, 6])
    assert code == 130 and "go back to step 4" in err and "Traceback" not in err
    assert state(tmp_path / "cut/ckpt.pt")["step"] == 4
    code, _, err = signalled(folder, base, tmp_path / "new", [1, 2])
    assert code == 130 and "stop now and begin again" in err
    assert not os.path.exists(tmp_path / "new/ckpt.pt")


@needs_fork
@pytest.mark.parametrize("step, left", [(8, 0), (9, 1), (10, 0)])
def test_a_signal_near_the_end(folder, base, tmp_path, step, left):
    """Where a refresh begins it stops at once; the end may come before the next refresh; in the
    last update the run is finished, and the command still stops."""
    words = [*STOPPED, "--steps", "10"]
    code, _, err = signalled(folder, base, tmp_path / "cut", [step], words=words)
    assert code == 130 and f"step {step + left} is saved" in err
    assert (f"stopping after {left} more" in err) == (left > 0)
    assert state(tmp_path / "cut/ckpt.pt")["finished"] == (step > 8)


@needs_fork
def test_a_signal_in_the_last_update_of_the_base_stops_the_command(folder, tmp_path):
    """And --resume alone goes on from there, though no update of RL was made."""
    words = ["--mode", "train", *TINY, "--data", folder, "--out", str(tmp_path / "cut")]

    def work():
        log = train.Run.log

        def log_and_signal(self, row):
            log(self, row)
            if row["setting"] == "mle" and row["step"] == 4:
                os.kill(os.getpid(), signal.SIGINT)
        train.Run.log = log_and_signal
        train.main(words)
    code, out, err = Child(work, tmp_path / "child").end()
    assert code == 130 and "cut/base; the same command" in err and "masked" not in out
    train.main(["--resume", str(tmp_path / "cut")])
    train.main([*words[:-1], str(tmp_path / "whole")])
    assert same_run(tmp_path / "whole", tmp_path / "cut")


@needs_fork
@pytest.mark.parametrize("stderr_too", [False, True])
def test_a_reader_who_leaves_stops_the_run(folder, base, tmp_path, stderr_too):
    """Such as head: saved where a refresh begins, with a code that is not 0 and no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    words = command(folder, base, tmp_path / "cut", *STOPPED)
    code, _, err = Child(lambda: train.main(words), tmp_path / "child", stdout=writer,
                         stderr=writer if stderr_too else None).end()
    os.close(writer)
    assert code not in (0, 99) and "Traceback" not in err
    assert state(tmp_path / "cut/ckpt.pt")["step"] == 4
    run(folder, base, tmp_path / "cut", *STOPPED)
    assert len(metrics(tmp_path / "cut")) == 13


@needs_fork
def test_a_reader_who_leaves_at_a_note_or_at_the_end(folder, base, tmp_path, monkeypatch):
    """Also what is printed beside the progress line finds out, and loses nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    def note(run, progress, row):
        if row["step"] == 5:
            print("note", flush=True)
    monkeypatch.setattr(train, "show", note)
    words = command(folder, base, tmp_path / "cut", *STOPPED)
    code, _, err = Child(lambda: train.main(words), tmp_path / "child", stdout=writer).end()
    assert code == 130 and "Traceback" not in err and state(tmp_path / "cut/ckpt.pt")["step"] == 8
    monkeypatch.setattr(train, "show", lambda *_: None)
    code, _, err = Child(lambda: train.main(words), tmp_path / "child", stdout=writer).end()
    os.close(writer)  # this time it was the table, which is printed last
    assert code == 1 and "Traceback" not in err and (tmp_path / "cut/results.json").exists()


def test_a_finished_run_is_small_and_prints_its_row_again(folder, base, tmp_path, capsys,
                                                          monkeypatch):
    run(folder, base, tmp_path)
    table = capsys.readouterr().out.split("setting  p_m")[1]
    assert state(tmp_path / "ckpt.pt")["optimizer"] is None

    def never(*_):
        raise AssertionError("trained or tested again")
    monkeypatch.setattr(train, "update", never)
    monkeypatch.setattr(train.evaluate, "test_policy", never)
    before = files(tmp_path)
    for words in (command(folder, base, tmp_path), ["--resume", str(tmp_path)]):
        train.main(words)
        assert capsys.readouterr().out.split("setting  p_m")[1] == table
    assert files(tmp_path) == before
    (tmp_path / "results.json").write_text('{"a": 1}')
    assert "expected rows" in refused(capsys, *command(folder, base, tmp_path))


# --------------------------------------------------------------------------------------------------
# Places


def test_places_are_not_identity(folder, base, tmp_path, monkeypatch, capsys):
    """One data set typed five ways, from two directories, moved; a base that has moved; a run's
    folder that has moved: it is the same run."""
    home = tmp_path / "home"
    shutil.copytree(folder, home / "dd/g")
    shutil.copy(base, home / "base.pt")
    monkeypatch.chdir(home)
    words = ["--mode", "train", *RUN, "--init", "base.pt", "--out"]
    train.main([*words, "run", "--data", "dd/g"])
    capsys.readouterr()
    for typed in ("dd/g/", "./dd/g", f"{home}/dd/g", "dd/../dd/g"):
        train.main([*words, "run", "--data", typed])
        assert capsys.readouterr().out.startswith("\nsetting")  # no update

    os.makedirs(tmp_path / "elsewhere")
    shutil.move(home / "dd/g", tmp_path / "elsewhere/g")
    shutil.move(home / "base.pt", tmp_path / "elsewhere/b.pt")
    shutil.move(home / "run", tmp_path / "elsewhere/run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "dd/g: no such folder" in refused(capsys, "--resume", "run")
    assert "base.pt: no checkpoint that can be read" in refused(capsys, "--resume", "run", "--data", "g")
    train.main(["--resume", "run", "--data", "g", "--init", "b.pt"])
    assert capsys.readouterr().out.startswith("\nsetting")


def test_an_edited_reward_is_another_run(folder, base, tmp_path, monkeypatch, capsys):
    """The text of the user's module is a part of what a run is; a comment, too."""
    monkeypatch.chdir(tmp_path)
    code = "def f(hypotheses, references, sources):\n    return [0.5] * len(hypotheses)\n"
    (tmp_path / "edited.py").write_text(code)
    words = command(folder, base, "run", "--reward", "edited:f")
    train.main(words)
    (tmp_path / "edited.py").write_text(code + "# now it is fair\n")
    assert "another config (reward_hash)" in refused(capsys, *words)
    (tmp_path / "edited.py").write_text(code)
    train.main(words)


def test_resume_takes_no_other_flags(folder, base, tmp_path, capsys):
    run(folder, base, tmp_path / "run")
    before = files(tmp_path)
    for words, expected in ((["--p_m", "0.9"], "--p_m: --resume does not use it"),
                            (["--out", "other"], "--out: --resume does not use it"),
                            (["--quick"], "--quick: --resume does not use it"),
                            (["--mode", "compare"], "--resume: --mode compare does not use it")):
        assert expected in refused(capsys, "--resume", str(tmp_path / "run"), *words)
    for place in (tmp_path, tmp_path / "nowhere", os.path.dirname(base)):  # the last one is a base
        assert "no run of --mode train there" in refused(capsys, "--resume", str(place))
    train.main(["--resume", str(tmp_path / "run"), "--save_every", "9"])
    assert files(tmp_path) == before


def test_a_command_that_failed_at_once_can_be_corrected_in_place(folder, base, tmp_path, capsys):
    """A reward for other data; a rate that diverges before anything was saved."""
    words = ["--mode", "train", *TINY, "--data", folder, "--out", str(tmp_path)]
    assert "slot" in refused(capsys, *words, "--reward", "slot")
    line = refused(capsys, *words, "--base_lr", "1e30")
    assert "base: the loss is not finite at step 2; try a smaller --base_lr" in line
    line = refused(capsys, *words, "--lr", "1e30")
    assert line.endswith("the loss is not finite at step 2; try a smaller --lr")
    train.main(words)
    assert state(tmp_path / "ckpt.pt")["finished"]


@pytest.mark.parametrize("name", ["online", "mle", "offline", "credit"])
def test_a_run_that_diverged_after_a_save_asks_for_another_folder(folder, base, tmp_path, capsys,
                                                                  name):
    refresh = ["--refresh", "1"] if name == "credit" else []
    words = command(folder, base, tmp_path / "a", *flags_of(name), *refresh, "--save_every", "1")
    assert refused(capsys, *words, "--lr", "1e30").endswith("a smaller --lr and another --out")
    assert "another config (lr)" in refused(capsys, *words)
    train.main([*words, "--out", str(tmp_path / "b")])


def test_a_run_keeps_out_of_what_is_not_its_own(folder, base, tmp_path, capsys):
    """Another config, data set or base, foreign files, another mode: one line, and all stays."""
    run(folder, base, tmp_path / "run")
    other_base = str(tmp_path / "other.pt")
    before = state(base)
    before["model"]["wte.weight"] *= 2
    torch.save(before, other_base)
    other_data = str(tmp_path / "data")
    shutil.copytree(folder, other_data)
    records = data.load_records(f"{folder}/train.jsonl")
    data.save_records(records[::-1], f"{other_data}/train.jsonl")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    everything = files(tmp_path)
    run_out = str(tmp_path / "run")
    compare = [*TINY, "--data", folder, "--settings", "masked", "--out"]
    for words, expected in (
            (command(folder, base, run_out, "--K", "5"), "another config (K)"),
            (command(folder, base, run_out, "--setting", "online", "--K", "5"), "another config"),
            (command(other_data, base, run_out), "another config (data_hash)"),
            (command(folder, other_base, run_out), "another config (base_hash)"),
            (command(folder, base, tmp_path / "foreign"), "holds thesis.tex, and is no run"),
            (command(folder, base, folder), "holds test.jsonl, and is no run"),
            (command(folder, base, tmp_path / "theirs"), "holds config.json, and is no run"),
            (command(folder, base, tmp_path / "broken"), "expected JSON"),
            (command(folder, base, tmp_path / "foreign/thesis.tex"), "thesis.tex"),
            (command(folder, base, "/proc/nowhere"), "/proc/nowhere: cannot be written"),
            ([*compare, run_out], "another config (mode"),
            ([*compare, "/proc/nowhere"], "/proc/nowhere: cannot be written")):
        assert expected in refused(capsys, *words)
        assert files(tmp_path) == everything, expected


def test_a_run_keeps_out_of_a_comparison(folder, tmp_path, capsys):
    compare = [*TINY, "--data", folder, "--settings", "masked", "--steps", "1", "--out"]
    train.main([*compare, str(tmp_path)])
    before = files(tmp_path)
    for out in (tmp_path, tmp_path / "masked", tmp_path / "base"):
        line = refused(capsys, "--mode", "train", *TINY, "--data", folder, "--out", str(out))
        assert "another config (mode" in line
    other = shutil.copytree(folder, tmp_path.parent / f"{tmp_path.name}-data")
    records = data.load_records(f"{folder}/train.jsonl")
    data.save_records(records[::-1], f"{other}/train.jsonl")
    for words, expected in ((["--lr", "0.1"], "masked: holds a run of another config (lr)"),
                            (["--settings", "online", "--base_lr", "0.1"],
                             "base: holds a run of another config (base_lr, lr)"),
                            (["--settings", "online", "--data", str(other)], "base: holds a run")):
        assert expected in refused(capsys, *compare, str(tmp_path), *words)
    assert files(tmp_path) == before


def test_a_run_of_a_comparison_is_held_too(folder, tmp_path, capsys):
    """Who is at work in one of its folders keeps the whole comparison out."""
    fcntl = pytest.importorskip("fcntl")
    words = [*TINY, "--data", folder, "--settings", "masked", "--steps", "1"]
    words += ["--out", str(tmp_path)]
    train.main(words)
    with open(tmp_path / "masked/.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "masked: another process is at work there" in refused(capsys, *words)
    train.main(words)


def test_two_commands_at_once_are_refused(folder, base, tmp_path, capsys):
    """While another process holds the folder; once it has gone, the command runs."""
    fcntl = pytest.importorskip("fcntl")
    words = command(folder, base, tmp_path / "o")
    os.makedirs(tmp_path / "o")
    with open(tmp_path / "o/.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is at work there" in refused(capsys, *words)
        assert os.listdir(tmp_path / "o") == [".lock"]
    train.main(words)
    assert os.path.exists(tmp_path / "o/results.json")
