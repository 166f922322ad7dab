"""Control fidelity for each kind of condition: found in a generated picture, against what was given.

Everything here is a pure function of two condition pictures of one size. What finds a condition in a picture is chosen
in `extract.py`. Edges and masks of scenes, which every run measures, are in `control.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

from controlbooth.data.conditions.networks import rainbow
from controlbooth.data.scenes.render import LANDMARK_COLOURS
from controlbooth.trainer.evaluation.control import above_chance, edge_f1, line_map

POINT_COLOURS = (*LANDMARK_COLOURS, *(rainbow(place) for place in range(18)))
"""Of the dots that stand for key points: those of scenes, and OpenPose's."""
NEAR = 0.05
"""Share of the picture's shorter side within which a key point counts as found."""
FALLOFF = 0.1
"""OKS: the distance, as a share of the square root of the points' bounding box, at which a point counts exp(-1/2)."""
LOWER_IS_BETTER = ("depth_rmse", "normals_angle", "soft_rmse")


class Labels(NamedTuple):
    """The classes of a label map."""

    names: np.ndarray
    """(K,) int64: the level of each class, or its colour as red, green and blue in 24 bits; levels are grays."""
    numbers: np.ndarray
    """(H * W,) int64: which of them each pixel has."""


class Pose(NamedTuple):
    """The dots of a drawn pose."""

    points: dict[int, np.ndarray]
    """As `points_of` returns them."""
    side: int
    """Of the picture, the shorter one, in pixels."""


def labels_of(picture: np.ndarray) -> Labels:
    """Finds the classes of a label map: (H, W) labels or (H, W, 3) colours, uint8."""
    weights = np.array([1 << 16, 1 << 8, 1])
    codes = picture.astype(np.int64) * weights.sum() if picture.ndim == 2 else picture.astype(np.int64) @ weights
    return Labels(*np.unique(codes.ravel(), return_inverse=True))


def segmentation_miou(found: Labels, given: Labels) -> float:
    """Computes the mean, over the classes in `given`, of the intersection over union above chance, in [0, 1].

    Both are of pictures of one size and kind. Two maps that know nothing of each other, one with a share a of its
    pixels in a class and the other with a share b, have an IoU of a b / (a + b - a b) in the mean. For a large
    background that is nearly 1, so it is taken off each class by `above_chance`. A picture of one class alone has
    nothing to be placed, and scores 0.
    """
    pixels, ours, truths = len(given.numbers), len(found.names), len(given.names)
    both = np.bincount(given.numbers * ours + found.numbers, minlength=truths * ours).reshape(truths, ours) / pixels
    adjusted = []
    for number, label in enumerate(given.names):
        same = np.flatnonzero(found.names == label)
        overlap, a = (float(both[number, same].sum()), float(both[:, same].sum()))
        b = float(both[number].sum())
        adjusted.append(above_chance(overlap / (a + b - overlap), a * b / (a + b - a * b)))
    return float(np.mean(adjusted))


def depth_agreement(found: np.ndarray, given: np.ndarray) -> tuple[float, float]:
    """Computes (scale-invariant RMSE, share of pixels with a ratio below 1.25, above chance) of inverse depths.

    found, given: (H, W) uint8. Depth from one picture is known up to a scale and a shift, so `found` is first fitted to
    `given` by least squares (arXiv 1907.01341, section 5), and near stays near: where a negative scale would be best it
    is 0. The error is in units of 255. The ratio is the delta of arXiv 1406.2283. Many pixels have it below 1.25 when
    all depths are the mean, so the share that one plane without any shape reaches is taken off by `above_chance`.
    """
    ours, truth = (one.astype(np.float64).ravel() for one in (found, given))
    ours = ours - ours.mean()
    spread = ours @ ours
    aligned = truth.mean() + (max(0.0, ours @ truth / spread) if spread else 0.0) * ours
    error = float(np.sqrt(np.mean((aligned - truth) ** 2)) / 255.0)
    plane = np.full_like(truth, truth.mean())
    return error, above_chance(_share_within(aligned, truth), _share_within(plane, truth))


def _share_within(ours: np.ndarray, truth: np.ndarray, ratio: float = 1.25) -> float:
    high, low = np.maximum(ours, truth), np.minimum(ours, truth)
    return float(np.mean(high < ratio * np.maximum(low, 1.0)))


def normals_angle(found: np.ndarray, given: np.ndarray) -> float:
    """Computes the mean angle between directions, in degrees.

    found, given: (H, W, 3) uint8, each component as (n + 1) / 2 * 255.
    """
    ours, truth = (one.astype(np.float64) / 127.5 - 1.0 for one in (found, given))
    product = (ours * truth).sum(axis=2)
    lengths = np.linalg.norm(ours, axis=2) * np.linalg.norm(truth, axis=2)
    return float(np.degrees(np.arccos(np.clip(product / np.maximum(lengths, 1e-9), -1.0, 1.0))).mean())


def points_of(picture: np.ndarray) -> dict[int, np.ndarray]:
    """Finds the dots of a drawn pose: number of the colour in POINT_COLOURS -> (n, 2) float64 x, y of their centres.

    picture: (H, W, 3) uint8.
    """
    points = {}
    for number, colour in enumerate(POINT_COLOURS):
        mask = (picture == np.array(colour, np.uint8)).all(axis=2)
        if mask.any():
            points[number] = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[3][1:]
    return points


def pose_of(picture: np.ndarray) -> Pose:
    """Finds the dots of a drawn pose, and the picture's shorter side. picture: (H, W, 3) uint8."""
    return Pose(points_of(picture), min(picture.shape[:2]))


def pose_agreement(found: Pose, given: Pose) -> tuple[float, float]:
    """Computes (PCK, OKS) of drawn poses, both in [0, 1]; both are 0 where the given pose has no points.

    PCK: share of the given points that have a found one of their kind within NEAR of the shorter side. OKS: mean of
    exp(-d^2 / (2 s^2 k^2)) with d the distance to the nearest found one, s^2 the area of the box around all given
    points and k = FALLOFF for every kind (COCO's k are for people only).
    """
    ours, truth = found.points, given.points
    if not truth:
        return 0.0, 0.0
    everything = np.concatenate(list(truth.values()))
    width, height = np.maximum(np.ptp(everything, axis=0), 1.0)
    near = NEAR * given.side
    distances = [
        float(np.linalg.norm(ours[kind] - point, axis=1).min()) if kind in ours else np.inf
        for kind, points in truth.items()
        for point in points
    ]
    away = np.array(distances)
    return float((away <= near).mean()), float(np.exp(-(away**2) / (2 * width * height * FALLOFF**2)).mean())


def soft_rmse(found: np.ndarray, given: np.ndarray) -> float:
    """Computes the root mean squared difference of levels, in units of 255, for pictures of strength or colour."""
    difference = found.astype(np.float64) - given.astype(np.float64)
    return float(np.sqrt(np.mean(difference**2)) / 255.0)


class Comparing(NamedTuple):
    """How condition pictures of a kind are compared."""

    prepare: Callable[[np.ndarray], Any]
    """A condition picture -> what of it is compared: done once, however many pictures it is compared with."""
    agree: Callable[[Any, Any], dict[str, float]]
    """What was found and what was given, both prepared -> figures by name."""


def agreement(kind: str, found: np.ndarray, given: np.ndarray) -> dict[str, float]:
    """Compares two condition pictures of one kind and size, (H, W) or (H, W, 3) uint8, and returns figures by name."""
    prepare, agree = AGREEMENT[kind]
    return agree(prepare(found), prepare(given))


def _depth(found: np.ndarray, given: np.ndarray) -> dict[str, float]:
    error, share = depth_agreement(found, given)
    return {"depth_delta": share, "depth_rmse": error}


def _pose(found: Pose, given: Pose) -> dict[str, float]:
    share, similarity = pose_agreement(found, given)
    return {"pose_pck": share, "pose_oks": similarity}


def _gray(picture: np.ndarray) -> np.ndarray:
    """Takes one channel, (H, W), of a picture; where there are three, they are equal in kinds that have one."""
    return picture if picture.ndim == 2 else picture[..., 0]


_LINES = Comparing(lambda drawn: line_map(_gray(drawn)), lambda found, given: {"line_f1": edge_f1(found, given)})
_POSES = Comparing(pose_of, _pose)
_LEVELS = Comparing(_gray, lambda found, given: {"soft_rmse": soft_rmse(found, given)})
AGREEMENT: dict[str, Comparing] = {
    "segmentation": Comparing(labels_of, lambda found, given: {"segmentation_miou": segmentation_miou(found, given)}),
    "depth": Comparing(_gray, _depth),
    "normals": Comparing(np.asarray, lambda found, given: {"normals_angle": normals_angle(found, given)}),
    "keypoints": _POSES,
    "pose": _POSES,
    "lines": _LINES,
    "lineart": _LINES,
    "scribble": _LINES,
    "soft_edges": _LEVELS,
    "gray": _LEVELS,
    "blur": Comparing(np.asarray, _LEVELS.agree),
}
"""Kind of condition -> how a picture is told to obey it. Lines are compared one pixel wide, however thick they are."""
