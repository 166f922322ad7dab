"""One tick at a time, on whatever machine: a lease that expires, kept in files of a folder that all of them see.

Each holder has a generation, the number of its file `lease-00000012.json`; the highest one holds. A lease is taken by
creating the next file, which a file system lets exactly one process do, so there is no moment at which two have it.
MLflow's aliases have no compare-and-set: the holder asks `held` right before each change.
"""

import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from controlbooth.data.errors import UserError
from controlbooth.data.files.locks import take_name
from controlbooth.data.files.records import is_moment, is_text, is_whole, read_json
from controlbooth.data.processes.parent import dying_with

CLOCKS_APART = 60.0
"""Seconds by which clocks of machines may differ."""
_KEPT = 3
"""Files of former holders. The latest must stay, or its number would be given away twice."""


class LeaseLost(RuntimeError):
    """This process was silent for longer than its lease, and another one may have gone on."""


@dataclass(frozen=True)
class Lease:
    generation: int
    owner: str
    """A token of this one holder."""
    host: str
    process: int
    expires: float
    """Seconds since 1970; 0 once it is given back."""
    seconds: float = 0.0
    """For how long it was taken or renewed last; 0 in leases of versions before."""


def take(folder: Path, seconds: float, now: float | None = None) -> Lease | None:
    """Takes the lease for `seconds` and returns it, or returns None where another holder has it.

    Raises ValueError where the present lease expires later than its length allows, because a clock was set back: nobody
    knows then whether its holder is still at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time() if now is None else now
    latest = holder(folder)
    if latest is not None and latest.expires > now:
        if latest.seconds and latest.expires > now + latest.seconds + CLOCKS_APART:
            raise UserError(
                f"{_path(folder, latest.generation)} was taken for {latest.seconds:g} s by process {latest.process} on "
                f"{latest.host}, and expires in {latest.expires - now:.0f} s: a clock was set back. Correct it, or "
                "delete that file if no tick is at work"
            )
        return None
    generation = (latest.generation if latest else 0) + 1
    lease = Lease(generation, uuid.uuid4().hex, socket.gethostname(), os.getpid(), now + seconds, seconds)
    temporary = _write_beside(folder, lease)
    try:
        if not take_name(temporary, _path(folder, generation)):
            return None
    finally:
        temporary.unlink()
    # Others may have come, gone and been tidied away meanwhile, or the former holder has woken up and renewed its own.
    if not held(folder, lease) or (latest is not None and _expires(folder, latest) > now):
        _path(folder, generation).unlink()
        return None
    for path in sorted(folder.glob("lease-*.json"))[:-_KEPT]:
        path.unlink(missing_ok=True)
    return lease


def holder(folder: Path) -> Lease | None:
    """Returns the latest lease, whether or not it has expired or was given back; None where there is none."""
    for path in sorted(folder.glob("lease-*.json"), reverse=True):
        try:
            return Lease(**{name: one for name, one in _read(path).items() if name in Lease.__dataclass_fields__})
        except FileNotFoundError:
            continue  # tidied away, so there is a later one, or a slow taker withdrew
    return None


def held(folder: Path, lease: Lease) -> bool:
    """Tells whether nobody has taken over. This is true of an expired lease too, as long as nobody has."""
    latest = holder(folder)
    return latest is not None and latest.owner == lease.owner


def renew(folder: Path, lease: Lease, seconds: float) -> Lease:
    """Renews the lease for `seconds` from now and returns it. Raises LeaseLost where another process has taken over."""
    renewed = replace(lease, expires=time.time() + seconds, seconds=seconds)
    if held(folder, lease):
        os.replace(_write_beside(folder, renewed), _path(folder, lease.generation))
        # Asked again, as a taker asks after it has written: whichever of the two wrote first, one sees the other.
        if held(folder, lease):
            return renewed
    raise LeaseLost(
        f"this tick was silent for longer than its lease (lease_seconds={seconds:g}), and another one has taken over. "
        "It stops here; the other one goes on"
    )


def give_back(folder: Path, lease: Lease) -> None:
    if held(folder, lease):
        os.replace(_write_beside(folder, replace(lease, expires=0.0)), _path(folder, lease.generation))


class Holding:
    """A lease that is renewed by a thread as long as its holder's process lives, inside `with`; then it is given back.

    The thread only keeps others away while the holder reads or computes for long. It ends where a renewal fails, and
    the holder is told by its own next one.
    """

    def __init__(self, folder: Path, lease: Lease, seconds: float):
        self.folder, self.lease, self._seconds = folder, lease, seconds
        self._one_at_a_time = threading.Lock()
        self._over = threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> "Holding":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        give_back(self.folder, self.lease)

    def renew(self) -> None:
        """Renews the lease; call it right before each change that others can see. Raises LeaseLost, and OSError."""
        with self._one_at_a_time:
            if self._failed is not None:
                raise self._failed
            self.lease = renew(self.folder, self.lease, self._seconds)

    def _keep(self) -> None:
        while not self._over.wait(self._seconds / 4):
            try:
                self.renew()
            except (LeaseLost, OSError) as error:
                self._failed = error
                return

    def run(self, command: Sequence[str], output: Path) -> int:
        """Runs a program, renewing meanwhile; -> its exit status. Raises LeaseLost, and ends the program then.

        The program gets SIGTERM where this process is killed.
        """
        wish = dying_with(os.getpid())
        with open(output, "wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=wish)
        try:
            while True:
                try:
                    return process.wait(timeout=self._seconds / 4)
                except subprocess.TimeoutExpired:
                    self.renew()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _expires(folder: Path, lease: Lease) -> float:
    """Returns when a former holder's lease expires, as its file says now, in seconds since 1970; 0 where the file is
    gone."""
    try:
        return _read(_path(folder, lease.generation))["expires"]
    except FileNotFoundError:
        return 0.0


def _read(path: Path) -> dict[str, Any]:
    fields = {"generation": is_whole, "owner": is_text, "host": is_text, "process": is_whole, "expires": is_moment}
    return read_json(path, f"Delete it if no tick is at work in {path.parent}", fields)


def _path(folder: Path, generation: int) -> Path:
    return folder / f"lease-{generation:08d}.json"


def _write_beside(folder: Path, lease: Lease) -> Path:
    temporary = folder / f".lease.{lease.owner}.partial"
    temporary.write_text(json.dumps(asdict(lease)))
    return temporary
