"""Reads held-out samples in a fixed order."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from controlbooth.data.conditions.functions import computed_function
from controlbooth.data.conditions.values import ConditionValues
from controlbooth.data.order import draws
from controlbooth.data.pictures.images import MAX_PIXELS, decode_image, prepare, to_rgb, write_planes
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.manifest import Dataset
from controlbooth.data.shards.reader import ShardReader
from controlbooth.data.shards.selection import choose


@dataclass(frozen=True)
class HeldOutSample:
    """A sample as it is, for validation: middle crop, no flip, its first caption."""

    key: str
    place: tuple[int, int]
    """Number of its shard, and its row in the index of that: no two samples have one, while keys may repeat."""
    pixel_values: np.ndarray
    """(3, H, W) uint8"""
    conditioning: np.ndarray | None
    """(3, H, W) uint8"""
    caption: str


def held_out(
    dataset: Dataset, count: int, *, condition: str | None, resolution: int, max_pixels: int = MAX_PIXELS
) -> Iterator[HeldOutSample]:
    """Yields the `count` samples that stand for the data set, see `data.shards.selection`.

    A bad sample is not replaced: it raises BadSample. What is random about a computed condition is decided by the bytes
    of the target, so it is the same wherever the sample lies and whatever it is called.
    """
    compute = computed_function(condition)
    places = choose(dataset, count, condition)
    reader = ShardReader(dataset, condition, most_open=1)
    values = ConditionValues(dataset, condition, max_pixels=max_pixels)
    shape = (3, resolution, resolution)
    try:
        for shard, ordinal in places:
            sample = reader.read(shard, ordinal)
            image = decode_image(sample.image, sample.key, sample.image_extension, max_pixels=max_pixels)
            given = None
            if sample.condition is not None:
                given = decode_image(sample.condition, sample.key, sample.condition_extension, 0, max_pixels)
            pixels, conditioning = prepare(image, given, condition, (resolution, resolution), values=values.get())
            if compute is not None:
                conditioning = compute(to_rgb(pixels), draws.content_hash(sample.image))
            yield HeldOutSample(
                key=sample.key,
                place=(shard, sample.row),
                pixel_values=write_planes(pixels, np.empty(shape, np.uint8)),
                conditioning=None if conditioning is None else write_planes(conditioning, np.empty(shape, np.uint8)),
                caption=read_captions(sample.caption, sample.caption_extension, sample.key)[0],
            )
    finally:
        reader.close()
