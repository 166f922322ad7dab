"""`controlbooth init`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import file_to_write, verb_parser, whole_number
from controlbooth.models.architectures import PUBLISHED

HELP = """\
Nothing is asked, and no file is overwritten. Resolution, batch, precision and what saves memory come from the plan of
the card (`controlbooth plan --fit`); learning rate and steps from the papers and the size of the data. Each line says
why.

Examples:
  controlbooth init shards/train -o run.yaml                                   the built-in base, on this machine
  controlbooth init photos/ -o run.yaml --base /models/sd15 --card 24GiB       says how to pack the pictures first
  controlbooth init shards/ -o run.yaml --base /models/flux --shapes flux-dev --card 80GiB --gpus 8
  controlbooth init -o subjects-run.yaml --subjects subjects.yaml --base /models/sdxl --card 24GiB
"""


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser("init", "Writes a run file with a reason in each line, from data, a base and a card.", HELP)
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA", help="shards, or a folder of pictures")
    parser.add_argument("-o", "--out", type=file_to_write, required=True, metavar="RUN.yaml", help="the file to write")
    parser.add_argument("--base", default="miniature", help="as model.base (default: miniature, the built-in one)")
    parser.add_argument(
        "--shapes", choices=PUBLISHED, help="plan with these published shapes where the base is not here"
    )
    parser.add_argument("--card", metavar="SIZE", help="24GiB, 80GB, or a card's name (default: what this machine has)")
    parser.add_argument("--gpus", type=whole_number(), default=1, help="cards in all (default: 1)")
    parser.add_argument("--subjects", type=Path, metavar="MANIFEST", help="write a run of these DreamBooth subjects")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.planning.first_run import run

    return run(options)
