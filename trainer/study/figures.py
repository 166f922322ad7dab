"""All figures of a study, out of its plan and its answers; each beside what chance gives and what can be reached."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from controlbooth.trainer.study.agreement import alpha_interval, ceiling, same_order
from controlbooth.trainer.study.answers import Answer
from controlbooth.trainer.study.plan import CHECK, JUDGED, REPEAT, Plan, Trial
from controlbooth.trainer.study.preferences import (
    Pairs,
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
from controlbooth.trainer.study.questions import PAIRS

LEAST_REPEATS = 10
"""From which on it is said what they bound: fewer may agree or not by chance."""
LEAST_FAILED = 2
"""Checks that a rater must have failed to be left out, whatever share they are: one may be a slip."""


def shown_ranks(trial: Trial, answer: Answer) -> list[float]:
    """Returns the ranks of a trial's pictures in the order of its methods; ties share the mean of their places."""
    by_picture = dict(zip(answer.pictures, answer.ranks, strict=True))
    ranks = [by_picture[name] for name in trial.pictures]
    return [sum(one < rank for one in ranks) + (1 + sum(one == rank for one in ranks)) / 2 for rank in ranks]


def study_figures(plan: Plan, answers: Sequence[Answer], half_width: float) -> dict[str, Any]:
    """Computes everything that result.json holds of the answers that count.

    half_width: of the interval of a preference for which the missing answers are estimated. Answers of raters who
    failed their checks (LEAST_FAILED, plan.least_passed) count in no figure of the methods.
    """
    by_rater: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        if answer.trial in plan.by_id:
            by_rater.setdefault(answer.rater, {})[answer.trial] = answer
    raters = {name: rater_figures(plan, own) for name, own in sorted(by_rater.items())}
    kept = {name: own for name, own in by_rater.items() if raters[name]["counts"]}
    for name, agrees in agreements_with_others(plan, kept).items():
        raters[name]["agrees_with_others"] = agrees
    return dict(
        answers=sum(map(len, by_rater.values())),
        raters=raters,
        half_width=half_width,
        questions={name: question_figures(plan, name, kept, half_width) for name in plan.questions},
    )


def rater_figures(plan: Plan, own: Mapping[str, Answer]) -> dict[str, Any]:
    """Computes what is known of one rater: checks, repeats, time, and how often the first place was preferred."""
    checks = [_is_right(plan.by_id[one], own[one]) for one in own if plan.by_id[one].kind == CHECK]
    failed = len(checks) - sum(checks)
    passed = 1 - failed / len(checks) if checks else math.nan
    repeats = _repeats(plan, own)
    first = [one.ranks.index(1) == 0 for one in own.values() if max(one.ranks) > 1]
    return dict(
        answers=len(own),
        checks=len(checks),
        failed=failed,
        counts=not (failed >= LEAST_FAILED and passed < plan.least_passed),
        repeats=len(repeats),
        same=float(np.mean(repeats)) if repeats else math.nan,
        seconds=float(np.median([one.seconds for one in own.values()])),
        first_place=float(np.mean(first)) if first else math.nan,
        agrees_with_others=math.nan,
    )


def _is_right(trial: Trial, answer: Answer) -> bool:
    """Tells whether the first of a check's pictures was put before all others."""
    right, *others = shown_ranks(trial, answer)
    return all(right < one for one in others)


def _repeats(plan: Plan, own: Mapping[str, Answer], question: str | None = None) -> list[float]:
    """Lists, for each trial that was answered twice, the share of its pairs that were put in the same order."""
    trials = [plan.by_id[one] for one in own]
    return [
        same_order(shown_ranks(trial, own[trial.id]), shown_ranks(trial, own[trial.of]))
        for trial in trials
        if trial.kind == REPEAT and trial.of in own and question in (None, trial.question)
    ]


def question_figures(
    plan: Plan, question: str, kept: Mapping[str, Mapping[str, Answer]], half_width: float
) -> dict[str, Any]:
    """Computes the figures of the methods under one question, of the answers of the raters that count."""
    size = len(plan.methods)
    rows = judged_rows(plan, question, kept)
    pairs = pairs_of(rows)
    wins, drawn = wins_of(pairs, size), resampled_wins(pairs, size)
    shares, scores = shares_of(wins), bradley_terry(wins)
    drawn_shares, drawn_scores = shares_of(drawn), bradley_terry(drawn)
    ranks, drawn_ranks = ranks_of(shares), ranks_of(drawn_shares)
    methods = {}
    for place, name in enumerate(plan.methods):
        rank = interval(float(ranks[place]), drawn_ranks[:, place])
        low, high = (float(points_of(np.array(rank[end]), size)) for end in ("high", "low"))
        methods[name] = dict(
            rank=rank,
            points=dict(mean=float(points_of(np.array(rank["mean"]), size)), low=low, high=high),
            score=interval(float(scores[place]) if len(rows) else math.nan, drawn_scores[:, place]),
            all_alike=_all_alike(wins, place),
        )
    preferences = [
        _preference(plan, pairs, first, second, drawn_shares, half_width)
        for first, second in combinations(range(size), 2)
    ]
    repeats = [one for own in kept.values() for one in _repeats(plan, own, question)]
    checks = [
        _is_right(plan.by_id[one], own[one])
        for own in kept.values()
        for one in own
        if plan.by_id[one].kind == CHECK and plan.by_id[one].question == question
    ]
    same = float(np.mean(repeats)) if repeats else math.nan
    return dict(
        answers=len(rows),
        raters=len({row[0] for row in rows}),
        items=len({row[1] for row in rows}),
        methods=methods,
        preferences=preferences,
        alpha=alpha_interval(ratings(plan, question, kept), pictures_at_once(plan)),
        repeats=dict(
            count=len(repeats), same=same, ceiling=ceiling(same) if len(repeats) >= LEAST_REPEATS else math.nan
        ),
        checks=dict(count=len(checks), failed=len(checks) - sum(checks)),
        needed=max((one["needed"] for one in preferences), default=0),
    )


def _all_alike(wins: np.ndarray, place: int) -> str:
    """Says "won all" or "lost all" of a method whose score is as far out as the prior lets it be; else nothing."""
    won, lost = wins[place].sum(), wins[:, place].sum()
    if won > 0 and lost == 0:
        return "won all"
    return "lost all" if lost > 0 and won == 0 else ""


def _preference(
    plan: Plan, pairs: Pairs, first: int, second: int, drawn: np.ndarray, half_width: float
) -> dict[str, Any]:
    here = (pairs.first == first) & (pairs.second == second)
    count = int(here.sum())
    share = interval(float(pairs.value[here].mean()) if count else math.nan, drawn[:, first, second])
    majority, items = majority_share(pairs, first, second)
    return dict(
        first=plan.methods[first],
        second=plan.methods[second],
        share=share,
        answers=count,
        ties=int((pairs.value[here] == 0.5).sum()),
        majority=dict(share=majority, items=items),
        needed=still_needed(count, (share["high"] - share["low"]) / 2, half_width),
    )


def judged_rows(
    plan: Plan, question: str, kept: Mapping[str, Mapping[str, Answer]]
) -> list[tuple[int, int, list[int], list[float]]]:
    """Lists (rater, item, methods, their ranks), as numbers, of each answer to a judged trial."""
    items = {item.name: place for place, item in enumerate(plan.items)}
    rows = []
    for rater, name in enumerate(sorted(kept)):
        for answer in kept[name].values():
            trial = plan.by_id[answer.trial]
            if trial.kind == JUDGED and trial.question == question:
                methods = [plan.methods.index(one) for one in trial.methods]
                rows.append((rater, items[trial.item], methods, shown_ranks(trial, answer)))
    return rows


def pictures_at_once(plan: Plan) -> int:
    """Returns how many pictures a judged trial has."""
    return 2 if plan.form == PAIRS else len(plan.methods)


def ratings(plan: Plan, question: str, kept: Mapping[str, Mapping[str, Answer]]) -> np.ndarray:
    """Makes the table for Krippendorff's alpha: (raters, units), NaN where a rater did not see the unit.

    A unit is a picture among those of its trial, which stand together, and its rating is its rank. All pictures of a
    trial are units, though the last follows from the others: so every rank is as frequent as every other, chance is
    that of a coin, and raters who all prefer one method throughout agree.
    """
    trials = [one for one in plan.trials if one.kind == JUDGED and one.question == question]
    count = pictures_at_once(plan)
    place = {trial.id: number * count for number, trial in enumerate(trials)}
    table = np.full((len(kept), len(trials) * count), np.nan)
    for row, name in enumerate(sorted(kept)):
        for answer in kept[name].values():
            if answer.trial in place:
                ranks = shown_ranks(plan.by_id[answer.trial], answer)
                table[row, place[answer.trial] : place[answer.trial] + count] = ranks
    return table


def agreements_with_others(plan: Plan, kept: Mapping[str, Mapping[str, Answer]]) -> dict[str, float]:
    """Computes how often each rater puts two pictures in the order in which most of the others do.

    A tie agrees half; pictures without others, or with as many of them for each order, do not count. NaN without any.
    """
    agreed: dict[int, list[float]] = {}
    for question in plan.questions:
        pairs = pairs_of(judged_rows(plan, question, kept))
        if not len(pairs):
            continue
        units = np.stack([pairs.item, pairs.first, pairs.second])
        unit = np.unique(units, axis=1, return_inverse=True)[1].ravel()
        others = np.bincount(unit)[unit] - 1
        vote = np.sign(np.bincount(unit, pairs.value)[unit] - pairs.value - others / 2)
        for rater, value in zip(pairs.rater[vote != 0], (0.5 + vote * (pairs.value - 0.5))[vote != 0], strict=True):
            agreed.setdefault(int(rater), []).append(float(value))
    return {name: float(np.mean(agreed.get(place, [math.nan]))) for place, name in enumerate(sorted(kept))}
