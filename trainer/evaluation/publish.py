"""An evaluation in MLflow: one table, a few figures as metrics, its grid, and a part of the run's description."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlbooth.data.files.locks import open_lock, take_lock
from controlbooth.data.files.records import is_text, read_note
from controlbooth.data.files.whole import write_whole
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.evaluation.figures import evaluation_table
from controlbooth.trainer.run.best import FIGURES
from controlbooth.trainer.run.failures import STATUS
from controlbooth.trainer.tracking.mlflow_run import EVALUATION
from controlbooth.trainer.tracking.open import IN_MLFLOW, open_tracker
from controlbooth.trainer.tracking.tracker import table_json

WITH = "with control"
COLUMNS = ("mean", "chance", "share", "low", "high")
"""Of the table, beside the figure and the kind of pictures; share is that of what is possible."""
TABLE = "evaluation-table.json"
"""Of the artifacts in MLflow, and in the folder of the evaluation."""


def publish(run: Path, config: RunConfig, result: Mapping[str, Any]) -> None:
    """Logs the evaluation that lies in RUN/evaluation, with the report; a training run keeps MLflow to itself.

    result: what evaluation.json holds. Prints how to open the run's page.
    """
    folder = run / "evaluation"
    with open_lock(run / ".lock") as lock:
        if not take_lock(lock, "publish an evaluation when nothing trains in it"):
            print(f"{run} is training, so MLflow gets these figures when it is evaluated after that")
            return
        write_whole(folder / TABLE, table(result).encode())
        tracker = open_tracker(run, config, {})
        tracker.log(result["step"], headline(result))
        tracker.log_table(folder / TABLE)
        for file in (run / "report.html", folder / "evaluation.json", folder / "evaluation.png"):
            if file.exists():
                tracker.log_artifact(file)
        tracker.describe(evaluation=described(result), figures=evaluation_table(result))
        status = read_note(run / STATUS, "The next start writes it anew", {"state": is_text})
        tracker.finish(IN_MLFLOW.get(status.get("state", ""), "KILLED"))
        tracker.close(timeout_seconds=60.0)
        if ways := tracker.how_to_open():
            print(f"MLflow: {', then '.join(ways)}")


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """Picks, of the pictures with control, the figures by which control is judged; of the first also chance and share.

    They are metrics by name. All others are in the table: a chart of a single point shows nothing.
    """
    controlled = result["figures"][WITH]
    told = [name for name in FIGURES if name in controlled]
    figures = {name: controlled[name]["mean"] for name in told}
    for name in told[:1]:
        beside = {f"{name}_{what}": mean(controlled[name].get(what)) for what in ("chance", "share")}
        figures |= {name: value for name, value in beside.items() if value is not None}
    return {f"{EVALUATION}{name}": value for name, value in figures.items()}


def mean(figure: Any) -> float | None:
    """Returns the mean of a figure that has an interval, or the figure itself where it is a number or None."""
    return figure.get("mean") if isinstance(figure, Mapping) else figure


def table(result: Mapping[str, Any]) -> str:
    """Makes the table for Tracker.log_table, as JSON: a row for each figure and kind of pictures, with the COLUMNS."""
    variants = result["figures"]
    names = dict.fromkeys(name for own in variants.values() for name in own)
    rows: list[list[str | float]] = []
    for name in names:
        for variant, own in variants.items():
            if one := own.get(name):
                rows.append([name, variant, *(cell(mean(one.get(column))) for column in COLUMNS)])
    for name, one in result["sets"].items():
        rows += [[name, variant, cell(value), *[""] * (len(COLUMNS) - 1)] for variant, value in one["values"].items()]
    return table_json(["figure", "pictures", *COLUMNS], rows)


def cell(value: float | None) -> str | float:
    """Rounds a value to 4 decimal places; an unknown one becomes "", as JSON has neither NaN nor infinity."""
    return "" if value is None or not math.isfinite(value) else round(value, 4)


def described(result: Mapping[str, Any]) -> str:
    """Writes a sentence of Markdown for the run's description, with the first figure by which control is judged."""
    controlled = result["figures"][WITH]
    name = next((name for name in FIGURES if name in controlled), None)
    if name is None:
        return f"**Evaluation** of step {result['step']:,} on {result['samples']} held-out samples."
    chance, share = (mean(controlled[name].get(what)) for what in ("chance", "share"))
    beside = "" if chance is None else f", chance {chance:.3f}"
    beside += "" if share is None else f": {share:.0%} of what is possible"
    return (
        f"**Evaluation** of step {result['step']:,} on {result['samples']} held-out samples: {name.replace('_', ' ')} "
        f"{controlled[name]['mean']:.3f}{beside}."
    )
