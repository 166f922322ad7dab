"""Means of few samples, and how far they can be trusted: the percentile bootstrap, with fixed draws."""

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def mean_and_interval(values: np.ndarray, level: float = LEVEL) -> dict[str, float]:
    """values: (N,) float -> mean, and low and high between which it lies in that share of resamples of the N values.

    Equal values give equal intervals: resamples are drawn from a fixed seed. One value has no spread to be told.
    """
    means = resampled_means(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return dict(mean=float(values.mean()), low=float(low), high=float(high))


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N,) -> (RESAMPLES,) means of N values drawn with replacement."""
    draw = np.random.default_rng(seed)
    count = len(values)
    at_once = max(1, 2**22 // count)
    parts = [
        values[draw.integers(0, count, (min(at_once, RESAMPLES - first), count))].mean(axis=1)
        for first in range(0, RESAMPLES, at_once)
    ]
    return np.concatenate(parts)
