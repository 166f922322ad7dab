"""Lines that were packed at a size at which they will not be read: what becomes of them, in figures.

A line keeps its width of one pixel at every size (`data.pictures.resize`), but lines that lie closer than two pixels of
the smaller picture become one. How much of them does is found by resizing some of the conditions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from controlbooth.data.condition_names import COMPUTABLE, COMPUTED, stored_kind
from controlbooth.data.conditions.values import ConditionValues, some_conditions
from controlbooth.data.pictures.images import scaled_size
from controlbooth.data.pictures.resize import resize, thin
from controlbooth.data.shards.manifest import Dataset, open_dataset

LOOKED_AT = 16
MUCH_SMALLER = 2.0
"""From this factor on it is worth a word."""
LEAST_RESOLUTION = 32
"""Nothing is trained on smaller pictures."""
LOST = 0.1
"""A smaller share of lost lines is not: a mask loses none, and outlines a few corners."""


@dataclass(frozen=True)
class ShrunkLines:
    """What becomes of the lines of one kind; sizes in pixels of the shorter side, in the middle of those looked at."""

    kind: str
    packed: int
    read: int
    share_packed: float
    """Of the pixels that are lines, as packed."""
    share_read: float
    lost: float
    """Share of the length of all lines, in pixels of the whole, that is missing as it has run into others."""

    def __str__(self) -> str:
        remedy = f"pack pictures whose shorter side has {self.read} pixels"
        if self.kind in COMPUTABLE:
            remedy = f"data.condition={COMPUTED}{self.kind} finds them at {self.read} pixels; or {remedy}"
        return (
            f"the lines of condition {self.kind} were packed at {self.packed} pixels (the shorter side) and are read "
            f"at {self.read}: {self.share_packed:.0%} of all pixels are lines as packed, {self.share_read:.0%} as "
            f"read, and {self.lost:.0%} of the lines' length has run into other lines: {remedy}"
        )


def shrunk_lines(dataset: Dataset, kind: str, resolution: int) -> ShrunkLines | None:
    """Returns what becomes of the lines of a kind that are read much smaller than they were packed.

    None where the kind is computed, is no drawing of lines, or is read at more than half of its size, and where no more
    than the share LOST of the lines is lost. resolution: the shorter side, in pixels, at which it is read. Raises
    OSError where shards cannot be read.
    """
    if stored_kind(kind) is None or ConditionValues(dataset, kind).get() != "binary":
        return None
    return lines_at(list(some_conditions(dataset, kind, LOOKED_AT)), kind, resolution)


def lines_at(conditions: Sequence[np.ndarray], kind: str, resolution: int) -> ShrunkLines | None:
    """Returns the same as `shrunk_lines` for given drawings, (H, W) or (H, W, 3) uint8 each; None without any."""
    if not conditions:
        return None
    packed = int(np.median([min(one.shape[:2]) for one in conditions]))
    if packed < MUCH_SMALLER * resolution:
        return None
    before, after, lost = np.mean([_shares(one, resolution) for one in conditions], axis=0).tolist()
    return ShrunkLines(kind, packed, resolution, before, after, lost) if lost > LOST else None


def _shares(condition: np.ndarray, resolution: int) -> tuple[float, float, float]:
    """Returns, for one drawing, the share of pixels that are lines before and after it is resized, and the share of the
    lines' length that is lost."""
    pixels = condition if condition.ndim == 2 else condition.max(axis=2)
    before = _ink(pixels)
    height, width = scaled_size(pixels.shape[0], pixels.shape[1], (resolution, resolution))
    after = _ink(resize(pixels, height, width, "binary"))
    scale = float(np.sqrt(before.size / after.size))
    length = int(thin(before).sum())  # edges may have corners that lengthen no line
    lost = max(0.0, 1.0 - scale * int(thin(after).sum()) / length) if length else 0.0
    return float(before.mean()), float(after.mean()), lost


def _ink(pixels: np.ndarray) -> np.ndarray:
    upper = (pixels > (int(pixels.min()) + int(pixels.max())) // 2).astype(np.uint8)
    return upper if 2 * int(upper.sum()) <= upper.size else 1 - upper


def where_exact(dataset: Dataset, kind: str) -> str | None:
    """Returns a sentence for the person who packs: at which size lines are read as they are, and the half, quarter or
    eighth of it that loses some; None where none does."""
    if ConditionValues(dataset, kind).get() != "binary":
        return None
    conditions = list(some_conditions(dataset, kind, LOOKED_AT))
    packed = int(np.median([min(one.shape[:2]) for one in conditions])) if conditions else 0
    for resolution in (packed // 2, packed // 4, packed // 8):
        if resolution >= LEAST_RESOLUTION and (told := lines_at(conditions, kind, resolution)) is not None:
            return f"condition {kind} is exact at data.resolution={packed}. At {resolution}, {told}"
    return None


def warnings(locations: Sequence[str], kind: str | None, resolution: int) -> list[str]:
    """Returns warnings for people, one for each data set whose lines are read much smaller than they were packed. The
    data sets must be indexed already. Raises OSError and ValueError."""
    if kind is None or stored_kind(kind) is None:
        return []
    found = [(location, shrunk_lines(open_dataset(location), kind, resolution)) for location in locations]
    return [f"{location}: {told}" for location, told in found if told is not None]
