"""`controlbooth data stats`: its command line."""

import argparse
from collections.abc import Sequence

from controlbooth.data.arguments import verb_parser, whole_number
from controlbooth.data.processes.cpus import usable_cpus


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data stats",
        "Say what the captions and pictures of a data set are like.",
        "example:\n  controlbooth data stats shards/train --most 20",
    )
    parser.add_argument("shards", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    parser.add_argument("--most", type=whole_number(0), default=10, help="captions and sizes to list (default: 10)")
    parser.add_argument("--workers", type=whole_number(), default=usable_cpus(), help="processes (default: the CPUs)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.inspection.stats import run

    return run(options)
