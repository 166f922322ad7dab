"""A data set that grows: what has changed since a run, what a new run is to see, and what it may not see.

Free of torch, like the configuration: a tick that finds nothing to do takes a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlbooth.data.manifest import (
    Dataset,
    ShardRow,
    open_dataset,
    read_manifest,
    same_place,
    shard_of,
    write_manifest,
)
from controlbooth.data.sidecar import ShardIndex, index_path, load_index
from controlbooth.trainer.config import ConfigError


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
    """The data set as it is now. Raises FileNotFoundError and ValueError with the command that helps."""
    return open_dataset(location)


def frozen(manifest: Path) -> list[ShardRow]:
    """The shards of an earlier state, which need not be there any more; none where there was no such state."""
    return read_manifest(manifest) if manifest.is_file() else []


def changes(before: Sequence[ShardRow], now: Dataset, condition: str) -> Changes:
    """before: an earlier state; empty where there was none."""
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
    """Where a shard lies -> its row, and how many samples of the kind it has."""
    if not rows:
        return {}
    counts = Dataset("the data set", tuple(rows), "", ()).samples_per_shard(condition).tolist()
    return {same_place(shard_of(row)): (row, count) for row, count in zip(rows, counts, strict=True)}


def describe(found: Changes) -> str:
    """For people; what was taken away or written anew is said, since nobody may have meant it."""
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
    """Raises ConfigError where a sample of the held-out shards is in the training data: by shard, key or picture.

    Pictures are compared by size and CRC-32 of their files, so a copy under another key is found, and one that was
    encoded anew under another key is not.
    """
    names = {same_place(path) for path in held_out.paths}
    if shared := sorted(names & {same_place(path) for path in training.paths}):
        raise ConfigError(_overlap(training, held_out, f"{len(shared)} shards are in both, such as {shared[0]}"))
    places, keys, pictures = [], [], []
    for number, path in enumerate(held_out.paths):
        own_keys, own_pictures = _identities(load_index(index_path(path)))
        places.append(np.full(len(own_keys), number))
        keys.append(own_keys)
        pictures.append(own_pictures)
    where, held_keys, held_pictures = map(np.concatenate, (places, keys, pictures))
    for path in training.paths:
        trained_keys, trained_pictures = _identities(load_index(index_path(path)))
        for what, held, trained in (
            ("the same picture", held_pictures, trained_pictures),
            ("the same key", held_keys, trained_keys),
        ):
            rows = np.flatnonzero(np.isin(held, trained))
            if len(rows):
                there = held_out.paths[where[rows[0]]]
                text = f"{len(rows)} samples of {there} have {what} as samples of {path}"
                if what == "the same key":
                    text += " (other pictures under the same number need other names before they are packed)"
                raise ConfigError(_overlap(training, held_out, text))


def _overlap(training: Dataset, held_out: Dataset, what: str) -> str:
    return (
        f"the evaluation set {held_out.location} overlaps the training data {training.location}: {what}. A model would "
        "be measured on what it has seen. Take these samples out of one of them"
    )


def _identities(index: ShardIndex) -> tuple[np.ndarray, np.ndarray]:
    """((n,) uint64 hashes of keys, (n,) uint64 size and CRC of target images) of the usable samples."""
    rows = index.usable()
    pictures = np.zeros(len(rows), np.uint64)
    for column in reversed(index.columns("image")):  # the first one that is there is the target
        part = index.parts[rows, column]
        value = (part["size"].astype(np.uint64) << np.uint64(32)) | part["crc"].astype(np.uint64)
        pictures = np.where(part["offset"] > 0, value, pictures)
    return index.samples["key_hash"][rows], pictures
