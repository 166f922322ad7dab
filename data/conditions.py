"""Condition images that are computed from a picture by classical image processing.

A new kind is one function and one line of CONDITIONS; packing, and the measurement of how well a model obeys its
condition, find it there.
"""

from collections.abc import Callable

import cv2
import numpy as np

from controlbooth.data.draws import hash64, random_bits


def canny(image: np.ndarray, sample_hash: int = 0, low: int = 100, high: int = 200) -> np.ndarray:
    """Canny edges with fixed thresholds on the gradient. image: (H, W, 3) RGB uint8 -> (H, W) uint8, 0 or 255.

    100 and 200 are the defaults of the ControlNet authors' interface and of the diffusers examples.
    """
    return cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), low, high)


def canny_random(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """Canny edges with thresholds drawn from the sample's hash; the Canny model of arXiv 2302.05543 had such.

    low is in 20 .. 119 and high - low in 50 .. 149, so that a model meets sparse and dense edge maps. Equal hashes give
    equal thresholds. Shapes as `canny`.
    """
    bits = random_bits(hash64("canny thresholds"), np.array([sample_hash % 2**64], np.uint64))[0]
    low = 20 + int(bits & np.uint64(0xFFFFFFFF)) % 100
    return canny(image, low=low, high=low + 50 + int(bits >> np.uint64(32)) % 100)


def gray(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """Luminance, for colouring pictures. (H, W, 3) RGB uint8 -> (H, W) uint8."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def blur(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
    """The picture without its details, for restoring them: a Gaussian of 1/32 of the short side. (H, W, 3) uint8."""
    return cv2.GaussianBlur(image, (0, 0), max(1.0, min(image.shape[:2]) / 32))


CONDITIONS: dict[str, Callable[..., np.ndarray]] = {
    "canny": canny,
    "canny_random": canny_random,
    "gray": gray,
    "blur": blur,
}
"""kind -> function of an image (H, W, 3) RGB uint8, and optionally the sample's 64-bit hash, that returns (H, W) or
(H, W, 3) uint8."""
