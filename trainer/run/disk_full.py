"""What a full disk is called, whichever library has met it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from controlbooth.data.files.locks import FULL


@contextlib.contextmanager
def named_when_full(path: Path) -> Iterator[None]:
    """Raises OSError, in one sentence with the remedy, where what writes `path` finds no space left.

    Known by the system's words: safetensors puts them into an error of its own, shutil into a list of several.
    """
    try:
        yield
    except Exception as error:
        code = next((code for code in FULL if os.strerror(code) in str(error)), None)
        if code is None or (isinstance(error, OSError) and error.filename is not None):
            raise
        said = f"{os.strerror(code)}. What was finished is kept: make room, and start the same command again"
        raise OSError(code, said, str(path)) from error
