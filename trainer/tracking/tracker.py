"""Tracking that neither stops a step nor loses a point: the trainer writes lines to a file, a thread sends them on.

Used on rank 0 only; nothing in here talks to other ranks.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from controlbooth.data.secrets import without_secrets
from controlbooth.trainer.config.renamed import with_new_names
from controlbooth.trainer.config.run import refuse_secrets
from controlbooth.trainer.tracking.mlflow_address import how_to_open_saved
from controlbooth.trainer.tracking.mlflow_run import (
    DESCRIPTION,
    METRICS_PER_CALL,
    MlflowRun,
    Refused,
    kind_of,
    quiet_environment,
)
from controlbooth.trainer.tracking.mlflow_store import store_file
from controlbooth.trainer.tracking.spool import STREAMS, Record, Spool, shared_state
from controlbooth.trainer.tracking.system import system_metrics

logger = logging.getLogger(__name__)

SEND_EVERY_SECONDS = 5.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 60.0
PARAM_LENGTH = 500

PARTS = ("what", "control", "evaluation", "details", "figures")
"""Of a run's description. The page shows five lines until it is asked for more, so what was found comes first."""

Status = Literal["SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Input:
    """A data set that a run reads."""

    name: str
    fingerprint: str
    """Hexadecimal."""
    source: str
    """Where it lies: a path or a URI."""
    samples: int
    context: str
    """What it is for: `training`, or `held-out`."""

    @property
    def source_type(self) -> str:
        """Returns `local`, or what the source's URI begins with, such as `s3`."""
        scheme, separator, _ = self.source.partition("://")
        return scheme if separator else "local"


class Tracker:
    """The one run of a run folder, in metrics.jsonl there and in MLflow.

    What is logged is in the file on return; nothing here waits for a server but `close`. Started again on the same
    folder, it sends what is left and goes on with the same MLflow run.
    """

    def __init__(
        self,
        run_folder: str | os.PathLike[str],
        uri: str,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        system_metrics_seconds: float,
        made_in: Path | None = None,
        tell: Callable[[Sequence[str]], None] | None = None,
        status: Status | None = "RUNNING",
        parent: "Tracker | None" = None,
        shared: Path | None = None,
        threads: bool = True,
    ):
        """Opens the run's files, logs its status, params and tags, and starts the threads.

        params: may be nested; changed ones of a resumed run become tags, since MLflow refuses to change a param.
        made_in: the folder of the attempt that has taken the run (attempt.py). When it is gone, nothing more is sent.
        tell: is called once, from a thread, with how to open the run, when MLflow has it.
        parent: the tracker whose run in MLflow is the parent of this one. shared: the folder of a run that several
        processes log to, each through a run_folder of its own. status: None leaves it as it is. threads: sends by
        itself, and logs the machine; without them, call `send_pending`.
        Raises ValueError for a URI with a password in it, before anything is written.
        """
        refuse_secrets(uri)
        quiet_environment()
        if (store := store_file(uri)) is not None:
            store.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(run_folder).absolute()
        identity = None if shared is None else shared_state(shared, uri, experiment)
        self._spool = Spool(self.folder, uri, experiment, made_in, identity)
        self._run_name, self._tell = run_name, tell
        self._parent, self._shared = parent, shared
        self._run: MlflowRun | None = None
        self._generation = -1  # of the lines that it was told about
        self._logged: dict[str, tuple[int, float]] = {}  # metric -> step and time of its last record
        self._retry_at: dict[str, float] = dict.fromkeys(STREAMS, 0.0)
        self._pause: dict[str, float] = dict.fromkeys(STREAMS, 0.0)
        if status is not None:
            self._spool.append({"status": status})
        self._values_changed = self._log_params(flatten(params))
        self.set_tags(tags)
        self._closing = threading.Event()
        self._deadline = 0.0
        self._sampler = threading.Thread(
            target=self._sample, args=(system_metrics_seconds,), name="system metrics", daemon=True
        )
        self._sender = threading.Thread(target=self._send, name="tracking", daemon=True)
        self._threads = [self._sampler, self._sender] if threads else []
        for thread in self._threads:
            thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one value per name at a step. Raises OSError when the disk is full."""
        now = time.time()
        values = {name: float(value) for name, value in metrics.items()}
        self._spool.append({"step": step, "time": now, "metrics": values})
        self._logged |= dict.fromkeys(values, (step, now))

    def log_image(self, path: str | os.PathLike[str], name: str, step: int) -> None:
        """Logs a picture of a series. The file must stay until it is sent."""
        self._spool.append({"step": step, "image": {"path": self._stored(path), "name": name}})

    def log_artifact(self, path: str | os.PathLike[str]) -> None:
        """Logs a file, under its base name. It must stay until it is sent."""
        self._spool.append({"artifact": self._stored(path)})

    def log_table(self, path: str | os.PathLike[str]) -> None:
        """Logs a file of `table_json`, under its base name, to be shown as a table. It must stay until it is sent."""
        self._spool.append({"table": self._stored(path)})

    def log_inputs(self, inputs: Sequence[Input]) -> None:
        """Logs data sets that the run reads. Those that it has already are not added again."""
        self._spool.append(
            {
                "inputs": [
                    asdict(one) | {"source": without_secrets(one.source), "source_type": one.source_type}
                    for one in inputs
                ]
            }
        )

    def describe(self, **parts: str) -> None:
        """Sets parts of the run's description, as Markdown; they stand in the order of PARTS, and others after them.

        They are kept from start to start; an empty text removes its part.
        """
        given = self._spool.state.description | parts
        ordered = [*(name for name in PARTS if name in given), *(name for name in given if name not in PARTS)]
        described = {name: given[name] for name in ordered if given[name]}
        if described != self._spool.state.description:
            self.set_tags({DESCRIPTION: "\n\n".join(described.values())})
            self._spool.update(description=described)  # afterwards: killed between the two, it is said again

    def times(self, step: int) -> dict[str, float]:
        """Returns when each metric of this step was logged, in seconds since 1970.

        Metrics that were logged at another step since are left out.
        """
        return {name: logged for name, (logged_step, logged) in self._logged.items() if logged_step == step}

    def log_checkpoint(
        self, step: int, digest: str, uri: str, metrics: Mapping[str, float], times: Mapping[str, float]
    ) -> None:
        """Logs a checkpoint as a LoggedModel with metrics, so that the best one can be searched for; its bytes stay.

        The metrics are the run's too: those that were logged at this step already, at these times, count as the same
        points.
        """
        now = time.time()
        timed = {name: [float(value), times.get(name, now)] for name, value in metrics.items()}
        self._spool.append({"step": step, "checkpoint": {"digest": digest, "uri": uri, "metrics": timed}})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        if tags:
            self._spool.append({"tags": {name: str(value) for name, value in tags.items()}})

    def cut_back(self, step: int) -> None:
        """Forgets, after a resume from a checkpoint at `step` (-1: from the start), what will be logged again.

        MLflow cannot forget. Repeated steps that it has are not sent again, as a resumed run repeats their values,
        unless params have changed: then it has both.
        """
        self._spool.cut_back(step)

    def set_status(self, status: Status) -> None:
        """Sets the run's status as it is now."""
        self._spool.append({"status": status})

    def finish(self, status: Status) -> None:
        """Sets the status with which the run ended. `close` must follow."""
        self.set_status(status)

    def log_timed(self, group: str, metrics: Mapping[str, float]) -> None:
        """Logs figures of a moment, and of no step, as GROUP/NAME."""
        self._spool.append({"system": dict(metrics), "group": group})

    def how_to_open(self) -> list[str]:
        """Returns how a reader opens the run, as mlflow_address.how_to_open does.

        The list is empty as long as MLflow has not got the run.
        """
        return how_to_open_saved(self.folder)

    def close(self, timeout_seconds: float) -> int:
        """Tries to send what is left, and returns how many lines remain for the next start.

        Nothing can be logged after it.
        """
        self._deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        for thread in self._threads:
            thread.join(None if thread is self._sampler else timeout_seconds)
        unsent = self._spool.unsent()
        self._spool.close()
        if unsent:
            logger.warning(
                "%d lines of %s have not reached MLflow at %s. They are sent when the run is started again",
                unsent,
                self._spool.path,
                self._spool.state.uri,
            )
        return unsent

    def _log_params(self, params: dict[str, str]) -> bool:
        """Logs new params, and changed ones as tags. Returns whether any has another value than before."""
        before = with_new_names(self._spool.state.params)
        new = {name: value for name, value in params.items() if name not in before}
        changed = {name: value for name, value in params.items() if before.get(name, value) != value}
        if new:
            self._spool.append({"params": new})
        self.set_tags({f"changed.{name}": value for name, value in changed.items()})
        self._spool.update(params=before | params)
        return bool(changed)

    def _stored(self, path: str | os.PathLike[str]) -> str:
        """Returns a path as it is stored: relative to the run's folder, which may be moved, where the file is in it."""
        absolute = Path(path).absolute()
        return str(absolute.relative_to(self.folder) if absolute.is_relative_to(self.folder) else absolute)

    def _send(self) -> None:
        """Sends, in the sending thread, until the tracker is closed and everything is sent, or its time is up."""
        while self._spool.is_ours():
            taken = self.send_pending(at_once=self._closing.is_set())
            if not self._closing.is_set():
                self._closing.wait(SEND_EVERY_SECONDS)
            elif time.monotonic() > self._deadline or taken:
                return
            else:
                time.sleep(min(FIRST_RETRY_SECONDS, max(0.0, self._deadline - time.monotonic())))

    def send_pending(self, at_once: bool) -> bool:
        """Sends what is there, each stream at its own pace, and returns whether the server has taken all of it.

        The streams take turns, one artifact at a time: those of an hour without a server take minutes, in which the
        curves go on.

        at_once: does not wait for the end of the pause that follows a failure.
        """
        due = [stream for stream in STREAMS if at_once or time.monotonic() >= self._retry_at[stream]]
        sent = True
        while sent:
            sent = False
            for stream in list(due):
                try:
                    sent |= self._send_some(stream)
                except Exception as error:  # of the server, a proxy or a library: the lines are kept, and sent later
                    if not self._spool.is_ours():
                        return False
                    due.remove(stream)
                    self._report(stream, error, again=self._pause[stream] > 0)
                    self._pause[stream] = min(max(FIRST_RETRY_SECONDS, 2 * self._pause[stream]), LAST_RETRY_SECONDS)
                    self._retry_at[stream] = time.monotonic() + self._pause[stream]
                else:
                    if self._pause[stream]:
                        logger.warning("MLflow takes %s again", stream)
                    self._pause[stream] = 0.0
        return not any(self._pause.values())

    def connect(self) -> str:
        """Finds or creates the run in MLflow, and returns its id.

        Raises whatever the server or a proxy raises.
        """
        return self._connect(self._generation).run_id

    def is_ours(self) -> bool:
        """Tells whether no newer start has taken the run."""
        return self._spool.is_ours()

    def is_connected(self) -> bool:
        """Tells whether the run has been found or made in MLflow, which costs much, and only once."""
        return self._run is not None

    def is_sent(self) -> bool:
        """Tells whether MLflow has all that was logged."""
        return not self._spool.unsent()

    def _send_some(self, stream: str) -> bool:
        """Sends the next records that go together, and returns whether there were any."""
        records, generation = self._spool.read(stream, METRICS_PER_CALL if stream == "metrics" else 1)
        if not records:
            return False
        run = self._connect(generation)
        for group in _groups(records):
            self._send_group(run, [record for record, _ in group])
            self._spool.acknowledge(stream, group[-1][1], generation)
        return True

    def _send_group(self, run: MlflowRun, records: list[Record]) -> None:
        try:
            run.send(records)
        except Refused as error:
            if len(records) > 1:  # find the one, and send the others
                for record in records:
                    self._send_group(run, [record])
            else:
                logger.warning("MLflow refuses %.200s: %s. It stays in %s", records[0], error, self._spool.path)

    def _connect(self, generation: int) -> MlflowRun:
        """Returns the connection to the run in MLflow, which is made at the first call.

        After a cut it asks the server which of the repeated steps it has.
        """
        if self._run is None:
            parent_id = None if self._parent is None else self._parent.connect()
            self._run = MlflowRun(
                self._spool.state, self._run_name, self.folder, self._values_changed, parent_id, self._shared
            )
            self._spool.update(run_id=self._run.run_id, experiment_id=self._run.experiment_id)
            if self._tell is not None:
                self._tell(self.how_to_open())
        if self._generation != generation:
            self._run.skip_sent_steps()
            self._generation = generation
        return self._run

    def _report(self, stream: str, error: Exception, again: bool) -> None:
        if not again and time.monotonic() < (self._deadline or float("inf")):
            kept = f"Its lines are kept in {self._spool.path}, and sent as soon as it does"
            logger.warning("MLflow does not take %s (%s: %.300s). %s", stream, type(error).__name__, error, kept)

    def _sample(self, seconds: float) -> None:
        psutil.cpu_percent()  # the first call only starts the measurement
        while not self._closing.wait(seconds) and self._spool.is_ours():
            self.log_timed("system", system_metrics(self.folder))


def table_json(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """Returns a table as MLflow's pages show one: the text of a .json file for `log_table`.

    Raises ValueError for a value that is not finite.
    """
    return json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}, allow_nan=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flattens nested mappings to dotted names with values as text, cut to MLflow's old limit of 500 characters."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = str(value)
            flat[f"{prefix}{name}"] = text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"
    return flat


def _groups(records: list[tuple[Record, int]]) -> list[list[tuple[Record, int]]]:
    """Groups neighbouring records that one call takes.

    Records of metrics go together, up to 1000 values; all others go alone.
    """
    groups: list[list[tuple[Record, int]]] = []
    values = 0
    for record, end in records:
        size = len(record.get("metrics", ())) + len(record.get("system", ()))
        joins = groups and kind_of(record) == kind_of(groups[-1][0][0]) == "points"
        if joins and values + size <= METRICS_PER_CALL:
            groups[-1].append((record, end))
            values += size
        else:
            groups.append([(record, end)])
            values = size
    return groups
