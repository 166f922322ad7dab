"""Curves as the page draws them: what lies on one pair of axes, by kind of run. The page's script draws them as SVG."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from controlbooth.launch.watch.metrics import Curve
from controlbooth.trainer.evaluation.verdict import VALIDATION, WITHOUT_CONTROL, Verdict, title
from controlbooth.trainer.run.best import FIGURES

Chart = dict[str, Any]
OF_STEPS = (  # title, names of metrics
    ("training loss", ("loss",)),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("samples per second", ("samples_per_second",)),
    ("stall, percent of a step", ("stall_percent",)),
    ("peak memory of a rank, GiB", ("peak_memory_gib",)),
)
DIGITS = 5
"""Of each value that goes to the page, which draws some hundred pixels."""


def line(name: str, kind: str, curve: Curve) -> dict[str, Any]:
    """Makes a line of a chart. kind: its class, which says how it is drawn."""
    return {"name": name, "kind": kind, "points": [[int(one[0]), *map(rounded, one[1:])] for one in curve.points]}


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def chart(key: str, text: str, lines: Sequence[dict[str, Any]], **more: Any) -> Chart:
    return {"key": key, "title": text, "lines": list(lines), "levels": [], "marks": [], "percent": False} | more


def step_charts(curves: dict[str, Curve]) -> list[Chart]:
    """Makes the charts of what the steps of a ControlNet cost and gave."""
    return [
        chart(names[0], text, [line(name, "own", curves[name]) for name in names if name in curves])
        for text, names in OF_STEPS
        if any(name in curves for name in names)
    ]


def control_charts(curves: dict[str, Curve], verdict: Verdict | None, figure: str | None) -> list[Chart]:
    """Makes the charts of the validations: control as a share of what is possible, then each figure beside chance and
    the real pictures, the one by which control is told first. figure: that one, without `validation/`."""
    found = []
    if figure and (share := curves.get(f"{VALIDATION}{figure}_share")):
        ends = [curves.get(f"{VALIDATION}{figure}_share_{end}") for end in ("low", "high")]
        own = line("share of what is possible", "own", share)
        if all(one is not None and len(one.points) == len(share.points) for one in ends):
            low, high = (one.points for one in ends if one is not None)
            own["points"] = [
                [int(point[0]), rounded(point[1]), rounded(least[1]), rounded(most[1])]
                for point, least, most in zip(share.points, low, high, strict=True)
            ]
        found.append(
            chart(
                "control",
                f"control: share of what is possible in {title(figure)}",
                [own],
                levels=levels(verdict),
                marks=marks(verdict),
                percent=True,
            )
        )
    for name in ordered(curves, figure):
        lines = [
            line(text, kind, curves[f"{VALIDATION}{name}{suffix}"])
            for suffix, text, kind in BESIDE
            if f"{VALIDATION}{name}{suffix}" in curves
        ]
        found.append(chart(name, f"{title(name)}, of validations", lines, marks=marks(verdict)))
    if loss := curves.get(f"{VALIDATION}fixed_noise_loss"):
        found.append(chart("fixed_noise_loss", "loss at fixed noise, of validations", [line("loss", "own", loss)]))
    return found


BESIDE = (
    ("", "with control", "own"),
    ("_chance", "chance", "chance"),
    ("_real", "real pictures", "real"),
    (WITHOUT_CONTROL, "without control", "other"),
    ("_empty_prompt", "control, no prompt", "faint"),
)
"""Suffix of a figure's name, what it is, and how it is drawn."""


def ordered(curves: Iterable[str], first: str | None) -> list[str]:
    """Lists the figures of control that were measured: the one by which it is told, then others that have a chance."""
    names = [name.removeprefix(VALIDATION) for name in curves if name.startswith(VALIDATION)]
    own = [name for name in names if f"{name}_chance" in names or name in FIGURES]
    return sorted(own, key=lambda name: (name != first, FIGURES.index(name) if name in FIGURES else len(FIGURES)))


def levels(verdict: Verdict | None) -> list[dict[str, Any]]:
    """Returns the levels of a chart of shares."""
    found: list[dict[str, Any]] = [
        {"value": 1.0, "text": "real pictures", "kind": "real"},
        {"value": 0.0, "text": "chance", "kind": "chance"},
    ]
    if verdict and verdict.last and math.isfinite(verdict.last.bound):
        found.append({"value": rounded(verdict.last.bound), "text": "to be surpassed", "kind": "bound"})
    return found


def marks(verdict: Verdict | None) -> list[dict[str, Any]]:
    """Returns the steps at which control was announced or withdrawn."""
    return [
        {"step": one.step, "text": f"obeys: {one.step:,}" if one.kind == "announced" else f"gone: {one.step:,}"}
        for one in (verdict.events if verdict else ())
    ]


LOSSES = {"instance_loss": "subject", "prior_loss": "class", "held_out_loss": "held out"}
KINDS = {"instance_loss": "own", "prior_loss": "other", "held_out_loss": "real"}


def subject_charts(curves: dict[str, Curve]) -> list[Chart]:
    """Makes the charts of one subject: losses of its steps and of its validations, and how near its pictures are."""
    found = []
    for prefix, text in (("train/", "training loss"), (VALIDATION, "loss at fixed noise, of validations")):
        lines = [
            line(LOSSES[name], KINDS[name], curves[f"{prefix}{name}"]) for name in LOSSES if f"{prefix}{name}" in curves
        ]
        if lines:
            found.append(chart(f"{prefix}loss", text, lines))
    names = [name.removeprefix(VALIDATION) for name in curves if name.startswith(VALIDATION)]
    for name in names:
        if f"nearest_{name}" in names:
            shown = (
                (name, "drawn, to its own pictures", "own"),
                (f"real_{name}", "its own, among themselves", "real"),
                (f"nearest_{name}", "drawn, to the nearest of its own", "other"),
                (f"real_nearest_{name}", "its own, to the nearest other", "chance"),
            )
            lines = [line(text, kind, curves[f"{VALIDATION}{one}"]) for one, text, kind in shown if one in names]
            found.append(chart(name, f"likeness by {name}", lines))
    if "clip_t" in names:
        found.append(
            chart("clip_t", "prompts followed (CLIP-T)", [line("drawn", "own", curves[f"{VALIDATION}clip_t"])])
        )
    return found


def job_charts(curves: dict[str, Curve]) -> list[Chart]:
    """Makes the charts of what the steps of all subjects together cost."""
    found = []
    for own, text in JOB_CHARTS.items():
        named = [name for name in curves if name.rpartition("/")[2] == own and name.startswith("train/")]
        lines = [line(name.removeprefix("train/").rpartition("/")[0], "own", curves[name]) for name in named[:8]]
        if lines:
            found.append(chart(own, text, lines))
    return found


JOB_CHARTS = {
    "instance_loss": "training loss, mean of the subjects in training",
    "step_seconds": "seconds of a step",
    "subjects_in_training": "subjects in training",
    "peak_memory_gib": "peak memory of a rank, GiB",
}


def spark(curve: Curve | None, width: int = 120, height: int = 28) -> str:
    """Returns the points of an SVG polyline of a curve; empty where it has fewer than two."""
    points = curve.points if curve else []
    if len(points) < 2:
        return ""
    steps, values = [one[0] for one in points], [one[1] for one in points]
    low, high = min(values), max(values)
    across, up = (steps[-1] - steps[0]) or 1.0, (high - low) or 1.0
    return " ".join(
        f"{(step - steps[0]) / across * width:.1f},{height - 2 - (value - low) / up * (height - 4):.1f}"
        for step, value in zip(steps, values, strict=True)
    )
