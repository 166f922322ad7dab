"""Which blocks of a network compute their activations again in the backward pass, and so keep none until then.

A block is what diffusers recomputes by itself: a residual block or a transformer block.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

LISTS = ("resnets", "transformer_blocks", "single_transformer_blocks")
"""What diffusers calls the blocks in a module that has the attribute `gradient_checkpointing`."""
MARK = "computes_again"
"""The attribute of a chosen block. Copies of a network have it too."""


def recompute(network: Any, which: bool | float) -> None:
    """Has blocks of a network of diffusers recomputed: all of them, none, or a share from 0 to 1, rounded up.

    A share takes the blocks on the largest grids first, whose activations are the largest beside their work; those of a
    transformer are alike, and the first are taken. Gradients are the same bit for bit.
    """
    if which is False:
        return
    if which is True:
        network.enable_gradient_checkpointing()
        return
    blocks = blocks_by_grid(network)
    for block in blocks[: math.ceil(which * len(blocks))]:
        setattr(block, MARK, True)
    network.enable_gradient_checkpointing(_again_where_marked)


def blocks_by_grid(network: nn.Module) -> list[nn.Module]:
    """Lists the blocks that can be recomputed, those on larger grids first, and else in their order."""
    blocks: dict[nn.Module, int] = {}
    for name, module in network.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            found: list[nn.Module] = [block for one in LISTS for block in getattr(module, one, ())]
            blocks |= dict.fromkeys(found, _halvings(name, network))
    return sorted(blocks, key=lambda block: blocks[block])


def _halvings(name: str, network: Any) -> int:
    """Returns how often the grid of a U-Net's part has been halved; 0 in a transformer."""
    if match := re.match(r"(down|up)_blocks\.(\d+)", name):
        number = int(match[2])
        return number if match[1] == "down" else len(network.up_blocks) - 1 - number
    return len(network.down_blocks) if name.startswith("mid_block") else 0


def _again_where_marked(block: Callable[..., Any], *inputs: Any) -> Any:
    if getattr(block, MARK, False):
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
