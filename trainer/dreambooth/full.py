"""DreamBooth as the paper has it (arXiv 2208.12242): all layers of the U-Net or the transformer, and the text encoders
where that is asked, but not T5 (see `adapted.trained_encoders`).

Subjects come one after another, each from the base's own weights, and all ranks train the same one under ZeRO. What a
step holds is drawn from (the subject's seed, the step), as with adapters, and dealt out to the ranks.

    RUN/subjects/NAME/pipeline/      the family's pipeline of diffusers reads it, in float32
                      checkpoints/   while it trains
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from controlbooth.models.attention import apply_attention
from controlbooth.models.base import Base
from controlbooth.models.recomputing import recompute
from controlbooth.trainer.config.run import OptimizerConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.adapted import trained_encoders
from controlbooth.trainer.dreambooth.batches import Training, begin_training, make_batch
from controlbooth.trainer.dreambooth.images import SubjectError
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.dreambooth.pipeline import PIPELINE, WEIGHTS, put_pipeline, write_weights
from controlbooth.trainer.dreambooth.session import SubjectRun
from controlbooth.trainer.dreambooth.status import MOST_SKIPPED, divergence
from controlbooth.trainer.dreambooth.step import SubjectBatch, Text, dreambooth_step, predict
from controlbooth.trainer.dreambooth.validation import BEST_PIPELINE, is_due, recall, validate_subjects
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.distributed import World, all_sum, barrier, gather_objects, on_first_rank
from controlbooth.trainer.engine.offloading import keeping_activations
from controlbooth.trainer.run import checkpoint as checkpoints
from controlbooth.trainer.run import saving
from controlbooth.trainer.run.base import once_a_machine, open_base
from controlbooth.trainer.run.process import StopRequest, peak_memory_gib


class FullNetwork(nn.Module):
    """What is trained: the U-Net or the transformer of a base, and its text encoders where they learn too."""

    def __init__(self, base: Base, train_text_encoder: bool, side: int):
        super().__init__()
        self.add_module(base.family.denoiser.folder, base.denoiser)
        self.text_encoders = nn.ModuleList(trained_encoders(base).values() if train_text_encoder else ())
        self.base, self.side = base, side
        self.requires_grad_(True)

    def forward(self, noisy_latents: Tensor, times: Tensor, text: Text) -> Tensor:
        return predict(self.base, self.side, noisy_latents, times, text)


@dataclass
class FullTraining:
    """A subject that all ranks train."""

    task: Task
    base: Base
    """Its own, whose U-Net or transformer learns."""
    engine: Any
    step: int = 0


def begin_full(run: SubjectRun, task: Task) -> FullTraining:
    """Begins a subject with the base's own weights, or those of the subject's latest checkpoint."""
    config, world = run.config, run.world
    base = open_base(config, torch.float32, world.device, once_a_machine(world))
    base.text_encoders = tuple(  # T5 never learns, and a second one, of 19 GB in float32, would be for nothing
        frozen if own.config.model_type == "t5" else own
        for own, frozen in zip(base.text_encoders, run.base.text_encoders, strict=True)
    )
    apply_attention(base.denoiser, run.attention)
    recompute(base.denoiser, config.model.gradient_checkpointing)
    if config.model.gradient_checkpointing:
        base.denoiser.train()
    network = FullNetwork(base, config.train_text_encoder, config.resolution)
    share = config.instance_batch_size // world.world_size
    own = run.folder / "subjects" / task.name
    try:
        latest = checkpoints.latest_checkpoint(own, world, partial(tqdm.write, file=sys.stderr))
    except checkpoints.AllDamaged:  # which it has said; a subject has one checkpoint, and begins anew in little time
        latest = None
    saved = None if latest is None else on_first_rank(lambda: checkpoints.read_state(latest), world)
    settings = optimizer_settings(config, task)
    engine = engines.initialize(
        network,
        config.engine,
        settings,
        engines.BatchSizes(config.instance_batch_size, share, 1),
        run.precision,
        load_universal=saved is not None and checkpoints.needs_universal(saved, world.world_size),
    )
    training = FullTraining(task, base, engine)
    if saved is not None and latest is not None:
        saved = {**saved, "optimizer": saved.get("optimizer", "adamw")}  # which older versions had alone
        now = identity(config, task, run.precision, base)
        if changed := [name for name, value in now.items() if saved[name] != value]:
            raise ConfigError(
                f"{latest} was saved with {changed[0]}={saved[changed[0]]!r}, and the run has {now[changed[0]]!r}. Set "
                f"it back, or delete {own} to begin this subject anew"
            )
        checkpoints.load_checkpoint(engine, latest, None, world, run.attempt)
        engines.apply_settings(engine, settings)
        training.step = saved["step"]
    return training


def optimizer_settings(config: SubjectRunConfig, task: Task) -> OptimizerConfig:
    return OptimizerConfig(
        name=config.optimizer,
        learning_rate=task.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def identity(config: SubjectRunConfig, task: Task, precision: str, base: Base) -> dict[str, Any]:
    """Returns the settings that a subject's checkpoint and the run that resumes from it must agree on."""
    return dict(
        zero_stage=config.engine.zero_stage,
        precision=precision,
        base_digest=base.digest,
        train_text_encoder=config.train_text_encoder,
        optimizer=config.optimizer,
        prompt=task.instance_prompt,
    )


def step_full(config: SubjectRunConfig, training: FullTraining, batch: SubjectBatch) -> tuple[float, float, bool]:
    """Makes one optimizer step, and returns the instance loss, the prior loss and whether the update was skipped.

    batch: this rank's SubjectBatch of one subject.
    """
    keeping = keeping_activations(config.engine, training.engine.module)

    def network(*inputs: Any) -> Tensor:
        with keeping():
            return training.engine(*inputs)

    instance, prior = dreambooth_step(
        training.base,
        network,
        lambda loss: engines.accumulate(training.engine, loss),
        batch,
        1,
        config.prior.weight,
        config.min_snr_gamma,
    )
    taken = engines.apply_gradients(training.engine, training.task.learning_rate)
    training.step += 1
    return float(instance), float(prior), bool(taken.skipped)


def has_finite_weights(engine: Any) -> bool:
    """Tells whether the weights that this rank holds are finite: the whole network's, or with ZeRO-3 its part."""
    own = (getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters())
    return all(bool(tensor.isfinite().all()) for tensor in own)


def save_full(run: SubjectRun, training: FullTraining) -> None:
    """Saves a checkpoint of the subject, and deletes its older ones. Every rank calls this."""
    own, world = run.folder / "subjects" / training.task.name, run.world
    state = identity(run.config, training.task, run.precision, training.base) | dict(
        step=training.step, world_size=world.world_size, metrics={}
    )
    saving.save_checkpoint(
        training.engine,
        own,
        state,
        yaml.safe_dump(run.config.model_dump(mode="json")),
        None,
        world,
        run.attempt,
        WEIGHTS,
        write_weights,
    )
    if world.rank == 0:
        committed = checkpoints.folder_of(own, training.step)
        checkpoints.prune(own, keep=1, keep_best=0, attempt=run.attempt, committed=committed)
    barrier()


def train_fully(run: SubjectRun, tasks: Sequence[Task]) -> bool:
    """Trains these subjects one after another, and returns whether training was stopped."""
    bar = tqdm(total=sum(task.steps for task in tasks), unit="step", desc="subjects", disable=run.world.rank > 0)
    run.tracking.queue(tasks)
    for task in tasks:
        pictures = begin_on_all_ranks(run, task)
        if pictures is None:
            bar.update(task.steps)
            continue
        stopped = train_subject(run, task, pictures, bar)
        engines.reclaim(run.world.device)  # before the next subject's: two would not fit where one does
        if stopped:
            break
    bar.close()
    return stop_everywhere(run.stop, run.world)


def begin_on_all_ranks(run: SubjectRun, task: Task) -> Training | None:
    """Reads and encodes a subject's pictures on every rank.

    Returns None where some rank cannot; the subject has then failed, and its status says why.
    """
    pictures, error = None, None
    try:
        pictures = begin_training(run.config, run.base, task)
    except SubjectError as raised:
        error = str(raised)
    errors = [one for one in gather_objects(error, run.world) if one is not None]  # a node's disk may fail it alone
    if pictures is not None and not errors:
        return pictures
    note(run, task, state="failed", error=errors[0])
    run.tracking.end(task, "failed", errors[0])
    return None


def note(run: SubjectRun, task: Task, **fields: object) -> None:
    """Writes the subject's status on the first rank; the other ranks leave it to that one."""
    if run.world.rank == 0:
        run.write_status(task.name, **fields)


def train_subject(run: SubjectRun, task: Task, pictures: Training, bar: tqdm) -> bool:
    """Trains one subject to its end, its failure or a stop, and returns whether it was stopped.

    Every rank calls this.
    """
    training = begin_full(run, task)
    note(run, task, state="training", step=training.step, steps=task.steps)
    run.tracking.begin(task, training.step)
    bar.update(training.step)
    pictures.step = training.step
    recall(run.studio, pictures)
    validate_full(run, training, pictures)
    ranks, skipped_in_a_row, stopped, error = run.world.world_size, 0, False, None
    ended_at = time.perf_counter()
    while training.step < task.steps and error is None and not stopped:
        pictures.step = training.step
        began = time.perf_counter()
        batch = batch_of_rank(run.config, run.base, pictures, run.world)
        own_loss, own_prior_loss, skipped = step_full(run.config, training, batch)
        loss, prior_loss, stops = all_sum([own_loss / ranks, own_prior_loss / ranks, float(run.stop.requested)])
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        stalled, ended_at = began - ended_at, time.perf_counter()
        log_full(run, training, loss, prior_loss, ended_at - began, stalled)
        bar.update()
        pictures.step = training.step
        bar.set_postfix(subject=task.name, loss=f"{loss:.4f}", prior=f"{prior_loss:.4f}", refresh=False)
        stopped = stops > 0
        if not stopped or training.step == task.steps:
            ended_at += validate_full(run, training, pictures)
        due = training.step % run.config.checkpoint_every_steps == 0 and not skipped_in_a_row
        # A skipped update leaves all as it was, so the last one is saved too, unless the subject fails by it: then
        # it is tried again from where it last moved.
        if due or stopped or training.step == task.steps or skipped_in_a_row > MOST_SKIPPED:
            whole_loss = loss + run.config.prior.weight * prior_loss
            error = save_unless_diverged(run, training, skipped_in_a_row, whole_loss, stopped)
    end_subject(run, training, error)
    engines.release(training.engine)
    return stopped


def save_unless_diverged(
    run: SubjectRun, training: FullTraining, skipped_in_a_row: int, loss: float, stopped: bool
) -> str | None:
    """Saves the subject unless its training has diverged on some rank.

    Returns why it has diverged, or None where it was saved. Every rank calls this.
    """
    own = divergence(training.task, training.step, skipped_in_a_row, loss, has_finite_weights(training.engine))
    error = next((one for one in gather_objects(own, run.world) if one is not None), None)
    if error is None:
        save_full(run, training)
        state = "stopped" if stopped else "training"
        note(run, training.task, state=state, step=training.step, steps=training.task.steps)
    return error


def end_subject(run: SubjectRun, training: FullTraining, error: str | None) -> None:
    """Records that a subject has finished, failed or been stopped. error: why it has failed."""
    task = training.task
    if error is not None:
        note(run, task, state="failed", step=training.step, error=error)
        run.tracking.end(task, "failed", error)
    elif training.step == task.steps:
        finish_full(run, training)
        note(run, task, state="finished", step=training.step, prompt=task.instance_prompt)
        run.tracking.end(task, "finished")
    else:
        run.tracking.end(task, "stopped")


def validate_full(run: SubjectRun, training: FullTraining, pictures: Training) -> float:
    """Validates the subject where a validation is due, and returns how many seconds it took. Every rank calls this."""
    config, studio = run.config, run.studio
    if not is_due(config, pictures):
        return 0.0
    began = time.perf_counter()

    def keep_best(_: Training, own: Path) -> None:
        weights = engines.full_state(training.engine)
        if run.world.rank == 0:
            put_pipeline(config, weights, own / BEST_PIPELINE, studio.attempt)

    validate_subjects(studio, training.base, training.engine, [pictures], lambda _: contextlib.nullcontext(), keep_best)
    return time.perf_counter() - began


def log_full(
    run: SubjectRun, training: FullTraining, loss: float, prior_loss: float, seconds: float, stalled: float
) -> None:
    """Logs the losses of the last step, and what it cost. stalled: seconds between the step before and this one."""
    losses = {"train/instance_loss": loss} | ({"train/prior_loss": prior_loss} if run.config.prior.weight else {})
    run.tracking.log(training.task.name, training.step, losses)
    pictures = run.config.instance_batch_size * (2 if run.config.prior.weight else 1)
    run.tracking.log_step(
        losses
        | {
            "train/samples_per_second": pictures / (seconds + stalled),
            "train/step_seconds": seconds + stalled,
            "train/stall_percent": 100.0 * stalled / (seconds + stalled),
            "train/peak_memory_gib": peak_memory_gib(run.world),
            "train/subjects_in_training": 1.0,
        }
    )


def batch_of_rank(config: SubjectRunConfig, base: Base, pictures: Training, world: World) -> SubjectBatch:
    """Returns this rank's share of a step."""
    share = config.instance_batch_size // world.world_size
    return make_batch(config, base, [pictures], slice(world.rank * share, (world.rank + 1) * share))


def stop_everywhere(stop: StopRequest, world: World) -> bool:
    return any(gather_objects(stop.requested, world))


def finish_full(run: SubjectRun, training: FullTraining) -> None:
    """Writes the pipeline from the last checkpoint, whole or not at all, and deletes the subject's checkpoints."""
    own = run.folder / "subjects" / training.task.name
    if run.world.rank == 0:
        latest = checkpoints.folder_of(own, training.step)
        put_pipeline(run.config, load_file(latest / WEIGHTS / "weights.safetensors"), own / PIPELINE, run.attempt)
        checkpoints.delete(own / "checkpoints", run.attempt)
    barrier()
