"""The base of a run of subjects, as the run uses it."""

from pathlib import Path

import torch

from controlbooth.data.errors import UserError
from controlbooth.models.base import Base
from controlbooth.models.identity import weights_digests
from controlbooth.models.pretrained import Digests, load_base
from controlbooth.trainer.config.families import misplaced
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.run.base import for_pictures


def open_base(
    config: SubjectRunConfig,
    dtype: torch.dtype,
    device: str | torch.device,
    digests_of: Digests = weights_digests,
    where: Path | None = None,
) -> Base:
    """Reads the base of a run of subjects, with what the run decides about its text encoders and its noise.

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
    for message in misplaced(config, base.family):
        raise UserError(message)
    return for_pictures(base, config.flow, "resolution", config.resolution)


def with_usual_guidance(config: SubjectRunConfig, base: Base) -> SubjectRunConfig:
    """Returns the run with its family's guidance where it says none."""
    usual = {"guidance_scale": base.family.usual_guidance}
    sections = {"prior": config.prior, "validation": config.validation}
    changed = {
        name: section.model_copy(update=usual) for name, section in sections.items() if section.guidance_scale is None
    }
    return config.model_copy(update=changed) if changed else config


def drawn_size(base: Base, resolution: int) -> tuple[int, int]:
    """Returns height and width of the pictures that a run draws: a U-Net's own size, of a transformer the run's."""
    return (resolution, resolution) if base.family.is_transformer else base.picture_size
