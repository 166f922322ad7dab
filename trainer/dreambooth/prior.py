"""Pictures of a class, drawn by the frozen base before its subjects are trained, and kept for all that share them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.errors import UserError
from controlbooth.data.order.draws import hash64
from controlbooth.models.base import Base
from controlbooth.models.sampling import drawn_by, sample
from controlbooth.trainer.config.subjects import PriorConfig
from controlbooth.trainer.evaluation.drawing import write_png
from controlbooth.trainer.run.disk_full import named_when_full

DRAWN_AT_ONCE = 8


def class_folder(cache: Path, base: Base, prompt: str, prior: PriorConfig, resolution: int) -> Path:
    """Returns the folder of a class's pictures, named by a hash of all that the pictures depend on.

    One folder thus serves every subject, run and rank.
    """
    identity = dict(
        dtype=str(base.dtype),
        **drawn_by(base),
        prompt=prompt,
        sampling_steps=prior.sampling_steps,
        guidance_scale=prior.guidance_scale,
        resolution=resolution,
    )
    return cache / hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()


def class_images(folder: Path, count: int) -> list[Path]:
    return [folder / f"{number:05d}.png" for number in range(count)]


def missing_class_images(folders: Sequence[tuple[Path, str]], count: int) -> list[tuple[Path, str]]:
    """Returns (file, prompt) of each class picture that does not exist, in the same order on every rank."""
    return [(path, prompt) for folder, prompt in folders for path in class_images(folder, count) if not path.exists()]


def draw_class_images(base: Base, missing: Sequence[tuple[Path, str]], prior: PriorConfig, resolution: int) -> None:
    """Draws these class pictures, given as (file, prompt).

    Each picture depends on its prompt and number alone, and its file appears whole or not at all. Raises ValueError
    where resolution is not the picture size of a U-Net; a transformer draws at any.
    """
    size = (resolution, resolution)
    assert prior.guidance_scale is not None, "the run has its family's guidance where it says none"
    if drawn_size(base, resolution) != size:
        raise UserError(
            f"resolution is {resolution}, and the base draws {base.picture_size[0]} x {base.picture_size[1]}: class "
            "pictures are drawn at the base's own size. Set resolution to it, or prior.weight=0"
        )
    images = sample(
        base,
        [prompt for _, prompt in missing],
        seeds=[hash64("class image", prompt, int(path.stem)) >> 1 for path, prompt in missing],
        steps=prior.sampling_steps,
        guidance_scale=prior.guidance_scale,
        picture_size=size,
    )
    for (path, prompt), image in zip(missing, images.numpy(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with named_when_full(path.parent / "prompt.txt"):
            (path.parent / "prompt.txt").write_text(prompt)  # for people; its name says it already
        # tasks of an array that share a class may draw the same picture at once
        with named_when_full(path):
            write_png(path, image)


def drawn_size(base: Base, resolution: int) -> tuple[int, int]:
    """Returns height and width of the pictures that a run draws: a U-Net's own size, of a transformer the run's."""
    return (resolution, resolution) if base.family.is_transformer else base.picture_size
