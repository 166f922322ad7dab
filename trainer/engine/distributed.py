"""The only file that calls torch.distributed. Everything else is handed a World, or ranks as integers; what only
DeepSpeed can gather it gathers in deepspeed.py and ema.py."""

import contextlib
import datetime
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from controlbooth.data.processes.parent import end_with_agent

TIMEOUT = datetime.timedelta(minutes=30)
"""Longer than the slowest thing that one rank does alone, such as indexing shards of others."""
PATIENCE = datetime.timedelta(days=365)
"""Longer than any rank still works when another has ended."""


DistError = dist.DistError
"""What PyTorch raises where ranks do not find each other, such as a port that is taken."""


@dataclass(frozen=True)
class World:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    ranks_per_node: int = 1


def join() -> World:
    """Joins the ranks that torchrun (or the deepspeed launcher) started; started by hand, the world is one rank.

    Tensors on the CPU go through gloo on every machine, so that counters and flags need no accelerator. From here on
    the rank gets SIGTERM when its torchrun agent ends. Raises ProcessLookupError where that has ended already.
    """
    end_with_agent()
    allow_open_files()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    local_rank = int(os.environ["LOCAL_RANK"])
    backend = "gloo"
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        repeat_exactly()
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=TIMEOUT)
    # torchrun's name for it, and the deepspeed launcher's
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, ranks_per_node)


def allow_open_files() -> None:
    """Raises this process's limit of open files to the highest that the system lets it have.

    A rank has a connection to every other one, and a thousand of them are more than the usual limit of 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS calls a limit infinite that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def repeat_exactly() -> None:
    """Makes a GPU give the same bits for the same work, so that a resumed run is the one that went on.

    To be called before the first work on the GPU. Where PyTorch has no such kernel it raises: told only to warn, it
    would take flash and efficient attention with atomic additions, although both can do without.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """Ends a rank that has left, without tearing Python down: threads of gloo and DeepSpeed that are still about then
    abort the process now and then (exit code -6), and torchrun would call a finished run failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def barrier() -> None:
    all_sum([0.0])  # through gloo, on the CPU: a barrier of the default backend would need the accelerator


def all_rows(values: Sequence[float]) -> list[list[float]]:
    """Gives every rank the values of all ranks, in float64: a row for each rank, in their order.

    One collective for whatever is made of them, sums and maxima alike.
    """
    mine = torch.tensor(values, dtype=torch.float64)
    rows = torch.empty(dist.get_world_size(), len(values), dtype=torch.float64)
    dist.all_gather(list(rows.unbind()), mine)
    return rows.tolist()


def all_sum(values: Sequence[float]) -> list[float]:
    """Sums each value over all ranks, in float64. Every rank gets the same numbers, bit for bit."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor.tolist()


def patient_group() -> Any:
    """Makes a group of all ranks for a `gather_objects` after work that takes each rank its own time, be it days.

    Every rank calls this before that work, while the ranks are still together, since they wait for each other to
    connect. A rank that dies ends the others' wait: its connections are closed.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gather_objects(value: Any, world: World, group: Any = None) -> list[Any]:
    """Returns the values of all ranks, in the order of ranks, on every rank. For small values: they are pickled.

    group: by default one whose ranks wait for each other no longer than TIMEOUT. Raises RuntimeError after that.
    """
    if world.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, value, group)
    return gathered


def from_first_rank(value: Any) -> Any:
    """Returns the value of rank 0 on every rank. For small values: they are pickled."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def sum_tensor(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor
