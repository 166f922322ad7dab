"""`controlbooth data bench`: its command line."""

import argparse
from collections.abc import Sequence

from controlbooth.data.arguments import finite_number, folder_to_write, verb_parser, whole_number
from controlbooth.data.processes.cpus import usable_cpus


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data bench",
        "Measure how fast the trainer's loader reads a data set here: the more than a model needs, the "
        "better. Files that were read before come from memory; the first row is read before the others.",
        "examples:\n  controlbooth data bench shards/train --resolution 512 --threads 1 2 4\n"
        "  controlbooth data bench photos.jsonl --cache /local/cache",
    )
    parser.add_argument("shards", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    parser.add_argument("--condition", help="kind to read (default: the first there is)")
    parser.add_argument("--resolution", type=whole_number(8), default=512, help="side of the pictures (default: 512)")
    parser.add_argument("--batch-size", type=whole_number(), default=32, help="samples of a step (default: 32)")
    parser.add_argument(
        "--threads", type=whole_number(), nargs="+", default=[1, usable_cpus()], help="(default: 1 and the CPUs)"
    )
    parser.add_argument(
        "--seconds", type=finite_number(above=0), default=10.0, help="for each number of threads (default: 10)"
    )
    parser.add_argument(
        "--cache", type=folder_to_write, help="folder for shards that lie in a store, as data.cache of a run"
    )
    parser.add_argument(
        "--cache-gib", type=finite_number(above=0), default=100.0, help="what it may hold (default: 100)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.inspection.bench import run

    return run(options)
