"""Draws the pictures of runs for a study: the same held-out conditions, from the same noise, for all of them."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from controlbooth.data.shards.manifest import Dataset, open_dataset
from controlbooth.models.unlocked_decoder import load_networks
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.engine.distributed import World, join, leave
from controlbooth.trainer.evaluation.drawing import draw, slug, way_digest, write_png
from controlbooth.trainer.evaluation.evaluate import base_of
from controlbooth.trainer.evaluation.held_out import HeldOutSet, load_held_out
from controlbooth.trainer.evaluation.record import WITH
from controlbooth.trainer.evaluation.target import Evaluated, resolve_run, samples_to_draw
from controlbooth.trainer.run.process import quiet_libraries
from controlbooth.trainer.run.same_base import check_same_base
from controlbooth.trainer.study.sources import Beside, Source

DRAWN = "drawn"


def targets_of(sources: Sequence[Source], options: argparse.Namespace) -> dict[str, Evaluated]:
    """Finds what is drawn of each run: method -> target. Raises ConfigError where runs cannot be drawn alike.

    options: data, steps and guidance of the command line, each None where it was left out, and items.
    """
    asked = argparse.Namespace(
        data=options.data, condition=None, base=None, resolution=None, samples=None,
        steps=options.steps, guidance=options.guidance, scheduler=None,
    )  # fmt: skip
    found = {one.name: resolve_run(argparse.Namespace(**vars(asked), step=one.step), one.where) for one in sources}
    for fact in ("condition", "resolution", "steps", "guidance"):
        values = {name: getattr(target, fact) for name, target in found.items()}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value!r} of {name}" for name, value in values.items())
            remedy = f"Say one for all by --{fact}" if fact in ("steps", "guidance") else "Compare runs that share it"
            raise ConfigError(f"the runs would not be drawn alike: their {fact} is {told}. {remedy}")
    return found


def open_data(targets: Mapping[str, Evaluated]) -> Dataset:
    """Opens the held-out shards of the runs. Raises ConfigError where they hold different samples."""
    opened = {data: open_dataset(data) for data in dict.fromkeys(target.data for target in targets.values())}
    if len({dataset.fingerprint for dataset in opened.values()}) > 1:
        raise ConfigError(f"the runs have different held-out shards ({', '.join(opened)}): name some by --data SHARDS")
    return next(iter(opened.values()))


def count_items(targets: Mapping[str, Evaluated], dataset: Dataset, most: int) -> int:
    """Counts the samples that are drawn: `most`, or all where there are fewer."""
    return min(most, samples_to_draw(next(iter(targets.values())), dataset))


def draw_runs(
    targets: Mapping[str, Evaluated], dataset: Dataset, count: int, out: Path
) -> tuple[dict[str, dict[str, Path]], Beside]:
    """Draws `count` held-out samples with each run into OUT/drawn; what is there already is not drawn again.

    -> (method -> item -> picture, the prompts, conditions and real pictures). Items have the names 000000, 000001, ...
    """
    quiet_libraries()
    world = join()
    try:
        pictures: dict[str, dict[str, Path]] = {}
        held: HeldOutSet | None = None
        for name, target in targets.items():
            pictures[name], held = _draw_run(name, target, dataset, count, out / DRAWN, world)
        assert held is not None
        return pictures, _write_beside(held, out / DRAWN)
    finally:
        leave()


def _draw_run(
    name: str, target: Evaluated, dataset: Dataset, count: int, out: Path, world: World
) -> tuple[dict[str, Path], HeldOutSet]:
    base = base_of(target, world)
    check_same_base(target.saved or {}, base, f"at step {target.step}", "Put it back as it was")
    guidance = target.guidance or base.family.usual_guidance
    controlled, network = load_networks(target.weights, base, kind=target.condition)
    network.eval().requires_grad_(False).to(world.device)
    held = load_held_out(dataset, count, target.condition, target.resolution or base.picture_size[0])
    digest = way_digest(target, base, dataset, network, held.captions, guidance, held.picture_size[0])
    folder = out / f"{slug(WITH)}-{digest}"
    draw(controlled, network, held, held.captions, guidance, target, folder, range(count), name, world)
    return {f"{row:06d}": folder / f"{row:06d}.png" for row in range(count)}, held


def _write_beside(held: HeldOutSet, out: Path) -> Beside:
    """Writes the conditions and the real pictures of the samples, by the names of their items."""
    written: dict[str, dict[str, Path]] = {}
    for kind, images in (("conditions", held.conditions), ("targets", held.targets)):
        (out / kind).mkdir(exist_ok=True)
        written[kind] = {f"{row:06d}": out / kind / f"{row:06d}.png" for row in range(len(held.keys))}
        for path, image in zip(written[kind].values(), images, strict=True):
            write_png(path, np.asarray(image))
    prompts = {f"{row:06d}": caption for row, caption in enumerate(held.captions)}
    return Beside(prompts, written["conditions"], written["targets"])
