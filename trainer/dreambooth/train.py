"""Training many subjects: `torchrun ... -m controlbooth.trainer.dreambooth.train subjects.yaml run.yaml`.

Each rank trains its share of the manifest, several subjects in one batch, and asks nobody in between: ranks meet only
before the first step and after the last. A subject that ends makes room for the next. State is saved every so many
steps and whenever a subject ends; the same command goes on from there, with as many ranks or with others.

With `--rows 8:16` it trains these rows of the manifest alone, as one task of an array whose tasks know nothing of each
other: what they share is the folder of the run, in which each keeps its own state. Whatever a task writes is made in
the folder of this start of it (attempt.py), so an old start that wakes up puts nothing over its successor's results.

    RUN/subjects/NAME/pytorch_lora_weights.safetensors      what diffusers' load_lora_weights reads
                      status.json                           waiting, training, finished or failed, and why
                      metrics.jsonl                         losses and figures of each step (subject_tracking.py)
    RUN/base.json                                           what the base was when the run began (same_base.py)
    RUN/state/of-2/rank-0.safetensors                       the subjects in training, the queue, the optimizer
    RUN/rows/8-16/state/...                                 the same of one task of an array
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


from controlbooth.data.secrets import error_text
from controlbooth.models.attention import apply_attention, kernels_for
from controlbooth.models.base import Base
from controlbooth.models.recomputing import recompute
from controlbooth.trainer.config.run import activation_problems, base_folder
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig, load_run
from controlbooth.trainer.dreambooth.batches import draw_prior
from controlbooth.trainer.dreambooth.full import train_fully
from controlbooth.trainer.dreambooth.manifest import Task, check_full, load_subjects, record_texts, settle
from controlbooth.trainer.dreambooth.network_check import subjects_network_problems
from controlbooth.trainer.dreambooth.session import SubjectRun
from controlbooth.trainer.dreambooth.stack import stack_attention_shapes, train_stacked
from controlbooth.trainer.dreambooth.status import failures, unfinished, write_status
from controlbooth.trainer.dreambooth.tracking import SubjectTracking, Untracked
from controlbooth.trainer.dreambooth.validation import open_studio
from controlbooth.trainer.dreambooth.words import check_words
from controlbooth.trainer.engine.deepspeed import DTYPES, resolve_precision
from controlbooth.trainer.engine.device import device_name
from controlbooth.trainer.engine.distributed import World, barrier, end_process, from_first_rank, join, leave
from controlbooth.trainer.run.attempt import Attempt, Superseded, only_run, write_text
from controlbooth.trainer.run.attention import choose_once
from controlbooth.trainer.run.base import once_a_machine, open_base, with_usual_guidance
from controlbooth.trainer.run.failures import end_superseded, note_failure
from controlbooth.trainer.run.frozen import describe_frozen, hold_base, loading_device, quantize_encoders
from controlbooth.trainer.run.process import StopRequest, quiet_libraries
from controlbooth.trainer.run.same_base import (
    BASE_FILE,
    base_facts,
    check_same_base,
    describe_base_changes,
    read_base_facts,
)
from controlbooth.trainer.run.starting import folder_problems, refuse
from controlbooth.trainer.tracking.mlflow_address import tracking_problems
from controlbooth.trainer.tracking.open import report_page
from controlbooth.trainer.tracking.run_page import source_tags


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m controlbooth.trainer.dreambooth.train",
        description="One rank of a DreamBooth run. Start it with torchrun, or with `controlbooth dreambooth run`.",
    )
    parser.add_argument("subjects", type=Path, metavar="SUBJECTS", help="a YAML, CSV, JSONL or Parquet list")
    parser.add_argument("run", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--rows", metavar="FIRST:END", help="train these rows of the manifest alone, counted from 0")
    options = parser.parse_intermixed_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    stop = StopRequest()
    quiet_libraries()
    try:
        config = load_run(options.run, options.overrides)
        for problem in () if options.rows else subjects_network_problems(config):  # of an array it is noted below
            raise ConfigError(problem)  # before the run's folder is taken, and anything is written
        subjects, faults = load_subjects(options.subjects)
        tasks, more = settle(subjects, config)
        split, _ = check_words(tasks, config)
        tasks, more = [task for task in tasks if task.name not in split], more | split
        faults |= more
        folder = own = config.output / config.name
        if options.rows:
            rows = read_rows(options.rows, len(subjects))
            own = own_folder(folder, rows)
            names = {subject.name for subject in subjects[rows.start : rows.stop]}
            tasks = [task for task in tasks if task.name in names]
            faults = {name: fault for name, fault in faults.items() if name in names}
        elif others := sorted((folder / "rows").glob("*")):
            raise ConfigError(f"{folder} was begun as an array ({others[0]}): go on with `controlbooth launch resume`")
        world = join(config.engine.deterministic, config.engine.tf32)
        if world.rank == 0:  # the others end with it
            refuse([*tracking_problems(config), *folder_problems(own)])
        with only_run(own, world) as attempt:
            try:
                return train_subjects(config, tasks, faults, attempt, world, stop, folder)
            except (ValueError, OSError) as error:
                if options.rows:  # whether a task of an array is to be tried again is read from there
                    note_failure(attempt, rank, error)
                raise
    except Superseded as error:
        end_superseded(error, rank)
    except (ValueError, OSError) as error:
        print(f"\nrank {rank}: {error_text(error)}", file=sys.stderr, flush=True)  # not behind a bar
        os._exit(2)
    finally:
        leave()


def own_folder(folder: Path, rows: range) -> Path:
    """Returns the folder of the array task that trains these rows.

    Raises ConfigError where the run was begun without an array, or where another task trains some of these rows as
    well.
    """
    if (folder / "state").exists():
        raise ConfigError(f"{folder} was begun by `controlbooth dreambooth run`: go on with that, or take another name")
    for other in (folder / "rows").glob("*-*"):
        first, end = map(int, other.name.split("-"))
        if (first, end) != (rows.start, rows.stop) and first < rows.stop and rows.start < end:
            raise ConfigError(
                f"{folder} was begun with other tasks: rows {first}:{end} and {rows.start}:{rows.stop} overlap. Take "
                "as many --subjects-per-task as before, or another name for the run"
            )
    return folder / "rows" / f"{rows.start}-{rows.stop}"


def read_rows(text: str, count: int) -> range:
    """Reads FIRST:END as a range of `count` rows. Raises ConfigError unless 0 <= FIRST < END <= count."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end) <= count):
        raise ConfigError(f"--rows is {text!r}, but it is FIRST:END, with 0 <= FIRST < END <= {count}")
    return range(int(first), int(end))


def train_subjects(
    config: SubjectRunConfig,
    tasks: Sequence[Task],
    faults: dict[str, str],
    attempt: Attempt,
    world: World,
    stop: StopRequest,
    folder: Path,
) -> int:
    """Trains all subjects that are not finished. Returns 0, also after a stop, or 1 where a subject has failed.

    folder: the folder of the run. attempt.run is the same, or, in an array, the part of it that belongs to these tasks
    alone.
    """
    own = attempt.run
    zero_stage = config.engine.zero_stage if config.method == "full" else 1
    precision = resolve_precision(config.precision, world.device, zero_stage)
    if config.method == "full":
        check_full(config, world.world_size)
    for problem in activation_problems(config.engine, world.device.type == "cuda"):
        raise ConfigError(problem)
    base = open_base(config, DTYPES[precision], loading_device(config, world.device), once_a_machine(world))
    quantize_encoders(config, base)
    hold_base(config, base, world)
    config = with_usual_guidance(config, base)
    go_on_with_base(attempt, folder, base, world)
    attention = choose_once(
        config.model.attention,
        world,
        precision,
        attempt,
        lambda: stack_attention_shapes(config, base),
        kernels_for(base.family.is_transformer),
    )
    apply_attention(base.denoiser, attention)
    recompute(base.denoiser, config.model.gradient_checkpointing)
    if config.model.gradient_checkpointing:
        base.denoiser.train()  # without which it is passed over; there is no dropout
    if world.rank == 0:
        if own == folder:  # of an array all subjects are in the record, which who submitted it has written
            for name, text in record_texts(config, tasks).items():
                write_text(attempt, folder / name, text)
        for name, fault in faults.items():
            write_status(attempt, folder, name, state="failed", error=fault)
        if line := describe_frozen(config, base, world):
            print(line, flush=True)
    barrier()
    tags = run_tags(config, base, attention.name, precision, world)
    writes = config.method == "lora" or world.rank == 0
    tracking = Untracked()  # of ranks that train a subject together the first logs
    if writes:
        tracking = SubjectTracking(config, folder, attempt, world, tags, partial(report_page, world))
    with tracking.open(faults if world.rank == 0 else {}) as closing:
        studio = open_studio(config, folder, attempt, tracking, world.device, writes)
        draw_prior(config, base, tasks, world)
        run = SubjectRun(config, base, attention, precision, folder, attempt, world, stop, studio)
        is_full = config.method == "full"
        stopped = train_fully(run, unfinished(folder, tasks)) if is_full else train_stacked(run, tasks, faults)
        closing.stopped = stopped
    barrier()  # the first rank takes the attempt's folder away, without which the others send nothing more
    failed = failures(folder, tasks) | faults
    if world.rank == 0:
        finished = len(tasks) - len(unfinished(folder, tasks))
        left = f", {len(tasks) + len(faults) - finished - len(failed)} to go" if stopped else ""
        print(f"{finished} subjects finished, {len(failed)} failed{left}: {folder}")
        for name, error in failed.items():
            print(f"  {name}: {error}")
    return 1 if failed else 0


def go_on_with_base(attempt: Attempt, folder: Path, base: Base, world: World) -> None:
    """Notes the base in the run's base.json, or raises ConfigError where it is not the one that is noted there.

    Every rank calls this, and all of them raise or none.
    """
    saved = from_first_rank(read_base_facts(folder) if world.rank == 0 else None)
    begun = "when this run began"
    if saved is None:
        if world.rank == 0:
            if (folder / "subjects").is_dir():
                for line in describe_base_changes({}, begun):
                    print(line, file=sys.stderr, flush=True)
            write_text(attempt, folder / BASE_FILE, json.dumps(base_facts(base), indent=1))
        return
    remedy = f"Put it back as it was, or give the run another name: {folder} holds subjects that were trained on that"
    check_same_base(saved, base, begun, remedy)
    if world.rank == 0:
        for line in describe_base_changes(saved, begun):
            print(line, file=sys.stderr, flush=True)


def run_tags(config: SubjectRunConfig, base: Base, attention: str, precision: str, world: World) -> dict[str, str]:
    """Returns the tags of the job in MLflow, by which runs are filtered."""
    return {
        "task": "dreambooth",
        "method": config.method,
        "base": base_folder(config.model.base).name,
        "family": base.family.name,
        "base_digest": base.digest,
        "attention": attention,
        "precision": precision,
        "world_size": str(world.world_size),
        "device": device_name(world.device),
        **source_tags("controlbooth.trainer.dreambooth.train"),
    }


if __name__ == "__main__":
    end_process(main())
