"""What is wrong with a set of pictures: copies, near copies, blank ones, conditions of other pictures. Pure functions.

Near copies are found by perceptual hashes, whose bits are cut into bands: hashes that agree in a whole band are
compared, all others are not, so a million hashes take seconds where all pairs would take days.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

GRID = 32
"""Side of the edge maps that pairing compares."""
SEPARABLE = 0.5
"""Share of pairs that must stand out from negative pairs' before single ones are judged by their score."""


def edge_map(pixels: np.ndarray) -> np.ndarray:
    """Maps where a picture has edges, coarsely, to a unit vector. (H, W) or (H, W, 3) uint8 -> (GRID * GRID,) float32.

    The local mean is subtracted, since pictures of all kinds have more edges in their middle. The map is zero where
    there are no edges. The scalar product of two maps is in [-1, 1], about 0 for negative pairs, which are of two
    samples.
    """
    gray = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    scale = 8 * GRID / max(gray.shape)
    if scale < 1.0:
        size = (max(1, round(gray.shape[1] * scale)), max(1, round(gray.shape[0] * scale)))
        gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    levels = gray.astype(np.float32)
    gradient = cv2.magnitude(cv2.Sobel(levels, cv2.CV_32F, 1, 0), cv2.Sobel(levels, cv2.CV_32F, 0, 1))
    edges = cv2.resize(np.sqrt(gradient), (GRID, GRID), interpolation=cv2.INTER_AREA)
    edges = cv2.GaussianBlur(edges, (0, 0), 0.7)
    edges -= cv2.GaussianBlur(edges, (0, 0), GRID / 8)
    norm = float(np.linalg.norm(edges))
    return (edges / norm if norm > 1e-3 else np.zeros_like(edges)).ravel()


@dataclass(frozen=True)
class Pairing:
    """How well the conditions of one kind agree with their targets, against how they agree with others' targets."""

    threshold: float
    """The 95th percentile of negative pairs' scores."""
    standing_out: float
    """Share of pairs above it: 0.05 where the conditions have nothing to do with the pictures."""
    weak: np.ndarray
    """Indices of pairs at or below the threshold; none where less than SEPARABLE stand out."""


def judge_pairing(scores: np.ndarray, negatives: np.ndarray) -> Pairing | None:
    """Judges how well the conditions of a kind agree with their targets; None where there is nothing to compare.

    scores: (n,) products of edge maps, NaN for pairs that were not compared. negatives: (m,) products of negative
    pairs.
    """
    compared = np.flatnonzero(~np.isnan(scores))
    if not len(compared) or not len(negatives):
        return None
    threshold = float(np.percentile(negatives, 95))
    above = scores[compared] > threshold
    share = float(above.mean())
    return Pairing(threshold, share, compared[~above] if share >= SEPARABLE else compared[:0])


def quantiles(values: np.ndarray, shares: Sequence[float] = (0.0, 0.05, 0.5, 0.95, 1.0)) -> list[float]:
    """Returns the values below which these shares of all values lie; an empty list where there are no values."""
    return np.quantile(values, shares).tolist() if len(values) else []
