"""Memory of a frozen base that is held in fewer bits, split over ranks or streamed: arithmetic on its shapes.

Neither torchao nor bitsandbytes is needed for it, nor a weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from controlbooth.models.base import Base
from controlbooth.models.quantized import linear_layers, packed_parts, restoring_bytes
from controlbooth.trainer.config.run import FrozenConfig, RunConfig
from controlbooth.trainer.engine.frozen import own_tensors, places_of

if TYPE_CHECKING:
    from controlbooth.trainer.planning.footprint import Footprint


@dataclass(frozen=True)
class FrozenMemory:
    """Bytes of the base on one rank."""

    device: int
    """All the time."""
    passing: int
    """Besides, in a forward or backward pass: blocks that are here for it, and a weight that is brought back."""
    host: int


def changes_weight(weight: Tensor, precision: str) -> bool:
    """Tells whether a linear layer's weight is held in another precision than the engine's."""
    return precision != "engine" and not (precision == "bf16" and weight.dtype == torch.bfloat16)


def block_bytes(block: nn.Module, precision: str) -> tuple[int, int]:
    """Computes the bytes of a block's tensors, and those that it takes where it is fetched, with aligned places."""
    weights = {id(layer.weight): layer for layer in block.modules() if type(layer) is nn.Linear}
    sizes: list[int] = []
    for tensor in own_tensors(block):
        layer = weights.get(id(tensor))
        if layer is None or not changes_weight(layer.weight, precision):
            sizes.append(tensor.nbytes)
        else:
            sizes += packed_parts(layer.out_features, layer.in_features, precision)
    return sum(sizes), places_of(sizes)[1]


def quantized_bytes(config: RunConfig, base: Base) -> tuple[int, int]:
    """Computes how many bytes fewer the base's quantized layers take, and what bringing back the largest one does."""
    precision, saved, largest = config.model.frozen.precision, 0, 0
    for network in (base.denoiser, *base.text_encoders):
        for _, _, layer in linear_layers(network):
            weight = layer.weight
            if changes_weight(weight, precision):
                saved += weight.nbytes - sum(packed_parts(layer.out_features, layer.in_features, precision))
                largest = max(largest, restoring_bytes(weight.numel(), precision, weight.element_size()))
    return saved, largest


def frozen_memory(one: "Footprint", frozen: FrozenConfig, sharers: int) -> FrozenMemory:
    """Computes what the base takes on a rank. sharers: ranks that a block is split over.

    Of split or streamed blocks two are on the device at once, the one that works and the next one.
    """
    streams, splits = frozen.stream == "cpu", frozen.shards != "none" and sharers > 1
    device, host, passing = one.frozen_bytes, 0, 0
    if streams or splits:
        here, kept = both_sums(one.denoiser_blocks)
        kept = -(-kept // (sharers if splits else 1))
        passing = largest_pair(one.denoiser_blocks)
        if splits and streams:
            passing += -(-passing // sharers)  # the shares on their way to the others
        device += (0 if streams else kept) - here
        host += kept if streams else 0
    if streams:
        here, kept = both_sums(one.encoder_blocks)
        device, host = device - here, host + kept
        passing = max(passing, largest_pair(one.encoder_blocks))
    return FrozenMemory(device, passing + one.restoring_bytes, host)


def both_sums(blocks: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(plain for plain, _ in blocks), sum(aligned for _, aligned in blocks)


def largest_pair(blocks: Sequence[tuple[int, int]]) -> int:
    """Computes the most bytes of two neighbours, in aligned places."""
    sizes = [aligned for _, aligned in blocks]
    return max((first + second for first, second in zip(sizes, sizes[1:], strict=False)), default=sum(sizes))
