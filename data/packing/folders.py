"""The pictures below a folder, and what else lies there, so that nothing is left out without a word.

Links to folders are followed, each folder is entered once, and hidden files are no pictures: `._photo.jpg` is what
macOS writes beside `photo.jpg`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from controlbooth.data.condition_names import IMAGE_EXTENSIONS
from controlbooth.data.errors import UserError

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")
"""Names of folders and files that are parts of a data set which are not to be mixed."""
_OTHERS = (".txt", ".csv", ".json", ".jsonl", ".yaml", ".md")
"""Suffixes of files that are expected beside pictures."""


def is_picture(path: Path) -> bool:
    """Tells whether a file is named like a picture that can be read, and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def files_below(root: Path, skip: Path | None = None) -> Iterator[Path]:
    """Yields all files below a folder but hidden ones, those in hidden folders and those in `skip`, in no fixed order.

    Links to folders are followed after the folders themselves, so that each is met under its own name, and none is
    entered a second time. Raises OSError for a folder that cannot be read, and ValueError for what is named like a
    picture and is no file.
    """
    entered: set[tuple[int, int]] = set()
    folders, links = [root], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if (place := _place(folder)) in entered:
            continue
        entered.add(place)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):  # which asks the disk for links only
            path = Path(entry.path)
            if entry.name.startswith(".") or path == skip:
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif entry.is_file() or not is_picture(path):
                yield path
            else:
                raise UserError(f"{path} is {'a link to nothing' if entry.is_symlink() else 'no file'}: remove it")


def _place(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def left_out(files: Iterable[Path]) -> str:
    """Says which files are neither hidden, nor pictures that can be read, nor what lies beside them: "2 .mp4"."""
    counts = Counter(
        path.suffix.lower() or "without a suffix"
        for path in files
        if not path.name.startswith(".") and not is_picture(path) and path.suffix.lower() not in _OTHERS
    )
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))


def splits_among(names: Iterable[str]) -> list[str]:
    """Returns the names that are splits of a data set, such as "train", sorted; none where there are fewer than two."""
    found = sorted({name for name in names if name.lower() in SPLITS})
    return found if len(found) > 1 else []


def splits_of_paths(paths: Iterable[Path]) -> dict[str, Path]:
    """Finds the splits of a data set by the names of files and folders; returns none where there are not two.

    Each comes with one of its files, or with a glob where files are numbered: `train-00000-of-00004.parquet`,
    `test.parquet` and `validation/0.parquet` each belong to one.
    """
    found: dict[str, Path] = {}
    for path in sorted(paths):
        numbered = re.match(r"(.+)-\d+-of-\d+\.", path.name)
        words = re.split(r"[^a-z]+", "/".join((*path.parts[:-1], path.stem)).lower())
        name = numbered[1] if numbered else next((word for word in words if word in SPLITS), None)
        if name is not None:
            found.setdefault(name, path.with_name(f"{name}-*{path.suffix}") if numbered else path)
    return found if len(found) > 1 else {}
