"""status.json of each subject: what it has come to, and which are still to be trained."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlbooth.data.files.records import is_text, is_whole, maybe, read_note
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.run.attempt import Attempt, write_text

MOST_SKIPPED = 10
"""Updates in a row without a finite gradient after which a subject has failed."""


def divergence(task: Task, step: int, skipped: int, loss: float, finite_weights: bool) -> str | None:
    """Returns why a subject trained up to this step has failed, or None where it may go on or has ended well.

    skipped: updates in a row without a finite gradient. A few are tolerated, but not a last step whose loss is not
    finite: the weights that would be written are then ones with which the network computes no numbers.
    """
    if skipped > MOST_SKIPPED:
        what = f"{skipped} updates in a row had no finite gradient, up to step {step}"
    elif not finite_weights:
        what = f"its weights are no finite numbers after step {step}"
    elif step >= task.steps and not math.isfinite(loss):
        what = f"its loss is {loss} at its last step, {step}"
    else:
        return None
    return f"{what}. Lower its learning_rate={task.learning_rate:g}, or look at its pictures"


def status_of(folder: Path, name: str) -> dict[str, Any]:
    """Returns what a subject's status.json says, or {} where there is none or it is damaged.

    The subject then counts as not finished, and is trained again to the same weights.
    """
    fields = {"state": maybe(is_text), "step": maybe(is_whole), "error": maybe(is_text)}
    return read_note(folder / "subjects" / name / "status.json", "Its subject counts as not finished", fields)


def write_status(attempt: Attempt, folder: Path, name: str, **fields: object) -> None:
    """Writes status.json of a subject of the run in `folder`.

    Raises Superseded where a newer start trains the subject.
    """
    write_text(attempt, folder / "subjects" / name / "status.json", json.dumps(fields))


def unfinished(folder: Path, tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if status_of(folder, task.name).get("state") != "finished"]


def failures(folder: Path, tasks: Sequence[Task]) -> dict[str, str]:
    statuses = {task.name: status_of(folder, task.name) for task in tasks}
    return {name: str(status["error"]) for name, status in statuses.items() if status.get("state") == "failed"}
