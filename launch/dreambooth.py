"""`controlbooth dreambooth run`: starts the ranks that train a manifest of subjects on this machine."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from controlbooth.launch.local import run, start_of, this_node
from controlbooth.launch.preflight import base_problems
from controlbooth.trainer.config import base_folder
from controlbooth.trainer.network_check import subjects_network_problems
from controlbooth.trainer.starting import tracking_problems, unwritable
from controlbooth.trainer.subjects import (
    SubjectRunConfig,
    Task,
    check_full,
    check_pictures,
    load_run,
    load_subjects,
    settle,
    share_of_rank,
)
from controlbooth.trainer.words import check_words

WORKER = "controlbooth.trainer.dreambooth"
VAE_FACTOR = 8
"""Pixels of a side that are one of the latents', with every base."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="controlbooth dreambooth run",
        description="Trains all subjects of a manifest, several in each batch, on this machine. Started again, it goes "
        "on where it was; subjects that had failed are tried again. A subject that fails stops no other.",
        epilog="""manifest, as YAML (or the same columns in CSV, JSONL or Parquet):
  - {name: rex, images: photos/rex, class_noun: dog}
  - {name: mug, images: photos/mug, class_noun: mug, identifier: olis, steps: 1200, learning_rate: 5e-5, rank: 8}

examples:
  controlbooth dreambooth run subjects.yaml launch/configs/dreambooth.yaml --dry-run
  controlbooth dreambooth run subjects.yaml run.yaml subjects_per_batch=16 --processes 8
  controlbooth dreambooth run subjects.yaml run.yaml method=full instance_batch_size=2 --processes 2""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subjects", type=Path, metavar="SUBJECTS", help="the manifest")
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="what the subjects share")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, set here")
    parser.add_argument("--processes", type=int, help="ranks (default: one per GPU, or 1 on a machine without)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all subjects and open their pictures, and tell the plan; start nothing",
    )
    options = parser.parse_intermixed_args(arguments)
    config = load_run(options.run, options.overrides)
    node = this_node(options.processes)
    if problems := [*folder_problems(config), *run_problems(config)]:
        raise ValueError("; ".join(problems))
    if options.dry_run and (problems := list(subjects_network_problems(config))):
        raise ValueError("; ".join(problems))
    tasks, faults = checked_subjects(config, options.subjects, "dreambooth run", open_pictures=options.dry_run)
    print(plan(config, tasks, node.processes), flush=True)
    start = start_of(node, str(options.subjects), [str(options.run), *options.overrides], config.name, WORKER)
    if options.dry_run:
        print(f"command    {start}")
        return 2 if faults else 0
    return run(start, stopping="after this step, with the state of all subjects")


def run_problems(config: SubjectRunConfig) -> Iterator[str]:
    """What would stop all subjects, wherever they are trained."""
    problems = list(base_problems(config.model.base, config.model.family))
    yield from problems
    unet, size = base_folder(config.model.base) / "unet" / "config.json", config.resolution
    if problems or config.prior.weight == 0 or not unet.is_file():  # of a single file the trainer knows it
        return
    sample_size = json.loads(unet.read_text()).get("sample_size")
    if isinstance(sample_size, int) and sample_size * VAE_FACTOR != size:
        drawn = sample_size * VAE_FACTOR
        yield (
            f"resolution is {size}, and the base draws {drawn} x {drawn}: class pictures are drawn at the base's own "
            f"size. Set resolution to {drawn}, or prior.weight to 0"
        )


def folder_problems(config: SubjectRunConfig) -> Iterator[str]:
    """Of folders to be written on this machine, or on a disk that it sees."""
    yield from tracking_problems(config)
    written = [("output", config.output, config.output / config.name)]
    if config.prior.weight and config.prior.cache is not None:
        written.append(("prior.cache", config.prior.cache, config.prior.cache))
    for field, value, folder in written:
        if why := unwritable(folder):
            yield f"{field} is {str(value)!r}, but {why}. Give another folder"


def checked_subjects(
    config: SubjectRunConfig, manifest: Path, program: str, open_pictures: bool
) -> tuple[list[Task], dict[str, str]]:
    """The subjects that can be trained, and what is wrong with the others, by name, which is printed.

    open_pictures: each one, as training does when a subject begins. Raises ValueError where no subject can be trained.
    """
    subjects, faults = load_subjects(manifest)
    tasks, more = settle(subjects, config)
    split, warnings = check_words(tasks, config)
    faults |= more | split
    if open_pictures:
        faults |= check_pictures([task for task in tasks if task.name not in faults], config.resolution)
    for name, message in [*faults.items(), *((name, f"warning: {text}") for name, text in warnings.items())]:
        print(f"controlbooth {program}: {name}: {message}", file=sys.stderr)
    tasks = [task for task in tasks if task.name not in faults]
    if not tasks:
        raise ValueError(f"{manifest} has no subject that can be trained")
    return tasks, faults


def plan(config: SubjectRunConfig, tasks: Sequence[Task], processes: int) -> str:
    """What is about to run, for a person to check at a glance."""
    classes = sorted({task.class_prompt for task in tasks})
    steps = [sum(task.steps for task in share_of_rank(tasks, rank, processes)) for rank in range(processes)]
    trained = f"LoRA of rank {config.adapter.rank} on {config.adapter.layers}"
    together = f"{config.subjects_per_batch} together on each of {processes} ranks"
    if config.method == "full":
        check_full(config, processes)
        steps = [sum(task.steps for task in tasks)]
        trained = f"all layers of the U-Net{' and the text encoder' if config.train_text_encoder else ''}"
        together = f"one after another on {processes} ranks, ZeRO-{config.engine.zero_stage}"
    prior = f"{config.prior.images} of each of {len(classes)} classes, weight {config.prior.weight:g}"
    lines = [
        f"run        {config.name} in {config.output / config.name}, which is resumed if it has begun",
        f"model      {config.model.base}, {trained}",
        f"subjects   {len(tasks)}, {together}",
        f"steps      {sum(steps)} of single subjects, {max(steps)} on the busiest rank",
        f"prior      {prior if config.prior.weight else 'none'}",
    ]
    for task in tasks[:5]:
        lines.append(
            f"           {task.name}: {len(task.images)} pictures, {task.instance_prompt!r}, {task.steps} steps"
        )
    if len(tasks) > 5:
        lines.append(f"           and {len(tasks) - 5} more")
    return "\n".join(lines)
