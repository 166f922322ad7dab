"""Aspect-ratio buckets: which picture shapes a run trains on, and which samples go into each.

The manifest counts the samples of each shard by aspect ratio, in bins of a sixteenth of an octave, so a run of a
million shards is planned without opening one. A sample goes to the shape nearest to its bin; shapes that would have
fewer samples than there are lanes give theirs to the next one. The plan is a function of the manifest and the run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from controlbooth.data.errors import UserError

BINS_PER_OCTAVE = 16
_WIDEST = 4 * BINS_PER_OCTAVE
"""Bins end at 16:1; what is wider lies in the last one."""


def aspect_bins(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Computes round(16 * log2(width / height)), limited to -64 .. 64: (n,) int64.

    widths, heights: (n,) integers >= 1.
    """
    # Rounded first, so that a ratio in the middle between two bins does not depend on a machine's last bit.
    octaves = np.log2(np.asarray(widths, np.float64)) - np.log2(np.asarray(heights, np.float64))
    return np.clip(np.rint(np.round(octaves * BINS_PER_OCTAVE, 6)), -_WIDEST, _WIDEST).astype(np.int64)


@dataclass(frozen=True)
class Buckets:
    """The shapes of a run, and where the samples of each source go."""

    shapes: tuple[tuple[int, int], ...]
    """(height, width) in pixels of each bucket."""
    assigned: tuple[Mapping[int, int], ...]
    """For each source: aspect bin -> bucket. Empty where there is one bucket, which has all."""

    def bucket_of(self, source: int, bins: np.ndarray) -> np.ndarray:
        """Maps (n,) int64 aspect bins of a source to (n,) int64 bucket numbers."""
        if len(self.shapes) == 1:
            return np.zeros(len(bins), np.int64)
        table = self.assigned[source]
        return np.array([table[bin] for bin in bins.tolist()], np.int64)


def bucket_shapes(resolution: int, max_aspect_ratio: float, multiple: int) -> tuple[tuple[int, int], ...]:
    """Lists the picture shapes of a run as (height, width) in pixels, from the tallest to the widest.

    Their sides are multiples of `multiple`, their area is at most resolution**2 and nearly so, and the long side is at
    most max_aspect_ratio times the short one. With max_aspect_ratio 1 the square is the only one. Raises ValueError
    where that is more than 1 and resolution is not a multiple of `multiple`.
    """
    if max_aspect_ratio == 1.0:
        return ((resolution, resolution),)
    if resolution % multiple:
        near = sorted({max(multiple, resolution // multiple * multiple), -(-resolution // multiple) * multiple})
        raise UserError(
            f"data.resolution={resolution} is not a multiple of {multiple}, the step of this base's picture sides, "
            f"which data.max_aspect_ratio={max_aspect_ratio:g} needs. Use {' or '.join(map(str, near))}"
        )
    shapes = set()
    for short in range(multiple, resolution + 1, multiple):
        long = resolution**2 // short // multiple * multiple
        if long <= max_aspect_ratio * short:
            shapes |= {(short, long), (long, short)}
    return tuple(sorted(shapes, key=lambda shape: (math.log2(shape[1] / shape[0]), shape)))


def plan_buckets(
    shapes: Sequence[tuple[int, int]], histograms: Sequence[Mapping[int, int]], lanes: int
) -> tuple[Buckets, list[list[int]]]:
    """Chooses the shapes to use, and counts the samples of each source that they have: samples[bucket][source].

    histograms: aspect bin -> samples, of each source. A (bucket, source) with fewer samples than lanes cannot fill a
    batch: its samples go to the nearest shape that has some of the source's, the smallest such stream first.
    """
    octaves = [math.log2(width / height) for height, width in shapes]
    tables = []
    for histogram in histograms:
        table = {bin: _nearest(bin / BINS_PER_OCTAVE, octaves, range(len(shapes))) for bin in sorted(histogram)}
        while True:
            sizes = _sizes(table, histogram)
            poor = min((size, number) for number, size in sizes.items())
            if poor[0] >= lanes or len(sizes) == 1:
                break
            others = sorted(sizes.keys() - {poor[1]})
            heir = _nearest(octaves[poor[1]], octaves, others)
            table = {bin: heir if number == poor[1] else number for bin, number in table.items()}
        tables.append(table)
    used = sorted({number for table in tables for number in table.values()})
    renamed = {number: bucket for bucket, number in enumerate(used)}
    tables = [{bin: renamed[number] for bin, number in table.items()} for table in tables]
    counted = [_sizes(table, histogram) for table, histogram in zip(tables, histograms, strict=True)]
    samples = [[sizes.get(bucket, 0) for sizes in counted] for bucket in range(len(used))]
    return Buckets(tuple(shapes[number] for number in used), tuple(tables)), samples


def _nearest(octave: float, octaves: Sequence[float], among: Sequence[int]) -> int:
    return min(among, key=lambda number: (abs(octaves[number] - octave), number))


def _sizes(table: Mapping[int, int], histogram: Mapping[int, int]) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for bin, number in table.items():
        sizes[number] = sizes.get(number, 0) + histogram[bin]
    return sizes
