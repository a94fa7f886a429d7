"""A run and its folder: kill -9, Ctrl-C and closed pipes at any time, whose folder it is, which
code made it, and where things lie."""
import errno
import os
import random
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest

import train
import torch

import data
from runs import (ROOT, SETTINGS, TINY, Child, after_calls, base, command, files,  # noqa: F401
                  flags_of, folder, merge, metrics, read_rows, refused, run, same, state,
                  train_only, weights)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that die are forked")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def same_run(a: Path, b: Path) -> bool:
    """To the last bit: weights that go on, weights that are tested, log and row (seconds apart),
    texts at every evaluation."""
    def timeless(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    texts = [(out / "texts.jsonl").read_text(encoding="utf-8") for out in (a, b)]
    return (all(same(weights(a / name), weights(b / name)) for name in ("ckpt.pt", "best.pt"))
            and all(timeless(read(a)) == timeless(read(b)) for read in (metrics, read_rows))
            and texts[0] == texts[1])


# --- Killed ---------------------------------------------------------------------------------------

KILLED = {name: flags_of(name) for name in SETTINGS if " " not in name}
PERIODS = {  # texts or samples of the policy serve several updates, and a checkpoint is among them
    "online": [*flags_of("online reuse"), "--save_every", "1"],
    "tail": [*flags_of("tail refresh"), "--accumulate", "2", "--save_every", "1"],
    "refresh": [*flags_of("refresh many"), "--accumulate", "2", "--save_every", "1"],
    "full": [*flags_of("full"), "--reuse", "2", "--save_every", "1", "--steps", "12",
             "--budget_fp", "300"],  # it ends inside a period
}


@pytest.mark.parametrize("times", [1, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("words", [*KILLED.values(), *PERIODS.values()], ids=" ".join)
def test_a_killed_run_goes_on_to_the_last_bit(folder, base, tmp_path, words, times):
    """Killed before a random call of a function, then resumed by the same command, so many times;
    at last it is finished, and equals the run that was not killed."""
    calls, setting = [0], words[1]
    sys.setprofile(lambda *_: calls.__setitem__(0, calls[0] + 1))
    try:
        run(folder, base, tmp_path / "whole", *words)
    finally:
        sys.setprofile(None)
    rng, died = random.Random(f"{words} {times}"), 0
    for i in range(times):
        n = rng.randrange(calls[0] // 10, calls[0])

        def work():
            after_calls(n, die)
            run(folder, base, tmp_path / "cut", *words)
        died += Child(work, tmp_path / f"child{i}").end()[0] == -signal.SIGKILL
    assert died
    run(folder, base, tmp_path / "cut", *words)
    assert same_run(tmp_path / "whole" / setting, tmp_path / "cut" / setting)
    assert not [name for name in files(tmp_path / "cut") if name.endswith(".tmp")]


@pytest.mark.parametrize("setting", PERIODS)
def test_a_run_goes_on_from_every_checkpoint(folder, base, tmp_path, monkeypatch, setting):
    """The folder as it is after every update, the middle of a period included, copied; each copy
    is finished by the same command."""
    save, copies = train.Run.save, []

    def save_and_copy(self):
        save(self)
        if self.base and self.done < 1:
            copies.append(shutil.copytree(tmp_path / "whole", tmp_path / str(self.step)))
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", save_and_copy)
        row = run(folder, base, tmp_path / "whole", *PERIODS[setting])
    assert len(copies) == row["steps"] - 1 and row["steps"] % 2 == (setting == "full")
    for out in copies:
        run(folder, base, out, *PERIODS[setting])
        assert same_run(tmp_path / "whole" / setting, out / setting)


def test_a_full_disk_is_one_line_and_loses_nothing(folder, base, tmp_path, capsys, monkeypatch):
    """The second checkpoint cannot be written: the first stays, and the run can be finished."""
    save, calls = torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) == 5:  # best.pt and ckpt.pt of the base, best.pt and ckpt.pt
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)
    monkeypatch.setattr(torch, "save", full)
    words = command(folder, base, tmp_path, "--save_every", "1", "--eval_every", "99")
    line = refused(capsys, *words)
    assert "cannot be written ([Errno 28] No space left on device); what was there" in line
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    before = state(tmp_path / "masked/ckpt.pt")["step"]
    train.main(words)
    assert 0 < before < 6 == state(tmp_path / "masked/ckpt.pt")["step"]


# --- Stopped --------------------------------------------------------------------------------------

STOPPED = [*flags_of("tail refresh"), "--steps", "8"]  # new texts every 4 updates, samples every 2


def signalled(words, folder, step, kinds=(signal.SIGINT,), name="tail", handler=signal.SIG_DFL):
    """The command in a child, which gets these signals in an update of the run of this name -> exit
    code, stdout, stderr. handler: what it has inherited for them."""
    def work():
        log = train.Run.log

        def log_and_signal(self, row):
            log(self, row)
            if self.folder.endswith(name) and row["step"] == step:
                for kind in kinds:
                    os.kill(os.getpid(), kind)
        train.Run.log = log_and_signal
        for kind in kinds:
            signal.signal(kind, handler)
        train.main(words)
    return Child(work, folder).end()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_update_that_runs(folder, base, tmp_path, kind):
    words = command(folder, base, tmp_path / "cut", *STOPPED)
    anew = [] if kind == signal.SIGINT else ["--anew"]
    code, _, err = signalled([*words, *anew], tmp_path / "child", 5, [kind])
    again = "the same command without --anew" if anew else "the same command"
    assert code == 130 and err == (f"\nstopped; step 5 is saved in {tmp_path}/cut/tail; {again} "
                                   f"goes on from there\n")
    assert state(tmp_path / "cut/tail/ckpt.pt")["step"] == 5
    run(folder, base, tmp_path / "cut", *STOPPED)
    run(folder, base, tmp_path / "whole", *STOPPED)
    assert same_run(tmp_path / "whole/tail", tmp_path / "cut/tail")


@pytest.mark.parametrize("step", [5, 1])
def test_a_second_signal_leaves_at_once(folder, base, tmp_path, step):
    words = command(folder, base, tmp_path / "o", *STOPPED)
    code, _, err = signalled(words, tmp_path / "child", step, [signal.SIGINT, signal.SIGTERM])
    assert code == 130 and err.startswith("\nstopped at once;") and "Traceback" not in err
    assert (tmp_path / "o/tail/ckpt.pt").exists() == (step > 3)  # --save_every 3
    assert step == 1 or state(tmp_path / "o/tail/ckpt.pt")["step"] == 3


@pytest.mark.parametrize("name, step", [("base", 4), ("mle", 6)])
def test_a_signal_in_the_last_update_stops_the_command(folder, tmp_path, name, step):
    """Also in that of the base. The same command goes on with what comes next."""
    words = merge(*TINY, "--settings", "mle", "--data", folder)
    cut = [*words, "--out", str(tmp_path / "cut")]
    code, out, err = signalled(cut, tmp_path / "child", step, name=name)
    assert code == 130 and f"cut/{name}; the same command goes on" in err
    assert "test R" not in out and ("mle     " in out) == (name == "mle")
    train_only(cut)
    train_only([*words, "--out", str(tmp_path / "whole")])
    for each in ("base", "mle"):
        assert same_run(tmp_path / "whole" / each, tmp_path / "cut" / each)


def test_under_nohup_a_hangup_stops_nothing(folder, base, tmp_path):
    words = command(folder, base, tmp_path / "o", *STOPPED)
    ended = signalled(words, tmp_path / "child", 5, [signal.SIGHUP], handler=signal.SIG_IGN)
    assert ended[::2] == (0, "")


def test_a_reader_who_leaves_stops_the_run(folder, base, tmp_path):
    """Such as head: saved at once, with a code that is not 0 and no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    words = command(folder, base, tmp_path / "cut", *STOPPED)
    code, _, err = Child(lambda: train.main(words), tmp_path / "child", stdout=writer).end()
    os.close(writer)
    assert code not in (0, 99) and "Traceback" not in err
    assert state(tmp_path / "cut/tail/ckpt.pt")["step"] == 1
    run(folder, base, tmp_path / "cut", *STOPPED)
    assert len(metrics(tmp_path / "cut/tail")) == 9


# --- Whose run it is: code, places, folders -------------------------------------------------------

def in_copy(copy, child, words, **env) -> tuple[int, str, str]:
    """train.py of a copy of the repository, in a fork, as if it had been started there: what has
    been imported is torch alone -> exit code, stdout, stderr."""
    def work():
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(f"{ROOT}/"):
                del sys.modules[name]
        sys.path[:] = [str(copy), *(path for path in sys.path if path != ROOT)]
        sys.argv[:] = ["train.py", *words]
        os.environ.update(env)
        runpy.run_path(f"{copy}/train.py", run_name="__main__")
    return Child(work, child).end()


def test_edit_run_look(folder, tmp_path):
    """A comment or docstring changes nothing. Other code is refused by the same command, in one
    line that names the file; with --anew it gives its own figures, from a base of its own."""
    copy = tmp_path / "copy"
    for name in ("data", "lab"):
        shutil.copytree(f"{ROOT}/{name}", copy / name)
    for name in ("train.py", "sorl.py", "model.py"):
        shutil.copy(f"{ROOT}/{name}", copy)
    words = merge(*TINY, "--settings", "masked", "--data", folder, "--out", str(tmp_path / "o"))

    def start(*more, **env):
        return in_copy(copy, tmp_path / "child", [*words, *more], **env)

    def runs():  # what belongs to the base and the run
        return {name: text for name, text in files(tmp_path / "o").items() if "/" in name}
    code, _, err = start()
    assert (code, err) == (0, "")
    before = runs()
    sorl = (copy / "sorl.py").read_text(encoding="utf-8")
    other_words = sorl.replace('"""Semi-offline RL', '"""In other words: semi-offline RL').replace(
        "def check_rate(p_m: float) -> None:\n",
        'def check_rate(\n        p_m: float) -> None:  # or raise\n    """Is it one?"""\n\n')
    assert len(other_words) > len(sorl) + 50
    (copy / "sorl.py").write_text(other_words, encoding="utf-8")
    assert start()[0] == 0 and runs() == before

    nothing = "\n\ndef policy_loss(rollout, A, before=None):\n    return 0 * rollout.logp.sum()\n"
    (copy / "mine.py").write_text(sorl + nothing, encoding="utf-8")
    by_name = start(SORL="mine")
    (copy / "sorl.py").write_text(other_words + nothing, encoding="utf-8")
    for code, _, err in (by_name, start()):
        assert code == 2 and len(err.splitlines()) == 1
        assert "o/base: its run was made by another sorl.py; expected another --out, or" in err
    assert runs() == before
    assert any(line["rl_loss"] for line in metrics(tmp_path / "o/masked")[1:])

    assert start("--anew")[0] == 0
    assert all(line["rl_loss"] == 0 for line in metrics(tmp_path / "o/masked")[1:])
    after = runs()
    assert all(after[name] != before[name] for name in ("base/metrics.jsonl", "masked/ckpt.pt"))
    assert start()[0] == 0 and runs() == after


def test_places_are_not_identity(folder, base, tmp_path, monkeypatch, capsys):
    """One data set typed five ways, from two directories, moved; a base that has moved; a folder of
    runs that has moved: they are the same runs."""
    home, away = tmp_path / "home", tmp_path / "away"
    shutil.copytree(folder, home / "dd/g")
    shutil.copy(base, home / "base.pt")
    monkeypatch.chdir(home)

    def is_done(data, init, out):
        capsys.readouterr()
        train.main(command(data, init, out))
        return "s left" not in capsys.readouterr().out  # no update
    assert not is_done("dd/g", "base.pt", "run")
    for typed in ("dd/g/", "./dd/g", f"{home}/dd/g", "dd/../dd/g"):
        assert is_done(typed, "base.pt", "run")
    os.makedirs(away)
    for old, new in (("dd/g", "g"), ("base.pt", "b.pt"), ("run", "run")):
        shutil.move(home / old, away / new)
    monkeypatch.chdir(away)
    assert is_done("g", "b.pt", "run")


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


def test_results_do_not_outlive_their_run(folder, base, tmp_path):
    """A checkpoint that is taken away, or --anew: row and log are those of the new run."""
    first = run(folder, base, tmp_path)
    (tmp_path / "masked/ckpt.pt").unlink()
    second = run(folder, base, tmp_path, "--p_m", "0.9", "--steps", "4")
    third = run(folder, base, tmp_path, "--p_m", "0.8", "--steps", "3", "--anew")
    assert [(row["p_m"], row["steps"]) for row in (first, second, third)] == [
        (0.2, 6), (0.9, 4), (0.8, 3)]
    assert len(metrics(tmp_path / "masked")) == 4


def test_anew_does_not_lose_the_base_that_init_keeps(folder, base, tmp_path, monkeypatch):
    """Stopped before anything was written."""
    run(folder, base, tmp_path)
    best = tmp_path / "base/best.pt"

    def stopped(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Run, "load", stopped)
        run(folder, str(best), tmp_path, "--anew")
    assert run(folder, str(best), tmp_path, "--anew")["steps"] == 6
    assert same(weights(best), weights(base))


@pytest.mark.parametrize("save_every", ["3", "1"])
def test_a_run_that_diverged(folder, base, tmp_path, capsys, save_every):
    """Before it has saved anything it can be corrected in place; later it asks for another folder.
    Its row says what happened; a base that diverges ends the command."""
    words = ["--save_every", save_every]
    row = run(folder, base, tmp_path / "a", *words, "--lr", "1e30")
    line = "a/masked: the loss is not finite at step 2; try a smaller --lr"
    assert line in capsys.readouterr().out
    assert row["val_reward"] is row["test_reward"] is None and row["steps"] == 2
    if save_every == "1":
        line = refused(capsys, *command(folder, base, tmp_path / "a", *words))
        assert "masked: holds a run of another config (lr)" in line
        words.append("--anew")
    assert run(folder, base, tmp_path / "a", *words)["val_reward"] is not None
    words = merge(*TINY, "--data", folder, "--out", str(tmp_path / "b"), "--base_lr", "1e30")
    line = refused(capsys, *words)
    assert line.endswith("base: the loss is not finite at step 2; try a smaller --base_lr")


def test_a_run_keeps_out_of_what_is_not_its_own(folder, base, tmp_path, capsys):
    """Another config, data set or base, foreign files, a run of another kind: one line, and all
    stays."""
    run(folder, base, tmp_path / "run")
    compare = merge(*TINY, "--data", folder, "--settings", "masked", "--steps", "1",
                    "--out", str(tmp_path / "compare"))
    train.main(compare)
    other_base, other_data = str(tmp_path / "other.pt"), str(tmp_path / "data")
    changed = state(base)
    changed["model"]["wte.weight"] *= 2
    torch.save(changed, other_base)
    shutil.copytree(folder, other_data)
    records = data.load_records(f"{folder}/train.jsonl")
    data.save_records(records[::-1], f"{other_data}/train.jsonl")
    for name, file, text in (("foreign", "thesis.tex", ""), ("broken", "config.json", "{"),
                             ("theirs", "config.json", '{"model_type": "bert"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    everything = files(tmp_path)
    here = tmp_path / "run"
    for words, expected in (
            (command(folder, base, here, "--K", "5"), "masked: holds a run of another config (K)"),
            (command(other_data, base, here), "base: holds a run of another config (data_hash)"),
            (command(folder, other_base, here), "base: holds a run of another config (base_hash)"),
            (command(folder, base, here / "masked"), "another config (mode)"),
            (command(folder, base, here / "base", "--anew"), "another config (mode)"),
            (merge(*compare, "--settings", "online", "--base_lr", "0.1"),
             "base: holds a run of another config (base_lr, lr)"),
            (command(folder, base, tmp_path / "foreign"), "holds thesis.tex, and is no run"),
            (command(folder, base, tmp_path / "foreign", "--anew"), "holds thesis.tex, and is no"),
            (command(folder, base, tmp_path / "theirs"), "holds config.json, and is no run"),
            (command(folder, base, tmp_path / "broken"), "expected JSON"),
            (command(folder, base, tmp_path / "foreign/thesis.tex"), "thesis.tex: cannot be"),
            (command(folder, base, tmp_path / "foreign/thesis.tex/o"), "cannot be written (Not a"),
            (command(folder, base, "/proc/nowhere"), "/proc/nowhere: cannot be written")):
        assert expected in refused(capsys, *words)
        assert files(tmp_path) == everything, expected


@pytest.mark.parametrize("busy", ["", "base", "masked"])
def test_two_commands_at_once_are_refused(folder, base, tmp_path, capsys, busy):
    """While another process is at work in one of its folders; once it has gone, it runs."""
    fcntl = pytest.importorskip("fcntl")
    if busy:
        run(folder, base, tmp_path)
    with open(tmp_path / busy / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = refused(capsys, *command(folder, base, tmp_path))
        assert f"{tmp_path / busy}: another process is at work there" in line
    assert run(folder, base, tmp_path)["steps"] == 6


def test_a_command_killed_while_it_makes_its_folders_can_begin(folder, base, tmp_path):
    os.makedirs(tmp_path / "seed0/base")
    for place in (".lock", "seed0/base/.lock", "config.json.tmp"):
        (tmp_path / place).write_text("")
    run(folder, base, tmp_path)
