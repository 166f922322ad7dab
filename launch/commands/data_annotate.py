"""`controlbooth data annotate`: its command line."""

import argparse
from collections.abc import Sequence

from controlbooth.data.arguments import add_max_pixels, folder_to_write, verb_parser, whole_number
from controlbooth.data.condition_names import COMPUTABLE


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data annotate",
        "Copy shards and add conditions to them. Stopped, the same command goes on where it was. "
        "With torchrun, ranks share the shards.",
        f"""conditions:
  {", ".join(COMPUTABLE)}
  depth=FOLDER, normals=FOLDER, segmentation=FOLDER, pose=FOLDER,DETECTOR   models of transformers

examples:
  controlbooth data annotate shards/photos -o shards/photos-edges --condition canny_random --condition soft_edges
  controlbooth data annotate photos.jsonl -o shards/photos-depth --condition depth=/models/depth-anything
  torchrun --nproc-per-node 8 -m controlbooth.launch.cli data annotate shards -o out --condition pose=/m/vit,/m/d""",
    )
    parser.add_argument("shards", help="a folder, a manifest, a glob or a range of shards")
    parser.add_argument("-o", "--out", type=folder_to_write, required=True, help="folder for the new shards")
    add_max_pixels(parser)
    parser.add_argument("--condition", action="append", required=True, metavar="KIND[=FOLDER]", help="may be repeated")
    parser.add_argument(
        "--workers", type=whole_number(), help="processes (default: one a CPU; with networks on a GPU, one)"
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what would be done")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.packing.annotate import run

    return run(options)
