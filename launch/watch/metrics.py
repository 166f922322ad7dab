"""metrics.jsonl as curves that grow with the file: what was read once is not read again.

A curve keeps a bounded number of points, each the mean of several values with the smallest and the largest of them, so
a run of millions of steps takes as much memory as one of thousands. Of a file beyond THIN_BYTES only every second,
third, ... line of a step is parsed, by its place in the file alone; lines of validations always are. What is read in
pieces is the same as what is read at once.
"""

import math
import os
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from controlbooth.data.files.records import Damaged
from controlbooth.launch.watch.growing import GrowingFile
from controlbooth.trainer.tracking.spool import LINES, Record, parse_record

THIN_BYTES = 2**25
"""After each such part of a file one more line is passed over for each that is parsed."""
MOST_CURVES = 400
RECENT = 60
"""Records of steps by which speed is told."""
TAIL_BYTES = 2**14
"""Of a long file, from its end, that a glance reads."""
SAMPLES = 24
"""Places of the part before, at which a glance looks for a loss."""
SAMPLE_BYTES = 2**12
VALIDATION_BYTES = 2**22
"""Before that, in which a glance looks for the newest validation."""
VALIDATED = b'"metrics":{"validation/'


class Curve:
    """Values by rising step, kept as at most `most` points: step, mean, smallest and largest of `width` values in a
    row. The last one may be of fewer."""

    def __init__(self, most: int):
        self._most, self.width = most, 1
        self.points: list[list[float]] = []
        self._in_last = 0

    def add(self, step: int, value: float) -> None:
        """Adds a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        if not self.points or self._in_last == self.width:
            if len(self.points) == self._most:
                pairs = zip(self.points[::2], self.points[1::2], strict=True)
                self.points = [[b[0], (a[1] + b[1]) / 2, min(a[2], b[2]), max(a[3], b[3])] for a, b in pairs]
                self.width *= 2
            self.points.append([step, value, value, value])
            self._in_last = 1
            return
        last, self._in_last = self.points[-1], self._in_last + 1
        last[0], last[1] = step, last[1] + (value - last[1]) / self._in_last
        last[2], last[3] = min(last[2], value), max(last[3], value)

    @property
    def last(self) -> float:
        return self.points[-1][1]


class Metrics(GrowingFile):
    """What a run's metrics.jsonl holds, up to the place that was read."""

    def __init__(self, folder: Path, most: int = 512, glance: bool = False):
        """Reads nothing yet. most: points of a curve, an even number. glance: of a long file only samples and its end
        are read, which tell the last figures and the loss over the steps, but not every start."""
        super().__init__(folder, LINES)
        self._most, self._glance = most, glance
        self.begin()

    @property
    def share_read(self) -> float:
        """Returns how much of the file was read: 1 once all of it was."""
        return self.offset / self.size if self.is_left and self.size else 1.0

    def begin(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.recent: deque[Record] = deque(maxlen=RECENT)
        """The last records of steps."""
        self.validated: tuple[int, dict[str, float]] | None = None
        """Step and figures of the newest validation."""
        self.statuses: list[tuple[float, str]] = []
        """(time, status) as MLflow calls it: RUNNING at each start, and what it came to."""
        self.changed: list[tuple[float, str, str]] = []
        """(time, field, value) of settings that a later start changed."""
        self.system: dict[str, float] = {}
        self.unreadable = 0
        self._lines = 0

    def skip(self, file: BinaryIO) -> None:
        """Looks, of a long file that is glanced at, for losses at places spread over it, and goes to its end."""
        if not self._glance or self.size <= 2 * TAIL_BYTES:
            return
        end = self.size - TAIL_BYTES
        for place in range(SAMPLES):
            window = os.pread(file.fileno(), SAMPLE_BYTES, place * end // SAMPLES)
            for line in window.split(b"\n")[1:-1]:
                record = self._parsed(line) if b'"loss"' in line else None
                if record is not None and "loss" in record.get("metrics", {}):
                    self._points(record["step"], {"loss": record["metrics"]["loss"]})
                    break
        self._find_validation(file, end)
        start = os.pread(file.fileno(), TAIL_BYTES, end).find(b"\n") + 1
        self.go_to(file, end + start)

    def _find_validation(self, file: BinaryIO, end: int) -> None:
        """Looks for the newest validation in the last bytes before the end that a glance reads."""
        before = os.pread(file.fileno(), VALIDATION_BYTES, max(0, end - VALIDATION_BYTES))
        begin = before.rfind(b"\n", 0, max(0, before.rfind(VALIDATED))) + 1
        record = self._parsed(before[begin:].partition(b"\n")[0])
        if record is not None and "metrics" in record:
            self.validated = record["step"], {name: float(value) for name, value in record["metrics"].items()}

    def take(self, line: bytes) -> None:
        if b'"metrics":' in line and b'"validation/' not in line:
            self._lines += 1
            if self._lines % (1 + self.offset // THIN_BYTES):
                return
        record = self._parsed(line)
        if record is None:
            self.unreadable += 1
        elif "metrics" in record:
            figures = {name: float(value) for name, value in record["metrics"].items()}
            self._points(record["step"], figures)
            if any(name.startswith("validation/") for name in figures):
                self.validated = record["step"], figures
            else:
                self.recent.append(record)
        elif "system" in record:
            if record.get("group") in (None, "system"):
                self.system = {name: float(value) for name, value in record["system"].items()}
        elif "status" in record:
            self.statuses.append((record["time"], record["status"]))
        elif "tags" in record:
            found = {name: value for name, value in record["tags"].items() if name.startswith("changed.")}
            self.changed += [(record["time"], name.removeprefix("changed."), value) for name, value in found.items()]

    def _parsed(self, line: bytes) -> Record | None:
        try:
            return parse_record(line, "")
        except Damaged:
            return None

    def _points(self, step: int, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if name not in self.curves:
                if len(self.curves) == MOST_CURVES:
                    continue
                self.curves[name] = Curve(self._most)
            self.curves[name].add(step, float(value))
