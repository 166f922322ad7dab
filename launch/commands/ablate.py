"""`controlbooth ablate`: the same run with parts replaced, several seeds each, measured side by side."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from controlbooth.data.arguments import verb_parser, whole_number
from controlbooth.data.files.records import Damaged, read_note, read_yaml
from controlbooth.launch.commands.quickstart import beside_python, heading, packing, shown, train_command, verb
from controlbooth.launch.commands.sweep import values_of, variants_of
from controlbooth.launch.commands.train import train
from controlbooth.launch.job.outcome import ANEW, STATUS
from controlbooth.launch.ranks import child_process
from controlbooth.trainer.config.file_kinds import ABLATIONS
from controlbooth.trainer.config.loading import explain_errors, load_config, refuse_other_kind
from controlbooth.trainer.config.run import RunConfig, run_folder
from controlbooth.trainer.config.section import ConfigError, Section

MAY_CHANGE = (
    "output",  # however its path is written, it is the folder in which the run was found
    "max_steps",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "validation.every_steps",
)
"""Settings under which a run that goes on is the one that it would have been with them from its start."""


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
    parser = verb_parser(
        "ablate",
        "Trains each variant of a run with each seed, draws held-out conditions with four kinds of prompt, "
        "and writes tables and pictures. Stopped at any point, the same command goes on. With --sweep it takes a "
        "run's own file, tries values of one field, and says which is the best; a run that fails, as at a rate that is "
        "too high, does not end a sweep.",
        "examples:\n  controlbooth ablate launch/configs/ablations.yaml --processes 2\n"
        "  controlbooth ablate launch/configs/ablations.yaml --dry-run max_steps=100\n"
        "  controlbooth ablate run.yaml --sweep optimizer.learning_rate=1e-5..1e-3 max_steps=500",
    )
    parser.add_argument("file", type=Path, metavar="ABLATIONS.yaml", help="or RUN.yaml, with --sweep")
    parser.add_argument("--sweep", metavar="FIELD=LOW..HIGH", help="or FIELD=A,B,C: values of one field to try")
    parser.add_argument("--points", type=whole_number(2), default=5, help="of a sweep from LOW to HIGH (default: 5)")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of every run")
    parser.add_argument("--processes", type=int, help="ranks (default: one per GPU, or 1 on a machine without)")
    parser.add_argument("--dry-run", action="store_true", help="check all runs and print their commands; start nothing")
    options = parser.parse_intermixed_args(arguments)
    field, values = values_of(options.sweep, options.points) if options.sweep else ("", [])
    grid = sweep_of(options.file, field, values) if field else load_ablations(options.file)
    run_file = options.file.parent / grid.run
    runs = planned_runs(grid, run_file, options.overrides)
    configs = [load_config(run_file, changes) for _, _, changes in runs]
    for config in configs:
        refuse_other_settings(config)
    folder = configs[0].output
    measuring = [
        beside_python(Path(sys.executable).name),
        "-m",
        "controlbooth.trainer.evaluation.ablations",
        str(folder),
    ]
    measuring.append(f"--samples={grid.samples}")
    if field:
        measuring.append(f"--sweep={field}")
    if options.dry_run:
        for command in packing(configs[0]):
            print(shown(command))
        for _, _, changes in runs:
            print(shown(train_command(str(run_file), changes, options.processes)))
        print(shlex.join(measuring))
        return 0
    for command in packing(configs[0]):
        heading(f"data: {shown(command)}")
        verb(command)
    listed = []
    for (variant, seed, changes), config in zip(runs, configs, strict=True):
        if not is_finished(config):
            heading(f"{variant}, seed {seed}: {shown(train_command(str(run_file), changes, options.processes))}")
            status = train(str(run_file), changes, options.processes)
            if status and not (field and has_failed(config)):
                return status
            if status:
                print(f"{variant}, seed {seed}, has failed: the sweep goes on without it", file=sys.stderr)
                continue
        listed.append(dict(variant=variant, seed=seed, run=config.name))
    if not listed:
        raise ConfigError(f"all {len(runs)} runs of the sweep have failed: lower its values, or see {folder}")
    if len(listed) < len(runs):
        measuring.append(f"--failed={len(runs) - len(listed)}")
    (folder / "runs.json").write_text(json.dumps(listed))
    heading(shlex.join(measuring))
    return child_process.call([sys.executable, *measuring[1:]], os.environ | {"HF_HUB_OFFLINE": "1"})


def is_finished(config: RunConfig) -> bool:
    """Tells whether its status.json says that all of its steps are done. It does not for a run that stopped early at
    its convergence; that one is started again, and ends at once."""
    path = run_folder(config) / "status.json"
    status = read_note(path, ANEW, STATUS)
    return status.get("state") == "finished" and (status.get("step") or 0) >= config.max_steps


def has_failed(config: RunConfig) -> bool:
    """Tells whether its status.json says that the run has failed by itself, and was not stopped by somebody."""
    return read_note(run_folder(config) / "status.json", ANEW, STATUS).get("state") == "failed"


def sweep_of(run_file: Path, field: str, values: list[str]) -> Ablations:
    """Makes the ablations of a sweep of a run's file, whose folder is named after the run and the field."""
    config = load_config(run_file)
    name = f"{config.name}-{field.rpartition('.')[2]}"
    return Ablations.model_validate(dict(name=name, run=run_file.name, variants=variants_of(field, values)))


def refuse_other_settings(config: RunConfig) -> None:
    """Raises ConfigError where the run's folder holds a run that the tables would show under settings that it had not.

    It may become longer, but not shorter, and not where its learning rate followed the old length.
    """
    path = run_folder(config) / "config.yaml"
    if not path.is_file():
        return
    before = load_config(path)
    longer = config.max_steps >= before.max_steps and config.optimizer.schedule == "constant"
    old, new = settings(before), settings(config)
    free = MAY_CHANGE if longer else [key for key in MAY_CHANGE if key != "max_steps"]
    changed = [f"{key}={old[key]}, now it is {new[key]}" for key in new if key not in free and old[key] != new[key]]
    if changed:
        raise ConfigError(
            f"{run_folder(config)} was trained with {'; '.join(changed)}: it cannot go on as the run that is asked "
            "for. Only its length may grow, where the learning rate is constant, and how often it saves and validates "
            "change. Leave the change out, delete that folder, or train into another one with output=FOLDER"
        )


def settings(config: RunConfig) -> dict[str, object]:
    """Returns section.key -> value, as a run file has it."""
    flat: dict[str, object] = {}
    for name, value in config.model_dump(mode="json").items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def load_ablations(path: Path) -> Ablations:
    """Reads a file of ablations. Raises ConfigError for what cannot be read or understood."""
    try:
        tree = read_yaml(path, "Correct it")
        refuse_other_kind(tree, path, ABLATIONS)
        return Ablations.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain_errors(error, Ablations)}") from None
    except (OSError, Damaged) as error:
        raise ConfigError(str(error)) from error


def planned_runs(grid: Ablations, run_file: Path, overrides: Sequence[str] = ()) -> list[tuple[str, int, list[str]]]:
    """Returns the variant, seed and overrides of every run, in the order in which they are trained."""
    output = load_config(run_file, [*grid.changes, *overrides]).output / grid.name
    planned = []
    for name, variant in grid.variants.items():
        for seed in variant.seeds or grid.seeds:
            run = f"{name.replace(' ', '-').replace('=', '-').replace(chr(39), '')}-{seed}"
            own = [*grid.changes, *variant.changes, f"seed={seed}", *overrides, f"name={run}", f"output={output}"]
            planned.append((name, seed, own))
    return planned
