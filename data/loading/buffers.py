"""Memory for the arrays of a step, used again once nobody looks at them any more.

A step of 32 pictures of 512 px and their conditions is 50 MB. Taken anew from the system for each step, it costs more
time in page faults than decoding the conditions does.
"""

import math
import sys
from collections.abc import Sequence
from threading import Lock

import numpy as np


def _references(owners: Sequence[np.ndarray]) -> list[int]:
    return [sys.getrefcount(owner) for owner in owners]


_FREE = _references([np.empty(0)])[0]
"""References to memory that nobody looks at, counted as they are counted later: versions of Python differ."""


class Buffers:
    """Arrays over memory that is kept. As many are kept as were in use at one time."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._lock = Lock()

    def empty(self, shape: Sequence[int]) -> np.ndarray:
        """Returns a uint8 array of this shape with arbitrary values; its memory is reused once no view of it is left.

        A view refers to the memory's owner (numpy's `base`), and a torch tensor to the view that it was made from, so
        the owner's reference count tells when the last of them is gone.
        """
        size = math.prod(shape)
        with self._lock:
            free = [count == _FREE for count in _references(self._kept)]
            for owner, is_free in zip(self._kept, free, strict=True):
                if is_free and owner.size >= size:
                    return owner[:size].reshape(shape)
            # What is free is too small: where shapes change, the largest ones stay.
            self._kept = [owner for owner, is_free in zip(self._kept, free, strict=True) if not is_free]
            self._kept.append(np.empty(size, np.uint8))
            return self._kept[-1].reshape(shape)
