"""`controlbooth data lint`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import add_max_pixels, file_to_write, verb_parser, whole_number
from controlbooth.data.processes.cpus import usable_cpus


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data lint",
        "Look for samples that spoil a training: copies, conditions of other pictures, broken, blank and "
        "small pictures, empty captions. Status 1 when there are any.",
        "examples:\n  controlbooth data lint shards/train\n"
        "  controlbooth data lint shards/train --decode --min-side 512 --resolution 512 --report report.html",
    )
    parser.add_argument("shards", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    parser.add_argument("--decode", action="store_true", help="decode all pictures and look at them too")
    parser.add_argument(
        "--min-side", type=whole_number(), default=64, help="shorter sides than this are small (default: 64)"
    )
    parser.add_argument(
        "--resolution", type=whole_number(), help="data.resolution of the run: tells of lines that do not survive it"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="BASE", help="a base, or the folder of a tokenizer: tells of captions it cuts"
    )
    add_max_pixels(parser)
    parser.add_argument("--report", type=file_to_write, help="write an HTML page with pictures of what was found")
    parser.add_argument("--workers", type=whole_number(), default=usable_cpus(), help="processes (default: the CPUs)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.inspection.lint import run

    return run(options)
