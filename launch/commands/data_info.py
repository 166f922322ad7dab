"""`controlbooth data info`: its command line."""

import argparse
from collections.abc import Sequence

from controlbooth.data.arguments import finite_number, verb_parser, whole_number


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data info",
        "Say what a data set holds, and how a run would sort it into shapes.",
        "examples:\n  controlbooth data info shards/train\n"
        "  controlbooth data info shards/train --max-aspect-ratio 2 --resolution 512",
    )
    parser.add_argument("shards", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    plan = parser.add_argument_group("shapes, as the fields of data in a run")
    plan.add_argument(
        "--max-aspect-ratio", type=finite_number(1, 8), help="show the shapes that a run with this ratio trains on"
    )
    plan.add_argument("--resolution", type=whole_number(8), default=512, help="(default: 512)")
    plan.add_argument("--aspect-step", type=whole_number(), default=64, help="(default: 64)")
    plan.add_argument(
        "--lanes", type=whole_number(), default=256, help="of the run, its global batch size (default: 256)"
    )
    plan.add_argument("--condition", help="kind that the run trains on (default: none)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.inspection.show import run_info

    return run_info(options)
