"""The batch of a step: rows of several subjects after each other (`make_batch`), and subjects' encoded pictures."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from controlbooth.data.order import draws
from controlbooth.models.base import Base
from controlbooth.models.text import TextEncoding, encode_prompts
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.images import read_picture, read_pictures
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.dreambooth.prior import (
    DRAWN_AT_ONCE,
    class_folder,
    class_images,
    draw_class_images,
    missing_class_images,
)
from controlbooth.trainer.dreambooth.step import SubjectBatch
from controlbooth.trainer.encoding import encode_posterior, sample_posterior, to_pixel_values
from controlbooth.trainer.engine.distributed import World, barrier, on_first_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """The VAE's posterior of n pictures, kept on the device: they are few, and are seen hundreds of times."""

    mean: Tensor
    """(n, C, h, w)"""
    std: Tensor
    text: TextEncoding
    """One row, of the prompt that they have in common, by the frozen encoders."""
    prompt: str = ""


@dataclass
class Training:
    """A subject in a slot."""

    task: Task
    instance: Pictures
    prior: Pictures | None
    held_out: Pictures | None = None
    """Pictures of the subject that are not trained on."""
    step: int = 0
    skipped: int = 0
    """Updates in a row that were left out."""
    loss: float = 0.0
    """Of the last step, both parts."""
    instance_loss: float = 0.0
    prior_loss: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    """What its validations have found up to this step, each with `step`."""


def subject_seed(config: SubjectRunConfig, task: Task) -> int:
    return draws.hash64(config.seed, "subject", task.name)


def begin_training(config: SubjectRunConfig, base: Base, task: Task) -> Training:
    """Reads and encodes a subject's pictures. Raises SubjectError naming the picture that cannot be used."""
    both = read_pictures((*task.images, *task.held_out), config.resolution)
    instance, kept_back = both[: len(task.images)], both[len(task.images) :]
    held_out = encode_pictures(config, base, kept_back, task.instance_prompt) if kept_back else None
    prior = None
    if config.prior.weight > 0:
        folder = prior_folder(config, base, task.class_prompt)
        drawn = [read_picture(path, config.resolution) for path in class_images(folder, config.prior.images)]
        prior = encode_pictures(config, base, drawn, task.class_prompt)
    return Training(task, encode_pictures(config, base, instance, task.instance_prompt), prior, held_out)


@torch.no_grad()
def encode_pictures(config: SubjectRunConfig, base: Base, pictures: Sequence[np.ndarray], prompt: str) -> Pictures:
    """Encodes pictures, each (3, H, W) uint8, into the VAE's posterior, and their common prompt.

    They are encoded one at a time, so that a picture's latents do not depend on how many others there are. With
    random_flip a mirrored copy of each picture is added.
    """
    shown = [*pictures, *(picture[:, :, ::-1].copy() for picture in pictures)] if config.random_flip else pictures
    encoded = [
        encode_posterior(base, to_pixel_values(torch.from_numpy(picture)[None].to(base.device))) for picture in shown
    ]
    text = encode_prompts(base, [prompt], picture_size=(config.resolution, config.resolution))
    return Pictures(torch.cat([mean for mean, _ in encoded]), torch.cat([std for _, std in encoded]), text, prompt)


def make_batch(
    config: SubjectRunConfig, base: Base, trainings: Sequence[Training], share: slice = slice(None)
) -> SubjectBatch:
    """Makes the batch of one step of these subjects.

    Everything random about a subject's step is drawn from (its seed, its step), so the other subjects change nothing.
    share: the part of each step's pictures, and of its class pictures, that this rank takes; all of them where a rank
    has the subject to itself.
    """
    count = config.instance_batch_size
    parts, prompts = [], []
    for training in trainings:
        seed = subject_seed(config, training.task)
        groups = [("instance", training.instance)] + ([("prior", training.prior)] if training.prior else [])
        for purpose, pictures in groups:
            positions = np.arange(training.step * count, (training.step + 1) * count)[share]
            parts.append(_rows(base, pictures, draws.hash64(seed, purpose), positions))
            prompts += [pictures.prompt] * len(positions)
    latents, levels, noise, texts = zip(*parts, strict=True)
    return SubjectBatch(
        latents=torch.cat(latents),
        text=prompts if config.train_text_encoder else together(texts),
        levels=torch.cat(levels),
        noise=torch.cat(noise),
        instance_rows=len(range(count)[share]),
    )


def together(texts: Sequence[TextEncoding]) -> TextEncoding:
    """Returns the rows of several encodings, one after another."""
    added = {key: torch.cat([text.added_cond_kwargs[key] for text in texts]) for key in texts[0].added_cond_kwargs}
    return TextEncoding(torch.cat([text.encoder_hidden_states for text in texts]), added)


def _rows(
    base: Base, pictures: Pictures, seed: int, positions: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, TextEncoding]:
    """Returns latents (B, C, h, w) float32, levels (B,) int64, noise (B, C, h, w) float32 and text of B positions.

    Each pass over the pictures is shuffled anew.
    """
    n = len(pictures.mean)
    chosen = [int(draws.permutation(draws.hash64(seed, "pass", p // n), n)[p % n]) for p in positions.tolist()]
    shape, device = pictures.mean.shape[1:], pictures.mean.device

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    posterior_noise = on_device(draws.posterior_noise(seed, positions, shape))
    latents = sample_posterior(base, pictures.mean[chosen], pictures.std[chosen], posterior_noise).float()
    process, text = base.process, pictures.text
    if process.thresholds is None:
        levels = draws.timesteps(seed, positions, process.levels)
    else:
        levels = draws.levels_by_density(seed, positions, process.thresholds)
    return (
        latents,
        on_device(levels),
        on_device(draws.noise(seed, positions, shape)),
        TextEncoding(
            text.encoder_hidden_states.expand(len(positions), -1, -1),
            {key: value.expand(len(positions), *value.shape[1:]) for key, value in text.added_cond_kwargs.items()},
        ),
    )


def prior_folder(config: SubjectRunConfig, base: Base, prompt: str) -> Path:
    return class_folder(config.prior.cache or config.output / "prior", base, prompt, config.prior, config.resolution)


def draw_prior(config: SubjectRunConfig, base: Base, tasks: Sequence[Task], world: World) -> None:
    """Draws the class pictures that do not exist yet, spread over the ranks; every rank waits until all exist."""
    if config.prior.weight == 0:
        return
    prompts = sorted({task.class_prompt for task in tasks})
    folders = [(prior_folder(config, base, prompt), prompt) for prompt in prompts]
    missing = on_first_rank(lambda: missing_class_images(folders, config.prior.images), world)
    mine = missing[world.rank :: world.world_size]
    begin = draws.hash64("class pictures", tasks[0].name) % len(mine) if mine else 0
    mine = mine[begin:] + mine[:begin]  # tasks of an array that share a class begin at different pictures
    for first in tqdm(
        range(0, len(mine), DRAWN_AT_ONCE), desc="class pictures", unit="batch", disable=world.rank > 0 or not mine
    ):
        batch = [one for one in mine[first : first + DRAWN_AT_ONCE] if not one[0].exists()]
        if batch:
            draw_class_images(base, batch, config.prior, config.resolution)
    barrier()
