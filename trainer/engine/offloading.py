"""Keeps what a backward pass needs of the forward pass in host memory meanwhile (`engine.activations: cpu`).

PyTorch's own torch.autograd.graph.save_on_cpu copies every tensor that an operation saves: weights too, which never
leave the device, and a tensor that three operations save three times, and it waits for each copy. Here a storage is
copied once, weights and what is small stay, and copies are made in the order of the stream, so that nothing waits.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from controlbooth.trainer.config.run import EngineConfig

SMALLEST = 2**20
"""Bytes from which a tensor is moved: a copy of less takes as long as its launch."""


@dataclass
class HostCopy:
    """A storage in host memory, and on the device again once its first tensor is needed. It goes with the last one."""

    host: Tensor
    """(elements of the storage,), in pinned memory if the device is a GPU."""
    device: torch.device
    back: Tensor | None = None

    def on_device(self) -> Tensor:
        if self.back is None:
            self.back = torch.empty_like(self.host, device=self.device).copy_(self.host, non_blocking=True)
        return self.back


@dataclass(frozen=True)
class Moved:
    """A tensor as a part of a storage that was copied: with its strides, so that kernels get what they would have."""

    copy: HostCopy
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def keeping_activations(engine: EngineConfig, *networks: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Returns what a forward pass of these networks runs in: nothing, or `activations_on_host`, as an engine is set."""
    if engine.activations == "device":
        return nullcontext
    weights = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    return partial(activations_on_host, weights)


@contextmanager
def activations_on_host(
    weights: Iterable[Tensor], smallest: int = SMALLEST, noted: Callable[[Tensor], None] = lambda host: None
) -> Iterator[None]:
    """Has the backward pass of what is computed within the block take its tensors from host memory.

    weights: tensors that stay on the device, and all that share their memory. smallest: bytes from which a tensor is
    moved. noted: is called with each tensor that is made in host memory, before it is written.
    """
    stay = {tensor.untyped_storage()._cdata for tensor in weights}
    copies: dict[int, tuple[Any, int, torch.dtype, weakref.ref[HostCopy]]] = {}

    def pack(tensor: Tensor) -> Tensor | Moved:
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() < smallest or storage._cdata in stay:
            return tensor
        known = copies.get(storage._cdata)  # with a reference that ends with the storage, whose address comes again
        copy = None
        if known is not None and known[0]() is storage and known[1:3] == (tensor._version, tensor.dtype):
            copy = known[3]()
        if copy is None:
            copy = _copied(tensor.detach(), noted)
            copies[storage._cdata] = (weakref.ref(storage), tensor._version, tensor.dtype, weakref.ref(copy))
        return Moved(copy, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: Tensor | Moved) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return kept.copy.on_device().as_strided(kept.size, kept.stride, kept.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _copied(tensor: Tensor, noted: Callable[[Tensor], None]) -> HostCopy:
    """Copies the whole storage of a tensor to the host."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    host = torch.empty(count, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    noted(host)
    host.copy_(tensor.as_strided((count,), (1,), 0), non_blocking=True)
    return HostCopy(host, tensor.device)
