"""Finds run folders: those that were named, and those below folders that were named, as they come and go."""

import os
import time
from functools import cache
from hashlib import sha256
from pathlib import Path

from controlbooth.data.errors import UserError
from controlbooth.launch.watch.control_run import ControlRun
from controlbooth.launch.watch.files import SETTLED_SECONDS, Stamp, stamp_of
from controlbooth.launch.watch.subject_run import SubjectRun

DEEPEST = 4
"""Folders below a named one in which runs are looked for, as of ablations or of rounds of retraining."""
MOST_RUNS = 5000
LEAST_PAUSE = 1.0
"""Seconds between two looks for runs."""
Run = ControlRun | SubjectRun


class Finder:
    """The runs below some folders. A folder is listed again only when it has changed."""

    def __init__(self, folders: list[Path]):
        """Raises UserError for what is no folder."""
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder} is no folder: give the folder of a run, or one that holds runs, as runs")
        self._folders = [folder.absolute() for folder in folders]
        self._runs: dict[Path, Run] = {}
        self._listed: dict[Path, tuple[Stamp, str, list[str]]] = {}
        self._next = 0.0

    def runs(self) -> dict[str, Run]:
        """Returns the runs that are there now, by a name for addresses that stays the same."""
        if time.monotonic() >= self._next:
            self._look()
            self._next = time.monotonic() + LEAST_PAUSE
        return {key_of(folder): run for folder, run in self._runs.items()}

    def _look(self) -> None:
        found: dict[Path, Run] = {}
        seen: dict[Path, tuple[Stamp, str, list[str]]] = {}
        left = [(folder, folder, 0) for folder in self._folders]
        while left and len(found) < MOST_RUNS:
            root, folder, depth = left.pop(0)
            if folder in seen or (listed := self._list(folder)) is None:
                continue
            seen[folder] = listed
            _, kind, inner = listed
            if kind:
                found[folder] = self._known(kind, folder, root)
            elif depth < DEEPEST:
                left += [(root, folder / name, depth + 1) for name in inner]
        self._runs, self._listed = found, seen

    def _known(self, kind: str, folder: Path, root: Path) -> Run:
        made = SubjectRun if kind == "subjects" else ControlRun
        before = self._runs.get(folder)
        if isinstance(before, made):
            return before
        several = len(self._folders) > 1 and folder != root
        name = str(folder.relative_to(root.parent if several else root)) if folder != root else folder.name
        return made(folder, name)

    def _list(self, folder: Path) -> tuple[Stamp, str, list[str]] | None:
        """Lists a folder: what it is known by, which kind of run it is, if any, and the folders in it."""
        stamp = stamp_of(folder)
        if stamp is None:
            return None
        before = self._listed.get(folder)
        if before is not None and before[0] == stamp and time.time() - stamp.changed / 1e9 > SETTLED_SECONDS:
            return before
        try:
            with os.scandir(folder) as entries:
                names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except OSError:  # gone since, or not ours to read
            return None
        inner = sorted(name for name, is_folder in names.items() if is_folder and not name.startswith("."))
        return stamp, kind_of(folder, names), inner


def kind_of(folder: Path, names: dict[str, bool]) -> str:
    """Tells which kind of run a folder is of: subjects, controlnet, or an empty text for none. names: what is in it,
    and whether that is a folder."""
    is_run = any(names.get(name) is False for name in ("config.yaml", "status.json", "attempt.json", "metrics.jsonl"))
    job = names.get("job") is True and (folder / "job" / "job.json").is_file()
    if names.get("subjects.json") is False or (is_run and names.get("subjects") is True):
        return "subjects"
    if job and (folder / "job" / "subjects.jsonl").is_file():
        return "subjects"
    return "controlnet" if is_run or job else ""


@cache
def key_of(folder: Path) -> str:
    """Returns the name of a folder in addresses: hexadecimal, so that nothing in the folder's own name counts."""
    return sha256(os.fsencode(folder)).hexdigest()[:12]
