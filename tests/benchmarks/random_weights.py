"""Random weights for networks of which speed or memory is measured. They never exist in float32, nor in a file."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Draws weights as small as training leaves them, so that activations stay of the order of 1."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.5 * parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1])[None])
        else:  # a table of places
            buffer.uniform_(-1.0, 1.0)


def materialise(module: Any, device: str | torch.device) -> Any:
    """Gives a module of the meta device memory and random weights on another one, in eval mode and without gradients.

    Weights with two names, as T5's embedding has them, become one tensor again.
    """
    module = module.to_empty(device=device).eval().requires_grad_(False)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    fill(module)
    return module


def random_module(build: Callable[[], Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
    """Builds a module in `dtype`: 860M parameters would take 3.4 GiB twice in float32."""
    with torch.device("meta"):
        module = build()
    return materialise(nn.Module.to(module, dtype), device)
