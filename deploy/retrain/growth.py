"""A data set that grows: what has changed since a run, what a new run is to see, and what it may not see.

Free of torch, like the configuration: a tick that finds nothing to do takes a second.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlbooth.data.order.draws import splitmix64
from controlbooth.data.pictures.images import BadSample, decode_image
from controlbooth.data.pictures.likeness import is_blank, perceptual_hash
from controlbooth.data.shards.manifest import (
    Dataset,
    ShardRow,
    open_dataset,
    read_manifest,
    same_place,
    shard_of,
    write_manifest,
)
from controlbooth.data.shards.reader import SampleBytes, ShardReader
from controlbooth.data.shards.sidecar import ShardIndex, index_path, load_index
from controlbooth.trainer.config.section import ConfigError

MOST_LOOKED_AT = 256
"""Pairs of pictures that are compared by how they look."""
ALIKE_BITS = 48
"""Of 256 bits of their perceptual hashes, in at most which two pictures of one key and caption differ that are the same
one encoded anew. 260 photographs and their copies of 64 px differ in 18 at most, different photographs or scenes in 90
in all but one of a thousand pairs."""


@dataclass(frozen=True)
class Changes:
    """Between two states of a data set, in usable samples of one kind of condition. Shards are known by what is in
    them, so that a data set which was moved has not changed."""

    now: int
    before: int
    new: int
    """In shards of names that were not there before."""
    gone: tuple[str, ...] = ()
    """Names of shards that are not there any more."""
    gone_samples: int = 0
    changed: tuple[str, ...] = ()
    """Names of shards that have other contents than before. Their samples are not counted as new."""


def current(location: str) -> Dataset:
    """Opens the data set as it is now. Raises FileNotFoundError and ValueError with the command that helps."""
    return open_dataset(location)


def frozen(manifest: Path) -> list[ShardRow]:
    """Reads the shards of an earlier state from its manifest; they need not exist any more. Returns none where there is
    no manifest."""
    return read_manifest(manifest) if manifest.is_file() else []


def changes(before: Sequence[ShardRow], now: Dataset, condition: str) -> Changes:
    """Compares a data set with an earlier state of it. before: the shards of that state; empty where there was none."""
    old, new = _by_place(before, condition), _by_place(now.rows, condition)
    known, here = ({row.index_hash for row, _ in state.values()} for state in (old, new))
    others = {place: count for place, (row, count) in new.items() if row.index_hash not in known}
    missing = {place: count for place, (row, count) in old.items() if row.index_hash not in here}
    replaced = others.keys() & missing.keys()
    gone = sorted(missing.keys() - replaced)
    return Changes(
        now=sum(count for _, count in new.values()),
        before=sum(count for _, count in old.values()),
        new=sum(count for place, count in others.items() if place not in replaced),
        gone=tuple(gone),
        gone_samples=sum(missing[place] for place in gone),
        changed=tuple(sorted(replaced)),
    )


def _by_place(rows: Sequence[ShardRow], condition: str) -> dict[str, tuple[ShardRow, int]]:
    """Maps where each shard lies to its row and how many samples with this condition it has."""
    if not rows:
        return {}
    counts = Dataset("the data set", tuple(rows), "", ()).samples_per_shard(condition).tolist()
    return {same_place(shard_of(row)): (row, count) for row, count in zip(rows, counts, strict=True)}


def describe(found: Changes) -> str:
    """Describes changes for people. It names what was taken away or written anew, since nobody may have meant that."""
    parts = [f"{found.now} samples, {found.new} of them new"]
    if found.gone:
        parts.append(f"SHRANK: {len(found.gone)} shards with {found.gone_samples} samples are gone ({found.gone[0]})")
    if found.changed:
        parts.append(f"CHANGED: {len(found.changed)} old shards have other contents ({found.changed[0]})")
    return "; ".join(parts)


def freeze(dataset: Dataset, manifest: Path) -> None:
    """Writes what a run is to see, so that shards which come while it trains are the next run's."""
    manifest.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(dataset.rows, manifest)


def check_apart(training: Dataset, held_out: Dataset) -> None:
    """Raises ConfigError where a sample of the held-out shards is in the training data: by shard or by picture.

    Pictures are the same where size and CRC-32 of their files are, under whatever names. Names alone say nothing: two
    tables that are packed both begin with 00000000. But where a name comes with the same caption too, the two pictures
    are looked at, up to MOST_LOOKED_AT pairs, and near copies are the same sample encoded anew. One that was encoded
    anew under another name or caption is not found.
    """
    names = {same_place(path) for path in held_out.paths}
    if shared := sorted(names & {same_place(path) for path in training.paths}):
        raise ConfigError(_overlap(training, held_out, f"{len(shared)} shards are in both, such as {shared[0]}"))
    held = [_identities(load_index(index_path(path))) for path in held_out.paths]
    where = np.concatenate([np.full(len(one.pictures), number) for number, one in enumerate(held)])
    ordinals = np.concatenate([np.arange(len(one.pictures)) for one in held])
    pictures = np.concatenate([one.pictures for one in held])
    titles = np.concatenate([one.titles for one in held])
    pairs: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for shard, path in enumerate(training.paths):
        trained = _identities(load_index(index_path(path)))
        rows = np.flatnonzero(np.isin(pictures, trained.pictures))
        if len(rows):
            there = held_out.paths[where[rows[0]]]
            raise ConfigError(
                _overlap(training, held_out, f"{len(rows)} samples of {there} have the same picture as ones of {path}")
            )
        for row in np.flatnonzero(np.isin(titles, trained.titles))[: MOST_LOOKED_AT - len(pairs)].tolist():
            other = int(np.flatnonzero(trained.titles == titles[row])[0])
            pairs.append(((int(where[row]), int(ordinals[row])), (shard, other)))
    if same := _near_copies(training, held_out, pairs):
        one, other = same[0]
        text = (
            f"{len(same)} of its samples have the key and the caption of training samples and show the same, encoded "
            f"anew: sample {one[1]} of {held_out.paths[one[0]]} is sample {other[1]} of {training.paths[other[0]]}"
        )
        raise ConfigError(_overlap(training, held_out, text))


def _near_copies(
    training: Dataset, held_out: Dataset, pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]]
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns those of the pairs of (held-out, training) samples that show nearly the same; each sample is (shard,
    ordinal)."""
    with (
        contextlib.closing(ShardReader(held_out, None, most_open=4)) as one,
        contextlib.closing(ShardReader(training, None, most_open=4)) as other,
    ):
        return [pair for pair in pairs if _same_picture(one.read(*pair[0]), other.read(*pair[1]))]


def _same_picture(one: SampleBytes, other: SampleBytes) -> bool:
    """Tells whether both samples show the same picture, maybe at another size or compression. A blank picture, or one
    that cannot be decoded, is a copy of none."""
    hashes = []
    for sample in (one, other):
        try:
            picture = decode_image(sample.image, sample.key, sample.image_extension)
        except BadSample:
            return False  # it is not trained on, or not measured
        if is_blank(picture):
            return False
        hashes.append(perceptual_hash(picture))
    return int(np.bitwise_count(hashes[0] ^ hashes[1]).sum()) <= ALIKE_BITS


def _overlap(training: Dataset, held_out: Dataset, what: str) -> str:
    return (
        f"the evaluation set {held_out.location} overlaps the training data {training.location}: {what}. A model would "
        "be measured on what it has seen. Take these samples out of one of them"
    )


@dataclass(frozen=True)
class _Identities:
    """Of the n usable samples of a shard."""

    pictures: np.ndarray
    """(n,) uint64, size and CRC of each target image."""
    titles: np.ndarray
    """(n,) uint64, a hash of each key and caption."""


def _identities(index: ShardIndex) -> _Identities:
    rows = index.usable()
    keys = splitmix64(index.samples["key_hash"][rows])
    return _Identities(index.part_contents("image", rows), splitmix64(keys ^ index.part_contents("caption", rows)))
