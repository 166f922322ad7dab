"""`controlbooth sample`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import finite_number, folder_to_write, seed_number, verb_parser, whole_number
from controlbooth.models.control_schedules import CONDITIONAL, SCHEDULES
from controlbooth.models.noise.checks import SAMPLERS


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "sample",
        "Draw pictures with one ControlNet or several, whose residuals are added up. A ControlNet is a "
        "run's folder, whose latest checkpoint is taken, or a folder in the format of diffusers.",
        f"""schedules, which weigh the residuals from shallow to deep: {", ".join(SCHEDULES)}

examples:
  controlbooth sample --control edges=runs/quickstart --data runs/quickstart-data/held-out --count 8
  controlbooth sample --control canny=runs/photos:0.8 --condition canny=edges.png --prompt "a house in the snow"
  controlbooth sample --control edges=RUN1:0.8 --control depth=RUN2 --data shards/held-out
  controlbooth sample --control canny=runs/photos --guess --condition canny=edges.png     no prompt at all""",
    )
    parser.add_argument("--control", action="append", default=[], metavar="KIND=FOLDER[:SCALE]", help="may be repeated")
    parser.add_argument(
        "--schedule",
        action="append",
        default=[],
        metavar="[KIND=]NAME",
        help=f"(default: uniform); {' and '.join(CONDITIONAL)} act in the conditional branch alone",
    )
    parser.add_argument("--guess", action="store_true", help="logspace, control of the conditional branch alone")
    parser.add_argument(
        "--start", type=finite_number(0, 1), default=0.0, help="share of the steps before control acts (default: 0)"
    )
    parser.add_argument(
        "--end", type=finite_number(0, 1), default=1.0, help="share of the steps after which it does not (default: 1)"
    )
    parser.add_argument("--condition", action="append", default=[], metavar="KIND=PICTURE", help="one for each control")
    parser.add_argument("--data", metavar="SHARDS", help="take conditions and prompts from these instead")
    parser.add_argument(
        "--prompt", action="append", default=[], help="may be repeated (default: those of --data, or none)"
    )
    parser.add_argument("--negative", help="what to guide away from")
    parser.add_argument(
        "--count", type=whole_number(), default=4, help="pictures of each prompt, or samples of --data (default: 4)"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the first picture (default: 0)")
    parser.add_argument("--steps", type=whole_number(), default=25, help="(default: 25)")
    parser.add_argument("--guidance", type=finite_number(1), help="1 is without (default: 5; SD3 4.5, FLUX.1 3.5)")
    parser.add_argument("--scheduler", choices=SAMPLERS, help="(default: ddim; of SD3 and FLUX.1 euler)")
    parser.add_argument("--base", help="a diffusers folder, a single file or miniature (default: that of the run)")
    parser.add_argument("-o", "--out", type=folder_to_write, default=Path("samples"), help="folder (default: samples)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.evaluation.sample import run

    return run(options)
