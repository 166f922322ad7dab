"""`controlbooth data order`: its command line."""

import argparse
from collections.abc import Sequence

from controlbooth.data.arguments import add_run_numbers, verb_parser, whole_number


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data order",
        "List the samples of a step: where they lie, their keys, and whose prompt is dropped.",
        "examples:\n  controlbooth data order --run runs/photos --step 1200 --world-size 8 --rank 3\n"
        "  controlbooth data order shards/train --global-batch-size 256 --step 1200",
    )
    parser.add_argument("shards", nargs="?", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    parser.add_argument("--step", type=whole_number(0), default=0, help="(default: 0)")
    parser.add_argument("--world-size", type=whole_number(), default=1, help="(default: 1)")
    parser.add_argument("--rank", type=whole_number(0), default=0, help="(default: 0)")
    add_run_numbers(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.inspection.show import run_order

    return run_order(options)
