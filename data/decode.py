"""Encoded images -> uint8 arrays of the training resolution, target and condition always in step.

JPEG goes through simplejpeg (libjpeg-turbo), PNG and WebP through OpenCV. Images are upright: the EXIF orientation of
JPEG photographs is applied. One-channel images stay one channel until `prepare` is done with them.
"""

import struct

import cv2
import numpy as np
import simplejpeg

from controlbooth.data.kinds import Values, named_values
from controlbooth.data.resize import resize, values_of

NORMAL_KINDS = ("normals", "normal", "normalbae")
"""Conditions whose red is the x of a direction, which a mirror turns round: ours, and others' names for them."""
_MIRRORED_RED = np.arange(255, -1, -1, dtype=np.uint8)
_MIRRORED_RED[128] = 128  # 0 lies between 127 and 128 and is stored as 128, mirrored or not


class BadSample(ValueError):
    """A fault that is in the data and will be there at every attempt, so another sample may take its place."""

    def __init__(self, key: str, part: str, reason: str):
        super().__init__(f"sample {key!r}, part {part!r}: {reason}")
        self.key, self.part, self.reason = key, part, reason


def keep_freed_memory() -> None:
    """Lets this process reuse the memory of pictures instead of giving it back after each one.

    glibc returns freed memory above a limit to the system, and touching it again costs a page fault for every 4 KiB,
    which took a third of the time of drawing scenes. Freeing a large block once raises that limit (mallopt(3)).
    """
    np.empty(1 << 24, np.uint8)


def decode_image(data: bytes, key: str, part: str, background: int = 255) -> np.ndarray:
    """An encoded image -> (H, W, 3) RGB or, where it has one channel, (H, W); uint8.

    background: the level that shows through transparent pixels. 16-bit images keep their upper 8 bits. key and part
    name it in the BadSample that is raised for data that cannot be decoded to the end.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _decode_jpeg(data)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    except (ValueError, cv2.error) as error:
        raise BadSample(key, part, f"the image cannot be decoded: {error}") from error
    if pixels is None:
        raise BadSample(key, part, f"the image cannot be decoded ({len(data)} bytes, starting {data[:8]!r})")
    if pixels.dtype == np.uint16:
        pixels = np.right_shift(pixels, 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise BadSample(key, part, f"its values are {pixels.dtype}; store the image with 8 or 16 bits a channel")
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.float32) / 255.0
        pixels = (pixels[..., :3] * alpha + background * (1.0 - alpha)).round().astype(np.uint8)
    return pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 -> (H, W, 3)"""
    return pixels if pixels.ndim == 3 else cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)


def _decode_jpeg(data: bytes) -> np.ndarray:
    colourspace = simplejpeg.decode_jpeg_header(data)[2]
    if colourspace == "Gray":
        pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY")[..., 0]
    elif colourspace in ("YCbCr", "RGB"):
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    else:  # CMYK and YCCK of print shops, which libjpeg-turbo does not convert
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if decoded is None:
            raise ValueError(f"a JPEG of colour space {colourspace} that OpenCV cannot read")
        pixels = decoded
    return _upright(pixels, jpeg_orientation(data))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation (1 to 8, EXIF 2.3 table of tag 0x0112)."""
    if orientation in (2, 4, 5, 7):  # the mirrored ones are these turns after a mirror
        pixels, orientation = pixels[:, ::-1], {2: 1, 4: 3, 5: 8, 7: 6}[orientation]
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]
    return np.ascontiguousarray(np.rot90(pixels, turns))


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
    """What `prepare` makes of a target."""
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
    """What `prepare` makes of a condition. size: (height, width) of the target, which is not needed itself.

    values: what they are in all conditions of this kind, which decides how they are resized; None tells it by the
    kind's name, or else by this picture alone.
    Mirrored normals keep to their rule: red, their x, becomes 255 - red, except in black pixels, which have no normal.
    """
    if not same_frame(size, condition.shape):
        sizes = f"{size[1]}x{size[0]} and {condition.shape[1]}x{condition.shape[0]}"
        raise ValueError(f"target and condition have different aspect ratios ({sizes})")
    if flip and kind in NORMAL_KINDS:
        condition = _turned_normals(condition)
    values = values or named_values(kind) or values_of(condition)
    return _fit(condition, size, values, shape, crop, flip)


def _turned_normals(normals: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 -> (H, W, 3) with x the other way round, each pixel at its place.

    To be done before resizing, which mixes normals with the black of pixels that have none.
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
    """(H, W) or (H, W, 3) uint8 into `planes`, (3, H, W) uint8, one channel three times; returns them."""
    if pixels.ndim == 2:
        planes[:] = pixels
    else:
        cv2.split(pixels, list(planes))  # fills the planes in a sixth of the time that numpy's transpose takes
    return planes


def scaled_size(height: int, width: int, shape: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the image once it is as small as may be to cover `shape`; one of the two is met exactly."""
    if shape[0] * width <= shape[1] * height:
        return max(shape[0], round(height * shape[1] / width)), shape[1]
    return shape[0], max(shape[1], round(width * shape[0] / height))


def crop_slack(height: int, width: int, shape: tuple[int, int]) -> tuple[int, int]:
    """How far the part of this shape can move down and to the right in an image of this size, once that is resized."""
    scaled = scaled_size(height, width, shape)
    return scaled[0] - shape[0], scaled[1] - shape[1]


def same_frame(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one image can be a scaled copy of the other, its sides rounded to a pixel or two."""
    (height, width), (other_height, other_width) = shape[:2], other[:2]
    return abs(height * other_width - width * other_height) <= 2 * max(height, width, other_height, other_width)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an upright JPEG, PNG or WebP from its header; (0, 0) where there is no such header."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data)
    if data[:2] != b"\xff\xd8":
        return 0, 0
    for marker, at, _ in _jpeg_segments(data):
        # start of frame, all kinds; C4, C8 and CC in between are tables
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 7 <= len(data):
            height, width = struct.unpack(">HH", data[at + 3 : at + 7])
            return (height, width) if jpeg_orientation(data) >= 5 else (width, height)
    return 0, 0


def _webp_size(data: bytes) -> tuple[int, int]:
    if data[12:16] == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return 0, 0


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where the file states none."""
    for marker, at, end in _jpeg_segments(data):
        if marker == 0xE1 and data[at + 2 : at + 8] == b"Exif\0\0":
            return _exif_orientation(data[at + 8 : end])
    return 1


def _exif_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 10:
        return 1
    directory = struct.unpack(order + "I", tiff[4:8])[0]
    entries = tiff[directory + 2 :]
    for at in range(0, len(entries) - 11, 12):
        tag, _, _, value = struct.unpack(order + "HHIH", entries[at : at + 10])
        if tag == 0x0112:
            return value if 1 <= value <= 8 else 1
        if tag > 0x0112:  # entries are sorted, and what follows them is not an entry
            break
    return 1


def _jpeg_segments(data: bytes):
    """(marker, start of the length field, end) of each segment up to the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:
            return
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at + 2, at + 2 + length
        at += 2 + length
