"""Looking at subjects while they train: losses that do not change by chance, pictures, and how near these are.

    RUN/subjects/NAME/validation.json             the figures of each validation
                      samples/NAME-step-00000100.png   a photograph | what is drawn, a row for each prompt
                      best.safetensors            the LoRA of the best step, where encoders are given (with method=full
                                                  best/, a pipeline)
                      best.json                   which step that is, its figures, and why

Subjects that are due at the same time are drawn together. What is drawn, and with which noise, depends on the subject
and the prompt alone, so pictures of different steps can be compared, and a validation that is repeated is the same.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from controlbooth.data.files.records import is_whole, read_json_list
from controlbooth.data.order import draws
from controlbooth.models.base import Base
from controlbooth.models.sampling import branches, sample
from controlbooth.models.text import TextEncoding
from controlbooth.trainer.config.subjects import SubjectRunConfig, fill
from controlbooth.trainer.dreambooth.batches import Pictures, Training, subject_seed, together
from controlbooth.trainer.dreambooth.images import read_picture
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.dreambooth.measuring.fidelity import mean_off_diagonal, prompt_similarity, similarity
from controlbooth.trainer.dreambooth.measuring.overfitting import Course, course, describe
from controlbooth.trainer.dreambooth.prior import DRAWN_AT_ONCE, drawn_size
from controlbooth.trainer.dreambooth.step import Text
from controlbooth.trainer.dreambooth.tracking import Untracked
from controlbooth.trainer.encoding import sample_posterior
from controlbooth.trainer.evaluation.encoders import (
    Encoder,
    clip_encoder,
    dino_encoder,
    load_substitute,
    substitute_encoder,
)
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.losses import squared_error
from controlbooth.trainer.run.attempt import Attempt, write_file, write_text

FILE, BEST, BEST_LORA, BEST_PIPELINE = "validation.json", "best.json", "best.safetensors", "best"
ROWS = 4
"""Of each kind of pictures, in the losses: evenly over all noise levels."""
Network = Callable[[Tensor, Tensor, Text], Tensor]
Figures = dict[str, float]


@dataclass
class Studio:
    """What validations need, made once in a process."""

    config: SubjectRunConfig
    folder: Path
    """Of the run."""
    attempt: Attempt
    tracking: Untracked
    subject: Encoder | None
    """Tells how near two pictures are."""
    clip: Encoder | None
    writes: bool = True
    """Whether this process writes, and not another one that trains the same subjects."""
    real: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Embeddings of the subjects' own pictures, by subject and encoder."""


def open_studio(
    config: SubjectRunConfig, folder: Path, attempt: Attempt, tracking: Untracked, device: torch.device, writes: bool
) -> Studio:
    """Makes what validations need, and loads the encoders. Raises ConfigError for an encoder that cannot be read."""
    asked = config.validation.encoders
    subject = None
    if asked.dino is not None:
        subject = dino_encoder(asked.dino, device)
    elif asked.efficientnet:
        subject = substitute_encoder(load_substitute(device), device)
    clip = None if asked.clip is None else clip_encoder(asked.clip, device)
    return Studio(config, folder, attempt, tracking, subject, clip, writes)


def is_due(config: SubjectRunConfig, training: Training) -> bool:
    """Tells whether a validation is due at the step that a subject has reached, and has not been made."""
    done = training.history[-1]["step"] if training.history else -1
    return done < training.step and (
        training.step % config.validation.every_steps == 0 or training.step == training.task.steps
    )


def recall(studio: Studio, training: Training) -> None:
    """Reads into a subject's history what earlier starts' validations have found, up to the step that it is at."""
    path = own_folder(studio, training.task) / FILE
    remedy = f"Delete it: what was found up to step {training.step} is then not told again"
    found = read_json_list(path, remedy, {"step": is_whole}, missing=[])
    # At step 0 nothing is kept, nor are its lines in metrics.jsonl: the subject begins anew.
    training.history = [one for one in found if one["step"] <= training.step] if training.step else []


def validate_subjects(
    studio: Studio,
    base: Base,
    network: Network,
    trainings: Sequence[Training],
    hold: Callable[[int], contextlib.AbstractContextManager[None]],
    keep_best: Callable[[Training, Path], None],
) -> None:
    """Validates subjects of one stack, or one that is trained fully, logs the figures, and keeps the best weights.

    hold(branches): a context in which `base` draws these subjects, each `branches` times over. keep_best(training,
    folder) writes what a subject has learnt as the best of its steps; with method=full every rank calls it.
    """
    with hold(1):
        figures = fixed_losses(studio.config, base, network, trainings)
    pictures: dict[str, np.ndarray] = {}
    if studio.config.validation.prompts:
        guidance = studio.config.validation.guidance_scale
        assert guidance is not None, "the run has its family's guidance where it says none"
        with hold(branches(base, guidance)):
            pictures = draw_samples(studio.config, base, [training.task for training in trainings])
    for training in trainings:
        task, found = training.task, figures[training.task.name]
        own: dict[str, float] = {"step": training.step}
        if pictures and studio.subject is not None:
            compared, own = compare(studio, task, of_subject(studio.config, pictures[task.name]), own)
            found |= compared
        training.history = [*training.history, own]
        told = course(training.history)
        if studio.writes:
            note(studio, training, found, told, pictures.get(task.name))
        if told.best == training.step:
            keep_best(training, own_folder(studio, task))
            if studio.writes:
                write_best(studio, training, found, told)
        if studio.writes:
            text = json.dumps(training.history)  # last: a validation that is noted has been finished
            write_text(studio.attempt, own_folder(studio, task) / FILE, text)


def note(studio: Studio, training: Training, found: Figures, told: Course, pictures: np.ndarray | None) -> None:
    """Writes the grid, logs it and the figures, and reports what has changed in a subject's course."""
    task, step = training.task, training.step
    studio.tracking.log(task.name, step, {f"validation/{name}": value for name, value in found.items()})
    if pictures is not None:
        path = own_folder(studio, task) / "samples" / f"{task.name}-step-{step:08d}.png"
        write_file(studio.attempt, path, partial(draw_subject, studio.config, task, pictures))
        studio.tracking.log_image(task.name, path, "samples", step)
    if told != (before := course(training.history[:-1])):
        tags = {"learnt_at_step": told.learnt, "overfits_from_step": told.overfits, "best_step": told.best}
        studio.tracking.set_tags(task.name, {name: "none" if at is None else str(at) for name, at in tags.items()})
    if (told.learnt, told.overfits) != (before.learnt, before.overfits):
        tqdm.write(f"{task.name}: {describe(told)} (step {step})", file=sys.stderr)
        studio.tracking.describe(task.name, course=f"**Course:** {describe(told)}")


def write_best(studio: Studio, training: Training, found: Figures, told: Course) -> None:
    """Writes best.json, after the weights that it describes."""
    facts = {"step": training.step, "prompt": training.task.instance_prompt, "figures": found} | asdict(told)
    path = own_folder(studio, training.task) / BEST
    write_text(studio.attempt, path, json.dumps(facts, indent=1))


@torch.no_grad()
def fixed_losses(
    config: SubjectRunConfig, base: Base, network: Network, trainings: Sequence[Training]
) -> dict[str, Figures]:
    """Returns each subject's training loss by kind of pictures, with noise and timesteps that never change.

    They can be compared between steps, which those of training cannot. The latents are the posterior's means; levels
    are spread evenly, of flow matching over the quantiles of the run's density.
    """
    kinds = ["instance", *(["prior"] if trainings[0].prior else []), *(["held_out"] if trainings[0].held_out else [])]
    count = len(kinds)
    parts, prompts = [], []
    for training in trainings:
        for kind in kinds:
            pictures = getattr(training, kind)
            seed = draws.hash64(subject_seed(config, training.task), "validation", kind)
            parts.append(_fixed_rows(base, pictures, seed))
            prompts += [pictures.prompt] * ROWS
    latents, noise, levels, texts = zip(*parts, strict=True)
    text: Text = prompts if config.train_text_encoder else together(texts)
    every = [torch.cat(part) for part in (latents, noise, levels)]
    noisy = base.process.noised(*every)
    errors = (
        squared_error(network(noisy.latents, noisy.times, text), noisy.target)
        .view(len(trainings), count, ROWS)
        .mean(2)
        .tolist()
    )
    return {
        training.task.name: {f"{kind}_loss": value for kind, value in zip(kinds, own, strict=True)}
        for training, own in zip(trainings, errors, strict=True)
    }


def _fixed_rows(base: Base, pictures: Pictures, seed: int) -> tuple[Tensor, Tensor, Tensor, TextEncoding]:
    """Returns latents and noise (ROWS, C, h, w) float32, levels of noise (ROWS,) int64, and the text's rows."""
    chosen = [row % len(pictures.mean) for row in range(ROWS)]
    mean, device = pictures.mean[chosen], pictures.mean.device
    latents = sample_posterior(base, mean, torch.zeros_like(mean), torch.zeros_like(mean)).float()
    noise = torch.from_numpy(draws.noise(seed, np.arange(ROWS), pictures.mean.shape[1:])).to(device)
    levels = torch.from_numpy(base.process.even_levels(np.arange(ROWS), ROWS)).to(device)
    text = pictures.text
    expanded = {key: value.expand(ROWS, *value.shape[1:]) for key, value in text.added_cond_kwargs.items()}
    return latents, noise, levels, TextEncoding(text.encoder_hidden_states.expand(ROWS, -1, -1), expanded)


def prompts_of(config: SubjectRunConfig, task: Task) -> list[str]:
    words = dict(identifier=task.identifier, class_noun=task.class_noun)
    return [fill("validation.prompts", prompt, **words) for prompt in config.validation.prompts]


def draw_samples(config: SubjectRunConfig, base: Base, tasks: Sequence[Task]) -> dict[str, np.ndarray]:
    """Draws the validation prompts of all subjects together.

    Returns by subject (prompts * pictures, H, W, 3) uint8, prompt after prompt.
    """
    asked = config.validation
    assert asked.guidance_scale is not None, "the run has its family's guidance where it says none"
    rows = {
        task.name: [(prompt, number) for prompt in prompts_of(config, task) for number in range(asked.pictures)]
        for task in tasks
    }
    total = len(asked.prompts) * asked.pictures
    drawn: dict[str, list[np.ndarray]] = {task.name: [] for task in tasks}
    each = min(total, max(1, DRAWN_AT_ONCE // len(tasks)))
    for first in range(0, total, each):
        some = range(first, min(first + each, total))
        chosen = [(task, *rows[task.name][row]) for task in tasks for row in some]
        images = sample(
            base,
            [prompt for _, prompt, _ in chosen],
            seeds=[draws.hash64("subject sample", task.name, prompt, number) >> 1 for task, prompt, number in chosen],
            steps=asked.sampling_steps,
            guidance_scale=asked.guidance_scale,
            picture_size=drawn_size(base, config.resolution),
        )
        for (task, _, _), image in zip(chosen, images.numpy(), strict=True):
            drawn[task.name].append(image)
    return {name: np.stack(images) for name, images in drawn.items()}


def named_prompts(config: SubjectRunConfig) -> list[str]:
    """Returns the prompt templates that name the subject.

    The others show what has become of its class, and are not compared with the subject.
    """
    return [prompt for prompt in config.validation.prompts if "{identifier}" in prompt]


def of_subject(config: SubjectRunConfig, drawn: np.ndarray) -> np.ndarray:
    """Returns those drawn pictures whose prompts name the subject."""
    named = ["{identifier}" in prompt for prompt in config.validation.prompts]
    return drawn[np.repeat(named, config.validation.pictures)]


def compare(studio: Studio, task: Task, drawn: np.ndarray, own: dict[str, float]) -> tuple[Figures, dict[str, float]]:
    """Compares drawn pictures of a subject with its own pictures, and where CLIP is given with their prompts.

    Returns figures by the names of `dreambooth measure`, and `own` with the figures that `overfitting` reads.
    """
    subject, clip, real = studio.subject, studio.clip, real_rows(studio, task)
    assert subject is not None
    rows, pictures = subject.images(drawn), real["subject"]
    cosines = rows @ pictures.T
    found = {subject.key: similarity(rows, pictures), f"nearest_{subject.key}": float(cosines.max(dim=1).values.mean())}
    told = own | {"fidelity": found[subject.key], "nearest": found[f"nearest_{subject.key}"]}
    if len(pictures) > 1:
        among = pictures @ pictures.T
        told["real"] = found[f"real_{subject.key}"] = mean_off_diagonal(among)
        nearest = float(among.clone().fill_diagonal_(-2.0).max(dim=1).values.mean())
        told["real_nearest"] = found[f"real_nearest_{subject.key}"] = nearest
    if clip is not None:
        assert clip.texts is not None
        described = [
            fill("validation.prompts", prompt, identifier="", class_noun=task.class_noun)
            for prompt in named_prompts(studio.config)
            for _ in range(studio.config.validation.pictures)
        ]
        clip_rows = clip.images(drawn)
        found["clip_i"] = similarity(clip_rows, real["clip"])
        texts = clip.texts([" ".join(text.split()) for text in described])  # without the identifier's place
        told["prompt"] = found["clip_t"] = prompt_similarity(clip_rows, texts)
    return found, told


def real_rows(studio: Studio, task: Task) -> Mapping[str, Tensor]:
    """Returns the embeddings of the pictures on which a subject is trained, by encoder; they are computed once."""
    if task.name not in studio.real:
        side = studio.config.resolution
        pictures = np.stack([read_picture(path, side).transpose(1, 2, 0) for path in task.images])
        encoders = {"subject": studio.subject, "clip": studio.clip}
        studio.real[task.name] = {name: one.images(pictures) for name, one in encoders.items() if one is not None}
    return studio.real[task.name]


def draw_subject(config: SubjectRunConfig, task: Task, pictures: np.ndarray, path: Path) -> None:
    """Draws a grid with a row for each prompt: one of the subject's own pictures, then those that are drawn."""
    prompts, count = prompts_of(config, task), config.validation.pictures
    real = [read_picture(one, config.resolution).transpose(1, 2, 0) for one in task.images]
    columns = {"photograph": np.stack([real[row % len(real)] for row in range(len(prompts))])}
    columns |= {f"drawn {n + 1}": pictures[n::count] for n in range(count)}
    draw_grid(path, columns, prompts)


def own_folder(studio: Studio, task: Task) -> Path:
    return studio.folder / "subjects" / task.name
