"""What a run folder's metrics.jsonl says, beside what MLflow's server has of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlbooth.trainer.tracking.mlflow_run import metric_name
from controlbooth.trainer.tracking.spool import read_metrics


@dataclass(frozen=True)
class Count:
    """Points: a metric's value at a step."""

    sent: int
    lost: int
    """In metrics.jsonl and not at the server."""
    twice: int
    """More at the server than in metrics.jsonl, be they repeated or others."""

    def __add__(self, other: "Count") -> "Count":
        return Count(self.sent + other.sent, self.lost + other.lost, self.twice + other.twice)

    def __str__(self) -> str:
        return f"{self.sent:,} points sent, {self.sent - self.lost:,} found, {self.lost} lost, {self.twice} twice"


def run_id(folder: Path) -> str:
    return json.loads((folder / "tracking.json").read_text())["run_id"]


def count(client: Any, folder: Path) -> Count:
    """client: a MlflowClient of the server. Asks for every point of every metric of the file."""
    ours: dict[str, list[tuple[int, float]]] = {}
    for step, _, metrics in read_metrics(folder):
        for name, value in metrics.items():
            ours.setdefault(metric_name(name), []).append((step, value))
    lost = more = 0
    for name, points in ours.items():
        there = [(point.step, point.value) for point in client.get_metric_history(run_id(folder), name)]
        lost += len(set(points) - set(there))
        more += len(there) - len(set(there) & set(points))
    return Count(sum(map(len, ours.values())), lost, more)
