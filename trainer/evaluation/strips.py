"""The pictures of a run's validations by themselves, so that steps can be laid side by side later.

samples/strips/captions.json     the prompts of the shown conditions
               conditions.png    the conditions, one beside the other;   targets.png   likewise
               step-00000050.png what was made of them at a step, with control
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from controlbooth.data.files.records import is_text, read_json_list

STRIPS = Path("samples") / "strips"
CAPTIONS = "captions.json"


@dataclass(frozen=True)
class Strips:
    captions: list[str]
    conditions: np.ndarray
    """(N, H, W, 3) uint8."""
    targets: np.ndarray
    steps: dict[int, np.ndarray]


def write_strip(path: Path, images: np.ndarray) -> None:
    """Writes pictures, (N, H, W, 3) uint8, side by side into one PNG."""
    Image.fromarray(np.concatenate(list(images), axis=1)).save(path, format="PNG")


def read_strips(folder: Path) -> Strips | None:
    """Reads a run's strips; returns None where it has made none."""
    captions = read_json_list(folder / CAPTIONS, "The next validation writes it anew", is_text, missing=None)
    if not captions:
        return None

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as file:
            return np.stack(np.split(np.asarray(file.convert("RGB")), len(captions), axis=1))

    steps = {int(path.stem.removeprefix("step-")): read(path) for path in sorted(folder.glob("step-*.png"))}
    return Strips(captions, read(folder / "conditions.png"), read(folder / "targets.png"), steps)
