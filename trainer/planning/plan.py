"""`controlbooth plan`: memory, time and price of a run before it is started."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from controlbooth.data.files.whole import write_whole
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import load_run
from controlbooth.trainer.planning.accelerators import Layout, accelerator, card_to_fit, with_nodes


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth plan` is asked, and returns its exit status."""
    if options.subjects:
        return run_subjects(options)
    config = load_config(options.run, options.overrides)
    if options.fit or options.gpus:
        return run_fit(options, config)
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


def run_fit(options: argparse.Namespace, config: RunConfig) -> int:
    """Does what `controlbooth plan --fit` is asked; -> 0, or 1 where nothing fits."""
    layout = layout_to_fit(options, config)
    from controlbooth.trainer.planning.fit import find_fit
    from controlbooth.trainer.planning.fit_report import fit_lines, fit_tree

    found = find_fit(config, layout, options.shapes, say)
    print("\n".join(fit_lines(found, options.run, options.overrides)))
    if options.json:
        write_whole(options.json, json.dumps(fit_tree(found), indent=1).encode())
    return 0 if found.chosen else 1


def run_subjects(options: argparse.Namespace) -> int:
    """Does what `controlbooth plan --subjects` is asked; -> 0, or 1 where not one subject fits."""
    others = ("cluster", "nodes", "processes_per_node", "calibration", "simulate", "price", "network_gbit", "json")
    refuse_beside("--subjects", others, options)
    from controlbooth.trainer.dreambooth.manifest import load_subjects

    config = load_run(Path(options.run), options.overrides)
    subjects, faults = load_subjects(options.subjects)
    for name, fault in faults.items():
        say(f"warning: {name} is left out: {fault}")
    if not subjects:
        raise ConfigError(f"{options.subjects} has no subject that can be trained: see above")
    steps = [subject.steps or config.steps for subject in subjects]
    card = card_to_fit(
        options.fit or options.accelerator or "h100",
        options.accelerator,
        "fp32" if config.precision == "fp32" else "bf16",
    )
    from controlbooth.trainer.planning.subjects_report import plan_subjects

    lines, fits = plan_subjects(
        config,
        options.subjects,
        steps,
        card,
        options.gpus or 1,
        options.shapes,
        options.run,
        options.overrides,
        say,
    )
    print("\n".join(lines))
    return 0 if fits else 1


def refuse_beside(option: str, others: Sequence[str], options: argparse.Namespace) -> None:
    """Raises ConfigError where options are given that do not go with one. others: by their names in a Namespace."""
    if given := [f"--{name.replace('_', '-')}" for name in others if getattr(options, name) is not None]:
        raise ConfigError(f"{', '.join(given)} does not go with {option}, which knows cards by --fit and --gpus alone")


def layout_to_fit(options: argparse.Namespace, config: RunConfig) -> Layout:
    """Finds the cards that --fit and --gpus name.

    Raises ConfigError for options that do not go with --fit, and where the global batch cannot be divided among the
    cards, and UserError for a size that is none.
    """
    if not options.fit:
        raise ConfigError(f"--gpus {options.gpus} is of --fit: give --nodes and --processes-per-node, or --fit SIZE")
    others = ("cluster", "nodes", "processes_per_node", "calibration", "simulate", "price", "network_gbit")
    refuse_beside("--fit", others, options)
    card = card_to_fit(options.fit, options.accelerator, "fp32" if config.engine.precision == "fp32" else "bf16")
    layout = with_nodes(Layout(card, 1, 1), options.gpus or 1)
    check_divides(config, layout.nodes, layout.processes_per_node, "--gpus")
    return layout


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
    check_divides(config, nodes, processes, "--nodes or --processes-per-node")
    if card.kind == "cpu":
        card = replace(card, memory_bytes=card.memory_bytes / processes)
    return Layout(card, nodes, processes)


def check_divides(config: RunConfig, nodes: int, processes: int, options: str) -> None:
    """Raises ConfigError where the global batch cannot be divided among the ranks. options: that say how many."""
    if config.global_batch_size % (nodes * processes):
        raise ConfigError(
            f"global_batch_size={config.global_batch_size} is not a multiple of {nodes * processes} ranks "
            f"({nodes} nodes with {processes}). Change it, {options}"
        )
