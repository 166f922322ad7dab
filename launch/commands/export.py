"""`controlbooth export`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser, whole_number

EXAMPLES = """\
examples:
  controlbooth export runs/edges exported/edges                       the latest checkpoint, as diffusers reads it
  controlbooth export runs/edges exported/edges --best --dtype fp16   the best validated one, at half the size
  controlbooth export runs/edges exported/ui --format single-file     one .safetensors for image UIs; of a run with
                                                                      model.method=lora a control-LoRA
"""


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "export",
        "Write a run's ControlNet in a format that others load, with a model card.",
        EXAMPLES,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run: it holds config.yaml and checkpoints/")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist, or be empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step", type=whole_number(0), metavar="N", help="the checkpoint of step N (default: the latest)"
    )
    which.add_argument("--best", action="store_true", help="the one that obeys best, by its validation")
    parser.add_argument("--format", choices=("diffusers", "single-file"), default="diffusers")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the written weights")
    parser.add_argument("--force", action="store_true", help="replace OUT and everything in it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.export import run

    return run(options)
