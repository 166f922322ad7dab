"""A LoRA as this package passes it around: its layers by their full names in a base, whatever file they came from.

A full name begins with the folder of the network, as diffusers and peft name it: `unet.`, `transformer.`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. CLIP's names have `text_model.` everywhere, also where the
installed transformers has dropped it: files have kept it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.base import Base

Shapes = Mapping[str, tuple[int, ...]]
"""Full name -> shape of the weight, (out, in) or (out, in, kh, kw), of every layer of a base that can be adapted."""


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """What a LoRA adds to one layer's weight: B A alpha / r."""

    down: Tensor
    """A, (r, in); of convolutions (r, in, kh, kw)."""
    up: Tensor
    """B, (out, r); of convolutions (out, r, 1, 1)."""
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> Tensor:
        """Computes what is added to the weight, in the weight's shape and in float64."""
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return (self.alpha / self.rank * product).view(len(self.up), *self.down.shape[1:])


Lora = dict[str, LoraLayer]
"""Full name -> layer."""


def layer_shapes(base: Base) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all linear layers and convolutions of a base's denoiser and text encoders.

    The base may be on the meta device.
    """
    networks = {base.family.denoiser.folder: base.denoiser}
    networks |= {part.folder: one for part, one in zip(base.family.text_encoders, base.text_encoders, strict=True)}
    return {
        _full_name(folder, name, network): tuple(module.weight.shape)
        for folder, network in networks.items()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _full_name(folder: str, name: str, network: nn.Module) -> str:
    flattened = type(network).__name__ == "CLIPTextModel" and not name.startswith("text_model.")
    return f"{folder}.text_model.{name}" if flattened else f"{folder}.{name}"


def checked_layer(name: str, down: Tensor, up: Tensor, alpha: float) -> LoraLayer:
    """Makes a layer of tensors from a file. Raises ValueError, with its name, where they do not fit together."""
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != len(down) or not len(down):
        raise UserError(f"{name}: a LoRA of shapes {tuple(down.shape)} and {tuple(up.shape)} is none")
    if up.shape[2:].numel() != 1:
        raise UserError(f"{name}: its up has a kernel of {tuple(up.shape[2:])}, and only 1x1 belongs there")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise UserError(f"{name}: the LoRA holds no numbers with a fraction ({down.dtype}, {up.dtype})")
    if not (math.isfinite(alpha) and alpha > 0):  # 0 adds nothing in some programs, and is the rank in others
        raise UserError(f"{name}: its alpha is {alpha:g}, which programs read in different ways. Give a positive one")
    return LoraLayer(down, up, alpha)


def check_fits(lora: Lora, shapes: Shapes) -> None:
    """Raises ValueError for a layer that the base does not have, or has in another shape."""
    for name, layer in lora.items():
        if name not in shapes:
            raise UserError(f"the LoRA adapts {name}, which the base does not have: it is of another base")
        shape = (len(layer.up), *layer.down.shape[1:])
        if shape != tuple(shapes[name]):
            raise UserError(f"the LoRA adapts {name} as one of shape {shape}, and the base has {tuple(shapes[name])}")


def with_one_alpha(lora: Lora) -> Lora:
    """Returns the same LoRA with the first layer's alpha everywhere; B of the others is scaled to it."""
    alpha = next(iter(lora.values())).alpha if lora else 0.0
    return {
        name: one if one.alpha == alpha else replace(one, up=one.up * (one.alpha / alpha), alpha=alpha)
        for name, one in lora.items()
    }
