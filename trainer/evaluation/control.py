"""Control fidelity: the condition is extracted again from the generated picture and compared with the one that was
given.

The loss of a ControlNet says nothing about whether it obeys; these figures do. Two are measured on every picture: how
well its edges lie on the given ones (edge F1), and, of scenes whose shards hold a segmentation, how well its object
covers the true one (mask IoU). A picture of equal-area discs at the true places scores an IoU of about .7 without
following a single outline: an IoU means little without the edge F1 beside it, and neither without chance, which is what
the same pictures score under the conditions of other samples (`chance.py`).
"""

import cv2
import numpy as np

from controlbooth.data.pictures.resize import thin

TOLERANCE_PIXELS = 1
LOW, HIGH = 80, 160
"""Thresholds on the Sobel response; a step of 30 levels of 255 in one channel gives 120."""


def edge_map(image: np.ndarray) -> np.ndarray:
    """Finds edges by Canny on the channel that changes most at each pixel: (H, W, 3) uint8 -> (H, W) bool.

    Gray values would miss the edge between two colours of the same brightness, such as red on teal.
    """
    gradients = [
        [cv2.Sobel(image[..., c], cv2.CV_16S, *order, ksize=3) for c in range(3)] for order in ((1, 0), (0, 1))
    ]
    across, down = (np.stack(one, axis=2) for one in gradients)
    strongest = (np.abs(across.astype(np.int32)) + np.abs(down.astype(np.int32))).argmax(axis=2)[..., None]
    dx, dy = (np.take_along_axis(one, strongest, axis=2)[..., 0] for one in (across, down))
    return cv2.Canny(np.ascontiguousarray(dx), np.ascontiguousarray(dy), LOW, HIGH) > 0


def line_map(picture: np.ndarray) -> np.ndarray:
    """Thins bright lines on black to a width of one pixel: (H, W) uint8 -> (H, W) bool.

    A pixel belongs to a line where it has more than half of the picture's highest level, whatever that is.
    """
    strong = picture > int(picture.max(initial=0)) / 2
    return thin(strong.astype(np.uint8)) > 0


def edge_f1(found: np.ndarray, given: np.ndarray, tolerance: int = TOLERANCE_PIXELS) -> float:
    """Measures how well found lines lie on the given ones, corrected for chance, in [0, 1].

    found, given: (H, W) bool, lines one pixel wide. A pixel is matched if the other map has one within `tolerance`
    pixels, diagonals included. Precision p is the share of found pixels that are matched, recall r that of given ones.
    Where lines are dense, pixels are matched wherever they lie: of pixels scattered at random, a share d is matched,
    which is the share of all pixels within the tolerance of the other map. What each has above that, (p - d) / (1 - d)
    and (r - d') / (1 - d'), are the weighted kappas of Bloch and Kraemer (1989, Biometrics 45, 269-287); this is their
    harmonic mean, which at a tolerance of 0 is Cohen's kappa (1960). It is 1 for equal maps and 0 for all that is no
    better than scattered pixels, however many. It is also 0 where either map is empty, or has lines near to every
    pixel: then agreement cannot be told from chance.
    """
    kernel = np.ones((2 * tolerance + 1, 2 * tolerance + 1), np.uint8)
    near_found, near_given = (cv2.dilate(one.astype(np.uint8), kernel) > 0 for one in (found, given))
    if not found.any() or not given.any() or near_found.all() or near_given.all():
        return 0.0
    precision = above_chance(float(near_given[found].mean()), float(near_given.mean()))
    recall = above_chance(float(near_found[given].mean()), float(near_found.mean()))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def above_chance(value: float, chance: float) -> float:
    """Computes which share of what is possible above chance was reached, in [0, 1].

    value, chance: in [0, 1]. This is the skill score of forecasts (Murphy 1988, Monthly Weather Review 116, 2417-2424)
    and the correction of the adjusted Rand index (Hubert and Arabie 1985, Journal of Classification 2, 193-218). It is
    0 for values below chance, and where chance is 1, which leaves no room above it.
    """
    return max(0.0, (value - chance) / (1.0 - chance)) if chance < 1.0 else 0.0


def object_mask(image: np.ndarray, distance: float = 28.0, least_pixels: int = 12) -> np.ndarray:
    """Finds what stands before a background of at most two plain colours: (H, W, 3) uint8 -> (H, W) bool.

    The border is taken to show the background only; its two main colours are found by 2-means. Regions of at least
    `least_pixels` that differ from both colours by more than `distance` (Euclidean, levels of 255) are objects, and
    their outline is put where a pixel is halfway between the object's and the background's colour. On real scenes the
    mask's IoU with the exact one is .98.
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(np.float32)
    cv2.setRNGSeed(0)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    _, _, centres = cv2.kmeans(border, 2, None, stop, 3, cv2.KMEANS_PP_CENTERS)  # type: ignore[call-overload]
    pixels = image.astype(np.float32)
    away = np.minimum(*(np.linalg.norm(pixels - centre, axis=2) for centre in centres))
    solid = cv2.morphologyEx((away > distance).astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(solid, connectivity=8)
    mask = np.zeros(solid.shape, bool)
    for label in range(1, count):
        if statistics[label, cv2.CC_STAT_AREA] < least_pixels:
            continue
        region = labels == label
        halfway = max(float(np.median(away[region])) / 2, 0.6 * distance)
        mask |= (cv2.dilate(region.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0) & (away > halfway)
    return mask


def mask_iou(found: np.ndarray, given: np.ndarray) -> float:
    """Computes the intersection over union of two (H, W) bool masks, in [0, 1]; 0 where both are empty."""
    union = np.logical_or(found, given).sum()
    return float(np.logical_and(found, given).sum() / union) if union else 0.0


def control_fidelity(
    images: np.ndarray, edges: np.ndarray | None, segmentation: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Computes edge_f1 and mask_iou of each picture, by name, each (B,) float64; without its truth, one is left out.

    images: (B, H, W, 3) uint8. edges: (B, H, W) uint8, bright on edges. segmentation: (B, H, W) uint8, nonzero on
    objects.
    """
    figures = {}
    if edges is not None:
        figures["edge_f1"] = np.array([edge_f1(edge_map(i), line_map(e)) for i, e in zip(images, edges, strict=True)])
    if segmentation is not None:
        figures["mask_iou"] = np.array(
            [mask_iou(object_mask(i), s > 0) for i, s in zip(images, segmentation, strict=True)]
        )
    return figures
