"""`controlbooth dreambooth run`: starts the ranks that train a manifest of subjects on this machine."""

from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser
from controlbooth.data.errors import UserError
from controlbooth.launch.preflight.subjects import checked_subjects, folder_problems, run_problems
from controlbooth.launch.ranks.local import run, start_of, this_node
from controlbooth.launch.ranks.torchrun import SUBJECTS_WORKER
from controlbooth.trainer.config.subjects import SubjectRunConfig, load_run
from controlbooth.trainer.dreambooth.manifest import Task, check_full, share_of_rank
from controlbooth.trainer.dreambooth.network_check import subjects_network_problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = verb_parser(
        "dreambooth run",
        "Trains all subjects of a manifest, several in each batch, on this machine. Started again, it goes "
        "on where it was; subjects that had failed are tried again. A subject that fails stops no other.",
        """manifest, as YAML (or the same columns in CSV, JSONL or Parquet):
  - {name: rex, images: photos/rex, class_noun: dog}
  - {name: mug, images: photos/mug, class_noun: mug, identifier: olis, steps: 1200, learning_rate: 5e-5, rank: 8}

examples:
  controlbooth dreambooth run subjects.yaml launch/configs/dreambooth.yaml --dry-run
  controlbooth dreambooth run subjects.yaml run.yaml subjects_per_batch=16 --processes 8
  controlbooth dreambooth run subjects.yaml run.yaml method=full instance_batch_size=2 --processes 2""",
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
        raise UserError("; ".join(problems))
    if options.dry_run and (problems := list(subjects_network_problems(config))):
        raise UserError("; ".join(problems))
    tasks, faults = checked_subjects(config, options.subjects, "dreambooth run", open_pictures=options.dry_run)
    print(plan(config, tasks, node.processes), flush=True)
    start = start_of(node, str(options.subjects), [str(options.run), *options.overrides], config.name, SUBJECTS_WORKER)
    if options.dry_run:
        print(f"command    {start}")
        return 2 if faults else 0
    return run(start, stopping="after this step, with the state of all subjects")


def plan(config: SubjectRunConfig, tasks: Sequence[Task], processes: int) -> str:
    """Describes what is about to run, for a person to check at a glance."""
    classes = sorted({task.class_prompt for task in tasks})
    steps = [sum(task.steps for task in share_of_rank(tasks, rank, processes)) for rank in range(processes)]
    texts = " and text encoders" if config.train_text_encoder else ""
    trained = f"LoRA of rank {config.adapter.rank} on {config.adapter.layers}{texts}"
    together = f"{config.subjects_per_batch} together on each of {processes} ranks"
    if config.method == "full":
        check_full(config, processes)
        steps = [sum(task.steps for task in tasks)]
        trained = f"all layers{' and the text encoders' if config.train_text_encoder else ''}"
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
