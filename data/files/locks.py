"""Locks of files: the one place that takes a lock, or asks for one.

They are those of the kernel (flock), which takes them back from whoever dies, so that nothing is left to clean up after
a kill -9. The library `filelock` has no shared locks, cannot ask for a lock without taking it, and fails where a disk
says ENOLCK; so it is not used.

Some disks know no locks: network disks that are mounted without them, and some that run in user space. There a lock
that is taken keeps nobody away. Each user says what that means for it, and this is told once, with the folder's name;
who cannot do without (the cache of shards) asks `know_locks` first, and refuses the folder.
"""

import errno
import fcntl
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

from controlbooth.data.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""What a disk says that knows no locks."""
HELD = (errno.EAGAIN, errno.EACCES)
"""What a disk says of a lock that somebody else has."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says that is full; the last of a file that grows beyond what a user may write."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a disk says that knows no second names of a file."""

_told: set[Path] = set()
"""Folders of which this process has said that their disk knows no locks."""


class NotALock(UserError):
    """What lies in the place of a lock is none; the message names it, and what to do."""


def open_lock(path: Path) -> Any:
    """Opens a file to lock, made if it is not there; what it holds stays.

    Raises NotALock for a symbolic link, which could lead to anybody's file, and for what is no file; OSError besides.
    """

    def opened(name: str, _flags: int) -> int:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)

    try:
        return open(path, "r+", opener=opened)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotALock(f"{path} is a symbolic link, and a lock must be a file of its own: delete it") from None
        if error.errno in (errno.EISDIR, errno.ENXIO, None):  # Python has no number for what it cannot seek in
            raise NotALock(f"{path} is no file, and a lock must be one: move it away") from None
        raise


def take_lock(file: Any, without: str, *, wait: bool = False) -> bool:
    """Takes the lock of a file of `open_lock` until that is closed; -> whether nobody else has it.

    wait: until nobody has. without: what it means that a disk knows no locks, which is told once for each folder; then
    the answer is True. Raises OSError for what else a disk may say.
    """
    answer = lock_descriptor(file.fileno(), fcntl.LOCK_EX, wait=wait)
    if answer is None:
        _warn(Path(file.name).absolute().parent, without)
    return answer is not False


def lock_descriptor(descriptor: int, kind: int, *, wait: bool = False) -> bool | None:
    """Locks an open file, as `fcntl.LOCK_EX` or `LOCK_SH`; -> whether it has it, None where its disk knows no locks."""
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def is_locked(path: Path) -> bool:
    """Tells whether somebody has the lock of a file exclusively, as far as this machine can tell.

    False where there is no such file, where it cannot be read, and where its disk knows no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return is_file and lock_descriptor(descriptor, fcntl.LOCK_SH) is False
    finally:
        os.close(descriptor)


def know_locks(folder: Path) -> bool:
    """Tells whether the disk of a folder that is there knows locks; by a file without a name, of which nothing stays.

    Raises OSError where nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        return lock_descriptor(file.fileno(), fcntl.LOCK_EX) is not None


def take_name(made: Path, path: Path) -> bool:
    """Gives a finished file a second name that nobody has yet; -> whether it is the one that got it.

    Network disks do this as one, as local ones do. Raises OSError, with what to do, where a disk cannot.
    """
    try:
        os.link(made, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        said = (
            f"{os.strerror(error.errno or 0)}: its disk knows no hard links, by which one of several processes comes "
            "first. Put this folder on another disk"
        )
        raise OSError(error.errno, said, str(path.parent)) from error
    return True


def _warn(folder: Path, without: str) -> None:
    if folder not in _told:
        _told.add(folder)
        print(f"warning: the disk of {folder} knows no locks: {without}", file=sys.stderr, flush=True)
