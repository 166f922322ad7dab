"""The only file that calls torch.distributed. Everything else is handed a World, or ranks as integers; what only
DeepSpeed can gather it gathers in deepspeed.py and ema.py."""

import contextlib
import datetime
import os
import pickle
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from controlbooth.data.errors import UserError
from controlbooth.data.processes.parent import end_with_agent

TIMEOUT = datetime.timedelta(minutes=30)
"""Longer than the slowest thing that one rank does alone, such as indexing shards of others."""
PATIENCE = datetime.timedelta(days=365)
"""Longer than any rank still works when another has ended."""
T = TypeVar("T")


DistError = dist.DistError
"""What PyTorch raises where ranks do not find each other, such as a port that is taken."""


@dataclass(frozen=True)
class World:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    ranks_per_node: int = 1


def join(deterministic: bool = True, tf32: bool = False) -> World:
    """Joins the ranks that torchrun (or the deepspeed launcher) started; started by hand, the world is one rank.

    Tensors on the CPU go through gloo on every machine, so that counters and flags need no accelerator. From here on
    the rank gets SIGTERM when its torchrun agent ends. deterministic, tf32: how a GPU computes, as EngineConfig has
    them. Raises ProcessLookupError where the agent has ended already.
    """
    end_with_agent()
    allow_open_files()
    # gloo connects two ranks when one first sends to the other, and not each with all others at the start
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
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
        set_arithmetic(deterministic, tf32)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=TIMEOUT)
        barrier()  # connects it: whoever waits for a rank that dies later is told by the connection
    # torchrun's name for it, and the deepspeed launcher's
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, ranks_per_node)


def allow_open_files() -> None:
    """Raises this process's limit of open files to the highest that the system lets it have.

    The usual limit is 1,024, and a rank has shards, the base, and connections to others open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS calls a limit infinite that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def set_arithmetic(deterministic: bool, tf32: bool) -> None:
    """Makes a GPU give the same bits for the same work, so that a resumed run is the one that went on, or else has it
    take whichever kernels it finds fastest. tf32: whether float32 is multiplied in TF32.

    To be called before the first work on the GPU. Where PyTorch has no kernel that repeats itself it raises: told only
    to warn, it would take flash and efficient attention with atomic additions, although both can do without.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = not deterministic  # it times kernels, and may choose others at another start
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
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
    _rows(torch.zeros(1))  # through gloo, on the CPU: a barrier of the default backend would need the accelerator


def all_rows(values: Sequence[float], group: Any = None) -> list[list[float]]:
    """Gives every rank the values of all ranks, in float64: a row for each rank, in their order.

    For whatever is made of them, sums and maxima alike. Every rank gets the same numbers, bit for bit.
    """
    return _rows(torch.tensor(values, dtype=torch.float64), group).tolist()


def gather_rows(row: Tensor) -> Tensor:
    """Gives every rank the values of all ranks, (ranks, values): a row for each, in their order.

    row: (values,), on the ranks' device: a GPU's go through NCCL, so that nothing waits for them.
    """
    if not row.is_cuda:
        return _rows(row)
    rows = row.new_empty(dist.get_world_size() * row.numel())
    dist.all_gather_into_tensor(rows, row)
    return rows.view(dist.get_world_size(), -1)


def own_share(flat: Tensor) -> Tensor:
    """Returns this rank's view of a flat tensor of as many equal shares as there are ranks, in the order of ranks."""
    return flat.view(dist.get_world_size(), -1)[dist.get_rank()]


def sum_into_shares(flat: Tensor) -> Tensor:
    """Sums a flat tensor over all ranks, of which each gets its own share, a view of the tensor; the other shares are
    left as they were. flat: as in `own_share`."""
    share = own_share(flat)
    if dist.get_world_size() > 1:
        dist.reduce_scatter_tensor(share, flat)
    return share


def gather_shares(flat: Tensor) -> None:
    """Fills a flat tensor, as in `own_share`, with the share that each rank has in its own."""
    if dist.get_world_size() > 1:
        dist.all_gather_into_tensor(flat, own_share(flat))


@dataclass(frozen=True)
class Sharing:
    """Ranks of which each keeps a part of what all of them need."""

    group: Any
    rank: int
    """This rank's place among them."""
    ranks: int


def sharing_of(world: World, scope: str) -> Sharing | None:
    """Makes groups of their own of the ranks of each node, or of all ranks, and returns this rank's; None where it
    would be alone. Every rank calls this.

    scope: node or world. The groups have connections of their own, so that what they gather ahead of its use runs
    beside other collectives. Raises UserError where nodes have different numbers of ranks.
    """
    size = world.ranks_per_node if scope == "node" else world.world_size
    if world.world_size % size:
        raise UserError(
            f"model.frozen.shards=node needs nodes with equally many ranks, and {world.world_size} ranks are not a "
            f"multiple of {size}, the ranks of this node: set model.frozen.shards=world"
        )
    if size == 1:
        return None
    firsts = range(0, world.world_size, size)
    groups = [dist.new_group(list(range(first, first + size)), timeout=TIMEOUT) for first in firsts]
    return Sharing(groups[world.rank // size], world.rank % size, size)


def gather_later(whole: Tensor, share: Tensor, sharing: Sharing) -> Any:
    """Begins to fill `whole` with the shares of all ranks, in their order; returns what to call `wait` of.

    whole (ranks * n,) and share (n,), uint8 on the ranks' device. Every rank of the group calls this, in one order.
    """
    return dist.all_gather_into_tensor(whole, share, group=sharing.group, async_op=True)


def all_sum(values: Sequence[float]) -> list[float]:
    """Sums each value over all ranks, in float64. Every rank gets the same numbers, bit for bit."""
    rows = _rows(torch.tensor(values, dtype=torch.float64)).tolist()
    return [sum(column) for column in zip(*rows, strict=True)]


def _rows(own: Tensor, group: Any = None) -> Tensor:
    """Gathers the tensors of all ranks, (k,) on the CPU and each of one size, as (ranks, k), in the order of ranks.

    A rank sends all that it has to the rank before it, then to the one two places before it, then four, and so on, and
    so has twice as much after each round (Bruck et al., 1997, "Efficient algorithms for all-to-all communications"). It
    takes log2 of the ranks, in rounds and in connections; gloo's own takes the ranks, one after the other in a ring.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    rows = own.new_empty(ranks, len(own))  # row i is of the rank i places behind this one
    rows[0] = own
    have = 1
    while have < ranks:
        more = min(have, ranks - have)
        to, source = (rank - have) % ranks, (rank + have) % ranks
        sent = dist.isend(rows[:more], to, group)
        received = dist.irecv(rows[have : have + more], source, group)
        for work in (sent, received):
            assert work is not None, "this rank is in the group"
            work.wait()
        have += more
    return rows.roll(rank, 0)


def patient_group() -> Any:
    """Makes a group of all ranks for a `gather_objects` after work that takes each rank its own time, be it days.

    Every rank calls this before that work, while the ranks are still together, since they wait for each other to
    connect. A rank that dies ends the others' wait: its connections are closed.
    """
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    _rows(torch.zeros(1), group)  # connects it
    return group


def gather_objects(value: Any, world: World, group: Any = None) -> list[Any]:
    """Returns the values of all ranks, in the order of ranks, on every rank. For small values: they are pickled.

    group: by default one whose ranks wait for each other no longer than TIMEOUT. Raises RuntimeError after that.
    """
    if world.world_size == 1:
        return [value]
    own = pickle.dumps(value)
    sizes = [int(size) for (size,) in all_rows([len(own)], group)]
    padded = torch.frombuffer(bytearray(own.ljust(max(sizes), b"\0")), dtype=torch.uint8)
    return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(_rows(padded, group), sizes, strict=True)]


def from_first_rank(value: Any) -> Any:
    """Returns the value of rank 0 on every rank. For small values: they are pickled."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_first_rank(compute: Callable[[], T], world: World) -> T:
    """Computes a small value on rank 0 and returns it on every rank; what the disk says is asked once so, by one rank.

    ValueError and OSError, as of wrong input, are raised on every rank alike.
    """
    answer: Any = None
    if world.rank == 0:
        try:
            answer = compute()
        except (ValueError, OSError) as error:
            if world.world_size == 1:
                raise
            answer = error
    if world.world_size > 1:
        answer = from_first_rank(answer)
    if isinstance(answer, ValueError | OSError):
        raise answer
    return answer


def sum_tensor(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor
