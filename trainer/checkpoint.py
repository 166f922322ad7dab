"""Checkpoints: committed whole or not at all, found again, loaded at any world size, pruned.

    checkpoints/step-00000400/deepspeed/     DeepSpeed's files, one set a rank: weights, master copies, optimizer
                              controlnet/    the trained weights (or their moving average) in fp32, as diffusers reads
                                             them
                              config.yaml    the resolved configuration that the step was trained with
                              state.json     step, position in the data, fingerprint, figures, digest of the weights
                              COMPLETE       sizes and digests of all files; written last, before the folder gets its
                                             name

A checkpoint is made in the folder of this start of the run (attempt.py) and moved to its place after every rank has
finished, so a name that is seen is a whole checkpoint, and a start that a newer one has replaced cannot put one there.
A copy that lost a file, or of which a byte has changed, is recognised by COMPLETE and passed over (integrity.py).
Reading one runs no code: what is no tensor and no plain value in PyTorch's files is refused.

Training stands still only while the states are copied, in `begin_save`. Threads write the copies, and `finish_save`,
at the boundary of a later step, makes the checkpoint of them: no thread takes part in a collective.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from controlbooth.data.records import Damaged, read_json
from controlbooth.models.pretrained import save_controlnet
from controlbooth.trainer.attempt import Attempt, move
from controlbooth.trainer.continuing import AllDamaged, CheckpointError, all_damaged, checkpoint_folders, damaged
from controlbooth.trainer.distributed import World, barrier, from_first_rank, gather_objects
from controlbooth.trainer.engine import Average, full_state
from controlbooth.trainer.evaluate.verdict import best_by
from controlbooth.trainer.integrity import (
    COMPLETE,
    CONFIG,
    STATE,
    files_damage,
    first_damage,
    folder_digest,
    records_damage,
    sizes_of,
    weights_damage,
    what_is_missing,
    write_marker,
)

_TAG = "deepspeed"
_UNIVERSAL = "universal"
_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return [path for path in checkpoint_folders(run) if is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that was committed is there in its size. What is generated later may come besides."""
    return what_is_missing(checkpoint) is None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What was saved beside the weights. Raises CheckpointError where that, or config.yaml, is damaged."""
    if damage := records_damage(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged, in {damage}. Delete it to use an older one")
    return read_json(checkpoint / STATE, "Delete the checkpoint to use an older one")


def check_weights(checkpoint: Path) -> None:
    """Raises CheckpointError where the trained weights are not the ones that were saved."""
    if damage := weights_damage(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged, in {damage}. Delete it to use an older one")


def latest_checkpoint(run: Path, world: World, say: Callable[[str], None]) -> Path | None:
    """The same on every rank: the last one that rank 0 sees whole and that no rank finds damaged. None: there is none.

    Ranks that looked for themselves would go on from different steps where a node's view of a shared disk is old. They
    compare the checksums of all files, each of its share. say: told on rank 0 of a checkpoint that is passed over.
    Raises CheckpointError where another rank does not see what rank 0 sees, and AllDamaged where all are damaged.
    """
    folders = [(path, what_is_missing(path)) for path in checkpoint_folders(run)]
    there: list[tuple[Path, str | None]] = from_first_rank(folders)
    damages: list[str] = []

    def pass_over(checkpoint: Path, damage: str) -> None:
        damages.append(damaged(checkpoint, damage))
        if world.rank == 0:
            say(f"warning: {damages[-1]}; it is passed over")

    for checkpoint, missing in reversed(there):
        if missing is not None:
            pass_over(checkpoint, missing)
            continue
        seen = gather_objects(is_complete(checkpoint), world)
        if not all(seen):
            others = [rank for rank, complete in enumerate(seen) if not complete]
            raise CheckpointError(
                f"{checkpoint} is whole on rank 0 and not on ranks {others}. "
                "Every node must see the same `output`: put it on a shared disk"
            )
        own = first_damage(checkpoint, world.rank, world.world_size)
        found = next(filter(None, gather_objects(own, world)), None)
        if found is None:
            return checkpoint
        pass_over(checkpoint, found)
    if damages:
        raise AllDamaged(all_damaged(damages))
    return None


def write_controlnet(engine: Any, weights: dict[str, Tensor], folder: Path) -> None:
    save_controlnet(as_module(engine.module, weights), folder)


def read_controlnet(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / SAFETENSORS_WEIGHTS_NAME)


@dataclass
class Save:
    """A checkpoint that this rank's thread is writing."""

    partial: Path
    final: Path
    attempt: Attempt
    thread: Thread
    error: Exception | None = None
    """What the thread has ended with."""


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
    """`begin_save` and `finish_save` at once: returns the committed folder."""
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
    barrier()
    with _quiet(), _copied(engine) as files:
        engine.save_checkpoint(str(partial), tag=_TAG, client_state={}, save_latest=False)
    weights = full_state(engine) if average is None else average.full_state()
    if world.rank > 0:
        weights = {}  # rank 0 writes them; another whole copy on each rank would be held until then
    if average is not None:
        state = state | {"average": True}

    def write() -> None:
        try:
            for tree, path in files:
                engine.checkpoint_engine.save(tree, path)
                _sync(Path(path))
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
                for path in (partial / name).iterdir():
                    _sync(path)
        except Exception as error:  # of whatever kind: finish_save raises it on the ranks' main threads
            lack = _lack_of_space(needed, run, shutil.disk_usage(run).free)  # PyTorch's writer calls that anything
            save.error = error if lack is None else OSError(f"{lack} ({error})")

    save = Save(partial, final, attempt, Thread(target=write, name="checkpoint", daemon=True))
    save.thread.start()
    return save


def is_written(save: Save) -> bool:
    """Whether this rank's thread has ended, well or not."""
    return not save.thread.is_alive()


def finish_save(save: Save, world: World) -> Path:
    """Waits for the threads of all ranks and commits; returns the folder. Every rank calls this.

    Raises on all ranks, with nothing committed, the error of a rank that could not write, and CheckpointError where
    rank 0 does not see what another rank wrote.
    """
    save.thread.join()
    errors = gather_objects(save.error and f"{type(save.error).__name__}: {save.error}", world)
    if save.error is not None:  # PyTorch's writer calls a full disk a RuntimeError, as it does a lost rank
        raise CheckpointError(f"{save.final} could not be written: {save.error}") from save.error
    for rank, error in enumerate(errors):
        if error:
            raise CheckpointError(f"rank {rank} could not write its part of {save.final}: {error}")
    seen = gather_objects(sorted(sizes_of(save.partial / _TAG)), world)
    missing = sorted({name for names in seen for name in names} - set(seen[0]))
    if missing:
        where = save.partial / _TAG
        raise CheckpointError(f"rank 0 does not see {missing[0]} in {where}. Put `output` on a shared disk")
    if world.rank == 0:
        _commit(save.partial, save.final, save.attempt)
    barrier()
    return save.final


@contextlib.contextmanager
def _copied(engine: Any) -> Iterator[list[tuple[Any, str]]]:
    """Inside, what DeepSpeed saves is not written but copied to the CPU: (state, path) of each file."""
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
    """A copy that shares nothing with the original, tensors on the CPU, containers of the same classes."""
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


def load_checkpoint(
    engine: Any,
    checkpoint: Path,
    average: Average | None,
    world: World,
    attempt: Attempt,
    read_weights: Callable[[Path], dict[str, Tensor]] = read_controlnet,
) -> None:
    """Every rank calls this, on an engine made with load_universal = `needs_universal`.

    read_weights(folder) undoes what write_weights of `save_checkpoint` wrote.
    An average that the checkpoint does not hold begins at its weights.
    """
    state, tag = read_state(checkpoint), _TAG
    if needs_universal(state, world.world_size):
        tag = _UNIVERSAL
        # A marker of an older version is empty, and vouches for nothing: what it is of is made again too.
        if any(gather_objects(files_damage(checkpoint / _UNIVERSAL, world.rank, world.world_size), world)):
            if world.rank == 0:
                _make_universal(checkpoint, attempt)
            barrier()
    with _quiet(), tensors_only(checkpoint):
        path, _ = engine.load_checkpoint(str(checkpoint), tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(
            f"DeepSpeed could not read {checkpoint / tag}. Delete {checkpoint} to resume from an older one"
        )
    if average is not None:
        held = state.get("average", False)
        average.load(read_weights(checkpoint / "controlnet") if held else full_state(engine))


def needs_universal(state: dict[str, Any], world_size: int) -> bool:
    """Whether states that were split over the saved world's ranks must be split anew."""
    return state["zero_stage"] > 0 and state["world_size"] != world_size


def prune(run: Path, keep: int, keep_best: int, attempt: Attempt, committed: Path) -> None:
    """Deletes all but the `keep` latest checkpoints and the `keep_best` best by the figure that tells control. Rank 0
    calls it after a commit.

    committed: the one of now. Those of later steps do not count: they were damaged, or it would not be the one of now.
    Raises Superseded, and deletes nothing of the newer start's.
    """
    whole = [path for path in complete_checkpoints(run) if path.name <= committed.name]
    metrics = {path: _metrics(path) for path in whole}
    metric = best_by(metrics.values())
    scored = [(own[metric], path) for path, own in metrics.items() if metric in own]
    best = sorted(scored, key=lambda pair: pair[0])[-keep_best:] if keep_best else []
    kept = {*whole[-keep:], *(path for _, path in best)}
    for path in whole:
        if path not in kept:
            delete(path, attempt)


def _metrics(checkpoint: Path) -> dict[str, float]:
    """Empty of one that was not measured, or whose state.json is damaged: the best is another one then."""
    try:
        return read_state(checkpoint).get("metrics") or {}
    except (CheckpointError, Damaged):
        return {}


def as_module(trained: Any, weights: dict[str, Tensor]) -> ControlNetModel:
    """A ControlNet like the trained one, with these weights."""
    with torch.device("meta"):
        module: Any = type(trained).from_config(trained.config)
    module.load_state_dict(weights, assign=True)
    return module


def delete(folder: Path, attempt: Attempt) -> None:
    """A checkpoint, or another folder of the run. Moved away first: half a deletion must not look like a checkpoint.

    Raises Superseded.
    """
    doomed = attempt.folder / f"{folder.name}.deleted"
    move(attempt, folder, doomed)
    shutil.rmtree(doomed)


def _commit(partial: Path, final: Path, attempt: Attempt) -> None:
    for name in sizes_of(partial):
        _sync(partial / name)
    write_marker(partial)
    _sync(partial / COMPLETE)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # the same step again: the one that is there has lost a file, or it would have been gone on from
        delete(final, attempt)
    move(attempt, partial, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """A file's bytes, or a folder's names, are on the disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(engine: Any, run: Path, world: World) -> int:
    """Bytes that a checkpoint takes at most; raises OSError on all ranks where the disk has less.

    Weights in fp32 twice, two moments, a half-precision copy, the average: 24 bytes a parameter.
    """
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    needed = parameters * 24
    if lack := _lack_of_space(needed, run, from_first_rank(shutil.disk_usage(run).free)):
        raise OSError(lack)
    return needed


def _lack_of_space(needed: int, run: Path, free: int) -> str | None:
    if free >= needed:
        return None
    return (
        f"a checkpoint takes up to {needed / 2**30:.2f} GiB and {run} has {free / 2**30:.2f} GiB free. Free some, "
        "lower checkpoint.keep, or move `output`; then start again: the run goes on from its latest checkpoint"
    )


def _make_universal(checkpoint: Path, attempt: Attempt) -> None:
    """Splits DeepSpeed's files by parameter, so that a world of another size can put them together."""
    import argparse

    from deepspeed.checkpoint import ds_to_universal

    target = attempt.folder / _UNIVERSAL
    shutil.rmtree(checkpoint / _UNIVERSAL, ignore_errors=True)  # a copy of the checkpoint may hold a part of it
    arguments = argparse.Namespace(
        input_folder=str(checkpoint / _TAG),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    print(f"the world's size changed: splitting {checkpoint / _TAG} by parameter", file=sys.stderr, flush=True)
    with _quiet(), tensors_only(checkpoint):
        ds_to_universal.main(arguments)
    write_marker(target)
    move(attempt, target, checkpoint / _UNIVERSAL)


@contextlib.contextmanager
def tensors_only(checkpoint: Path) -> Iterator[None]:
    """Inside, torch.load makes tensors, plain values and DeepSpeed's own records, whatever its callers ask for.

    DeepSpeed reads its files as pickles without limits, and a pickle can call anything. PyTorch's own switch overrides
    that; it is a variable of the environment, which is set for no longer than this. Raises CheckpointError for a file
    that holds anything else.
    """
    before = os.environ.get(_TENSORS_ONLY)
    os.environ[_TENSORS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_records()):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"a file of {checkpoint} holds more than tensors and plain values, and could run code when it is read: it "
            f"is refused ({str(error).splitlines()[0]}). Delete {checkpoint} to use an older one"
        ) from error
    finally:
        if before is None:
            del os.environ[_TENSORS_ONLY]
        else:
            os.environ[_TENSORS_ONLY] = before


def _deepspeed_records() -> list[Any]:
    """Classes that DeepSpeed's states are made of besides tensors: values and their names, without any behaviour when
    they are read."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def _quiet():
    """DeepSpeed prints its progress; an error still carries its own message."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
