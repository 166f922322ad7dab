"""Which attempt at a run may write in its folder: the newest one, and no other.

    RUN/attempt.json      the number of the newest attempt, and where it runs
    RUN/.attempt-N-ID/    what attempt N is making: a checkpoint, a status, a subject's LoRA, a cut metrics.jsonl
    RUN/.lock             held by attempt N where the disk knows locks

Each attempt takes a larger number than all before it, and makes everything in a folder of its own, from which a
finished thing is moved to its place. A new attempt empties and removes the folders of all older ones before it looks
for the latest checkpoint. After that an older attempt cannot put anything in place, whatever it had read or checked
before: nothing can be made in a folder that is gone, and nothing moved out of it or into it. So there is no moment
between a check and a move at which a process that was asleep could do harm. What it had moved before that moment is
there for its successor to go on from.

Two attempts at the same instant: both make their folder first and list the others' afterwards, so at least the lower
one sees the higher one and gives up. The ID is drawn, so that no folder comes back under the name of one that was
removed.

This needs of a disk what POSIX says of rename, mkdir and rmdir, each done as one by the machine that holds the disk:
local disks, NFS, Lustre, GPFS and CephFS do so. It does not hold for an object store that is mounted as a disk. Beside
the protection are bytes that go to files already open: lines of bad-samples-RANK.jsonl, which are only read by people,
and one batch of points on its way to MLflow.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from controlbooth.data.files.locks import open_lock, take_lock
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.engine.distributed import World, from_first_rank
from controlbooth.trainer.run.continuing import RECORD, holder_of, read_record
from controlbooth.trainer.run.disk_full import named_when_full

GIVEN = "CONTROLBOOTH_ATTEMPT"
"""Environment: the number that an engine gives to this attempt; larger at each restart of the same job."""
WITHOUT_LOCKS = "a second start of this run is not refused: it takes the run over, and the first one ends"


ASK_EVERY_SECONDS = 1.0
_DESCRIPTORS: dict[Path, int] = {}
"""Of the folders of this process's attempts, open."""
_TAKEN: set[Path] = set()
"""Folders of this process's attempts that a newer one has removed."""


class Superseded(RuntimeError):
    """A newer attempt holds the run's folder. This one must end, and write nothing there."""


@dataclass(frozen=True)
class Attempt:
    run: Path
    number: int
    identity: str
    """Drawn; settles which of two attempts with one number is the newer."""

    @property
    def order(self) -> tuple[int, str]:
        return self.number, self.identity

    @property
    def folder(self) -> Path:
        """Returns the attempt's own folder, below the run's. It is gone once a newer attempt has taken the run."""
        return self.run / f".attempt-{self.number:06d}-{self.identity}"


@contextlib.contextmanager
def only_run(run: Path, world: World) -> Iterator[Attempt]:
    """Makes the run's folder and takes it: two trainings in one folder would delete each other's checkpoints.

    Every rank calls this. Raises ConfigError on all ranks where another training holds the lock, unless the engine has
    given a larger number than to that one, and so says that it is to be replaced. Inside, whatever fails because a
    newer attempt has taken the folder is raised as Superseded.
    """
    lock, answer = None, None
    if world.rank == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock = open_lock(run / ".lock")
            answer = _claim(run, take_lock(lock, WITHOUT_LOCKS), lock)
        except (ValueError, OSError, Superseded) as error:  # to be raised on every rank, not only here
            answer = error
        if not isinstance(answer, Attempt) and lock is not None:
            lock.close()
    answer = from_first_rank(answer)
    if isinstance(answer, Exception):
        raise answer
    over = Event()
    try:
        inode = os.fstat(_held(answer)).st_ino
        if world.local_rank == 0:  # the others of its machine end with it
            Thread(target=_notice, args=(answer, inode, over), name="fence", daemon=True).start()
        yield answer
    except Superseded:
        raise
    except Exception as error:
        if is_superseded(answer):
            raise _superseded(answer) from error
        raise
    finally:
        over.set()
        if lock is not None:
            shutil.rmtree(answer.folder, ignore_errors=True)
            lock.close()
        if (descriptor := _DESCRIPTORS.pop(answer.folder, None)) is not None:
            os.close(descriptor)


def is_superseded(attempt: Attempt) -> bool:
    """Tells whether a newer attempt has begun to take the run, or has done so."""
    return _newest(attempt.run) > attempt.order


def check_still_ours(attempt: Attempt) -> None:
    """Raises Superseded where a newer attempt is seen to have taken the run: an early notice, on which nothing depends.

    Every rank calls this after every step, and it asks no disk: a thread of one rank of each machine does so.
    """
    if attempt.folder in _TAKEN:
        raise _superseded(attempt)


def _notice(attempt: Attempt, inode: int, over: Event) -> None:
    """Asks every second whether the attempt's folder is still the one that was made, until it is not or all is over."""
    while not over.wait(ASK_EVERY_SECONDS):
        with contextlib.suppress(OSError):  # of a disk that fails now, and is asked again
            if not _is_there(attempt, inode) and is_superseded(attempt):
                _TAKEN.add(attempt.folder)
                return


def move(attempt: Attempt, source: Path, target: Path) -> None:
    """Renames, where the source or the target is in the attempt's own folder. Raises Superseded where that is gone."""
    out, into = source.parent == attempt.folder, target.parent == attempt.folder
    assert out or into, f"{source} -> {target} is not protected"
    try:
        held = _held(attempt)
        os.rename(
            source.name if out else source,
            target.name if into else target,
            src_dir_fd=held if out else None,
            dst_dir_fd=held if into else None,
        )
    except OSError as error:
        if is_superseded(attempt):
            raise _superseded(attempt) from error
        raise


def _held(attempt: Attempt) -> int:
    """Returns a descriptor of the attempt's folder as it was made.

    A folder of the same name, which a library that makes its own folders could put in the place of a removed one, is
    another: nothing moves out of that.
    """
    if attempt.folder not in _DESCRIPTORS:
        _DESCRIPTORS[attempt.folder] = os.open(attempt.folder, os.O_RDONLY | os.O_DIRECTORY)
    return _DESCRIPTORS[attempt.folder]


def _is_there(attempt: Attempt, inode: int) -> bool:
    try:
        return os.stat(attempt.folder).st_ino == inode
    except FileNotFoundError:
        return False


def write_text(attempt: Attempt, path: Path, text: str) -> None:
    """Writes a file of the run whole or not at all. Raises Superseded, and OSError on a full disk."""
    write_file(attempt, path, lambda made: made.write_text(text))


def write_file(attempt: Attempt, path: Path, write: Callable[[Path], object]) -> None:
    """Puts in place a file of the run that `write` makes at the path it is given. Raises Superseded, and OSError on a
    full disk.

    path: on the run's own disk. Ranks write at once where the last two parts of their paths differ.
    """
    made = attempt.folder / f"{path.parent.name}-{path.name}"
    try:
        with named_when_full(path):
            write(made)
            with open(made, "rb") as file:
                os.fsync(file.fileno())  # or a power cut may leave the name without the bytes
    except Exception as error:  # safetensors has errors of its own for a folder that is gone
        if is_superseded(attempt):
            raise _superseded(attempt) from error
        raise
    path.parent.mkdir(parents=True, exist_ok=True)
    move(attempt, made, path)


def _claim(run: Path, locked: bool, lock: Any) -> Attempt:
    record, given = read_record(run), _given()
    if not locked and not (given is not None and record.get("given") is not None and given > record["given"]):
        raise ConfigError(
            f"{run} is in use by another training{holder_of(record)}. Wait for it, stop it, or change `name`. An "
            f"engine that restarts a job whose old processes may still live sets {GIVEN} higher each time"
        )
    number = max(given or 0, _newest(run)[0] + 1)
    attempt = Attempt(run, number, uuid.uuid4().hex[:12])
    attempt.folder.mkdir()
    if is_superseded(attempt):  # by one that was quicker
        with contextlib.suppress(OSError):
            attempt.folder.rmdir()
        raise _superseded(attempt)
    for other in _starts(run):
        if other.order < attempt.order:
            _remove(other, attempt)
    facts = dict(number=number, identity=attempt.identity, given=given, host=socket.gethostname(), process=os.getpid())
    write_text(attempt, run / RECORD, json.dumps(facts | {"time": time.time()}))
    if not locked:  # the old one's lock stays its own; from here on ours counts
        _replace_lock(attempt, lock)
    return attempt


def _given() -> int | None:
    text = os.environ.get(GIVEN)
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{GIVEN}={text!r} is no whole number. Give one that grows with each restart, or unset it")
    return int(text)


def _remove(old: Attempt, new: Attempt) -> None:
    """Takes away what an older attempt was making, until its folder is gone for good."""
    count = 0
    while True:
        if not new.folder.is_dir():
            raise _superseded(new)
        for name in _names(old.folder):
            count += 1
            with contextlib.suppress(FileNotFoundError):  # it has just been moved to its place, or taken by another
                os.rename(old.folder / name, new.folder / f"of-{old.identity}-{count}")
        try:
            old.folder.rmdir()
            break
        except FileNotFoundError:
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    for path in [new.folder / name for name in _names(new.folder) if name.startswith(f"of-{old.identity}-")]:
        # The old one may have files open in it, which some disks keep under other names for as long.
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    """Lists the names in a folder; none where another attempt has just taken the folder away."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _replace_lock(attempt: Attempt, lock: Any) -> None:
    made = attempt.folder / ".lock"
    with open(made, "w") as fresh:
        os.dup2(fresh.fileno(), lock.fileno(), inheritable=False)
    take_lock(lock, WITHOUT_LOCKS)
    move(attempt, made, attempt.run / ".lock")


def _starts(run: Path) -> list[Attempt]:
    """Lists the attempts at a run that have a folder."""
    found = [re.fullmatch(r"\.attempt-(\d+)-(\w+)", path.name) for path in run.glob(".attempt-*")]
    return [Attempt(run, int(match[1]), match[2]) for match in found if match]


def _newest(run: Path) -> tuple[int, str]:
    """Returns the order of the newest attempt. It has a folder before it has a record, and a record before its folder
    goes."""
    folders = [attempt.order for attempt in _starts(run)]
    record = read_record(run)
    return max([*folders, (record.get("number", 0), record.get("identity") or "")])


def _superseded(attempt: Attempt) -> Superseded:
    newest, record = _newest(attempt.run), read_record(attempt.run)
    holder = holder_of(record) if record.get("number") == newest[0] else ""
    return Superseded(
        f"start {newest[0]}{holder} has taken {attempt.run} over from this one, start {attempt.number}, which ends "
        "without writing anything more there"
    )
