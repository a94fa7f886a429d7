"""Several processes: the gradient of one with --accumulate, one set of files, and how all end."""
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import train
import torch

from lab import files, policy, processes, report
from runs import (ROOT, Child, base, built, command, flags_of, folder,  # noqa: F401
                  metrics, refused, run, same, state, weights)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
SAMPLED = {  # settings whose forward propagations differ, KL among them
    "credit": ("--kl_weight", "0.1"), "online": (), "offline": (), "mle": (), "full random": (),
}


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


@pytest.mark.parametrize("name", SAMPLED)
def test_two_processes_have_gradient_and_texts_of_accumulate_2(folder, base, tmp_path, name):
    """A step of SGD with rate 1 is the gradient; both processes have the same one, to the bit."""
    def step(*flags):
        runner, batches, reward = built(name, folder, base, *SAMPLED[name], *flags)
        runner.optimizer = torch.optim.SGD(runner.policy.model.parameters(), lr=1.0)
        runner.step = runner.cfg.refresh  # where the first texts are sampled
        logs = train.update(runner, batches, reward)
        texts = [batch.static for _, batch in sorted(batches.current.items())]
        return runner.policy.model.state_dict(), texts, [log["rl"] for log in logs]

    def work(rank):
        processes.begin("cpu")
        torch.save(step(), tmp_path / f"{rank}.pt")
        processes.end()
    assert [code for code, _, _ in group(work, tmp_path)] == [0, 0]
    one, texts, losses = step("--accumulate", "2")
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same(two[0][0], two[1][0])
    assert max((one[key] - two[0][0][key]).abs().max() for key in one) < 1e-6
    assert not same(one, weights(base)) and len(texts) == 2
    for rank in range(2):
        assert torch.equal(texts[rank], two[rank][1][0])
        assert losses[rank] == pytest.approx(two[rank][2][0].item(), abs=1e-5)


def test_accumulated_batches_are_those_of_one_large_mean(folder, base):
    """The gradient of two batches is the mean of the gradients of each, taken alone."""
    runner, batches, reward = built("online", folder, base, "--accumulate", "2")
    grads = []
    for i in range(2):
        train.loss(runner, batches, reward, i)[0].backward()
        grads.append([p.grad.clone() for p in runner.policy.model.parameters()])
        runner.policy.model.zero_grad()
    runner.optimizer = torch.optim.SGD(runner.policy.model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in runner.policy.model.parameters()]
    mean = [(a + b) / 2 for a, b in zip(*grads)]
    norm = torch.stack([g.norm() for g in mean]).norm()
    train.update(runner, batches, reward)
    for old, new, g in zip(before, runner.policy.model.parameters(), mean):
        assert torch.allclose(old - new, g * min(1.0, train.CLIP / norm), atol=1e-6)


def close(a, b, atol=2e-5) -> bool:
    return all(torch.allclose(a[key], b[key], atol=atol) for key in a)


def test_two_processes_are_one_run(folder, base, tmp_path):
    """Six updates: the weights of one process to rounding, its counts, a whole log; only process 0
    prints and writes."""
    words = flags_of("credit")

    def work(rank):
        if rank > 0:
            files.write_whole = policy.write_whole = report.write_text = None  # no such thing
        run(folder, base, tmp_path / "two", *words)
    (code, out, err), other = group(work, tmp_path)
    assert (code, err) == (0, "") and out.count("setting  p_m") == 1
    assert other == (0, "", "")
    one = run(folder, base, tmp_path / "one", *words, "--accumulate", "2")
    two = run(folder, base, tmp_path / "two", *words, "--accumulate", "2")  # read: it is finished
    assert {k: v for k, v in one.items() if isinstance(v, int)} == {
        k: v for k, v in two.items() if isinstance(v, int)}
    assert close(weights(tmp_path / "one/ckpt.pt"), weights(tmp_path / "two/ckpt.pt"))
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert (a["fp"], a["tokens"]) == (b["fp"], b["tokens"])
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-4)


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_run_goes_on_in_the_other_form(folder, base, tmp_path, capsys, first):
    """Begun by two processes and stopped by a signal that one of them gets, finished by one; and
    the reverse. config.json holds how many batches an update has."""
    words = [*flags_of("refresh"), "--save_every", "1"]
    cut = tmp_path / "cut"

    def two(stop):
        def work(rank):
            log = train.Run.count

            def count_and_signal(self, logs):
                row = log(self, logs)
                if rank == stop and self.step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                return row
            train.Run.count = count_and_signal
            run(folder, base, cut, *words)
        return group(work, tmp_path)

    def one():
        return run(folder, base, cut, *words, "--accumulate", "2")
    if first == "two":
        ended = two(stop=1)
        assert [code for code, _, _ in ended] == [130, 130]
        assert "step 4 is saved" in ended[0][2] and not ended[1][2].strip()
        assert "another config (accumulate)" in refused(capsys, *command(folder, base, cut, *words))
        train.main(["--resume", str(cut)])
    else:
        assert Child(lambda: stopped_at(3, one), tmp_path / "child").end()[0] == 130
        assert [code for code, _, _ in two(stop=None)] == [0, 0]
    run(folder, base, tmp_path / "whole", *words, "--accumulate", "2")
    assert [line["step"] for line in metrics(cut)] == list(range(7))
    assert close(weights(cut / "ckpt.pt"), weights(tmp_path / "whole/ckpt.pt"))


def stopped_at(step, work):
    log = train.Run.log

    def log_and_signal(self, row):
        log(self, row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)
    train.Run.log = log_and_signal
    work()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(folder, base, tmp_path, victim):
    """And the same command goes on from the last saved state."""
    def work(rank):
        update = train.update

        def dies(runner, *rest):
            if rank == victim and runner.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(runner, *rest)
        train.update = dies
        run(folder, base, tmp_path / "o", "--save_every", "1")
    ended = group(work, tmp_path)
    assert ended[victim][0] == -signal.SIGKILL
    code, _, err = ended[1 - victim]
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "another process of this run has stopped" in err
    assert state(tmp_path / "o/ckpt.pt")["step"] == 4
    assert run(folder, base, tmp_path / "o", "--save_every", "1", "--accumulate", "2")["steps"] == 6


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
    assert len(said.strip().splitlines()) == 1 and "another process of this run" in said


@pytest.mark.parametrize("flags, expected", [
    (["--p_n", "0.3"], "unknown flag"), (["--K", "0"], "--K 0: expected"),
    (["--data", "nowhere"], "no such folder"), (["--lr", "1e30"], "the loss is not finite"),
    (["--mode", "sample"], "--mode sample: one process does that"),
])
def test_a_mistake_that_all_have_is_a_line_of_each(folder, base, tmp_path, flags, expected):
    words = command(folder, base, tmp_path / "o", *flags)
    if "sample" in flags:
        words = ["--mode", "sample", "--init", base]
    (first, _, err), other = group(lambda rank: train.main(words), tmp_path)
    assert first == 2 and expected in err and len(err.strip().splitlines()) == 1
    assert other[:2] == (2, "") and other[2].count("train.py: ") == 1  # torch may say who has gone


def test_world_size_without_torchrun_says_nothing(folder, base, tmp_path):
    def work():
        os.environ["WORLD_SIZE"] = "2"
        train.main(command(folder, base, tmp_path / "o", "--steps", "1"))
    assert Child(work, tmp_path / "child").end()[::2] == (0, "")


# --------------------------------------------------------------------------------------------------
# Started by torchrun itself


def torchrun(*flags):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen([*start, "train.py", *flags], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_torchrun_says_a_mistake():
    process = torchrun("--p_n", "0.3")
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and 1 <= err.count("unknown flag '--p_n'") <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_torchrun_survives_neither_but_the_run_does(folder, base, tmp_path, kind):
    """SIGKILL to a worker, SIGINT to torchrun: all end within a minute, with a code that is not 0
    and the line that belongs to it; the same command finishes the run."""
    words = command(folder, base, tmp_path / "o", "--steps", "300", "--eval_every", "100",
                    "--save_every", "5")
    process = torchrun(*words)
    deadline = time.time() + 120
    while not (tmp_path / "o/ckpt.pt").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    target = process.pid
    if kind == signal.SIGKILL:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        target = int(found.stdout.split()[-1])
    os.kill(target, kind)
    _, err = process.communicate(timeout=60)
    expected = {signal.SIGKILL: "another process of this run has stopped",
                signal.SIGINT: "is saved in"}[kind]
    assert process.returncode != 0 and err.count(expected) == 1, err
    before = state(tmp_path / "o/ckpt.pt")["step"]
    process = torchrun(*words)
    assert process.communicate(timeout=200) and process.returncode == 0
    assert before < 300 and [line["step"] for line in metrics(tmp_path / "o")] == list(range(301))
