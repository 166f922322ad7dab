"""`controlbooth data explain`: its command line."""

import argparse
from collections.abc import Sequence

from controlbooth.data.arguments import add_run_numbers, verb_parser, whole_number


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data explain",
        "Say where a sample lies and at which steps a run has seen it or will.",
        "examples:\n  controlbooth data explain 000123 --run runs/photos\n"
        "  controlbooth data explain shards-000007.tar:000123 --run runs/photos\n"
        "  controlbooth data explain 000123 --shards shards/train --global-batch-size 256 --steps 10000",
    )
    parser.add_argument(
        "sample", metavar="KEY|SHARD:KEY", help="a key alone names all samples that have it, in whatever shard"
    )
    parser.add_argument("--steps", type=whole_number(), help="look so many steps ahead (default: max_steps of the run)")
    parser.add_argument("--shards", help="without a run: a manifest, a folder, a tar, a glob or a {000..009} range")
    add_run_numbers(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.inspection.explain import run

    return run(options)
