"""Saves and restores the state of a stack, slot by slot, and shares subjects among ranks."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from controlbooth.data.secrets import error_text
from controlbooth.models.base import Base
from controlbooth.models.files.weights import save_weights
from controlbooth.models.lora import StackedAdamW, StackedAdapter
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.batches import Training
from controlbooth.trainer.dreambooth.manifest import Task, share_of_rank
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run.attempt import Attempt, write_file, write_text


@dataclass
class Stack:
    """What one rank trains: slot k of the adapters belongs to trainings[k]."""

    base: Base
    networks: nn.ModuleDict
    """Those of the base that have adapters."""
    adapters: dict[str, StackedAdapter]
    optimizer: StackedAdamW
    trainings: list[Training]
    queue: list[Task]
    waiting: dict[str, dict[str, Tensor]]
    """Of subjects that have begun already: in the queue, under another number of ranks, or failed and to be tried
    again."""


def plan_ranks(
    attempt: Attempt, config: SubjectRunConfig, left: Sequence[Task], faults: dict[str, str], world_size: int
) -> None:
    """Writes the state with which each rank begins, unless the last start has left one that fits. Rank 0 calls this.

    It does not fit where the last start had another number of ranks, or its state is damaged. Subjects that were in
    training keep their weights and steps; all that are not finished are dealt out anew.
    """
    states = attempt.run / "state"
    current = states / "CURRENT"
    before = current.read_text().strip() if current.exists() else None
    files, damage = state_files(states, before)
    if before == f"of-{world_size}" and not damage:
        return
    for half in states.glob("of-*/*.partial"):  # of a version that wrote in place, when it was killed
        half.unlink()
    old = [read_state(path) for path in files]
    saved = {name: tensors for state in old for name, tensors in (state.slots | state.waiting).items()}
    if damage:
        known = sum(task.name in saved for task in left)
        said = (
            f"rank 0: {damage[0]}. Of {len(left)} subjects that are not finished, {known} go on from the newest state "
            f"that other files hold, and {len(left) - known} begin at step 0. They end with the same weights"
        )
        print(said, file=sys.stderr, flush=True)
    for rank in range(world_size):
        mine = share_of_rank(left, rank, world_size)
        begun = [task for task in mine if task.name in saved]
        slots = {task.name: saved[task.name] for task in begun[: config.subjects_per_batch]}
        waiting = {task.name: saved[task.name] for task in begun[config.subjects_per_batch :]}
        queue = [task.name for task in mine if task.name not in slots]
        if rank == 0:  # of subjects that cannot be trained now
            waiting |= {name: saved[name] for name in faults if name in saved}
        write_state(attempt, states / f"of-{world_size}" / f"rank-{rank}.safetensors", State(slots, queue, waiting))
    write_text(attempt, current, f"of-{world_size}")


def state_files(states: Path, before: str | None) -> tuple[list[Path], list[str]]:
    """Returns the state files to go on from, and what is wrong with those that the last start has left.

    before: the content of CURRENT, which names the folder of the last start. Where its files are not all there and
    whole, every whole file is returned, the newest last: a subject that goes on from an older step, or begins anew,
    ends with the same weights.
    """
    damage = [] if before is None else [f"{states / 'CURRENT'} is {before!r}, and no name of a folder beside it"]
    if before is not None and (match := re.fullmatch(r"of-([1-9]\d*)", before)):
        files = [states / before / f"rank-{rank}.safetensors" for rank in range(int(match[1]))]
        damage = [fault for path in files if (fault := state_fault(path)) is not None]
        if not damage:
            return files, []
    whole = [path for path in states.glob("of-*/rank-*.safetensors") if state_fault(path) is None]
    return sorted(whole, key=lambda path: path.stat().st_mtime_ns), damage


def state_fault(path: Path) -> str | None:
    """Returns why a state file cannot be read, or None for a whole one.

    The file records its own length, so what was cut off is noticed.
    """
    try:
        with safe_open(path, "pt") as file:
            json.loads(file.metadata()["names"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read ({error_text(error)})"
    return None


@dataclass
class State:
    """What a rank's state file holds: tensors of each subject in training, by name, and who is next."""

    slots: dict[str, dict[str, Tensor]]
    queue: list[str]
    waiting: dict[str, dict[str, Tensor]]
    """Of subjects that had begun: in the queue, where there were more ranks, or failed and to be tried again."""


def state_path(folder: Path, world: World) -> Path:
    return folder / "state" / f"of-{world.world_size}" / f"rank-{world.rank}.safetensors"


def save_stack(stack: Stack, path: Path, attempt: Attempt) -> None:
    slots = {}
    for slot, training in enumerate(stack.trainings):
        tensors = {"step": torch.tensor(training.step), "skipped": torch.tensor(training.skipped)}
        for number, parameter in enumerate(stack.optimizer.parameters):
            tensors[f"weight.{number}"] = parameter.detach()[slot]
            tensors[f"first.{number}"] = stack.optimizer.first[number][slot]
            tensors[f"second.{number}"] = stack.optimizer.second[number][slot]
        slots[training.task.name] = tensors
    write_state(attempt, path, State(slots, [task.name for task in stack.queue], stack.waiting))


@torch.no_grad()
def restore_slot(stack: Stack, slot: int, saved: dict[str, Tensor]) -> None:
    training = stack.trainings[slot]
    kept = sum(name.startswith("weight.") for name in saved)
    if kept != len(stack.optimizer.parameters):
        raise ConfigError(
            f"{training.task.name} has begun with {kept // 2} adapted layers, and the run now has "
            f"{len(stack.optimizer.parameters) // 2}. Set adapter.layers and train_text_encoder back as they were, or "
            "take another name for the run"
        )
    training.step, training.skipped = int(saved["step"]), int(saved["skipped"])
    for number, parameter in enumerate(stack.optimizer.parameters):
        for name, stacked in (
            ("weight", parameter), ("first", stack.optimizer.first[number]), ("second", stack.optimizer.second[number])
        ):  # fmt: skip
            own, tensor = stacked[slot].zero_(), saved[f"{name}.{number}"]
            axis = number % 2  # A is (r, ...), B (out, r)
            # The stack's rank is that of its largest subject, then and now; beyond a subject's own, all is zero.
            rank = min(own.shape[axis], tensor.shape[axis])
            own.narrow(axis, 0, rank).copy_(tensor.narrow(axis, 0, rank))


def write_state(attempt: Attempt, path: Path, state: State) -> None:
    names = {"slots": list(state.slots), "queue": state.queue, "waiting": list(state.waiting)}
    tensors = {
        f"{name}/{key}": tensor.cpu()
        for group in (state.slots, state.waiting)
        for name, saved in group.items()
        for key, tensor in saved.items()
    }
    write_file(attempt, path, lambda made: save_weights(tensors, made, {"names": json.dumps(names)}))


def read_state(path: Path) -> State:
    with safe_open(path, "pt") as file:
        names = json.loads(file.metadata()["names"])
        tensors: dict[str, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118, it is no mapping
            name, _, part = key.rpartition("/")
            tensors.setdefault(name, {})[part] = file.get_tensor(key)
    return State(
        {name: tensors[name] for name in names["slots"]},
        names["queue"],
        {name: tensors[name] for name in names["waiting"]},
    )
