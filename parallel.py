"""Several processes, started by torchrun: each takes a share of every batch, and all hold the same weights.

Losses are normalised by the whole batch, so gradients are summed, and W processes give the gradient of one (to rounding).
Process 0 alone evaluates, prints and writes files; the others follow, and read what it wrote. With one process every
function here does nothing.
"""
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Gone(Exception):
    """Another process of this run has ended, so that this one cannot go on."""


@contextmanager
def exchange():
    """Around every exchange: what a lost process makes torch raise becomes Gone."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise Gone(str(e)) from None


def begin(backend: str) -> None:
    """Join the other processes, if torchrun started any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group(backend)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until every process is here: after process 0 has written what the others read next."""
    if size() > 1:
        with exchange():
            dist.barrier()


def my_rows(B: int) -> range:
    """This process's share of B rows."""
    return range(B * rank() // size(), B * (rank() + 1) // size())


def total(values: list[float], device) -> list[float]:
    """Sums over the processes, of numbers that float64 holds."""
    if size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    with exchange():
        dist.all_reduce(sums)
    return sums.tolist()


def sum_gradients(model: torch.nn.Module) -> None:
    """Every parameter's gradient becomes the sum over the processes, in one exchange."""
    if size() > 1:
        parameters = list(model.parameters())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        with exchange():
            dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)


def all_rows(mine: torch.Tensor, B: int) -> torch.Tensor:
    """The whole batch's rows (B, ...) of ids, from each process's share of them."""
    if size() == 1:
        return mine
    whole = mine.new_zeros((B, *mine.shape[1:]))
    whole[my_rows(B).start:my_rows(B).stop] = mine
    with exchange():
        dist.all_reduce(whole)
    return whole


def same(value):
    """Process 0's value, in every process."""
    box = [value]
    if size() > 1:
        with exchange():
            dist.broadcast_object_list(box)
    return box[0]
