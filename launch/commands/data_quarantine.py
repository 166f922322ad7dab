"""`controlbooth data quarantine`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data quarantine",
        "Leave the bad samples that runs met out of the next run: flag them in the indexes of the shards. "
        "The shards themselves are not changed. What is flagged stays so until --undo, or until `controlbooth data "
        "index --rebuild` reads the shard anew.",
        "examples:\n  controlbooth data quarantine runs/photos --dry-run\n"
        "  controlbooth data quarantine runs/photos\n  controlbooth data quarantine runs/photos --undo",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; their ledgers are bad-samples-*.jsonl")
    parser.add_argument("--shards", help="the data set (default: data.shards of the run's config.yaml)")
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    parser.add_argument("--undo", action="store_true", help="clear the flags of these ledgers' samples instead")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.inspection.quarantine import run

    return run(options)
