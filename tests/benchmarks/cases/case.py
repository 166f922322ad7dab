"""Runs small inputs that once failed, and says what becomes of each now: what the files of this folder share."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPT_SAID = "said-by-the-script.txt"
MINUTES = 10
"""The longest that a command may take; one that hangs is a finding."""


@dataclass(frozen=True)
class Outcome:
    """Holds whether a case is right now, and in a few words what was seen."""

    right: bool
    now: str


@dataclass(frozen=True)
class Case:
    """Names one input that failed, and how to look at what becomes of it.

    `script` and its `arguments` lie in `../shared/cases/<folder>` and make the input; "OUT" among the arguments is the
    folder to write to. `before` is what version 0.1.0 did. `look` gets that folder, in which it may write.
    """

    folder: str
    name: str
    script: str
    before: str
    look: Callable[[Path], Outcome]
    arguments: tuple[str, ...] = ("OUT",)
    first: str | None = None
    """Another script of that folder, which makes in OUT what this one starts from."""


@dataclass(frozen=True)
class Ran:
    """Holds what a command printed, both streams in one, and its exit status: 124 where it did not end in time."""

    status: int
    text: str

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.text

    @property
    def refused(self) -> bool:
        """Tells whether the command ended with status 2 and a message of the product."""
        return self.status == 2 and not self.traceback


def surroundings() -> dict[str, str]:
    """Returns this process's environment, with the programs of its Python first on the PATH.

    One thread, for the scripts and for what is run after them: two sum in another order, and weights would differ.
    """
    own = {"NO_COLOR": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **own}


def run(place: Path, *words: str, **environment: str) -> Ran:
    """Runs a command in the folder `place`: `run(place, "controlbooth", "data", "pack", ...)`."""
    known = surroundings() | environment
    try:
        done = subprocess.run(
            words, cwd=place, env=known, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=60 * MINUTES, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        return Ran(124, (late.stdout or b"").decode(errors="replace"))
    return Ran(done.returncode, done.stdout)


def last_line(ran: Ran, width: int = 150) -> str:
    """Returns the last line that a command printed, shortened to `width` characters, with its exit status."""
    lines = [line for line in ran.text.splitlines() if line.strip()]
    line = lines[-1].strip() if lines else ""
    return f"{ran.status}: {line if len(line) <= width else line[: width - 1] + '…'}"


@contextmanager
def made(shared: Path, case: Case, base: Path) -> Iterator[Path]:
    """Makes the input of a case in a folder of its own below `base`, and deletes it afterwards.

    What the script prints is in SCRIPT_SAID there. Raises CalledProcessError where the script that makes it fails.
    """
    place = base / case.name.replace(" ", "-").replace("/", "-")
    place.mkdir(parents=True)
    arguments = [str(place) if argument == "OUT" else argument for argument in case.arguments]
    scripts = [*([(case.first, [str(place)])] if case.first else []), (case.script, arguments)]
    try:
        for script, words in scripts:
            with open(place / SCRIPT_SAID, "w") as said:
                subprocess.run(
                    [sys.executable, str(shared / case.folder / script), *words], cwd=place, check=True,
                    stdout=said, env=surroundings(),
                )  # fmt: skip
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
