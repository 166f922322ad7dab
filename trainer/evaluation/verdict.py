"""Whether a run's control is there, and since when: one rule, whose verdict is kept in one file that all others read.

    RUN/control.json    written by the training after each validation; read by `evaluate`, the report, `launch status`

A ControlNet does not learn control gradually: at some step it suddenly obeys (arXiv 2302.05543, section 3.3). The loss
does not show it; the figures of validations do. Each figure of control is measured beside chance, which is the same
pictures against the conditions of other samples, and beside the real pictures; its share of what is possible is

    share = (value - chance) / (value of the real pictures - chance)

with a 95 % interval over the held-out samples. Pictures that the base draws of the captions alone have a share too,
since a caption tells of what is in the condition. Control is announced where, in IN_A_ROW validations in a row, the
share lies with CERTAINTY above LEAST_SHARE of the way from what the base reaches without control to the real pictures,
and the jump lies behind. The step that is named is where the curve jumps. Validations are judged in their order, each
by those up to it alone, so whatever comes later cannot move a step that was named. Where later ones contradict it, the
verdict is withdrawn, and says so, with both steps.

How often it is wrong (tests/benchmarks/verdicts.py --simulate 400): of 7,200 runs without control of 32 validations, by
edges, depth and segmentation, each with 8, 16 and 64 samples and with pictures that change or stay, it announced none;
with the low end of the 95 % interval in place of CERTAINTY it announced up to 5 % of those by segmentation with 8.

This module needs no numpy and no torch, so that commands which start trainings can ask it what a run can tell.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from controlbooth.data.files.records import Fields, each, having, is_figure, is_text, is_whole, maybe, read_json
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.run.best import FIGURES
from controlbooth.trainer.tracking.spool import read_metrics

CONTROL = "control.json"
VALIDATION = "validation/"
"""How the names of a validation's metrics begin."""
LEAST_SHARE = 0.25
"""Of the way from what the base reaches without control to the real pictures, beyond which the share must lie. It is
far enough that a network which changes the pictures without obeying does not get there, and near enough for a
ControlNet whose base cannot draw what real pictures show."""
WITHOUT_CONTROL = "_without_control"
"""Ends the names of figures of what the base draws of the same captions without a ControlNet."""
CERTAINTY = 0.999
"""Of each validation that lies above. The low end of a 95 % interval has 97.5 %, and a run has many validations, of
which any may be the wrong one."""
IN_A_ROW = 2
LEAST_SAMPLES = 8
"""Held-out samples of a validation, below which a bootstrap interval is too narrow to rely on."""
LEAST_RISE = 0.15
"""In shares of what is possible: a smaller rise from one validation to the next is no jump."""
ABBREVIATED = {"f1": "F1", "iou": "IoU", "miou": "mIoU", "pck": "PCK", "oks": "OKS", "rmse": "RMSE"}
TRIED_ON = "a rule that announced 0 of 7,200 simulated runs without control"
"""For people, as the confidence of an announcement; the first lines of this file say which runs."""
USUAL_STEPS = 10_000
"""By which the paper's ControlNets had converged, and a run without it is worth a look."""

BEFORE_CHANCE = (
    "control cannot be told: validated before chance was measured. `controlbooth evaluate` measures both; a run that "
    "goes on does so at its next validation"
)


@dataclass(frozen=True)
class Validation:
    """Control at one step; shares of what is possible are no numbers where the real pictures are at chance."""

    step: int
    value: float
    """The figure itself: the curve that people look at, and that jumps."""
    share: float
    low: float
    """Ends of the 95 % interval over the held-out samples."""
    high: float
    without: float = 0.0
    """What the base reaches of the same captions without control, as a share."""
    value_without: float = 0.0
    """The same as a value."""

    @property
    def bound(self) -> float:
        return bound_beyond(self.without)


@dataclass(frozen=True)
class Event:
    """What was found out about a run."""

    kind: Literal["announced", "withdrawn"]
    step: int
    """Announced: the first validated step after the jump. Withdrawn: the first one of those that contradict it."""
    after: int | None
    """The validated step before it; None where there is none, as of weights that obeyed from the start."""
    told_at: int
    """The step of the validation that decided it."""
    rise: float
    """From `after` to `step`, in shares; in a run that learns gradually it is below LEAST_RISE."""
    share: float
    """At `told_at`, with the ends of its interval."""
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    figure: str | None
    """By which control is told; None where no validation has one."""
    samples: int
    """Held-out samples of a validation."""
    judged: int
    """Validations with a share."""
    without_chance: int
    """Validations of versions that did not measure chance."""
    last: Validation | None
    """The newest one that was judged."""
    events: tuple[Event, ...]

    @property
    def announced(self) -> Event | None:
        """Returns the announcement that holds now; None where control was not announced, or that was withdrawn."""
        return self.events[-1] if self.events and self.events[-1].kind == "announced" else None


def judge(validations: Sequence[Validation], samples: int) -> tuple[Event, ...]:
    """Applies the rule of this module, and returns when control was announced or withdrawn.

    validations: by rising step. samples: how many were held out, in each of them. The events of any first part of the
    validations are the first of the events of all.
    """
    if samples < LEAST_SAMPLES:
        return ()
    events: list[Event] = []
    begin = 0  # of the validations that tell of the next event
    for place in range(len(validations)):
        row = validations[max(begin, place - IN_A_ROW + 1) : place + 1]
        if len(row) < IN_A_ROW:
            continue
        first = place - IN_A_ROW + 1
        if events and events[-1].kind == "announced":
            if all(one.share < one.bound for one in row):
                events.append(_event("withdrawn", validations, first, place))
                begin = first
        elif all(certain_low(one, samples) > one.bound for one in row):
            jump = max(range(begin, place + 1), key=lambda one: _rises(validations, one)[0])
            if _rises(validations, jump)[1] < LEAST_RISE:
                jump = first
            if jump < place:  # else it is still rising as never before, and where it jumps is not yet seen
                events.append(_event("announced", validations, jump, place))
                begin = place + 1
    return tuple(events)


def _event(kind: Literal["announced", "withdrawn"], all_of_them: Sequence[Validation], at: int, now: int) -> Event:
    before = all_of_them[at - 1].step if at else None
    told = all_of_them[now]
    rise = _rises(all_of_them, at)[1]
    return Event(kind, all_of_them[at].step, before, told.step, rise, told.share, told.low, told.high)


def _rises(validations: Sequence[Validation], place: int) -> tuple[float, float]:
    """Computes the rises of the value and of the share from the validation before to this one.

    The first validation's are from what is reached without control. A share that is not finite rises by -inf.
    """
    now = validations[place]
    before = validations[place - 1] if place else None
    value = now.value - (before.value if before else now.value_without)
    share = now.share - (before.share if before else now.without)
    return value, share if math.isfinite(share) else -math.inf


def certain_low(one: Validation, samples: int) -> float:
    """Computes the share above which the true share lies with CERTAINTY."""
    return one.share - stretch(samples) * (one.share - one.low)


def stretch(samples: int) -> float:
    """Computes how many times farther below the mean `certain_low` lies than the low end of a 95 % bootstrap interval.

    That interval is a percentile one. The quantile is of Student's t, as such intervals of few samples are too narrow
    (arXiv 1411.5279, the expanded percentile interval); it is found from the normal one by formula 26.7.5 of Abramowitz
    and Stegun.
    """
    free, z = samples - 1, NormalDist().inv_cdf(CERTAINTY)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    quantile = z + sum(term / free ** (power + 1) for power, term in enumerate(terms))
    return math.sqrt(samples / free) * quantile / NormalDist().inv_cdf(0.975)


def bound_beyond(without: float) -> float:
    """Computes the share beyond which control is announced. without: the share that the base reaches on its own."""
    known = min(max(without, 0.0), 1.0) if math.isfinite(without) else 0.0
    return known + LEAST_SHARE * (1.0 - known)


def judge_run(run: Path, samples: int) -> Verdict:
    """Judges the validations in the run's metrics.jsonl. Only the training calls this; all others read its verdict."""
    by_step = validated(run)
    figure = measured_by(name for metrics in by_step.values() for name in metrics)
    if figure is None:
        return Verdict(None, samples, 0, 0, None, ())
    rows = {step: metrics for step, metrics in by_step.items() if figure in metrics}
    found = [
        Validation(
            step,
            metrics[figure],
            *(metrics.get(f"{figure}_share{end}", math.nan) for end in ("", "_low", "_high")),
            without=metrics.get(f"{figure}{WITHOUT_CONTROL}_share", 0.0),
            value_without=metrics.get(f"{figure}{WITHOUT_CONTROL}", metrics[f"{figure}_chance"]),
        )
        for step, metrics in rows.items()
        if f"{figure}_chance" in metrics
    ]
    name = figure.removeprefix(VALIDATION)
    last = found[-1] if found else None
    return Verdict(name, samples, len(found), len(rows) - len(found), last, judge(found, samples))


def validated(run: Path) -> dict[int, dict[str, float]]:
    """Reads the metrics that the run's validations have logged, by rising step."""
    found: dict[int, dict[str, float]] = {}
    for step, _, metrics in read_metrics(run):
        if own := {name: value for name, value in metrics.items() if name.startswith(VALIDATION)}:
            found.setdefault(step, {}).update(own)
    return dict(sorted(found.items()))


def measured_by(metrics: Iterable[str]) -> str | None:
    """Chooses the metric by which control is judged, from the names of metrics; None where there is none.

    It is the first of FIGURES that has a share, else the first that has a chance, else the first that is there.
    """
    names = set(metrics)
    for suffix in ("_share", "_chance", ""):
        for figure in FIGURES:
            if f"{VALIDATION}{figure}{suffix}" in names:
                return f"{VALIDATION}{figure}"
    return None


def validation_curve(run: Path, name: str) -> dict[int, float]:
    """Reads one figure of the run's validations: step -> value."""
    name = f"{VALIDATION}{name}"
    return {step: metrics[name] for step, metrics in validated(run).items() if name in metrics}


def as_tree(verdict: Verdict) -> dict[str, Any]:
    """Makes what control.json holds: the verdict's fields, and the verdict in words as `told`.

    Numbers that are not finite become text, as JSON has no other way for them.
    """
    return _written(asdict(verdict)) | {"told": describe(verdict)}


def _written(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _written(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_written(one) for one in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _figure(value: Any) -> bool:
    return is_figure(value) or value in ("nan", "inf", "-inf")


EVENT: Fields = {
    "kind": lambda value: value in ("announced", "withdrawn"),
    **{"step": is_whole, "after": maybe(is_whole), "told_at": is_whole},
    **dict.fromkeys(("rise", "share", "low", "high"), _figure),
}
LAST: Fields = {
    "step": is_whole,
    **dict.fromkeys(("value", "share", "low", "high"), _figure),
    **dict.fromkeys(("without", "value_without"), maybe(_figure)),
}
VERDICT: Fields = {
    "figure": maybe(is_text),
    **dict.fromkeys(("samples", "judged", "without_chance"), is_whole),
    "last": maybe(having(LAST)),
    "events": each(having(EVENT)),
}
"""Fields of control.json, and of what is in it."""


def from_tree(tree: Mapping[str, Any]) -> Verdict:
    """Makes a verdict of a tree with VERDICT's fields, as the inverse of `as_tree`."""
    numbers = ("rise", "value", "share", "low", "high", "without", "value_without")

    def read(kind: type, one: Mapping[str, Any]) -> Any:
        known = {name: one.get(name) for name in kind.__dataclass_fields__}
        plain = {name: value for name, value in known.items() if name not in numbers}
        return kind(**plain, **{name: float(value) for name in numbers if (value := known.get(name)) is not None})

    events = tuple(read(Event, one) for one in tree["events"])
    last = None if tree["last"] is None else read(Validation, tree["last"])
    return Verdict(tree["figure"], tree["samples"], tree["judged"], tree["without_chance"], last, events)


def read_verdict(run: Path) -> Verdict | None:
    """Reads a run's verdict from control.json; returns None for a run without one. Raises Damaged.

    A run has none where it was not validated, or by a version that did not measure chance.
    """
    remedy = "Delete it: a training that goes on writes it again"
    tree = read_json(run / CONTROL, remedy, VERDICT, missing=None)
    return None if tree is None else from_tree(tree)


def describe_run(run: Path) -> str:
    """Describes the verdict on a run for people, also where there is none."""
    verdict = read_verdict(run)
    if verdict is not None:
        return describe(verdict)
    return BEFORE_CHANCE if validated(run) else "nothing was validated"


def describe(verdict: Verdict) -> str:
    """Describes a verdict for people, in one line."""
    if verdict.last is None:
        if verdict.without_chance:
            return BEFORE_CHANCE
        if verdict.figure is None:
            return "no validation has a figure that tells control of this kind: look at its pictures"
    if verdict.samples < LEAST_SAMPLES:
        return (
            f"control cannot be told by {verdict.samples} held-out samples: set validation.samples to {LEAST_SAMPLES} "
            "or more"
        )
    figure = title(verdict.figure or "")
    if not verdict.events:
        return _describe_none(verdict, figure)
    *before, now = verdict.events
    seen = f"{in_words(now.share, now.low, now.high)} of what is possible in {figure} at step {now.told_at}"
    if now.kind == "withdrawn":
        return (
            f"correction: control was announced for step {before[-1].step} and is withdrawn, since it is gone from "
            f"step {now.step} on: {seen}"
        )
    came = "at the first validation" if now.after is None else f"between step {now.after} and {now.step}"
    how = f"came {came}" if now.rise >= LEAST_RISE else f"came gradually, and is clear from step {now.step} on"
    if before:
        return (
            f"correction: control {how}, and not at step {before[-2].step} as announced before, which was withdrawn at "
            f"step {before[-1].told_at}: {seen}"
        )
    return f"control is there: it {how}: {seen}, by {TRIED_ON}"


def _describe_none(verdict: Verdict, figure: str) -> str:
    last = verdict.last
    if last is None:
        return "control is not announced: nothing was validated yet"
    if not math.isfinite(last.share):
        return (
            f"control cannot be told: the real pictures of data.held_out are at chance themselves in {figure}, so "
            "their conditions do not belong to them, or are empty"
        )
    late = (
        f"; it usually comes by step {USUAL_STEPS:,}: look at the pictures, the pairing of conditions and targets, and "
        "optimizer.learning_rate"
    )
    return (
        f"control is not announced by step {last.step}: {in_words(last.share, last.low, last.high)} of what is "
        f"possible in {figure}; the captions alone reach {last.without:.0%}, and it takes {IN_A_ROW} validations in a "
        f"row that lie above {last.bound:.0%} with {CERTAINTY:.1%} certainty"
        + (late if last.step > USUAL_STEPS else "")
    )


def in_words(share: float, low: float, high: float) -> str:
    """Formats a share with its interval, such as 70% (65% to 75%)."""
    return f"{share:.0%} ({low:.0%} to {high:.0%})"


def title(figure: str) -> str:
    """Gives a figure's name for people: with spaces, and abbreviations such as IoU as they are usually written."""
    return " ".join(ABBREVIATED.get(word, word) for word in figure.removeprefix("says_").split("_"))


def cannot_announce(config: RunConfig) -> str | None:
    """Explains why control can never be announced in a run of these settings, and what to set; None where it can.

    A run without held-out data is not validated at all, which is said elsewhere.
    """
    settings = config.validation
    if not config.data.held_out:
        return None
    if settings.samples < LEAST_SAMPLES:
        return (
            f"control cannot be announced by validation.samples={settings.samples}: an interval over fewer than "
            f"{LEAST_SAMPLES} is too narrow to rely on. Set validation.samples={LEAST_SAMPLES} or more"
        )
    steps = {*range(0, config.max_steps + 1, settings.every_steps), config.max_steps}
    if not settings.at_start or config.model.controlnet == "unet":  # which does not obey yet
        steps.discard(0)
    if len(steps) < IN_A_ROW:
        return (
            f"control cannot be announced by {len(steps)} validation of a ControlNet that learns, and it takes "
            f"{IN_A_ROW} in a row. Set validation.every_steps={max(1, config.max_steps // 4)} or less"
        )
    return None
