"""Figures of studies against published examples, brute force and known truths."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from controlbooth.trainer.study.agreement import (
    INTERVAL,
    NOMINAL,
    ORDINAL,
    alpha_interval,
    ceiling,
    krippendorff_alpha,
    same_order,
)
from controlbooth.trainer.study.preferences import (
    PRIOR,
    bradley_terry,
    interval,
    majority_share,
    pairs_of,
    points_of,
    ranks_of,
    resampled_wins,
    shares_of,
    still_needed,
    wins_of,
)

NONE = math.nan
FOUR_OBSERVERS = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
])  # fmt: skip
"""Example C of Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"."""


@pytest.mark.parametrize(("level", "alpha"), [(NOMINAL, 0.743), (ORDINAL, 0.815), (INTERVAL, 0.849)])
def test_alpha_is_the_published_one_of_four_observers_with_missing_data(level, alpha):
    assert krippendorff_alpha(FOUR_OBSERVERS, level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_is_the_published_one_of_two_observers():
    binary = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]], float)
    assert krippendorff_alpha(binary, NOMINAL) == pytest.approx(0.095, abs=5e-4)
    letters = [[ord(one) for one in word] for word in ("aabbdcccedda", "babbbccceddd")]
    assert krippendorff_alpha(np.array(letters, float), NOMINAL) == pytest.approx(0.692, abs=5e-4)


def alpha_by_pairs(ratings: np.ndarray, level: str) -> float:
    """Alpha by its definition: observed over expected disagreement, of all pairs of values one by one."""
    units = [column[np.isfinite(column)] for column in ratings.T]
    units = [unit for unit in units if len(unit) > 1]
    every = np.concatenate(units)

    def apart(one: float, other: float) -> float:
        if level == NOMINAL:
            return float(one != other)
        if level == INTERVAL:
            return (one - other) ** 2
        low, high = min(one, other), max(one, other)
        between = ((every >= low) & (every <= high)).sum()
        return (between - ((every == low).sum() + (every == high).sum()) / 2) ** 2

    observed = sum(
        apart(one, other) / (len(unit) - 1) for unit in units for one, other in itertools.permutations(unit, 2)
    ) / len(every)
    expected = sum(apart(one, other) for one, other in itertools.permutations(every, 2))
    return 1 - observed / (expected / (len(every) * (len(every) - 1)))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from([NOMINAL, ORDINAL, INTERVAL]))
def test_alpha_is_what_counting_all_pairs_gives(raters, units, seed, level):
    draw = np.random.default_rng(seed)
    ratings = draw.integers(1, 4, (raters, units)).astype(float)
    ratings[draw.random(ratings.shape) < 0.2] = NONE
    alpha = krippendorff_alpha(ratings, level)
    if math.isfinite(alpha):
        assert alpha == pytest.approx(alpha_by_pairs(ratings, level), abs=1e-9)


def test_alpha_is_1_of_raters_who_agree_and_about_0_of_those_who_guess():
    agree = np.tile(np.array([1.0, 2.0, 1.0, 3.0]), (3, 1))
    assert krippendorff_alpha(agree) == 1.0
    guess = np.random.default_rng(0).integers(1, 3, (5, 2000)).astype(float)
    found = alpha_interval(guess)
    assert found["low"] < 0.0 < found["high"] and abs(found["mean"]) < 0.02
    assert math.isnan(krippendorff_alpha(np.full((3, 4), 2.0))) and math.isnan(krippendorff_alpha(np.zeros((0, 4))))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_bradley_terry_is_the_maximum_that_a_general_optimizer_finds(size, seed):
    wins = np.random.default_rng(seed).integers(0, 12, (size, size)).astype(float)
    np.fill_diagonal(wins, 0.0)
    given = wins + PRIOR * (1 - np.eye(size))

    def unlikely(scores: np.ndarray) -> float:
        return float((given * np.logaddexp(0.0, scores[None, :] - scores[:, None])).sum() + scores.mean() ** 2)

    best = minimize(unlikely, np.zeros(size), tol=1e-12).x
    assert bradley_terry(wins) == pytest.approx(best - best.mean(), abs=1e-4)


def test_bradley_terry_of_two_methods_is_the_logit_of_the_share():
    assert bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]), prior=0.0) == pytest.approx(
        np.array([0.5, -0.5]) * math.log(3)
    )


def test_a_method_that_won_everything_has_a_score_and_many_resamples_are_fitted_at_once():
    wins = np.array([[0.0, 20.0, 20.0], [0.0, 0.0, 12.0], [0.0, 8.0, 0.0]])
    alone = bradley_terry(wins)
    assert np.isfinite(alone).all() and alone[0] > 2.0
    assert bradley_terry(np.stack([wins, wins.T]))[0] == pytest.approx(alone)


def test_a_ranking_and_its_pairs_have_the_same_average_rank():
    ranked = [(0, 0, [0, 1, 2], [1, 2, 3]), (1, 0, [0, 1, 2], [2, 1, 3]), (0, 1, [2, 0, 1], [1, 2, 3])]
    ranks = ranks_of(shares_of(wins_of(pairs_of(ranked), 3)))
    assert ranks == pytest.approx([(1 + 2 + 2) / 3, (2 + 1 + 3) / 3, (3 + 3 + 1) / 3])
    by_pairs = [
        (rater, item, [methods[a], methods[b]], [ranks[a], ranks[b]])
        for rater, item, methods, ranks in ranked
        for a, b in itertools.combinations(range(3), 2)
    ]
    assert ranks_of(shares_of(wins_of(pairs_of(by_pairs), 3))) == pytest.approx(ranks)


def test_points_are_the_papers_scale():
    assert points_of(np.arange(1.0, 6.0), 5).tolist() == [5, 4, 3, 2, 1]
    assert points_of(np.array([1.0, 1.5, 2.0]), 2).tolist() == [5, 3, 1]


def test_ties_count_half_and_majorities_are_of_items():
    rows = [(0, 0, [0, 1], [1.5, 1.5]), (0, 1, [0, 1], [1, 2]), (1, 1, [1, 0], [2, 1]), (2, 1, [0, 1], [2, 1])]
    pairs = pairs_of(rows)
    assert shares_of(wins_of(pairs, 2))[0, 1] == pytest.approx(2.5 / 4)
    assert majority_share(pairs, 0, 1) == (0.75, 2)  # a tie, and two of three for the first


def simulated(share, raters, items, seed, spread=0.0):
    """Answers of raters to items; spread: standard deviation of an item's own logit."""
    draw = np.random.default_rng(seed)
    own = math.log(share / (1 - share)) + spread * draw.standard_normal(items)
    chosen = draw.random((raters, items)) < 1 / (1 + np.exp(-own))
    return pairs_of([(r, i, [0, 1], [1, 2] if chosen[r, i] else [2, 1]) for r in range(raters) for i in range(items)])


def test_intervals_hold_the_truth_at_least_as_often_as_they_say():
    held = 0
    for seed in range(120):
        pairs = simulated(0.7, 5, 12, seed)
        share = interval(float(pairs.value.mean()), shares_of(resampled_wins(pairs, 2, resamples=300))[:, 0, 1])
        held += share["low"] <= 0.7 <= share["high"]
    assert held >= 0.92 * 120


def test_where_all_answers_agree_the_interval_says_how_few_they_are():
    widths = []
    for items in (4, 40):
        pairs = pairs_of([(0, item, [0, 1], [1, 2]) for item in range(items)])
        share = interval(1.0, shares_of(resampled_wins(pairs, 2))[:, 0, 1])
        assert share["mean"] == share["high"] == 1.0
        widths.append(1.0 - share["low"])
    assert 0.3 < widths[0] < 0.6 and 0.03 < widths[1] < 0.1


def test_the_answers_still_needed_grow_with_the_square_of_the_precision():
    assert still_needed(100, 0.10, 0.05) == 300 and still_needed(100, 0.05, 0.05) == 0
    assert still_needed(0, NONE, 0.05) == 0


def test_raters_agree_with_themselves_by_pairs_of_pictures_and_bound_what_can_be_shown():
    assert same_order([1, 2], [1, 2]) == 1.0 and same_order([1, 2], [2, 1]) == 0.0
    assert same_order([1, 2], [1.5, 1.5]) == 0.5 and same_order([1, 2, 3], [1, 3, 2]) == pytest.approx(2 / 3)
    for probability in (0.5, 0.8, 1.0):
        assert ceiling(probability**2 + (1 - probability) ** 2) == pytest.approx(probability)
    assert ceiling(0.3) == 0.5 and math.isnan(ceiling(NONE))
