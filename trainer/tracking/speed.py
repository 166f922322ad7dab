"""Writes speed.json, what the steps of a run have cost."""

import json
from statistics import median
from typing import Any

from controlbooth.trainer.run.attempt import Attempt, write_text
from controlbooth.trainer.tracking.spool import read_metrics


def write_speed(attempt: Attempt, **facts: Any) -> None:
    """Writes speed.json: medians over the run's logged steps, and the largest of their peak memories in GiB.

    The first three steps, which still warm up, are left out where there are more. Without any steps, as in a run whose
    metrics.jsonl is gone, no file is written.
    """
    told = ("step_seconds", "samples_per_second", "stall_percent", "peak_memory_gib")
    steps = [metrics for _, _, metrics in read_metrics(attempt.run) if metrics.keys() >= {*told}]
    steps = steps[3:] or steps
    if not steps:
        return
    medians = {name: median(m[name] for m in steps) for name in ("step_seconds", "samples_per_second", "stall_percent")}
    peak = max(m["peak_memory_gib"] for m in steps)
    text = json.dumps(medians | {"peak_memory_gib": peak, "steps": len(steps)} | facts)
    write_text(attempt, attempt.run / "speed.json", text)
