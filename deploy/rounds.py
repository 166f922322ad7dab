"""What a policy remembers between ticks: state.json with its rounds, and each round's run and process.

STATE/NAME/state.json                  rounds/0003/manifest.jsonl   the data set as it was when the round began
           audit.jsonl                             run.yaml         the run, complete
           lease-00000012.json                     output.txt       what its processes have printed
           evaluations/DIGEST-.../     evaluation.json, samples.jsonl, evaluation.png
"""

import fcntl
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from controlbooth.deploy.policy import Policy

RoundState = Literal["training", "promoting", "promoted", "refused", "failed"]
CLI = [sys.executable, "-m", "controlbooth.launch.cli"]


@dataclass(frozen=True)
class Round:
    number: int
    state: RoundState
    run: str
    """Its folder."""
    trigger: str
    """Why it was started, for people."""
    started: float
    """Seconds since 1970."""
    identity: str
    """Digest of all that determines the weights; a round that was decided is not trained again."""
    dataset_fingerprint: str
    samples: int
    start: str
    """`scratch`, or the digest of the champion whose weights it started from."""
    working_directory: str
    """That relative paths of its run start from."""
    submissions: int = 0
    """How often its command was started."""
    host: str | None = None
    process: int | None = None
    process_started: float | None = None
    champion: int | None = None
    """While promoting: the version that was measured against, None where there was none."""
    version: int | None = None
    """Its own version in the registry, once it was measured."""
    reason: str = ""
    """Of its end, for people."""

    @property
    def closed(self) -> bool:
        return self.state in ("promoted", "refused", "failed")


@dataclass(frozen=True)
class State:
    created: float
    """Seconds since 1970, of the first tick."""
    evaluation_fingerprint: str | None = None
    """Of the frozen set, as first found."""
    rounds: tuple[Round, ...] = field(default=())


def read_state(folder: Path, now: float) -> State:
    path = folder / "state.json"
    if not path.is_file():
        return State(created=now)
    try:
        tree = json.loads(path.read_text())
        return State(**tree | dict(rounds=tuple(Round(**one) for one in tree["rounds"])))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Put back a copy, or take the folder {folder} away to begin anew: the "
            "champion stays in the registry"
        ) from error


def write_state(folder: Path, state: State) -> None:
    """Whole or not at all, and on the disk on return."""
    temporary = folder / "state.json.partial"
    with open(temporary, "w") as file:
        json.dump(asdict(state), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "state.json")


def with_round(state: State, changed: Round) -> State:
    """The state with a round replaced, or added where its number is new."""
    others = tuple(one for one in state.rounds if one.number != changed.number)
    return replace(state, rounds=tuple(sorted((*others, changed), key=lambda one: one.number)))


def round_folder(folder: Path, number: int) -> Path:
    return folder / "rounds" / f"{number:04d}"


def training_command(policy: Policy, run_file: Path) -> list[str]:
    """What trains a round, or goes on with it. Another engine is another command here, and another `is_alive`."""
    processes = [] if policy.processes is None else ["--processes", str(policy.processes)]
    return [*CLI, "train", str(run_file), *processes]


def submit(policy: Policy, folder: Path, one: Round) -> Round:
    """Starts the command in a session of its own, so that it outlives the tick; -> the round with its process."""
    where = round_folder(folder, one.number)
    with open(where / "output.txt", "ab") as output:
        process = subprocess.Popen(
            training_command(policy, where / "run.yaml"),
            cwd=one.working_directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return replace(
        one,
        submissions=one.submissions + 1,
        host=socket.gethostname(),
        process=process.pid,
        process_started=psutil.Process(process.pid).create_time(),
    )


def is_alive(one: Round) -> bool:
    """Whether the round's command runs, or anything else trains in its folder, whoever started it.

    Raises ValueError on another machine than the one that trains, which cannot see its processes.
    """
    if one.host not in (None, socket.gethostname()):
        raise ValueError(
            f"round {one.number} trains on {one.host}, and this is {socket.gethostname()}: engine=local is ticked on "
            "one machine. Tick there"
        )
    if one.process is not None:
        try:
            process = psutil.Process(one.process)
            same = abs(process.create_time() - (one.process_started or 0.0)) < 1.0
            if same and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            pass  # it has ended; its ranks have the lock below for as long as they live
    lock = Path(one.run) / ".lock"
    if not lock.is_file():
        return False
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def run_status(one: Round) -> dict[str, Any]:
    """status.json of its run; a state of `none` where it has not come so far."""
    path = Path(one.run) / "status.json"
    return json.loads(path.read_text()) if path.is_file() else dict(state="none")


def last_words(folder: Path, one: Round) -> str:
    """The last line that its processes have printed, but for progress bars."""
    path = round_folder(folder, one.number) / "output.txt"
    lines = path.read_text(errors="replace").replace("\r", "\n").split("\n") if path.is_file() else []
    return next(
        (line.strip()[:300] for line in reversed(lines) if line.strip() and "%|" not in line), "it has printed nothing"
    )
