"""Training many subjects: `torchrun ... -m controlbooth.trainer.dreambooth subjects.yaml run.yaml`.

Each rank trains its share of the manifest, several subjects in one batch, and asks nobody in between: ranks meet only
before the first step and after the last. A subject that ends makes room for the next. State is saved every so many
steps and whenever a subject ends; the same command goes on from there, with as many ranks or with others.

With `--rows 8:16` it trains these rows of the manifest alone, as one task of an array whose tasks know nothing of each
other: what they share is the folder of the run, in which each keeps its own state. Whatever a task writes is made in
the folder of this start of it (attempt.py), so an old start that wakes up puts nothing over its successor's results.

    RUN/subjects/NAME/pytorch_lora_weights.safetensors      what diffusers' load_lora_weights reads
                      status.json                           waiting, training, finished or failed, and why
                      metrics.jsonl                         losses and figures of each step (subject_tracking.py)
    RUN/base.json                                           what the base was when the run began (same_base.py)
    RUN/state/of-2/rank-0.safetensors                       the subjects in training, the queue, the optimizer
    RUN/rows/8-16/state/...                                 the same of one task of an array
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from controlbooth.data.secrets import error_text
from controlbooth.models.adapters import (
    ATTENTION,
    CONVOLUTIONS,
    StackedAdamW,
    StackedAdapter,
    attach_adapters,
    chosen_subjects,
    keep_slots,
    reset_subject,
    subject_weights,
)
from controlbooth.models.attention import AttentionShape, apply_attention, attention_shapes
from controlbooth.models.base import Base
from controlbooth.models.controlnet import denoise
from controlbooth.models.families import encode_prompts
from controlbooth.models.pretrained import load_base
from controlbooth.models.weights import save_weights
from controlbooth.trainer.accelerators import device_name
from controlbooth.trainer.attempt import Attempt, Superseded, check_still_ours, only_run, write_file, write_text
from controlbooth.trainer.config import ConfigError, base_folder
from controlbooth.trainer.distributed import (
    World,
    barrier,
    end_process,
    from_first_rank,
    gather_objects,
    join,
    leave,
    patient_group,
)
from controlbooth.trainer.engine import DTYPES, resolve_precision
from controlbooth.trainer.failures import end_superseded, note_failure
from controlbooth.trainer.full import train_fully
from controlbooth.trainer.network_check import subjects_network_problems
from controlbooth.trainer.pictures import SubjectError
from controlbooth.trainer.run_page import source_tags
from controlbooth.trainer.same_base import BASE_FILE, base_facts, check_same_base, read_base_facts, told_of_base
from controlbooth.trainer.starting import folder_problems, refuse, tracking_problems
from controlbooth.trainer.step import dreambooth_step
from controlbooth.trainer.studio import (
    MOST_SKIPPED,
    Training,
    begin_training,
    divergence,
    draw_prior,
    failures,
    make_batch,
    subject_seed,
    unfinished,
    write_status,
)
from controlbooth.trainer.subject_tracking import SubjectTracking, Untracked
from controlbooth.trainer.subject_validation import (
    BEST_LORA,
    Studio,
    is_due,
    open_studio,
    recall,
    validate_subjects,
)
from controlbooth.trainer.subjects import (
    SubjectRunConfig,
    Task,
    check_full,
    load_run,
    load_subjects,
    record_texts,
    settle,
    share_of_rank,
)
from controlbooth.trainer.train import StopRequest, choose_once, peak_memory_gib, quiet_libraries, tell_page
from controlbooth.trainer.words import check_words

LAYERS = {"attention": ATTENTION, "attention+convolutions": ATTENTION + CONVOLUTIONS}
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class Stack:
    """What one rank trains: slot k of the adapters belongs to trainings[k]."""

    base: Base
    adapters: dict[str, StackedAdapter]
    optimizer: StackedAdamW
    trainings: list[Training]
    queue: list[Task]
    waiting: dict[str, dict[str, Tensor]]
    """Of subjects that have begun already: in the queue, under another number of ranks, or failed and to be tried
    again."""
    tracking: Untracked
    studio: Studio


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m controlbooth.trainer.dreambooth",
        description="One rank of a DreamBooth run. Start it with torchrun, or with `controlbooth dreambooth run`.",
    )
    parser.add_argument("subjects", type=Path, metavar="SUBJECTS", help="a YAML, CSV, JSONL or Parquet list")
    parser.add_argument("run", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--rows", metavar="FIRST:END", help="train these rows of the manifest alone, counted from 0")
    options = parser.parse_intermixed_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    stop = StopRequest()
    quiet_libraries()
    try:
        config = load_run(options.run, options.overrides)
        for problem in () if options.rows else subjects_network_problems(config):  # of an array it is noted below
            raise ConfigError(problem)  # before the run's folder is taken, and anything is written
        subjects, faults = load_subjects(options.subjects)
        tasks, more = settle(subjects, config)
        split, _ = check_words(tasks, config)
        tasks, more = [task for task in tasks if task.name not in split], more | split
        faults |= more
        folder = own = config.output / config.name
        if options.rows:
            rows = read_rows(options.rows, len(subjects))
            own = own_folder(folder, rows)
            names = {subject.name for subject in subjects[rows.start : rows.stop]}
            tasks = [task for task in tasks if task.name in names]
            faults = {name: fault for name, fault in faults.items() if name in names}
        elif others := sorted((folder / "rows").glob("*")):
            raise ConfigError(f"{folder} was begun as an array ({others[0]}): go on with `controlbooth launch resume`")
        world = join()
        if world.rank == 0:  # the others end with it
            refuse([*tracking_problems(config), *folder_problems(own)])
        with only_run(own, world) as attempt:
            try:
                return train_subjects(config, tasks, faults, attempt, world, stop, folder)
            except (ValueError, OSError) as error:
                if options.rows:  # whether a task of an array is to be tried again is read from there
                    note_failure(attempt, rank, error)
                raise
    except Superseded as error:
        end_superseded(error, rank)
    except (ValueError, OSError) as error:
        print(f"\nrank {rank}: {error_text(error)}", file=sys.stderr, flush=True)  # not behind a bar
        os._exit(2)
    finally:
        leave()


def own_folder(folder: Path, rows: range) -> Path:
    """Of the task that trains these rows. Raises ConfigError where others would train some of them as well."""
    if (folder / "state").exists():
        raise ConfigError(f"{folder} was begun by `controlbooth dreambooth run`: go on with that, or take another name")
    for other in (folder / "rows").glob("*-*"):
        first, end = map(int, other.name.split("-"))
        if (first, end) != (rows.start, rows.stop) and first < rows.stop and rows.start < end:
            raise ConfigError(
                f"{folder} was begun with other tasks: rows {first}:{end} and {rows.start}:{rows.stop} overlap. Take "
                "as many --subjects-per-task as before, or another name for the run"
            )
    return folder / "rows" / f"{rows.start}-{rows.stop}"


def read_rows(text: str, count: int) -> range:
    """FIRST:END of `count` rows. Raises ConfigError for what is none."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end) <= count):
        raise ConfigError(f"--rows is {text!r}, but it is FIRST:END, with 0 <= FIRST < END <= {count}")
    return range(int(first), int(end))


def train_subjects(
    config: SubjectRunConfig,
    tasks: Sequence[Task],
    faults: dict[str, str],
    attempt: Attempt,
    world: World,
    stop: StopRequest,
    folder: Path,
) -> int:
    """Trains all that are not finished. Returns 0, also where it was stopped, or 1 where a subject has failed.

    folder: of the run. That of the attempt is the same, or the part of it that belongs to these tasks alone, where
    others train others.
    """
    own = attempt.run
    zero_stage = config.engine.zero_stage if config.method == "full" else 1
    precision = resolve_precision(config.precision, world.device, zero_stage)
    if config.method == "full":
        check_full(config, world.world_size)
    base = load_base(base_folder(config.model.base), config.model.family, DTYPES[precision], world.device)
    go_on_with_base(attempt, folder, base, world)
    attention = choose_once(
        config.model.attention, world, precision, attempt, lambda: stack_attention_shapes(config, base)
    )
    apply_attention(base.unet, attention)
    if config.model.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()  # without which it is passed over; the U-Net has no dropout
    if world.rank == 0:
        if own == folder:  # of an array all subjects are in the record, which who submitted it has written
            for name, text in record_texts(config, tasks).items():
                write_text(attempt, folder / name, text)
        for name, fault in faults.items():
            write_status(attempt, folder, name, state="failed", error=fault)
    barrier()
    tags = run_tags(config, base, attention.name, precision, world)
    writes = config.method == "lora" or world.rank == 0
    tracking = Untracked()  # of ranks that train a subject together the first logs
    if writes:
        tracking = SubjectTracking(config, folder, attempt, world, tags, partial(tell_page, world))
    with tracking.open(faults if world.rank == 0 else {}) as closing:
        studio = open_studio(config, folder, attempt, tracking, world.device, writes)
        draw_prior(config, base, tasks, world)
        if config.method == "full":
            waiting = unfinished(folder, tasks)
            stopped = train_fully(config, base, waiting, attention, precision, folder, attempt, world, stop, studio)
        else:
            stopped = train_stacked(config, base, tasks, faults, folder, attempt, world, stop, studio)
        closing.stopped = stopped
    barrier()  # the first rank takes the attempt's folder away, without which the others send nothing more
    failed = failures(folder, tasks) | faults
    if world.rank == 0:
        finished = len(tasks) - len(unfinished(folder, tasks))
        left = f", {len(tasks) + len(faults) - finished - len(failed)} to go" if stopped else ""
        print(f"{finished} subjects finished, {len(failed)} failed{left}: {folder}")
        for name, error in failed.items():
            print(f"  {name}: {error}")
    return 1 if failed else 0


def go_on_with_base(attempt: Attempt, folder: Path, base: Base, world: World) -> None:
    """Notes the base in the run's base.json, or raises ConfigError where it is not the one that is noted there.

    Every rank calls this, and all of them raise or none.
    """
    saved = from_first_rank(read_base_facts(folder) if world.rank == 0 else None)
    begun = "when this run began"
    if saved is None:
        if world.rank == 0:
            if (folder / "subjects").is_dir():
                for line in told_of_base({}, begun):
                    print(line, file=sys.stderr, flush=True)
            write_text(attempt, folder / BASE_FILE, json.dumps(base_facts(base), indent=1))
        return
    remedy = f"Put it back as it was, or give the run another name: {folder} holds subjects that were trained on that"
    check_same_base(saved, base, begun, remedy)
    if world.rank == 0:
        for line in told_of_base(saved, begun):
            print(line, file=sys.stderr, flush=True)


def run_tags(config: SubjectRunConfig, base: Base, attention: str, precision: str, world: World) -> dict[str, str]:
    """Of the job in MLflow, to filter by."""
    return {
        "task": "dreambooth",
        "method": config.method,
        "base": base_folder(config.model.base).name,
        "family": base.family.name,
        "base_digest": base.digest,
        "attention": attention,
        "precision": precision,
        "world_size": str(world.world_size),
        "device": device_name(world.device),
        **source_tags("controlbooth.trainer.dreambooth"),
    }


def train_stacked(
    config: SubjectRunConfig,
    base: Base,
    tasks: Sequence[Task],
    faults: dict[str, str],
    folder: Path,
    attempt: Attempt,
    world: World,
    stop: StopRequest,
    studio: Studio,
) -> bool:
    """Adapters of several subjects at once on each rank; -> whether it was stopped."""
    left = unfinished(folder, tasks)
    if world.rank == 0:
        plan_ranks(attempt, config, left, faults, world.world_size)
    barrier()
    at_the_end = patient_group()
    stack = make_stack(config, base, tasks, faults, left, folder, attempt, world, studio)
    run_stack(config, stack, folder, attempt, world, stop)
    return any(gather_objects(bool(stack.trainings or stack.queue), world, at_the_end))


def plan_ranks(
    attempt: Attempt, config: SubjectRunConfig, left: Sequence[Task], faults: dict[str, str], world_size: int
) -> None:
    """Writes what each rank begins with, on rank 0, where the last start had another number of ranks or none, or where
    its state is damaged.

    Subjects that were in training keep their weights and steps; all that are not finished are dealt out anew.
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
    """-> the state files to go on from, and what is wrong with those that the last start has left.

    before: of CURRENT, the folder of the last start. Where its files are not all there and whole, every whole file is
    taken, the newest last: a subject that goes on from an older step, or begins anew, ends with the same weights.
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
    """Why a state file cannot be read; None of a whole one. It tells its own length, so what was cut off is seen."""
    try:
        with safe_open(path, "pt") as file:
            json.loads(file.metadata()["names"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read ({error_text(error)})"
    return None


def make_stack(
    config: SubjectRunConfig,
    base: Base,
    tasks: Sequence[Task],
    faults: dict[str, str],
    left: Sequence[Task],
    folder: Path,
    attempt: Attempt,
    world: World,
    studio: Studio,
) -> Stack:
    """This rank's subjects as its state file says. left: those that are not finished.

    One that had begun and cannot be read now has failed. What it has learned is kept, for a start at which it can.
    """
    by_name = {task.name: task for task in tasks}
    state = read_state(state_path(attempt.run, world))
    if gone := [name for name in (*state.slots, *state.queue) if name not in by_name and name not in faults]:
        raise ConfigError(
            f"{attempt.run} has begun with subjects that the manifest no longer has ({', '.join(gone[:3])}). Put them "
            "back, or take another name for the run"
        )
    kept = [task.name for task in left if task.name in state.waiting and task.name not in state.queue]
    queue = [by_name[name] for name in (*kept, *state.queue) if name in by_name]
    known = {name for one in gather_objects([*state.slots, *kept, *state.queue], world) for name in one}
    new = [task for task in left if task.name not in known]  # or it had failed, and is tried again
    trainings, waiting, slots = [], dict(state.waiting), []
    for name, saved in state.slots.items():
        training = (
            try_to_begin(config, base, by_name[name], folder, attempt, studio.tracking) if name in by_name else None
        )
        if training is None:
            waiting[name] = saved
        else:
            trainings.append(training)
            slots.append(saved)
    rank = max([task.rank for task in tasks], default=config.adapter.rank)
    adapters = attach_adapters(base.unet, LAYERS[config.adapter.layers], len(trainings), rank)
    optimizer = StackedAdamW(adapters, weight_decay=config.weight_decay)
    queue += share_of_rank(new, world.rank, world.world_size)
    stack = Stack(base, adapters, optimizer, trainings, queue, waiting, studio.tracking, studio)
    for slot, saved in enumerate(slots):
        restore_slot(stack, slot, saved)
        recall(studio, trainings[slot])
        studio.tracking.begin(trainings[slot].task, trainings[slot].step)
    studio.tracking.queue(queue)
    note_saved(stack, "training", folder, attempt)
    return stack


def try_to_begin(
    config: SubjectRunConfig, base: Base, task: Task, folder: Path, attempt: Attempt, tracking: Untracked
) -> Training | None:
    """A subject to be put into a slot; None where it cannot begin, and its status says why."""
    try:
        return begin_training(config, base, task)
    except SubjectError as error:
        write_status(attempt, folder, task.name, state="failed", error=str(error))
        tracking.end(task, "failed", str(error))
        return None


def run_stack(
    config: SubjectRunConfig, stack: Stack, folder: Path, attempt: Attempt, world: World, stop: StopRequest
) -> None:
    """Trains until the queue and all slots are empty, or until it is asked to stop, after a step and with its state."""
    path = state_path(attempt.run, world)
    left = sum(task.steps for task in stack.queue) + sum(t.task.steps - t.step for t in stack.trainings)
    bar = tqdm(total=left, unit="step", desc="subjects", disable=world.rank > 0, dynamic_ncols=True)
    since_saved, ended_at = 0, time.perf_counter()
    while True:
        fill_slots(config, stack, folder, attempt)
        if not stack.trainings:
            break
        ended_at += validate_due(config, stack, attempt, stop)
        began = time.perf_counter()
        metrics = step_stack(config, stack)
        check_still_ours(attempt)
        stalled, ended_at = began - ended_at, time.perf_counter()
        log_stack(config, stack, ended_at - began, stalled, metrics, world)
        bar.update(len(stack.trainings))
        bar.set_postfix(
            training=len(stack.trainings), waiting=len(stack.queue), loss=f"{metrics['loss']:.4f}", refresh=False
        )
        since_saved += 1
        ended_at += validate_due(config, stack, attempt, stop)
        ended = [t for t in stack.trainings if t.step >= t.task.steps or t.skipped > MOST_SKIPPED]
        for training in ended:
            end_training(stack, training, folder, attempt)
        if ended:
            keep = [slot for slot, training in enumerate(stack.trainings) if training not in ended]
            stack.trainings = [stack.trainings[slot] for slot in keep]
            keep_slots(stack.adapters, stack.optimizer, keep)
        if ended or stop.requested or since_saved >= config.checkpoint_every_steps:
            save_stack(stack, path, attempt)
            note_saved(stack, "stopped" if stop.requested else "training", folder, attempt)
            since_saved = 0
        if stop.requested:
            for training in stack.trainings:
                stack.tracking.end(training.task, "stopped")
            break
    bar.close()


def validate_due(config: SubjectRunConfig, stack: Stack, attempt: Attempt, stop: StopRequest) -> float:
    """Looks at those subjects of the stack of which a validation is due; -> how many seconds it took.

    Asked to stop, it leaves it to the next start, but for subjects that have come to their end.
    """
    trainings = stack.trainings
    due = [slot for slot, training in enumerate(trainings) if is_due(config, training)]
    due = [slot for slot in due if not stop.requested or trainings[slot].step >= trainings[slot].task.steps]
    if not due:
        return 0.0
    began = time.perf_counter()

    def keep_best(training: Training, own: Path) -> None:
        weights = subject_weights(stack.adapters, trainings.index(training), training.task.rank)
        save_lora(attempt, weights, own / BEST_LORA)

    validate_subjects(
        stack.studio,
        stack.base,
        lambda *inputs: denoise(stack.base.unet, *inputs),
        [trainings[slot] for slot in due],
        lambda branches: chosen_subjects(stack.adapters, due * branches),
        keep_best,
    )
    return time.perf_counter() - began


def log_stack(
    config: SubjectRunConfig, stack: Stack, seconds: float, stalled: float, metrics: dict[str, float], world: World
) -> None:
    """What the last step was worth to each subject, and what it cost.

    stalled: seconds between the step before and this one, in which subjects begin, end, are drawn and are saved.
    """
    for training in stack.trainings:
        losses = {"train/instance_loss": training.instance_loss}
        if training.prior is not None:
            losses["train/prior_loss"] = training.prior_loss
        stack.tracking.log(training.task.name, training.step, losses)
    pictures = len(stack.trainings) * config.instance_batch_size * (2 if config.prior.weight else 1)
    stack.tracking.log_step(
        {
            "train/instance_loss": metrics["loss"],
            "train/prior_loss": metrics["prior_loss"],
            "train/samples_per_second": pictures / (seconds + stalled),
            "train/step_seconds": seconds + stalled,
            "train/stall_percent": 100.0 * stalled / (seconds + stalled),
            "train/peak_memory_gib": peak_memory_gib(world),
            "train/subjects_in_training": float(len(stack.trainings)),
        }
    )


def note_saved(stack: Stack, state: str, folder: Path, attempt: Attempt) -> None:
    """Writes into the status of each subject in training how far it is saved, and whether it is trained on now."""
    for training in stack.trainings:
        task = training.task
        write_status(attempt, folder, task.name, state=state, step=training.step, steps=task.steps)


def fill_slots(config: SubjectRunConfig, stack: Stack, folder: Path, attempt: Attempt) -> None:
    """Begins subjects of the queue while there is room. One that cannot begin has failed, and takes none."""
    while stack.queue and len(stack.trainings) < config.subjects_per_batch:
        task = stack.queue.pop(0)
        training = try_to_begin(config, stack.base, task, folder, attempt, stack.tracking)
        if training is None:
            continue
        slot = len(stack.trainings)
        keep_slots(stack.adapters, stack.optimizer, [*range(slot), None])
        stack.trainings.append(training)
        if task.name in stack.waiting:
            restore_slot(stack, slot, stack.waiting.pop(task.name))
        else:
            reset_subject(stack.adapters, slot, task.rank, seed=subject_seed(config, task))
        recall(stack.studio, training)
        stack.tracking.begin(task, training.step)
        write_status(attempt, folder, task.name, state="training", step=training.step, steps=task.steps)


def step_stack(config: SubjectRunConfig, stack: Stack) -> dict[str, float]:
    """One step of every subject in the stack."""
    trainings = stack.trainings
    for parameter in stack.optimizer.parameters:
        parameter.grad = None
    batch = make_batch(config, stack.base, trainings)
    instance, prior = dreambooth_step(
        stack.base,
        lambda *inputs: denoise(stack.base.unet, *inputs),
        torch.Tensor.backward,
        batch,
        len(trainings),
        config.prior.weight,
        config.min_snr_gamma,
    )
    device = instance.device
    rates = torch.tensor([t.task.learning_rate for t in trainings], device=device)
    clips = torch.full((len(trainings),), config.max_grad_norm, device=device)
    _, moved = stack.optimizer.step(rates, [t.step for t in trainings], clips)
    losses = torch.stack([instance, prior]).tolist()  # one wait for the device
    for training, updated, own, drawn in zip(trainings, moved.tolist(), *losses, strict=True):
        training.step += 1
        training.skipped = 0 if updated else training.skipped + 1
        training.instance_loss, training.prior_loss = own, drawn
        training.loss = own + config.prior.weight * drawn
    mean, prior_mean = (sum(values) / len(values) for values in losses)
    return {"loss": mean, "prior_loss": prior_mean}


def end_training(stack: Stack, training: Training, folder: Path, attempt: Attempt) -> None:
    """Writes a finished subject's LoRA, or why it failed. Raises Superseded where a newer start trains the subject."""
    task, slot = training.task, stack.trainings.index(training)
    weights = subject_weights(stack.adapters, slot, task.rank)
    finite = all(bool(tensor.isfinite().all()) for tensor in weights.values())
    if (error := divergence(task, training.step, training.skipped, training.loss, finite)) is not None:
        write_status(attempt, folder, task.name, state="failed", step=training.step, error=error)
        stack.tracking.end(task, "failed", error)
        return
    save_lora(attempt, weights, folder / "subjects" / task.name / LORA_FILE)
    write_status(attempt, folder, task.name, state="finished", step=training.step, prompt=task.instance_prompt)
    stack.tracking.end(task, "finished")


def save_lora(attempt: Attempt, weights: dict[str, Tensor], path: Path) -> None:
    """In the names that diffusers' load_lora_weights reads, whole or not at all. Raises Superseded."""
    tensors = {f"unet.{name}": tensor for name, tensor in weights.items()}
    write_file(attempt, path, lambda made: save_weights(tensors, made))


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


def stack_attention_shapes(config: SubjectRunConfig, base: Base) -> tuple[AttentionShape, ...]:
    """Those of one step of a whole stack, for choosing the kernels by timing them."""
    size = config.resolution // base.family.vae_factor
    rows = config.subjects_per_batch * config.instance_batch_size * (2 if config.prior.weight else 1)
    latents = torch.zeros(rows, base.unet.config["in_channels"], size, size, device=base.device)
    text = encode_prompts(base, [""] * rows, picture_size=(config.resolution, config.resolution))
    timesteps = torch.zeros(rows, dtype=torch.int64, device=base.device)
    return attention_shapes(base.unet, lambda: denoise(base.unet, latents, timesteps, text))


if __name__ == "__main__":
    end_process(main())
