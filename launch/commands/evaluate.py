"""`controlbooth evaluate`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import finite_number, folder_to_write, verb_parser, whole_number
from controlbooth.models.noise.checks import SAMPLERS
from controlbooth.trainer.evaluation.record import USUAL_SAMPLES


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "evaluate",
        "Samples held-out conditions without control, with control, and with control and no prompt, finds "
        "the condition again in each picture, and prints how well it matches, how well by chance (against the "
        "conditions of other samples), and the share of what is possible; random noise and real pictures bound it. "
        "WHERE is a run's folder, whose latest checkpoint and held-out shards are taken, or a folder with any "
        "ControlNet in the format of diffusers.",
        """examples:
  controlbooth evaluate runs/quickstart --samples 64
  controlbooth evaluate /models/sd-controlnet-canny --data shards/held-out --condition canny --base /models/sd15
  controlbooth evaluate runs/depth --network depth=/models/dpt --encoder clip=/models/clip-vit-b-32
  torchrun --nproc-per-node 8 -m controlbooth.launch.cli evaluate runs/photos --samples 5000""",
    )
    parser.add_argument("where", type=Path, metavar="WHERE")
    parser.add_argument("--data", metavar="SHARDS", help="held-out shards (default: those of the run)")
    parser.add_argument("--condition", metavar="KIND", help="which condition (default: the one that was trained)")
    parser.add_argument("--base", help="a diffusers folder, a single file or miniature (default: that of the run)")
    parser.add_argument("--resolution", type=whole_number(8), help="side in pixels (default: the run's, or the base's)")
    parser.add_argument(
        "--samples", type=whole_number(), help=f"held-out conditions (default: {USUAL_SAMPLES}, or all of fewer)"
    )
    parser.add_argument("--step", type=whole_number(0), help="of the run's checkpoint (default: the latest)")
    parser.add_argument("--steps", type=whole_number(), help="of the sampler (default: the run's validation, or 20)")
    parser.add_argument("--guidance", type=finite_number(1), help="(default: the run's, or the base's usual)")
    parser.add_argument("--scheduler", choices=SAMPLERS, help="(default: ddim; of SD3 and FLUX.1 euler)")
    parser.add_argument(
        "--network", action="append", default=[], metavar="KIND=FOLDER", help="finds the condition in photographs"
    )
    parser.add_argument(
        "--encoder", action="append", default=[], metavar="clip|dino=FOLDER", help="for KID, CLIP score"
    )
    parser.add_argument("--aesthetic", type=Path, metavar="FILE", help="linear head on CLIP, .safetensors")
    parser.add_argument("-o", "--out", type=folder_to_write, help="folder (default: WHERE/evaluation)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.trainer.evaluation.evaluate import run

    return run(options)
