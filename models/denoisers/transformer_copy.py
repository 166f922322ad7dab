"""What the ControlNets of the transformer families have in common: what the VAE makes of a condition, which numbers of
copied blocks leave nothing unused, and parameters that can never learn."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from controlbooth.data.errors import UserError


def condition_mean(base: Any, conditioning: Tensor) -> Tensor:
    """Encodes conditions (B, 3, H, W) in [0, 1] as the mode of the VAE's posterior, (B, C, h, w) in its dtype.

    It is not scaled, and the same for every ControlNet. This is what a latent cache keeps of a condition.
    """
    return base.posterior(2.0 * conditioning.float() - 1.0).mean


def used_evenly(blocks: int, count: int) -> bool:
    """Tells whether each of `count` residuals is added somewhere, where block i of `blocks` adds number i // interval
    with the interval rounded up, as the networks of FLUX.1 do."""
    interval = math.ceil(blocks / count)
    return {block // interval for block in range(blocks)} == set(range(count))


def used_but_last(blocks: int, count: int) -> bool:
    """Tells whether each of `count` residuals is added somewhere, where block i of `blocks` adds number int(i /
    interval), with a fraction in the interval, and the last block adds none, as the networks of SD3 do."""
    interval = blocks / count
    return count < blocks and {int(block / interval) for block in range(blocks - 1)} == set(range(count))


def check_count(name: str, blocks: int, count: int, is_used: Callable[[int, int], bool]) -> None:
    """Raises ValueError for a number of copied blocks of which a residual would be added nowhere.

    name: what the blocks are called. The message names the nearest numbers that work.
    """
    usable = [one for one in range(1, blocks + 1) if is_used(blocks, one)]
    if count in usable:
        return
    below, above = [one for one in usable if one < count], [one for one in usable if one > count]
    near = " or ".join(map(str, [*below[-1:], *above[:1]]))
    raise UserError(
        f"model.copied_blocks: of {count} copied {name} blocks for a base with {blocks} some would be added nowhere, "
        f"and never learn. Use {near}"
    )


def shared_settings(controlnet: type, config: Any) -> dict[str, Any]:
    """Returns the base's settings that the ControlNet's class knows; the base's configuration itself is not touched."""
    known = set(inspect.signature(controlnet.__init__).parameters) - {"self"}
    return {name: value for name, value in dict(config).items() if name in known}


def copy_parts(controlnet: nn.Module, base: nn.Module, names: Iterable[str]) -> None:
    """Gives modules of a new ControlNet the weights of the base's, lists of blocks from their beginnings.

    SD3's table of positions is copied as the base has it, of a base in bf16 so rounded: a ControlNet's files hold the
    places that it was trained with, whatever precision they are read in.
    """
    for name in names:
        own: Any = getattr(controlnet, name)
        theirs: Any = getattr(base, name)
        pairs = zip(own, theirs, strict=False) if isinstance(own, nn.ModuleList) else [(own, theirs)]
        for mine, its in pairs:
            mine.load_state_dict(its.state_dict())


NEVER_LEARNS = ("attn.to_add_out.", "attn.add_q_proj.", "attn.norm_added_q.", "ff_context.")
"""Parts of a block with two streams that only its text's output depends on: no gradient comes to them in the last
block, of which only the picture's output is used."""


def without_dead_ends(controlnet: Any, last: nn.Module) -> Any:
    """Turns the parameters of the last block that never get a gradient into buffers, and returns the ControlNet.

    They stay in its state, under their names, so that files have what other programs ask for. An optimizer, which is
    given parameters, does not see them. Keeps their values, and those of other buffers, as they are now, in host memory
    for `fixed_tensors`: an engine rounds buffers to its precision.
    """
    for name, _ in list(last.named_parameters()):
        if name.startswith(NEVER_LEARNS):
            path, _, attribute = name.rpartition(".")
            module = last.get_submodule(path)
            value = module._parameters.pop(attribute)
            assert value is not None
            module.register_buffer(attribute, value.detach())
    parameters = dict(controlnet.named_parameters())
    kept = {name: one.detach() for name, one in controlnet.state_dict().items() if name not in parameters}
    kept = {name: one if one.is_meta else one.to("cpu", copy=True) for name, one in kept.items()}
    controlnet.fixed_tensors = kept
    return controlnet


def fixed_tensors(controlnet: Any) -> dict[str, Tensor]:
    """Returns what a ControlNet's files hold besides trained weights, on the CPU; nothing for a U-Net's."""
    return dict(getattr(controlnet, "fixed_tensors", {}))


def on_device(device: str | torch.device | None, base: Any) -> torch.device:
    """Returns the device to build on: the base's unless another is asked for."""
    return torch.device(device or base.device)
