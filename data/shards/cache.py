"""Whole remote shards on a local disk, shared by the processes of a node, below a limit, least recently used out first.

Every entry is one file, named by a hash of URI, size and version. Processes keep apart by `flock` alone, which the
kernel takes back from whoever dies, so that nothing is left to clean up after a kill -9:

    <hash>.part   exclusively locked by the one that fetches it; without a lock, what a killed process left
    <hash>.tar    a whole shard: it was renamed after its last byte was on the disk
                  share-locked while someone reads from it, and then not deleted
    .lock         held while names change and room is made, so that the sum of the sizes is exact

A .part has its full size from the start, so room that was promised to one fetch is seen by the next, and a disk that
is too full says so before anything is fetched.
"""

import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from controlbooth.data.errors import UnusableFile
from controlbooth.data.files.locks import FULL, lock_descriptor
from controlbooth.data.shards.storage import RemoteShard, download, version_name

NO_ROOM_SECONDS = 300.0
"""Entries are pinned for the time of a read, so room appears in milliseconds, or as fetches of others end."""
_POLL_SECONDS = 0.02
_ENTRY = re.compile(r"[0-9a-f]{16}\.(tar|part)")


class CacheError(UnusableFile):
    """The cache cannot hold what it has to; the message says of what there is too little."""


class Cache:
    """A folder of shards and its limit. Any number of processes and threads may use one folder."""

    def __init__(self, folder: Path, limit_bytes: int):
        """Makes the folder. Files in it that are not the cache's are neither counted nor touched."""
        self.folder, self.limit_bytes = folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, shard: RemoteShard) -> Path:
        return self.folder / f"{version_name(shard.uri, shard.bytes, shard.etag)}.tar"

    def holds(self, shard: RemoteShard) -> bool:
        try:
            return self.path(shard).stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    @contextmanager
    def pinned(self, shard: RemoteShard, closing: threading.Event | None = None) -> Iterator[tuple[int, bool]]:
        """Opens the whole shard and keeps it from being deleted; gives a descriptor, and whether it was there at once.

        Fetches the shard where it is not there. Raises CacheError for want of room, and what `storage.download` raises.
        """
        descriptor = self._open(shard)
        hit = descriptor is not None
        if descriptor is None:
            descriptor = self._fetch(shard, closing, wait=True)
            assert descriptor is not None
        try:
            yield descriptor, hit
        finally:
            os.close(descriptor)

    def prefetch(self, shard: RemoteShard, closing: threading.Event | None = None) -> None:
        """Fetches the shard if it is not there, nobody else is at it and there is room. Raises as `pinned` does."""
        if not self.holds(shard) and (descriptor := self._fetch(shard, closing, wait=False)) is not None:
            os.close(descriptor)

    def discard(self, shard: RemoteShard) -> None:
        """Deletes the entry, as its bytes are not right. Who has it open goes on reading them."""
        with self._names():
            self.path(shard).unlink(missing_ok=True)

    def _open(self, shard: RemoteShard) -> int | None:
        """Opens and pins an entry, and marks it as used now; None where there is none."""
        while True:
            try:
                descriptor = os.open(self.path(shard), os.O_RDONLY)
            except FileNotFoundError:
                return None
            self._lock(descriptor, fcntl.LOCK_SH, wait=True)
            status = os.fstat(descriptor)
            if status.st_nlink and status.st_size == shard.bytes:
                with suppress(OSError):  # a disk that may only be read has what it has
                    os.utime(descriptor)
                return descriptor
            os.close(descriptor)  # deleted between opening and locking, or cut off by whoever else writes here
            if status.st_nlink:
                self.discard(shard)

    def _fetch(self, shard: RemoteShard, closing: threading.Event | None, wait: bool) -> int | None:
        """Fetches the shard, unless someone else does, and returns the pinned entry.

        wait: whether to wait for room, or for someone else who fetches it, rather than return None. Raises as `pinned`
        does.
        """
        if shard.bytes > self.limit_bytes:
            raise CacheError(
                f"{shard} has {shard.bytes} bytes, and the cache in {self.folder} is limited to "
                f"{self.limit_bytes}. Raise data.cache_gib"
            )
        part = self.path(shard).with_suffix(".part")
        while (entry := self._open(shard)) is None:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
            keep = False
            try:
                if not self._lock(descriptor, fcntl.LOCK_EX):  # someone else fetches it
                    if not wait:
                        return None
                    _pause(closing)
                elif not _is_at(descriptor, part):
                    pass  # whoever had the lock has finished it, or given it up
                elif self.holds(shard):
                    self._drop(part)
                elif not self._reserve(shard, descriptor, part, wait, closing):
                    return None
                elif keep := self._fill(shard, descriptor, part, closing):
                    return descriptor
            finally:
                if not keep:
                    os.close(descriptor)
        return entry

    def _fill(self, shard: RemoteShard, descriptor: int, part: Path, closing: threading.Event | None) -> bool:
        """Fetches into the reserved file and gives it its name; -> whether the descriptor now pins the entry."""
        try:
            download(shard, descriptor, closing)
            os.fsync(descriptor)
            with self._names():
                os.replace(part, self.path(shard))
        except BaseException as error:
            self._drop(part)
            self._explain(error, shard)
            raise
        self._lock(descriptor, fcntl.LOCK_SH, wait=True)
        os.utime(descriptor)
        return os.fstat(descriptor).st_nlink > 0  # the change of locks is not atomic

    def _reserve(
        self, shard: RemoteShard, descriptor: int, part: Path, wait: bool, closing: threading.Event | None
    ) -> bool:
        """Makes room and takes it, up to the file's full size; False where there is none and waiting is not asked."""
        until = time.monotonic() + NO_ROOM_SECONDS
        os.ftruncate(descriptor, 0)
        while True:
            with self._names():
                taken = self._make_room(shard.bytes)
                if taken + shard.bytes <= self.limit_bytes:
                    try:
                        if shard.bytes:
                            os.posix_fallocate(descriptor, 0, shard.bytes)
                    except OSError as error:
                        part.unlink(missing_ok=True)
                        self._explain(error, shard)
                        raise
                    return True
            if not wait or time.monotonic() > until:
                self._drop(part)
                if not wait:
                    return False
                raise CacheError(
                    f"{taken} of the {self.limit_bytes} bytes of the cache in {self.folder} have been in use for "
                    f"{NO_ROOM_SECONDS:.0f} s, and {shard} needs {shard.bytes}. Raise data.cache_gib"
                )
            _pause(closing)

    def _make_room(self, needed: int) -> int:
        """Deletes leftovers, and entries that nobody reads from the least recently used on; -> bytes still taken."""
        files = []
        for item in os.scandir(self.folder):
            if _ENTRY.fullmatch(item.name):
                try:
                    status = item.stat()
                except FileNotFoundError:
                    continue  # names change under the lock alone, but someone may have deleted it by hand
                files.append((item.name.endswith(".tar"), status.st_mtime_ns, status.st_size, item.path))
        taken = sum(size for *_, size, _ in files)
        for is_entry, _, size, path in sorted(files):
            if is_entry and taken + needed <= self.limit_bytes:
                break
            if self._delete_if_free(path):
                taken -= size
        return taken

    def _drop(self, part: Path) -> None:
        with self._names():
            part.unlink(missing_ok=True)

    @contextmanager
    def _names(self) -> Iterator[None]:
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock(descriptor, fcntl.LOCK_EX, wait=True)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, kind: int, wait: bool = False) -> bool:
        """Locks a descriptor as `lock_descriptor` does; returns whether it has the lock.

        Whoever fetches does not wait: a wait inside flock could not be ended by `closing`. Raises CacheError where the
        disk knows no locks, as nothing else keeps a shard that is read from being deleted.
        """
        held = lock_descriptor(descriptor, kind, wait=wait)
        if held is None:
            raise CacheError(
                f"the disk of the cache {self.folder} knows no locks, by which those that share a cache keep apart: "
                "name a folder on a local disk in data.cache"
            )
        return held

    def _delete_if_free(self, path: str) -> bool:
        """Deletes a file that nobody has locked. To be called while names are held."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            if free := self._lock(descriptor, fcntl.LOCK_EX):
                os.unlink(path)
            return free
        finally:
            os.close(descriptor)

    def _explain(self, error: BaseException, shard: RemoteShard) -> None:
        if isinstance(error, OSError) and error.errno in FULL:
            raise CacheError(
                f"no room for the {shard.bytes} bytes of {shard} in the cache {self.folder}: "
                f"{os.strerror(error.errno)}. Free some of that disk, or lower data.cache_gib below what it has"
            ) from error


def _pause(closing: threading.Event | None) -> None:
    if (closing or threading.Event()).wait(_POLL_SECONDS):
        raise CacheError("given up waiting for a shard in the cache, as the reader was closed")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)
