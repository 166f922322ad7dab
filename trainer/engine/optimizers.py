"""The optimizers besides AdamW, each from the library that its authors or PyTorch keep, and what they keep of a tensor.

They are handed whole weights as matrices: the rows are outputs, and all else of a convolution's kernel is a row's
length. Adafactor's rows and columns and Muon's orthogonal updates have a meaning of those alone; and blocks of 8 bits
begin where a tensor does, whichever rank holds it.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from controlbooth.data.errors import UserError
from controlbooth.trainer.config.run import OptimizerConfig

EIGHT_BIT_FROM, BLOCK = 4096, 256
"""Of bitsandbytes: elements from which a tensor's moments have 8 bits, and elements that share a scale."""
OUTER = frozenset(
    {"conv_in", "conv_out", "x_embedder", "context_embedder", "pos_embed", "pos_embed_input"}
    | {"token_embedding", "position_embedding"}
)
"""Modules at a network's ends, and embeddings. Muon is for what lies between: its authors leave these to AdamW."""
OUTER_BEGIN = "controlnet_"
"""How the names of a ControlNet's zero layers and hint network begin: its ends towards the base and the condition."""
ESTIMATE = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
"""What Prodigy knows of the distance to the solution, in its group of parameters."""


def matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape in which an optimizer sees a tensor: of a kernel (outputs, inputs, h, w) it is a matrix."""
    return tuple(shape) if len(shape) <= 2 else (shape[0], int(torch.Size(shape).numel()) // shape[0])


def moved_by_muon(name: str, shape: Sequence[int]) -> bool:
    """Tells whether a parameter is a matrix between a network's ends; AdamW moves the others. name: with dots."""
    parts = name.split(".")
    return len(shape) >= 2 and not any(part in OUTER or part.startswith(OUTER_BEGIN) for part in parts)


def state_bytes(optimizer: str, name: str, shape: Sequence[int]) -> int:
    """Computes the bytes of tensors that an optimizer keeps of a parameter from the first step on."""
    count, matrix = int(torch.Size(shape).numel()), matrix_shape(shape)
    if optimizer == "adamw8bit" and count >= EIGHT_BIT_FROM:
        return 2 * (count + 4 * -(-count // BLOCK))
    if optimizer == "adafactor":
        return 4 * (sum(matrix) if len(matrix) == 2 else count) + 4  # and the number of its steps
    if optimizer == "prodigy":
        return 16 * count  # two moments, their sum and the weights of the start
    if optimizer == "muon":
        return 4 * count if moved_by_muon(name, shape) else 8 * count + 4
    return 8 * count


def make_optimizers(config: OptimizerConfig, weights: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Makes what moves these weights: one optimizer, Muon with an AdamW beside it, or none where there are no weights.

    weights: by name, float32, in `matrix_shape`. Raises UserError where the package is not installed.
    """
    every = list(weights.values())
    if config.name == "muon":
        inner = [weight for name, weight in weights.items() if moved_by_muon(name, weight.shape)]
        rest = [weight for name, weight in weights.items() if not moved_by_muon(name, weight.shape)]
        return [*map(_muon(config), filter(None, [inner])), *map(_adamw(config), filter(None, [rest]))]
    make = _LIBRARIES[config.name](config)
    with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints how it decays weights
        return [make(every)] if every else []


def _muon(config: OptimizerConfig) -> Any:
    # The update's size is brought to AdamW's (arXiv 2502.16982), so that one learning rate is right for both.
    return lambda weights: torch.optim.Muon(weights, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")


def _adamw(config: OptimizerConfig) -> Any:
    settings = _adam_settings(config)
    return lambda weights: torch.optim.AdamW(weights, fused=True, **settings)


def _adam_settings(config: OptimizerConfig) -> dict[str, Any]:
    return dict(betas=config.betas, eps=config.epsilon, weight_decay=config.weight_decay)


def _adamw8bit(config: OptimizerConfig) -> Any:
    bitsandbytes = _imported("bitsandbytes", config.name)
    settings = _adam_settings(config)
    return lambda weights: bitsandbytes.optim.AdamW8bit(weights, min_8bit_size=EIGHT_BIT_FROM, **settings)


def _adafactor(config: OptimizerConfig) -> Any:
    return lambda weights: torch.optim.Adafactor(weights, weight_decay=config.weight_decay, foreach=False)


def _prodigy(config: OptimizerConfig) -> Any:
    prodigyopt = _imported("prodigyopt", config.name)
    settings = _adam_settings(config)
    return lambda weights: prodigyopt.Prodigy(weights, **settings)


_LIBRARIES = {"adamw8bit": _adamw8bit, "adafactor": _adafactor, "prodigy": _prodigy}


def _imported(package: str, name: str) -> Any:
    """Imports a package of the `optimizers` extra. Raises UserError, with the line that installs it, without it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(
            f"optimizer.name={name} needs the package {package}: pip install 'controlbooth[optimizers]', or take "
            "optimizer.name=adamw"
        ) from error
