"""What the pages of both kinds of run share: state, attempts, configuration, speed, time left."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlbooth.data.files.records import Damaged, is_text, parse_json, parse_yaml
from controlbooth.data.secrets import shown
from controlbooth.launch.job.job import RECORD as JOB
from controlbooth.launch.job.outcome import ANEW, STATUS
from controlbooth.launch.progress import duration
from controlbooth.launch.watch.failures import Failure
from controlbooth.launch.watch.files import Files
from controlbooth.launch.watch.metrics import Metrics
from controlbooth.trainer.run.continuing import ATTEMPT, RECORD
from controlbooth.trainer.tracking.spool import LINES, Record

OVER = ("finished", "failed", "stopped")
SILENT_SECONDS = 60.0
"""Without news of a run that should be running; its machine is measured more often, unless it is set otherwise."""
SILENT_PERIODS = 6
"""Of tracking.system_metrics_seconds, likewise."""


@dataclass(frozen=True)
class State:
    """What a run is doing."""

    word: str
    """running, starting, waiting, silent, stopped, finished or failed: also the class of its badge."""
    more: str = ""
    """What else is to be said of it."""
    remedy: str = ""
    """What to do, where something is wrong."""


def status_of(files: Files) -> Record:
    return files.read("status.json", _status, {})


def attempt_of(files: Files) -> Record:
    """Reads who has taken the run last."""
    return files.read(RECORD, _attempt, {})


def job_of(files: Files) -> Record:
    """Reads which job was submitted for the run."""
    return files.read("job/job.json", _job, {})


def configuration(files: Files) -> dict[str, Any]:
    return files.read("config.yaml", _mapping, {})


def configuration_text(files: Files) -> str:
    """Returns config.yaml as it may be shown."""
    return files.read("config.yaml", _shown_text, "")


def field(tree: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """Returns a value of a configuration by its dotted name, where it is of a kind, and `default` else."""
    value: Any = tree
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else default


def news_of(files: Files, *names: str) -> float | None:
    """Returns when the newest of some files was written, in seconds since 1970; None where there is none."""
    stamps = [files.stamp(name) for name in (LINES, "status.json", RECORD, *names)]
    return max((stamp.changed / 1e9 for stamp in stamps if stamp is not None), default=None)


def is_fresh(tree: dict[str, Any], news: float | None, now: float) -> bool:
    """Tells whether there is news of a run as lately as a living training writes some."""
    period = float(field(tree, "tracking.system_metrics_seconds", (int, float), 10.0))
    return news is not None and now - news < max(SILENT_SECONDS, SILENT_PERIODS * period)


def state_of(files: Files, news: float | None, failures: Sequence[Failure], now: float) -> State:
    """Tells what a run is doing, from its status, who has taken it, and how old the last news is."""
    status, attempt = status_of(files), attempt_of(files)
    said, began = status.get("state"), attempt.get("time") or 0.0
    fresh = is_fresh(configuration(files), news, now)
    failed_since = [one for one in failures if (one.when or 0.0) >= began]
    if said in OVER:
        again = began > (status.get("time") or 0.0)
        return State("running", "started again") if again and fresh and not failed_since else State(str(said))
    if said is None and not attempt:
        return State("waiting", "submitted, and not begun" if job_of(files) else "not begun")
    if fresh and not failed_since:
        return State("running") if said else State("starting")
    if failed_since:
        return State("failed")
    return silent(attempt, news, now)


def silent(attempt: Record, news: float | None, now: float) -> State:
    """Describes a run that should be at work and of which there is no news."""
    host, process = attempt.get("host"), attempt.get("process")
    since = f"no news for {duration(now - news)}" if news is not None else "no news"
    if process is not None and host == socket.gethostname() and not Path("/proc", str(process)).exists():
        return State("silent", f"{since}: its process {process} has ended without a word", f"Start it again: {GOES_ON}")
    where = f"whether process {process} on {host} lives" if process is not None and host else "at its log"
    return State("silent", since, f"Look {where}. Started again, {GOES_ON}")


GOES_ON = "it goes on from its latest checkpoint"


def steps_a_second(records: Sequence[Record]) -> float:
    """Computes the speed over records of steps; 0 where it cannot be told."""
    if len(records) < 2:
        return 0.0
    seconds = records[-1]["time"] - records[0]["time"]
    return max(0.0, (records[-1]["step"] - records[0]["step"]) / seconds) if seconds > 0 else 0.0


def attempts(metrics: Metrics) -> list[dict[str, Any]]:
    """Lists the starts of a run as its metrics.jsonl tells them, the newest first: begin, end, what it came to, and
    the settings that it changed. An end that nothing tells, as of a process that was killed, is None."""
    found: list[dict[str, Any]] = []
    for when, status in metrics.statuses:
        if status == "SCHEDULED" or (status == "RUNNING" and found and when - found[-1]["begin"] < SAME_START_SECONDS):
            continue
        if status == "RUNNING" or not found:
            found.append({"begin": when, "end": None, "came_to": "", "changed": []})
        if status != "RUNNING":
            found[-1] |= {"end": when, "came_to": ENDS.get(status, status.lower())}
    for when, name, value in metrics.changed:
        of = [one for one in found if one["begin"] <= when]
        if of:
            of[-1]["changed"].append(f"{name}={shown(value)}")
    return [{"number": number, **one} for number, one in enumerate(found, 1)][::-1]


SAME_START_SECONDS = 5.0
"""Within which a start may say twice that it runs, as that of a subject does."""
ENDS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
"""What MLflow calls the ends of a run, by our words."""


def _status(content: bytes, where: str) -> Record:
    return parse_json(content, where, ANEW, STATUS)


def _attempt(content: bytes, where: str) -> Record:
    return parse_json(content, where, "Delete it if no other training is there", ATTEMPT)


def _job(content: bytes, where: str) -> Record:
    return parse_json(content, where, "Submit the run again", {**JOB, "id": is_text})


def _shown_text(content: bytes, _: str) -> str:
    return shown(content.decode(errors="replace"))


def _mapping(content: bytes, where: str) -> dict[str, Any]:
    tree = parse_yaml(content.decode(errors="replace"), where, ANEW)
    if not isinstance(tree, dict):
        raise Damaged(where, "it holds no mapping", ANEW)
    return tree
