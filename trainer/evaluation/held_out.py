"""The samples that are never trained on, whole on every rank, and the scenes behind them where they are scenes."""

from dataclasses import dataclass, replace

import numpy as np

from controlbooth.data.condition_names import COMPUTED
from controlbooth.data.loading.held_out import HeldOutSample, held_out
from controlbooth.data.pictures.images import MAX_PIXELS
from controlbooth.data.scenes.render import Scene, scene
from controlbooth.data.shards.manifest import Dataset

AT_ONCE = 8
"""Rows that an evaluation draws and encodes together, whatever the number of ranks."""
EDGE_KINDS = ("edges", "canny", "canny_random")
MASK_KINDS = ("segmentation",)


@dataclass(frozen=True)
class HeldOutSet:
    """The samples that stand for the held-out shards (`data.shards.selection`), whole on every rank; N of them."""

    kind: str
    """Of the conditions, wherever they come from."""
    keys: list[str]
    """For people: several samples may have one."""
    places: list[tuple[int, int]]
    """Number of the shard, and the row in the index of that: no two samples have one, and equal data sets the same."""
    captions: list[str]
    targets: np.ndarray
    """(N, H, W, 3) uint8."""
    conditions: np.ndarray
    """(N, H, W, 3) uint8, of the kind that is trained on."""
    edges: np.ndarray | None
    """(N, H, W) uint8: the conditions where they are edges, else those that the shards hold."""
    segmentation: np.ndarray | None
    """(N, H, W) uint8, nonzero on objects; where the set holds scenes, and the shards their segmentation."""

    @property
    def picture_size(self) -> tuple[int, int]:
        """Gives (H, W) in pixels."""
        return self.targets.shape[1], self.targets.shape[2]


def load_held_out(
    dataset: Dataset, count: int, condition_kind: str, resolution: int, max_pixels: int = MAX_PIXELS
) -> HeldOutSet:
    """Reads the set. Raises ValueError where the shards have fewer than `count` samples of the kind.

    max_pixels: see `decode_image`.
    """

    def read(kind: str) -> list[HeldOutSample]:
        return list(held_out(dataset, count, condition=kind, resolution=resolution, max_pixels=max_pixels))

    samples = read(condition_kind)
    kind = condition_kind.removeprefix(COMPUTED)
    stored = {name for row in dataset.rows for name in row.conditions}

    def one_channel(wanted: tuple[str, ...]) -> np.ndarray | None:
        if kind in wanted:  # what the pictures are drawn under, whatever else the shards hold
            return np.stack([sample.conditioning[0] for sample in samples])  # type: ignore[index]
        found = [name for name in wanted if name in stored]
        if not found:
            return None
        others = read(found[0])
        if [other.place for other in others] != [sample.place for sample in samples]:
            return None  # not every sample has that kind: no figure rather than one of other pictures
        return np.stack([other.conditioning[0] for other in others])  # type: ignore[index]

    held = HeldOutSet(
        kind=kind,
        keys=[sample.key for sample in samples],
        places=[sample.place for sample in samples],
        captions=[sample.caption for sample in samples],
        targets=np.stack([sample.pixel_values.transpose(1, 2, 0) for sample in samples]),
        conditions=np.stack([sample.conditioning.transpose(1, 2, 0) for sample in samples]),  # type: ignore[union-attr]
        edges=one_channel(EDGE_KINDS),
        segmentation=None,
    )
    # Objects are found before plain backgrounds, which photographs have not, and colour maps are zero in places.
    return replace(held, segmentation=one_channel(MASK_KINDS)) if scenes_of(held) else held


def scenes_of(held: HeldOutSet) -> list[Scene]:
    """Makes the scenes behind keys such as scene-1000003-00000007; an empty list where the set holds anything else."""
    parts = [key.split("-") for key in held.keys]
    if not all(len(part) == 3 and part[0] == "scene" and part[1].isdecimal() and part[2].isdecimal() for part in parts):
        return []
    scenes = [scene(int(part[1]), int(part[2])) for part in parts]
    return scenes if [what.caption for what in scenes] == held.captions else []
