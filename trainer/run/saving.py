"""Writes a checkpoint while training goes on, and commits it whole or not at all."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from controlbooth.data.errors import UnusableFile
from controlbooth.models.pretrained import save_controlnet
from controlbooth.trainer.engine.deepspeed import full_state
from controlbooth.trainer.engine.distributed import World, barrier, gather_objects, on_first_rank
from controlbooth.trainer.engine.ema import Average
from controlbooth.trainer.run.attempt import Attempt, move
from controlbooth.trainer.run.checkpoint import _TAG, as_module, delete, folder_of
from controlbooth.trainer.run.continuing import CheckpointError
from controlbooth.trainer.run.integrity import COMPLETE, CONFIG, STATE, folder_digest, sizes_of, write_marker
from controlbooth.trainer.run.torch_files import quiet
from controlbooth.trainer.run.whole_states import file_of_rank


def write_controlnet(engine: Any, weights: dict[str, Tensor], folder: Path) -> None:
    save_controlnet(as_module(engine.module, weights), folder)


@dataclass
class Save:
    """A checkpoint that this rank's thread is writing."""

    partial: Path
    final: Path
    attempt: Attempt
    thread: Thread
    error: Exception | None = None
    """What the thread has ended with."""
    synced: list[str] = field(default_factory=list)
    """The files that it has written and flushed to the disk, relative to `partial`."""


def save_checkpoint(
    engine: Any,
    run: Path,
    state: dict[str, Any],
    config: str,
    average: Average | None,
    world: World,
    attempt: Attempt,
    name: str = "controlnet",
    write_weights: Callable[[Any, dict[str, Tensor], Path], None] = write_controlnet,
) -> Path:
    """Saves a checkpoint by `begin_save` and `finish_save` at once; returns the committed folder."""
    return finish_save(begin_save(engine, run, state, config, average, world, attempt, name, write_weights), world)


def begin_save(
    engine: Any,
    run: Path,
    state: dict[str, Any],
    config: str,
    average: Average | None,
    world: World,
    attempt: Attempt,
    name: str = "controlnet",
    write_weights: Callable[[Any, dict[str, Tensor], Path], None] = write_controlnet,
) -> Save:
    """Copies what a checkpoint holds to the CPU and has a thread write it. Every rank calls this.

    state: JSON values, with at least `step`; state.json holds them and the weights' digest. config: the run's, as YAML.
    name: of the folder for the trained weights, which write_weights(engine, weights by name, folder) fills on rank 0.
    attempt: of the run, which may hold several folders like `run`. One save must be finished before the next one
    begins. Raises OSError where the disk is too small, on all ranks.
    """
    final = folder_of(run, state["step"])
    partial = attempt.folder / final.name
    needed = check_space(engine, run, world)
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if engine.whole_tensors is not None:
            file_of_rank(partial, 0).parent.mkdir()
    barrier()
    with quiet(), _copied(engine) as files:
        engine.save_checkpoint(str(partial), tag=_TAG, client_state={}, save_latest=False)
        if engine.whole_tensors is not None:
            engine.checkpoint_engine.save(engine.whole_tensors.states(), str(file_of_rank(partial, world.rank)))
    weights = full_state(engine) if average is None else average.full_state()
    if world.rank > 0:
        weights = {}  # rank 0 writes them; another whole copy on each rank would be held until then
    state = state | {"deepspeed_optimizer": type(engine.optimizer).__name__}
    if average is not None:
        state |= {"average": True}

    def sync(path: Path) -> None:
        _sync(path)
        save.synced.append(str(path.relative_to(partial)))

    def write() -> None:
        try:
            for tree, path in files:
                engine.checkpoint_engine.save(tree, path)
                sync(Path(path))
            if world.rank == 0:
                if broken := [key for key, tensor in weights.items() if not tensor.isfinite().all()]:
                    raise CheckpointError(
                        f"{broken[0]} and {len(broken) - 1} more weights are not finite: lower "
                        "optimizer.learning_rate. Started again, the run goes on from the checkpoint before"
                    )
                write_weights(engine, weights, partial / name)
                digest = {"digest": folder_digest(partial / name)}
                (partial / STATE).write_text(json.dumps(state | digest, indent=2))
                (partial / CONFIG).write_text(config)
                for path in (*(partial / name).iterdir(), partial / STATE, partial / CONFIG):
                    sync(path)
        except Exception as error:  # of whatever kind: finish_save raises it on the ranks' main threads
            lack = _lack_of_space(needed, run, shutil.disk_usage(run).free)  # PyTorch's writer calls that anything
            save.error = error if lack is None else OSError(f"{lack} ({error})")

    save = Save(partial, final, attempt, Thread(target=write, name="checkpoint", daemon=True))
    save.thread.start()
    return save


def is_written(save: Save) -> bool:
    """Tells whether this rank's thread has ended, well or not."""
    return not save.thread.is_alive()


def finish_save(save: Save, world: World) -> Path:
    """Waits for the threads of all ranks and commits; returns the folder. Every rank calls this.

    Raises on all ranks, with nothing committed, the error of a rank that could not write, and CheckpointError where
    rank 0 does not see what another rank wrote.
    """
    save.thread.join()
    error = save.error and f"{type(save.error).__name__}: {save.error}"
    ranks = gather_objects((error, save.synced), world)  # of each its own files only: all see those of all
    if save.error is not None:  # PyTorch's writer calls a full disk a RuntimeError, as it does a lost rank
        raise CheckpointError(f"{save.final} could not be written: {save.error}") from save.error
    for rank, (error, _) in enumerate(ranks):
        if error:
            raise CheckpointError(f"rank {rank} could not write its part of {save.final}: {error}")
    synced = {name for _, names in ranks for name in names}
    missing = on_first_rank(lambda: sorted(synced - sizes_of(save.partial).keys()), world)
    if missing:
        raise CheckpointError(f"rank 0 does not see {missing[0]} in {save.partial}. Put `output` on a shared disk")
    if world.rank == 0:
        _commit(save.partial, save.final, save.attempt, synced)
    barrier()
    return save.final


@contextlib.contextmanager
def _copied(engine: Any) -> Iterator[list[tuple[Any, str]]]:
    """Keeps DeepSpeed from writing what it saves within the block; it is copied to the CPU instead, as (state, path) of
    each file."""
    files: list[tuple[Any, str]] = []
    writer = engine.checkpoint_engine
    # On the instance, in front of the methods of DeepSpeed's class; the second one would copy on the device first.
    writer.save = lambda state_dict, path: files.append((_on_cpu(state_dict), path))
    writer.preserves_storage_sharing = lambda: False
    try:
        yield files
    finally:
        del writer.save, writer.preserves_storage_sharing


def _on_cpu(tree: Any) -> Any:
    """Copies a tree so that it shares nothing with the original: tensors to the CPU, containers in the same classes."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        same = copy.copy(tree)  # keeps its class and attributes, such as the versions in a module's state
        for key, value in tree.items():
            same[key] = _on_cpu(value)
        return same
    if type(tree) in (list, tuple):
        return type(tree)(_on_cpu(value) for value in tree)
    return copy.deepcopy(tree)


def _commit(partial: Path, final: Path, attempt: Attempt, synced: Collection[str] = ()) -> None:
    """Moves a checkpoint that is written to its place. synced: files that are on the disk already."""
    for name in sizes_of(partial).keys() - synced:
        _sync(partial / name)
    write_marker(partial)
    _sync(partial / COMPLETE)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # the same step again: the one that is there has lost a file, or it would have been gone on from
        delete(final, attempt)
    move(attempt, partial, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(engine: Any, run: Path, world: World) -> int:
    """Returns the bytes that a checkpoint takes at most. Raises OSError on all ranks where the disk has less.

    Weights in fp32 twice, a half-precision copy, the average: 16 bytes a parameter; and the optimizer's, of AdamW 8.
    """
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    needed = parameters * 16 + (8 * parameters if engine.whole_tensors is None else engine.whole_tensors.planned_bytes)
    if lack := _lack_of_space(needed, run, on_first_rank(lambda: shutil.disk_usage(run).free, world)):
        raise UnusableFile(lack)
    return needed


def _lack_of_space(needed: int, run: Path, free: int) -> str | None:
    if free >= needed:
        return None
    return (
        f"a checkpoint takes up to {needed / 2**30:.2f} GiB and {run} has {free / 2**30:.2f} GiB free. Free some, "
        "lower checkpoint.keep, or move `output`; then start again: the run goes on from its latest checkpoint"
    )
