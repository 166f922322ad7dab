"""What a sweep of one number has shown: control over its values between chance and real pictures, and which to take."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from controlbooth.data.files.whole import replaced
from controlbooth.trainer.evaluation.kinds import LOWER_IS_BETTER

NEAR = 0.05
"""Shares of what is possible that are less than this apart are told as equally good."""
PROMPTS = ("perfect", "none")
"""Captions as they are, and none: the two under which a run is trained."""
TITLES = {"perfect": "with captions", "none": "without captions"}


def shares_of(table: Sequence[Mapping[str, Any]], field: str) -> tuple[str, dict[str, dict[float, list[float]]]]:
    """Finds the first figure that has a share of what is possible; -> its name, and for each kind of prompt its shares
    by value of the field, one for each seed.

    table: the rows of ablations.json.
    """
    rows = [row for row in table if row["variant"].startswith(f"{field}=")]
    names = [name.removesuffix("_share") for row in rows for name in row if name.endswith("_share")]
    if not names:
        return "", {}
    found: dict[str, dict[float, list[float]]] = {prompt: {} for prompt in PROMPTS}
    for row in rows:
        if row["prompt"] in found and f"{names[0]}_share" in row:
            value = float(row["variant"].partition("=")[2])
            found[row["prompt"]].setdefault(value, []).append(row[f"{names[0]}_share"])
    return names[0], found


def describe_choice(field: str, figure: str, shares: Mapping[str, Mapping[float, Sequence[float]]], failed: int) -> str:
    """Says which value to take: the one with the largest mean share over both kinds of prompt, and what comes near."""
    means = {value: _mean(shares, value) for value in shares.get(PROMPTS[0], {})}
    gone = f" {failed} runs failed, and are in no line." if failed else ""
    if not means:
        return f"no value of {field} can be chosen: real pictures are not surely better than chance here.{gone}"
    best = max(means, key=lambda value: means[value])
    near = [f"{value:g}" for value, mean in means.items() if value != best and means[best] - mean < NEAR]
    text = (
        f"best: {field}={best:g}, with {100 * means[best]:.0f} % of what is possible in {figure.replace('_', ' ')} "
        f"(0 % is chance, 100 % real pictures; mean with and without captions)"
    )
    if near:
        text += f"; less than {100 * NEAR:.0f} % below it: {', '.join(near)}"
    if best in (min(means), max(means)):
        text += ". It is at the end of what was tried: sweep further on that side"
    if means[best] < 2 * NEAR:
        text += ". None of them has learned to obey yet: give them more steps before you choose"
    return f"{text}.{gone}"


def _mean(shares: Mapping[str, Mapping[float, Sequence[float]]], value: float) -> float:
    return float(np.mean([np.mean(own[value]) for own in shares.values() if value in own]))


def draw_sweep(
    path: Path, field: str, figure: str, shares: Mapping[str, Mapping[float, Sequence[float]]]
) -> str | None:
    """Draws the shares over the values, with each seed as a point, chance and real pictures as lines; -> why not, where
    matplotlib (the extra `measure`) is not installed."""
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        return 'no curve is drawn without matplotlib: pip install "controlbooth[measure]"'
    drawing = Drawing(figsize=(7, 4), layout="constrained")
    axes = drawing.subplots()
    for prompt, own in shares.items():
        values = sorted(own)
        (line,) = axes.plot(values, [np.mean(own[value]) for value in values], label=TITLES[prompt])
        for value in values:
            axes.plot([value] * len(own[value]), own[value], "o", color=line.get_color())
    for height, name in ((0.0, "chance"), (1.0, "real pictures")):
        axes.axhline(height, color="gray", linestyle="--", linewidth=1)
        axes.annotate(name, (0.99, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="gray")
    better = ", lower is better" if figure in LOWER_IS_BETTER else ""
    if min(value for own in shares.values() for value in own) > 0:
        axes.set_xscale("log")
    axes.set(xlabel=field, ylabel=f"share of what is possible\n({figure.replace('_', ' ')}{better})")
    axes.legend()
    with replaced(path) as temporary:
        drawing.savefig(temporary, format="png", dpi=120)
    return None
