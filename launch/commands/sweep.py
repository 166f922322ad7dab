"""Sweeps of one number of a run, such as its learning rate: the values to try, as variants of `controlbooth ablate`."""

import math

from controlbooth.data.errors import UserError

FORMS = "give FIELD=LOW..HIGH, whose points lie evenly on a logarithmic scale, or FIELD=A,B,C"


def values_of(sweep: str, points: int) -> tuple[str, list[str]]:
    """Reads FIELD=LOW..HIGH or FIELD=A,B,C; -> the field, and its values as a person would write them, ascending.

    points: of a range, both ends included. Raises UserError for what is no sweep, and for fewer than two values.
    """
    field, _, text = sweep.partition("=")
    low, dots, high = text.partition("..")
    asked = [_number(part, sweep) for part in ((low, high) if dots else text.split(","))]
    if not field or "." not in field:
        raise UserError(f"--sweep {sweep!r} names no field such as optimizer.learning_rate: {FORMS}")
    if dots and not 0 < asked[0] < asked[1]:
        raise UserError(f"--sweep {sweep!r}: a range ascends from a number above 0: {FORMS}")
    if dots:
        ratio = asked[1] / asked[0]
        asked = [asked[0] * ratio ** (place / (points - 1)) for place in range(points)]
    values = [f"{value:.3g}" for value in sorted(asked)]
    if len(set(values)) < max(2, len(values)):
        raise UserError(f"--sweep {sweep!r} comes to {', '.join(values)}: at least two values, each once, are compared")
    return field, values


def variants_of(field: str, values: list[str]) -> dict[str, dict[str, list[str]]]:
    """Makes the variants of a file of ablations, whose names are what they change."""
    return {f"{field}={value}": {"changes": [f"{field}={value}"]} for value in values}


def _number(text: str, sweep: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--sweep {sweep!r}: {text!r} is no number: {FORMS}")
    return value
