"""Condition images that are computed from a picture by classical image processing.

A new kind is one function, one line of CONDITIONS and its name in `data/condition_names.py`, where packing and training
find it. For control to be measured it also needs an entry in AGREEMENT of `trainer/evaluation/kinds.py`, or for edges
its name in EDGE_KINDS of `trainer/evaluation/held_out.py`.
"""

from collections.abc import Callable

import cv2
import numpy as np

from controlbooth.data.condition_names import computed_kind
from controlbooth.data.order.draws import hash64, random_bits


def canny(image: np.ndarray, sample_hash: int = 0, low: int = 100, high: int = 200) -> np.ndarray:
    """Finds Canny edges with fixed thresholds on the gradient. image: (H, W, 3) RGB uint8 -> (H, W) uint8, 0 or 255.

    100 and 200 are the defaults of the ControlNet authors' interface and of the diffusers examples.
    """
    return cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), low, high)


def canny_random(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """Finds Canny edges with thresholds drawn from the sample's hash, as the Canny model of arXiv 2302.05543 had them.

    low is in 20 .. 119 and high - low in 50 .. 149, so that a model meets sparse and dense edge maps. Equal hashes give
    equal thresholds. Shapes are those of `canny`.
    """
    bits = random_bits(hash64("canny thresholds"), np.array([sample_hash % 2**64], np.uint64))[0]
    low = 20 + int(bits & np.uint64(0xFFFFFFFF)) % 100
    return canny(image, low=low, high=low + 50 + int(bits >> np.uint64(32)) % 100)


def gray(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """Returns the luminance of a picture, a condition for colouring. (H, W, 3) RGB uint8 -> (H, W) uint8."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def blur(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """Blurs a picture, a condition for restoring details, by a Gaussian whose standard deviation is 1/32 of the short
    side and at least 1 pixel. (H, W, 3) uint8 -> the same shape and type."""
    return cv2.GaussianBlur(image, (0, 0), max(1.0, min(image.shape[:2]) / 32))


def soft_edges(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """Draws boundaries with a strength, as HED does (arXiv 1504.06375), without its network. -> (H, W) uint8.

    The strength is the geometric mean of colour gradients at three scales, so that texture, which only the finest scale
    sees, is weak. 255 is the 99th percentile of the picture. image: (H, W, 3) RGB uint8.
    """
    short = min(image.shape[:2])
    strength = np.ones(image.shape[:2], np.float32)
    for scale in (1 / 400, 1 / 200, 1 / 100):
        smooth = cv2.GaussianBlur(image, (0, 0), max(0.7, short * scale)).astype(np.float32)
        across, down = cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
        strength *= cv2.magnitude(across, down).max(axis=2)
    strength = np.cbrt(strength)
    most = float(np.percentile(strength, 99))
    return np.clip(strength * (255.0 / max(most, 1.0)), 0, 255).astype(np.uint8)


def scribble(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """Draws the long outlines as if by hand: few corners, thick strokes, white on black. -> (H, W) uint8, 0 or 255.

    How strong an edge must be, how much its outline is simplified and how thick the stroke is are drawn from the
    sample's hash. image: (H, W, 3) RGB uint8.
    """
    short = min(image.shape[:2])
    level, corner, width = _draws("scribble", sample_hash)
    edges = cv2.GaussianBlur(soft_edges(image), (0, 0), max(0.7, short / 150))
    strong = (edges > 50 + 60 * level).astype(np.uint8)
    drawing = np.zeros(image.shape[:2], np.uint8)
    thickness = max(1, round(short * (0.006 + 0.008 * width)))
    for outline in cv2.findContours(strong, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]:
        if cv2.arcLength(outline, True) > short / 4:
            simple = cv2.approxPolyDP(outline, short * (0.004 + 0.008 * corner), True)
            cv2.polylines(drawing, [simple], True, 255, thickness)
    return drawing


def lineart(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """Draws the dark strokes of a picture, white on black. image: (H, W, 3) RGB uint8 -> (H, W) uint8.

    It follows XDoG (Winnemöller, Kyprianidis and Olsen 2012): a sharpened difference of Gaussians, thresholded softly,
    with p = 18 and phi = 10.
    """
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255.0
    sigma = max(0.6, min(image.shape[:2]) / 500)
    narrow, wide = cv2.GaussianBlur(gray, (0, 0), sigma), cv2.GaussianBlur(gray, (0, 0), 1.6 * sigma)
    sharpened = 19.0 * narrow - 18.0 * wide
    # The local mean takes the place of a fixed white, so that dark areas are not filled with ink.
    below = np.minimum(0.0, sharpened - 0.75 * cv2.GaussianBlur(gray, (0, 0), 8 * sigma))
    return np.clip(-255.0 * np.tanh(10.0 * below), 0, 255).astype(np.uint8)


def lines(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """Draws straight lines of at least a 25th of the short side, white on black, as M-LSD does. -> (H, W) uint8.

    They are found by LSD (von Gioi et al. 2010). The kind is for buildings and rooms. image: (H, W, 3) RGB uint8.
    """
    short = min(image.shape[:2])
    drawing = np.zeros(image.shape[:2], np.uint8)
    found = cv2.createLineSegmentDetector().detect(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    for x0, y0, x1, y1 in [] if found is None else found.reshape(-1, 4).tolist():
        if np.hypot(x1 - x0, y1 - y0) >= short / 25:
            ends = (round(x0), round(y0)), (round(x1), round(y1))
            cv2.line(drawing, *ends, 255, max(1, short // 256))
    return drawing


def _draws(purpose: str, sample_hash: int) -> tuple[float, float, float]:
    """Returns three numbers in [0, 1) that a sample's hash decides, different ones for each purpose."""
    bits = int(random_bits(hash64(purpose), np.array([sample_hash % 2**64], np.uint64))[0])
    return (bits & 0xFFFF) / 2**16, (bits >> 16 & 0xFFFF) / 2**16, (bits >> 32 & 0xFFFF) / 2**16


CONDITIONS: dict[str, Callable[..., np.ndarray]] = {
    "canny": canny,
    "canny_random": canny_random,
    "soft_edges": soft_edges,
    "scribble": scribble,
    "lineart": lineart,
    "lines": lines,
    "gray": gray,
    "blur": blur,
}
"""kind -> function of an image (H, W, 3) RGB uint8, and optionally the sample's 64-bit hash, that returns (H, W) or
(H, W, 3) uint8."""


def computed_function(kind: str | None) -> Callable[..., np.ndarray] | None:
    """Returns the function that makes a condition such as "computed:canny"; None for a kind that shards hold.

    Raises ValueError for one that cannot be computed while a run is loading.
    """
    name = computed_kind(kind)
    return None if name is None else CONDITIONS[name]
