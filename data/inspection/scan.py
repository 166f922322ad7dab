"""Reading all of a data set once, in processes, for what lint and stats want to know of each sample.

What is kept is about 60 bytes a sample and 20 a caption; keys and pictures are read again for the few that are shown.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import cv2
import numpy as np
from tqdm import tqdm

from controlbooth.data.inspection.hygiene import edge_map
from controlbooth.data.order.draws import content_hash
from controlbooth.data.pictures.headers import image_size
from controlbooth.data.pictures.images import (
    MAX_PIXELS,
    BadSample,
    decode_image,
    keep_freed_memory,
    same_frame,
    too_large,
)
from controlbooth.data.pictures.likeness import is_blank, perceptual_hash
from controlbooth.data.processes.parent import end_with_parent
from controlbooth.data.processes.pool import WorkerError
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.manifest import Dataset, shard_names
from controlbooth.data.shards.reader import SampleBytes, ShardReader
from controlbooth.data.shards.sidecar import ShardIndex, index_path, load_index

NEGATIVES = 4
"""Other targets of the shard that each condition is compared with."""


@dataclass
class Scan:
    """Of the n usable samples of a shard, or of many shards one after the other."""

    digests: np.ndarray
    """(n,) uint64, blake2b of the target image's bytes; 0 where they could not be read."""
    sizes: np.ndarray
    """(n, 2) int64, width and height of the target as its header states them."""
    hashes: np.ndarray
    """(n, 4) uint64 perceptual hashes; 0 where the target was not decoded or is blank."""
    caption_hashes: np.ndarray
    """(m,) uint64, m >= n where samples have several captions."""
    caption_owners: np.ndarray
    """(m,) int64, the sample of each caption."""
    caption_characters: np.ndarray
    """(m,) int64"""
    caption_words: np.ndarray
    """(m,) int64"""
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    """condition kind -> (n,) float32 pairing scores, NaN where there is none."""
    negatives: dict[str, np.ndarray] = field(default_factory=dict)
    """condition kind -> (k,) float32 scores with other samples' targets."""
    faults: list[tuple[int, str, str, str | None]] = field(default_factory=list)
    """sample, kind of fault ("broken", "frame", "blank image", "blank condition"), message, kind of condition"""


def scan(dataset: Dataset, kinds: Sequence[str], decode: bool, workers: int, max_pixels: int = MAX_PIXELS) -> Scan:
    """Reads every usable sample with its conditions of these kinds; decode: their pictures too. Shows its progress.

    Samples are numbered in the order of the shards. max_pixels: larger pictures are faults, by their header. Raises
    OSError for shards that cannot be read, and OutOfMemory, which says nothing of the samples.
    """
    scans = []
    with tqdm(total=sum(row.usable for row in dataset.rows), unit="sample", desc="scan") as bar:
        for shard in _each(dataset, kinds, decode, workers, max_pixels):
            scans.append(shard)
            bar.update(len(shard.digests))
    return _join(scans, kinds)


def places(dataset: Dataset) -> np.ndarray:
    """Returns at which number the samples of each shard begin, and how many there are: (shards + 1,) int64."""
    return np.concatenate([[0], np.cumsum(dataset.samples_per_shard())])


def _each(dataset: Dataset, kinds: Sequence[str], decode: bool, workers: int, max_pixels: int) -> Iterator[Scan]:
    count, arguments = len(dataset.rows), (dataset, tuple(kinds), decode, max_pixels)
    if min(workers, count) <= 1:
        _start(*arguments)
        yield from map(_scan_shard, range(count))
        return
    # spawn: a forked child would inherit threads and locks of whoever calls
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, count), context, _start, arguments) as pool:
        try:
            yield from pool.map(_scan_shard, range(count), chunksize=1)
        except BrokenProcessPool as error:
            raise WorkerError("a worker process was killed, most often for memory: use fewer --workers") from error


@dataclass
class _Work:
    """What a process needs for every shard."""

    dataset: Dataset
    decode: bool
    max_pixels: int
    readers: dict[str | None, ShardReader]


_work: _Work


def _start(dataset: Dataset, kinds: tuple[str, ...], decode: bool, max_pixels: int) -> None:
    global _work
    end_with_parent()
    cv2.setNumThreads(1)  # there are processes enough
    keep_freed_memory()
    readers = {kind: ShardReader(dataset, kind, most_open=1) for kind in (None, *kinds)}
    _work = _Work(dataset, decode, max_pixels, readers)


def _scan_shard(shard: int) -> Scan:
    index = load_index(index_path(_work.dataset.paths[shard]))
    rows = index.usable()
    n = len(rows)
    kinds = [kind for kind in _work.readers if kind is not None]
    result = _empty(n, kinds)
    result.sizes[:] = np.stack([index.samples["width"][rows], index.samples["height"][rows]], axis=1)
    ordinals = {kind: _ordinals(index, kind) for kind in kinds}
    recent: deque[np.ndarray] = deque(maxlen=NEGATIVES)
    captions: list[tuple[int, int, int, int]] = []
    negatives: dict[str, list[float]] = {kind: [] for kind in kinds}
    for at, row in enumerate(rows.tolist()):
        try:
            sample = _work.readers[None].read(shard, at)
            result.digests[at] = content_hash(sample.image)
            for text in read_captions(sample.caption, sample.caption_extension, sample.key):
                captions.append((at, text_hash(text), len(text), len(text.split())))
            target = _pixels(sample.image, sample.key, sample.image_extension)
            target_map = None
            if target is not None:
                if is_blank(target):
                    result.faults.append((at, "blank image", "all of it has one colour", None))
                else:
                    result.hashes[at] = perceptual_hash(target)
                    target_map = edge_map(target)
            size = result.sizes[at].tolist() if target is None else target.shape[1::-1]
            for kind in kinds:
                if row not in ordinals[kind]:
                    continue
                condition = _work.readers[kind].read(shard, ordinals[kind][row])
                fault, drawn = _look_at_condition(condition, kind, size)
                if fault is not None:
                    result.faults.append((at, *fault, kind))
                if drawn is not None and target_map is not None:
                    result.scores[kind][at] = drawn @ target_map
                    negatives[kind] += [float(drawn @ other) for other in recent]
            if target_map is not None:
                recent.append(target_map)
        except BadSample as bad:
            result.faults.append((at, "broken", f"{bad.part}: {bad.reason}", None))
    result.negatives = {kind: np.array(values, np.float32) for kind, values in negatives.items()}
    columns = np.array(captions, np.uint64).reshape(-1, 4).T
    result.caption_owners, result.caption_hashes = columns[0].astype(np.int64), columns[1]
    result.caption_characters, result.caption_words = columns[2].astype(np.int64), columns[3].astype(np.int64)
    return result


def _look_at_condition(
    sample: SampleBytes, kind: str, target_size: Sequence[int]
) -> tuple[tuple[str, str] | None, np.ndarray | None]:
    """Returns a fault of the condition, or its edge map where pictures are decoded and there is no fault.

    target_size: width and height.
    """
    assert sample.condition is not None
    pixels = _pixels(sample.condition, sample.key, sample.condition_extension, 0)
    width, height = image_size(sample.condition) if pixels is None else pixels.shape[1::-1]
    if not same_frame((target_size[1], target_size[0]), (height, width)):
        sizes = f"{target_size[0]}x{target_size[1]} and {width}x{height}"
        return ("frame", f"target and condition {kind} have different aspect ratios ({sizes})"), None
    if pixels is None:
        return None, None
    if is_blank(pixels):
        return ("blank condition", f"condition {kind} shows nothing"), None
    return None, edge_map(pixels)


def _pixels(data: bytes, key: str, extension: str, background: int = 255) -> np.ndarray | None:
    """Decodes a picture; returns None where pictures are not decoded. Raises BadSample, also by the header alone for a
    picture that is too large."""
    if _work.decode:
        return decode_image(data, key, extension, background, _work.max_pixels)
    width, height = image_size(data)
    if width * height > _work.max_pixels:
        raise BadSample(key, extension, too_large(width, height, _work.max_pixels))
    return None


def _ordinals(index: ShardIndex, kind: str) -> dict[int, int]:
    """Returns row -> its number among the samples that have the condition."""
    return {row: ordinal for ordinal, row in enumerate(index.usable(kind).tolist())}


def text_hash(text: str) -> int:
    """Hashes a caption to 64 bits of blake2b, by which equal captions are recognised."""
    return content_hash(text.encode("utf-8", "surrogatepass"))


def _empty(n: int, kinds: Sequence[str]) -> Scan:
    none = np.empty(0, np.int64)
    return Scan(
        digests=np.zeros(n, np.uint64),
        sizes=np.zeros((n, 2), np.int64),
        hashes=np.zeros((n, 4), np.uint64),
        caption_hashes=none.astype(np.uint64),
        caption_owners=none,
        caption_characters=none,
        caption_words=none,
        scores={kind: np.full(n, np.nan, np.float32) for kind in kinds},
        negatives={kind: np.empty(0, np.float32) for kind in kinds},
    )


def _join(scans: Sequence[Scan], kinds: Sequence[str]) -> Scan:
    starts = np.cumsum([0, *(len(one.digests) for one in scans)]).tolist()

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in scans])

    return Scan(
        **{name: joined(name) for name in ("digests", "sizes", "hashes")},
        **{name: joined(name) for name in ("caption_hashes", "caption_characters", "caption_words")},
        caption_owners=np.concatenate([one.caption_owners + start for one, start in zip(scans, starts, strict=False)]),
        scores={kind: np.concatenate([one.scores[kind] for one in scans]) for kind in kinds},
        negatives={kind: np.concatenate([one.negatives[kind] for one in scans]) for kind in kinds},
        faults=[
            (at + start, finding, detail, kind)
            for one, start in zip(scans, starts, strict=False)
            for at, finding, detail, kind in one.faults
        ],
    )


def sample_names(dataset: Dataset) -> Callable[[int], str]:
    """Makes a function: number of a sample in a scan -> SHARD:KEY, by which it can be asked for.

    Keys alone may repeat from shard to shard. A place in the shard stands for a key that cannot be read.
    """
    starts, shards = places(dataset), shard_names(dataset)

    def name(number: int) -> str:
        try:
            key = read_sample(dataset, number).key
        except BadSample as bad:
            key = bad.key
        return f"{shards[int(np.searchsorted(starts, number, side='right')) - 1]}:{key}"

    return name


def read_sample(dataset: Dataset, number: int, kind: str | None = None) -> SampleBytes:
    """Reads one sample by its number in a scan, with its condition of a kind where it has one. Raises BadSample."""
    starts = places(dataset)
    shard = int(np.searchsorted(starts, number, side="right")) - 1
    ordinal = number - int(starts[shard])
    if kind is not None:
        index = load_index(index_path(dataset.paths[shard]))
        own = _ordinals(index, kind).get(int(index.usable()[ordinal]))
        kind, ordinal = (None, ordinal) if own is None else (kind, own)
    reader = ShardReader(dataset, kind, most_open=1)
    try:
        return reader.read(shard, ordinal)
    finally:
        reader.close()
