"""What a rank says when it cannot go on, and with which status it ends.

Every message names what to change, and the run itself stays as its latest checkpoint has it: the same start goes on.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from controlbooth.data.files.records import Damaged, is_text, read_json
from controlbooth.data.processes.parent import REFUSED
from controlbooth.data.secrets import error_text
from controlbooth.trainer.config.run import RunConfig, activation_problems
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run.attempt import Attempt, Superseded, write_text

STATUS = "status.json"
FAILED, SUPERSEDED, HUNG = 2, 3, 4
"""Exit statuses of a rank. torchrun makes 1 of all of them."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "std::bad_alloc")
"""In messages of PyTorch's CPU allocator, of libraries beside it, and of C++."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "Socket Timeout")
"""In gloo's messages, which are plain RuntimeErrors."""


class RankFailed(RuntimeError):
    """The machine or another rank ended this one; the message says what to do."""


class RankLost(RankFailed):
    """Another rank, its machine or the network has gone: the next start may well succeed."""


class RankHung(RankFailed):
    """No step was passed for too long, here or on a rank that this one waits for: likewise."""


@contextlib.contextmanager
def failure_noted(attempt: Attempt, config: RunConfig, world: World) -> Iterator[None]:
    """Writes any error that ends the block, except Superseded, to failed-RANK.json, and from rank 0 to status.json.
    Raises RankFailed in place of an error that needs an explanation."""
    try:
        yield
    except Superseded:
        raise
    except Exception as error:
        told = explain(error, config, world.rank)
        note_failure(attempt, world.rank, told or error)
        if told is not None:
            raise told from error
        raise


def explain(error: Exception, config: RunConfig, rank: int) -> RankFailed | None:
    """Explains an error of the machine's memory or of another rank in words; returns None where the error speaks for
    itself."""
    first_line = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, OSError))
        and (getattr(error, "errno", None) == errno.ENOMEM or any(text in str(error) for text in OUT_OF_MEMORY))
    ):
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        memory = "GPU memory" if on_gpu else "memory of the machine"
        said = f" ({first_line})" if first_line else ""
        return RankFailed(
            f"rank {rank} on {socket.gethostname()} has no {memory} left{said}. {remedies(config, on_gpu)}"
        )
    if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST):
        return RankLost(
            f"rank {rank} on {socket.gethostname()} has lost another rank ({first_line}). What that one said last, in "
            "its log or in failed-RANK.json, tells why. Started again, the run goes on from its latest checkpoint"
        )
    return None


def remedies(config: RunConfig, on_gpu: bool = False) -> str:
    """Says what takes less memory in this run, the cheapest first; none of it changes the global batch.

    on_gpu: whether it is the memory of a GPU.
    """
    engine, ways = config.engine, []
    moved = engine.model_copy(update={"activations": "cpu"})
    can_move = moved != engine and not list(activation_problems(moved))
    if config.micro_batch_size > 1:
        ways.append(f"lower micro_batch_size={config.micro_batch_size}")
    if config.model.gradient_checkpointing is not True:
        ways.append("set model.gradient_checkpointing=true")
    elif on_gpu and can_move:
        ways.append("set engine.activations=cpu where the machine has more memory than the GPU")
    adamw = config.optimizer.name == "adamw"  # others need stage 1 or 2 without offload
    if config.engine.zero_stage < (3 if adamw else 2):
        ways.append(f"raise engine.zero_stage={config.engine.zero_stage}, with a new name for the run")
    if adamw and config.engine.zero_stage and not config.engine.offload_optimizer:
        ways.append("set engine.offload_optimizer=true where the machine has more memory than the GPU")
    ways.append("start on more ranks or fewer of them on each machine")
    return f"{', '.join(ways)[0].upper()}{', or '.join(ways)[1:]}; then start again"


def note_failure(attempt: Attempt, rank: int, error: Exception) -> None:
    """Writes failed-RANK.json, as each rank may fail for another reason, and from rank 0 status.json, unless that says
    that the run has ended."""
    with contextlib.suppress(OSError):  # a full disk may be what failed; the message on the terminal remains
        text = _record(rank, error, attempt.number)
        write_text(attempt, attempt.run / f"failed-{rank}.json", text)
        status = attempt.run / STATUS
        if rank == 0 and _state_of(status) in (None, "running"):
            write_text(attempt, status, text)  # a restart that was refused has not changed a run that had ended


def note_refusal(rank: int, error: Exception) -> None:
    """Writes failed-RANK.json into the folder that the launcher gave for it, if one started this rank."""
    if folder := os.environ.get(REFUSED):
        with contextlib.suppress(OSError):  # the message on the terminal remains
            Path(folder, f"failed-{rank}.json").write_text(_record(rank, error, 0))


def _record(rank: int, error: Exception, attempt: int) -> str:
    return json.dumps(dict(state="failed", rank=rank, error=error_text(error), attempt=attempt, time=time.time()))


def _state_of(status: Path) -> str | None:
    """Reads the state in status.json; returns None where there is no such file or it cannot be used."""
    try:
        return read_json(status, "", {"state": is_text})["state"]
    except (OSError, Damaged):
        return None


def end_superseded(error: Superseded, rank: int) -> NoReturn:
    """Prints one line, from rank 0, and ends the process: nothing is flushed, closed or logged that would reach the
    run's folder."""
    if rank == 0:
        print(f"\nrank 0: {error}", file=sys.stderr, flush=True)  # not behind a progress bar
    os._exit(SUPERSEDED)
