"""The unlocked mode of a ControlNet (`sd_locked=False` of the released code): the U-Net's decoder learns too.

The encoder and the middle block of the base stay locked. A `Base` is never changed: the decoder that learns is a copy,
in a U-Net of its own that shares the locked modules with the base's.
"""

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.base import Base
from controlbooth.models.denoisers.foreign import tell_kind
from controlbooth.models.denoisers.registry import predict
from controlbooth.models.files.loading import fill, load_module, read_tensors
from controlbooth.models.files.weights import save_weights
from controlbooth.models.pretrained import DECODER_FILE, UNET_FOLDER, WEIGHTS_STEM, read_controlnet
from controlbooth.models.text import TextEncoding

DECODER = ("up_blocks", "conv_norm_out", "conv_out")
"""Modules of a U-Net that learn when it is unlocked."""


class UnlockedNetwork(nn.Module):
    """What learns: a ControlNet, and a copy of the base's decoder, in float32 as it is made."""

    def __init__(self, controlnet: nn.Module, base: Base):
        super().__init__()
        self.controlnet = controlnet
        self.base = replace(base, denoiser=with_own_decoder(base.denoiser, torch.float32))
        """The base with the decoder that learns. It is no module, so what is locked is not among the parameters."""
        self.decoder = nn.ModuleDict(decoder_modules(self.base.denoiser))
        self.decoder.requires_grad_(True)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEncoding, conditioning: Tensor) -> Tensor:
        """Predicts as `registry.predict` does, in one call, as an engine around the network expects."""
        return predict(self.base.denoiser, self.controlnet, noisy_latents, timesteps, text, conditioning)


def with_own_decoder(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """Makes a U-Net that shares the locked modules of `unet` and has a copy of its decoder, in `dtype`."""
    own: Any = copy.copy(unet)
    own._modules = dict(unet._modules)
    for name, module in decoder_modules(unet).items():
        setattr(own, name, copy.deepcopy(module).to(dtype))
    return own


def decoder_modules(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    return {name: getattr(unet, name) for name in DECODER if getattr(unet, name, None) is not None}


def decoder_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Returns the decoder's weights under their names in the U-Net."""
    return {name: tensor for name, tensor in unet.state_dict().items() if name.split(".")[0] in DECODER}


def networks_of(base: Base, network: nn.Module) -> tuple[Base, nn.Module]:
    """Returns the base and the ControlNet that pictures under control are drawn with."""
    return (network.base, network.controlnet) if isinstance(network, UnlockedNetwork) else (base, network)


def controlled_prediction(
    base: Base,
    network: nn.Module,
    noisy_latents: Tensor,
    timesteps: Tensor,
    text: TextEncoding,
    conditioning: Tensor,
) -> Tensor:
    """Predicts (B, C, h, w) as `registry.predict` does.

    network: a ControlNet, an UnlockedNetwork, or an engine around one.
    """
    if isinstance(getattr(network, "module", network), UnlockedNetwork):
        return network(noisy_latents, timesteps, text, conditioning)
    return predict(base.denoiser, network, noisy_latents, timesteps, text, conditioning)


def save_decoder(weights: dict[str, Tensor], folder: Path) -> None:
    """Writes a decoder into a ControlNet's folder. weights: under their names in the U-Net."""
    save_weights(weights, folder / DECODER_FILE)


def load_networks(
    path: str | os.PathLike[str], base: Base, dtype: torch.dtype = torch.float32, *, kind: str | None = None
) -> tuple[Base, Any]:
    """Reads a ControlNet, and returns the base as it was trained with, and the ControlNet.

    That base has the decoder that learned with the ControlNet, where the folder holds one; else it is `base`.

    path: as for `load_controlnet`; a checkpoint's controlnet/ or an export. The ControlNet is on the CPU, in dtype and
    trainable; the base is on its device, in its dtype and frozen, and `base` itself is left as it is. Raises ValueError
    for a decoder or ControlNet of another base.

    kind: of the conditions, such as "depth", which a ControlNet for several kinds is told; ValueError for one that it
    does not know.
    """
    path = Path(path)
    controlnet, empty = read_controlnet(path, base.denoiser, dtype), base.device.type == "meta"
    if kind is not None:
        tell_kind(controlnet, kind, str(path))
    if (path / DECODER_FILE).is_file():
        weights = read_tensors([path / DECODER_FILE], empty)
    elif (path / UNET_FOLDER).is_dir():
        unet = load_module(UNet2DConditionModel, path / UNET_FOLDER, torch.float32, WEIGHTS_STEM, empty=empty)
        weights = decoder_state(unet)
    else:
        return base, controlnet
    wanted = {name: tensor.shape for name, tensor in decoder_state(base.denoiser).items()}
    if {name: tensor.shape for name, tensor in weights.items()} != wanted:
        raise UserError(f"the decoder in {path} was made for another base than {base.path}")
    unet = with_own_decoder(base.denoiser, base.dtype)
    for name, module in decoder_modules(unet).items():
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        fill(module, own, base.dtype, f"{name} of the decoder in {path}")
        module.to(base.device)
    for module in decoder_modules(unet).values():
        module.requires_grad_(False).eval()
    return replace(base, denoiser=unet), controlnet
