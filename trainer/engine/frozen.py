"""The blocks of a frozen network, of which a device holds what it needs now: the block that works and the next one.

A block's bytes are split over ranks, or wait in host memory, or both. They are fetched just before the block's forward
pass and again before its backward pass, ahead of their use: while one block works, the next one is on its way. After
its pass they are let go. Bytes, not numbers, so that quantized weights go the same way; and the very bytes that a whole
network has, at equally aligned addresses, so that results are equal to the bit.

The parameters of a block are views of one storage, which is emptied and filled again behind them (PyTorch's FSDP does
so too): what autograd has kept of a weight is there again when the backward pass reads it. Each storage is filled
through a tensor of its own, so that autograd sees no change of the weights.

Ranks that share must run the same passes through the same blocks in one order, as under ZeRO-3: each step does, with
gradient checkpointing too, and validations make equally many passes on each rank (`evaluation.drawing.generate`).

On a GPU bytes come on a stream of their own, from page-locked memory; not yet measured on a GPU.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_iter

from controlbooth.models.blocks import repeated_blocks
from controlbooth.trainer.engine.distributed import Sharing, gather_later

ALIGNED = 256
"""Bytes of which each tensor's place in a block is a multiple: no kernel's choice depends on the address then."""


def places_of(sizes: Sequence[int], ranks: int = 1) -> tuple[list[int], int]:
    """Lays out tensors one after the other; -> where each begins, in bytes, and the bytes of all, a multiple of `ranks`
    times ALIGNED. sizes: in bytes."""
    places, end = [], 0
    for size in sizes:
        places.append(end)
        end += -(-size // ALIGNED) * ALIGNED
    return places, -(-end // (ranks * ALIGNED)) * ranks * ALIGNED


def bytes_of(tensor: Tensor) -> Tensor:
    """Returns the bytes of a contiguous tensor, (n,) uint8, which share its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Lists the parameters and buffers of a module that have elements, each once."""
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()]


class Supply:
    """Where the bytes of blocks are kept, and how they come to the device."""

    def __init__(self, device: torch.device, sharing: Sharing | None, from_host: bool) -> None:
        self.device, self.sharing, self.from_host = device, sharing, from_host
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.live, self.most = 0, 0
        """Bytes of blocks that are on the device now, and the most that were."""

    @property
    def ranks(self) -> int:
        return 1 if self.sharing is None else self.sharing.ranks

    def keep(self, whole: Tensor) -> Tensor:
        """Returns what this rank keeps of a block: (n,) uint8, all of it or its share, on the host or the device.

        whole: (ranks * n,) uint8 on the CPU.
        """
        if self.sharing is not None:
            whole = whole.view(self.ranks, -1)[self.sharing.rank].clone()
        if not self.from_host:
            return whole.to(self.device)
        return whole.pin_memory() if self.device.type == "cuda" else whole

    def begin(self, whole: Tensor, kept: Tensor) -> Any:
        """Begins to fill `whole`, (ranks * n,) uint8 on the device, from what was kept; returns what `end` takes."""
        if self.stream is not None:  # what the memory was used for before must be done
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            if self.sharing is None:
                whole.copy_(kept, non_blocking=True)
                return None
            share = kept.to(self.device, non_blocking=True)
            return gather_later(whole, share, self.sharing), share

    def end(self, begun: Any) -> None:
        """Waits until what was begun is there: the host on a CPU, and on a GPU the stream that computes."""
        if begun is not None:
            begun[0].wait()
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class Block:
    """A block of a frozen network whose tensors are there only while it works."""

    def __init__(self, module: nn.Module, supply: Supply) -> None:
        tensors = own_tensors(module)
        places, self.size = places_of([tensor.nbytes for tensor in tensors], supply.ranks)
        whole = torch.zeros(self.size, dtype=torch.uint8)
        for tensor, place in zip(tensors, places, strict=True):
            whole[place : place + tensor.nbytes] = bytes_of(tensor.to("cpu").contiguous())
        self.supply, self.kept = supply, supply.keep(whole)
        self.storage = torch.empty(self.size, dtype=torch.uint8, device=supply.device).untyped_storage()
        for tensor, place in zip(tensors, places, strict=True):
            view = torch.empty(0, dtype=tensor.dtype, device=supply.device)
            shape = tensor.shape
            strides = torch.empty(shape, device="meta").stride()
            tensor.data = view.set_(self.storage, place // tensor.element_size(), shape, strides)
        self.storage.resize_(0)
        self.begun: Any = None
        self.is_here, self.is_coming = False, False
        self.awaited = 0
        """Forward passes whose backward pass is to come."""
        self.in_backward = False

    def fetch(self) -> None:
        """Begins to bring the block's bytes, unless they are here or on their way."""
        if self.is_here or self.is_coming:
            return
        self.storage.resize_(self.size)
        self.supply.live += self.size
        self.supply.most = max(self.supply.most, self.supply.live)
        whole = torch.empty(0, dtype=torch.uint8, device=self.supply.device).set_(self.storage)  # type: ignore[call-overload]
        self.begun, self.is_coming = self.supply.begin(whole, self.kept), True

    def wait(self) -> None:
        """Waits for the bytes, and fetches them first where nobody has."""
        self.fetch()
        if self.is_coming:
            self.supply.end(self.begun)
            self.begun, self.is_coming, self.is_here = None, False, True

    def drop(self) -> None:
        """Lets go of the bytes, and of those that are on their way when they have come."""
        if self.is_coming:
            self.wait()
        if self.is_here:
            self.storage.resize_(0)
            self.supply.live -= self.size
            self.is_here = False


class FrozenBlocks:
    """Fetches and drops the repeated blocks of a frozen network around their forward and backward passes.

    The order of blocks is that of the first forward pass; from the second one on they are fetched ahead.
    """

    def __init__(self, network: nn.Module, supply: Supply) -> None:
        self.supply = supply
        self.blocks: list[Block] = []
        self.order: list[Block] = []
        self.passing_back = False
        for module in repeated_blocks(network):
            block = Block(module, supply)
            self.blocks.append(block)
            module.register_forward_pre_hook(partial(self._enter, block))
            module.register_forward_hook(partial(self._leave, block), with_kwargs=True)

    @property
    def kept_bytes(self) -> int:
        """Returns the bytes of all blocks that this rank keeps."""
        return sum(block.kept.nbytes for block in self.blocks)

    def _neighbour(self, block: Block, distance: int) -> Block | None:
        place = self.order.index(block) + distance
        return self.order[place] if 0 <= place < len(self.order) else None

    def _enter(self, block: Block, module: nn.Module, inputs: Any) -> None:
        """Has the block's bytes here before its forward pass, and the next one's on their way."""
        if block.in_backward:  # gradient checkpointing computes it again: its bytes are here
            return
        if block not in self.order:
            self.order.append(block)
        block.fetch()
        if (following := self._neighbour(block, 1)) is not None:
            following.fetch()
        block.wait()

    def _leave(self, block: Block, module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        """Drops the block after its forward pass, and sees to it that it comes back before its backward pass."""
        if block.in_backward:
            return
        outputs = [one for one in tree_iter(output) if isinstance(one, Tensor) and one.requires_grad]
        if outputs:
            sources = [one for one in tree_iter((inputs, named)) if isinstance(one, Tensor) and one.requires_grad]
            block.awaited += 1
            register_multi_grad_hook(outputs, partial(self._before_backward, block), mode="any")
            register_multi_grad_hook(sources, partial(self._after_backward, block), mode="all")
        block.drop()

    def _before_backward(self, block: Block, gradient: Tensor) -> None:
        """Has the block's bytes here once the first gradient of an output is known."""
        if not self.passing_back:
            self.passing_back = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)  # type: ignore[attr-defined]
        block.in_backward = True
        block.fetch()
        if not any(one.is_here for one in self.order):  # the first one; after it _after_backward looks ahead
            self._fetch_before(block, 1)
        block.wait()

    def _after_backward(self, block: Block, gradients: Sequence[Tensor | None]) -> None:
        """Drops the block once the gradients of all its inputs are known, and fetches those that come next."""
        block.in_backward = False
        block.awaited -= 1
        block.drop()
        for distance in (1, 2):
            self._fetch_before(block, distance)

    def _fetch_before(self, block: Block, distance: int) -> None:
        previous = self._neighbour(block, -distance)
        if previous is not None and previous.awaited:
            previous.fetch()

    def _end_backward(self) -> None:
        """Drops what a backward pass has left."""
        self.passing_back = False
        for block in self.blocks:
            block.awaited -= block.in_backward
            block.in_backward = False
            block.drop()
