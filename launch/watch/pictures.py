"""Pictures of run folders, made small for the page, so that two hundred of them are no burden to a browser."""

import io
import threading
from collections import OrderedDict
from pathlib import Path

from controlbooth.data.errors import MissingFile
from controlbooth.launch.watch.files import Stamp, open_inside, stamp_of, suffix_of

KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
WIDTHS = (320, 640, 1280)
"""Pixels to which a picture is made smaller."""
MOST_KEPT_BYTES = 2**26
MOST_PICTURE_BYTES = 2**26
Key = tuple[Path, str, int]


class Pictures:
    """Small pictures, made once for as long as the file is the same."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, tuple[Stamp, bytes]] = OrderedDict()
        self._bytes = 0

    def whole(self, folder: Path, name: str) -> bytes:
        """Returns a picture as it lies in a folder. Raises OSError where it is none that may be shown."""
        if suffix_of(name) not in KINDS:
            raise MissingFile(f"{name!r} is no picture")
        with open_inside(folder, name) as file:
            content = file.read(MOST_PICTURE_BYTES + 1)
        if len(content) > MOST_PICTURE_BYTES:
            raise MissingFile(f"{name!r} is too large to be shown")
        return content

    def small(self, folder: Path, name: str, width: int) -> bytes:
        """Returns a picture as WebP, at most `width` pixels wide. Raises OSError where it cannot be shown."""
        key, stamp = (folder, name, width), stamp_of(folder / name)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and kept[0] == stamp:
                self._kept.move_to_end(key)
                return kept[1]
        made = shrink(self.whole(folder, name), width)
        if stamp is not None:
            with self._lock:
                self._keep(key, stamp, made)
        return made

    def _keep(self, key: Key, stamp: Stamp, made: bytes) -> None:
        if (before := self._kept.pop(key, None)) is not None:
            self._bytes -= len(before[1])
        self._kept[key] = stamp, made
        self._bytes += len(made)
        while self._bytes > MOST_KEPT_BYTES:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._bytes -= len(dropped)


def shrink(content: bytes, width: int) -> bytes:
    """Makes a picture at most so many pixels wide, as WebP. Raises OSError for bytes that are no picture."""
    from PIL import Image  # when the first picture is asked for: the page itself needs none

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as opened:
            picture = opened.convert("RGB")
        if picture.width > width:
            picture = picture.resize(
                (width, max(1, round(picture.height * width / picture.width))), Image.Resampling.BOX
            )
        out = io.BytesIO()
        lossless = picture.width <= 512  # pixels of small pictures are looked at one by one
        picture.save(out, format="WEBP", lossless=lossless, quality=85, method=2)
    except (OSError, ValueError, SyntaxError, ArithmeticError, Image.DecompressionBombError) as error:
        raise MissingFile(f"no picture: {error}") from error  # as cut while it was copied
    return out.getvalue()
