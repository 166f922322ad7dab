"""`controlbooth study new`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import finite_number, folder_to_write, verb_parser, whole_number


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "study new",
        "Makes a blind comparison of runs, checkpoints, subjects or folders of pictures, to be judged by people: "
        "brings the pictures into one form under names that say nothing, and freezes what will be asked. Pictures of "
        "one name are of one item. Runs draw their held-out conditions, all from the same noise; their items are "
        "000000, 000001, ... Of a run of subjects the pictures of `dreambooth measure` are taken.",
        """examples:
  controlbooth study new study --methods early=runs/quickstart/checkpoints/step-00000400 late=runs/quickstart
  controlbooth study new study --methods ours=runs/photos theirs=their-pictures --dry-run
  controlbooth study new study --methods a=a/ b=b/ c=c/ --conditions edges/ --prompts prompts.yaml
  controlbooth study new study --methods lora=runs/pets full=runs/pets-full""",
    )
    parser.add_argument("out", type=folder_to_write, metavar="STUDY", help="the folder to make")
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        metavar="NAME=PATH",
        help="a run, a checkpoint of one, a run of subjects, or a folder of pictures; at least two",
    )
    parser.add_argument(
        "--questions",
        nargs="+",
        choices=("quality", "fidelity", "subject", "prompt"),
        help="(default: quality and fidelity where items have conditions, subject and prompt where photographs)",
    )
    parser.add_argument(
        "--form", choices=("pairs", "rankings"), help="(default: pairs of two methods, rankings of more)"
    )
    parser.add_argument("--items", type=whole_number(), default=20, metavar="N", help="at most (default: 20)")
    parser.add_argument(
        "--per-rater", type=whole_number(), metavar="N", help="screens that one rater judges at most (default: all)"
    )
    parser.add_argument(
        "--checks", type=finite_number(0, 1), default=0.1, help="for each screen, with a known answer (default: 0.1)"
    )
    parser.add_argument(
        "--repeats", type=finite_number(0, 0.5), default=0.1, help="for each screen, shown again (default: 0.1)"
    )
    parser.add_argument("--title", help='that raters read; it should name no method (default: "Comparing pictures")')
    parser.add_argument("--dry-run", action="store_true", help="only say what raters would do, and how long it takes")
    beside = parser.add_argument_group("beside folders of pictures, by the same names")
    beside.add_argument("--conditions", type=Path, metavar="FOLDER", help="that the pictures were drawn under")
    beside.add_argument("--targets", type=Path, metavar="FOLDER", help="real pictures, of which checks are made")
    beside.add_argument(
        "--references", type=Path, metavar="FOLDER", help="photographs of the subject; or a folder for each item"
    )
    beside.add_argument("--prompts", type=Path, metavar="FILE", help="YAML or JSON: name -> text")
    drawing = parser.add_argument_group("of runs")
    drawing.add_argument("--data", metavar="SHARDS", help="(default: the runs' held-out shards)")
    drawing.add_argument("--steps", type=whole_number(), help="of the sampler (default: the runs' validation)")
    drawing.add_argument("--guidance", type=finite_number(1), help="(default: the runs', or the base's usual)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.study.new import run

    return run(options)
