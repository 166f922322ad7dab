"""Splits DeepSpeed's files by parameter, so that a world of another size can put them together.

DeepSpeed's own program does it (deepspeed/checkpoint/ds_to_universal.py), on rank 0: first each file of a rank of the
old world is cut into fragments, then those of each parameter are put together. For both it has a pool of processes,
whose place the ranks of rank 0's machine take here. Ranks of other machines only wait: a parameter is put together from
whatever fragments a listing of its folder shows, and on a network disk one machine sees another one's new files late.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from controlbooth.trainer.engine.distributed import World, from_first_rank, gather_objects
from controlbooth.trainer.run.attempt import Attempt, move
from controlbooth.trainer.run.continuing import CheckpointError
from controlbooth.trainer.run.integrity import write_marker
from controlbooth.trainer.run.torch_files import quiet, tensors_only

Do = Callable[[Any], Any]


def make_universal(source: Path, target: Path, attempt: Attempt, world: World) -> None:
    """Writes DeepSpeed's files in `source`, split by parameter, to the folder `target`, whole or not at all.

    Every rank calls this. Raises CheckpointError on all ranks where a file cannot be read.
    """
    with quiet(), tensors_only(source.parent):
        if world.world_size == 1:
            _convert(source, target, attempt)
        elif world.rank == 0:
            with _handing_out(world):
                _convert(source, target, attempt)
        else:
            _help(world)


def _convert(source: Path, target: Path, attempt: Attempt) -> None:
    from deepspeed.checkpoint import ds_to_universal

    made = attempt.folder / target.name
    shutil.rmtree(made, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)  # a copy of the checkpoint may hold a part of it
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(made),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    print(f"the world's size changed: splitting {source} by parameter", file=sys.stderr, flush=True)
    ds_to_universal.main(arguments)
    write_marker(made)
    move(attempt, made, target)


@contextlib.contextmanager
def _handing_out(world: World) -> Iterator[None]:
    """Has DeepSpeed's program on rank 0 share out its work within the block, to ranks that are in `_help`."""
    from deepspeed.checkpoint import ds_to_universal

    own, together = ds_to_universal._do_parallel_work, False

    def share_out(do: Do, chunks: Sequence[Any], workers: int) -> list[Any]:
        nonlocal together
        chunks = list(chunks)  # of a set, whose order is another one in each process
        ranks = min(world.ranks_per_node, world.world_size)
        from_first_rank((do, chunks, ranks))
        together = True  # what fails from here on fails on all ranks
        results = _do_together(do, chunks, ranks, world)
        together = False
        return results

    ds_to_universal._do_parallel_work = share_out
    end = None  # there is no more
    try:
        yield
    except Exception as error:
        end = CheckpointError(f"rank 0 could not split the checkpoint by parameter: {error}")
        raise
    finally:
        ds_to_universal._do_parallel_work = own
        if not together:
            from_first_rank(end)


def _help(world: World) -> None:
    """Does this rank's share of what rank 0 hands out, until there is no more."""
    while (work := from_first_rank(None)) is not None:
        if isinstance(work, CheckpointError):
            raise work
        do, chunks, ranks = work
        _do_together(do, chunks, ranks, world)


def _do_together(do: Do, chunks: Sequence[Any], of: int, world: World) -> list[Any]:
    """Does the work on the first `of` ranks, and returns its results on every rank, in the order of chunks.

    Raises on all ranks where one has failed.
    """
    share = world.rank
    own, error = [], None
    try:
        own = [do(chunk) for chunk in chunks[share::of]] if share < of else []
    except Exception as raised:  # of whatever kind: it is raised again, here and on the others
        error = raised
    told = gather_objects((own, None if error is None else f"{type(error).__name__}: {error}"), world)
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(told):
        if text is not None:
            raise CheckpointError(f"rank {rank} could not split the checkpoint by parameter: {text}")
    return [told[number % of][0][number // of] for number in range(len(chunks))]
