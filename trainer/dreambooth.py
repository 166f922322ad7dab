"""Training many subjects: `torchrun ... -m controlbooth.trainer.dreambooth subjects.yaml run.yaml`.

Each rank trains its share of the manifest, several subjects in one batch, and asks nobody in between: ranks meet only
before the first step. A subject that ends makes room for the next. State is saved every so many steps and whenever a
subject ends; the same command goes on from there, with as many ranks or with others.

    RUN/subjects/NAME/pytorch_lora_weights.safetensors      what diffusers' load_lora_weights reads
                      status.json                           waiting, training, finished or failed, and why
    RUN/state/of-2/rank-0.safetensors                       the subjects in training, the queue, the optimizer
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from controlbooth.data import draws
from controlbooth.data.decode import decode_image, prepare, write_planes
from controlbooth.models.adapters import (
    ATTENTION,
    CONVOLUTIONS,
    StackedAdamW,
    StackedAdapter,
    attach_adapters,
    keep_slots,
    reset_subject,
    subject_weights,
)
from controlbooth.models.attention import AttentionChoice, apply_attention, attention_shapes, choose_attention
from controlbooth.models.base import Base
from controlbooth.models.controlnet import denoise
from controlbooth.models.families import TextEncoding, encode_prompts
from controlbooth.models.pretrained import load_base, load_tokenizers
from controlbooth.trainer.config import ConfigError, base_folder
from controlbooth.trainer.distributed import World, barrier, from_first_rank, gather_objects, join, leave
from controlbooth.trainer.encoding import encode_posterior, sample_posterior, to_pixel_values
from controlbooth.trainer.engine import DTYPES, resolve_precision
from controlbooth.trainer.prior import (
    DRAWN_AT_ONCE,
    class_folder,
    class_images,
    draw_class_images,
    missing_class_images,
)
from controlbooth.trainer.step import SubjectBatch, dreambooth_step
from controlbooth.trainer.subjects import (
    SubjectRunConfig,
    Task,
    check_words,
    load_run,
    load_subjects,
    settle,
    share_of_rank,
    write_record,
)
from controlbooth.trainer.train import StopRequest, only_run, quiet_libraries

LAYERS = {"attention": ATTENTION, "attention+convolutions": ATTENTION + CONVOLUTIONS}
LORA_FILE = "pytorch_lora_weights.safetensors"
LEAST_SIDE = 64
"""Pixels of the shorter side below which a picture tells nothing of a subject."""
MOST_SKIPPED = 10
"""Updates in a row without a finite gradient after which a subject has failed."""


class SubjectError(ValueError):
    """What is wrong with one subject; the others go on."""


@dataclass(frozen=True)
class Pictures:
    """The VAE's posterior of n pictures, kept on the device: they are few, and are seen hundreds of times."""

    mean: Tensor
    """(n, C, h, w)"""
    std: Tensor
    text: TextEncoding
    """One row, of the prompt that they have in common."""


@dataclass
class Training:
    """A subject in a slot."""

    task: Task
    instance: Pictures
    prior: Pictures | None
    step: int = 0
    skipped: int = 0
    """Updates in a row that were left out."""


@dataclass
class Stack:
    """What one rank trains: slot k of the adapters belongs to trainings[k]."""

    base: Base
    adapters: dict[str, StackedAdapter]
    optimizer: StackedAdamW
    trainings: list[Training]
    queue: list[Task]
    waiting: dict[str, dict[str, Tensor]]
    """Of subjects in the queue that have begun already, under another number of ranks."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m controlbooth.trainer.dreambooth",
        description="One rank of a DreamBooth run. Start it with torchrun, or with `controlbooth dreambooth run`.",
    )
    parser.add_argument("subjects", type=Path, metavar="SUBJECTS", help="a YAML, CSV, JSONL or Parquet list")
    parser.add_argument("run", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    options = parser.parse_intermixed_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    stop = StopRequest()
    quiet_libraries()
    try:
        config = load_run(options.run, options.overrides)
        subjects, faults = load_subjects(options.subjects)
        tasks, more = settle(subjects, config)
        split, _ = check_words(tasks, load_tokenizers(base_folder(config.model.base)))
        tasks, more = [task for task in tasks if task.name not in split], more | split
        world = join()
        with only_run(config.output / config.name, world):
            return train_subjects(config, tasks, faults | more, world, stop)
    except (ValueError, OSError) as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    finally:
        leave()


def train_subjects(
    config: SubjectRunConfig, tasks: Sequence[Task], faults: dict[str, str], world: World, stop: StopRequest
) -> int:
    """Trains all that are not finished. Returns 0, also where it was stopped, or 1 where a subject has failed."""
    folder = config.output / config.name
    precision = resolve_precision(config.precision, world.device, zero_stage=1)
    base = load_base(base_folder(config.model.base), config.model.family, DTYPES[precision], world.device)
    apply_attention(base.unet, _attention(config, base, precision))
    if config.model.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()  # without which it is passed over; the U-Net has no dropout
    if world.rank == 0:
        write_record(folder, config, tasks)
        for name, fault in faults.items():
            write_status(folder, name, state="failed", error=fault)
        plan_ranks(folder, config, tasks, world.world_size)
    barrier()
    draw_prior(config, base, tasks, world)
    stack = make_stack(config, base, tasks, folder, world)
    run_stack(config, stack, folder, world, stop)
    stopped = any(gather_objects(bool(stack.trainings or stack.queue), world))
    failed = failures(folder, tasks) | faults
    if world.rank == 0:
        finished = len(tasks) - len(unfinished(folder, tasks))
        left = f", {len(tasks) + len(faults) - finished - len(failed)} to go" if stopped else ""
        print(f"{finished} subjects finished, {len(failed)} failed{left}: {folder}")
        for name, error in failed.items():
            print(f"  {name}: {error}")
    return 1 if failed else 0


def plan_ranks(folder: Path, config: SubjectRunConfig, tasks: Sequence[Task], world_size: int) -> None:
    """Writes what each rank begins with, on rank 0, where the last start had another number of ranks or none.

    Subjects that were in training keep their weights and steps; all that are not finished are dealt out anew.
    """
    current = folder / "state" / "CURRENT"
    before = current.read_text().strip() if current.exists() else None
    if before == f"of-{world_size}":
        return
    old = [] if before is None else [read_state(path) for path in sorted((folder / "state" / before).glob("rank-*"))]
    saved = {name: tensors for state in old for name, tensors in (state.slots | state.waiting).items()}
    left = unfinished(folder, tasks)
    new = folder / "state" / f"of-{world_size}"
    for rank in range(world_size):
        mine = share_of_rank(left, rank, world_size)
        begun = [task for task in mine if task.name in saved]
        slots = {task.name: saved[task.name] for task in begun[: config.subjects_per_batch]}
        waiting = {task.name: saved[task.name] for task in begun[config.subjects_per_batch :]}
        queue = [task.name for task in mine if task.name not in slots]
        write_state(new / f"rank-{rank}.safetensors", State(slots, queue, waiting))
    temporary = current.with_suffix(".partial")
    temporary.write_text(f"of-{world_size}")
    temporary.replace(current)


def draw_prior(config: SubjectRunConfig, base: Base, tasks: Sequence[Task], world: World) -> None:
    """Class pictures that are not there yet, spread over the ranks; every rank waits until all are."""
    if config.prior.weight == 0:
        return
    prompts = sorted({task.class_prompt for task in tasks})
    folders = [(prior_folder(config, base, prompt), prompt) for prompt in prompts]
    missing = from_first_rank(missing_class_images(folders, config.prior.images))
    mine = missing[world.rank :: world.world_size]
    for first in tqdm(
        range(0, len(mine), DRAWN_AT_ONCE), desc="class pictures", unit="batch", disable=world.rank > 0 or not mine
    ):
        draw_class_images(base, mine[first : first + DRAWN_AT_ONCE], config.prior, config.resolution)
    barrier()


def prior_folder(config: SubjectRunConfig, base: Base, prompt: str) -> Path:
    return class_folder(config.prior.cache or config.output / "prior", base, prompt, config.prior, config.resolution)


def make_stack(config: SubjectRunConfig, base: Base, tasks: Sequence[Task], folder: Path, world: World) -> Stack:
    """This rank's subjects as its state file says."""
    by_name = {task.name: task for task in tasks}
    path = state_path(folder, world)
    state = read_state(path)
    if gone := [name for name in (*state.slots, *state.queue) if name not in by_name]:
        raise ConfigError(
            f"{folder} has begun with subjects that the manifest no longer has ({', '.join(gone[:3])}). Put them back, "
            "or take another name for the run"
        )
    known = {name for one in gather_objects([*state.slots, *state.queue], world) for name in one}
    new = [task for task in unfinished(folder, tasks) if task.name not in known]  # or it had failed, and is tried again
    rank = max([task.rank for task in tasks], default=config.adapter.rank)
    adapters = attach_adapters(base.unet, LAYERS[config.adapter.layers], len(state.slots), rank)
    optimizer = StackedAdamW(adapters, weight_decay=config.weight_decay)
    stack = Stack(base, adapters, optimizer, [], [], state.waiting)
    stack.queue = [by_name[name] for name in state.queue] + share_of_rank(new, world.rank, world.world_size)
    for slot, (name, saved) in enumerate(state.slots.items()):
        stack.trainings.append(begin_training(config, base, by_name[name]))
        restore_slot(stack, slot, saved)
    return stack


def run_stack(config: SubjectRunConfig, stack: Stack, folder: Path, world: World, stop: StopRequest) -> None:
    """Trains until the queue and all slots are empty, or until it is asked to stop, after a step and with its state."""
    path = state_path(folder, world)
    left = sum(task.steps for task in stack.queue) + sum(t.task.steps - t.step for t in stack.trainings)
    bar = tqdm(total=left, unit="step", desc="subjects", disable=world.rank > 0, dynamic_ncols=True)
    since_saved = 0
    while True:
        fill_slots(config, stack, folder)
        if not stack.trainings:
            break
        metrics = step_stack(config, stack)
        bar.update(len(stack.trainings))
        bar.set_postfix(
            training=len(stack.trainings), waiting=len(stack.queue), loss=f"{metrics['loss']:.4f}", refresh=False
        )
        since_saved += 1
        ended = [t for t in stack.trainings if t.step >= t.task.steps or t.skipped > MOST_SKIPPED]
        for training in ended:
            end_training(config, stack, training, folder)
        if ended:
            keep = [slot for slot, training in enumerate(stack.trainings) if training not in ended]
            stack.trainings = [stack.trainings[slot] for slot in keep]
            keep_slots(stack.adapters, stack.optimizer, keep)
        if ended or stop.requested or since_saved >= config.checkpoint_every_steps:
            save_stack(stack, path)
            since_saved = 0
        if stop.requested:
            break
    bar.close()


def fill_slots(config: SubjectRunConfig, stack: Stack, folder: Path) -> None:
    """Begins subjects of the queue while there is room. One that cannot begin has failed, and takes none."""
    while stack.queue and len(stack.trainings) < config.subjects_per_batch:
        task = stack.queue.pop(0)
        try:
            training = begin_training(config, stack.base, task)
        except SubjectError as error:
            write_status(folder, task.name, state="failed", error=str(error))
            continue
        slot = len(stack.trainings)
        keep_slots(stack.adapters, stack.optimizer, [*range(slot), None])
        stack.trainings.append(training)
        if task.name in stack.waiting:
            restore_slot(stack, slot, stack.waiting.pop(task.name))
        else:
            reset_subject(stack.adapters, slot, task.rank, seed=subject_seed(config, task))
        write_status(folder, task.name, state="training", step=training.step, steps=task.steps)


def step_stack(config: SubjectRunConfig, stack: Stack) -> dict[str, float]:
    """One step of every subject in the stack."""
    trainings = stack.trainings
    for parameter in stack.optimizer.parameters:
        parameter.grad = None
    batch = make_batch(config, stack.base, trainings)
    instance, prior = dreambooth_step(stack.base, batch, len(trainings), config.prior.weight, config.min_snr_gamma)
    device = instance.device
    rates = torch.tensor([t.task.learning_rate for t in trainings], device=device)
    clips = torch.full((len(trainings),), config.max_grad_norm, device=device)
    _, moved = stack.optimizer.step(rates, [t.step for t in trainings], clips)
    for training, updated in zip(trainings, moved.tolist(), strict=True):
        training.step += 1
        training.skipped = 0 if updated else training.skipped + 1
    return {"loss": float(instance.mean()), "prior_loss": float(prior.mean())}


def make_batch(config: SubjectRunConfig, base: Base, trainings: Sequence[Training]) -> SubjectBatch:
    """Everything random about a subject's step is drawn from (its seed, its step): no company changes it."""
    count = config.instance_batch_size
    parts = []
    for training in trainings:
        seed = subject_seed(config, training.task)
        groups = [("instance", training.instance)] + ([("prior", training.prior)] if training.prior else [])
        for purpose, pictures in groups:
            positions = np.arange(training.step * count, (training.step + 1) * count)
            parts.append(_rows(base, pictures, draws.hash64(seed, purpose), positions))
    latents, timesteps, noise, texts = zip(*parts, strict=True)
    added = {key: torch.cat([text.added_cond_kwargs[key] for text in texts]) for key in texts[0].added_cond_kwargs}
    return SubjectBatch(
        latents=torch.cat(latents),
        text=TextEncoding(torch.cat([text.encoder_hidden_states for text in texts]), added),
        timesteps=torch.cat(timesteps),
        noise=torch.cat(noise),
        instance_rows=count,
    )


def _rows(
    base: Base, pictures: Pictures, seed: int, positions: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, TextEncoding]:
    """-> latents, timesteps, noise and text of these positions; each pass over the pictures is shuffled anew."""
    n = len(pictures.mean)
    chosen = [int(draws.permutation(draws.hash64(seed, "pass", p // n), n)[p % n]) for p in positions.tolist()]
    shape, device = pictures.mean.shape[1:], pictures.mean.device

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    posterior_noise = on_device(draws.noise(draws.hash64(seed, "vae posterior"), positions, shape))
    latents = sample_posterior(base, pictures.mean[chosen], pictures.std[chosen], posterior_noise).float()
    steps = int(base.noise_scheduler.config["num_train_timesteps"])
    text = pictures.text
    return (
        latents,
        on_device(draws.timesteps(seed, positions, steps)),
        on_device(draws.noise(seed, positions, shape)),
        TextEncoding(
            text.encoder_hidden_states.expand(len(positions), -1, -1),
            {key: value.expand(len(positions), *value.shape[1:]) for key, value in text.added_cond_kwargs.items()},
        ),
    )


def begin_training(config: SubjectRunConfig, base: Base, task: Task) -> Training:
    """Reads and encodes a subject's pictures. Raises SubjectError naming the picture that cannot be used."""
    instance = [read_picture(path, config.resolution) for path in task.images]
    distinct = {picture.tobytes() for picture in instance}
    if len(distinct) < len(instance):
        raise SubjectError(f"{len(instance) - len(distinct)} of its {len(instance)} pictures are copies of others")
    prior = None
    if config.prior.weight > 0:
        folder = prior_folder(config, base, task.class_prompt)
        drawn = [read_picture(path, config.resolution) for path in class_images(folder, config.prior.images)]
        prior = encode_pictures(config, base, drawn, task.class_prompt)
    return Training(task, encode_pictures(config, base, instance, task.instance_prompt), prior)


def read_picture(path: Path, resolution: int) -> np.ndarray:
    """(3, resolution, resolution) uint8: upright, on white where it is transparent, the middle square."""
    try:
        image = decode_image(path.read_bytes(), path.stem, path.suffix.lstrip("."))
    except ValueError as error:
        raise SubjectError(f"{path}: {error}") from error
    if min(image.shape[:2]) < min(LEAST_SIDE, resolution):
        raise SubjectError(
            f"{path} has {image.shape[1]} x {image.shape[0]} pixels, too few to show a subject at {resolution}"
        )
    square, _ = prepare(image, None, None, (resolution, resolution))
    return write_planes(square, np.empty((3, resolution, resolution), np.uint8))


@torch.no_grad()
def encode_pictures(config: SubjectRunConfig, base: Base, pictures: Sequence[np.ndarray], prompt: str) -> Pictures:
    """One at a time, so that a picture's latents do not depend on how many others there are."""
    shown = [*pictures, *(picture[:, :, ::-1].copy() for picture in pictures)] if config.random_flip else pictures
    encoded = [
        encode_posterior(base, to_pixel_values(torch.from_numpy(picture)[None].to(base.device))) for picture in shown
    ]
    text = encode_prompts(base, [prompt], picture_size=(config.resolution, config.resolution))
    return Pictures(torch.cat([mean for mean, _ in encoded]), torch.cat([std for _, std in encoded]), text)


def end_training(config: SubjectRunConfig, stack: Stack, training: Training, folder: Path) -> None:
    """Writes a finished subject's LoRA, or why it failed."""
    task, slot = training.task, stack.trainings.index(training)
    if training.skipped > MOST_SKIPPED:
        error = (
            f"{training.skipped} updates in a row had no finite gradient, up to step {training.step}. Lower its "
            f"learning_rate={task.learning_rate:g}, or look at its pictures"
        )
        write_status(folder, task.name, state="failed", step=training.step, error=error)
        return
    save_lora(subject_weights(stack.adapters, slot, task.rank), folder / "subjects" / task.name / LORA_FILE)
    write_status(folder, task.name, state="finished", step=training.step, prompt=task.instance_prompt)


def save_lora(weights: dict[str, Tensor], path: Path) -> None:
    """In the names that diffusers' load_lora_weights reads, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    save_file({f"unet.{name}": tensor.contiguous() for name, tensor in weights.items()}, temporary)
    temporary.replace(path)


def subject_seed(config: SubjectRunConfig, task: Task) -> int:
    return draws.hash64(config.seed, "subject", task.name)


@dataclass
class State:
    """What a rank's state file holds: tensors of each subject in training, by name, and who is next."""

    slots: dict[str, dict[str, Tensor]]
    queue: list[str]
    waiting: dict[str, dict[str, Tensor]]
    """Of subjects in the queue that had begun where there were more ranks."""


def state_path(folder: Path, world: World) -> Path:
    return folder / "state" / f"of-{world.world_size}" / f"rank-{world.rank}.safetensors"


def save_stack(stack: Stack, path: Path) -> None:
    slots = {}
    for slot, training in enumerate(stack.trainings):
        tensors = {"step": torch.tensor(training.step), "skipped": torch.tensor(training.skipped)}
        for number, parameter in enumerate(stack.optimizer.parameters):
            tensors[f"weight.{number}"] = parameter.detach()[slot]
            tensors[f"first.{number}"] = stack.optimizer.first[number][slot]
            tensors[f"second.{number}"] = stack.optimizer.second[number][slot]
        slots[training.task.name] = tensors
    write_state(path, State(slots, [task.name for task in stack.queue], stack.waiting))


@torch.no_grad()
def restore_slot(stack: Stack, slot: int, saved: dict[str, Tensor]) -> None:
    training = stack.trainings[slot]
    training.step, training.skipped = int(saved["step"]), int(saved["skipped"])
    for number, parameter in enumerate(stack.optimizer.parameters):
        parameter[slot] = saved[f"weight.{number}"].to(parameter)
        stack.optimizer.first[number][slot] = saved[f"first.{number}"].to(parameter)
        stack.optimizer.second[number][slot] = saved[f"second.{number}"].to(parameter)


def write_state(path: Path, state: State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"slots": list(state.slots), "queue": state.queue, "waiting": list(state.waiting)}
    tensors = {
        f"{name}/{key}": tensor.cpu().contiguous()
        for group in (state.slots, state.waiting)
        for name, saved in group.items()
        for key, tensor in saved.items()
    }
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"names": json.dumps(names)})
    temporary.replace(path)


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


def status_of(folder: Path, name: str) -> dict[str, Any]:
    """What a subject's status.json says; nothing where there is none."""
    path = folder / "subjects" / name / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_status(folder: Path, name: str, **fields: object) -> None:
    path = folder / "subjects" / name / "status.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(fields))
    temporary.replace(path)


def unfinished(folder: Path, tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if status_of(folder, task.name).get("state") != "finished"]


def failures(folder: Path, tasks: Sequence[Task]) -> dict[str, str]:
    statuses = {task.name: status_of(folder, task.name) for task in tasks}
    return {name: str(status["error"]) for name, status in statuses.items() if status.get("state") == "failed"}


def _attention(config: SubjectRunConfig, base: Base, precision: str) -> AttentionChoice:
    """Timed on one step of a whole stack."""
    size = config.resolution // base.family.vae_factor
    rows = config.subjects_per_batch * config.instance_batch_size * (2 if config.prior.weight else 1)
    latents = torch.zeros(rows, base.unet.config["in_channels"], size, size, device=base.device)
    text = encode_prompts(base, [""] * rows, picture_size=(config.resolution, config.resolution))
    timesteps = torch.zeros(rows, dtype=torch.int64, device=base.device)
    shapes = attention_shapes(base.unet, lambda: denoise(base.unet, latents, timesteps, text))
    return choose_attention(config.model.attention, base.device, DTYPES[precision], shapes)


if __name__ == "__main__":
    sys.exit(main())
