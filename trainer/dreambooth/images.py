"""Pictures of a subject, as they are trained. Free of torch, so that a dry run can open them too."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from controlbooth.data.errors import UserError
from controlbooth.data.pictures.images import decode_image, prepare, write_planes

LEAST_SIDE = 64
"""Pixels of the shorter side below which a picture tells nothing of a subject."""


class SubjectError(UserError):
    """What is wrong with one subject; the others go on."""


def read_pictures(paths: Sequence[Path], resolution: int) -> list[np.ndarray]:
    """Reads pictures, each as (3, resolution, resolution) uint8.

    Raises SubjectError for a picture that cannot be used, and where one is a copy of another.
    """
    pictures = [read_picture(path, resolution) for path in paths]
    distinct = {picture.tobytes() for picture in pictures}
    if len(distinct) < len(pictures):
        raise SubjectError(f"{len(pictures) - len(distinct)} of its {len(pictures)} pictures are copies of others")
    return pictures


def read_picture(path: Path, resolution: int) -> np.ndarray:
    """Reads the middle square of a picture as (3, resolution, resolution) uint8, upright.

    White shows where the picture is transparent. Raises SubjectError, naming it, where it cannot be opened or decoded,
    or is too small.
    """
    try:
        image = decode_image(path.read_bytes(), path.stem, path.suffix.lstrip("."))
    except OSError as error:
        raise SubjectError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise SubjectError(f"{path}: {error}") from error
    if min(image.shape[:2]) < min(LEAST_SIDE, resolution):
        raise SubjectError(
            f"{path} has {image.shape[1]} x {image.shape[0]} pixels, too few to show a subject at {resolution}"
        )
    square, _ = prepare(image, None, None, (resolution, resolution))
    return write_planes(square, np.empty((3, resolution, resolution), np.uint8))
