"""Several processes by torchrun on a tiny model: the gradient of one process, one set of files, resume, a killed worker."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from test_train import TINY, base, folder, metrics, run, same, weights  # noqa: F401 (fixtures)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SETTINGS = {
    "refresh": ("--setting", "semi", "--refresh", "2", "--num_static", "3", "--num_stored", "1", "--static_credit", "0.5",
                "--kl_weight", "0.05"),
    "online": ("--setting", "online", "--micro_batches", "2"),
    "offline": ("--setting", "offline", "--num_static", "2"),
}


def torchrun(*flags, processes=2, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train.py"]
    return subprocess.Popen([*command, "--mode", "train", *TINY, *flags], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_have_the_gradient_of_one(folder, base, tmp_path, name):
    """A batch of 5 in shares of 2 and 3: Adam's first moment after one update is a tenth of the gradient."""
    flags = [*SETTINGS[name], "--batch_size", "5", "--steps", "1", "--clip", "0"]
    run(folder, base, tmp_path / "one", *flags)
    printed = torchrun("--data", folder, "--init", base, *flags, "--out", str(tmp_path / "two")).communicate(timeout=240)[0]
    one, two = (torch.load(tmp_path / n / "ckpt.pt", weights_only=True)["optimizer"]["state"] for n in ("one", "two"))
    gradients = [(10 * one[i]["exp_avg"], 10 * two[i]["exp_avg"]) for i in one]
    largest = max(float(a.abs().max()) for a, _ in gradients)
    assert largest > 1e-3
    assert max(float((a - b).abs().max()) for a, b in gradients) < 1e-6 * max(1.0, largest), (largest, printed)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(folder, base, tmp_path):
    """Six updates: the same weights to rounding, the same counts, a whole log; one process speaks."""
    flags = [*SETTINGS["refresh"], "--batch_size", "5"]
    one = run(folder, base, tmp_path / "one", *flags)
    process = torchrun("--data", folder, "--init", base, *flags, "--out", str(tmp_path / "two"))
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed
    two = json.load(open(tmp_path / "two/results.json"))[0]
    assert {k: v for k, v in two.items() if isinstance(v, int)} == {k: v for k, v in one.items() if isinstance(v, int)}
    a, b = weights(tmp_path / "one/ckpt.pt"), weights(tmp_path / "two/ckpt.pt")
    assert all((a[n] - b[n]).abs().max() < 2e-5 for n in a if a[n].is_floating_point())
    assert [m["step"] for m in metrics(tmp_path / "two")] == list(range(7))
    assert printed.count("test R") == 1


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_which_then_goes_on(folder, base, tmp_path):
    """SIGKILL to one of two: the other says so and ends within a minute; the same command finishes the run."""
    flags = ["--data", folder, "--init", base, "--setting", "semi", "--steps", "400", "--save_every", "5", "--out", str(tmp_path / "o")]
    process = torchrun(*flags)
    deadline = time.time() + 120
    while not (tmp_path / "o/ckpt.pt").exists() or len(metrics(tmp_path / "o")) < 8:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and ("another process of this run has stopped" in printed or "Signal 9" in printed)
    before = torch.load(tmp_path / "o/ckpt.pt", weights_only=True)["step"]
    process = torchrun(*flags)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and before < 400, printed
    assert [m["step"] for m in metrics(tmp_path / "o")] == list(range(401))


@pytest.mark.slow
def test_other_modes_and_small_batches_are_refused(folder, base, tmp_path):
    process = torchrun("--mode", "eval", "--init", base, "--data", folder)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and printed.count("expected python instead of torchrun") == 1, printed
    process = torchrun("--data", folder, "--init", base, "--batch_size", "1", "--out", str(tmp_path / "o"))
    assert "at least one for each of the 2 processes" in process.communicate(timeout=120)[0]
