"""Indexes shards, writes their manifest, and tells what is wrong with them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.errors import UserError
from controlbooth.data.inspection import readable
from controlbooth.data.pictures.images import MAX_PIXELS
from controlbooth.data.secrets import shown
from controlbooth.data.shards import manifest, sidecar, storage
from controlbooth.data.shards.index import STRUCTURAL, Problem, ensure_indexes
from controlbooth.data.shards.storage import Shard


def _drop_old_indexes(paths: Sequence[Shard], all_of_them: bool) -> None:
    """Deletes sidecars that are older than their shard. Tars are padded, so a replaced one often has the same size.

    Only the command does so: a run that starts on copied shards must not read terabytes because of their times. The
    sidecar of a shard in a store is named by its version, so it is never that of another one.
    """
    for path in paths:
        where = sidecar.index_path(path)
        older = isinstance(path, Path) and where.exists() and where.stat().st_mtime_ns < path.stat().st_mtime_ns
        if all_of_them or older:
            where.unlink(missing_ok=True)


def run(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data index`; returns 0 when every sample is usable, 1 when there are problems."""
    paths: list[Shard] = []
    for location in arguments.shards:
        if not storage.is_remote(location):
            paths += manifest.find_shards(location)
        elif arguments.manifest is None:
            raise UserError(f"{shown(location)} is remote, and its manifest goes to a disk: add --manifest set.jsonl")
        else:
            indexes = arguments.indexes or arguments.manifest.with_suffix(".indexes")
            paths += manifest.locate_remote(location, indexes)
    _drop_old_indexes(paths, arguments.rebuild)
    problems = ensure_indexes(paths, arguments.workers)
    damaged = {problem.shard for problem in problems if problem.kind in STRUCTURAL}
    rows = [manifest.describe_shard(path) for path in paths if str(path) not in damaged]
    _print_table(rows, problems)
    if damaged:
        print(
            f"{len(damaged)} of {len(paths)} shards are damaged, so no manifest was written: fetch or pack them "
            f"again, or move them away, and repeat the command.",
            file=sys.stderr,
        )
        return 1
    folders = [path.parent.absolute() for path in paths if isinstance(path, Path)]
    target = arguments.manifest or Path(os.path.commonpath(folders)) / manifest.NAME
    manifest.write_manifest(rows, target)
    print(f"wrote {target} ({manifest.fingerprint(rows)})")
    if (nothing := readable.problem(str(target), None, MAX_PIXELS)) is not None:
        print(nothing, file=sys.stderr)
        return 1
    if any(shown(row.uri) != row.uri for row in rows):
        print(f"{target} holds signatures of presigned URIs: it is readable by you alone, and good until they expire")
    return 1 if any(row.usable < row.samples for row in rows) or problems else 0


def _print_table(rows: list, problems: list[Problem], most: int = 20) -> None:
    print(f"{'shard':40} {'samples':>8} {'usable':>8} {'MB':>9}  conditions")
    shown = rows if len(rows) <= most else [row for row in rows if row.usable < row.samples][:most]
    for row in shown:
        conditions = ", ".join(f"{kind} {count}" for kind, count in row.conditions.items())
        print(f"{storage.base_name(row.uri):40} {row.samples:8d} {row.usable:8d} {row.bytes / 1e6:9.1f}  {conditions}")
    samples, usable, size = (sum(getattr(row, name) for row in rows) for name in ("samples", "usable", "bytes"))
    print(f"{f'all {len(rows)} shards':40} {samples:8d} {usable:8d} {size / 1e6:9.1f}")
    for problem in problems[:most]:
        print(problem, file=sys.stderr)
    if len(problems) > most:
        print(f"... and {len(problems) - most} problems more", file=sys.stderr)
