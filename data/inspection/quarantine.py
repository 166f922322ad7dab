"""Taking bad samples out of the next run: the ledgers of a run become flags in the indexes of its shards.

A run that meets a bad sample replaces it and notes it in `bad-samples-<rank>.jsonl`. Quarantine flags what was noted,
so that the next run has it not in its order at all. A sample is told by where it begins in its shard and by its
contents, so neither equal keys nor shards that were moved since confuse it. The flags are part of the index digests:
the data set's fingerprint changes, and what has begun on the old one cannot go on until they are taken back.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from controlbooth.data.arguments import quoted
from controlbooth.data.errors import UserError
from controlbooth.data.files.locks import is_locked
from controlbooth.data.files.records import read_yaml
from controlbooth.data.inspection.ledger import LEDGER, read_ledgers
from controlbooth.data.order.draws import hash64
from controlbooth.data.shards.manifest import (
    NAME,
    describe_shard,
    find_shards,
    fingerprint,
    read_manifest,
    shard_of,
    write_manifest,
)
from controlbooth.data.shards.sidecar import QUARANTINED, ShardIndex, index_path, load_index, make_index, write_index
from controlbooth.data.shards.storage import Shard, base_name

_NAMED_BY_PLACE = "header"
"""The part of ledger entries whose sample could not be read as far as its key."""


def read_run(folder: Path) -> dict[str, Any]:
    """Reads the resolved configuration of a run folder, as a tree. Raises ValueError where there is no whole one."""
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder} holds no config.yaml, so it is no run; give the folder of a run, as runs/photos")
    tree = read_yaml(path, f"Start the run in {folder} again, which writes it anew")
    if not (isinstance(tree, dict) and isinstance(tree.get("data"), dict)):
        raise UserError(f"{path} is damaged: it configures no run. Start the run again, which writes it anew")
    return tree


def source_trees(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns shards, weight and repeat of each source of a run's resolved configuration."""
    return tree["data"]["sources"] or [{"shards": tree["data"]["shards"], "weight": None, "repeat": 1}]


@dataclass(frozen=True)
class Change:
    """What quarantine does to one shard: rows whose flag changes, and entries that match no sample of it."""

    path: Shard
    index: ShardIndex
    rows: np.ndarray
    unmatched: list[dict]


def plan_changes(entries: Sequence[dict], paths: Sequence[Shard], undo: bool = False) -> list[Change]:
    """Finds the shards that the entries name, with the rows to flag (undo: to clear). Reads indexes, changes nothing.

    A shard that is not where it was is looked for by its file's name and the contents of the noted samples. Raises
    ValueError for an entry whose shard is not found that way either.
    """
    by_shard: dict[str, dict[int, dict]] = {}
    for entry in entries:
        by_shard.setdefault(entry["shard"], {})[entry["byte"]] = entry
    known = {str(path): path for path in paths}
    moved: dict[str, list[Shard]] = {}
    for path in paths:
        moved.setdefault(base_name(str(path)), []).append(path)
    noted: dict[str, dict[int, dict]] = {}
    foreign = []
    for name, own in sorted(by_shard.items()):
        there = [name] if name in known else [str(path) for path in _moved(moved.get(base_name(name), []), own)]
        foreign += [] if there else [name]
        for place in there:
            noted.setdefault(place, {}).update(own)
    if foreign:
        raise UserError(
            f"{len(foreign)} shards of the ledger are not in this data set, as {foreign[0]}: "
            f"name the data set that the run was trained on with --shards"
        )
    names = tqdm(sorted(noted), unit="shard", desc="quarantine", disable=len(noted) < 50)
    return [_change(known[name], noted[name], undo) for name in names]


def _moved(paths: Sequence[Shard], noted: Mapping[int, dict]) -> list[Shard]:
    """Returns those of the shards that hold a noted sample, as where a shard was moved or copied."""
    entries = {byte: entry for byte, entry in noted.items() if entry["contents"] is not None}
    indexes = [(path, load_index(index_path(path))) for path in paths if entries]
    return [path for path, index in indexes if any(_row(index, *item) is not None for item in entries.items())]


def _change(path: Shard, noted: Mapping[int, dict], undo: bool) -> Change:
    index = load_index(index_path(path))
    rows, unmatched = [], []
    for byte, entry in sorted(noted.items()):
        row = _row(index, byte, entry)
        if row is None:
            unmatched.append(entry)
        elif bool(index.samples["flags"][row] & QUARANTINED) == undo:
            rows.append(row)
    return Change(path, index, np.array(rows, np.int64), unmatched)


def apply_changes(changes: Sequence[Change]) -> None:
    """Flips the quarantine flag of the planned rows; each sidecar is replaced whole."""
    for change in tqdm(changes, unit="shard", desc="write", disable=len(changes) < 50):
        if len(change.rows):
            samples = change.index.samples.copy()
            samples["flags"][change.rows] ^= QUARANTINED
            index = make_index(change.index.shard_bytes, change.index.extensions, samples, change.index.parts)
            write_index(index, index_path(change.path))


def _row(index: ShardIndex, byte: int, entry: dict) -> int | None:
    """Returns the row of the sample that begins at this byte, if it is still the one that was noted; otherwise None.

    Ledgers of earlier versions hold its key alone, which does not show that a sample was rewritten since under the same
    key.
    """
    row = int(np.searchsorted(index.samples["offset"], byte))
    if row == len(index.samples) or int(index.samples["offset"][row]) != byte:
        return None
    if entry["contents"] is not None:
        return row if index.contents(row) == entry["contents"] else None
    same = entry["part"] == _NAMED_BY_PLACE or int(index.samples["key_hash"][row]) == hash64(entry["key"])
    return row if same else None


def _paths_and_manifest(location: str) -> tuple[Sequence[Shard], Path | None]:
    """Returns the shards of a data set, and its manifest where it has one, without comparing them with each other.

    So a quarantine that was killed between two shards can be repeated.
    """
    path = Path(location)
    manifest = path / NAME if path.is_dir() else path
    if manifest.suffix == ".jsonl" and manifest.exists():
        return [shard_of(row) for row in read_manifest(manifest)], manifest
    return [path.absolute() for path in find_shards(location)], None


def _refuse_while_training(run: Path) -> None:
    """Raises ValueError while a training holds the run's lock: it would stop at the next shard that it opens."""
    if is_locked(run / ".lock"):
        raise UserError(f"{run} is training, and reads the indexes that would change. Wait for it, or stop it first")


def run(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data quarantine`: flags the samples that the ledgers of runs name."""
    trees = [read_run(run) for run in arguments.runs]
    of_runs = sorted({", ".join(source["shards"] for source in source_trees(tree)) for tree in trees})
    if len(of_runs) > 1 and not arguments.shards:
        raise UserError(f"the runs have different data sets ({'; '.join(of_runs)}); give one after the other")
    locations = [arguments.shards] if arguments.shards else [source["shards"] for source in source_trees(trees[0])]
    entries = [entry for run in arguments.runs for entry in read_ledgers(run)]
    if not entries:
        print(f"no bad samples: no entries in {LEDGER} of {', '.join(map(str, arguments.runs))}")
        return 0
    for run in arguments.runs:
        _refuse_while_training(run)
    sources = [_paths_and_manifest(location) for location in locations]
    changes = plan_changes(entries, [path for paths, _ in sources for path in paths], arguments.undo)
    _print_entries(entries, changes)
    before = [
        fingerprint(read_manifest(manifest) if manifest else [describe_shard(path) for path in paths])
        for paths, manifest in sources
    ]
    if arguments.dry_run:
        return 0
    apply_changes(changes)
    for (paths, manifest), old in zip(sources, before, strict=True):
        rows = [describe_shard(path) for path in tqdm(paths, unit="shard", desc="manifest", disable=len(paths) < 1000)]
        if manifest:
            write_manifest(rows, manifest)
        _print_outcome(old, fingerprint(rows), sum(row.usable for row in rows), arguments)
    return 0


def _print_entries(entries: Sequence[dict], changes: Sequence[Change], most: int = 20) -> None:
    named = {(entry["shard"], entry["byte"]): entry for entry in entries}
    print(f"{len(entries)} events, {len(named)} bad samples in {len(changes)} shards")
    for entry in list(named.values())[:most]:
        print(
            f"  {Path(entry['shard']).name}, byte {entry['byte']}, {entry['key']!r}: {entry['part']}: {entry['error']}"
        )
    if len(named) > most:
        print(f"  ... and {len(named) - most} more")
    flips = sum(len(change.rows) for change in changes)
    unmatched = [entry for change in changes for entry in change.unmatched]
    print(f"{flips} flags change, {len(named) - flips - len(unmatched)} are as they should be already")
    if unmatched:
        first = f"{unmatched[0]['key']!r} in {unmatched[0]['shard']}"
        print(
            f"{len(unmatched)} entries match no sample any more, as {first}: "
            f"these shards were written anew since, and are left alone"
        )


def _print_outcome(before: str, after: str, usable: int, arguments: argparse.Namespace) -> None:
    if before == after:
        print(f"the data set is as it was: {usable} usable samples, fingerprint {after}")
        return
    print(f"{usable} usable samples; the fingerprint changes from {before} to {after}")
    repeat = f"controlbooth data quarantine {' '.join(map(quoted, arguments.runs))}"
    repeat += f" --shards {quoted(arguments.shards)}" if arguments.shards else ""
    if arguments.undo:
        print(f"runs that began on the data set as it is now can go on; flag them again with: {repeat}")
    else:
        print(f"new runs leave these samples out. Runs that began before refuse to go on until: {repeat} --undo")
