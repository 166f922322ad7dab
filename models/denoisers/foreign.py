"""ControlNets of other makers that are sampled with and measured, and not trained: what sets them apart.

Unions for FLUX.1 have an embedding of the kind of control. XLabs' ControlNets for FLUX.1 read pixels in [-1, 1] by a
hint network, and the base adds their residuals over and over. Stability's for SD3.5-large are blocks without text,
which take the picture's tokens as the base embeds them. A ControlNet's own settings tell which it is.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from controlbooth.data.condition_names import COMPUTED
from controlbooth.data.errors import UserError

UNION_MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "lq": 6}
"""Kind of condition -> its number in the unions of InstantX and Shakker Labs, which every union for FLUX.1 follows."""
SAME_MODE = {"canny_random": "canny", "openpose": "pose"}
"""Names of kinds that are one of UNION_MODES."""


def is_union(config: Mapping[str, Any]) -> bool:
    return config.get("num_mode") is not None


def has_hint_block(config: Mapping[str, Any]) -> bool:
    """Tells whether a ControlNet for FLUX.1 is of XLabs' kind."""
    return config.get("conditioning_embedding_channels") is not None


def is_without_text(config: Mapping[str, Any]) -> bool:
    """Tells whether a ControlNet for SD3 is of Stability's kind for SD3.5-large."""
    return "joint_attention_dim" in config and config["joint_attention_dim"] is None


def check_trainable(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a ControlNet that no training goes on from. where: its folder."""
    what = (
        "a union of several kinds of control"
        if is_union(config)
        else "of XLabs' kind, which reads pixels"
        if has_hint_block(config)
        else "one of Stability's for SD3.5-large, without text"
        if is_without_text(config)
        else None
    )
    if what:
        raise UserError(
            f"{where} is {what}: it can be sampled with and measured, and not trained on. Train from the base "
            "(model.controlnet=base), or from a ControlNet that is a copy of the base's blocks"
        )


def borrow(controlnet: Any, network: Any) -> None:
    """Gives a ControlNet that has no patch embedding of its own a copy of the base's, which its files leave out."""
    if "use_pos_embed" in controlnet.config and not controlnet.config["use_pos_embed"]:
        controlnet.pos_embed = copy.deepcopy(network.pos_embed).to(controlnet.device, controlnet.dtype)


def tell_kind(controlnet: Any, kind: str, where: str) -> None:
    """Tells a ControlNet of which kind its conditions are, such as "depth". where: its folder.

    Raises ValueError for a kind that a union was not trained on.
    """
    kind = kind.removeprefix(COMPUTED)
    controlnet.condition_kind = kind = SAME_MODE.get(kind, kind)
    if is_union(controlnet.config):
        known = [name for name, mode in UNION_MODES.items() if mode < controlnet.config["num_mode"]]
        if kind not in known:
            raise UserError(
                f"{where} is a union, and {kind!r} is none of the kinds of control that it knows: {', '.join(known)}. "
                "Name the condition by one of these if it is one, or take a ControlNet for that kind"
            )


def union_mode(controlnet: nn.Module, rows: int, device: torch.device) -> Tensor:
    """Returns the number of the kind of control, (rows, 1) int64. Raises ValueError where no kind was told."""
    module: Any = getattr(controlnet, "module", controlnet)
    kind = getattr(module, "condition_kind", None)
    if kind is None:
        raise UserError(
            "a union wants to know the kind of its conditions: load it by unlocked_decoder.load_networks(..., kind=...)"
        )
    return torch.full((rows, 1), UNION_MODES[kind], dtype=torch.int64, device=device)


def in_levels_of_stability(controlnet: nn.Module, conditioning: Tensor) -> Tensor | None:
    """Returns conditions in the range that Stability's Canny ControlNet for SD3.5-large was trained with, or None for
    others.

    conditioning: (B, 3, H, W) in [0, 1]. Its authors' code multiplies lines by 127.5 and adds 0.5, where depth and blur
    go to [-1, 1]; nothing in the files tells, but the kind of condition does.
    """
    module: Any = getattr(controlnet, "module", controlnet)
    if is_without_text(module.config) and getattr(module, "condition_kind", None) == "canny":
        return 127.5 * conditioning.float() + 0.5
    return None
