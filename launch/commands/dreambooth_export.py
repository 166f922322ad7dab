"""`controlbooth dreambooth export`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import file_to_write, verb_parser


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "dreambooth export",
        "Write the LoRA of a trained subject: `diffusers` for load_lora_weights, `kohya` with the names of "
        "kohya's scripts (lora_unet_..., with alphas), which the common image UIs read.",
        """examples:
  controlbooth dreambooth export runs/pets rex rex.safetensors --format kohya
  controlbooth dreambooth export runs/pets rex rex.safetensors
  controlbooth dreambooth export runs/pets rex rex.safetensors --best     of the step that validations found best""",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run of subjects")
    parser.add_argument("subject", metavar="NAME")
    parser.add_argument("out", type=file_to_write, metavar="OUT.safetensors")
    parser.add_argument("--format", choices=("diffusers", "kohya"), default="diffusers", help="(default: diffusers)")
    parser.add_argument("--best", action="store_true", help="of the step between learnt and copied, and not the last")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.dreambooth.export import run

    return run(options)
