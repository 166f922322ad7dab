"""`controlbooth ablate`: the same run with parts replaced, several seeds each, measured side by side."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from controlbooth.launch.local import train
from controlbooth.launch.quickstart import heading, packing, verb
from controlbooth.trainer.config import ConfigError, RunConfig, Section, explain_errors, load_config, run_folder


class Variant(Section):
    changes: tuple[str, ...] = ()
    """section.key=value, as on the command line of `controlbooth train`."""
    seeds: tuple[int, ...] | None = None
    """Instead of those of the file."""


class Ablations(Section):
    name: str
    run: Path
    """The run file that all start from, beside this file."""
    changes: tuple[str, ...] = ()
    """Of all of its runs."""
    samples: int = Field(default=48, gt=0)
    """Held-out conditions that are drawn and measured under each prompt."""
    seeds: tuple[int, ...] = (0,)
    variants: dict[str, Variant]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="controlbooth ablate",
        description="Trains each variant of a run with each seed, draws held-out conditions with four kinds of prompt, "
        "and writes tables and pictures. Stopped at any point, the same command goes on.",
        epilog="example:\n  controlbooth ablate launch/configs/ablations.yaml --processes 2\n"
        "  controlbooth ablate launch/configs/ablations.yaml --dry-run max_steps=100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="ABLATIONS.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of every run")
    parser.add_argument("--processes", type=int, help="ranks (default: one per GPU, or 1 on a machine without)")
    parser.add_argument("--dry-run", action="store_true", help="check all runs and print their commands; start nothing")
    options = parser.parse_intermixed_args(arguments)
    grid = load_ablations(options.file)
    run_file = options.file.parent / grid.run
    runs = planned_runs(grid, run_file, options.overrides)
    configs = [load_config(run_file, changes) for _, _, changes in runs]
    folder = configs[0].output
    measuring = ["python", "-m", "controlbooth.trainer.evaluate.ablations", str(folder), f"--samples={grid.samples}"]
    if options.dry_run:
        for _, _, changes in runs:
            print("controlbooth train", run_file, *changes)
        print(*measuring)
        return 0
    for command in packing(configs[0]):
        heading(f"data: controlbooth {' '.join(command)}")
        verb(command)
    for (variant, seed, changes), config in zip(runs, configs, strict=True):
        if state_of(config) == "finished":
            continue
        heading(f"{variant}, seed {seed}: controlbooth train {run_file} {' '.join(changes)}")
        if status := train(str(run_file), changes, options.processes):
            return status
    listed = [
        dict(variant=variant, seed=seed, run=config.name)
        for (variant, seed, _), config in zip(runs, configs, strict=True)
    ]
    (folder / "runs.json").write_text(json.dumps(listed))
    heading(" ".join(measuring))
    return subprocess.run([sys.executable, *measuring[1:]], env=os.environ | {"HF_HUB_OFFLINE": "1"}).returncode


def state_of(config: RunConfig) -> str | None:
    """What the run's status.json says, if there is one."""
    status = run_folder(config) / "status.json"
    return json.loads(status.read_text())["state"] if status.is_file() else None


def load_ablations(path: Path) -> Ablations:
    """Raises ConfigError for what cannot be read or understood."""
    try:
        return Ablations.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain_errors(error, Ablations)}") from None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def planned_runs(grid: Ablations, run_file: Path, overrides: Sequence[str] = ()) -> list[tuple[str, int, list[str]]]:
    """Variant, seed and overrides of every run, in the order in which they are trained."""
    output = load_config(run_file, [*grid.changes, *overrides]).output / grid.name
    planned = []
    for name, variant in grid.variants.items():
        for seed in variant.seeds or grid.seeds:
            run = f"{name.replace(' ', '-').replace(chr(39), '')}-{seed}"
            own = [*grid.changes, *variant.changes, f"seed={seed}", *overrides, f"name={run}", f"output={output}"]
            planned.append((name, seed, own))
    return planned
