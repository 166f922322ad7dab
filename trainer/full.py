"""DreamBooth as the paper has it (arXiv 2208.12242): all layers of the U-Net, and the text encoder where that is asked.

Subjects come one after another, each from the base's own weights, and all ranks train the same one under ZeRO. What a
step holds is drawn from (the subject's seed, the step), as with adapters, and dealt out to the ranks.

    RUN/subjects/NAME/pipeline/      StableDiffusionPipeline.from_pretrained reads it, in float32
                      checkpoints/   while it trains
"""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.base import Base
from controlbooth.models.controlnet import denoise
from controlbooth.models.families import TextEncoding, encode_prompts
from controlbooth.models.loading import read_tensors
from controlbooth.models.pretrained import WEIGHTS_STEM, load_base, parts_of
from controlbooth.models.weight_files import read_json, variant_of, weights_files
from controlbooth.models.weights import save_pretrained, save_weights
from controlbooth.trainer import checkpoint as checkpoints
from controlbooth.trainer import engine as engines
from controlbooth.trainer.attempt import Attempt, move
from controlbooth.trainer.config import ConfigError, OptimizerConfig, base_folder
from controlbooth.trainer.disk import named_when_full
from controlbooth.trainer.distributed import World, all_sum, barrier, gather_objects
from controlbooth.trainer.pictures import SubjectError
from controlbooth.trainer.step import SubjectBatch, dreambooth_step
from controlbooth.trainer.studio import (
    MOST_SKIPPED,
    Training,
    begin_training,
    divergence,
    make_batch,
    write_status,
)
from controlbooth.trainer.subject_tracking import Untracked
from controlbooth.trainer.subject_validation import BEST_PIPELINE, ROWS, Studio, is_due, recall, validate_subjects
from controlbooth.trainer.subjects import SubjectRunConfig, Task
from controlbooth.trainer.train import StopRequest, peak_memory_gib

PIPELINE = "pipeline"
WEIGHTS = "network"
NETWORKS = {"unet": "unet.", "text_encoder": "text_encoders.0.", "text_encoder_2": "text_encoders.1."}
"""Folder in the pipeline -> what its parameters' names begin with in FullNetwork, of all networks that may learn."""


class FullNetwork(nn.Module):
    """What is trained: the U-Net of a base, and its text encoders where they learn too."""

    def __init__(self, base: Base, train_text_encoder: bool, picture_size: tuple[int, int]):
        super().__init__()
        self.unet = base.unet
        self.text_encoders = nn.ModuleList(base.text_encoders if train_text_encoder else ())
        self.base, self.picture_size = base, picture_size
        self.requires_grad_(True)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEncoding | list[str]) -> Tensor:
        if isinstance(text, list):
            text = encode_prompts(self.base, text, picture_size=self.picture_size)
        return denoise(self.base.unet, noisy_latents, timesteps, text)


@dataclass
class FullTraining:
    """A subject that all ranks train."""

    task: Task
    base: Base
    """Its own, whose U-Net learns."""
    engine: Any
    step: int = 0


def begin_full(
    config: SubjectRunConfig,
    task: Task,
    attention: AttentionChoice,
    precision: str,
    folder: Path,
    attempt: Attempt,
    world: World,
) -> FullTraining:
    """The base's own weights, or those of the subject's latest checkpoint."""
    base = load_base(base_folder(config.model.base), config.model.family, torch.float32, world.device)
    apply_attention(base.unet, attention)
    if config.model.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    network = FullNetwork(base, config.train_text_encoder, (config.resolution, config.resolution))
    share = config.instance_batch_size // world.world_size
    run = folder / "subjects" / task.name
    try:
        latest = checkpoints.latest_checkpoint(run, world, partial(tqdm.write, file=sys.stderr))
    except checkpoints.AllDamaged:  # which it has said; a subject has one checkpoint, and begins anew in little time
        latest = None
    saved = None if latest is None else checkpoints.read_state(latest)
    settings = optimizer_settings(config, task)
    engine = engines.initialize(
        network,
        config.engine,
        settings,
        engines.BatchSizes(config.instance_batch_size, share, 1),
        precision,
        load_universal=saved is not None and checkpoints.needs_universal(saved, world.world_size),
    )
    training = FullTraining(task, base, engine)
    if saved is not None and latest is not None:
        now = identity(config, task, precision, base)
        if changed := [name for name, value in now.items() if saved[name] != value]:
            raise ConfigError(
                f"{latest} was saved with {changed[0]}={saved[changed[0]]!r}, and the run has {now[changed[0]]!r}. Set "
                f"it back, or delete {run} to begin this subject anew"
            )
        checkpoints.load_checkpoint(engine, latest, None, world, attempt)
        engines.apply_settings(engine, settings)
        training.step = saved["step"]
    return training


def optimizer_settings(config: SubjectRunConfig, task: Task) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=task.learning_rate, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm
    )


def identity(config: SubjectRunConfig, task: Task, precision: str, base: Base) -> dict[str, Any]:
    """What a checkpoint of a subject must agree with."""
    return dict(
        zero_stage=config.engine.zero_stage,
        precision=precision,
        base_digest=base.digest,
        train_text_encoder=config.train_text_encoder,
        prompt=task.instance_prompt,
    )


def step_full(config: SubjectRunConfig, training: FullTraining, batch: SubjectBatch) -> tuple[float, float, bool]:
    """One optimizer step. batch: this rank's SubjectBatch of one subject. -> losses, and whether it was skipped."""
    network: Any = training.engine
    instance, prior = dreambooth_step(
        training.base,
        network,
        lambda loss: engines.accumulate(training.engine, loss),
        batch,
        1,
        config.prior.weight,
        config.min_snr_gamma,
    )
    _, skipped = engines.apply_gradients(training.engine, training.task.learning_rate)
    training.step += 1
    return float(instance), float(prior), skipped


def has_finite_weights(engine: Any) -> bool:
    """Of the weights that this rank holds: all of them, or with ZeRO-3 its part."""
    own = (getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters())
    return all(bool(tensor.isfinite().all()) for tensor in own)


def save_full(
    config: SubjectRunConfig, training: FullTraining, precision: str, folder: Path, attempt: Attempt, world: World
) -> None:
    """A checkpoint of the subject, and none older. Every rank calls this."""
    run = folder / "subjects" / training.task.name
    state = identity(config, training.task, precision, training.base) | dict(
        step=training.step, world_size=world.world_size, metrics={}
    )
    checkpoints.save_checkpoint(
        training.engine,
        run,
        state,
        yaml.safe_dump(config.model_dump(mode="json")),
        None,
        world,
        attempt,
        WEIGHTS,
        write_weights,
    )
    if world.rank == 0:
        committed = checkpoints.folder_of(run, training.step)
        checkpoints.prune(run, keep=1, keep_best=0, attempt=attempt, committed=committed)
    barrier()


def write_weights(engine: Any, weights: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    save_weights(weights, folder / "weights.safetensors")


def finish_full(config: SubjectRunConfig, training: FullTraining, folder: Path, attempt: Attempt, world: World) -> None:
    """Writes the pipeline from the last checkpoint, whole or not at all, and deletes that."""
    run = folder / "subjects" / training.task.name
    if world.rank == 0:
        latest = checkpoints.folder_of(run, training.step)
        put_pipeline(config, load_file(latest / WEIGHTS / "weights.safetensors"), run / PIPELINE, attempt)
        checkpoints.delete(run / "checkpoints", attempt)
    barrier()


def put_pipeline(config: SubjectRunConfig, weights: dict[str, Tensor], folder: Path, attempt: Attempt) -> None:
    """In place of the one that may be there, whole or not at all."""
    made = attempt.folder / folder.name
    with named_when_full(folder):
        write_pipeline(config, weights, made)
    if folder.exists():
        checkpoints.delete(folder, attempt)
    move(attempt, made, folder)


def write_pipeline(config: SubjectRunConfig, weights: dict[str, Tensor], made: Path) -> None:
    """The base's folder with these weights, by their names in FullNetwork, in place of its own.

    All networks are written in float32 under the names that diffusers looks for by itself: of a base that has only
    half-precision variants, those that were trained would be found and the others not, or in another dtype.
    """
    where = base_folder(config.model.base)
    fresh = load_base(where, config.model.family, torch.float32, torch.device("cpu"))
    parts = parts_of(fresh)
    others = shutil.ignore_patterns("*.md", ".*")

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {*others(folder, names), *(parts if Path(folder) == where else ())}

    shutil.copytree(where, made, ignore=left_out)
    for part, module in parts.items():
        prefix = NETWORKS.get(part, "no network that learns")
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if own:
            module.load_state_dict(own)
        save_pretrained(module, made / part)
    for folder in sorted(path for path in made.iterdir() if path.is_dir() and path.name not in parts):
        without_variant(folder)


def without_variant(folder: Path) -> None:
    """Gives weights that a folder has as a variant alone, such as a safety checker's, the plain name, in float32."""
    for stem in (WEIGHTS_STEM, "model"):
        try:
            files = weights_files(folder, stem)
        except OSError:  # none of this name
            continue
        if variant_of(files[0]) is None:
            continue
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor.clone()
            for name, tensor in read_tensors(files).items()
        }
        save_weights(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        for file in (*files, *folder.glob(f"{stem}.safetensors.index.*.json")):
            file.unlink()
        config = folder / "config.json"
        if config.is_file():
            tree = {name: value for name, value in read_json(config).items() if name not in ("dtype", "torch_dtype")}
            config.write_text(json.dumps(tree, indent=2))


def base_of_subject(config: SubjectRunConfig, base: Base, pipeline: Path) -> Base:
    """The trained networks of a finished subject, with the rest of `base`."""
    own = load_base(pipeline, config.model.family, base.dtype, base.device)
    return replace(base, unet=own.unet, text_encoders=own.text_encoders, _empty=None)


def train_fully(
    config: SubjectRunConfig,
    base: Base,
    tasks: Sequence[Task],
    attention: AttentionChoice,
    precision: str,
    folder: Path,
    attempt: Attempt,
    world: World,
    stop: StopRequest,
    studio: Studio,
) -> bool:
    """Trains these subjects, one after another; -> whether it was stopped.

    base: the frozen one, which encodes pictures, and prompts where the text encoder does not learn.
    """
    bar = tqdm(total=sum(task.steps for task in tasks), unit="step", desc="subjects", disable=world.rank > 0)
    status = partial(write_status, attempt) if world.rank == 0 else _no_status
    tracking = studio.tracking
    tracking.queue(tasks)
    ranks = world.world_size
    for task in tasks:
        pictures, error = None, None
        try:
            pictures = begin_training(config, base, task)
        except SubjectError as raised:
            error = str(raised)
        errors = [one for one in gather_objects(error, world) if one is not None]  # a node's disk may fail it alone
        if pictures is None or errors:
            status(folder, task.name, state="failed", error=errors[0])
            tracking.end(task, "failed", errors[0])
            bar.update(task.steps)
            continue
        training = begin_full(config, task, attention, precision, folder, attempt, world)
        status(folder, task.name, state="training", step=training.step, steps=task.steps)
        tracking.begin(task, training.step)
        bar.update(training.step)
        pictures.step = training.step
        recall(studio, pictures)
        validate_full(config, training, pictures, studio, world)
        skipped_in_a_row, stopped, error = 0, False, None
        ended_at = time.perf_counter()
        while training.step < task.steps and error is None and not stopped:
            pictures.step = training.step
            began = time.perf_counter()
            batch = batch_of_rank(config, base, pictures, world)
            own_loss, own_prior_loss, skipped = step_full(config, training, batch)
            loss, prior_loss, stops = all_sum([own_loss / ranks, own_prior_loss / ranks, float(stop.requested)])
            skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
            stalled, ended_at = began - ended_at, time.perf_counter()
            log_full(config, training, loss, prior_loss, ended_at - began, stalled, world, tracking)
            bar.update()
            pictures.step = training.step
            bar.set_postfix(subject=task.name, loss=f"{loss:.4f}", prior=f"{prior_loss:.4f}", refresh=False)
            stopped = stops > 0
            if not stopped or training.step == task.steps:
                ended_at += validate_full(config, training, pictures, studio, world)
            due = training.step % config.checkpoint_every_steps == 0 and not skipped_in_a_row
            # A skipped update leaves all as it was, so the last one is saved too, unless the subject fails by it: then
            # it is tried again from where it last moved.
            last = stopped or training.step == task.steps or skipped_in_a_row > MOST_SKIPPED
            if due or last:
                whole_loss = loss + config.prior.weight * prior_loss
                finite = has_finite_weights(training.engine)
                own = divergence(task, training.step, skipped_in_a_row, whole_loss, finite)
                error = next((one for one in gather_objects(own, world) if one is not None), None)
                if error is None:
                    save_full(config, training, precision, folder, attempt, world)
                    state = "stopped" if stopped else "training"
                    status(folder, task.name, state=state, step=training.step, steps=task.steps)
        if error is not None:
            status(folder, task.name, state="failed", step=training.step, error=error)
            tracking.end(task, "failed", error)
        elif training.step == task.steps:
            finish_full(config, training, folder, attempt, world)
            status(folder, task.name, state="finished", step=training.step, prompt=task.instance_prompt)
            tracking.end(task, "finished")
        else:
            tracking.end(task, "stopped")
        engines.release(training.engine)
        del training  # before the next subject's: two would not fit where one does
        engines.reclaim(world.device)
        if stopped:
            break
    bar.close()
    return stop_everywhere(stop, world)


def validate_full(
    config: SubjectRunConfig, training: FullTraining, pictures: Training, studio: Studio, world: World
) -> float:
    """Looks at the subject where a validation is due; -> how many seconds it took. Every rank calls this."""
    if not is_due(config, pictures):
        return 0.0
    began = time.perf_counter()
    kinds = [pictures.instance, pictures.prior, pictures.held_out]
    prompts = (training.task.instance_prompt, training.task.class_prompt, training.task.instance_prompt)
    words = [prompt for prompt, kind in zip(prompts, kinds, strict=True) if kind is not None for _ in range(ROWS)]

    def network(noisy_latents: Tensor, timesteps: Tensor, text: TextEncoding) -> Tensor:
        return training.engine(noisy_latents, timesteps, words if config.train_text_encoder else text)

    def keep_best(_: Training, own: Path) -> None:
        weights = engines.full_state(training.engine)
        if world.rank == 0:
            put_pipeline(config, weights, own / BEST_PIPELINE, studio.attempt)

    validate_subjects(studio, training.base, network, [pictures], lambda _: contextlib.nullcontext(), keep_best)
    return time.perf_counter() - began


def log_full(
    config: SubjectRunConfig,
    training: FullTraining,
    loss: float,
    prior_loss: float,
    seconds: float,
    stalled: float,
    world: World,
    tracking: Untracked,
) -> None:
    """What the last step was worth, and what it cost. stalled: seconds between the step before and this one."""
    losses = {"train/instance_loss": loss} | ({"train/prior_loss": prior_loss} if config.prior.weight else {})
    tracking.log(training.task.name, training.step, losses)
    pictures = config.instance_batch_size * (2 if config.prior.weight else 1)
    tracking.log_step(
        losses
        | {
            "train/samples_per_second": pictures / (seconds + stalled),
            "train/step_seconds": seconds + stalled,
            "train/stall_percent": 100.0 * stalled / (seconds + stalled),
            "train/peak_memory_gib": peak_memory_gib(world),
            "train/subjects_in_training": 1.0,
        }
    )


def batch_of_rank(config: SubjectRunConfig, base: Base, pictures: Training, world: World) -> SubjectBatch:
    """This rank's share of a step."""
    share = config.instance_batch_size // world.world_size
    batch = make_batch(config, base, [pictures], slice(world.rank * share, (world.rank + 1) * share))
    if not config.train_text_encoder:
        return batch
    prompts = [pictures.task.instance_prompt] * share
    prompts += [pictures.task.class_prompt] * (len(batch.latents) - share)
    return replace(batch, text=prompts)


def stop_everywhere(stop: StopRequest, world: World) -> bool:
    return any(gather_objects(stop.requested, world))


def _no_status(folder: Path, name: str, **fields: object) -> None:
    """Of ranks that leave it to the first."""
