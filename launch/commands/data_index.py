"""`controlbooth data index`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import file_to_write, verb_parser, whole_number
from controlbooth.data.processes.cpus import usable_cpus


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data index",
        "Index tar shards: a sidecar x.tar.idx beside each x.tar, and a manifest of all. Of shards in "
        "stores the sidecars and the manifest are written to a disk; training then names the manifest. "
        "Indexes that are there and fit are kept, so it can be stopped and started again.",
        "examples:\n  controlbooth data index shards/\n  controlbooth data index 'shards/train-{000..099}.tar' "
        "--manifest train.jsonl\n  controlbooth data index s3://bucket/photos/ --manifest photos.jsonl\n"
        "  controlbooth data index 'https://host/train-{000..099}.tar' --manifest train.jsonl --indexes /data/indexes",
    )
    parser.add_argument("shards", nargs="+", help="folders, tars, globs or {000..009} ranges; http(s), s3, gs too")
    parser.add_argument(
        "--manifest", type=file_to_write, help="where to write it (default: manifest.jsonl beside the shards)"
    )
    parser.add_argument("--indexes", type=Path, help="folder for sidecars of remote shards (default: MANIFEST.indexes)")
    parser.add_argument("--workers", type=whole_number(), default=usable_cpus(), help="processes (default: the CPUs)")
    parser.add_argument("--rebuild", action="store_true", help="read all shards again, whatever their age")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.inspection.indexing import run

    return run(options)
