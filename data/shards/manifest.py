"""A data set is an ordered list of indexed shards: `manifest.jsonl`, or whatever a path, glob or range names.

The manifest has one JSON row a shard, its uri relative to the manifest, or http(s)://, s3:// or gs://; then the sidecar
lies in a folder on a disk, which the row names too. The fingerprint is a hash over the ordered
index digests, so it changes with any sample and with the order of the shards, and not with where they are kept.
"""

import errno
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from controlbooth.data.arguments import expand_braces, quoted
from controlbooth.data.condition_names import COMPUTED, stored_kind
from controlbooth.data.errors import MissingFile, UserError
from controlbooth.data.files.whole import write_whole
from controlbooth.data.secrets import shown
from controlbooth.data.shards import storage
from controlbooth.data.shards.index import STRUCTURAL, ensure_indexes
from controlbooth.data.shards.sidecar import ShardIndex, index_path, load_index, read_digest
from controlbooth.data.shards.storage import RemoteShard, Shard

NAME = "manifest.jsonl"


@dataclass(frozen=True)
class ShardRow:
    """What the manifest says of a shard."""

    uri: str
    """A URI; or its path, relative to the manifest where it is in a row of one, and absolute in a Dataset."""
    bytes: int
    samples: int
    usable: int
    """Samples with a target image and a caption and without a known fault."""
    conditions: dict[str, int]
    """Usable samples that have a condition of each kind."""
    index_hash: str
    extensions: list[str]
    etag: str = ""
    """Of a shard in a store: its version when it was indexed."""
    index: str = ""
    """Of a shard in a store: the path of its sidecar, relative or absolute like that of a shard on a disk."""
    aspects: dict[str, dict[str, int]] = field(default_factory=dict)
    """Usable samples by aspect-ratio bin (data/order/buckets.py): by kind of condition, and for "", without one."""


@dataclass(frozen=True)
class Dataset:
    """Shards in their order. Nothing of them is read until a sample is."""

    location: str
    rows: tuple[ShardRow, ...]
    fingerprint: str
    paths: tuple[Shard, ...] = field(repr=False)
    """Where each shard lies: the path of one on a disk, a RemoteShard otherwise."""
    sources: tuple["Dataset", ...] = field(default=(), repr=False)
    """The data sets that this one joins, whose shards follow each other here; empty where it is a single one."""

    def samples_per_shard(self, condition_kind: str | None = None) -> np.ndarray:
        """Counts the usable samples of each shard, (shards,) int64, with a condition of that kind if one is asked for.

        Raises ValueError where no sample has such a condition.
        """
        condition_kind = stored_kind(condition_kind)
        if condition_kind is None:
            return np.array([row.usable for row in self.rows], np.int64)
        counts = np.array([row.conditions.get(condition_kind, 0) for row in self.rows], np.int64)
        if not counts.any():
            there = ", ".join(sorted({kind for row in self.rows for kind in row.conditions})) or "none"
            raise UserError(
                f"no sample of {self.location} has a condition {condition_kind!r}; conditions there are: {there}. "
                f"Change the condition's name, add it with `controlbooth data annotate --condition {condition_kind}`, "
                f"or train on {COMPUTED}{condition_kind} if it can be made of the picture at loading time."
            )
        return counts


def join_datasets(datasets: Sequence[Dataset]) -> Dataset:
    """Joins data sets into one with the shards of all, in their order; returns a single one as it is."""
    if len(datasets) == 1:
        return datasets[0]
    digest = hashlib.blake2b(digest_size=16)
    for dataset in datasets:  # where one ends and the next begins matters to the order
        digest.update(bytes.fromhex(dataset.fingerprint))
    return Dataset(
        ", ".join(dataset.location for dataset in datasets),
        tuple(row for dataset in datasets for row in dataset.rows),
        digest.hexdigest(),
        tuple(path for dataset in datasets for path in dataset.paths),
        tuple(datasets),
    )


def fingerprint(rows: Sequence[ShardRow]) -> str:
    """Hashes the index hashes in order: blake2b-128, in hex."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(bytes.fromhex(row.index_hash))
    return digest.hexdigest()


def shard_of(row: ShardRow) -> Shard:
    """Returns where the shard of a row with absolute paths lies."""
    if storage.is_remote(row.uri):
        return RemoteShard(row.uri, row.bytes, row.etag, Path(row.index))
    return Path(row.uri)


def same_place(shard: Shard) -> str:
    """Returns a text that is equal for two names of one shard."""
    return str(shard.resolve()) if isinstance(shard, Path) else shard.uri


def shard_names(dataset: Dataset) -> list[str]:
    """Gives each shard a name for people: its file's name or, where others have that too, where it lies."""
    names = [storage.base_name(str(shard)) for shard in dataset.paths]
    common = {name for name, count in Counter(names).items() if count > 1}
    return [str(path) if name in common else name for name, path in zip(names, dataset.paths, strict=True)]


def describe_shard(shard: Shard) -> ShardRow:
    """Makes a manifest row of a shard from its sidecar; its uri is the path or the URI as given."""
    index = load_index(index_path(shard))
    remote = isinstance(shard, RemoteShard)
    return ShardRow(
        uri=shard.uri if isinstance(shard, RemoteShard) else str(shard),
        bytes=index.shard_bytes,
        samples=len(index.samples),
        usable=len(index.usable()),
        conditions={kind: len(index.usable(kind)) for kind in index.condition_kinds},
        index_hash=index.digest,
        extensions=list(index.extensions),
        etag=shard.etag if remote else "",
        index=str(shard.index) if remote else "",
        aspects={kind: _aspects(index, kind or None) for kind in ("", *index.condition_kinds)},
    )


def _aspects(index: ShardIndex, kind: str | None) -> dict[str, int]:
    bins, counts = np.unique(index.aspect_bins(kind), return_counts=True)
    return dict(zip(map(str, bins.tolist()), counts.tolist(), strict=True))


def write_manifest(rows: Sequence[ShardRow], path: Path) -> None:
    """Writes rows with paths relative to the manifest's folder, whole or not at all.

    With presigned URIs among them it is readable by its owner alone.
    """
    folder = path.absolute().parent

    def relative(name: str) -> str:
        return Path(os.path.relpath(os.path.abspath(name), folder)).as_posix()

    lines = []
    for row in rows:
        tree = asdict(row)
        if storage.is_remote(row.uri):
            tree["index"] = relative(row.index)
        else:
            tree["uri"] = relative(row.uri)
            del tree["etag"], tree["index"]
        lines.append(json.dumps(tree) + "\n")
    write_whole(path, "".join(lines).encode(), private=any(shown(row.uri) != row.uri for row in rows))


def _row_of(line: bytes) -> ShardRow:
    """Parses a line of a manifest.

    Raises ValueError or TypeError where it is no row, or has fields of other types than are written.
    """
    row = ShardRow(**json.loads(line))
    texts = (row.uri, row.index_hash, row.etag, row.index)
    counts = [row.bytes, row.samples, row.usable, *_values(row.conditions)]
    counts += [count for bins in _values(row.aspects) for count in _values(bins)]
    if not all(isinstance(text, str) and "\0" not in text for text in texts) or not row.uri:
        raise UserError("uri, index_hash, etag and index are texts")
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise UserError("bytes, samples, usable, conditions and aspects count, from 0 on")
    if not isinstance(row.extensions, list) or not all(isinstance(name, str) for name in row.extensions):
        raise UserError("extensions is a list of texts")
    if not all(re.fullmatch(r"-?[0-9]{1,9}", bin) for bins in row.aspects.values() for bin in bins):
        raise UserError("aspects counts by number")
    bytes.fromhex(row.index_hash)
    return row


def _values(tree: Any) -> list[Any]:
    if not isinstance(tree, dict):
        raise UserError("conditions and aspects are objects")
    return list(tree.values())


def read_manifest(path: Path) -> list[ShardRow]:
    """Reads the rows of a manifest, and makes their paths absolute. Raises ValueError with the line that is wrong."""
    rows = []
    names = {item.name for item in fields(ShardRow)}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = _row_of(line)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is not a shard row with {', '.join(sorted(names))} ({error}): "
                f"write the manifest again with `controlbooth data index {quoted(path.parent)}`"
            ) from error
        inside = "index" if storage.is_remote(row.uri) else "uri"
        if not getattr(row, inside):
            name = shown(row.uri)
            raise UserError(f"{path}, line {number}: {name} has no index: `controlbooth data index {quoted(name)}`")
        rows.append(replace(row, **{inside: os.path.normpath(path.absolute().parent / getattr(row, inside))}))
    if not rows:
        raise UserError(f"{path} lists no shards: write it again with `controlbooth data index {quoted(path.parent)}`")
    return rows


def find_shards(location: str | Path) -> list[Path]:
    """Finds the tars that a folder, a file, a glob or a {000..009} range names, sorted, or in the order of the range.

    Raises FileNotFoundError where there are none or some are missing, and ValueError for a URI.
    """
    text = str(location)
    if storage.is_remote(text):
        raise UserError(
            f"{shown(text)} is remote, so its indexes need a place on a disk: run "
            f"`controlbooth data index {quoted(shown(text))} --manifest set.jsonl` once, and name set.jsonl instead"
        )
    if Path(text).is_dir():
        found = sorted(Path(text).glob("*.tar"))
    elif Path(text).exists():
        found = [Path(text)]
    else:
        found = [Path(name) for pattern in expand_braces(text) for name in _matches(pattern)]
    missing = [path for path in found if not path.exists()]
    if missing:
        raise MissingFile(f"{len(missing)} of the {len(found)} shards of {text} do not exist: {_some(missing)}")
    if not found:
        raise MissingFile(f"no .tar shards at {text}; correct the path, or run `controlbooth data pack`")
    return found


def open_dataset(location: str | Path, index_missing: bool = False) -> Dataset:
    """Opens a manifest, a folder of shards, a single shard, a glob or a {000..009} range, and checks it.

    index_missing builds the sidecars that are missing or do not fit, as for shards of others: on one rank only, the
    others open the data set after it. Raises FileNotFoundError and ValueError with the command that helps.
    """
    path = Path(location)
    manifest = path / NAME if path.is_dir() else path
    if manifest.suffix == ".jsonl" and (manifest.exists() or not path.is_dir()):
        rows = read_manifest(manifest)
        if path.is_dir():
            _check_complete(rows, path)
    else:
        shards = find_shards(location)
        if index_missing:
            problems = ensure_indexes(shards)
            if damaged := [problem for problem in problems if problem.kind in STRUCTURAL]:
                raise UserError(f"{len(damaged)} damaged shards; fetch or pack them again: {_some(damaged)}")
        _check_indexed(shards, location)
        rows = [replace(describe_shard(shard), uri=str(shard.absolute())) for shard in shards]
    check_unchanged(rows, location)
    return dataset_of(location, rows)


def dataset_of(location: str | Path, rows: Sequence[ShardRow]) -> Dataset:
    """Makes a data set of rows with absolute paths that were checked before. Touches no file."""
    return Dataset(str(location), tuple(rows), fingerprint(rows), tuple(shard_of(row) for row in rows))


def locate_remote(location: str, indexes: Path) -> list[RemoteShard]:
    """Finds the shards that a URI, a {000..009} range, or in s3:// and gs:// a folder or a glob names, as they are now.

    indexes: the folder for their sidecars, whose names hold a hash of the URI and the version. Raises
    FileNotFoundError, StorageError and ValueError.
    """
    uris = [uri for pattern in expand_braces(location) for uri in storage.find(pattern)]
    with ThreadPoolExecutor(16) as pool:
        stats = list(pool.map(_stat_or_none, uris))
    if missing := [uri for uri, stat in zip(uris, stats, strict=True) if stat is None]:
        raise MissingFile(
            errno.ENOENT, f"{len(missing)} of the {len(uris)} shards of {location} do not exist", _some(missing)
        )
    return [
        RemoteShard(uri, stat.size, stat.etag, indexes / f"{storage.version_name(uri, stat.size, stat.etag)}.idx")
        for uri, stat in zip(uris, stats, strict=True)
        if stat is not None
    ]


def _stat_or_none(uri: str) -> storage.ObjectStat | None:
    try:
        return storage.stat(uri)
    except FileNotFoundError:
        return None


def _matches(pattern: str) -> list[str]:
    """Returns the matches of a glob, sorted.

    A name without wildcards is kept, there or not, so that a missing one is an error.
    """
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]


def _check_complete(rows: Sequence[ShardRow], folder: Path) -> None:
    listed = {Path(row.uri).name for row in rows}
    if extra := [path for path in sorted(folder.glob("*.tar")) if path.name not in listed]:
        raise UserError(
            f"{folder / NAME} lists {len(rows)} shards, and the folder holds {len(extra)} more ({_some(extra)}): run "
            f"`controlbooth data index {quoted(folder)}` to take them in, or name the manifest itself to leave them out"
        )


def _check_indexed(shards: Sequence[Path], location: str | Path) -> None:
    if missing := [shard for shard in shards if not index_path(shard).exists()]:
        raise MissingFile(
            f"{len(missing)} of {len(shards)} shards have no index ({_some(missing)}): "
            f"run `controlbooth data index {quoted(location)}`"
        )


def check_unchanged(rows: Sequence[ShardRow], location: str | Path) -> None:
    """Compares every shard's size and every sidecar's digest with its row. Raises ValueError where one differs.

    A shard in a store is compared when it is fetched: asking for the size of each would take a run minutes to start.
    """
    with ThreadPoolExecutor(16) as pool:  # a network disk answers one question in milliseconds, and many at once
        faults = [fault for fault in pool.map(_fault, rows) if fault]
    if faults:
        remote = storage.is_remote(rows[0].uri)
        folder = location if remote or Path(location).is_dir() else Path(rows[0].uri).parent
        raise UserError(
            f"{len(faults)} of {len(rows)} shards are not as they were indexed: {_some(faults)}. Put the shards back, "
            f"or take them as they are now, a new data set: `controlbooth data index --rebuild {quoted(folder)}`"
        )


def _fault(row: ShardRow) -> str | None:
    shard = shard_of(row)
    try:
        size = shard.stat().st_size if isinstance(shard, Path) else row.bytes
        digest = read_digest(index_path(shard))
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except ValueError:
        return f"{index_path(shard)} is not a whole index"
    if size != row.bytes:
        return f"{shard} has {size} bytes, its index says {row.bytes}"
    return None if digest == row.index_hash else f"{index_path(shard)} was written anew after the manifest"


def _some(items: Sequence, most: int = 3) -> str:
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")
