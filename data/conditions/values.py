"""What the values of a data set's conditions are, so that all of them are resized alike: see `data.pictures.resize`.

The name of a kind decides where it is a known one. Elsewhere 32 pictures do, at even distances over the data set, the
same ones for every rank and every start: a kind is "binary" or "labels" only if none of them speaks against it.
"""

from collections.abc import Iterable, Iterator
from threading import Event, Lock

import numpy as np

from controlbooth.data.condition_names import Values, named_values, stored_kind
from controlbooth.data.pictures.images import MAX_PIXELS, BadSample, decode_image
from controlbooth.data.pictures.resize import values_of
from controlbooth.data.shards.manifest import Dataset
from controlbooth.data.shards.reader import ShardReader

LOOKED_AT = 32


class ConditionValues:
    """What the values of one kind are in a data set, found when it is first asked for; of use to many threads."""

    def __init__(self, dataset: Dataset, kind: str | None, closing: Event | None = None, max_pixels: int = MAX_PIXELS):
        """Keeps what is asked about; nothing is read yet. closing: once set, reads that wait for a store to come back
        are given up. max_pixels: see `decode_image`."""
        self._dataset, self._kind, self._closing, self._max_pixels = dataset, kind, closing, max_pixels
        self._lock = Lock()
        self._found: Values | None = named_values(kind) if stored_kind(kind) is not None else "levels"

    def get(self) -> Values:
        """Returns what the values are; the first call looks at samples where the name does not tell. Raises OSError
        where shards cannot be read; bad samples are skipped."""
        with self._lock:
            if self._found is None:
                self._found = common_values(
                    map(
                        values_of,
                        some_conditions(self._dataset, self._kind, LOOKED_AT, self._closing, self._max_pixels),
                    )
                )
            return self._found


def some_conditions(
    dataset: Dataset,
    kind: str | None,
    count: int,
    closing: Event | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[np.ndarray]:
    """Yields decoded conditions of a kind that shards hold: `count` at even distances, or all. Skips bad samples."""
    counts = dataset.samples_per_shard(kind)
    ends, total = np.cumsum(counts), int(counts.sum())
    reader = ShardReader(dataset, kind, most_open=1, pictures=False)
    reader.closing = closing or reader.closing
    try:
        for number in np.unique(np.arange(count) * total // count).tolist() if total else ():
            shard = int(np.searchsorted(ends, number, side="right"))
            try:
                sample = reader.read(shard, number - int(ends[shard] - counts[shard]))
                assert sample.condition is not None
                yield decode_image(sample.condition, sample.key, sample.condition_extension, 0, max_pixels)
            except BadSample:
                continue
    finally:
        reader.close()


def common_values(found: Iterable[Values]) -> Values:
    """Decides what the values of all pictures of a kind are taken for, by what each picture is by itself.

    A picture of a label map may show two classes only, so "binary" does not speak against "labels"; "levels" speaks
    against both. Without any picture the answer is "levels".
    """
    seen = set(found)
    return "levels" if "levels" in seen or not seen else "labels" if "labels" in seen else "binary"
