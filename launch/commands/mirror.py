"""`controlbooth mirror`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import folder_to_write, verb_parser


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "mirror",
        "Copies the figures of runs for TensorBoard, or as offline runs of Weights & Biases. It reads metrics.jsonl "
        "alone, of runs of any kind, finished or in training, here or on a shared disk. What was copied before is "
        "written anew, so that no step is there twice.",
        "examples:\n  controlbooth mirror runs --to tensorboard --out board && tensorboard --logdir board\n"
        "  controlbooth mirror runs/first --to wandb --out offline && wandb sync offline/first/wandb/offline-run-*",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="a run's folder, or one that holds runs")
    parser.add_argument("--to", choices=("tensorboard", "wandb"), required=True, help="what the copies are for")
    parser.add_argument("-o", "--out", type=folder_to_write, required=True, metavar="FOLDER", help="for the copies")
    parser.add_argument("--follow", action="store_true", help="go on as runs go on, until Ctrl-C")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.launch.mirror import run

    return run(options)
