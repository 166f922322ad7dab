"""Trains subjects as a stack: their LoRA adapters share one frozen base and one forward pass."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from controlbooth.models.attention import AttentionShape, attention_shapes
from controlbooth.models.base import Base
from controlbooth.models.denoisers.registry import denoise
from controlbooth.models.files.weights import save_weights
from controlbooth.models.lora import (
    StackedAdamW,
    detached_adapters,
    keep_slots,
    reset_subject,
    subject_weights,
)
from controlbooth.models.text import encode_prompts
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.adapted import attach, drawn_subjects
from controlbooth.trainer.dreambooth.batches import Training, begin_training, make_batch, subject_seed
from controlbooth.trainer.dreambooth.images import SubjectError
from controlbooth.trainer.dreambooth.manifest import Task, share_of_rank
from controlbooth.trainer.dreambooth.session import SubjectRun
from controlbooth.trainer.dreambooth.stack_state import (
    Stack,
    plan_ranks,
    read_state,
    restore_slot,
    save_stack,
    state_path,
)
from controlbooth.trainer.dreambooth.status import MOST_SKIPPED, divergence, unfinished
from controlbooth.trainer.dreambooth.step import dreambooth_step, predict
from controlbooth.trainer.dreambooth.validation import BEST_LORA, is_due, recall, validate_subjects
from controlbooth.trainer.engine.distributed import barrier, gather_objects, patient_group
from controlbooth.trainer.run.attempt import Attempt, check_still_ours, write_file
from controlbooth.trainer.run.process import peak_memory_gib

LORA_FILE = "pytorch_lora_weights.safetensors"


def train_stacked(run: SubjectRun, tasks: Sequence[Task], faults: dict[str, str]) -> bool:
    """Trains adapters of several subjects at once on each rank.

    Returns whether some rank was stopped before it had trained all of its subjects.
    """
    left = unfinished(run.folder, tasks)
    if run.world.rank == 0:
        plan_ranks(run.attempt, run.config, left, faults, run.world.world_size)
    barrier()
    at_the_end = patient_group()
    stack = make_stack(run, tasks, faults, left)
    run_stack(run, stack)
    return any(gather_objects(bool(stack.trainings or stack.queue), run.world, at_the_end))


def make_stack(run: SubjectRun, tasks: Sequence[Task], faults: dict[str, str], left: Sequence[Task]) -> Stack:
    """Makes this rank's stack of subjects from its state file. left: the subjects that are not finished.

    A subject that had begun and whose pictures cannot be read now has failed. What it has learned is kept for a start
    at which they can. Raises ConfigError where the manifest no longer has a subject of the state file.
    """
    by_name = {task.name: task for task in tasks}
    state = read_state(state_path(run.attempt.run, run.world))
    if gone := [name for name in (*state.slots, *state.queue) if name not in by_name and name not in faults]:
        raise ConfigError(
            f"{run.attempt.run} has begun with subjects that the manifest no longer has ({', '.join(gone[:3])}). Put "
            "them back, or take another name for the run"
        )
    kept = [task.name for task in left if task.name in state.waiting and task.name not in state.queue]
    queue = [by_name[name] for name in (*kept, *state.queue) if name in by_name]
    known = {name for one in gather_objects([*state.slots, *kept, *state.queue], run.world) for name in one}
    new = [task for task in left if task.name not in known]  # or it had failed, and is tried again
    trainings, waiting, slots = [], dict(state.waiting), []
    for name, saved in state.slots.items():
        training = try_to_begin(run, by_name[name]) if name in by_name else None
        if training is None:
            waiting[name] = saved
        else:
            trainings.append(training)
            slots.append(saved)
    rank = max([task.rank for task in tasks], default=run.config.adapter.rank)
    networks, adapters = attach(run.config, run.base, len(trainings), rank)
    optimizer = StackedAdamW(adapters, weight_decay=run.config.weight_decay)
    queue += share_of_rank(new, run.world.rank, run.world.world_size)
    stack = Stack(run.base, networks, adapters, optimizer, trainings, queue, waiting)
    for slot, saved in enumerate(slots):
        restore_slot(stack, slot, saved)
        recall(run.studio, trainings[slot])
        run.tracking.begin(trainings[slot].task, trainings[slot].step)
    run.tracking.queue(queue)
    note_saved(run, stack, "training")
    return stack


def try_to_begin(run: SubjectRun, task: Task) -> Training | None:
    """Begins a subject that is to be put into a slot. Returns None where it cannot begin; its status then says why."""
    try:
        return begin_training(run.config, run.base, task)
    except SubjectError as error:
        run.write_status(task.name, state="failed", error=str(error))
        run.tracking.end(task, "failed", str(error))
        return None


def run_stack(run: SubjectRun, stack: Stack) -> None:
    """Trains until the queue and all slots are empty, or until a stop is requested.

    A stop takes effect after the current step, once the state is saved.
    """
    world, stop = run.world, run.stop
    path = state_path(run.attempt.run, world)
    left = sum(task.steps for task in stack.queue) + sum(t.task.steps - t.step for t in stack.trainings)
    bar = tqdm(total=left, unit="step", desc="subjects", disable=world.rank > 0, dynamic_ncols=True)
    since_saved, ended_at = 0, time.perf_counter()
    while True:
        fill_slots(run, stack)
        if not stack.trainings:
            break
        ended_at += validate_due(run, stack)
        began = time.perf_counter()
        metrics = step_stack(run.config, stack)
        check_still_ours(run.attempt)
        stalled, ended_at = began - ended_at, time.perf_counter()
        log_stack(run, stack, ended_at - began, stalled, metrics)
        bar.update(len(stack.trainings))
        bar.set_postfix(
            training=len(stack.trainings), waiting=len(stack.queue), loss=f"{metrics['loss']:.4f}", refresh=False
        )
        since_saved += 1
        ended_at += validate_due(run, stack)
        ended = [t for t in stack.trainings if t.step >= t.task.steps or t.skipped > MOST_SKIPPED]
        for training in ended:
            end_training(run, stack, training)
        if ended:
            keep = [slot for slot, training in enumerate(stack.trainings) if training not in ended]
            stack.trainings = [stack.trainings[slot] for slot in keep]
            keep_slots(stack.adapters, stack.optimizer, keep)
        stopping = stop.requested  # asked once: what is requested while a state is saved stops after the next step
        if ended or stopping or since_saved >= run.config.checkpoint_every_steps:
            save_stack(stack, path, run.attempt)
            note_saved(run, stack, "stopped" if stopping else "training")
            since_saved = 0
        if stopping:
            for training in stack.trainings:
                run.tracking.end(training.task, "stopped")
            break
    bar.close()


def validate_due(run: SubjectRun, stack: Stack) -> float:
    """Validates those subjects of the stack that are due, and returns how many seconds it took.

    Once a stop is requested, only subjects that have reached their last step are validated; the next start validates
    the others.
    """
    trainings = stack.trainings
    due = [slot for slot, training in enumerate(trainings) if is_due(run.config, training)]
    due = [slot for slot in due if not run.stop.requested or trainings[slot].step >= trainings[slot].task.steps]
    if not due:
        return 0.0
    began = time.perf_counter()

    def keep_best(training: Training, own: Path) -> None:
        weights = subject_weights(stack.adapters, trainings.index(training), training.task.rank)
        save_lora(run.attempt, weights, own / BEST_LORA)

    validate_subjects(
        run.studio,
        stack.base,
        partial(predict, stack.base, run.config.resolution),
        [trainings[slot] for slot in due],
        lambda branches: drawn_subjects(stack.adapters, due, branches),
        keep_best,
    )
    return time.perf_counter() - began


def log_stack(run: SubjectRun, stack: Stack, seconds: float, stalled: float, metrics: dict[str, float]) -> None:
    """Logs each subject's losses at the last step, and what the step cost.

    stalled: seconds between the step before and this one, in which subjects begin, end, are drawn and are saved.
    """
    for training in stack.trainings:
        losses = {"train/instance_loss": training.instance_loss}
        if training.prior is not None:
            losses["train/prior_loss"] = training.prior_loss
        run.tracking.log(training.task.name, training.step, losses)
    pictures = len(stack.trainings) * run.config.instance_batch_size * (2 if run.config.prior.weight else 1)
    run.tracking.log_step(
        {
            "train/instance_loss": metrics["loss"],
            "train/prior_loss": metrics["prior_loss"],
            "train/samples_per_second": pictures / (seconds + stalled),
            "train/step_seconds": seconds + stalled,
            "train/stall_percent": 100.0 * stalled / (seconds + stalled),
            "train/peak_memory_gib": peak_memory_gib(run.world),
            "train/subjects_in_training": float(len(stack.trainings)),
        }
    )


def note_saved(run: SubjectRun, stack: Stack, state: str) -> None:
    """Writes into the status of each subject in training its state, and the step up to which it is saved."""
    for training in stack.trainings:
        task = training.task
        run.write_status(task.name, state=state, step=training.step, steps=task.steps)


def fill_slots(run: SubjectRun, stack: Stack) -> None:
    """Begins subjects of the queue while there is room. One that cannot begin has failed, and takes no slot."""
    while stack.queue and len(stack.trainings) < run.config.subjects_per_batch:
        task = stack.queue.pop(0)
        with detached_adapters(stack.networks, stack.adapters):  # the stack's rows are those of its subjects alone
            training = try_to_begin(run, task)
        if training is None:
            continue
        slot = len(stack.trainings)
        keep_slots(stack.adapters, stack.optimizer, [*range(slot), None])
        stack.trainings.append(training)
        if task.name in stack.waiting:
            restore_slot(stack, slot, stack.waiting.pop(task.name))
        else:
            reset_subject(stack.adapters, slot, task.rank, seed=subject_seed(run.config, task))
        recall(run.studio, training)
        run.tracking.begin(task, training.step)
        run.write_status(task.name, state="training", step=training.step, steps=task.steps)


def step_stack(config: SubjectRunConfig, stack: Stack) -> dict[str, float]:
    """Makes one step of every subject in the stack, and returns the means of their instance and prior losses."""
    trainings = stack.trainings
    for parameter in stack.optimizer.parameters:
        parameter.grad = None
    batch = make_batch(config, stack.base, trainings)
    instance, prior = dreambooth_step(
        stack.base,
        partial(predict, stack.base, config.resolution),
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


def end_training(run: SubjectRun, stack: Stack, training: Training) -> None:
    """Writes a finished subject's LoRA, or why it failed. Raises Superseded where a newer start trains the subject."""
    task, slot = training.task, stack.trainings.index(training)
    weights = subject_weights(stack.adapters, slot, task.rank)
    finite = all(bool(tensor.isfinite().all()) for tensor in weights.values())
    if (error := divergence(task, training.step, training.skipped, training.loss, finite)) is not None:
        run.write_status(task.name, state="failed", step=training.step, error=error)
        run.tracking.end(task, "failed", error)
        return
    save_lora(run.attempt, weights, run.folder / "subjects" / task.name / LORA_FILE)
    run.write_status(task.name, state="finished", step=training.step, prompt=task.instance_prompt)
    run.tracking.end(task, "finished")


def save_lora(attempt: Attempt, weights: dict[str, Tensor], path: Path) -> None:
    """Writes a LoRA by the names that diffusers' load_lora_weights reads, whole or not at all. Raises Superseded."""
    write_file(attempt, path, lambda made: save_weights(weights, made))


def stack_attention_shapes(config: SubjectRunConfig, base: Base) -> tuple[AttentionShape, ...]:
    """Returns the attention shapes of one step of a full stack, for which kernels are timed and chosen."""
    size = config.resolution // base.family.vae_factor
    rows = config.subjects_per_batch * config.instance_batch_size * (2 if config.prior.weight else 1)
    latents = torch.zeros(rows, base.latent_channels, size, size, device=base.device)
    text = encode_prompts(base, [""] * rows, picture_size=(config.resolution, config.resolution))
    timesteps = torch.zeros(rows, dtype=torch.int64, device=base.device)
    return attention_shapes(base.denoiser, lambda: denoise(base.denoiser, latents, timesteps, text))
