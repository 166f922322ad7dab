"""Lists the cases about runs that cannot work, damaged files of a run, and disks without locks."""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from case import Case, Outcome, Ran, last_line, run

WEIGHTS = "checkpoints/step-00000003/controlnet/diffusion_pytorch_model.safetensors"


def digest(folder: Path) -> str:
    """Returns that of the weights of step 3; `none` where there are none."""
    path = folder / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "none"


def train(place: Path, name: str, *changes: str) -> Ran:
    return run(place, "controlbooth", "train", "run.yaml", f"name={name}", *changes)


def status(place: Path, name: str) -> str:
    """Returns the state that status.json tells; nothing where it tells none."""
    try:
        return str(json.loads((place / "runs" / name / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def resumed(name: str, file: str, undisturbed: str = "base") -> Callable[[Path], Outcome]:
    """Returns a look at a run with one damaged file: gone on from an older checkpoint or from the file made again, and
    told by its name; the weights are the undisturbed ones."""

    def look(place: Path) -> Outcome:
        ran = train(place, name)
        equal = digest(place / "runs" / name) == digest(place / "runs" / undisturbed) != "none"
        named = any("damaged" in line and file in line for line in ran.text.splitlines())
        right = ran.status == 0 and not ran.traceback and equal and named and status(place, name) == "finished"
        return Outcome(right, f"{'passed over by name' if named else last_line(ran)}; weights equal: {equal}")

    return look


def universal(place: Path) -> Outcome:
    """Looks at states that were split for another number of ranks, and of which one bit has changed."""
    ran = train(place, "universal")
    equal = digest(place / "runs/universal") == digest(place / "runs/universal-undamaged") != "none"
    again = "splitting" in ran.text
    right = ran.status == 0 and not ran.traceback and equal and again
    return Outcome(right, f"{'made again' if again else last_line(ran)}; weights equal: {equal}")


def backup(place: Path) -> Outcome:
    """Looks whether a copy beside a checkpoint is left alone."""
    ran = train(place, "backup", "checkpoint.keep=1", "checkpoint.keep_best=0")
    there = sorted(path.name for path in (place / "runs/backup/checkpoints").iterdir())
    equal = digest(place / "runs/backup") == digest(place / "runs/base") != "none"
    right = ran.status == 0 and equal and "backup at" not in ran.text
    right = right and there == ["step-00000002-backup", "step-00000003"]
    return Outcome(right, f"there are {', '.join(there)}; weights equal: {equal}")


def damaged_status(place: Path) -> Outcome:
    """Looks for the reason of a refused start, and for a whole status file."""
    ran = train(place, "status", "seed=1")
    right = ran.refused and "set the seed back" in ran.text and status(place, "status") == "failed"
    return Outcome(right, f"{last_line(ran)}; status.json says {status(place, 'status') or 'nothing'}")


def damaged_attention(place: Path) -> Outcome:
    """Looks whether the note of a choice is made again, and told."""
    ran = train(place, "attention", "model.attention=auto")
    named = any("attention.json cannot be read" in line for line in ran.text.splitlines())
    whole = "name" in json.loads((place / "runs/attention/attention.json").read_text())
    right = ran.status == 0 and not ran.traceback and named and whole
    return Outcome(right, "chosen anew, with a warning by name" if right else last_line(ran))


def damaged_attempt(place: Path) -> Outcome:
    ran = train(place, "attempt")
    return Outcome(ran.refused and "runs/attempt/attempt.json cannot be read" in ran.text, last_line(ran))


def linked_lock(place: Path) -> Outcome:
    ran = train(place, "lock-link")
    held = (place / "runs/precious.txt").stat().st_size
    right = ran.refused and ".lock is a symbolic link" in ran.text and held == 24
    return Outcome(right, f"{last_line(ran)}; the linked file has {held} bytes of 24")


def deleted_metrics(place: Path) -> Outcome:
    """Looks which steps' loss MLflow has."""
    ran = train(place, "metrics-deleted", "max_steps=5")
    run_id = json.loads((place / "runs/metrics-deleted/tracking.json").read_text())["run_id"]
    with closing(sqlite3.connect(place / "runs/mlflow.db")) as store:
        of_run = "from metrics where run_uuid = ? and key in ('loss', 'train/loss')"
        found = store.execute(f"select distinct step {of_run} order by step", (run_id,))
        steps = [step for (step,) in found]
        twice = f"select count(*), count(distinct step) {of_run} and step > 3"
        lines, points = store.execute(twice, (run_id,)).fetchone()
    told = "metrics.jsonl is not the file of which" in ran.text
    right = ran.status == 0 and told and steps[-2:] == [4, 5] and lines == points == 2
    return Outcome(right, f"{'told; ' if told else ''}MLflow has the loss of steps {', '.join(map(str, steps))}")


def impossible_tracking(place: Path) -> Outcome:
    """Looks at the dry run and the start of three addresses that can never work."""
    meant = {
        "./mlruns": "sqlite:///./mlruns/mlflow.db",
        "localhost:5000": "http://localhost:5000",
        "htpp://host:5000": "http://host:5000",
    }
    right, seen = True, []
    for address, remedy in meant.items():
        for more in (["--dry-run"], []):
            ran = run(place, "controlbooth", "train", "track.yaml", f"tracking.uri={address}", *more)
            said = [line for line in ran.text.splitlines() if "tracking.uri is" in line and remedy in line]
            right = right and ran.refused and bool(said)
            seen.append(str(ran.status))
    right = right and not (place / "runs").exists()
    return Outcome(right, f"statuses {', '.join(seen)} of dry run and start, and what was meant")


def no_locks(place: Path) -> Outcome:
    """Looks at packing and training where flock fails, and how long the end of the training takes."""
    path = f"{place / 'nolock'}:{os.environ.get('PYTHONPATH', '')}"
    words = ("controlbooth", "data", "pack", "pictures", "-o", "packed", "--condition", "canny", "--caption", "a ball")
    packed = run(place, *words, PYTHONPATH=path)
    began = time.monotonic()
    trained = run(place, "controlbooth", "train", "track.yaml", "output=fresh", PYTHONPATH=path)
    seconds = time.monotonic() - began
    told = all(f"{folder} knows no locks" in ran.text for ran, folder in ((packed, "packed"), (trained, "fresh/track")))
    store = place / "fresh/mlflow.db"
    points = 0
    if store.is_file():
        with closing(sqlite3.connect(store)) as opened:
            (points,) = opened.execute("select count(*) from metrics where key = 'train/loss'").fetchone()
    right = packed.status == trained.status == 0 and told and points == 2 and "not take" not in trained.text
    return Outcome(right, f"packs and trains with a warning by name; MLflow has {points} steps; {seconds:.0f} s")


def damage(name: str, before: str, look: Callable[[Path], Outcome], said: str) -> Case:
    """Returns a case of damage.py. said: what was done, for the table."""
    return Case("integrity", said, "damage.py", before, look, ("OUT", name), first="tiny_run.py")


CASES: tuple[Case, ...] = (
    Case(
        "inputs", "tracking that can never work", "runs.py",
        "all three pass the dry run; the training ends with status 0 and sends nothing", impossible_tracking,
    ),
    Case(
        "inputs", "a disk without locks", "runs.py",
        "a traceback of pack; a training without its MLflow store, half a minute longer", no_locks,
    ),
    damage("state-step", "finished, with no weights of that step", resumed("state-step", "state.json"),
           "one bit of state.json"),
    damage("config-character", "a traceback at every start", resumed("config-character", "config.yaml"),
           "one bit of config.yaml"),
    damage("config-control-byte", "a traceback at every start", resumed("config-control-byte", "config.yaml"),
           "a NUL in config.yaml"),
    damage("universal", "accepted, and other weights", universal, "one bit below universal"),
    damage("backup", "gone on from the copy, which is then deleted", backup, "a copy beside a checkpoint"),
    damage("status", "KeyError in place of the reason", damaged_status, "status.json without a state"),
    damage("attention", "JSONDecodeError that names no file", damaged_attention, "attention.json cut off"),
    damage("attempt", "OverflowError with a stack", damaged_attempt, "attempt.json has the number 1e400"),
    damage("lock-link", "the linked file is emptied", linked_lock, "the lock is a link"),
    damage("metrics-deleted", "steps 4 and 5 never reach MLflow", deleted_metrics, "metrics.jsonl is gone"),
)  # fmt: skip
