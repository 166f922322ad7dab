"""How far raters agree: with each other (Krippendorff's alpha), and each with themselves."""

import math
from collections.abc import Sequence

import numpy as np

from controlbooth.trainer.evaluation.statistics import LEVEL, tails

NOMINAL, ORDINAL, INTERVAL = "nominal", "ordinal", "interval"
RESAMPLES = 1000


def krippendorff_alpha(ratings: np.ndarray, level: str = ORDINAL) -> float:
    """Computes Krippendorff's alpha: 1 is agreement throughout, 0 what chance gives, below 0 is less than chance.

    ratings: (R, U) float of R raters and U units, NaN where a rater has said nothing. level: of measurement, what a
    difference between two values is worth. Returns NaN where no unit has two ratings, or all values are equal, so that
    nothing could be told apart. (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".)
    """
    counts, values = _value_counts(ratings)
    return _alpha(counts, _differences(values, counts, level))


def alpha_interval(
    ratings: np.ndarray, together: int = 1, level: str = ORDINAL, confidence: float = LEVEL, seed: int = 0
) -> dict[str, float]:
    """Computes alpha with its bootstrap interval over units: dict(mean, low, high), NaN as `krippendorff_alpha` says.

    together: so many neighbouring units, such as the pictures of one trial, are drawn as one. Raters are not resampled:
    one who is drawn twice would agree with himself.
    """
    value = krippendorff_alpha(ratings, level)
    if not math.isfinite(value):
        return dict(mean=value, low=value, high=value)
    groups = ratings.reshape(len(ratings), -1, together)
    groups = groups[:, (np.isfinite(groups).sum(axis=0) >= 2).any(axis=1)]
    values = np.unique(groups[np.isfinite(groups)])
    counts = (groups[..., None] == values).sum(axis=0).astype(float)
    draw = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        drawn = counts[draw.integers(0, len(counts), len(counts))].reshape(-1, len(values))
        drawn = drawn[drawn.sum(axis=1) >= 2]
        draws.append(_alpha(drawn, _differences(values, drawn, level)))
    known = np.array(draws)[np.isfinite(draws)]
    low, high = np.quantile(known, tails(confidence)) if len(known) else (value, value)
    return dict(mean=value, low=float(min(low, value)), high=float(max(high, value)))


def _value_counts(ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts, of units with two ratings at least, how many gave each value: (units, V), and the values."""
    values = np.unique(ratings[np.isfinite(ratings)])
    counts = (ratings[:, :, None] == values).sum(axis=0).astype(float)
    return counts[counts.sum(axis=1) >= 2], values


def _differences(values: np.ndarray, counts: np.ndarray, level: str) -> np.ndarray:
    """Computes the squared differences of the values, (V, V). Ordinal ones depend on how often each value is given."""
    if level == NOMINAL:
        return 1.0 - np.eye(len(values))
    if level == INTERVAL:
        return (values[:, None] - values) ** 2
    often = counts.sum(axis=0)
    middle = np.cumsum(often) - often / 2
    return (middle[:, None] - middle) ** 2


def _alpha(counts: np.ndarray, differences: np.ndarray) -> float:
    each = counts.sum(axis=1)
    often = counts.sum(axis=0)
    total = often.sum()
    if total == 0:
        return math.nan
    observed = (((counts @ differences) * counts).sum(axis=1) / (each - 1)).sum() / total
    expected = often @ differences @ often / (total * (total - 1))
    return float(1.0 - observed / expected) if expected > 0 else math.nan


def same_order(ranks: Sequence[float], others: Sequence[float]) -> float:
    """Computes the share of the pairs of pictures that two answers to one trial put in the same order; a tie in one and
    none in the other counts half."""
    signs = [
        (np.sign(ranks[b] - ranks[a]), np.sign(others[b] - others[a]))
        for a in range(len(ranks))
        for b in range(a + 1, len(ranks))
    ]
    return float(np.mean([1.0 - abs(one - other) / 2 for one, other in signs]))


def ceiling(agreement: float) -> float:
    """Computes the highest preference that raters can show who agree with themselves to this share.

    Where a rater answers rightly with probability p, two answers agree with p^2 + (1 - p)^2; so p is what a method gets
    that is always the better one. Returns 0.5 where they agree no more than chance, NaN of NaN.
    """
    return 0.5 + 0.5 * math.sqrt(max(0.0, 2 * agreement - 1)) if math.isfinite(agreement) else math.nan
