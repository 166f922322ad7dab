"""`controlbooth plan`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import file_to_write, finite_number, verb_parser, whole_number
from controlbooth.models.architectures import PUBLISHED
from controlbooth.trainer.planning.accelerators import ACCELERATORS, STORAGE_GBIT

HELP = """\
Nothing is trained and no weights are read: the run's modules run on tensors without memory, which are followed.
Where model.base is no folder here, the published shapes of model.family stand for it; --shapes says which.
GPUs are planned by the steps that we have measured, which the plan names; --calibration gives your own.

Examples:
  controlbooth plan launch/configs/sd15-edges.yaml --accelerator h200 --processes-per-node 1
  controlbooth plan launch/configs/quickstart.yaml --accelerator cpu     this machine, which is timed for half a second
  controlbooth plan run.yaml --accelerator a100-80 --nodes 8 --processes-per-node 8 engine.zero_stage=1
  controlbooth plan run.yaml --shapes sdxl data.resolution=1024 --simulate curve.png
  controlbooth plan run.yaml --shapes sd35-medium --accelerator a100-80 model.gradient_checkpointing=true
  controlbooth plan run.yaml --fit 24GiB                   the fastest setting that fits such a card
  controlbooth plan run.yaml --fit h100 --gpus 8 --shapes flux-dev
  controlbooth plan subjects-run.yaml --subjects subjects.yaml --fit 24GiB --shapes sdxl    how many at a time
  controlbooth plan run.yaml --calibration rows.jsonl      rows of tests/benchmarks/gpu.py, or a run's folder
"""


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "plan",
        "Memory, time and price of a run before it is started.",
        HELP,
    )
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, set here")
    parser.add_argument("--cluster", type=Path, help="a cluster.yaml with accelerator, nodes, processes_per_node")
    parser.add_argument("--accelerator", metavar="NAME", help=f"{', '.join(ACCELERATORS)}, or cpu (default: h100)")
    parser.add_argument("--nodes", type=whole_number(), help="machines (default: 1)")
    parser.add_argument(
        "--processes-per-node", type=whole_number(), help="ranks on each (default: as many as a node has cards)"
    )
    parser.add_argument(
        "--fit",
        metavar="SIZE",
        help="propose the fastest setting that fits: 24GiB, 80GB, or a card's name",
    )
    parser.add_argument("--gpus", type=whole_number(), help="cards in all, with --fit (default: 1)")
    parser.add_argument(
        "--subjects",
        type=Path,
        metavar="MANIFEST",
        help="plan a run of DreamBooth subjects, RUN.yaml, of this manifest",
    )
    parser.add_argument("--price", type=finite_number(0), help="dollars for an hour of one card (default: the table's)")
    parser.add_argument(
        "--network-gbit", type=finite_number(above=0), help="between nodes, of one card (default: the table's)"
    )
    parser.add_argument(
        "--storage-gbit", type=finite_number(above=0), default=STORAGE_GBIT, help="of all nodes (default: %(default)g)"
    )
    parser.add_argument("--shapes", choices=PUBLISHED, help="plan with these published shapes, not model.base")
    parser.add_argument("--calibration", type=Path, help="your own measured rows, or a run's folder")
    parser.add_argument(
        "--simulate", type=file_to_write, metavar="PNG", help="draw the scaling curve up to 1,024 cards"
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the plan as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_line().parse_intermixed_args(arguments)
    from controlbooth.trainer.planning.plan import run

    return run(options)
