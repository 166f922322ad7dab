"""What the first bytes of a picture tell without decoding it: its format, its size, and how it is to be turned.

JPEG, PNG and WebP are read here, in microseconds; Pillow reads the other formats, and of all of them the EXIF or XMP
data that state an orientation, so that a picture is turned as everything turns it that is built on Pillow.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import pillow_heif
from PIL import Image

ORIENTATION = 0x0112
"""The tag of EXIF and of TIFF: 1 is upright, 2 to 8 are mirrored and turned (EXIF 2.3)."""
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
"""What Pillow may open here, by its own names; not PostScript, for which it would run Ghostscript."""
_STATING = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
"""How the APP1 segments of a JPEG begin that may state an orientation."""
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_STATING_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of PNG's text chunks that may state one."""

pillow_heif.register_heif_opener()
warnings.filterwarnings(
    "ignore", category=UserWarning, module=r"PIL\."
)  # "Corrupt EXIF data", which then turns nothing
Image.MAX_IMAGE_PIXELS = None  # the limit of `decode_image` is checked instead, and a run may raise it


class Header(NamedTuple):
    format: str
    """jpeg, png, webp; of others what Pillow calls them, in small letters."""
    width: int
    """In pixels, of the upright picture, as the height is."""
    height: int
    orientation: int
    """1 to 8: what is to be done to the stored pixels."""


def read_header(data: bytes) -> Header | None:
    """Reads the header of an encoded picture; returns None where there is none that can be read. Raises MemoryError."""
    if data[:3] == b"\xff\xd8\xff":
        kind, size, may_be_turned = "jpeg", _jpeg_size(data), _jpeg_may_be_turned(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        kind, size, may_be_turned = "png", _png_size(data), _png_may_be_turned(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind, size, may_be_turned = "webp", _webp_size(data), _webp_may_be_turned(data)
    else:
        return _pillow_header(data)
    if 0 in size:
        return None
    orientation = _stated_orientation(data) if may_be_turned else 1
    return Header(kind, *size, orientation) if orientation < 5 else Header(kind, size[1], size[0], orientation)


def image_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) of an upright picture from its header; (0, 0) where there is none that can be read."""
    header = read_header(data)
    return (header.width, header.height) if header else (0, 0)


def open_with_pillow(data: bytes) -> Image.Image:
    """Opens a picture of PILLOW_FORMATS, whose pixels are read when they are asked for.

    Raises whatever Pillow's plugins raise for what they cannot read.
    """
    return Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields the kind of each chunk of a PNG, and where its contents begin and end."""
    at = 8
    while at + 8 <= len(data):
        start, length = at + 8, int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : start], start, start + length
        at = start + length + 4


def jpeg_has_one_scan(data: bytes) -> bool:
    """Tells whether the first scan of a JPEG is all of it: it has all the components, and is not progressive."""
    components = 0
    for marker, at, _ in _jpeg_segments(data):
        if marker in (0xC0, 0xC1):
            components = data[at + 7]
        elif marker == 0xDA:
            return data[at + 2] == components
    return False


def _pillow_header(data: bytes) -> Header | None:
    try:
        with open_with_pillow(data) as image:
            width, height = image.size
            kind = (image.format or "").lower()
            # Pillow turns a TIFF itself when its pixels are read, and states its size accordingly.
            orientation = 1 if kind == "tiff" else _valid(image.getexif().get(ORIENTATION))
    except MemoryError:
        raise
    except Exception:  # plugins raise what they meet: struct.error, SyntaxError, KeyError, ...
        return None
    if width < 1 or height < 1:
        return None
    return Header(kind, width, height, orientation) if orientation < 5 else Header(kind, height, width, orientation)


def _stated_orientation(data: bytes) -> int:
    """Returns the orientation that EXIF or XMP data state, 1 to 8; 1 where they cannot be read, as is usual."""
    try:
        with open_with_pillow(data) as image:
            return _valid(image.getexif().get(ORIENTATION))
    except MemoryError:
        raise
    except Exception:  # as above
        return 1


def _valid(orientation: object) -> int:
    """Returns the orientation that a tag of whatever type holds, 1 to 8; 1 for anything else."""
    if isinstance(orientation, (bytes, tuple)) and len(orientation) == 1:
        orientation = orientation[0]
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _png_size(data: bytes) -> tuple[int, int]:
    return struct.unpack(">II", data[16:24]) if len(data) >= 24 else (0, 0)


def _png_may_be_turned(data: bytes) -> bool:
    for kind, start, _ in png_chunks(data):
        if kind == b"eXIf" or (kind in _TEXT_CHUNKS and data.startswith(_STATING_TEXTS, start)):
            return True
    return False


def _webp_size(data: bytes) -> tuple[int, int]:
    if len(data) < 30:
        return 0, 0
    if data[12:16] == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return 0, 0


def _webp_may_be_turned(data: bytes) -> bool:
    return data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & 0x0C)  # has EXIF or XMP data


def _jpeg_size(data: bytes) -> tuple[int, int]:
    for marker, at, _ in _jpeg_segments(data):
        # start of frame, all kinds; C4, C8 and CC in between are tables
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 3 : at + 7])
            return width, height
    return 0, 0


def _jpeg_may_be_turned(data: bytes) -> bool:
    return any(marker == 0xE1 and data.startswith(_STATING, at + 2) for marker, at, _ in _jpeg_segments(data))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, start of the length field, end) of each segment up to that of the first scan; bytes between them
    are skipped, as all decoders do."""
    at = 2
    while at + 4 <= len(data):
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            return
        marker = data[at + 1]
        if marker in (0x00, 0xFF):  # no marker, and a fill byte
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if at + 2 + length > len(data):
            return
        yield marker, at + 2, at + 2 + length
        if marker == 0xDA:
            return
        at += 2 + max(length, 2)
