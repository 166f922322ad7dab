"""Which samples stand for a data set: a fixed choice by what is in them, over all its folders and captions in turns.

The samples stand in one order, which their contents decide, and a choice is the beginning of it: so the 8 samples of a
validation are among the 64 of an evaluation, and a data set that is moved, renamed or indexed again has the same ones.
The index beside each shard has all that the order needs but folders and captions, which are read of BLOCK samples at a
time and of no more blocks than are asked for.
"""

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from controlbooth.data.errors import UserError
from controlbooth.data.order.draws import hash64, random_bits
from controlbooth.data.pictures.images import BadSample
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.manifest import Dataset
from controlbooth.data.shards.reader import ShardReader
from controlbooth.data.shards.sidecar import index_path, load_index

BLOCK = 512
"""Samples that take turns by folder and caption. Where 20 folders are of one size, 512 random samples have all of them
but once in ten billion data sets; all of 100 folders in more than half of the data sets."""
READERS = 16
"""Threads that read folders and captions: of shards in a store each waits for an answer."""

Item = TypeVar("Item")


def choose(dataset: Dataset, count: int, kind: str | None) -> list[tuple[int, int]]:
    """Chooses `count` samples: (shard, ordinal among its usable samples of the kind), in the order of the choice.

    Raises ValueError where there are fewer, and OSError where shards cannot be read.
    """
    total = int(dataset.samples_per_shard(kind).sum())
    if count > total:
        raise UserError(f"{dataset.location} has {total} usable samples, {count} are asked for; ask for fewer")
    order, chosen = _by_content(dataset, kind), list[tuple[int, int]]()
    reader = ShardReader(dataset, kind, most_open=READERS, pictures=False)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, count, BLOCK):
                block = [(shard, ordinal) for shard, ordinal in order[start : start + BLOCK].tolist()]
                names = list(pool.map(lambda place: _folder_and_caption(reader, *place), block))
                by_caption = in_turns(zip(block, names, strict=True), lambda item: item[1])
                chosen += [place for place, _ in in_turns(by_caption, lambda item: item[1][0])]
    finally:
        reader.close()
    return chosen[:count]


def in_turns(items: Iterable[Item], group: Callable[[Item], Hashable]) -> list[Item]:
    """Sorts items into turns: one of each group, then a second one of each that has two, and so on.

    Within a turn they keep the order given.
    """
    seen: dict[Hashable, int] = {}
    rounds: list[list[Item]] = []
    for item in items:
        turn = seen.get(group(item), 0)
        seen[group(item)] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(item)
    return [item for turn in rounds for item in turn]


def _by_content(dataset: Dataset, kind: str | None) -> np.ndarray:
    """Sorts all usable samples by hashes of what they hold: (n, 2) int64, shard and ordinal.

    Size and CRC of the target decide; where targets are equal, those of the caption, and then the key.
    """
    shards = []
    for number, path in enumerate(dataset.paths):
        index = load_index(index_path(path))
        rows = index.usable(kind)
        columns = [np.full(len(rows), number), np.arange(len(rows))]
        columns += [
            index.samples["key_hash"][rows],
            *(index.part_contents(role, rows) for role in ("caption", "image")),
        ]
        shards.append([column.astype(np.uint64) for column in columns])
    at_shard, ordinal, *content = (np.concatenate(column) for column in zip(*shards, strict=True))
    key = hash64("which samples stand for a data set")
    order = np.lexsort([random_bits(key, column) for column in content])  # the last column decides first
    return np.stack([at_shard, ordinal], axis=1)[order].astype(np.int64)


def _folder_and_caption(reader: ShardReader, shard: int, ordinal: int) -> tuple[str, str]:
    """Returns folder and first caption of a sample, both "" where it is bad."""
    try:
        sample = reader.read(shard, ordinal)
        caption = read_captions(sample.caption, sample.caption_extension, sample.key)[0]
    except BadSample:
        return "", ""
    return sample.key.rpartition("/")[0], caption
