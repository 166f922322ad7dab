"""`controlbooth dreambooth subjects`: its command line."""

import argparse
from collections.abc import Sequence

from controlbooth.data.arguments import folder_to_write, seed_number, verb_parser, whole_number


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "dreambooth subjects",
        "Draw subjects that the built-in base has never seen, and the manifest to train them.",
        """example:
  controlbooth dreambooth subjects -o subjects
  controlbooth dreambooth run subjects/subjects.yaml launch/configs/dreambooth.yaml""",
    )
    parser.add_argument("-o", "--out", type=folder_to_write, required=True, help="folder to write them to")
    parser.add_argument("--count", type=whole_number(), default=8, help="subjects (default: 8)")
    parser.add_argument("--images", type=whole_number(), default=5, help="pictures of each (default: 5)")
    parser.add_argument("--seed", type=seed_number, default=0)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.scenes.unseen_subjects import run

    return run(options)
