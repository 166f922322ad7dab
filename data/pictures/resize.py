"""Condition pictures of another size, by what their values are: lines stay lines, and labels stay labels.

A line one pixel wide that is averaged over cells of 25 pixels becomes a gray smear, and the mean of two labels is a
third one. So pictures of two levels (edges, strokes, masks) keep their two levels and labels are taken from the nearest
pixel; averaged are only levels, such as depth. Everything here is a pure function of pixels.
"""

import itertools
import math

import cv2
import numpy as np

from controlbooth.data.condition_names import Values

MOST_LABELS = 256
FEW_LEVELS = 32
"""So few gray levels are labels also where neighbouring ones differ by 1, as classes 0, 1, 2 do."""
FLAT_BORDERS = 0.8
"""Share of the pixels at borders that lie in a square of 2 x 2 equal ones: label maps have .9 and more, pictures with
smoothed borders two thirds at most, as one pixel of three is between two levels."""


def values_of(pixels: np.ndarray) -> Values:
    """Tells what the values of one picture are, by the picture alone. (H, W) or (H, W, 3) uint8.

    "binary" has at most two colours; "labels" at most MOST_LABELS and hard borders; all else is "levels".
    """
    codes = _codes(pixels)
    if len(np.unique(codes[: 1 + len(codes) // 8])) > MOST_LABELS:  # photographs are told by an eighth of them
        return "levels"
    distinct = len(np.unique(codes))
    if distinct <= 2:
        return "binary"
    if distinct > MOST_LABELS or min(codes.shape) < 2:
        return "levels"
    right, below = codes[:, 1:] != codes[:, :-1], codes[1:] != codes[:-1]
    border = np.zeros(codes.shape, bool)
    border[:, 1:] |= right
    border[:, :-1] |= right
    border[1:] |= below
    border[:-1] |= below
    square = ~(right[1:] | right[:-1] | below[:, 1:] | below[:, :-1])
    flat = np.zeros(codes.shape, bool)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            flat[rows, columns] |= square
    if flat[border].mean() < FLAT_BORDERS:
        return "levels"
    steps = np.abs(np.diff(codes, axis=1))[right]
    steps = np.concatenate([steps, np.abs(np.diff(codes, axis=0))[below]])
    return "labels" if distinct <= FEW_LEVELS or np.median(steps) > 2 else "levels"


def resize(pixels: np.ndarray, height: int, width: int, values: Values) -> np.ndarray:
    """Resizes a picture: (H, W) or (H, W, 3) uint8 -> (height, width) or (height, width, 3) uint8.

    The same array is returned where it has that size. "binary" and "labels" have no value that `pixels` lacks, but for
    binary pictures that have more than two.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    if values == "binary":
        return _resize_two_colours(pixels, height, width)
    smaller = height < pixels.shape[0]
    method = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT if values == "labels" else method)


def resize_binary(ink: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a drawing: its strokes are as wide as they are to scale, and one pixel where that is less.

    ink: (H, W) uint8, 0 or 1 -> (height, width) uint8, 0 or 1. What is wider than a pixel of the result, and than two
    of `ink`, is a region: a pixel of the result is set where half of it is covered. Strokes are drawn through the
    pixels that hold at least half of a straight passage, which never breaks a straight line, and thinned to one pixel;
    where lines are so dense that all pixels hold some, through those that hold no less than the pixels around them.
    Marks shorter than half a pixel of the result are dropped.
    """
    scale = math.sqrt(ink.shape[0] * ink.shape[1] / (height * width))
    side = max(3, math.ceil(scale) + 1)
    square = np.ones((side, side), np.uint8)
    cores = cv2.erode(ink, square)
    if not cv2.countNonZero(cores):
        return thin(_passages(ink, height, width))
    # Opening rounds corners off, and what it leaves of them there are no strokes: regions take their surroundings in.
    regions = cv2.bitwise_and(ink, cv2.dilate(cv2.dilate(cores, square), square))
    smaller = height < ink.shape[0]
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    covered = cv2.resize(regions * np.uint8(255), (width, height), interpolation=method)
    result = (covered > 127).astype(np.uint8)
    strokes = cv2.subtract(ink, regions)
    if cv2.countNonZero(strokes):
        # They begin inside of the region that they leave, so that no gap opens where its border moves.
        strokes = cv2.bitwise_and(ink, cv2.dilate(strokes, np.ones((2 * side + 1, 2 * side + 1), np.uint8)))
        result |= thin(_passages(strokes, height, width, cv2.dilate(result, np.ones((5, 5), np.uint8))))
    return result


def thin(ink: np.ndarray) -> np.ndarray:
    """Thins strokes to a width of one pixel and keeps how they are connected. (H, W) uint8, 0 or 1 -> likewise.

    Pixels on the northern, southern, western and eastern border are taken off in turn where that joins and parts
    nothing (8-connected) and shortens no line, until none is left (Rosenfeld 1975, A characterization of parallel
    thinning algorithms).
    """
    padded = cv2.copyMakeBorder(ink, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    pixels, width = padded.reshape(-1), padded.shape[1]
    codes = cv2.filter2D(padded, cv2.CV_8U, _NEIGHBOUR_BITS, borderType=cv2.BORDER_CONSTANT)
    neighbours: np.ndarray = codes.reshape(-1)
    # Only pixels with ink are looked at, and only what is around those that go is changed: a tenth of all, mostly.
    left = np.flatnonzero(pixels.view(bool))
    unchanged = 0
    for removable in itertools.cycle(_REMOVABLE):
        taken = removable[neighbours[left]]
        if taken.any():
            places, left = left[taken], left[~taken]
            for down, right, others in _SEEN_FROM:
                neighbours[places + (down * width + right)] &= others
            pixels[places] = 0
            unchanged = 0
        elif (unchanged := unchanged + 1) == len(_REMOVABLE):
            break
    return padded[1:-1, 1:-1]


_NEIGHBOUR_BITS = np.array([[128, 1, 2], [64, 0, 4], [32, 16, 8]], np.float32)
"""A pixel's eight neighbours as one byte: bit 0 is the northern one, and on clockwise."""
_SEEN_FROM = [
    (1 - row, 1 - column, np.uint8(255 - bit)) for (row, column), bit in np.ndenumerate(_NEIGHBOUR_BITS) if bit
]
"""Where the eight pixels lie that have a pixel as a neighbour, rows down and columns to the right; and all bits but the
one by which they have it."""


def _removable_tables() -> list[np.ndarray]:
    """Makes a table for each side from which a pixel may be taken off.

    It is (256,) bool over the pixel's eight neighbours: True where the pixel may be taken off. It may if its neighbour
    on that side is empty, it has two neighbours at least, and the number of 8-connected pieces around it (Yokoi's
    connectivity number) is 1.
    """
    ring = [np.arange(256) >> bit & 1 for bit in range(8)]
    pieces = sum((1 - ring[k]) & (ring[k + 1] | ring[(k + 2) % 8]) for k in (0, 2, 4, 6))
    inside = (pieces == 1) & (sum(ring) >= 2)
    return [inside & (ring[side] == 0) for side in (0, 4, 6, 2)]


_REMOVABLE = _removable_tables()


def _passages(ink: np.ndarray, height: int, width: int, beside: np.ndarray | None = None) -> np.ndarray:
    """Marks the pixels of the result that hold at least half as much ink as a line straight through them.

    (H, W) -> (height, width) uint8, 0 or 1. Each pixel of `ink` is counted in the one that its centre lies in. Those
    that hold less than the mean of the nine around them are left out, as dense lines would be one region: a line by
    itself has a third of a passage in that mean, and loses none. beside: (height, width) uint8, 1 where none is left
    out for that.
    """
    larger = max(height, ink.shape[0]), max(width, ink.shape[1])
    if larger != ink.shape:  # each pixel of the result is to have one of its own at least
        ink = cv2.resize(ink, larger[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    edges = (
        np.searchsorted((2 * np.arange(many) + 1) * few // (2 * many), np.arange(few + 1))
        for many, few in zip(larger, (height, width), strict=True)
    )
    rows, columns = edges
    sums = cv2.integral(ink)[rows]
    sums = np.take(sums[1:] - sums[:-1], columns, axis=1)
    counts = sums[:, 1:] - sums[:, :-1]
    through = min(larger[0] // height, larger[1] // width)  # the pixels of the shortest line from side to side
    held = counts if beside is None else np.minimum(counts, through)  # regions hold more, and are no dense lines
    around = cv2.boxFilter(held, cv2.CV_32S, (3, 3), normalize=False, borderType=cv2.BORDER_CONSTANT)
    dense = 9 * held < around
    if beside is not None:
        dense &= beside == 0
    return ((counts >= -(-through // 2)) & ~dense).view(np.uint8)


def _resize_two_colours(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a picture of two colours, of which the rarer one is the ink: lines are fewer than what is around them,
    white on black or not."""
    codes = pixels if pixels.ndim == 2 else _codes(pixels)
    low, high = int(codes.min()), int(codes.max())
    if low == high:
        return np.full((height, width, *pixels.shape[2:]), pixels[0, 0], np.uint8)
    upper = (codes > (low + high) // 2).view(np.uint8)
    ink = upper if 2 * cv2.countNonZero(upper) <= upper.size else 1 - upper
    drawn = resize_binary(ink, height, width)
    drawn = drawn if ink is upper else 1 - drawn
    if pixels.ndim == 2:
        return cv2.LUT(drawn, np.array([low, high] + [0] * 254, np.uint8))
    colours = np.array([[code >> shift & 255 for shift in (16, 8, 0)] for code in (low, high)], np.uint8)
    return colours[drawn]


def _codes(pixels: np.ndarray) -> np.ndarray:
    """Returns one int32 for each colour, in the order of brightness for gray. (H, W) or (H, W, 3) -> (H, W)."""
    if pixels.ndim == 2:
        return pixels.astype(np.int32)
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue if (red != green).any() or (green != blue).any() else red
