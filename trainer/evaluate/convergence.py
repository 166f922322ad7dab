"""Sudden convergence: the step at which control snaps into place (arXiv 2302.05543, section 3.3).

The loss does not show it; the control fidelity of validations does. Its curve is explained in two ways: as one line,
and as a line that jumps once, at each place where it could. The better explanation is the more probable one, by the
Bayesian information criterion (Schwarz 1978), so a curve that merely climbs, or wavers, has no such step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlbooth.trainer.spool import read_metrics

FIGURES = ("segmentation_miou", "depth_delta", "pose_pck", "line_f1", "edge_f1", "mask_iou")
"""Of the validation, by which control is told; the first one that a run has. Those before edge_f1 are measured only of
the kind that is trained on, and edge_f1 is that of edges, so a kind's own figure comes before the others."""
LEAST_RISE = 0.15
"""A smaller jump of a figure in [0, 1] is not a ControlNet that begins to obey."""
LEAST_CONFIDENCE = 0.5
NOISE = 0.01
"""Standard deviation of a figure over a small fixed set below which differences mean nothing."""
USUAL_STEPS = 10_000
"""By which the paper's ControlNets had converged, and a run without it is worth a look."""


@dataclass(frozen=True)
class Convergence:
    step: int
    """The first validated step at the new level."""
    after: int
    """The validated step before it: convergence came later than this."""
    confidence: float
    """Probability, in [0, 1], of a jump there or one validation beside it, given the curve."""
    rise: float
    """Height of the jump, in units of the figure."""


def find_convergence(curve: Mapping[int, float]) -> Convergence | None:
    """curve: figure in [0, 1] by step. None where no jump upwards of LEAST_RISE is the likeliest explanation.

    Two validations must lie on the new level, so that a single lucky one is none.
    """
    steps = sorted(curve)
    values = np.array([curve[step] for step in steps], dtype=np.float64)
    count = len(values)
    places = range(1, count - 1)
    if not places:
        return None
    line = np.stack([np.ones(count), np.arange(count) / count], axis=1)
    evidence = [-_criterion(*_fit(line, values)[:2], count) / 2]
    rises = []
    for place in places:
        jump = (np.arange(count) >= place).astype(np.float64)
        unexplained, parameters, weights = _fit(np.column_stack([line, jump]), values)
        evidence.append(-_criterion(unexplained, parameters, count) / 2 - math.log(len(places)))
        # a slope down and a jump up explain few points perfectly, however little they differ
        rises.append(min(float(weights[-1]), float(values[place:].mean() - values[:place].mean())))
    weight = np.exp(np.array(evidence) - max(evidence))
    probability = weight / weight.sum()
    jumps = np.where(np.array(rises) >= LEAST_RISE, probability[1:], 0.0)
    best = int(jumps.argmax())
    confidence = float(jumps[max(0, best - 1) : best + 2].sum())
    if confidence < LEAST_CONFIDENCE:
        return None
    place = places[best]
    return Convergence(steps[place], steps[place - 1], confidence, rises[best])


def _fit(design: np.ndarray, values: np.ndarray) -> tuple[float, int, np.ndarray]:
    """Least squares: unexplained sum of squares, number of parameters, their values."""
    weights = np.linalg.lstsq(design, values, rcond=None)[0]
    return float(np.square(values - design @ weights).sum()), design.shape[1], weights


def _criterion(unexplained: float, parameters: int, count: int) -> float:
    return count * math.log(unexplained / count + NOISE**2) + parameters * math.log(count)


def validation_curve(run: Path, figure: str | None = None) -> dict[int, float]:
    """A figure of the run's validations by step; None takes the one by which control is told."""
    rows = [(step, metrics) for step, _, metrics in read_metrics(run)]
    for name in (figure,) if figure else FIGURES:
        curve = {step: metrics[f"validation/{name}"] for step, metrics in rows if f"validation/{name}" in metrics}
        if curve:
            return curve
    return {}


def describe(found: Convergence | None, steps: Sequence[int]) -> str:
    """For people, after validations with a figure by which control is told, at these steps."""
    if not steps:
        return "no validation has a figure that tells control of this kind: look at its pictures"
    if found:
        return (
            f"control snapped into place between step {found.after} and {found.step} "
            f"(+{found.rise:.2f}, confidence {found.confidence:.0%})"
        )
    last = max(steps)
    late = f"; it usually has by step {USUAL_STEPS:,}: look at the pictures, the pairing of conditions and targets, "
    return f"control has not snapped into place by step {last}" + (
        late + "and optimizer.learning_rate" if last > USUAL_STEPS else ""
    )


def as_tree(found: Convergence | None) -> dict[str, Any] | None:
    return None if found is None else dict(vars(found))
