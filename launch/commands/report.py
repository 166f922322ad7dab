"""`controlbooth report`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import file_to_write, verb_parser


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "report",
        "Writes one HTML page about a run: whether it obeys and since when, its curves between chance and "
        "the real pictures, fidelity, pictures over the steps, best and worst samples. What `controlbooth evaluate` "
        "measured is in it. Several runs stand side by side, on the same axes.",
        "examples:\n  controlbooth report runs/quickstart && xdg-open runs/quickstart/report.html\n"
        "  controlbooth report runs/without runs/with -o side-by-side.html",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "-o",
        "--out",
        type=file_to_write,
        metavar="FILE",
        help="(default: RUN/report.html; of several, RUN/report-OTHERS.html in the first one's folder)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.evaluation.report import run

    return run(options)
