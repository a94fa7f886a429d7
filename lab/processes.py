"""Several processes, started by torchrun: each learns from its own batches, all hold the same
weights. Process 0 alone evaluates and writes. With one process nothing here does anything."""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from data import InputError

# The others wait while process 0 evaluates, however long a reward takes. A process that is lost
# ends the run at once all the same: its connections close, and torchrun ends the rest.
PATIENCE = timedelta(days=7)


def begin(device: str) -> None:
    """Join the other processes, if torchrun started any: nccl between GPUs, else gloo."""
    if not dist.is_torchelastic_launched():
        return
    gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if gpu:
        place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= count:
            raise InputError(f"torchrun started more processes than the {count} GPUs of this "
                             f"machine; expected --nproc_per_node={count}, or --device cpu")
        torch.cuda.set_device(place)
    backend = "nccl" if gpu else "gloo"
    exchange(lambda: dist.init_process_group(backend, timeout=PATIENCE))
    meet()  # else process 0 could leave, for a mistake in a flag, while others still join
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def end() -> None:
    if dist.is_initialized():
        meet()  # the others wait for process 0, which writes the report
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def exchange(operation, *values) -> None:
    """An operation of torch.distributed. Raises InputError when a process has been lost."""
    try:
        operation(*values)
    except (RuntimeError, ValueError):
        os.environ.pop("TORCHELASTIC_ERROR_FILE", None)  # the reason is the other's to tell
        raise InputError("another process of this run has stopped, see what it printed; the last "
                         "saved state is kept, and the same command goes on from there") from None


def meet() -> None:
    """Wait until every process is here."""
    if size() > 1:
        exchange(dist.barrier)


def total(values: dict[str, float], device) -> dict[str, float]:
    """Sums over the processes, of numbers that float64 holds."""
    if size() == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    exchange(dist.all_reduce, sums)
    return dict(zip(values, sums.tolist()))


def average_gradients(model: torch.nn.Module) -> None:
    """Every gradient becomes its mean over the processes, in one exchange."""
    if size() == 1:
        return
    parameters = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in parameters])
    exchange(dist.all_reduce, flat)
    flat /= size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)


def gather(mine: dict) -> dict:
    """The entries of every process's dict, in one dict that every process gets."""
    if size() == 1:
        return mine
    parts = [None] * size()
    exchange(dist.all_gather_object, parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def first(work, *args):
    """Process 0 calls work(*args), and every process gets what it returns."""
    outcome = [work(*args) if rank() == 0 else None]
    if size() > 1:
        exchange(dist.broadcast_object_list, outcome)
    return outcome[0]
