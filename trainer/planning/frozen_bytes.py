"""Bytes of a base's networks in the precision in which a run holds them: arithmetic on their shapes.

Neither torchao nor bitsandbytes is needed for it, nor a weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from controlbooth.models.base import Base
from controlbooth.models.quantized import linear_layers, packed_parts, restoring_bytes
from controlbooth.trainer.engine.frozen import own_tensors, places_of


@dataclass(frozen=True)
class HeldBytes:
    """Bytes of a base that is held in one precision; of what each means see `footprint.Footprint`."""

    frozen_bytes: int
    denoiser_blocks: tuple[tuple[int, int], ...]
    encoder_blocks: tuple[tuple[int, int], ...]
    restoring_bytes: int


def held_bytes(
    base: Base, whole: int, denoiser: Iterable[nn.Module], encoders: Iterable[nn.Module], precision: str
) -> HeldBytes:
    """Computes the bytes of a base whose linear layers are held in `precision`.

    whole: bytes of all that is frozen in the engine's precision. denoiser, encoders: the blocks that networks repeat,
    in the order in which they work.
    """
    saved, restoring = quantized_bytes(base, precision)
    return HeldBytes(
        frozen_bytes=whole - saved,
        denoiser_blocks=tuple(block_bytes(block, precision) for block in denoiser),
        encoder_blocks=tuple(block_bytes(block, precision) for block in encoders),
        restoring_bytes=restoring,
    )


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


def quantized_bytes(base: Base, precision: str) -> tuple[int, int]:
    """Computes how many bytes fewer the base's quantized layers take, and what bringing back the largest one does."""
    saved, largest = 0, 0
    for network in (base.denoiser, *base.text_encoders):
        for _, _, layer in linear_layers(network):
            weight = layer.weight
            if changes_weight(weight, precision):
                saved += weight.nbytes - sum(packed_parts(layer.out_features, layer.in_features, precision))
                largest = max(largest, restoring_bytes(weight.numel(), precision, weight.element_size()))
    return saved, largest
