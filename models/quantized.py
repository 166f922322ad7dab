"""Linear layers of a frozen network in fewer bits: quantized by torchao (int8, fp8) or bitsandbytes (nf4), or in bf16.

Only layers inside the blocks that a network repeats are taken: they hold nearly all of a transformer's weights.
Convolutions, norms, embeddings and what leads into and out of the blocks stay in the engine's precision. A weight is
brought back to that precision, whatever it is, for each product and let go afterwards; autograd keeps none of it for
the backward pass, which brings it back again. Weights take no gradient, inputs do.

Both packages are imported only where they are asked for: the extra `quantized`.
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.blocks import repeated_blocks

NF4_BLOCK = 64
"""Weights that share a scale in nf4."""
PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}

Restore = Callable[[Mapping[str, Tensor], torch.dtype], Tensor]


@dataclass(frozen=True)
class Packed:
    """A weight in fewer bits."""

    parts: dict[str, Tensor]
    """Its bytes and scales, by name, on the CPU."""
    restore: Restore
    """Makes the weight (out, in) in a dtype of such parts, on their device."""


def check_installed(precision: str) -> None:
    """Raises UserError, with the line that installs it, where the package for a precision is missing."""
    package = PACKAGES.get(precision)
    if package is not None and find_spec(package) is None:
        raise UserError(
            f"model.frozen.precision={precision} needs {package}, which is not installed: pip install "
            '"controlbooth[quantized]", or set model.frozen.precision=bf16'
        )


def _imported(name: str) -> Any:
    """Imports a module of a package for quantizing without its warnings, of kernels that this machine cannot load."""
    if name in sys.modules:
        return sys.modules[name]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(name)
    finally:
        logging.disable(before)


def _bf16(weight: Tensor) -> Packed:
    return Packed({"data": weight.to(torch.bfloat16)}, lambda parts, dtype: parts["data"].to(dtype))


def _torchao(precision: str, weight: Tensor) -> Packed:
    """Quantizes by torchao's weight-only kind, with a scale for each row."""
    torchao = _imported("torchao.quantization")
    if precision == "int8":
        config = torchao.Int8WeightOnlyConfig()
    else:
        config = torchao.Float8WeightOnlyConfig(granularity=torchao.PerRow())
    rows, columns = weight.shape
    layer: Any = nn.Sequential(nn.Linear(columns, rows, bias=False, device="meta"))
    layer[0].weight = nn.Parameter(weight, requires_grad=False)
    torchao.quantize_(layer, config)
    tensor: Any = layer[0].weight.detach()
    names, attributes = tensor.__tensor_flatten__()
    kind: Any = type(tensor)
    size, stride = tensor.shape, tensor.stride()

    def restore(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return kind.__tensor_unflatten__(dict(parts), attributes, size, stride).dequantize(dtype)

    return Packed({name: getattr(tensor, name) for name in names}, restore)


def _nf4(weight: Tensor) -> Packed:
    """Quantizes by bitsandbytes to NormalFloat4 (arXiv 2305.14314), with a scale in fp32 for each NF4_BLOCK weights."""
    functional = _imported("bitsandbytes.functional")
    data, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)
    size = weight.shape

    def restore(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        scales = functional.QuantState(parts["absmax"], size, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
        return functional.dequantize_4bit(parts["data"], scales)

    return Packed({"data": data, "absmax": state.absmax}, restore)


def pack(weight: Tensor, precision: str) -> Packed:
    """Quantizes a weight (out, in) of any floating dtype, on the CPU, from float32: the same bits on every machine."""
    whole = weight.detach().to("cpu", torch.float32)
    if precision == "bf16":
        return _bf16(whole)
    return _nf4(whole) if precision == "nf4" else _torchao(precision, whole)


def packed_parts(rows: int, columns: int, precision: str) -> tuple[int, ...]:
    """Computes the bytes of each part of a packed weight: the numbers, and what scales them."""
    count = rows * columns
    return {
        "bf16": (2 * count,),
        "int8": (count, 4 * rows, rows),  # a scale in fp32 and a zero point for each row
        "fp8": (count, 4 * rows),
        "nf4": (-(-count // 2), 4 * -(-count // NF4_BLOCK)),
    }[precision]


def restoring_bytes(count: int, precision: str, width: int) -> int:
    """Computes the most bytes that are held while `count` packed weights are brought back to numbers of `width` bytes,
    the result included: torchao multiplies in fp32."""
    each = {"bf16": width, "nf4": width, "int8": 8 if width == 4 else 6, "fp8": 8 if width == 4 else 10}
    return count * each[precision]


class QuantizedLinear(nn.Module):
    """A frozen linear layer, (..., in) -> (..., out), whose weight is packed. The bias is as it was."""

    def __init__(self, linear: nn.Linear, precision: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.precision, self.dtype = precision, linear.weight.dtype
        self.bias = linear.bias
        packed = pack(linear.weight, precision)
        self.restore, self.names = packed.restore, tuple(packed.parts)
        for name, part in packed.parts.items():
            self.register_buffer(name, part.to(linear.weight.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Moves the packed parts as they are, as an engine that casts a whole network does: numbers in fewer bits mean
        nothing in another dtype."""
        parts = {id(self._buffers[name]) for name in self.names}

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return tensor.to(made.device) if id(tensor) in parts and made.dtype != tensor.dtype else made

        return super()._apply(moved, recurse)  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """Makes the weight (out, in) in the dtype that the layer had."""
        with torch.no_grad():
            return self.restore({name: self._buffers[name] for name in self.names}, self.dtype)  # type: ignore[misc]

    def forward(self, inputs: Tensor) -> Tensor:
        return _Product.apply(inputs, self)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, precision={self.precision}"


class _Product(torch.autograd.Function):
    """A linear layer that keeps nothing for its backward pass but itself."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: QuantizedLinear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        return F.linear(inputs, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.weight, None


def linear_layers(network: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Lists the linear layers inside the repeated blocks, each with the module that holds it and its name there."""
    return [
        (parent, name, layer)
        for block in repeated_blocks(network)
        for parent in block.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
    ]


def quantize(network: nn.Module, precision: str) -> None:
    """Puts a QuantizedLinear in place of each of `linear_layers`, one at a time.

    precision: of PACKAGES, bf16, or engine, which changes nothing, as bf16 does to weights that are in it.
    """
    if precision == "engine":
        return
    for parent, name, layer in linear_layers(network):
        if precision != "bf16" or layer.weight.dtype != torch.bfloat16:
            setattr(parent, name, QuantizedLinear(layer, precision))
