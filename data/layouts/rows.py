"""What every layout is read into: parts of rows, each a picture with captions and conditions; and what was left out."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from controlbooth.data.errors import UserError
from controlbooth.data.packing.text_tables import read_text


@dataclass(frozen=True)
class Row:
    image: Path
    captions: tuple[str, ...]
    conditions: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class Part:
    """Rows that are seen equally often."""

    name: str
    rows: list[Row] = field(default_factory=list)
    repeat: int = 1
    weight: float | None = None
    is_class: bool = False
    """Regularisation pictures: of the class, not of the subject."""
    words: str = ""
    """What the folder's name says of its pictures, such as "sks dog"."""
    table: Path | None = None
    """Rows that stay in a table or data set of their own, which is packed as it is."""
    columns: tuple[str, str] = ("image", "caption")
    condition_columns: tuple[tuple[str, str], ...] = ()


@dataclass
class Understood:
    """What was found."""

    layout: str
    """In words, for people."""
    parts: list[Part] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(what, why), one entry for each thing."""
    notes: list[str] = field(default_factory=list)

    def leave(self, what: object, why: str) -> None:
        self.left_out.append((str(what), why))

    def reasons(self) -> dict[str, list[str]]:
        """Returns {why: all that was left out for it}, the most frequent first."""
        found: dict[str, list[str]] = {}
        for why, _ in Counter(why for _, why in self.left_out).most_common():
            found[why] = [what for what, reason in self.left_out if reason == why]
        return found


def caption_file(image: Path, suffixes: tuple[str, ...]) -> Path | None:
    """Finds the file beside a picture that holds its caption, by suffixes in the order of preference."""
    return next((path for path in (image.with_suffix(one) for one in suffixes) if path.is_file()), None)


def caption_lines(path: Path) -> list[str]:
    """Reads the lines of a caption file that are not empty, without byte order mark and carriage returns.

    Raises ValueError where it is not UTF-8, or empty.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise UserError("its caption file is empty")
    return lines
