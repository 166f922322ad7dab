"""The pictures as raters see them: all of an item in one size and one encoding, under names that say nothing."""

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from controlbooth.data.errors import UnusableFile, UserError
from controlbooth.data.files.whole import write_whole
from controlbooth.data.order.draws import permutation
from controlbooth.data.pictures.images import decode_image, encode_png, same_frame, to_rgb
from controlbooth.data.pictures.resize import resize, values_of
from controlbooth.trainer.study.sources import Gathered

TILES = 8
"""A spoiled picture is cut into so many rows and columns, which are shuffled."""
REFERENCE_SIDE = 512
"""Longest side of the photographs beside the pictures, in pixels."""


def read_picture(path: Path) -> np.ndarray:
    """Reads a picture, upright: (H, W, 3) uint8. Raises UserError and UnusableFile, with its name."""
    try:
        return to_rgb(decode_image(path.read_bytes(), path.stem, path.suffix.lstrip(".")))
    except OSError as error:
        raise UnusableFile(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def level(pictures: Mapping[str, np.ndarray], item: str) -> dict[str, np.ndarray]:
    """Brings the pictures of an item to one size, the smallest of them, so that none is told by its sharpness.

    By method, (H, W, 3) uint8 of any size -> all of one. Raises UserError where they have different aspect ratios.
    """
    smallest = min((one.shape[:2] for one in pictures.values()), key=lambda shape: shape[0] * shape[1])
    for method, picture in pictures.items():
        if not same_frame(smallest, picture.shape):
            raise UserError(
                f"item {item!r}: the picture of {method} has {picture.shape[1]} x {picture.shape[0]} pixels and the "
                f"smallest {smallest[1]} x {smallest[0]}, so they differ in their aspect ratios. Cut them alike"
            )
    return {
        method: cv2.resize(picture, smallest[::-1], interpolation=cv2.INTER_AREA)
        if picture.shape[:2] != smallest
        else picture
        for method, picture in pictures.items()
    }


def fit_condition(condition: np.ndarray, shape: tuple[int, int], item: str) -> np.ndarray:
    """Brings a condition to the size of its item's pictures, lines as lines, so that it can be laid over them."""
    if not same_frame(shape, condition.shape):
        raise UserError(
            f"item {item!r}: its condition has {condition.shape[1]} x {condition.shape[0]} pixels and its pictures "
            f"{shape[1]} x {shape[0]}, so they differ in their aspect ratios. Cut them alike"
        )
    return resize(condition, *shape, values_of(condition))


def fit_reference(picture: np.ndarray) -> np.ndarray:
    """Makes a photograph at most REFERENCE_SIDE pixels wide and high."""
    factor = min(1.0, REFERENCE_SIDE / max(picture.shape[:2]))
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    return picture if factor == 1.0 else cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def spoil(picture: np.ndarray, key: int) -> np.ndarray:
    """Makes a picture that is certainly worse at everything: its tiles are shuffled, and half of it is noise.

    (H, W, 3) uint8 -> the same shape. key: decides the order of the tiles and the noise.
    """
    height, width = picture.shape[:2]
    rows, columns = max(height // TILES, 1), max(width // TILES, 1)
    places = [
        (top, left) for top in range(0, height - rows + 1, rows) for left in range(0, width - columns + 1, columns)
    ]
    made = picture.copy()
    for (top, left), source in zip(places, permutation(key, len(places)), strict=True):
        y, x = places[source]
        made[top : top + rows, left : left + columns] = picture[y : y + rows, x : x + columns]
    noise = np.random.default_rng(key).integers(0, 256, picture.shape, dtype=np.uint8)
    return ((made.astype(np.uint16) + noise) // 2).astype(np.uint8)


def write_picture(folder: Path, name: str, picture: np.ndarray) -> None:
    """Writes a picture by its opaque name as PNG, which holds nothing but pixels: what its file said is left behind."""
    write_whole(folder / f"{name}.png", encode_png(picture))


def read_level(item: str, gathered: Gathered) -> dict[str, np.ndarray]:
    """Reads the pictures of an item, by method, in one size."""
    return level({method: read_picture(path) for method, path in gathered.pictures.items()}, item)
