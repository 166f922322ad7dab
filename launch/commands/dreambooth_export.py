"""`controlbooth dreambooth export`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import file_to_write, folder_to_write, verb_parser

FORMS = ("diffusers", "kohya", "comfy")


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "dreambooth export",
        "Write the LoRA of a trained subject, or of all that are finished: `diffusers` for load_lora_weights, `kohya` "
        "with the names of kohya's scripts (lora_unet_..., with alphas), which the common image UIs read, `comfy` with "
        "those that ComfyUI saves itself.",
        """examples:
  controlbooth dreambooth export runs/pets rex rex.safetensors --format kohya
  controlbooth dreambooth export runs/pets rex rex.safetensors
  controlbooth dreambooth export runs/pets rex rex.safetensors --best     of the step that validations found best
  controlbooth dreambooth export runs/pets --all loras --format diffusers,kohya
                            all that are finished, as loras/rex.kohya.safetensors ...; again: only what is missing
  controlbooth dreambooth export runs/pets --all loras --dry-run          what would be written""",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run of subjects")
    parser.add_argument("subject", metavar="NAME", nargs="?")
    parser.add_argument("out", type=file_to_write, metavar="OUT.safetensors", nargs="?")
    parser.add_argument(
        "--all", type=folder_to_write, metavar="FOLDER", help="export all finished subjects, in place of NAME"
    )
    parser.add_argument(
        "--format", type=forms, default=["diffusers"], metavar="FORM[,FORM]",
        help=f"of {', '.join(FORMS)} (default: diffusers)",
    )  # fmt: skip
    parser.add_argument("--best", action="store_true", help="of the step between learnt and copied, and not the last")
    parser.add_argument("--force", action="store_true", help="write over files that are there")
    parser.add_argument("--dry-run", action="store_true", help="write nothing, and tell what would be written")
    return parser


def forms(text: str) -> list[str]:
    """Reads names of forms with commas between them. A type for argparse."""
    named = list(dict.fromkeys(text.split(",")))
    if unknown := next((one for one in named if one not in FORMS), None):
        raise argparse.ArgumentTypeError(f"{unknown!r} is no form of a LoRA's file: choose from {', '.join(FORMS)}")
    return named


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line()
    options = parser.parse_args(arguments)
    if (options.all is None) != (options.out is not None) or (options.all is not None and options.subject is not None):
        parser.error("give NAME and OUT.safetensors for one subject, or --all FOLDER for all that are finished")
    from controlbooth.trainer.dreambooth.export import run

    return run(options)
