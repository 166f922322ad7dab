"""`controlbooth data show`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import file_to_write, verb_parser, whole_number


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data show",
        "Draw a contact sheet: each sample's image, its conditions and its caption.",
        "example:\n  controlbooth data show shards/photos --condition canny --condition computed:scribble",
    )
    parser.add_argument("shards", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    parser.add_argument("-o", "--out", type=file_to_write, default=Path("sheet.png"), help="(default: sheet.png)")
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="KIND",
        help="kind to show, also computed:KIND; may be repeated (default: all that the shards hold)",
    )
    parser.add_argument(
        "--count", type=whole_number(), default=16, help="samples, from all folders and captions (default: 16)"
    )
    parser.add_argument("--columns", type=whole_number(), default=4, help="samples side by side (default: 4)")
    parser.add_argument("--resolution", type=whole_number(), default=192, help="side of each picture (default: 192)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.inspection.show import run_show

    return run_show(options)
