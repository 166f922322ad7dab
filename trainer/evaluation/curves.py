"""Curves of a run as SVG: control between chance and the real pictures, over the steps and at the end."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from controlbooth.trainer.evaluation.verdict import (
    VALIDATION,
    Event,
    Validation,
    Verdict,
    bound_beyond,
    title,
    validated,
)
from controlbooth.trainer.run.best import FIGURES

WITH_CONTROL, CHANCE, REAL, BOUND = "#0f766e", "#8a94a3", "#1d2530", "#b45309"
EMPTY = "_empty_prompt"
SHARES = (-0.15, 1.1)
"""Ends of the axis of shares; what lies beyond is cut off."""
SERIES = ("", "_chance", "_real", EMPTY, "_share", "_share_low", "_share_high")


@dataclass(frozen=True)
class Figure:
    """One figure of a run's validations: by suffix of its name, its values by step."""

    name: str
    series: dict[str, dict[int, float]] = field(default_factory=dict)

    def values(self, *suffixes: str) -> list[float]:
        return [value for suffix in suffixes for value in self.series.get(suffix, {}).values() if math.isfinite(value)]


def read_figures(run: Path) -> list[Figure]:
    """Reads the figures of a run's validations that show how well pictures follow their conditions.

    Those by which control is judged come first, in the order of FIGURES.
    """
    rows = validated(run)
    names = dict.fromkeys(name.removeprefix(VALIDATION) for metrics in rows.values() for name in metrics)
    own = [name for name in names if f"{name}_chance" in names or name in FIGURES]
    own.sort(key=lambda name: FIGURES.index(name) if name in FIGURES else len(FIGURES))
    found = []
    for name in own:
        series = {
            suffix: {
                step: metrics[f"{VALIDATION}{name}{suffix}"]
                for step, metrics in rows.items()
                if f"{VALIDATION}{name}{suffix}" in metrics
            }
            for suffix in SERIES
        }
        found.append(Figure(name, {suffix: curve for suffix, curve in series.items() if curve}))
    return found


def limits(figures: Iterable[Figure]) -> tuple[float, float] | None:
    """Chooses the low and high end of an axis for one figure of several runs; None where it has no values."""
    values = [value for one in figures for value in one.values("", "_chance", "_real", EMPTY)]
    if not values:
        return None
    low, high = min(0.0, *values), max(values)
    return low, max(high, 1.0) if high > 0.5 and high <= 1.0 else high * 1.08 or 1.0


def plot_shares(figure: Figure, verdict: Verdict | None, last: int) -> str:
    """Draws the share of what is possible over the steps, with its interval, as SVG.

    The steps where control was announced or withdrawn are marked. last: the step at which the axis ends.
    """
    drawing, axes = _axes("control, as a share of what is possible", last, height=3.6)
    share = figure.series["_share"]
    steps = list(share)
    low, high = (
        [np.clip(figure.series.get(end, {}).get(step, math.nan), *SHARES) for step in steps]
        for end in ("_share_low", "_share_high")
    )
    axes.fill_between(steps, low, high, color=WITH_CONTROL, alpha=0.18, linewidth=0)
    axes.plot(steps, list(share.values()), "-", color=WITH_CONTROL, marker=_marker(steps), markersize=4, linewidth=2)
    axes.axhline(1.0, color=REAL, linestyle=":", linewidth=1.4)
    axes.axhline(0.0, color=CHANCE, linestyle="--", linewidth=1.4)
    without = verdict.last.without if verdict and verdict.last else 0.0
    bound = bound_beyond(without)
    axes.axhline(bound, color=BOUND, linewidth=1)
    marks = [(1.0, "real pictures", REAL), (bound, "to be surpassed with certainty", BOUND), (0.0, "chance", CHANCE)]
    if without > 0:
        axes.axhline(without, color=CHANCE, linestyle=":", linewidth=1.2)
        marks.append((without, "without control", CHANCE))
    for place, text, colour in marks:
        axes.annotate(
            text, (0.995, place), xycoords=("axes fraction", "data"), color=colour, fontsize=8.5, ha="right",
            va="top" if place == 0.0 else "bottom", xytext=(0, -2 if place == 0.0 else 1.5), textcoords="offset points",
        )  # fmt: skip
    axes.set_ylim(*SHARES)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for event in verdict.events if verdict else ():
        _mark(axes, event)
    return _svg(drawing)


def _mark(axes: Any, event: Event) -> None:
    colour = WITH_CONTROL if event.kind == "announced" else BOUND
    if event.after is not None:
        axes.axvspan(event.after, event.step, color=colour, alpha=0.13, linewidth=0)
    axes.axvline(event.step, color=colour, linewidth=1.2)
    text = f"step {event.step:,}" if event.kind == "announced" else f"gone at {event.step:,}"
    axes.annotate(
        text, (event.step, 0.985), xycoords=("data", "axes fraction"), color=colour, fontsize=9, va="top",
        xytext=(4, 0), textcoords="offset points", fontweight="bold",
    )  # fmt: skip


def plot_figure(figure: Figure, last: int, ends: tuple[float, float] | None) -> str:
    """Draws a figure as it is measured over the steps, as SVG, beside its chance and the value of the real pictures.

    A value no better than chance means nothing. last: the step at which the axis ends. ends: of the other axis, as
    `limits` gives them.
    """
    drawing, axes = _axes(title(figure.name), last)
    series = figure.series
    if chance := series.get("_chance"):
        axes.plot(list(chance), list(chance.values()), "--", color=CHANCE, linewidth=1.6, label="chance")
        if figure.name in FIGURES:  # of which more is better
            axes.fill_between(list(chance), 0, list(chance.values()), color=CHANCE, alpha=0.16, linewidth=0)
    if real := series.get("_real"):
        axes.plot(list(real), list(real.values()), ":", color=REAL, linewidth=1.8, label="real pictures")
    own = series[""]
    shown = dict(color=WITH_CONTROL, marker=_marker(own), markersize=3.5)
    axes.plot(list(own), list(own.values()), "-", linewidth=2, label="with control", **shown)
    if bare := series.get(EMPTY):
        axes.plot(list(bare), list(bare.values()), "-", linewidth=1, alpha=0.55, label="no prompt", **shown)
    if ends:
        axes.set_ylim(*ends)
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="best")
    return _svg(drawing)


def plot_loss(curve: Mapping[int, float], last: int) -> str:
    drawing, axes = _axes("training loss, smoothed: it does not tell control", last)
    smoothed = smooth(curve)
    axes.plot(list(smoothed), list(smoothed.values()), color=REAL, linewidth=1.4)
    return _svg(drawing)


def smooth(curve: Mapping[int, float]) -> dict[int, float]:
    """Computes a running mean over a 50th of the curve's points, by step; it begins where the first window is full."""
    steps = sorted(curve)
    width = max(1, len(steps) // 50)
    values = np.convolve([curve[step] for step in steps], np.ones(width) / width, mode="valid")
    return dict(zip(steps[width - 1 :], values.tolist(), strict=True))


def plot_standing(shares: Mapping[str, Mapping[str, float]], marked: str, bound: float) -> str:
    """Draws where each variant of the pictures stands between chance and the real pictures, with its interval, as SVG.

    shares: variant -> mean, low and high. marked: the variant that is judged. bound: the share beyond which it obeys.
    """
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(8.6, 0.75 + 0.36 * len(shares)), layout="constrained")
    axes = drawing.subplots()
    axes.axvspan(SHARES[0], bound, color=CHANCE, alpha=0.14, linewidth=0)
    axes.axvline(0.0, color=CHANCE, linestyle="--", linewidth=1.4)
    axes.axvline(1.0, color=REAL, linestyle=":", linewidth=1.6)
    axes.axvline(bound, color=BOUND, linewidth=1)
    for place, (variant, share) in enumerate(shares.items()):
        colour = REAL if variant != marked else WITH_CONTROL if share["low"] > bound else BOUND
        low, mean, high = (float(np.clip(share[end], *SHARES)) for end in ("low", "mean", "high"))
        axes.plot([low, high], [place, place], color=colour, linewidth=5 if variant == marked else 2.5, alpha=0.4)
        axes.plot([mean], [place], "o", color=colour, markersize=9 if variant == marked else 5.5)
        axes.annotate(
            f"{share['mean']:.0%}", (high, place), xytext=(7, 0), textcoords="offset points", fontsize=9, va="center",
            color=colour,
        )  # fmt: skip
    axes.set_yticks(range(len(shares)), list(shares), fontsize=9.5)
    for label, variant in zip(axes.get_yticklabels(), shares, strict=True):
        if variant == marked:
            label.set(fontweight="bold")
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_xlim(SHARES[0], SHARES[1] + 0.06)
    ticks = {0.0: "chance", bound: f"{bound:.0%}", 1.0: "real pictures"}
    ticks |= {place: f"{place:.0%}" for place in (0.5, 0.75) if abs(place - bound) > 0.06}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return _svg(drawing)


def share_at(last: Validation) -> dict[str, float]:
    return dict(mean=last.share, low=last.low, high=last.high)


def _axes(name: str, last: int, height: float = 3.1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(6.4, height), layout="constrained")
    axes = drawing.subplots()
    axes.set_title(name, fontsize=11, loc="left")
    axes.set_xlabel("step")
    axes.set_xlim(-0.01 * last, 1.01 * last or 1.0)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def _marker(steps: Sequence[int] | Mapping[int, float]) -> str | None:
    return None if len(steps) > 60 else "o"


def _svg(drawing: Any) -> str:
    text = io.StringIO()
    drawing.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
