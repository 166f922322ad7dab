"""YAML with a reason in each line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Line:
    """A field of a file and why it is so."""

    field: str
    """Its sections and its name, as data.shards."""
    value: Any
    why: str


def commented(lines: Sequence[Line]) -> str:
    """Writes fields as YAML, in sections, those of none first; each with its reason behind it.

    Sections come in the order in which they are met. Text of a reason is one line.
    """
    tree: dict[str, Any] = {}
    for line in lines:
        *sections, name = line.field.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = line
    return "\n".join(_written(tree, 0)) + "\n"


def _written(tree: dict[str, Any], depth: int) -> list[str]:
    own = {name: line for name, line in tree.items() if isinstance(line, Line)}
    texts = {name: f"{'  ' * depth}{name}: {_value(line.value)}" for name, line in own.items()}
    width = max(map(len, texts.values()), default=0)
    lines = [f"{texts[name].ljust(width)}  # {line.why}" for name, line in own.items()]
    for name, inner in tree.items():
        if not isinstance(inner, Line):
            lines += ([""] if depth == 0 else []) + [f"{'  ' * depth}{name}:", *_written(inner, depth + 1)]
    return lines


def _value(value: Any) -> str:
    """Writes a value on one line, so that it is read as what it is."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
