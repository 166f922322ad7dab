"""Files of one run folder, read for a page: only real files inside it, and each again only when it has changed.

A page is asked for again and again, and run folders lie on disks that are shared with the training, so a file costs a
question for its size and time unless it is another. Whatever is missing, cut or of another kind is a note on the page,
never an error. Nothing here writes, or takes a lock: even the moment in which one asks for a lock could refuse it to a
training that starts.
"""

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from controlbooth.data.errors import MissingFile, UserError
from controlbooth.data.secrets import shown

MOST_BYTES = 2**24
"""Of a file that is read whole; ours have some kB."""
SETTLED_SECONDS = 2.0
"""A file or folder that changed less than this ago is read again: its time of change may be too coarse to tell."""
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Stamp(NamedTuple):
    """By which a file or a folder is known again."""

    device: int
    inode: int
    size: int
    changed: int
    """In nanoseconds since 1970."""


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Opens a file below a folder for reading. name: relative, with slashes.

    No symbolic link below the folder is followed, so that nothing leads out of it, and no pipe is waited for. Raises
    OSError where there is no such file.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise MissingFile(f"{name!r} names no file below a folder")
    inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            outer, inner = inner, os.open(part, _FLAGS | os.O_DIRECTORY, dir_fd=inner)
            os.close(outer)
        found = os.open(parts[-1], _FLAGS | os.O_NONBLOCK, dir_fd=inner)
    finally:
        os.close(inner)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise MissingFile(f"{name!r} is no file")
    return open(found, "rb")


def stamp_of(path: Path | str) -> Stamp | None:
    """Returns what a path is known by; None where nothing is there, or it cannot be asked."""
    try:
        told = os.lstat(path)
    except (OSError, ValueError):  # the latter of a name that no disk can have
        return None
    return Stamp(told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns)


class Files:
    """The files of one folder, with what was made of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._prefix = f"{folder}/"
        self._problems: dict[tuple[str, Any], str] = {}
        self._kept: dict[tuple[str, Any], tuple[Stamp, Any]] = {}

    def read(self, name: str, make: Callable[[bytes, str], Any], missing: Any = None) -> Any:
        """Returns what `make` makes of a file's bytes and of its path, which messages name.

        Returns `missing` where there is no such file or `make` raises UserError, which is then among the problems.
        """
        path = self.folder / name
        return self._made(name, make, missing, lambda: make(self._bytes(name), str(path)))

    def tail(self, name: str, most: int, make: Callable[[bytes, str], Any], missing: Any = None) -> Any:
        """Returns what `make` makes of the complete lines among the last bytes of a file, else as `read`."""

        def lines() -> bytes:
            with open_inside(self.folder, name) as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - most))
                content = file.read(most)
            return content if size <= most else content.partition(b"\n")[2]

        return self._made(name, make, missing, lambda: make(lines(), str(self.folder / name)))

    def names(self, name: str = "") -> list[str]:
        """Lists the names in a folder below this one, or in this one, in order; none where there is no such folder."""
        path = self.folder / name if name else self.folder
        if name and path.is_symlink():
            return []
        return self._made(name, "names", [], lambda: sorted(os.listdir(path)))

    @property
    def problems(self) -> list[str]:
        """Returns why files that are there cannot be used, for people."""
        return sorted(set(self._problems.values()))

    def stamp(self, name: str) -> Stamp | None:
        return stamp_of(self._prefix + name)

    def _made(self, name: str, what: Any, missing: Any, make: Callable[[], Any]) -> Any:
        stamp = stamp_of(self._prefix + name if name else self.folder)
        if stamp is None:
            self._problems.pop((name, what), None)
            self._kept.pop((name, what), None)
            return missing
        before = self._kept.get((name, what))
        if before is not None and before[0] == stamp:
            return before[1]
        self._problems.pop((name, what), None)
        try:
            value = make()
        except UserError as error:
            self._problems[name, what], value = shown(str(error)), missing
        except (FileNotFoundError, NotADirectoryError):  # gone since, or no file
            value = missing
        except OSError as error:
            self._problems[name, what], value = (
                f"{self.folder / name} cannot be read ({error.strerror or error})",
                missing,
            )
        if time.time() - stamp.changed / 1e9 > SETTLED_SECONDS:
            self._kept[name, what] = stamp, value
        else:
            self._kept.pop((name, what), None)
        return value

    def _bytes(self, name: str) -> bytes:
        with open_inside(self.folder, name) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{self.folder / name} has more than {MOST_BYTES:,} bytes, which no version has written")
        return content


def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
