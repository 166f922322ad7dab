"""What a run's folder tells of itself, whoever has started it: state, step, speed, time left, losses, its MLflow page.

Free of torch. Nothing is asked but files, and the locks that a training holds on this machine or on a shared disk.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from controlbooth.data.files.locks import is_locked
from controlbooth.data.files.records import (
    Damaged,
    Fields,
    are_points,
    is_moment,
    is_text,
    is_whole,
    maybe,
    parse_json,
    read_json_list,
    read_note,
    read_yaml,
)
from controlbooth.launch.job.outcome import ANEW, STATUS
from controlbooth.trainer.config.run import RESOLVED
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.verdict import describe, read_verdict
from controlbooth.trainer.run.continuing import checkpoint_folders
from controlbooth.trainer.tracking.mlflow_address import how_to_open_saved

TAIL_BYTES = 2**20
"""Of the end of metrics.jsonl, in which last steps and figures are looked for."""
LOSSES = 50
"""Steps over which a subject's loss is averaged, since that of one step says little."""
SHOWN = ("loss", "grad_norm", "samples_per_second", "stall_percent", "peak_memory_gib")
Record = dict[str, Any]
STEP: Fields = {"step": is_whole, "time": is_moment, "metrics": are_points}
SUBJECTS: Fields = {"name": is_text, "steps": maybe(is_whole)}


def folder_lines(folder: Path) -> tuple[list[str], bool]:
    """Returns what to print of a run that no job was submitted for, and whether it has failed.

    Raises ConfigError where the folder is that of no run.
    """
    if (folder / "subjects.json").is_file():
        lines, failed = subjects_lines(folder, subject_rows(folder))
        how = "controlbooth dreambooth run SUBJECTS RUN.yaml"
    elif (folder / RESOLVED).is_file() or (folder / "status.json").is_file():
        lines, failed = run_lines(folder)
        how = "controlbooth train RUN.yaml"
    else:
        raise ConfigError(
            f"{folder} holds no {RESOLVED}, status.json or subjects.json, and no job was submitted for it: give the "
            "folder of a run, as the trainer names it when it ends"
        )
    if is_at_work(folder):
        lines.insert(1, "            it is being trained now")
    elif not is_over(folder):
        lines.insert(1, f"            nothing is at work on it, as far as its lock tells; `{how}` goes on")
    return lines, failed


def run_lines(folder: Path) -> tuple[list[str], bool]:
    """Returns what to print of a ControlNet run, and whether it has failed."""
    status, name = read(folder / "status.json"), folder.absolute().name
    state = status.get("state") or "not begun"
    lines = [f"run         {name}: {state}{at_step(folder)}", *details(folder, status)]
    lines += [f"error       {status.get('error')}"] if state == "failed" else []
    return lines, state == "failed"


def at_step(folder: Path) -> str:
    """Returns ` at step 40` for the last step that was logged; an empty text before the first."""
    steps = [record["step"] for record in step_records(folder) if "loss" in record["metrics"]]
    return f" at step {steps[-1]}" if steps else ""


def details(folder: Path, status: Record) -> list[str]:
    """Returns lines about a ControlNet run.

    They give step, speed, losses, validation, checkpoint, verdict on control and MLflow page. status: what its
    status.json says.
    """
    records = step_records(folder)
    steps = [record for record in records if "loss" in record["metrics"]]
    lines = []
    if steps:
        lines.append(f"step        {describe_step(folder, steps, status.get('state') == 'running')}")
        last = steps[-1]["metrics"]
        lines.append("last        " + ", ".join(f"{name} {number(last[name])}" for name in SHOWN if name in last))
    validated = [one for one in records if any(name.startswith("validation/") for name in one["metrics"])]
    if validated:
        figures = {name.partition("/")[2]: value for name, value in validated[-1]["metrics"].items() if "/" in name}
        told = ", ".join(f"{name} {number(value)}" for name, value in figures.items())
        lines.append(f"validation  of step {validated[-1]['step']}: {told}")
    checkpoints = [path for path in checkpoint_folders(folder) if (path / "COMPLETE").is_file()]
    lines += [f"checkpoint  {checkpoints[-1].name}"] if checkpoints else []
    lines += [f"control     {describe(verdict)}"] if (verdict := read_verdict(folder)) else []
    return lines + mlflow_lines(folder)


def describe_step(folder: Path, steps: Sequence[Record], going: bool) -> str:
    """Describes the last step: `40 of 100, 2.1 steps/s, 28 s left, 3 s ago`. going: whether the run's state is that it
    runs, without which no time left is given."""
    step, path = steps[-1]["step"], folder / RESOLVED
    most = None
    if path.is_file():
        with contextlib.suppress(Damaged):  # the next start writes it anew; nothing but this is read of it here
            most = read_yaml(path, "").get("max_steps")
    text = f"{step}" + (f" of {most}" if most else "")
    seconds = steps[-1]["time"] - steps[0]["time"]
    if seconds > 0:
        speed = (steps[-1]["step"] - steps[0]["step"]) / seconds
        text += f", {speed:.3g} steps/s"
        if most and going and speed > 0:
            text += f", {duration((most - step) / speed)} left"
    return f"{text}, {duration(time.time() - steps[-1]['time'])} ago"


def subjects_lines(folder: Path, rows: Sequence[Record]) -> tuple[list[str], bool]:
    """Returns what to print of a run of subjects, which is counts, the time left and a table of all of them, and
    whether any has failed. rows: name and steps of each."""
    tasks = {row["name"]: row for row in rows}
    names = [*tasks, *sorted({path.parent.name for path in folder.glob("subjects/*/status.json")} - tasks.keys())]
    statuses = {name: read(folder / "subjects" / name / "status.json") for name in names}
    counts = Counter(status.get("state") or "waiting" for status in statuses.values())
    lines = [f"subjects    {len(names)}: {counted(counts)}"]
    left = sum(
        max(0, (tasks[name].get("steps") or 0) - (statuses[name].get("step") or 0))
        for name in tasks
        if statuses[name].get("state") not in ("finished", "failed")
    )
    if left and (rate := subject_steps_a_second(folder)):
        lines.append(f"speed       {rate:.3g} steps of single subjects a second, {duration(left / rate)} left")
    lines += [*table(folder, tasks, statuses), *mlflow_lines(folder)]
    return lines, counts["failed"] > 0


def counted(counts: Counter[str]) -> str:
    shown = ", ".join(f"{counts[state]} {state}" for state in ("finished", "training", "waiting", "failed"))
    return shown + (f", {counts['stopped']} stopped" if counts["stopped"] else "")


def table(folder: Path, tasks: dict[str, Record], statuses: dict[str, Record]) -> list[str]:
    """Returns a row for each subject: name, state, step, mean loss of its last steps, and what else is known of it."""
    rows = [("name", "state", "step", "loss", "")]
    for name, status in statuses.items():
        own = folder / "subjects" / name
        records = step_records(own)
        losses = [one["metrics"]["train/instance_loss"] for one in records if "train/instance_loss" in one["metrics"]]
        trained = [one["step"] for one in records if "train/instance_loss" in one["metrics"]]
        step = max([status.get("step") or 0, *trained[-1:]])
        steps = tasks.get(name, {}).get("steps")
        of = str(step) if steps is None else f"{step} of {steps}"
        loss = f"{fmean(map(float, losses[-LOSSES:])):.4f}" if losses else ""
        best = read(own / "best.json").get("step")
        more = str(status["error"]) if status.get("error") else "" if best is None else f"best step {best}"
        rows.append((name, status.get("state") or "waiting", of, loss, more))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "            " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]


def subject_steps_a_second(folder: Path) -> float:
    """Returns the steps of single subjects that all ranks and tasks together take in a second, over their last steps; 0
    where nothing is known."""
    total = 0.0
    for own in (folder, *folder.glob("tracking/*"), *folder.glob("rows/*"), *folder.glob("rows/*/tracking/*")):
        records = step_records(own)[-LOSSES:]
        seconds = records[-1]["time"] - records[0]["time"] if records else 0.0
        if seconds > 0:
            together = [
                float(value)
                for record in records[1:]
                for name, value in record["metrics"].items()
                if name.endswith("/subjects_in_training")
            ]
            total += sum(together) / seconds
    return total


def mlflow_lines(folder: Path) -> list[str]:
    """Returns how the run is opened in MLflow, on at most one line; for an array the folders of its tasks tell it."""
    for own in (folder, *sorted(folder.glob("rows/*"))):
        if ways := how_to_open_saved(own):
            return [f"mlflow      {', then '.join(ways)}"]
    return []


def is_over(folder: Path) -> bool:
    """Tells whether the run has come to its end, well or not, so that nothing has to be at work on it."""
    if not (folder / "subjects.json").is_file():
        return read(folder / "status.json").get("state") in ("finished", "failed")
    names = [row["name"] for row in subject_rows(folder)]
    states = [read(folder / "subjects" / name / "status.json").get("state") for name in names]
    return all(state in ("finished", "failed") for state in states)


def is_at_work(folder: Path) -> bool:
    """Tells whether a training holds the lock of the folder or of a task of its array, as this machine sees it."""
    return any(is_locked(path) for path in (folder / ".lock", *folder.glob("rows/*/.lock")))


def step_records(folder: Path) -> list[Record]:
    """Reads the records of steps at the end of a folder's metrics.jsonl, in order, without a line that is cut off."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    found = []
    for line in lines:
        with contextlib.suppress(Damaged):
            found.append(parse_json(line, str(path), "", STEP))
    return found


def read(path: Path) -> Record:
    """Reads a status, or what else tells of a step; {} where there is none, or with a warning where it is damaged."""
    return read_note(path, ANEW, STATUS)


def subject_rows(folder: Path) -> list[Record]:
    """Reads the name and steps of each subject of a run. Raises Damaged."""
    return read_json_list(folder / "subjects.json", "Start the run again, which writes it anew", SUBJECTS)


def number(value: Any) -> str:
    return f"{float(value):.4g}"


def duration(seconds: float) -> str:
    """Writes seconds as `40 s`, `12 min`, `3 h 5 min` or `2 d 4 h`."""
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    if hours < 2:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
