"""Files to which lines are added, read on from where they were: each complete line once.

The training appends lines, and at a start, or when it goes on from an older checkpoint, puts a new file in the place of
the old one. So a reader keeps the place up to which it has read complete lines, what the file is known by, and the last
bytes before that place; where these differ it begins anew. A last line without its end is left for later.
"""

import math
import os
import time
from pathlib import Path
from typing import BinaryIO

from controlbooth.launch.watch.files import open_inside

CHUNK = 2**20
LONGEST_LINE = 2**24
MARKED_BYTES = 128
Identity = tuple[int, int]


class GrowingFile:
    """A file in a run's folder; `begin` and `take` are of those that are made of its lines."""

    def __init__(self, folder: Path, name: str):
        """Reads nothing yet."""
        self._folder, self._name = folder, name
        self._identity: Identity | None = None
        self.problem = ""
        """Why the file that is there cannot be read, for people."""
        self.offset = 0
        """Bytes up to the end of the last line that was read."""
        self.size = 0
        self.is_left = False
        """Whether the time was up before the end of the file."""
        self._mark = b""

    def begin(self) -> None:
        """Forgets all lines: the file is another, or gone."""

    def take(self, line: bytes) -> None:
        """Takes the next line, without its end."""

    def skip(self, file: BinaryIO) -> None:
        """Goes to a later place before the first line is read, by `go_to`."""

    def go_to(self, file: BinaryIO, offset: int) -> None:
        """Goes to a place at which a line begins."""
        self.offset = offset
        self._mark = os.pread(file.fileno(), min(MARKED_BYTES, offset), max(0, offset - MARKED_BYTES))

    def _begin_anew(self) -> None:
        self.offset, self.size, self.is_left, self._mark = 0, 0, False, b""
        self.begin()

    def update(self, seconds: float = math.inf) -> bool:
        """Reads what is new, for about so many seconds; -> whether anything was."""
        before = (self._identity, self.offset)
        try:
            with open_inside(self._folder, self._name) as file:
                self._read(file, time.monotonic() + seconds)
            self.problem = ""
        except FileNotFoundError:
            self.problem = ""
            if self._identity is not None:
                self._identity = None
                self._begin_anew()
        except OSError as error:
            self.problem = f"{self._folder / self._name} cannot be read ({error.strerror or error})"
        return before != (self._identity, self.offset)

    def _read(self, file: BinaryIO, until: float) -> None:
        told = os.fstat(file.fileno())
        identity = told.st_dev, told.st_ino
        if identity != self._identity or told.st_size < self.offset or not self._is_marked(file):
            self._identity = identity
            self._begin_anew()
        self.size, self.is_left = told.st_size, False
        if not self.offset:
            self.skip(file)
        file.seek(self.offset)
        rest = b""
        while chunk := file.read(CHUNK):
            rest += chunk
            *lines, rest = rest.split(b"\n")
            for line in lines:
                self.take(line)
                self.offset += len(line) + 1
            if lines:
                self._mark = (self._mark + b"\n".join([*lines, b""]))[-MARKED_BYTES:]
            if len(rest) > LONGEST_LINE:  # of no version: what follows it is looked at again when it has an end
                return
            if time.monotonic() > until:
                self.is_left = True
                return

    def _is_marked(self, file: BinaryIO) -> bool:
        return os.pread(file.fileno(), len(self._mark), self.offset - len(self._mark)) == self._mark
