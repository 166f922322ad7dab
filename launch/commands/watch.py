"""`controlbooth watch`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser

PORT = 8420


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "watch",
        "Shows runs in a browser, live: state, speed, time left, losses, control or subjects beside chance, the newest "
        "pictures, bad samples, failures and what to do about them. It only reads files, so it can look at runs that "
        "train on a cluster, on a disk that this machine shares, and needs no other server.",
        "examples:\n  controlbooth watch runs\n  controlbooth watch runs/first /shared/runs --port 0\n"
        "  ssh -N -L 8420:localhost:8420 MACHINE        then http://localhost:8420/ shows what runs there",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUNS", help="a run's folder, or one that holds runs, found as they come"
    )
    from controlbooth.launch.serving import add_options

    add_options(parser, PORT)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.launch.serving import serve, token_for
    from controlbooth.launch.watch.app import make_app

    token = token_for(options.host)
    serve(make_app(options.runs, options.host, token), options.host, options.port, token)
    return 0
