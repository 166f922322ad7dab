"""Whether anything of a data set can be read at all, before a run begins on it.

A run replaces bad samples, and would train on nothing where all are bad: a caption that no file of a shard holds as it
is expected, or pictures that were copied only in part.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from controlbooth.data.condition_names import IMAGE_EXTENSIONS, stored_kind
from controlbooth.data.errors import UserError
from controlbooth.data.pictures.images import MAX_PIXELS, BadSample, decode_image
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.manifest import Dataset, find_shards, open_dataset
from controlbooth.data.shards.reader import SampleBytes, ShardReader
from controlbooth.data.shards.sequential import samples_of
from controlbooth.data.shards.sidecar import CAPTION_EXTENSIONS
from controlbooth.data.shards.storage import RemoteShard, is_remote
from controlbooth.data.shards.tar import TarDamage

LOOKED_AT = 16
"""Samples that are tried where none can be read, at even distances; one that can be read is enough."""


def check_readable(dataset: Dataset, kind: str | None, max_pixels: int = MAX_PIXELS, pictures: bool = True) -> None:
    """Raises ValueError where no sample can be used, or LOOKED_AT of them cannot be read; OSError as the reader does.

    kind: of condition, as of a run. pictures: whether targets are read, which they are not where a latent cache stands
    for them.
    """
    counts = dataset.samples_per_shard(kind)
    if not counts.any():
        raise UserError(f"{dataset.location} has no sample that can be used: `controlbooth data index` says why")
    reader = ShardReader(dataset, kind, most_open=1, pictures=pictures)
    ends, total = np.cumsum(counts), int(counts.sum())
    first: BadSample | None = None
    numbers = np.unique(np.arange(LOOKED_AT) * total // LOOKED_AT).tolist()
    try:
        for number in numbers:
            shard = int(np.searchsorted(ends, number, side="right"))
            try:
                _read(reader.read(shard, number - int(ends[shard] - counts[shard])), max_pixels)
                return
            except BadSample as bad:
                first = first or bad
    finally:
        reader.close()
    raise UserError(_describe(dataset.location, len(numbers), total, first))


def problem(location: str, kind: str | None, max_pixels: int, pictures: bool = True) -> str | None:
    """Returns what `check_readable` would say of a location, which may not be indexed yet, or None.

    None also stands for something else that is wrong with the shards, and for shards in a store, which are read when
    the run starts.
    """
    try:
        dataset = open_dataset(location)
        dataset.samples_per_shard(kind)
    except (ValueError, OSError):
        return None if is_remote(location) else _unindexed_problem(location, kind, max_pixels)
    if any(isinstance(shard, RemoteShard) for shard in dataset.paths):
        return None
    try:
        check_readable(dataset, kind, max_pixels, pictures)
    except ValueError as error:
        return str(error)
    except OSError:
        return None
    return None


def _unindexed_problem(location: str, kind: str | None, max_pixels: int) -> str | None:
    """Returns what is wrong with a location that is not indexed, by the first samples of its first shard, read as they
    lie there; None where one of them can be read, or where the index will tell what is wrong."""
    first: BadSample | None = None
    tried = 0
    try:
        for key, parts in samples_of(Path(find_shards(location)[0])):
            tried += 1
            try:
                _decode(key, dict(_parts_to_read(key, parts, kind)), max_pixels)
                return None
            except BadSample as bad:
                first = first or bad
            if tried == LOOKED_AT:
                break
    except (TarDamage, ValueError, OSError):
        return None  # which the index tells
    return _describe(location, tried, None, first) if first is not None else None


def _parts_to_read(key: str, parts: dict[str, bytes], kind: str | None) -> Iterator[tuple[str, bytes]]:
    wanted: list[Sequence[str]] = [IMAGE_EXTENSIONS, CAPTION_EXTENSIONS]
    if (stored := stored_kind(kind)) is not None:
        wanted.append([f"{before}{stored}.{extension}" for before in ("cond.", "") for extension in IMAGE_EXTENSIONS])
    for extensions in wanted:
        part = next((extension for extension in extensions if extension in parts), None)
        if part is None:
            raise BadSample(key, extensions[0], f"it has {', '.join(parts)} and no such part")
        yield part, parts[part]


def _read(sample: SampleBytes, max_pixels: int) -> None:
    parts = {sample.caption_extension: sample.caption}
    if sample.image:
        parts |= {sample.image_extension: sample.image}
    if sample.condition is not None:
        parts |= {sample.condition_extension: sample.condition}
    _decode(sample.key, parts, max_pixels)


def _decode(key: str, parts: dict[str, bytes], max_pixels: int) -> None:
    for extension, data in parts.items():
        if extension in CAPTION_EXTENSIONS:
            read_captions(data, extension, key)
        else:
            decode_image(data, key, extension, max_pixels=max_pixels)


def _describe(location: str, tried: int, total: int | None, first: BadSample | None) -> str:
    of = f"of its {total} samples" if total is not None else "samples of its first shard"
    looked = "none" if tried == total else f"none of {tried}"
    return (
        f"{location}: {looked} {of} can be read, so there is nothing to train on. The first is {first}. "
        "`controlbooth data lint --decode` tells of all of them"
    )
