"""`controlbooth plan`: memory, time and price of a run before it is started."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from controlbooth.data.arguments import file_to_write, finite_number, whole_number
from controlbooth.models.architectures import PUBLISHED
from controlbooth.trainer.accelerators import ACCELERATORS, STORAGE_GBIT, Layout, accelerator
from controlbooth.trainer.config import ConfigError, RunConfig, load_config

HELP = """\
Nothing is trained and no weights are read: the run's modules run on tensors without memory, which are followed.
Where model.base is no folder here, the published shapes of model.family stand for it; --shapes says of which family.
GPUs are planned by the steps that we have measured, which the plan names; --calibration gives your own.

Examples:
  controlbooth plan launch/configs/sd15-edges.yaml --accelerator h200 --processes-per-node 1
  controlbooth plan launch/configs/quickstart.yaml --accelerator cpu     this machine, which is timed for half a second
  controlbooth plan run.yaml --accelerator a100-80 --nodes 8 --processes-per-node 8 engine.zero_stage=1
  controlbooth plan run.yaml --shapes sdxl data.resolution=1024 --simulate curve.png
  controlbooth plan run.yaml --calibration rows.jsonl      rows of tests/benchmarks/throughput.py, or a run's folder
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="controlbooth plan",
        description="Memory, time and price of a run before it is started.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, set here")
    parser.add_argument("--cluster", type=Path, help="a cluster.yaml with accelerator, nodes, processes_per_node")
    parser.add_argument("--accelerator", metavar="NAME", help=f"{', '.join(ACCELERATORS)}, or cpu (default: h100)")
    parser.add_argument("--nodes", type=whole_number(), help="machines (default: 1)")
    parser.add_argument(
        "--processes-per-node", type=whole_number(), help="ranks on each (default: as many as a node has cards)"
    )
    parser.add_argument("--price", type=finite_number(0), help="dollars for an hour of one card (default: the table's)")
    parser.add_argument(
        "--network-gbit", type=finite_number(above=0), help="between nodes, of one card (default: the table's)"
    )
    parser.add_argument(
        "--storage-gbit", type=finite_number(above=0), default=STORAGE_GBIT, help="of all nodes (default: %(default)g)"
    )
    parser.add_argument(
        "--shapes", choices=PUBLISHED, help="plan with the published shapes of this family, not model.base"
    )
    parser.add_argument("--calibration", type=Path, help="your own measured rows, or a run's folder")
    parser.add_argument(
        "--simulate", type=file_to_write, metavar="PNG", help="draw the scaling curve up to 1,024 cards"
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the plan as JSON")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.run, options.overrides)
    layout = layout_of(options, config)
    if options.calibration and not options.calibration.exists():
        raise ConfigError(
            f"--calibration {options.calibration} does not exist: give the folder of a run that has ended, or a file "
            "of rows that tests/benchmarks/throughput.py has written"
        )
    # Only now: what is wrong with the command line is said before diffusers is imported, which takes seconds.
    from controlbooth.trainer.plan_text import as_tree, draw_curve, print_plan
    from controlbooth.trainer.planning import make_plan

    plan = make_plan(config, layout, options.shapes, options.calibration, options.storage_gbit * 1e9 / 8, say)
    print_plan(plan)
    if options.simulate:
        draw_curve(plan, options.simulate)
        print(f"\nscaling curve: {options.simulate}")
    if options.json:
        temporary = options.json.with_name(options.json.name + ".partial")
        temporary.write_text(json.dumps(as_tree(plan), indent=1))
        temporary.replace(options.json)
    return 0


def say(message: str) -> None:
    print(f"plan: {message}", file=sys.stderr, flush=True)


def layout_of(options: argparse.Namespace, config: RunConfig) -> Layout:
    """The cards that the command line or the cluster file names; the command line wins.

    Raises ConfigError where the run cannot be divided among them.
    """
    told: dict[str, Any] = {}
    if options.cluster:
        try:
            told = yaml.safe_load(options.cluster.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cluster file {options.cluster} is not readable: {error}") from error
        if not isinstance(told, dict):
            raise ConfigError(f"cluster file {options.cluster} holds {type(told).__name__}, and no mapping of keys")
    name = options.accelerator or told.get("accelerator") or "h100"
    card = accelerator(name, "fp32" if config.engine.precision == "fp32" else "bf16")
    if options.price is not None:
        card = replace(card, price=options.price)
    if options.network_gbit is not None:
        card = replace(card, network_bandwidth=options.network_gbit * 1e9 / 8)
    nodes = told.get("nodes", 1) if options.nodes is None else options.nodes
    processes = options.processes_per_node
    if processes is None:
        processes = told.get("processes_per_node", card.cards_per_node)
    for key, number in (("nodes", nodes), ("processes-per-node", processes)):
        if number < 1:
            raise ConfigError(f"--{key} is {number}: give 1 or more")
    if config.global_batch_size % (nodes * processes):
        raise ConfigError(
            f"global_batch_size={config.global_batch_size} is not a multiple of {nodes * processes} ranks "
            f"({nodes} nodes with {processes}). Change it, --nodes or --processes-per-node"
        )
    if card.kind == "cpu":
        card = replace(card, memory_bytes=card.memory_bytes / processes)
    return Layout(card, nodes, processes)
