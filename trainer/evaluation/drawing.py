"""Draws the pictures that an evaluation measures, and keeps those that are there already."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from controlbooth.data.files.whole import replaced
from controlbooth.data.scenes.render import Scene, SceneObject, render
from controlbooth.data.shards.manifest import Dataset
from controlbooth.models.base import Base
from controlbooth.models.sampling import Control, drawn_by, sample
from controlbooth.models.unlocked_decoder import networks_of
from controlbooth.trainer.config.run import ValidationConfig
from controlbooth.trainer.engine.distributed import World, gather_objects
from controlbooth.trainer.evaluation.extract import fidelity
from controlbooth.trainer.evaluation.held_out import AT_ONCE, HeldOutSet
from controlbooth.trainer.evaluation.target import Evaluated


def generate(
    base: Base,
    controlnet: nn.Module | None,
    held: HeldOutSet,
    config: ValidationConfig,
    world: World,
    prompts: Sequence[str] | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Draws one picture for each held-out condition, spread over ranks: (N, H, W, 3) uint8 on every rank.

    controlnet: None draws with the base alone. prompts: N texts instead of the captions; where all of them are empty
    there is no guidance, except for bases that take the guidance scale as an input. Picture i depends on i alone, so it
    is the same at every world size. Every rank makes equally many passes, since under ZeRO-3 each pass is a collective.
    progress: the title of the progress bar; None shows no bar.
    """
    prompts = held.captions if prompts is None else prompts
    if controlnet is not None:
        base, controlnet = networks_of(base, controlnet)
    count, size = len(held.keys), config.micro_batch_size
    guidance = config.guidance_scale or base.family.usual_guidance
    mine = [i % count for i in range(world.rank, -(-count // world.world_size) * world.world_size, world.world_size)]
    pictures: dict[int, np.ndarray] = {}
    for first in tqdm(range(0, len(mine), size), desc=progress, unit="batch", disable=progress is None):
        rows = mine[first : first + size]
        conditioning = torch.from_numpy(held.conditions[rows]).permute(0, 3, 1, 2).float() / 255.0
        images = sample(
            base,
            [prompts[row] for row in rows],
            [] if controlnet is None else [Control(controlnet, conditioning)],
            seeds=rows,
            steps=config.sampling_steps,
            guidance_scale=guidance if any(prompts) or base.family.embeds_guidance else 1.0,
            picture_size=held.picture_size,
        )
        pictures |= dict(zip(rows, images.numpy(), strict=True))
    everyone = {row: image for part in gather_objects(pictures, world) for row, image in part.items()}
    return np.stack([everyone[row] for row in range(count)])


def noise_pictures(rows: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Draws pictures of noise: (N, H, W, 3) uint8, every level independent and uniform.

    A row has the same picture on any rank.
    """
    pictures = [np.random.default_rng(row).integers(0, 256, (*size, 3), dtype=np.uint8) for row in rows]
    return np.stack(pictures) if pictures else np.zeros((0, *size, 3), np.uint8)


def rows_of(world: World, count: int) -> list[int]:
    """Lists this rank's rows: ranks take whole batches in turn, so batches have the same rows at every world size."""
    batches = range(0, count, AT_ONCE)
    return [
        row for first in batches[world.rank :: world.world_size] for row in range(first, min(first + AT_ONCE, count))
    ]


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def way_digest(
    target: Evaluated, base: Base, dataset: Dataset, network: Any, prompts: Sequence[str], guidance: float, side: int
) -> str:
    """Computes a digest of everything that one variant's pictures depend on: 12 hexadecimal digits of a SHA-256.

    network: the ControlNet, or None for the base alone.
    """
    facts = dict(
        weights=target.digest if network is not None else None,
        data=dataset.fingerprint,
        condition=target.condition if network is not None else None,
        prompts=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        picture_size=(side, side),
        steps=target.steps,
        guidance=guidance,
        scheduler=target.scheduler,
        **drawn_by(base),
    )
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def draw(
    base: Base,
    network: Any,
    held: HeldOutSet,
    prompts: Sequence[str],
    guidance: float,
    target: Evaluated,
    folder: Path,
    mine: Sequence[int],
    name: str,
    world: World,
) -> tuple[np.ndarray, int]:
    """Draws this rank's pictures into the folder, and returns them, (n, H, W, 3) uint8, and how many were drawn now.

    A batch whose pictures are all in the folder already is not drawn again. mine: the rows of this rank. name: the
    title of the progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = 0
    batches = [[row for row in mine if row // AT_ONCE == batch] for batch in sorted({row // AT_ONCE for row in mine})]
    for rows in tqdm(batches, desc=name, unit="batch", disable=world.rank != 0):
        if all((folder / f"{row:06d}.png").is_file() for row in rows):
            continue
        conditioning = torch.from_numpy(held.conditions[rows]).permute(0, 3, 1, 2).float() / 255.0
        pictures = sample(
            base,
            [prompts[row] for row in rows],
            [] if network is None else [Control(network, conditioning)],
            seeds=rows,
            steps=target.steps,
            guidance_scale=guidance,
            scheduler=target.scheduler,
            picture_size=held.picture_size,
        ).numpy()
        for row, picture in zip(rows, pictures, strict=True):
            write_png(folder / f"{row:06d}.png", picture)
        new += len(rows)
    pictures = [read_png(folder / f"{row:06d}.png") for row in mine]
    return (np.stack(pictures) if pictures else np.zeros((0, *held.targets.shape[1:]), np.uint8)), new


def write_png(path: Path, picture: np.ndarray) -> None:
    with replaced(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def sample_rows(
    images: dict[str, np.ndarray], held: HeldOutSet, mine: Sequence[int], extract: Any
) -> list[dict[str, Any]]:
    """Makes a row for each of this rank's pictures and each variant of making them: sample, figures and their chance.

    images: by variant, the pictures of the rows `mine`, (n, H, W, 3) uint8. Values are rounded to 6 decimal places.
    """
    rows = []
    for variant, pictures in images.items():
        figures = fidelity(pictures, held, mine, extract)
        for place, row in enumerate(mine):
            own, chance = ({name: round(float(values[place]), 6) for name, values in part.items()} for part in figures)
            named = dict(key=held.keys[row], place=held.places[row], caption=held.captions[row])
            rows.append(dict(way=variant, row=row, **named, **own, chance=chance))
    return rows


def disc_baseline(what: Scene, size: int) -> Scene:
    """Replaces each object of a scene by a disc of its area at its centre of mass, which keeps place and size alone.

    size: of the square picture in which the objects are measured, in pixels.
    """
    rendering = render(what, size)
    objects = []
    for place, thing in enumerate(what.objects):
        rows, columns = np.nonzero(rendering.instances == place + 1)
        radius = (len(rows) / np.pi) ** 0.5 / size / 0.95  # a ball fills .95 of its radius
        x, y = (columns.mean() + 0.5) / size, (rows.mean() + 0.5) / size
        objects.append(
            SceneObject("ball", thing.colour, thing.size, float(x), float(y), float(radius), 0.0, thing.tint)
        )
    return Scene(tuple(objects), what.background, what.horizon, what.slope)
