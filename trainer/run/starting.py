"""What keeps any run from beginning in its folder, found before anything is written. Free of torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from controlbooth.data.files.locks import know_locks
from controlbooth.trainer.config.section import ConfigError

WRITTEN = ("checkpoints", "samples", "job")
"""Folders of a run's folder that an attempt writes to."""


def folder_problems(folder: Path) -> Iterator[str]:
    """Says why a run's folder cannot be made or written to."""
    if why := unwritable(folder):
        yield f"the run's folder would be {folder}, but {why}. Change output or name"


def unwritable(folder: Path) -> str | None:
    """Returns why a folder cannot be made or written to; None where it can."""
    existing = nearest(folder)
    if not existing.is_dir():
        return f"{existing} is a file"
    for place in (existing, *(folder / name for name in WRITTEN)):
        if not place.exists():
            continue
        try:
            know_locks(place)
        except OSError as error:
            return f"{place} is not writable ({error.strerror})"
    return None


def nearest(path: Path) -> Path:
    """Returns the path itself or its innermost parent that exists, which decides whether the path can be made."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def refuse(problems: Sequence[str]) -> None:
    """Raises ConfigError with all of them, where there are any."""
    if problems:
        raise ConfigError("; ".join(problems))
