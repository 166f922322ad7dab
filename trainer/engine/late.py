"""Values of the device that are read later, so that the host can go ahead until then."""

import time
from typing import Any

import torch
from torch import Tensor


class Late:
    """A copy of a tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        self._copy = tensor
        self.known_at = time.perf_counter()
        """When the values were known, by time.perf_counter(): now, or of a GPU when they are read."""
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """Returns the values, waiting until they are there."""
        if self._event is not None:
            self._event.synchronize()
            self.known_at = time.perf_counter()
        return self._copy.tolist()
