"""`controlbooth data pack`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import add_max_pixels, folder_to_write, seed_number, verb_parser, whole_number
from controlbooth.data.condition_names import COMPUTABLE, SCENE_KINDS
from controlbooth.data.processes.cpus import usable_cpus


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "data pack",
        "Pack images, conditions and captions into tar shards with an index. A pack that was stopped, "
        "even by kill -9, goes on with the same command.",
        f"""sources:
  a folder     images/, conditions/<kind>/, captions as x.txt beside x.jpg or in captions.csv or .jsonl; without an
               images/ folder all images below it, and captions from --caption
  a table      .csv, .jsonl or .parquet with columns image, caption and one for each condition; paths relative to it
  a data set   a folder of Hugging Face `datasets` (save_to_disk, or Parquet files)
  --scenes     the embedded world, with {", ".join(SCENE_KINDS)}
conditions that a source lacks are computed if they are one of {", ".join(COMPUTABLE)}

examples:
  controlbooth data pack photos/ -o shards/ --condition canny
  controlbooth data pack pets/ -o shards/ --caption "a photo of a {{folder}}"
  controlbooth data pack fill50k.parquet -o shards/ --condition fill=conditioning_image --caption-column text
  controlbooth data pack photos/ -o shards/ --held-out 5%     writes shards/train and shards/held-out
  controlbooth data pack --scenes 20000 --seed 0 --condition edges --condition depth -o shards/""",
    )
    parser.add_argument("source", nargs="?", type=Path, help="folder, table or data set")
    parser.add_argument("-o", "--out", type=folder_to_write, required=True, help="folder for the shards")
    parser.add_argument(
        "--condition", action="append", default=[], metavar="KIND[=COLUMN]", help="a condition to pack; may be repeated"
    )
    parser.add_argument("--caption", help="caption of all images of a folder, with {folder} and {name}")
    parser.add_argument("--image-column", default="image", help="of a table (default: image)")
    parser.add_argument("--caption-column", default="caption", help="of a table (default: caption)")
    parser.add_argument(
        "--held-out",
        metavar="SHARE",
        help="a share such as 5%%, or a number of samples, to hold out: OUT/train and OUT/held-out, near copies on one "
        "side, from all folders and captions",
    )
    parser.add_argument("--scenes", type=whole_number(), metavar="COUNT", help="draw so many scenes")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the scenes (default: 0)")
    parser.add_argument("--start", type=whole_number(0), default=0, help="number of the first scene (default: 0)")
    parser.add_argument("--size", type=whole_number(), default=64, help="side of the scenes in pixels (default: 64)")
    parser.add_argument("--samples-per-shard", type=whole_number(), default=1000, help="(default: 1000)")
    parser.add_argument("--workers", type=whole_number(), default=usable_cpus(), help="processes (default: the CPUs)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out samples that cannot be read, and list them")
    add_max_pixels(parser)
    parser.add_argument("--dry-run", action="store_true", help="check, show what would be packed, and write nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    from controlbooth.data.packing.pack import run

    return run(options)
