"""The base that a first run file is for: its family, and the side of its pictures."""

import sys
from dataclasses import dataclass

from controlbooth.data.errors import UserError
from controlbooth.trainer.config.run import base_folder

NATIVE = {"sd15": 512, "sd21": 512, "sdxl": 1024, "sd3": 1024, "flux": 1024, "miniature": 64, "miniature-dit": 64}
"""Side of the pictures that a family was trained on, in pixels, where its base does not say."""


@dataclass(frozen=True)
class Base:
    """What a run is to be trained on top of."""

    name: str
    family: str
    side: int
    shapes: str | None

    @property
    def is_small(self) -> bool:
        """Tells whether it is one that learns scenes of 64 pixels, on a processor."""
        return self.family.startswith("miniature")


def say(message: str) -> None:
    print(f"init: {message}", file=sys.stderr, flush=True)


def base_of(name: str, shapes: str | None) -> Base:
    """Finds the family of a base and the side of its pictures.

    Raises UserError where it is not here and no shapes are named.
    """
    from controlbooth.models.architectures import PUBLISHED
    from controlbooth.models.files.weight_files import read_json
    from controlbooth.models.recognition import recognise_folder

    folder = base_folder(name)
    if shapes is not None:
        family = PUBLISHED[shapes].family
        return Base(name, family, NATIVE[family], shapes)
    if not folder.is_dir():
        raise UserError(
            f"--base {name} is no diffusers folder here: give one, or name its shapes by --shapes "
            f"{' or '.join(PUBLISHED)}"
        )
    family = recognise_folder(folder, "auto")
    side = NATIVE[family.name]
    if not family.is_transformer and not family.name.startswith("miniature"):
        config = read_json(folder / family.denoiser.folder / "config.json")
        side = int(config.get("sample_size") or side // family.vae_factor) * family.vae_factor
    return Base(name, family.name, side, None)
