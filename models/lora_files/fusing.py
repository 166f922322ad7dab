"""Several layers that are one in the authors' code, such as q, k and v: their LoRAs as one, and apart again.

Three LoRAs of rank r side by side are one of rank 3r whose B has blocks and zeros beside them:

    [q]   [Bq  0  0 ] [Aq]
    [k] = [ 0 Bk  0 ] [Ak] x,   times alpha / r of each = alpha' / 3r of the whole
    [v]   [ 0  0 Bv ] [Av]

All blocks get the rank of the largest, filled up with zeros, and so does a part that is not adapted: programs that take
such a layer apart again cut it into equal pieces.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from controlbooth.models.lora_files.layers import LoraLayer


def fused(parts: Sequence[LoraLayer | None], rows: Sequence[int]) -> LoraLayer:
    """Returns the LoRA of layers whose outputs, rows[i] each, lie one below the other. At least one is adapted.

    The parts share an input. Where they differ in alpha / rank, B of the others is scaled to that of the first.
    """
    present = [part for part in parts if part is not None]
    first, rank = present[0], max(part.rank for part in present)
    down = first.down.new_zeros(len(parts) * rank, first.down.shape[1])
    up = first.up.new_zeros(sum(rows), len(parts) * rank)
    top = 0
    for place, (part, height) in enumerate(zip(parts, rows, strict=True)):
        if part is not None:
            left, ratio = place * rank, (part.alpha * first.rank) / (first.alpha * part.rank)
            down[left : left + part.rank] = part.down
            up[top : top + height, left : left + part.rank] = part.up if ratio == 1.0 else part.up * ratio
        top += height
    return LoraLayer(down, up, first.alpha * len(parts) * rank / first.rank)


def parted(layer: LoraLayer, rows: Sequence[int]) -> list[LoraLayer | None]:
    """Takes a LoRA of several layers apart, and returns None for those to which it adds nothing.

    One without the blocks of `fused`, as other trainers make them, gives all of its A to each part.
    """
    ups = torch.split(layer.up, list(rows))
    rank, left_over = divmod(layer.rank, len(rows))
    if left_over or not _is_sparse(ups, rank):
        return [LoraLayer(layer.down, up, layer.alpha) if up.any() else None for up in ups]
    result: list[LoraLayer | None] = []
    for place, up in enumerate(ups):
        block = slice(place * rank, (place + 1) * rank)
        down, up = layer.down[block], up[:, block]
        used = (down.any(1) | up.any(0)).nonzero()
        own = int(used.max()) + 1 if len(used) else 0
        alpha = layer.alpha * own / layer.rank
        result.append(LoraLayer(down[:own].clone(), up[:, :own].clone(), alpha) if own else None)
    return result


def _is_sparse(ups: Sequence[Tensor], rank: int) -> bool:
    """Tells whether part i of B is zero outside of its own columns [i * rank, (i + 1) * rank)."""
    return not any(up[:, : place * rank].any() or up[:, (place + 1) * rank :].any() for place, up in enumerate(ups))


def swapped_halves(layer: LoraLayer) -> LoraLayer:
    """Returns the LoRA of a layer whose outputs are shift and scale, where one program has the other's order."""
    first, second = layer.up.chunk(2)
    return LoraLayer(layer.down, torch.cat([second, first]), layer.alpha)
