"""What a run has to tell, kept in its folder until a server has it: metrics.jsonl, and how far it was acknowledged.

metrics.jsonl has one JSON record a line, `time` in seconds since 1970:

    {"step": 40, "time": ..., "metrics": {"loss": 0.1}}     of a step; what is not finite is "NaN" or "Infinity"
    {"time": ..., "system": {"cpu_percent": 93.0}}          of a moment: the machine, or what else `group` says
    {"time": ..., "params" | "tags" | "inputs" | "status" | "artifact" | "table" | "image" | "checkpoint": ...}

Names of metrics are ours, "loss" of training and "validation/edge_f1"; mlflow_run.py says what MLflow calls them.

A line is written with one system call, so a killed process leaves at most one torn line, the last, which is dropped.
tracking.json beside it is replaced by rename. It is always behind what was sent, never ahead: lines may be sent twice,
which the server takes as once, and are never left out.
"""

import json
import logging
import math
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from controlbooth.data.secrets import without_secrets
from controlbooth.trainer.mlflow_address import STATE

logger = logging.getLogger(__name__)

LINES = "metrics.jsonl"
STREAMS = ("metrics", "artifacts")
"""Acknowledged apart, so that an artifact store that fails does not hold the metrics back."""

Record = dict[str, Any]


def stream_of(record: Record) -> str:
    return "artifacts" if record.keys() & {"artifact", "table", "image", "checkpoint"} else "metrics"


@dataclass(frozen=True)
class State:
    """What has been sent where."""

    uri: str
    """Without secrets: those are in the environment of whoever sends."""
    experiment: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Ours; a tag of the MLflow run, so that a run whose creation was never answered is found again."""
    created: float = field(default_factory=time.time)
    """Seconds since 1970."""
    experiment_id: str | None = None
    run_id: str | None = None
    """MLflow's."""
    params: dict[str, str] = field(default_factory=dict)
    """The latest value of each."""
    description: dict[str, str] = field(default_factory=dict)
    """The parts of the run's description, in their order, as Markdown."""
    acknowledged: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0))
    """stream -> bytes of metrics.jsonl that the server has."""


class Spool:
    """metrics.jsonl and tracking.json of one run folder, open for one writer. Any thread may call its methods."""

    def __init__(
        self, folder: Path, uri: str, experiment: str, made_in: Path | None = None, shared: State | None = None
    ):
        """Opens or starts them. Another server or experiment than before gets everything from the first line.

        shared: of `shared_state`, where several writers log to one MLflow run. made_in: the folder of the start that
        has taken the run (attempt.py), in which new versions of the files are made. metrics.jsonl is then a fresh copy,
        so that an older start that still has the old one open writes into nothing; and this one can replace neither
        file when its own folder is gone. Raises ValueError for a tracking.json that cannot be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._state_path = folder / LINES, folder / STATE
        self._made_in = made_in or folder
        self._lock = threading.RLock()
        self._generation = 0  # of the file: offsets of an older one mean nothing
        self._searched: dict[str, int] = {}  # stream -> bytes in which there is nothing more of it
        self._file = _open_without_torn_line(self.path)
        if made_in is not None:
            self._file.close()
            shutil.copyfile(self.path, made_in / LINES)
            self._file = (made_in / LINES).open("ab", buffering=0)
            os.fsync(self._file.fileno())
            os.replace(made_in / LINES, self.path)
        state = _moved(_read_state(self._state_path) or shared or State(uri, experiment), uri, experiment)
        if shared is not None and state.key != shared.key:  # begun before, as a run of its own
            state = replace(shared, params=state.params)
        self.state = state
        self.update()

    def update(self, **changes: Any) -> None:
        """Changes fields of the state, durably. Raises ValueError after `close`: another writer may have the files."""
        with self._lock:
            if self._file.closed:
                raise ValueError(f"{self.path} is closed")
            self.state = replace(self.state, **changes)
            temporary = self._made_in / f"{STATE}.tmp"
            with temporary.open("w") as file:
                json.dump(asdict(self.state), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._state_path)

    def append(self, record: Record) -> None:
        """Adds a record; its time is now unless it has one. Raises OSError when the disk is full."""
        line = json.dumps({"time": time.time(), **_strict(record)}, separators=(",", ":"), allow_nan=False) + "\n"
        rest = line.encode()
        with self._lock:
            while rest:  # a disk that fills up takes a part first, and raises at the next try
                rest = rest[self._file.write(rest) :]

    def read(self, stream: str, limit: int) -> tuple[list[tuple[Record, int]], int]:
        """The next records of a stream after those acknowledged, at most `limit`, each with the offset after it.

        The second value goes to `acknowledge`.
        """
        with self._lock:
            found = []
            end = max(self.state.acknowledged[stream], self._searched.get(stream, 0))
            for line, end in _lines(self.path, end):  # noqa: B020  (`end` stays where it was if there is no line)
                record = _parse(line, self.path, end)
                if record is not None and stream_of(record) == stream:
                    found.append((record, end))
                    if len(found) == limit:
                        break
            if not found:
                self._searched[stream] = end
            return found, self._generation

    def acknowledge(self, stream: str, offset: int, generation: int) -> None:
        """The server has this stream's records before `offset`. Ignored if lines were cut since they were read."""
        with self._lock:
            if generation == self._generation:
                self.update(acknowledged=self.state.acknowledged | {stream: offset})

    def unsent(self) -> int:
        """Lines that no server has acknowledged."""
        return sum(len(self.read(stream, limit=sys.maxsize)[0]) for stream in STREAMS)

    def cut_back(self, step: int) -> None:
        """Removes the records of later steps, sent or not; they will be written again."""
        with self._lock:
            temporary = self._made_in / f"{LINES}.tmp"
            first_cut, start = None, 0
            with temporary.open("wb") as kept:
                for line, end in _lines(self.path, 0):
                    record = _parse(line, self.path, end)
                    if record is None or record.get("step", step) <= step:
                        kept.write(line)
                    elif first_cut is None:
                        first_cut = start
                    start = end
                kept.flush()
                os.fsync(kept.fileno())
            if first_cut is None:
                temporary.unlink()
                return
            # Both files are equal up to the first cut: a crash between these two lines sends again and omits nothing.
            self.update(acknowledged={name: min(at, first_cut) for name, at in self.state.acknowledged.items()})
            os.replace(temporary, self.path)
            self._generation += 1
            self._searched.clear()
            self._file.close()
            self._file = self.path.open("ab", buffering=0)

    def is_ours(self) -> bool:
        """Whether no newer start has taken the run. Asked before something is sent or written."""
        return self._made_in.is_dir()

    def close(self) -> None:
        with self._lock:
            self._file.close()


def shared_state(folder: Path, uri: str, experiment: str) -> State:
    """The identity of the MLflow run of a run folder to which several processes log: drawn by the first, read by all.

    tracking.json of the folder holds it. Raises ValueError where that cannot be read.
    """
    path = folder / STATE
    if not path.exists():
        publish(path, json.dumps(asdict(State(uri, experiment)), indent=1))
    state = _read_state(path)
    assert state is not None
    own = dict(params={}, description={}, acknowledged=dict.fromkeys(STREAMS, 0))
    return replace(_moved(state, uri, experiment), **own)


def publish(path: Path, text: str) -> str:
    """Writes a file that is not there yet, whole or not at all; -> what it holds, which another may have written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    temporary.write_text(text)
    try:
        os.link(temporary, path)  # unlike a rename it fails where the name is taken
    except FileExistsError:
        return path.read_text()
    finally:
        temporary.unlink()
    return text


def _moved(state: State, uri: str, experiment: str) -> State:
    """The state at another server or experiment, where nothing of the run is yet; all who ask get the same key."""
    state = replace(state, uri=without_secrets(state.uri))  # which runs begun before may have written
    if (state.uri, state.experiment) == (uri, experiment):
        return state
    key = uuid.uuid5(uuid.UUID(state.key), f"{uri} {experiment}").hex
    return State(uri, experiment, key=key, created=state.created, params=state.params, description=state.description)


def read_metrics(run_folder: str | os.PathLike[str]) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(step, time, metrics) of every record of a step in a run folder, in order; nothing where there is no file yet."""
    path = Path(run_folder) / LINES
    if not path.exists():
        return
    for line, end in _lines(path, 0):
        record = _parse(line, path, end)
        if record is not None and "metrics" in record:
            yield record["step"], record["time"], {name: float(value) for name, value in record["metrics"].items()}


def _lines(path: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """Complete lines from a byte offset on, each with the offset after it. A torn last line is not among them."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield line, offset


def _parse(line: bytes, path: Path, end: int) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        logger.warning("%s: the line that ends at byte %d is not a record, and is left out: %.80r", path, end, line)
        return None
    return record


def _open_without_torn_line(path: Path) -> Any:
    """Opens for appending, unbuffered; what follows the last line end goes."""
    file = path.open("ab", buffering=0)
    size = complete = file.tell()
    with path.open("rb") as reader:
        while complete:  # backwards, block by block
            start = max(0, complete - 65536)
            reader.seek(start)
            newline = reader.read(complete - start).rfind(b"\n")
            complete = start + newline + 1
            if newline >= 0:
                break
    if complete < size:
        logger.warning("%s ended in a torn line of %d bytes, which is dropped", path, size - complete)
        file.truncate(complete)
    return file


def _read_state(path: Path) -> State | None:
    if not path.exists():
        return None
    try:
        return State(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Delete it to send all of {LINES} again, into a new MLflow run"
        ) from error


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become "NaN", "Infinity" and "-Infinity", which float() reads."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
