"""`controlbooth study result`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import finite_number, verb_parser


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "study result",
        "Says what the answers of a study show: average human rank, also on the paper's scale of 5 points, "
        "preferences, Bradley-Terry scores, agreement between raters and of raters with themselves, checks failed, and "
        "how many answers are still needed. Writes STUDY/result.json and STUDY/report.html. What it says of runs goes "
        "to their report.html, to MLflow and to `controlbooth compare`. It may be called while the study is served.",
        """examples:
  controlbooth study result study
  controlbooth study result study --half-width 0.03""",
    )
    parser.add_argument("study", type=Path, metavar="STUDY")
    parser.add_argument(
        "--half-width",
        type=finite_number(above=0, most=0.5),
        default=0.05,
        help="of the 95 %% interval of a preference, for the number of answers still needed (default: 0.05)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.study.result import run

    return run(options)
