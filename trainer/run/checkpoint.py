"""Checkpoints: how they lie, found again, loaded at any world size, pruned. saving.py writes them, integrity.py checks.

    checkpoints/step-00000400/deepspeed/     DeepSpeed's files, one set a rank: weights, master copies, optimizer
                              optimizer/     of optimizers besides AdamW the states of whole tensors (whole_states.py)
                              controlnet/    the trained weights (or their moving average) in fp32, as diffusers reads
                                             them
                              config.yaml    the resolved configuration that the step was trained with
                              state.json     step, position in the data, fingerprint, figures, digest of the weights
                              COMPLETE       sizes and digests of all files; written last, before the folder gets its
                                             name

A checkpoint is made in the folder of this attempt at the run (attempt.py) and moved to its place after every rank has
finished, so a name that is seen is a whole checkpoint, and an attempt that a newer one has replaced cannot put one
there. A copy that lost a file, or of which a byte has changed, is recognised by COMPLETE and passed over
(integrity.py). Reading one runs no code: what is no tensor and no plain value in PyTorch's files is refused.

Training stands still only while the states are copied, in `begin_save`. Threads write the copies, and `finish_save`,
at the boundary of a later step, makes the checkpoint of them: no thread takes part in a collective.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from controlbooth.data.files.records import Damaged, read_json
from controlbooth.models.denoisers.transformer_copy import fixed_tensors
from controlbooth.trainer.engine.deepspeed import full_state
from controlbooth.trainer.engine.distributed import World, gather_objects, on_first_rank
from controlbooth.trainer.engine.ema import Average
from controlbooth.trainer.run.attempt import Attempt, move
from controlbooth.trainer.run.best import best_by
from controlbooth.trainer.run.continuing import AllDamaged, CheckpointError, all_damaged, checkpoint_folders, damaged
from controlbooth.trainer.run.integrity import (
    STATE,
    files_damage,
    first_damage,
    records_damage,
    weights_damage,
    what_is_missing,
)
from controlbooth.trainer.run.torch_files import quiet, tensors_only
from controlbooth.trainer.run.universal import make_universal
from controlbooth.trainer.run.whole_states import load_whole

_TAG = "deepspeed"
_UNIVERSAL = "universal"


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Lists the whole checkpoints of a run, oldest first."""
    return [path for path in checkpoint_folders(run) if is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """Tells whether every file that was committed is there in its size. Files generated later may be there too."""
    return what_is_missing(checkpoint) is None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads what was saved beside the weights. Raises CheckpointError where that, or config.yaml, is damaged."""
    if damage := records_damage(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged, in {damage}. Delete it to use an older one")
    return read_json(checkpoint / STATE, "Delete the checkpoint to use an older one")


def check_weights(checkpoint: Path) -> None:
    """Raises CheckpointError where the trained weights are not the ones that were saved."""
    if damage := weights_damage(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged, in {damage}. Delete it to use an older one")


def latest_checkpoint(run: Path, world: World, say: Callable[[str], None]) -> Path | None:
    """Finds the last checkpoint that rank 0 sees whole and that no rank finds damaged: the same on every rank. None:
    there is none.

    Ranks that looked for themselves would go on from different steps where a node's view of a shared disk is old. They
    look for all files and compare their checksums, each of its share. say: called on rank 0 with a message about each
    checkpoint that is passed over. Raises CheckpointError where another rank does not see what rank 0 sees, and
    AllDamaged where all are damaged.
    """
    damages: list[str] = []

    def pass_over(checkpoint: Path, damage: str) -> None:
        damages.append(damaged(checkpoint, damage))
        if world.rank == 0:
            say(f"warning: {damages[-1]}; it is passed over")

    for checkpoint in reversed(on_first_rank(lambda: checkpoint_folders(run), world)):
        missing = on_first_rank(lambda checkpoint=checkpoint: what_is_missing(checkpoint), world)
        if missing is not None:
            pass_over(checkpoint, missing)
            continue
        unseen = gather_objects(what_is_missing(checkpoint, world.rank, world.world_size), world)
        if any(unseen):
            others = [rank for rank, missing in enumerate(unseen) if missing]
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


def read_controlnet(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / SAFETENSORS_WEIGHTS_NAME)


def load_checkpoint(
    engine: Any,
    checkpoint: Path,
    average: Average | None,
    world: World,
    attempt: Attempt,
    read_weights: Callable[[Path], dict[str, Tensor]] = read_controlnet,
) -> None:
    """Loads a checkpoint into an engine that was made with load_universal = `needs_universal`. Every rank calls this.

    read_weights(folder) undoes what write_weights of `save_checkpoint` wrote. An average that the checkpoint does not
    hold begins at its weights. Raises CheckpointError where it cannot be read.
    """
    state, tag = on_first_rank(lambda: read_state(checkpoint), world), _TAG
    if needs_universal(state, world.world_size):
        tag = _UNIVERSAL
        # A marker of an older version is empty, and vouches for nothing: what it is of is made again too.
        if any(gather_objects(files_damage(checkpoint / _UNIVERSAL, world.rank, world.world_size), world)):
            make_universal(checkpoint / _TAG, checkpoint / _UNIVERSAL, attempt, world)
    with quiet(), tensors_only(checkpoint):
        if engine.whole_tensors is not None:
            load_whole(engine, checkpoint, checkpoint / tag)
            path = checkpoint
        else:
            path, _ = engine.load_checkpoint(str(checkpoint), tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(
            f"DeepSpeed could not read {checkpoint / tag}. Delete {checkpoint} to resume from an older one"
        )
    if average is not None:
        held = state.get("average", False)
        average.load(read_weights(checkpoint / "controlnet") if held else full_state(engine))


def needs_universal(state: Mapping[str, Any], world_size: int) -> bool:
    """Tells whether states that were split over the saved world's ranks must be split anew.

    Older versions had DeepSpeed's BF16_Optimizer at stage 1 in bf16, which splits them in another way. States of whole
    tensors are not split.
    """
    if state.get("optimizer", "adamw") != "adamw":
        return False
    another_class = "deepspeed_optimizer" not in state and state["zero_stage"] == 1 and state["precision"] == "bf16"
    return state["zero_stage"] > 0 and (state["world_size"] != world_size or another_class)


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
    """Returns the metrics of a checkpoint; empty where it was not measured or its state.json is damaged: another one is
    the best then."""
    try:
        return read_state(checkpoint).get("metrics") or {}
    except (CheckpointError, Damaged):
        return {}


def as_module(trained: Any, weights: dict[str, Tensor]) -> Any:
    """Makes a ControlNet like the trained one, with these weights."""
    with torch.device("meta"):
        module: Any = type(trained).from_config(trained.config)
    module.load_state_dict(weights | fixed_tensors(trained), assign=True)
    return module


def delete(folder: Path, attempt: Attempt) -> None:
    """Deletes a checkpoint, or another folder of the run. It is moved away first: half a deletion must not look like a
    checkpoint.

    Raises Superseded.
    """
    doomed = attempt.folder / f"{folder.name}.deleted"
    move(attempt, folder, doomed)
    shutil.rmtree(doomed)
