"""Encoded images -> uint8 arrays of the training resolution, target and condition always in step.

`decode_image` is the only way from a picture's bytes to its pixels, for every verb. Images are upright and nothing in
them is transparent, see `codecs`. One-channel images stay one channel until `prepare` is done with them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from controlbooth.data.condition_names import MAX_PIXELS, Values, named_values
from controlbooth.data.errors import UserError
from controlbooth.data.pictures.codecs import decode, memory_is_short
from controlbooth.data.pictures.headers import read_header
from controlbooth.data.pictures.resize import resize, values_of

NORMAL_KINDS = ("normals", "normal", "normalbae")
"""Conditions whose red is the x of a direction, which a mirror turns round: ours, and others' names for them."""
_MIRRORED_RED = np.arange(255, -1, -1, dtype=np.uint8)
_MIRRORED_RED[128] = 128  # 0 lies between 127 and 128 and is stored as 128, mirrored or not


class BadSample(UserError):
    """A fault that is in the data and will be there at every attempt, so another sample may take its place."""

    def __init__(self, key: str, part: str, reason: str):
        super().__init__(f"sample {key!r}, part {part!r}: {reason}")
        self.key, self.part, self.reason = key, part, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how the error is pickled when one rank sends it to another: by what the constructor takes."""
        return BadSample, (self.key, self.part, self.reason)


class OutOfMemory(MemoryError):
    """The machine lacks memory for a picture, which says nothing about the picture."""


def keep_freed_memory() -> None:
    """Lets this process reuse the memory of pictures instead of giving it back after each one.

    glibc returns freed memory above a limit to the system, and touching it again costs a page fault for every 4 KiB,
    which took a third of the time of drawing scenes. Freeing a large block once raises that limit (mallopt(3)).
    """
    np.empty(1 << 24, np.uint8)


def decode_image(data: bytes, key: str, part: str, background: int = 255, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an encoded image -> (H, W, 3) RGB, or (H, W) where it has one channel; uint8, upright.

    background: the level that shows through transparent pixels. 16-bit images keep their upper 8 bits. key and part
    name the image in the BadSample that is raised for data that cannot be decoded to the end, and for pictures of more
    than max_pixels, by their header. Raises OutOfMemory, which is no fault of the sample.
    """
    with memory_named(key, part):
        header = read_header(data)
    if header is None:
        raise BadSample(key, part, f"the image cannot be decoded ({len(data)} bytes, starting {data[:8]!r})")
    if header.width * header.height > max_pixels:
        raise BadSample(key, part, too_large(header.width, header.height, max_pixels))
    with memory_named(key, part, (header.width, header.height)):
        try:
            return decode(data, header, background)
        except ValueError as error:
            raise BadSample(key, part, f"the image cannot be decoded: {error}") from error


def too_large(width: int, height: int, max_pixels: int) -> str:
    """Says that a picture is over the limit, and what to do about it."""
    return (
        f"it has {width} x {height} pixels, {width * height / 1e6:.1f} million, and the limit is {max_pixels / 1e6:g} "
        "million: make it smaller, or raise data.max_pixels of the run (--max-pixels of `controlbooth data`)"
    )


@contextlib.contextmanager
def memory_named(key: str, part: str, size: Sequence[int] | None = None) -> Iterator[None]:
    """Turns a lack of memory inside, as any library tells it, into an OutOfMemory that names the sample.

    size: width and height in pixels.
    """
    try:
        yield
    except (OutOfMemory, BadSample):
        raise
    except (MemoryError, cv2.error) as error:
        if not memory_is_short(error):
            raise
        what = f" of {size[0]} x {size[1]} pixels ({3 * size[0] * size[1] / 2**20:,.0f} MiB decoded)" if size else ""
        raise OutOfMemory(
            f"sample {key!r}, part {part!r}: there is no memory left for this picture{what}. Nothing is wrong with "
            "it: free some memory, use fewer threads or workers, or lower data.max_pixels (--max-pixels) to leave "
            "such pictures out"
        ) from error


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Returns a picture with three channels: (H, W) or (H, W, 3) uint8 -> (H, W, 3)."""
    return pixels if pixels.ndim == 3 else cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)


def prepare(
    image: np.ndarray,
    condition: np.ndarray | None,
    kind: str | None,
    shape: tuple[int, int],
    crop: tuple[int, int] | None = None,
    flip: bool = False,
    values: Values | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Resizes until `shape` is just covered and cuts it out, the same for target and condition.

    image: (H, W) or (H, W, 3) uint8; condition likewise, of any size with the same aspect ratio. shape: (height, width)
    in pixels. crop: top and left of what is cut out, within `crop_slack`; None takes the middle. flip mirrors left to
    right. values: see `prepare_condition`. Returns both as (height, width) or (height, width, 3) uint8. Raises
    ValueError when the two do not show the same frame.
    """
    size = (image.shape[0], image.shape[1])
    prepared = None if condition is None else prepare_condition(condition, size, kind, shape, crop, flip, values)
    return prepare_target(image, shape, crop, flip), prepared


def prepare_target(
    image: np.ndarray, shape: tuple[int, int], crop: tuple[int, int] | None = None, flip: bool = False
) -> np.ndarray:
    """Returns what `prepare` makes of a target."""
    return _fit(image, (image.shape[0], image.shape[1]), "levels", shape, crop, flip)


def prepare_condition(
    condition: np.ndarray,
    size: tuple[int, int],
    kind: str | None,
    shape: tuple[int, int],
    crop: tuple[int, int] | None = None,
    flip: bool = False,
    values: Values | None = None,
) -> np.ndarray:
    """Returns what `prepare` makes of a condition. size: (height, width) of the target, which is not needed itself.

    values: what the values are in all conditions of this kind, which decides how they are resized; with None the kind's
    name tells, or else this picture alone. Mirrored normals keep to their rule: red, their x, becomes 255 - red, except
    128, which stands for 0, and black pixels, which have no normal. Raises ValueError when target and condition have
    different aspect ratios.
    """
    if not same_frame(size, condition.shape):
        sizes = f"{size[1]}x{size[0]} and {condition.shape[1]}x{condition.shape[0]}"
        raise UserError(f"target and condition have different aspect ratios ({sizes})")
    if flip and kind in NORMAL_KINDS:
        condition = _turned_normals(condition)
    values = values or named_values(kind) or values_of(condition)
    return _fit(condition, size, values, shape, crop, flip)


def _turned_normals(normals: np.ndarray) -> np.ndarray:
    """Returns normals with x the other way round, each pixel at its place. (H, W) or (H, W, 3) uint8 -> (H, W, 3).

    This is to be done before resizing, which mixes normals with the black of pixels that have none.
    """
    turned = to_rgb(normals).copy()
    none = cv2.inRange(turned, (0, 0, 0), (0, 0, 0))  # black would be (-1, -1, -1), which is no direction
    red = cv2.LUT(cv2.extractChannel(turned, 0), _MIRRORED_RED)
    return cv2.insertChannel(cv2.bitwise_and(red, cv2.bitwise_not(none)), turned, 0)


def _fit(
    pixels: np.ndarray,
    size: tuple[int, int],
    values: Values,
    shape: tuple[int, int],
    crop: tuple[int, int] | None,
    flip: bool,
) -> np.ndarray:
    height, width = scaled_size(*size, shape)
    top, left = crop if crop is not None else ((height - shape[0]) // 2, (width - shape[1]) // 2)
    part = resize(pixels, height, width, values)[top : top + shape[0], left : left + shape[1]]
    return cv2.flip(part, 1) if flip else part


def write_planes(pixels: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Writes a picture, (H, W) or (H, W, 3) uint8, into `planes`, (3, H, W) uint8, and returns them; one channel is
    written three times."""
    if pixels.ndim == 2:
        planes[:] = pixels
    else:
        cv2.split(pixels, list(planes))  # fills the planes in a sixth of the time that numpy's transpose takes
    return planes


def scaled_size(height: int, width: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of the image when it is scaled to just cover `shape`; one of the two is met exactly."""
    if shape[0] * width <= shape[1] * height:
        return max(shape[0], round(height * shape[1] / width)), shape[1]
    return shape[0], max(shape[1], round(width * shape[0] / height))


def crop_slack(height: int, width: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Returns how many pixels the part of this shape can move down and to the right in the resized image."""
    scaled = scaled_size(height, width, shape)
    return scaled[0] - shape[0], scaled[1] - shape[1]


def same_frame(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Tells whether one image can be a scaled copy of the other, its sides rounded to a pixel or two. Both shapes begin
    with the height and the width."""
    (height, width), (other_height, other_width) = shape[:2], other[:2]
    return abs(height * other_width - width * other_height) <= 2 * max(height, width, other_height, other_width)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes (H, W) or (H, W, 3) RGB uint8 as PNG.

    Where its channels are equal it has one, which decodes eight times as fast. Where all is black or white, as edges
    are, a pixel is one bit: that is smaller and decodes twice as fast again. Raises ValueError where OpenCV cannot
    encode it.
    """
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    options = []
    if pixels.ndim == 2 and ((pixels == 0) | (pixels == 255)).all():
        options = [cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    bgr = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".png", bgr, options)
    if not done:
        raise UserError(f"OpenCV cannot encode an image of shape {pixels.shape} as PNG")
    return data.tobytes()
