"""Bytes of a base's networks in the precision in which a run holds them: arithmetic on their shapes.

Neither torchao nor bitsandbytes is needed for it, nor a weight.
"""

import torch
from torch import Tensor, nn

from controlbooth.models.base import Base
from controlbooth.models.quantized import linear_layers, packed_parts, restoring_bytes
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.engine.frozen import own_tensors, places_of


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
