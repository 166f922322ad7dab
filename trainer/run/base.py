"""The base of a run, as the run uses it."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from controlbooth.data.errors import UserError
from controlbooth.models.base import Base
from controlbooth.models.identity import FROZEN, weights_digests
from controlbooth.models.noise.process import FlowMatching, FlowSettings
from controlbooth.models.pretrained import Digests, load_base
from controlbooth.trainer.config.families import misplaced
from controlbooth.trainer.config.run import RunConfig, base_folder
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.engine.distributed import World, from_first_rank

AnyRun = RunConfig | SubjectRunConfig
OneRun = TypeVar("OneRun", RunConfig, SubjectRunConfig)


def open_base(
    config: AnyRun,
    dtype: torch.dtype,
    device: str | torch.device,
    digests_of: Digests = weights_digests,
    where: Path | None = None,
) -> Base:
    """Reads a run's base, with what the run decides about its text encoders and its noise.

    where: in place of the run's own, the pipeline of a subject that was trained on it. digests_of: see `load_base`.
    Raises FileNotFoundError and ValueError as `load_base`, and for settings that have no meaning with its family.
    """
    base = load_base(
        where or base_folder(config.model.base),
        config.model.family,
        dtype,
        device,
        t5=config.model.t5,
        text_tokens=config.model.text_tokens,
        digests_of=digests_of,
    )
    return with_run_settings(config, base)


def once_a_machine(world: World) -> Digests:
    """Returns what `load_base` calls for the digests of a base that all ranks load at once: one rank of each machine
    reads the files for them, and finds what rank 0 has found, or raises ValueError."""
    return partial(_digests_once_a_machine, world)


def _digests_once_a_machine(
    world: World, root: Path, files: Mapping[str, Iterable[Path]]
) -> tuple[str, dict[str, str]]:
    own = weights_digests(root, files) if world.local_rank == 0 else None
    digests = from_first_rank(own)
    if own is not None and own != digests:
        parts = sorted({*digests[1], *own[1]})
        other = next((part for part in parts if own[1].get(part) != digests[1].get(part)), "its files' names")
        raise UserError(
            f"{root} on this machine, of rank {world.rank}, holds other weights than on that of rank 0, first in "
            f"{other}: copy the base there again, or put it on a shared disk"
        )
    return digests


def with_run_settings(config: AnyRun, base: Base) -> Base:
    """Gives a base what the run decides about its noise; -> the base.

    Of a run of subjects the precision in which it is held becomes a part of what the base is: their adapters learn
    around it, and class pictures are drawn by it.

    Raises ValueError for settings that have no meaning with its family, and for pictures of a size that it cannot take.
    """
    for message in misplaced(config, base.family):
        raise UserError(message)
    if isinstance(base.process, FlowMatching):
        base.process = base.process.with_settings(FlowSettings(**config.flow.model_dump()))
    if isinstance(config, SubjectRunConfig) and config.model.frozen.precision != "engine":
        base.identity = base.identity | {FROZEN: config.model.frozen.precision}
    if isinstance(config, RunConfig):
        field, side = "data.resolution", config.data.resolution
    else:
        field, side = "resolution", config.resolution
    if base.family.is_transformer and side % base.pixel_multiple:
        step = base.pixel_multiple
        near = sorted({max(1, side // step) * step, -(-side // step) * step})
        raise UserError(
            f"{field}={side} is not a multiple of {base.pixel_multiple}, the side of a token of "
            f"{base.family.title} in pixels. Use {' or '.join(map(str, near))}"
        )
    places = base.denoiser.config.get("pos_embed_max_size")
    if base.family.is_transformer and places is not None and side > places * base.pixel_multiple:
        raise UserError(
            f"{field}={side} is more than {places * base.pixel_multiple}, up to which this base knows places "
            "in a picture. Lower it"
        )
    return base


def with_usual_guidance(config: OneRun, base: Base) -> OneRun:
    """Returns the run with its family's guidance in each section that draws pictures and says none."""
    sections = {name: getattr(config, name, None) for name in ("prior", "validation")}
    usual = {"guidance_scale": base.family.usual_guidance}
    changed = {
        name: section.model_copy(update=usual)
        for name, section in sections.items()
        if section is not None and section.guidance_scale is None
    }
    return config.model_copy(update=changed) if changed else config
