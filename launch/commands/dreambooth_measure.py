"""`controlbooth dreambooth measure`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser, whole_number


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "dreambooth measure",
        "Draws pictures of each finished subject of a run and measures subject fidelity (DINO, CLIP-I), "
        "prompt fidelity (CLIP-T), preservation of the class (PRES, lower is better) and diversity (DIV). Encoders are "
        "folders that transformers reads; without them a substitute is used, by its own name. Writes "
        "RUN/measures.json, grids of samples and runs in MLflow. Pictures that are there are not drawn again.",
        """examples:
  controlbooth dreambooth measure runs/dreambooth --prompts 6 --images 4
  controlbooth dreambooth measure runs/pets --encoder dino=/models/dino-vits16 --encoder clip=/models/clip-vit-b-32
  controlbooth dreambooth measure --real photos     what the encoders say of real pictures, a folder for each subject
  torchrun --nproc-per-node 8 -m controlbooth.launch.cli dreambooth measure runs/pets""",
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="the folder of a run of subjects")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="measure folders of real pictures, and no run")
    parser.add_argument("--encoder", action="append", default=[], metavar="dino|clip=FOLDER")
    parser.add_argument(
        "--prompts", type=whole_number(1, 25), default=25, help="of the 25 of the protocol, evenly chosen (default: 25)"
    )
    parser.add_argument("--images", type=whole_number(), default=4, help="pictures of each prompt (default: 4)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.dreambooth.measuring.measure import run

    return run(options)
