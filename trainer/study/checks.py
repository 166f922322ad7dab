"""Checks: screens with a known answer, by which raters are told who answer without looking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from controlbooth.data.order.draws import hash64
from controlbooth.data.pictures.images import same_frame
from controlbooth.trainer.study.pictures import read_picture, spoil
from controlbooth.trainer.study.plan import Plan
from controlbooth.trainer.study.questions import CONDITION, QUESTIONS
from controlbooth.trainer.study.sources import Gathered

THUMBNAIL = 32
CANDIDATES = 20


@dataclass(frozen=True)
class Check:
    """A screen whose answer is known."""

    question: str
    item: str
    key: int


def choose_checks(plan: Plan, items: Mapping[str, Gathered]) -> list[Check]:
    """Chooses the items of the checks of each question, by hash."""

    def key(question: str, item: str) -> int:
        return hash64(plan.secret, "check", question, item)

    return [
        Check(question, item, key(question, item))
        for question in plan.questions
        for item in sorted(items, key=lambda item: key(question, item))[: plan.checks_each]
    ]


def check_pictures(
    check: Check, shown: Mapping[str, np.ndarray], items: Mapping[str, Gathered], count: int
) -> list[np.ndarray]:
    """Makes the pictures of a check, the right answer first: `count` of the size of those shown, (H, W, 3) uint8.

    The right answer is the item's real picture where there is one, else that of a method. Where the question is of the
    condition and items have real pictures, the others are those of items with very different conditions, so that only
    who looks at the condition can tell. All other wrong ones are the right one spoiled (`spoil`).

    shown: the item's pictures by method.
    """
    files = items[check.item]
    methods = sorted(shown)
    right = shown[methods[check.key % len(methods)]]
    others: Sequence[np.ndarray] = ()
    if files.target is not None and same_frame(right.shape, (target := read_picture(files.target)).shape):
        right = _fit(target, right)
        if QUESTIONS[check.question].given == CONDITION:
            others = [_fit(read_picture(path), right) for path in _others(check, items, right.shape, count - 1)]
    wrong = [*others, *(spoil(right, check.key + place) for place in range(count - 1 - len(others)))]
    return [right, *wrong]


def _fit(picture: np.ndarray, like: np.ndarray) -> np.ndarray:
    if picture.shape == like.shape:
        return picture
    return cv2.resize(picture, like.shape[1::-1], interpolation=cv2.INTER_AREA)


def _others(check: Check, items: Mapping[str, Gathered], shape: tuple[int, ...], count: int) -> list:
    """Finds the real pictures of the `count` items, of CANDIDATES by hash, whose conditions differ most from its."""
    others = [name for name in items if name != check.item and items[name].target is not None]
    others = sorted(others, key=lambda name: hash64(check.key, name))[:CANDIDATES]
    own = _thumbnail(items[check.item])
    apart = {
        name: float(np.abs(_thumbnail(items[name]) - own).mean())
        for name in others
        if same_frame(shape, read_picture(items[name].target).shape)  # type: ignore[arg-type]
    }
    return [items[name].target for name in sorted(apart, key=lambda name: -apart[name])[:count]]


def _thumbnail(item: Gathered) -> np.ndarray:
    assert item.condition is not None
    return cv2.resize(read_picture(item.condition), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(float)
