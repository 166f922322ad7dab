"""Encoded pictures -> upright uint8 arrays in which nothing is transparent any more.

JPEG goes through simplejpeg (libjpeg-turbo), PNG and WebP through OpenCV, which decodes them fastest, and all others
through Pillow, which knows their colours and their kinds of transparency. A lack of memory is always a MemoryError and
never a ValueError, which says that a picture is damaged.
"""

import re
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import simplejpeg

from controlbooth.data.errors import UserError
from controlbooth.data.pictures.headers import Header, jpeg_has_one_scan, open_with_pillow, png_chunks

MEMORY = ("insufficient memory", "out of memory", "memory allocation", "bad_alloc", "failed to allocate")
"""In messages of libjpeg, OpenCV, C++ and libavif where memory was short, in small letters."""
DECODING_BYTES = 16
"""Of a pixel, which no decoder needs more than: a progressive JPEG 9, a PNG of 16 bits 8, WebP about as much."""
STRAY_PLACES = 4
"""At so many places of a JPEG there may be stray bytes. Each has it decoded again, to be sure that none is missing."""
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is damaged is told by its name, and once
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_NO_END = "Premature end of JPEG file"


def decode(data: bytes, header: Header, background: int) -> np.ndarray:
    """Decodes a picture -> (H, W, 3) RGB, or (H, W) where it has one channel; uint8.

    background: the level behind transparent pixels. Raises ValueError for what cannot be decoded to the end, and
    MemoryError where memory is short. Libraries report short memory in many ways, and OpenCV, libpng and libwebp not at
    all. So whatever went wrong, it is the picture's fault only if it goes wrong again after as much memory could be had
    as it takes.
    """
    try:
        return _decoded(data, header, background)
    except (ValueError, MemoryError):
        pixels = header.width * header.height
        _have_memory(DECODING_BYTES * pixels)
    try:
        return _decoded(data, header, background)
    except MemoryError as error:
        _have_memory(4 * DECODING_BYTES * pixels + 2**28)
        raise UserError(f"it asks for more memory than its pixels take ({error})") from error


def _have_memory(size: int) -> None:
    """Raises MemoryError where so many bytes cannot be had."""
    np.empty(size, np.uint8)


def _decoded(data: bytes, header: Header, background: int) -> np.ndarray:
    if header.format == "jpeg":
        pixels = _jpeg(data)
    elif header.format == "png" or (header.format == "webp" and not _is_animated_webp(data)):
        pixels = _with_opencv(data, header, background)
    else:
        pixels = _with_pillow(data, background)
    pixels = _upright(pixels, header.orientation)
    if pixels.shape[:2] != (header.height, header.width):
        sizes = f"{pixels.shape[1]} x {pixels.shape[0]} pixels, and its header says {header.width} x {header.height}"
        raise UserError(f"it has {sizes}")
    return pixels


def memory_is_short(error: BaseException) -> bool:
    """Tells whether an error of a library says that it could not have the memory that it asked for."""
    short = isinstance(error, MemoryError) or (isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem)
    return short or any(text in str(error).lower() for text in MEMORY)


def _jpeg(data: bytes) -> np.ndarray:
    try:
        colourspace = simplejpeg.decode_jpeg_header(data, strict=False)[2]
    except KeyError as error:  # of a colour space that it could not tell
        raise UserError("its header cannot be read to the end") from error
    if colourspace == "Gray":
        return _whole_jpeg(data, "GRAY")[..., 0]
    if colourspace in ("YCbCr", "RGB"):
        return _whole_jpeg(data, "RGB")
    return _from_inks(_whole_jpeg(data, "CMYK"))  # CMYK and YCCK of print shops


def _from_inks(pixels: np.ndarray) -> np.ndarray:
    """Converts (H, W, 4) CMYK as JPEGs have it, 255 for no ink, to (H, W, 3) RGB by OpenCV's arithmetic. uint8."""

    def mixed(pixels: np.ndarray) -> np.ndarray:
        inks = pixels.astype(np.int32)
        black = inks[..., 3:]
        return black - ((255 - inks[..., :3]) * black >> 8)

    return _in_bands(mixed, pixels.shape[:2] + (3,), pixels)


def _whole_jpeg(data: bytes, colourspace: str) -> np.ndarray:
    """Decodes a JPEG of which no pixel is missing. Raises ValueError for others, and MemoryError.

    libjpeg warns alike of bytes too many, which harm nothing, and of ones that are missing, in whose place it puts
    gray; and of several warnings only the last is told. So what seems to be too much is cut out, and what is left has
    to be decoded without a warning.
    """
    pixels, problem = _strict_jpeg(data, colourspace)
    for _ in range(STRAY_PLACES):
        if pixels is not None:
            return pixels
        for other in _without_stray_bytes(data, problem):
            pixels, left = _strict_jpeg(other, colourspace)
            if pixels is not None or (left != problem and _STRAY.search(left)):
                data, problem = other, left
                break
        else:
            break
    if pixels is None:
        raise UserError(problem)
    return pixels


def _strict_jpeg(data: bytes, colourspace: str) -> tuple[np.ndarray | None, str]:
    """Decodes a JPEG and returns (H, W, C) uint8 with "", or else None with what libjpeg says, be it an error or a
    warning. Raises MemoryError."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace=colourspace), ""
    except ValueError as error:
        if memory_is_short(error):
            raise MemoryError(str(error)) from error
        return None, str(error)


def _without_stray_bytes(data: bytes, problem: str, most: int = 32) -> Iterator[bytes]:
    """Yields what a JPEG may have been before bytes came into it, or before only its end marker was cut off.

    problem: what libjpeg says. most: places that are tried. A JPEG with several scans gets no end marker, since no
    decoder could tell which of them were cut off with it.
    """
    if _NO_END in problem and jpeg_has_one_scan(data):
        yield data + b"\xff\xd9"
    if (found := _STRAY.search(problem)) is None:
        return
    count, marker = int(found[1]), bytes([0xFF, int(found[2], 16)])
    at = len(data)
    for _ in range(most):
        at = data.rfind(marker, 0, at)
        if at < count:
            return
        yield data[: at - count] + data[at:]


def _with_opencv(data: bytes, header: Header, background: int) -> np.ndarray:
    if header.format == "png":
        _check_chunks(data)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise UserError(str(error)) from error
    if pixels is None:
        raise UserError(f"{len(data)} bytes, starting {data[:8]!r}, cannot be read to the end")
    alpha = None
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels, alpha = pixels[..., :3], pixels[..., 3]
    elif pixels.ndim == 2 and header.format == "png":
        alpha = _png_key_alpha(data, pixels)
    pixels, alpha = _eight_bits(pixels), None if alpha is None else _eight_bits(alpha)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return pixels if alpha is None else _blend(pixels, alpha, background)


def _check_chunks(data: bytes) -> None:
    """Raises ValueError for a PNG with a chunk that is longer than the file: OpenCV would make room for all of it, up
    to 4 GiB, before it looks."""
    for kind, _, end in png_chunks(data):
        if end + 4 > len(data):
            raise UserError(f"{end + 4 - len(data)} bytes of its chunk {kind!r} are missing")
        if kind == b"IEND":
            return


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Returns the upper 8 bits of 16-bit values, and uint8 as it is. Raises ValueError for other types, whose range
    nothing states."""
    if pixels.dtype == np.uint16:
        return np.right_shift(pixels, 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(f"its values are {pixels.dtype}; store the image with 8 or 16 bits a channel")
    return pixels


def _png_key_alpha(data: bytes, gray: np.ndarray) -> np.ndarray | None:
    """Returns the alpha, uint8, of a gray PNG in which one level stands for transparent pixels (tRNS), which OpenCV
    leaves out; None where no level does."""
    for kind, start, _ in png_chunks(data):
        if kind == b"tRNS":
            bits, level = data[24], int.from_bytes(data[start : start + 2], "big")
            if bits < 8:
                level = level * 255 // (2**bits - 1)
            return np.where(gray == level, 0, 255).astype(np.uint8)
        if kind == b"IDAT":
            break
    return None


def _is_animated_webp(data: bytes) -> bool:
    return data[12:16] == b"VP8X" and bool(data[20] & 0x02)


def _with_pillow(data: bytes, background: int) -> np.ndarray:
    """Decodes a picture with Pillow; of an animation or a TIFF the first picture or page. Raises ValueError and
    MemoryError."""
    try:
        with open_with_pillow(data) as image:
            image.load()
            if image.mode.startswith("I;16"):
                return _eight_bits(np.asarray(image).astype(np.uint16))
            if image.mode in ("I", "F"):
                return _eight_bits(np.asarray(image))
            if image.has_transparency_data:
                rgba = np.asarray(image.convert("RGBA"))
                return _blend(rgba[..., :3], rgba[..., 3], background)
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Exception as error:  # plugins raise what they meet: OSError, SyntaxError, struct.error, KeyError, ...
        if memory_is_short(error):
            raise MemoryError(str(error)) from error
        raise UserError(str(error) or type(error).__name__) from error


def _blend(pixels: np.ndarray, alpha: np.ndarray, background: int) -> np.ndarray:
    """Blends pixels with the background by their alpha. pixels: (H, W) or (H, W, 3) uint8. alpha: (H, W) uint8, 0 where
    they are transparent."""

    def mixed(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        share = alpha.astype(np.float32) / 255.0
        share = share if pixels.ndim == 2 else share[..., None]
        return (pixels * share + background * (1.0 - share)).round()

    return _in_bands(mixed, pixels.shape, pixels, alpha)


def _in_bands(mixed: Callable[..., np.ndarray], shape: tuple[int, ...], *planes: np.ndarray) -> np.ndarray:
    """Computes uint8 of this shape by bands of rows: whole pictures in float32 would take many times their size."""
    result = np.empty(shape, np.uint8)
    for top in range(0, shape[0], 64):
        result[top : top + 64] = mixed(*(plane[top : top + 64] for plane in planes))
    return result


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation (1 to 8, EXIF 2.3 table of tag 0x0112)."""
    if orientation in (2, 4, 5, 7):  # the mirrored ones are these turns after a mirror
        pixels, orientation = pixels[:, ::-1], {2: 1, 4: 3, 5: 8, 7: 6}[orientation]
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]
    return np.ascontiguousarray(np.rot90(pixels, turns))
