"""What a run has to tell, kept in its folder until a server has it: metrics.jsonl, and how far it was acknowledged.

metrics.jsonl has one JSON record a line, `time` in seconds since 1970:

    {"step": 40, "time": ..., "metrics": {"loss": 0.1}}     of a step; what is not finite is "NaN" or "Infinity"
    {"time": ..., "system": {"cpu_percent": 93.0}}          of a moment: the machine, or what else `group` says
    {"time": ..., "params" | "tags" | "inputs" | "status" | "artifact" | "table" | "image" | "checkpoint": ...}

Names of metrics are ours, "loss" of training and "validation/edge_f1"; mlflow_run.py says what MLflow calls them.

A line is written with one system call, so a killed process leaves at most one torn line, the last, which is dropped.
tracking.json beside it is replaced by rename. It is always behind what was sent, never ahead: lines may be sent twice,
which the server takes as once, and are never left out. It has a mark of the bytes before the place up to which a server
has metrics.jsonl: where that was deleted, or put back as it was earlier, all of it is sent again.
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
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from controlbooth.data.errors import UserError
from controlbooth.data.files.locks import take_name
from controlbooth.data.files.records import (
    Check,
    Damaged,
    Fields,
    are_points,
    check_fields,
    each,
    having,
    is_mapping,
    is_moment,
    is_text,
    is_whole,
    maybe,
    open_file,
    parse_json,
    read_json,
)
from controlbooth.data.secrets import without_secrets
from controlbooth.trainer.run.disk_full import named_when_full
from controlbooth.trainer.tracking.mlflow_address import STATE

logger = logging.getLogger(__name__)

LINES = "metrics.jsonl"
STREAMS = ("metrics", "artifacts")
"""Acknowledged apart, so that an artifact store that fails does not hold the metrics back."""

MARKED_BYTES = 4096
"""Before the place up to which a server has metrics.jsonl, by which the file is known again."""
STATUSES = ("SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED")

LEFT_OUT = "It is left out"
NO_FILE = "Move it away: the run then begins the file anew"

Record = dict[str, Any]


def texts(value: Any) -> bool:
    return is_mapping(value) and all(map(is_text, value.values()))


def timed(value: Any) -> bool:
    """Tells whether a value is a mapping of names to [value, time]."""
    return is_mapping(value) and all(
        isinstance(one, list) and len(one) == 2 and is_moment(one[1]) for one in value.values()
    )


INPUT: Fields = {"name": is_text, "fingerprint": is_text, "source": is_text, "samples": is_whole, "context": is_text}
KINDS: dict[str, Fields] = {
    "metrics": {"step": is_whole, "metrics": are_points},
    "system": {"system": are_points, "group": maybe(is_text)},
    "params": {"params": texts},
    "tags": {"tags": texts},
    "inputs": {"inputs": each(having(INPUT | {"source_type": is_text}))},
    "status": {"status": lambda value: value in STATUSES},
    "artifact": {"artifact": is_text},
    "table": {"table": is_text},
    "image": {"step": is_whole, "image": having({"path": is_text, "name": is_text})},
    "checkpoint": {"step": is_whole, "checkpoint": having({"digest": is_text, "uri": is_text, "metrics": timed})},
}
"""What a line has beside its time, by the field that tells its kind."""
TRACKING: dict[str, Check] = {
    "uri": is_text,
    "experiment": is_text,
    "key": lambda value: is_text(value) and len(value) == 32 and set(value) <= set("0123456789abcdef"),
    "created": is_moment,
    "experiment_id": maybe(is_text),
    "run_id": maybe(is_text),
    "params": texts,
    "description": texts,
    "acknowledged": lambda value: is_mapping(value) and all(is_whole(value.get(stream)) for stream in STREAMS),
    "marks": maybe(texts),
}
"""Fields of tracking.json; versions before wrote no marks and no digest."""


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
    marks: dict[str, str] = field(default_factory=dict)
    """stream -> digest of the last bytes before that place, in hex."""


class Spool:
    """metrics.jsonl and tracking.json of one run folder, open for one writer. Any thread may call its methods."""

    def __init__(
        self, folder: Path, uri: str, experiment: str, made_in: Path | None = None, shared: State | None = None
    ):
        """Opens or starts the files. Another server or experiment than before gets everything from the first line.

        shared: the result of `shared_state`, where several writers log to one MLflow run. made_in: the folder of the
        attempt that has taken the run (attempt.py), in which new versions of the files are made. metrics.jsonl is then
        a fresh copy, so that an older start that still has the old one open writes into nothing; and this one can
        replace neither file when its own folder is gone. Raises ValueError for a tracking.json that cannot be read.
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
            with named_when_full(self.path):
                shutil.copyfile(self.path, made_in / LINES)
            self._file = (made_in / LINES).open("a+b", buffering=0)
            os.fsync(self._file.fileno())
            os.replace(made_in / LINES, self.path)
        state = _moved(_read_state(self._state_path) or shared or State(uri, experiment), uri, experiment)
        if shared is not None and state.key != shared.key:  # begun before, as a run of its own
            state = replace(shared, params=state.params)
        self.state = self._known_again(state)
        self.update()

    def _known_again(self, state: State) -> State:
        """Returns the state as it is where metrics.jsonl is the file that it describes.

        Else returns one by which everything is sent again, and logs a warning.
        """
        strange = [stream for stream, place in state.acknowledged.items() if not self._is_marked(state, stream, place)]
        if not strange:
            return state
        logger.warning(
            "%s is not the file of which %s had been sent: it was deleted, or put back as it was earlier. All that it "
            "holds now is sent again; what was in it alone, and not sent, is lost",
            self.path,
            self._state_path,
        )
        marks = {stream: mark for stream, mark in state.marks.items() if stream not in strange}
        return replace(state, acknowledged=state.acknowledged | dict.fromkeys(strange, 0), marks=marks)

    def _is_marked(self, state: State, stream: str, place: int) -> bool:
        if not 0 <= place <= self.path.stat().st_size:
            return False
        before = self._bytes_before(place)
        mark = state.marks.get(stream)
        return (not place or before.endswith(b"\n")) and mark in (None, sha256(before).hexdigest())

    def _bytes_before(self, place: int) -> bytes:
        """Returns the last bytes of metrics.jsonl before an offset, at most MARKED_BYTES."""
        with self.path.open("rb") as file:
            file.seek(max(0, place - MARKED_BYTES))
            return file.read(min(place, MARKED_BYTES))

    def _marks(self, acknowledged: dict[str, int]) -> dict[str, str]:
        return {stream: sha256(self._bytes_before(place)).hexdigest() for stream, place in acknowledged.items()}

    def update(self, **changes: Any) -> None:
        """Changes fields of the state, durably. Raises ValueError after `close`: another writer may have the files."""
        with self._lock:
            if self._file.closed:
                raise UserError(f"{self.path} is closed")
            self.state = replace(self.state, **changes)
            temporary = self._made_in / f"{STATE}.tmp"
            with named_when_full(self._state_path), temporary.open("w") as file:
                file.write(_as_text(self.state))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._state_path)

    def append(self, record: Record) -> None:
        """Adds a record; its time is now unless it has one. Raises OSError when the disk is full."""
        line = json.dumps({"time": time.time(), **_strict(record)}, separators=(",", ":"), allow_nan=False) + "\n"
        rest = line.encode()
        with self._lock, named_when_full(self.path):
            while rest:  # a disk that fills up takes a part first, and raises at the next try
                rest = rest[self._file.write(rest) :]

    def read(self, stream: str, limit: int) -> tuple[list[tuple[Record, int]], int]:
        """Returns the next records of a stream after those acknowledged, at most `limit`, each with its end offset.

        The second value, the generation of the file, goes to `acknowledge`.
        """
        with self._lock:
            self._put_back()
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

    def _put_back(self) -> None:
        """Writes metrics.jsonl again where somebody has deleted or replaced it while it is written to.

        A newer start replaces it too; then the folder is gone in which this one could make it.
        """
        if self._file.closed:
            return
        ours = os.fstat(self._file.fileno())
        try:
            there = self.path.stat()
        except FileNotFoundError:
            there = None
        if (there is not None and os.path.samestat(there, ours)) or not self.is_ours():
            return
        temporary = self._made_in / f"{LINES}.tmp"
        with temporary.open("wb") as file:
            for start in range(0, ours.st_size, 2**20):
                file.write(os.pread(self._file.fileno(), 2**20, start))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._file.close()
        self._file = self.path.open("a+b", buffering=0)
        logger.warning("%s was taken away while the run writes to it. It is put back, with all its lines", self.path)

    def acknowledge(self, stream: str, offset: int, generation: int) -> None:
        """Records that the server has this stream's records before `offset`.

        Does nothing where lines were cut since they were read.
        """
        with self._lock:
            if generation == self._generation:
                acknowledged = self.state.acknowledged | {stream: offset}
                self.update(acknowledged=acknowledged, marks=self._marks(acknowledged))

    def unsent(self) -> int:
        """Counts the lines that no server has acknowledged."""
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
            acknowledged = {name: min(at, first_cut) for name, at in self.state.acknowledged.items()}
            self.update(acknowledged=acknowledged, marks=self._marks(acknowledged))
            os.replace(temporary, self.path)
            self._generation += 1
            self._searched.clear()
            self._file.close()
            self._file = self.path.open("a+b", buffering=0)

    def is_ours(self) -> bool:
        """Tells whether no newer start has taken the run. This is asked before something is sent or written."""
        return self._made_in.is_dir()

    def close(self) -> None:
        with self._lock:
            self._file.close()


def check_files(folder: Path) -> None:
    """Raises Damaged where a run cannot go on with its tracking.json, or what lies in the place of metrics.jsonl."""
    _read_state(folder / STATE)
    if (folder / LINES).exists():
        open_file(folder / LINES, NO_FILE).close()


def shared_state(folder: Path, uri: str, experiment: str) -> State:
    """Returns the identity of the MLflow run of a run folder to which several processes log.

    The first process draws it, and all read it from tracking.json of the folder. Raises ValueError where that cannot be
    read.
    """
    path = folder / STATE
    if not path.exists():
        publish(path, _as_text(State(uri, experiment)))
    state = _read_state(path)
    assert state is not None
    own = dict(params={}, description={}, acknowledged=dict.fromkeys(STREAMS, 0), marks={})
    return replace(_moved(state, uri, experiment), **own)


def publish(path: Path, text: str) -> str:
    """Writes a file that is not there yet, whole or not at all.

    Returns what the file holds, which another process may have written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    temporary.write_text(text)
    try:
        return text if take_name(temporary, path) else path.read_text()
    finally:
        temporary.unlink()


def _moved(state: State, uri: str, experiment: str) -> State:
    """Returns the state for a server and an experiment; at others than before nothing of the run is there yet.

    All processes that ask get the same key.
    """
    state = replace(state, uri=without_secrets(state.uri))  # which runs begun before may have written
    if (state.uri, state.experiment) == (uri, experiment):
        return state
    key = uuid.uuid5(uuid.UUID(state.key), f"{uri} {experiment}").hex
    return State(uri, experiment, key=key, created=state.created, params=state.params, description=state.description)


def read_metrics(run_folder: str | os.PathLike[str]) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Yields (step, time, metrics) of every record of a step in a run folder, in order.

    Yields nothing where there is no file yet. Times are in seconds since 1970.
    """
    path = Path(run_folder) / LINES
    if not path.exists():
        return
    for line, end in _lines(path, 0):
        record = _parse(line, path, end)
        if record is not None and "metrics" in record:
            yield record["step"], record["time"], {name: float(value) for name, value in record["metrics"].items()}


def _lines(path: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """Yields complete lines from a byte offset on, each with the offset after it. A torn last line is left out."""
    with open_file(path, NO_FILE) as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield line, offset


def parse_record(line: bytes, where: str) -> Record:
    """Parses a line of metrics.jsonl. where: what the message calls it. Raises Damaged for one that no version has
    written."""
    record = parse_json(line, where, LEFT_OUT, {"time": is_moment})
    kind = next((kind for kind in KINDS if kind in record), None)
    if kind is None:
        raise Damaged(where, "it tells of nothing that is known", LEFT_OUT)
    check_fields(record, KINDS[kind], where, LEFT_OUT)
    return record


def _parse(line: bytes, path: Path, end: int) -> Record | None:
    """Parses a line. Returns None for one that no version has written, and logs a warning."""
    try:
        return parse_record(line, f"{path}, the line that ends at byte {end},")
    except Damaged as error:
        logger.warning("%s: %.80r", error, line)
        return None


def _open_without_torn_line(path: Path) -> Any:
    """Opens a file for appending, unbuffered, and cuts off what follows the last line end."""
    if path.exists():
        open_file(path, NO_FILE).close()
    file = path.open("a+b", buffering=0)
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
    remedy = f"Delete it to send all of {LINES} again, into a new MLflow run"
    tree = read_json(path, remedy, TRACKING, missing=None)
    if tree is None:
        return None
    digest = tree.pop("digest", None)
    if digest not in (None, _digest(tree)):
        raise Damaged(path, "it is not what was written", remedy)
    known = {one.name for one in fields(State)}
    return State(**{name: value for name, value in tree.items() if name in known and value is not None})


def _as_text(state: State) -> str:
    tree = asdict(state)
    return json.dumps(tree | {"digest": _digest(tree)}, indent=1)


def _digest(tree: dict[str, Any]) -> str:
    """Returns a digest of the fields of tracking.json, SHA-256 in hex.

    Without it nothing would tell of a wrong place up to which all was sent, and the lines before it would never be
    sent.
    """
    return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _strict(value: Any) -> Any:
    """Replaces numbers that JSON does not have by "NaN", "Infinity" and "-Infinity", which float() reads."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
