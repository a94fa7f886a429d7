"""Several processes: the gradient of one with --accumulate, one set of files, and how all end."""
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

import train
import torch

from data import InputError
from lab import files as lab_files
from lab import processes, task
from lab import run as lab_run
from runs import (ROOT, SETTINGS, Child, base, built, command, flags_of, folder,  # noqa: F401
                  metrics, read_rows, refused, run, same, state, weights)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def group(work, folder, size=2) -> list[tuple[int, str, str]]:
    """work(rank) in processes that find each other as torchrun's do -> how each of them ended.

    None hangs: after five minutes all are ended, which no test takes for an answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def body(rank):
        signal.alarm(300)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                          TORCHELASTIC_RUN_ID="test")
        work(rank)
    return [child.end() for child in
            [Child(lambda rank=rank: body(rank), f"{folder}/{rank}") for rank in range(size)]]


# --- Two processes are one with --accumulate 2 ----------------------------------------------------

def close(a: dict, b: dict, atol: float) -> bool:
    return all(torch.allclose(a[key], b[key], atol=atol) for key in a)


def test_two_processes_have_gradient_texts_and_samples_of_accumulate_2(folder, base, tmp_path):
    """Every setting, two updates: the second one reads the samples of the first, if they serve two.
    Both processes have the same weights, to the bit."""
    def two_updates(name, *flags):
        runner, batches = built(name, folder, base, *flags)
        runner.optimizer = torch.optim.SGD(runner.policy.model.parameters(), lr=0.1)
        runner.step = runner.cfg.refresh  # where the first texts are sampled
        logs = train.update(runner, batches) + train.update(runner, batches)
        held = runner.written, {slot: held["tokens"] for slot, held in runner.samples.items()}
        values = [float(log.get("rl", log.get("mle"))) for log in logs]
        return runner.policy.model.state_dict(), held, values

    def work(rank):
        processes.begin("cpu")
        torch.save({name: two_updates(name) for name in SETTINGS}, tmp_path / f"{rank}.pt")
        processes.end()
    assert [code for code, _, _ in group(work, tmp_path)] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in SETTINGS:
        one, held, losses = two_updates(name, "--accumulate", "2")
        assert same(first[name][0], second[name][0]) and not same(one, weights(base)), name
        assert close(one, first[name][0], 1e-6), name
        for mine, a, b in zip(held, first[name][1], second[name][1]):
            assert same(mine, a | b) and a.keys() <= {0} and b.keys() <= {1}, name
        assert losses[0::2] == pytest.approx(first[name][2], abs=1e-5), name
        assert losses[1::2] == pytest.approx(second[name][2], abs=1e-5), name


@pytest.mark.parametrize("name", ["online reuse", "refresh many"])
@pytest.mark.parametrize("first", ["one", "two"])
def test_a_run_goes_on_in_the_other_form(folder, base, tmp_path, capsys, first, name):
    """Stopped inside a period of three updates by a signal to one of two processes, finished by one
    process with --accumulate 2; and the reverse. Process 0 alone prints and writes."""
    words, cut, setting = flags_of(name), tmp_path / "cut", name.split()[0]

    def start(rank, *more, stop=False):
        count = train.Run.count

        def count_and_signal(self, logs):
            if self.base and self.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return count(self, logs)
        if stop:
            train.Run.count = count_and_signal
        if rank == 1:
            lab_files.write_whole = task.write_whole = lab_run.write_json = None  # none of these
        run(folder, base, cut, *words, *more)
    if first == "two":
        (code, _, err), other = group(lambda rank: start(rank, stop=rank == 1), tmp_path)
        assert code == 130 and "step 4 is saved" in err and other == (130, "", "\n")
        line = refused(capsys, *command(folder, base, cut, *words))
        assert "another config (accumulate)" in line
        start(0, "--accumulate", "2")
    else:
        one = Child(lambda: start(0, "--accumulate", "2", stop=True), tmp_path / "child")
        assert one.end()[0] == 130 and group(start, tmp_path)[1] == (0, "", "")
    run(folder, base, tmp_path / "whole", *words, "--accumulate", "2")
    whole, cut = tmp_path / "whole" / setting, cut / setting
    for a, b in zip(metrics(whole), metrics(cut), strict=True):
        assert (a["step"], a["fp"], a["tokens"]) == (b["step"], b["fp"], b["tokens"])
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-4)
    assert close(*(weights(out / "ckpt.pt") for out in (whole, cut)), 2e-5)


# --- How all begin, wait and end ------------------------------------------------------------------

@pytest.mark.parametrize("slow", ["check", "write"])
def test_all_look_at_the_folder_before_one_writes_and_read_after_it(folder, base, tmp_path, slow):
    """A fresh start, in which process 1 looks late; and --anew, in which process 0 removes the old
    checkpoints late."""
    if slow == "write":
        run(folder, base, tmp_path / "o")

    def late(name, seconds):
        function = getattr(lab_run, name)
        setattr(lab_run, name, lambda *args: time.sleep(seconds) or function(*args))

    def work(rank):
        if rank == 0:
            late("write_json" if slow == "check" else "begin_folder", 1.0)
        elif slow == "check":
            late("check_folder", 0.5)
        run(folder, base, tmp_path / "o", "--anew")
    assert [(code, err) for code, _, err in group(work, tmp_path)] == [(0, ""), (0, "")]
    assert read_rows(tmp_path / "o")[-1]["steps"] == 6


@pytest.mark.parametrize("patience, code", [(None, 0), (timedelta(seconds=2), 2)])
def test_the_others_wait_while_process_0_evaluates(folder, base, tmp_path, monkeypatch, patience,
                                                   code):
    """A reward that takes four seconds. With a patience of two, instead of ours, it would end the
    run: that is how long the group really waits."""
    (tmp_path / "slow.py").write_text(
        "import os, time\ndef f(hypotheses, references, sources):\n"
        "    if not os.path.exists('slept'):\n        open('slept', 'w')\n        time.sleep(4)\n"
        "    return [0.5] * len(hypotheses)\n")
    monkeypatch.chdir(tmp_path)
    assert processes.PATIENCE > timedelta(days=1)
    monkeypatch.setattr(processes, "PATIENCE", patience or processes.PATIENCE)
    words = ["--reward", "slow:f", "--steps", "1"]
    (first, *_), (second, _, err) = group(lambda rank: run(folder, base, "o", *words), tmp_path)
    assert second == code and (code == 0) == (first == 0)
    assert ("another process of this run has stopped" in err) == (code == 2)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(folder, base, tmp_path, victim):
    """And the same command goes on from the last saved state."""
    def work(rank):
        update = train.update

        def dies(runner, batches):
            if rank == victim and runner.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(runner, batches)
        train.update = dies
        run(folder, base, tmp_path / "o", "--save_every", "1")
    ended = group(work, tmp_path)
    assert ended[victim][0] == -signal.SIGKILL
    code, _, err = ended[1 - victim]
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "another process of this run has stopped" in err
    assert state(tmp_path / "o/masked/ckpt.pt")["step"] == 4
    assert run(folder, base, tmp_path / "o", "--accumulate", "2")["steps"] == 6


@pytest.mark.parametrize("body, code, expected", [
    ("return [float('nan')] * len(hypotheses)", 2, "process 1: reward 'one_sided:f' returned nan"),
    ("raise ConnectionError('no server')", 1, "ConnectionError: no server"),
])
def test_an_error_of_one_process_is_printed_by_it(folder, base, tmp_path, monkeypatch, body, code,
                                                  expected):
    """The other one says that there was one."""
    (tmp_path / "one_sided.py").write_text(
        f"import os\ndef f(hypotheses, references, sources):\n"
        f"    if os.environ.get('RANK') == '1':\n        {body}\n"
        f"    return [0.5] * len(hypotheses)\n")
    monkeypatch.chdir(tmp_path)
    (first, _, said), (second, _, err) = group(
        lambda rank: run(folder, base, tmp_path / "o", "--reward", "one_sided:f"), tmp_path)
    assert (first, second) == (2, code) and expected in err
    assert len(said.strip().splitlines()) == 1 and "see what it printed" in said


@pytest.mark.parametrize("words, expected", [
    (["--data", "nowhere"], "no such folder"),
    (["--mode", "sample", "--init", "x.pt"], "--mode sample: one process does that"),
])
def test_a_mistake_that_all_have_is_a_line_of_each(tmp_path, words, expected):
    (first, _, err), other = group(lambda rank: train.main(words), tmp_path)
    assert first == 2 and expected in err and len(err.strip().splitlines()) == 1
    assert other[:2] == (2, "") and other[2].count("train.py: ") == 1  # torch may say who has gone


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    for name, value in (("is_available", True), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="more processes than the 1 GPUs .* --nproc_per_node=1"):
        processes.begin("auto")


def test_a_run_that_diverges_is_a_row_of_both(folder, base, tmp_path):
    ended = group(lambda rank: run(folder, base, tmp_path / "o", "--lr", "1e30"), tmp_path)
    assert [code for code, _, _ in ended] == [0, 0] and read_rows(
        tmp_path / "o")[-1]["val_reward"] is None


# --- Started by torchrun itself -------------------------------------------------------------------

def torchrun(*flags):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen([*start, "train.py", *flags], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_torchrun_ends_with_the_reason_and_starts_afresh(folder, base, tmp_path, monkeypatch):
    """That of the process that failed, not of those that it has left alone."""
    (tmp_path / "one_sided.py").write_text(
        "import os\ndef f(hypotheses, references, sources):\n"
        "    return [2.0 * int(os.environ['RANK'])] * len(hypotheses)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wrong = command(folder, base, tmp_path / "wrong", "--reward", "one_sided:f")
    for words, reason in ((["--p_n", "0.3"], "unrecognized arguments: --p_n"),
                          (wrong, "process 1: reward 'one_sided:f' returned 2.0")):
        process = torchrun(*words)
        _, err = process.communicate(timeout=300)
        assert process.returncode != 0 and reason in err.splitlines()[-2], err
    for i in range(3):
        process = torchrun(*command(folder, base, tmp_path / str(i), "--steps", "1"))
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_the_run(folder, base, tmp_path):
    """All end within a minute, with a code that is not 0 and one line; the same command finishes
    the run."""
    words = command(folder, base, tmp_path / "o", "--steps", "300", "--eval_every", "100",
                    "--save_every", "5")
    process, ckpt = torchrun(*words), tmp_path / "o/masked/ckpt.pt"
    deadline = time.time() + 300
    while not ckpt.exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("is saved in") == 1, err
    assert state(ckpt)["step"] < 300
    assert torchrun(*words).wait(timeout=300) == 0
    assert [line["step"] for line in metrics(ckpt.parent)] == list(range(301))
