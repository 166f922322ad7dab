"""`controlbooth plan`: memory, time and price of a run before it is started."""

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import yaml

from controlbooth.data.files.whole import write_whole
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.planning.accelerators import Layout, accelerator


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth plan` is asked, and returns its exit status."""
    config = load_config(options.run, options.overrides)
    layout = layout_of(options, config)
    if options.calibration and not options.calibration.exists():
        raise ConfigError(
            f"--calibration {options.calibration} does not exist: give the folder of a run that has ended, or a file "
            "of rows that tests/benchmarks/gpu.py has written"
        )
    # Only now: what is wrong with the command line is said before diffusers is imported, which takes seconds.
    from controlbooth.trainer.planning.choices import make_plan
    from controlbooth.trainer.planning.report import as_tree, draw_curve, print_plan

    plan = make_plan(config, layout, options.shapes, options.calibration, options.storage_gbit * 1e9 / 8, say)
    print_plan(plan)
    if options.simulate:
        draw_curve(plan, options.simulate)
        print(f"\nscaling curve: {options.simulate}")
    if options.json:
        write_whole(options.json, json.dumps(as_tree(plan), indent=1).encode())
    return 0


def say(message: str) -> None:
    print(f"plan: {message}", file=sys.stderr, flush=True)


def layout_of(options: argparse.Namespace, config: RunConfig) -> Layout:
    """Finds the cards that the command line or the cluster file names; the command line wins.

    Raises ConfigError where the cluster file cannot be read, a number is below 1, or the global batch cannot be divided
    among the ranks, and UserError for an unknown accelerator.
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
