"""The base of a run, as the run uses it."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from controlbooth.data.errors import UserError
from controlbooth.models.base import Base
from controlbooth.models.identity import weights_digests
from controlbooth.models.noise.process import FlowMatching, FlowSettings
from controlbooth.models.pretrained import Digests, load_base
from controlbooth.trainer.config.families import misplaced
from controlbooth.trainer.config.run import FlowConfig, RunConfig, base_path
from controlbooth.trainer.engine.distributed import World, from_first_rank


def open_base(
    config: RunConfig, dtype: torch.dtype, device: str | torch.device, digests_of: Digests = weights_digests
) -> Base:
    """Reads a run's base, with what the run decides about its text encoders and its noise.

    digests_of: see `load_base`. Raises FileNotFoundError and ValueError as `load_base`, and for settings that have no
    meaning with its family.
    """
    base = load_base(
        base_path(config),
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


def with_run_settings(config: RunConfig, base: Base) -> Base:
    """Gives a base what the run decides about its noise; -> the base.

    Raises ValueError for settings that have no meaning with its family, and for pictures of a size that it cannot take.
    """
    for message in misplaced(config, base.family):
        raise UserError(message)
    return for_pictures(base, config.flow, "data.resolution", config.data.resolution)


def for_pictures(base: Base, flow: FlowConfig, field: str, side: int) -> Base:
    """Gives a base of flow matching what a run decides about its noise; -> the base.

    side: of its square pictures, in pixels. field: of the run, which says it. Raises ValueError for a side that a
    transformer cannot take.
    """
    if isinstance(base.process, FlowMatching):
        base.process = base.process.with_settings(FlowSettings(**flow.model_dump()))
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


def with_usual_guidance(config: RunConfig, base: Base) -> RunConfig:
    """Returns the run with its family's guidance where it says none."""
    if config.validation.guidance_scale is not None:
        return config
    usual = config.validation.model_copy(update={"guidance_scale": base.family.usual_guidance})
    return config.model_copy(update={"validation": usual})
