"""From a subject's validations: when it is learnt, from when on it is copied, and which step is the best. Pure.

A validation is a mapping of figures by name with `step`. Similarities are cosines of an encoder's embeddings:

    fidelity        mean of drawn pictures and the subject's own
    real            mean of two of its own: what pictures of one thing have among themselves
    nearest         of drawn pictures, each with the one of the subject's own that is most like it, mean
    real_nearest    of its own pictures, each with the other one that is most like it, mean
    prompt          mean of a drawn picture and its prompt (CLIP-T); only where CLIP is given
"""

from collections.abc import Sequence
from dataclasses import dataclass

Validation = dict[str, float]

LEARNT_SHARE = 0.6
"""Of the way from the base's fidelity, at step 0, to `real`, from which on a subject counts as learnt. DreamBooth's own
subjects reach about .7 of it (arXiv 2208.12242, table 1: DINO .668, real .774, and about .4 for other subjects)."""
LEAST_WAY = 0.02
"""Between the base's fidelity and `real` below which the encoder does not tell the subject from its class."""
PROMPT_KEPT = 0.95
"""Share of the prompt fidelity of step 0 below which prompts are no longer followed."""


@dataclass(frozen=True)
class Course:
    """What a subject's validations up to now tell."""

    learnt: int | None
    """The step from which on it is learnt."""
    overfits: int | None
    """The step from which on drawn pictures copy its own."""
    best: int | None
    """Of the steps at which it is learnt and not copied, the one with the highest score."""


def course(validations: Sequence[Validation]) -> Course:
    """Tells when a subject is learnt, from when on it is copied, and which step is the best.

    validations: of one subject in order. Where the first one is not of step 0, or has no `real`, every field is None.
    """
    if not validations or validations[0]["step"] != 0 or "real" not in validations[0]:
        return Course(None, None, None)
    first = validations[0]
    good = [one for one in validations if is_learnt(one, first) and not is_copied(one, first)]
    best = max(good, key=lambda one: (score(one, first), -one["step"]), default=None)
    return Course(
        since(validations, [is_learnt(one, first) for one in validations]),
        since(validations, [is_copied(one, first) for one in validations]),
        None if best is None else int(best["step"]),
    )


def since(validations: Sequence[Validation], holds: Sequence[bool]) -> int | None:
    """Returns the step from which on something holds up to the last validation, or None where it fails at the last."""
    step = None
    for one, held in zip(reversed(validations), reversed(holds), strict=True):
        if not held:
            break
        step = int(one["step"])
    return step


def is_learnt(one: Validation, first: Validation) -> bool:
    way = one["real"] - first["fidelity"]
    return way >= LEAST_WAY and one["fidelity"] - first["fidelity"] >= LEARNT_SHARE * way


def is_copied(one: Validation, first: Validation) -> bool:
    """Tells whether drawn pictures copy a subject's own.

    They do where they are nearer to a picture of the subject than such pictures are to each other and, where prompts
    are measured, prompt fidelity has dropped: a picture that follows its prompt is no copy.
    """
    if one["nearest"] <= one["real_nearest"]:
        return False
    return "prompt" not in one or one["prompt"] < PROMPT_KEPT * first["prompt"]


def score(one: Validation, first: Validation) -> float:
    """Returns how near drawn pictures are to the subject, times the share of prompt fidelity that is kept.

    Nearness is a share of that which the subject's own pictures have among themselves.
    """
    kept = min(1.0, one["prompt"] / first["prompt"]) if first.get("prompt", 0.0) > 0 else 1.0
    return one["fidelity"] / one["real"] * kept


def describe(told: Course) -> str:
    """Describes what a subject has come to, in one line."""
    learnt = "not learnt yet" if told.learnt is None else f"learnt at step {told.learnt}"
    overfits = "" if told.overfits is None else f", copies its pictures from step {told.overfits} on"
    return learnt + overfits + ("" if told.best is None else f"; the best step is {told.best}")
