"""`controlbooth dreambooth identifiers`: its command line."""

import argparse
from collections.abc import Sequence

from controlbooth.data.arguments import finite_number, verb_parser, whole_number


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "dreambooth identifiers",
        "Find words without a meaning for subjects: rare single tokens of the base's tokenizer that are no "
        "words, and with --draw, words for which the base draws nothing special. Prints them as a run takes them.",
        """examples:
  controlbooth dreambooth identifiers /models/sd15 --count 100
  controlbooth dreambooth identifiers miniature --count 8 --draw --class-noun star --class-noun house""",
    )
    parser.add_argument("base", help="a diffusers folder, a single .safetensors file, or miniature")
    parser.add_argument("--count", type=whole_number(), default=20, help="how many (default: 20)")
    parser.add_argument("--draw", action="store_true", help="ask the base too; needs --class-noun")
    parser.add_argument("--class-noun", action="append", default=[], metavar="NOUN", help="may be repeated")
    parser.add_argument("--images", type=whole_number(2), default=8, help="drawn of each prompt (default: 8)")
    parser.add_argument("--steps", type=whole_number(), default=20, help="of sampling (default: 20)")
    parser.add_argument("--guidance", type=finite_number(1), default=3.0, help="(default: 3)")
    parser.add_argument("--encoder", action="append", default=[], metavar="dino=FOLDER", help="compares the pictures")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.dreambooth.measuring.identifiers import run

    return run(options)
