"""How a family's network and its ControlNet are called. Each family's own file says it; here are the entries.

A denoiser is what learned to denoise: a U-Net, or a transformer. Everything else (training, sampling, measuring) calls
the functions of this file, which look the family up by the network's class.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.base import Base
from controlbooth.models.denoisers import flux, flux_control_lora, sd3
from controlbooth.models.denoisers import unet as unets
from controlbooth.models.denoisers.residuals import Residuals
from controlbooth.models.text import TextEncoding


@dataclass(frozen=True)
class Denoiser:
    """A family's file: with `denoise`, `control_residuals`, `encode_condition`, `reads_latents`, `build_controlnet`,
    `finish_reading`, `check_usable`, `must_fit`, and the names ZERO and ENTRY; where `reads_latents` may be true, also
    with `condition_latents`."""

    file: ModuleType | Any
    base: str
    """The class of the base's network."""
    is_transformer: bool
    predicts: bool = False
    """Whether what is trained predicts by itself, with the base's weights, and adds nothing to the base's own
    prediction: then its file has `predict` in place of `denoise` and `control_residuals`."""


UNET = Denoiser(unets, "UNet2DConditionModel", is_transformer=False)
SD3 = Denoiser(sd3, "SD3Transformer2DModel", is_transformer=True)
FLUX = Denoiser(flux, "FluxTransformer2DModel", is_transformer=True)
FLUX_LORA = Denoiser(flux_control_lora, "FluxTransformer2DModel", is_transformer=True, predicts=True)
DENOISERS = {
    "UNet2DConditionModel": UNET,
    "ControlNetModel": UNET,
    "VariantControlNet": UNET,
    "ControlLora": UNET,
    "UnlockedNetwork": UNET,
    "SD3Transformer2DModel": SD3,
    "SD3ControlNetModel": SD3,
    "PixelSD3ControlNet": SD3,
    "FluxTransformer2DModel": FLUX,
    "FluxControlNetModel": FLUX,
    "FluxControlLora": FLUX_LORA,
}
"""Class of a base's network or of its ControlNet -> its family's file."""


def denoiser_of(network: Any) -> Denoiser:
    """Returns the entry of DENOISERS for a network, a ControlNet, or an engine around one.

    Raises ValueError for another class.
    """
    module = getattr(network, "module", network)
    for one in type(module).__mro__:
        if one.__name__ in DENOISERS:
            return DENOISERS[one.__name__]
    raise UserError(f"{type(module).__name__} is no network that is known: {', '.join(DENOISERS)}")


def denoise(
    network: Any, noisy_latents: Tensor, times: Tensor, text: TextEncoding, residuals: Residuals | None = None
) -> Tensor:
    """Asks the locked base for its prediction (B, C, h, w) in its dtype: noise, v or velocity, as its process says.

    times: as the process gives them, (B,) or (). Its weights take no gradient; residuals do. What comes before the
    first residual needs none, so autograd keeps none of its activations.
    """
    return denoiser_of(network).file.denoise(network, noisy_latents, times, text, residuals)


def control_residuals(
    controlnet: nn.Module,
    noisy_latents: Tensor,
    times: Tensor,
    text: TextEncoding,
    condition: Tensor,
    conditioning_scale: float = 1.0,
) -> Residuals:
    """Runs a ControlNet, or an engine around one.

    noisy_latents (B, C, h, w); times (B,) or (); condition: of `encode_condition`. Inputs of any floating dtype are
    brought to the ControlNet's. conditioning_scale multiplies every residual.
    """
    file = denoiser_of(controlnet).file
    return file.control_residuals(controlnet, noisy_latents, times, text, condition, conditioning_scale)


@torch.no_grad()
def encode_condition(base: Base, controlnet: nn.Module, conditioning: Tensor) -> Tensor:
    """Turns condition pictures (B, 3, H, W), RGB in [0, 1], into a ControlNet's input: those themselves, or latents."""
    return denoiser_of(controlnet).file.encode_condition(base, controlnet, conditioning)


def reads_latents(controlnet: nn.Module) -> bool:
    """Tells whether a ControlNet, or an engine around one, reads the latents of its condition, and no pixels."""
    return denoiser_of(controlnet).file.reads_latents(controlnet)


@torch.no_grad()
def condition_latents(base: Base, controlnet: nn.Module, mean: Tensor) -> Tensor:
    """Makes the input of a ControlNet that reads latents from `transformer_copy.condition_mean` of its conditions."""
    return denoiser_of(controlnet).file.condition_latents(base, controlnet, mean)


def predicts_alone(controlnet: nn.Module) -> bool:
    """Tells whether what is trained, or an engine around it, predicts by itself and has no residuals to add up."""
    return denoiser_of(controlnet).predicts


def predict(
    network: Any,
    controlnet: nn.Module | None,
    noisy_latents: Tensor,
    times: Tensor,
    text: TextEncoding,
    condition: Tensor | None,
    conditioning_scale: float = 1.0,
) -> Tensor:
    """Predicts (B, C, h, w) with the base under control, eq. 2 of arXiv 2302.05543, or alone without a ControlNet.

    Shapes and dtypes are as in `control_residuals` and `denoise`. Raises ValueError for a ControlNet without a
    condition.
    """
    if controlnet is None:
        return denoise(network, noisy_latents, times, text)
    if condition is None:
        raise UserError("a ControlNet was given without a condition picture")
    if predicts_alone(controlnet):
        file: Any = denoiser_of(controlnet).file
        return file.predict(controlnet, noisy_latents, times, text, condition, conditioning_scale)
    residuals = control_residuals(controlnet, noisy_latents, times, text, condition, conditioning_scale)
    return denoise(network, noisy_latents, times, text, residuals)


@dataclass(frozen=True)
class ParameterReport:
    """Numbers of trained parameters. SD1.5: 348,712,960 + 11,479,680 + 1,086,480 = 361,279,120."""

    copy: int
    """Of a control-LoRA: the low-rank differences from it, or from the base itself."""
    zero_convolutions: int
    """The output layers, one a residual; the one that ends the hint network is counted there."""
    hint: int
    """The hint network, or the layer through which latents of a condition enter."""

    @property
    def total(self) -> int:
        return self.copy + self.zero_convolutions + self.hint


def parameter_report(controlnet: nn.Module) -> ParameterReport:
    """Counts the trained parameters of a ControlNet, or of an engine around one, by their part."""
    file: Any = denoiser_of(controlnet).file
    counts = dict(copy=0, zero_convolutions=0, hint=0)
    for name, parameter in controlnet.named_parameters():
        zero, entry = (any(part in name for part in parts) for parts in (file.ZERO, file.ENTRY))
        counts["hint" if entry else "zero_convolutions" if zero else "copy"] += parameter.numel()
    return ParameterReport(**counts)


def check_fits(controlnet: Any, network: Any, where: str = "the ControlNet") -> None:
    """Raises ValueError where a ControlNet was made for a base with other settings. where: its folder, to name it."""
    denoiser = denoiser_of(network)
    if denoiser_of(controlnet).base != denoiser.base:
        raise UserError(
            f"{where} is a {type(controlnet).__name__}, and the base is a {type(network).__name__}, which it does not "
            "fit. Give a ControlNet of the base's own family"
        )
    for key in denoiser_of(controlnet).file.must_fit(controlnet.config):
        theirs, ours = (_plain(config.get(key)) for config in (controlnet.config, network.config))
        if theirs != ours:
            raise UserError(
                f"{where} was made for another base: its {key} is {theirs!r}, and the base's is {ours!r}. Continue it "
                "on the base that it was trained with."
            )


def _plain(value: Any) -> Any:
    """Returns a tuple for a list, since JSON makes lists of tuples, and any other value as it is."""
    return tuple(value) if isinstance(value, list) else value
