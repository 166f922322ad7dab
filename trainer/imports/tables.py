"""Reads the tables of other trainers' flags, which are the YAML files beside this module.

The pages of docs/coming-from are made of the same tables.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

TRAINERS = {"diffusers": "diffusers", "kohya": "kohya's scripts", "simpletuner": "SimpleTuner"}
"""The name of a table of flags -> what people call the trainer."""
DATA_TABLES = {"kohya": "kohya-dataset", "simpletuner": "simpletuner-backends"}
"""A trainer -> the table of its description of data."""
KINDS = ("taken", "equivalent", "not needed", "missing")


@dataclass(frozen=True)
class Entry:
    """What becomes of a flag."""

    kind: str
    run: str | None = None
    """The field in a ControlNet's run, as section.key."""
    subjects: str | None = None
    """The same in a run of subjects."""
    read_as: str | None = None
    """How its value is read: a name of values.py."""
    values: str = "one"
    """How many words follow it on a command line: none, one or many."""
    why: str = ""

    def field(self, subjects: bool) -> str | None:
        return self.subjects if subjects else self.run


@functools.cache
def table(name: str) -> dict[str, Entry]:
    """Reads a table: {flag without dashes: its entry}."""
    rows = yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text())
    return {flag: Entry(read_as=row.pop("as", None), **row) for flag, row in rows.items()}


def counts(name: str) -> dict[str, int]:
    """Counts the flags of a table by what becomes of them, in the order of KINDS."""
    found = Counter(entry.kind for entry in table(name).values())
    return {kind: found[kind] for kind in KINDS}
