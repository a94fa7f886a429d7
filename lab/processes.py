"""Several processes, started by torchrun: each learns from batches of its own, all hold the same
weights. Process 0 alone evaluates, prints and writes. With one process nothing here does anything.
"""
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

from data import InputError


working_alone = False  # is this process at a batch of its own, so that only it knows of an error?


class Gone(Exception):
    """Another process of this run has ended, so that this one cannot go on."""


@contextmanager
def alone():
    """Around an update: an InputError there may be known to this process only."""
    global working_alone
    working_alone = True
    yield
    working_alone = False


@contextmanager
def exchange():
    """Around every exchange: what a lost process makes torch raise becomes Gone."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise Gone(str(e)) from None


def started() -> int:
    """How many processes torchrun has started; 1 without it, whatever WORLD_SIZE may say."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def begin(device: str) -> None:
    """Join the other processes, if torchrun started any: nccl between GPUs, else gloo."""
    if started() == 1 or dist.is_initialized():
        return
    gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        dist.init_process_group("nccl" if gpu else "gloo")
    except (ValueError, RuntimeError) as e:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot meet "
                         f"({str(e).splitlines()[0]:.80}); expected torchrun") from None
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Does this process speak for all? Known before they have met."""
    return started() == 1 or os.environ.get("RANK", "0") == "0"


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: list[float], device) -> list[float]:
    """Sums over the processes, of numbers that float64 holds."""
    if size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    with exchange():
        dist.all_reduce(sums)
    return sums.tolist()


def any_of(value: bool, device) -> bool:
    return any(total([value], device))


def average_gradients(model: torch.nn.Module) -> None:
    """Every gradient becomes its mean over the processes, in one exchange."""
    if size() == 1:
        return
    parameters = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in parameters])
    with exchange():
        dist.all_reduce(flat)
    flat /= size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)


def first(work, *args):
    """Process 0 calls work(*args); every process gets what it returns, or its InputError."""
    if size() == 1:
        return work(*args)
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work(*args)
        except InputError as e:
            outcome[1] = str(e)
    with exchange():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]
