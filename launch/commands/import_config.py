"""`controlbooth import config`: its command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import quoted, verb_parser, whole_number


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "import config",
        "Make a run file of what another trainer was told, and account for each of its flags: taken as a field, "
        "equivalent to something here, not needed, or missing here.",
        """sources:
  a shell script with the command of a program of diffusers or kohya (accelerate launch ... train_*.py)
  a TOML file of kohya's settings, or SimpleTuner's config.json
  after --, the words of such a command

examples:
  controlbooth import config train.sh --condition canny -o run.yaml
  controlbooth import config train.sh --set MODEL_NAME=/models/sd15 --condition canny --dry-run
  controlbooth import config config.toml --samples 400 -o run.yaml
  controlbooth import config --condition canny -o run.yaml -- accelerate launch train_controlnet.py ...""",
    )
    parser.add_argument("source", nargs="?", help="a file; or, after --, the words of the command")
    parser.add_argument("-o", "--out", type=Path, help="the run file to write")
    parser.add_argument("--from", dest="trainer", choices=("diffusers", "kohya", "simpletuner"), help="(default: told)")
    parser.add_argument("--kind", choices=("controlnet", "subjects"), help="of the run (default: told by the flags)")
    parser.add_argument("--condition", help="of a ControlNet: the kind that was packed, or computed:canny and others")
    parser.add_argument("--shards", default="shards", help="what import data wrote (default: shards)")
    parser.add_argument("--held-out", help="shards for validation")
    parser.add_argument("--samples", type=whole_number(), help="of the data, where the command counts epochs")
    parser.add_argument(
        "--processes", type=whole_number(), help="for the global batch (default: as the command says, or 1)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the script")
    parser.add_argument("--dry-run", action="store_true", help="print the run file, and write nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts one command or file; returns 0, or raises a ConfigError."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    at = words.index("--") if "--" in words else len(words)
    parser = command_line()
    options, command = parser.parse_args(words[:at]), words[at + 1 :]
    if bool(options.source) == bool(command):
        parser.error("give one file, or a command after --")
    if options.out is None and not options.dry_run:
        parser.error("give -o RUN.yaml, or --dry-run")
    if wrong := [one for one in options.set if "=" not in one]:
        parser.error(f"--set {wrong[0]} is not NAME=VALUE")
    from controlbooth.data.files.whole import write_whole
    from controlbooth.trainer.imports.command_lines import read_given
    from controlbooth.trainer.imports.runs import Asked, import_run, rest, text_of

    variables = dict(one.split("=", 1) for one in options.set)
    given = read_given(options.source or command, variables, options.trainer)
    subjects = None if options.kind is None else options.kind == "subjects"
    asked = Asked(options.shards, options.condition, options.held_out, options.processes, options.samples, subjects)
    made = import_run(given, asked)
    text = text_of(made, given)
    for line in (*made.notes, *rest(made)):
        print(line, file=sys.stderr)
    print(", ".join(f"{count} {kind}" for kind, count in made.counts().items()), file=sys.stderr)
    if options.dry_run or options.out is None:
        print(text, end="")
        return 0
    out: Path = options.out
    write_whole(out, text.encode())
    verb = "dreambooth run subjects.yaml" if made.subjects else "train"
    print(f"{out} is written: controlbooth {verb} {quoted(out)}")
    return 0
