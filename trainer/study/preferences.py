"""Ranks, preferences and Bradley-Terry scores of methods, out of how often one was put before another.

All of them are functions of one matrix: wins[a, b] is the weight of the answers that put a before b, a tie counting
half for each. A ranking of n pictures is read as its n (n - 1) / 2 pairs, so pairs and rankings give the same figures:
the average rank of a is 1 and the sum, over all others b, of the share of answers that put b before a.

Intervals are bootstrap intervals over raters and items at once: each resample draws raters with replacement and items
with replacement, and an answer weighs as often as its rater times as often as its item was drawn (Owen 2007, "The
pigeonhole bootstrap", which errs on the side of width). So they say what other raters and other items would give, and
many answers of few raters do not make them narrow. Where all answers agree, resamples cannot differ; there the share is
drawn from Jeffreys' posterior, Beta(answers + 1/2, 1/2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from controlbooth.trainer.evaluation.statistics import LEVEL, tails

RESAMPLES = 2000
MOST_WEIGHTS = 2**22
"""Weights of answers that are held at once."""
PRIOR = 0.5
"""Wins that each of two methods gets over the other before anybody has answered: a method that won all has a score."""
POINTS = 5.0
"""The best of the scale that the ControlNet paper reports, whose worst is 1."""


@dataclass(frozen=True)
class Pairs:
    """Answers as pairs of methods; N of them."""

    rater: np.ndarray
    """(N,) int64, as all of these."""
    item: np.ndarray
    first: np.ndarray
    second: np.ndarray
    value: np.ndarray
    """(N,) float64: 1 where the first was put before the second, 0 where behind, 0.5 for a tie."""

    def __len__(self) -> int:
        return len(self.value)


def pairs_of(rows: Sequence[tuple[int, int, Sequence[int], Sequence[float]]]) -> Pairs:
    """Reads answers as pairs. rows: (rater, item, methods, their ranks) of each answer, all as numbers from 0 on but
    the ranks, of which smaller is better. The first of a pair is the method with the smaller number."""
    found: list[tuple[int, int, int, int, float]] = []
    for rater, item, methods, ranks in rows:
        order = sorted(range(len(methods)), key=lambda place: methods[place])
        for one, place in enumerate(order):
            for other in order[one + 1 :]:
                value = 0.5 + 0.5 * float(np.sign(ranks[other] - ranks[place]))
                found.append((rater, item, methods[place], methods[other], value))
    columns = np.array(found, np.float64).reshape(-1, 5).T
    raters, items, first, second = columns[:4].astype(np.int64)
    return Pairs(raters, items, first, second, columns[4])


def wins_of(pairs: Pairs, methods: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Sums up wins: (M, M), or (B, M, M) of B resamples. weights: (B, N) of the answers; None counts each once."""
    given = np.ones((1, len(pairs))) if weights is None else weights
    wins = np.zeros((len(given), methods, methods))
    for first, second in sorted(set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))):
        here = (pairs.first == first) & (pairs.second == second)
        wins[:, first, second] = given[:, here] @ pairs.value[here]
        wins[:, second, first] = given[:, here] @ (1.0 - pairs.value[here])
    return wins[0] if weights is None else wins


def shares_of(wins: np.ndarray) -> np.ndarray:
    """Computes the share of answers that put row before column: (..., M, M), NaN where the two were never compared."""
    total = wins + np.swapaxes(wins, -1, -2)
    return np.divide(wins, total, out=np.full_like(wins, np.nan), where=total > 0)


def ranks_of(shares: np.ndarray) -> np.ndarray:
    """Computes average ranks among M methods: (..., M, M) shares -> (..., M), from 1, the best, to M."""
    size = shares.shape[-1]
    behind = np.where(np.eye(size, dtype=bool), 0.0, np.swapaxes(shares, -1, -2))
    return 1.0 + behind.sum(axis=-1)


def points_of(ranks: np.ndarray, methods: int) -> np.ndarray:
    """Rescales ranks to the paper's points: rank 1 is POINTS, the last rank is 1; with 5 methods it is 6 - rank."""
    return 1.0 + (POINTS - 1.0) * (methods - ranks) / (methods - 1)


def bradley_terry(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """Fits scores s, of mean 0, with P(a before b) = 1 / (1 + exp(s_b - s_a)), by Newton's method.

    (..., M, M) wins -> (..., M), in logits. prior: wins added for each method over each other one, so the maximum is
    there and unique whatever the answers are. (Bradley and Terry 1952; ties as half a win each.)
    """
    size = wins.shape[-1]
    given = wins + prior * (1.0 - np.eye(size))
    total = given + np.swapaxes(given, -1, -2)
    scores = np.zeros(wins.shape[:-1])
    for _ in range(100):
        expected = 1.0 / (1.0 + np.exp(np.clip(scores[..., None, :] - scores[..., :, None], -40, 40)))
        gradient = (given - total * expected).sum(axis=-1)
        curvature = total * expected * (1.0 - expected)
        # The likelihood does not change when all scores do alike; the ones hold their mean at 0.
        hessian = np.eye(size) * curvature.sum(axis=-1)[..., None] - curvature + 1.0
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        scores = scores + np.clip(step, -2.0, 2.0)
        if np.abs(step).max(initial=0.0) < 1e-10:
            break
    return scores - scores.mean(axis=-1, keepdims=True)


def resampled_wins(pairs: Pairs, methods: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Draws the wins of resamples of raters and items at once: (resamples, M, M)."""
    draw = np.random.default_rng(seed)
    drawn: list[tuple[np.ndarray, np.ndarray]] = []  # how often each rater, each item was drawn; whose an answer is
    for column in (pairs.rater, pairs.item):
        names, places = np.unique(column, return_inverse=True)
        if len(names) > 1:
            drawn.append((draw.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples), places))
    wins = np.empty((resamples, methods, methods))
    at_once = max(1, MOST_WEIGHTS // max(1, len(pairs)))
    for start in range(0, resamples, at_once):
        weights = np.ones((min(at_once, resamples - start), len(pairs)))
        for counts, places in drawn:
            weights *= counts[start : start + at_once, places]
        wins[start : start + at_once] = wins_of(pairs, methods, weights)
    once = wins_of(pairs, methods)
    for first, second in zip(*np.nonzero((once > 0) & (once.T == 0)), strict=True):
        total = wins[:, first, second]
        share = draw.beta(once[first, second] + 0.5, 0.5, resamples)
        wins[:, first, second], wins[:, second, first] = total * share, total * (1.0 - share)
    return wins


def interval(value: float, draws: np.ndarray, level: float = LEVEL) -> dict[str, float]:
    """Makes mean, low and high of a figure and its resamples, (B,); those in which it has none do not count."""
    known = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(known):
        return dict(mean=np.nan, low=np.nan, high=np.nan)
    low, high = np.quantile(known, tails(level))
    return dict(mean=float(value), low=float(min(low, value)), high=float(max(high, value)))


def majority_share(pairs: Pairs, first: int, second: int) -> tuple[float, int]:
    """Counts as DreamBooth's study does: the share of items in which most raters put `first` before `second`; an item
    with as many for each counts half. -> (share, items); (NaN, 0) where there are none."""
    here = (pairs.first == first) & (pairs.second == second)
    items = np.unique(pairs.item[here])
    votes = [float(np.sign(pairs.value[here & (pairs.item == item)].mean() - 0.5)) for item in items]
    return (float(np.mean(votes)) / 2 + 0.5, len(items)) if votes else (np.nan, 0)


def still_needed(answers: int, half_width: float, wanted: float) -> int:
    """Estimates how many answers more make an interval as narrow as is wanted: widths shrink with the root of their
    number, where raters and items grow alike."""
    if answers == 0 or not np.isfinite(half_width):
        return 0
    return max(0, int(np.ceil(answers * (half_width / wanted) ** 2)) - answers)
