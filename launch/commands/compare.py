"""`controlbooth compare`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import file_to_write, verb_parser


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "compare",
        "Paired differences between two evaluations of the same held-out conditions: each condition was "
        "drawn from the same noise with both ControlNets, so what differs is the ControlNet. Intervals are 95 % "
        "bootstrap intervals of the mean difference; one that excludes 0 is marked.",
        "example:\n  controlbooth evaluate runs/a && controlbooth evaluate runs/b\n"
        "  controlbooth compare runs/a runs/b --json difference.json",
    )
    parser.add_argument("a", type=Path, metavar="A", help="a run that was evaluated, or the folder of an evaluation")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the differences there too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.evaluation.compare import run

    return run(options)
