"""Means of few samples, and how far they can be trusted: the percentile bootstrap, with fixed draws."""

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
NOTHING_TOLD = dict(mean=np.nan, low=np.nan, high=np.nan)
"""The share of what is possible where real pictures are not certainly better than chance."""


def mean_and_interval(values: np.ndarray, level: float = LEVEL) -> dict[str, float]:
    """Computes the mean of (N,) float values, and low and high between which a share `level` of bootstrap means lies.

    Equal values give equal intervals: resamples are drawn from a fixed seed. One value has no spread, so low and high
    are the value itself.
    """
    low, high = np.quantile(resampled_means(values), tails(level))
    return dict(mean=float(values.mean()), low=float(low), high=float(high))


def share_of_possible(
    values: np.ndarray, chances: np.ndarray, reals: np.ndarray, level: float = LEVEL, lower_is_better: bool = False
) -> dict[str, float]:
    """Computes (mean value - mean chance) / (mean of real pictures - mean chance), with a paired bootstrap interval.

    values, chances, reals: (N,) float each, row i of the same held-out sample: what its generated picture scores under
    its own condition, what it scores under those of other samples, and what its real picture scores under its own.
    Returns mean, low and high: 0 is chance and 1 is as good as real pictures; worse than chance is negative. Rows are
    resampled together, so what makes a sample hard for all three does not widen the interval.

    Real pictures must be better than chance, certainly so at that level, or else the figure can tell nothing on these
    samples, whatever the pictures are: then all three are NaN (compare `tells`), and callers leave the share out and
    say so. In the few resamples where real pictures are no better, the share may be anything, and each end of the
    interval counts them against itself.
    """
    sign = -1.0 if lower_is_better else 1.0
    gained, possible = sign * (values - chances), sign * (reals - chances)
    if not tells_apart(chances, reals, level, lower_is_better):
        return dict(NOTHING_TOLD)
    means = resampled_means(np.stack([gained, possible], axis=1))
    return dict(mean=float(gained.mean() / possible.mean())) | ends_of_ratio(means[:, 0], means[:, 1], level)


def share_difference(
    a: tuple[np.ndarray, np.ndarray],
    b: tuple[np.ndarray, np.ndarray],
    reals: np.ndarray,
    level: float = LEVEL,
    lower_is_better: bool = False,
) -> dict[str, float]:
    """Computes how much more of what is possible B reaches than A, with a paired bootstrap interval.

    Returns mean, low and high. a, b: (values, chances) of the pictures of each, (N,) float each; reals as in
    `share_of_possible`. As there, all three are NaN where real pictures are not certainly better than the chance of A
    or of B; they are also NaN where an end of the interval is not finite.
    """
    if not all(tells_apart(chances, reals, level, lower_is_better) for _, chances in (a, b)):
        return dict(NOTHING_TOLD)
    columns = [one - chances for values, chances in (a, b) for one in (values, reals)]
    gained_a, possible_a, gained_b, possible_b = np.stack(columns)
    means = resampled_means(np.stack([gained_b, possible_b, gained_a, possible_a], axis=1))
    sign = -1.0 if lower_is_better else 1.0
    known = (sign * means[:, 1] > 0) & (sign * means[:, 3] > 0)
    ratio = np.divide(means[:, 0], means[:, 1], where=known, out=np.zeros(len(means)))
    ratio -= np.divide(means[:, 2], means[:, 3], where=known, out=np.zeros(len(means)))
    mean = gained_b.mean() / possible_b.mean() - gained_a.mean() / possible_a.mean()
    interval = ends(ratio, known, level)
    return dict(mean=float(mean)) | interval if np.isfinite([*interval.values()]).all() else dict(NOTHING_TOLD)


def per_picture(values: np.ndarray, chances: np.ndarray, reals: np.ndarray) -> np.ndarray:
    """Computes what each picture adds to the share of what is possible, which is their mean: (N,) each -> (N,).

    The divisor, what is possible, is averaged over all pictures, since that of a single one may be next to nothing.
    """
    return (values - chances) / float((reals - chances).mean())


def tells_apart(chances: np.ndarray, reals: np.ndarray, level: float = LEVEL, lower_is_better: bool = False) -> bool:
    """Tells whether the figure can tell anything on these samples: real pictures must be better than chance.

    The whole paired bootstrap interval of their difference must be above 0. chances, reals: (N,) float.
    """
    means = resampled_means((chances - reals) if lower_is_better else (reals - chances))
    return bool(np.quantile(means, tails(level)[0], method="lower") > 0.0)


def ends_of_ratio(gained: np.ndarray, possible: np.ndarray, level: float) -> dict[str, float]:
    """Computes low and high of gained / possible over resamples, (R,) each; without possible > 0 it may be anything."""
    known = possible > 0
    return ends(np.divide(gained, possible, where=known, out=np.zeros(len(gained))), known, level)


def ends(values: np.ndarray, known: np.ndarray, level: float) -> dict[str, float]:
    """Computes low and high of (R,) values; those that are not `known` count against each end, as -inf and as inf."""
    below, above = tails(level)
    low = np.quantile(np.where(known, values, -np.inf), below, method="lower")
    high = np.quantile(np.where(known, values, np.inf), above, method="higher")
    return dict(low=float(low), high=float(high))


def tails(level: float) -> tuple[float, float]:
    """Returns the two quantiles between which a share `level` of all values lies."""
    return (1 - level) / 2, (1 + level) / 2


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Computes RESAMPLES means of N rows that are drawn with replacement, each row as a whole.

    values: (N,) -> (RESAMPLES,), or (N, C) -> (RESAMPLES, C).
    """
    draw = np.random.default_rng(seed)
    count = len(values)
    at_once = max(1, 2**22 // values.size)
    parts = [
        values[draw.integers(0, count, (min(at_once, RESAMPLES - first), count))].mean(axis=1)
        for first in range(0, RESAMPLES, at_once)
    ]
    return np.concatenate(parts)
