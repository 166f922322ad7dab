"""The ControlNet (arXiv 2302.05543): a trainable copy of the U-Net's encoder, tied to the locked U-Net by zero
convolutions.

    y_c = F(x; T) + Z(F(x + Z(c; T_z1); T_c); T_z2)                                                             (eq. 2)

`Z` are convolutions that start at zero, so an untrained ControlNet changes nothing, bit for bit.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.architectures import VAE_FACTOR
from controlbooth.models.base import for_convolutions
from controlbooth.models.controlnet_variants import (
    RELU_GAIN,
    SILU_GAIN,
    HintNetwork,
    TrainableCopy,
    VariantControlNet,
    start_gaussian,
)
from controlbooth.models.residuals import Residuals
from controlbooth.models.text import TextEncoding

COPIED = ("conv_in", "time_embedding", "class_embedding", "add_embedding", "down_blocks", "mid_block")
"""Modules that a ControlNet has in common with its U-Net, and starts as a copy of."""

_SHARED = set(inspect.signature(ControlNetModel.__init__).parameters) & set(
    inspect.signature(UNet2DConditionModel.__init__).parameters
) - {"self"}
"""Configuration that both classes know. ControlNetModel.from_unet forgets addition_embed_type_num_heads, for one, which
changes no shape and so would change the copy's function silently."""

_NOT_IN_A_CONTROLNET: dict[str, Any] = dict(  # a U-Net's options that ControlNetModel lacks -> the one usable value
    center_input_sample=False,
    dropout=0.0,
    encoder_hid_dim=None,  # ControlNetModel builds the projection and never applies it
    dual_cross_attention=False,
    resnet_skip_time_act=False,
    resnet_out_scale_factor=1.0,
    time_embedding_type="positional",
    time_embedding_dim=None,
    time_embedding_act_fn=None,
    timestep_post_act=None,
    time_cond_proj_dim=None,
    conv_in_kernel=3,
    attention_type="default",
    class_embeddings_concat=False,
    mid_block_only_cross_attention=None,
    cross_attention_norm=None,
)


@dataclass(frozen=True)
class ParameterReport:
    """Numbers of parameters. SD1.5: 348,712,960 + 11,479,680 + 1,086,480 = 361,279,120."""

    copy: int
    zero_convolutions: int
    """The output convolutions, one a residual; the one that ends the hint network is counted there."""
    hint: int

    @property
    def total(self) -> int:
        return self.copy + self.zero_convolutions + self.hint


def build_controlnet(
    unet: UNet2DConditionModel,
    hint_channels: Sequence[int] = (16, 32, 96, 256),
    device: str | torch.device | None = None,
    *,
    trainable_copy: TrainableCopy = "full",
    connections: Literal["zero", "gaussian"] = "zero",
    hint_network: HintNetwork = "released",
    only_mid_control: bool = False,
) -> ControlNetModel:
    """A trainable ControlNet for `unet`, in float32: copied encoder, zero convolutions, hint network.

    hint_channels: widths of the hint network. Each step from one width to the next halves the picture: four widths.
    hint_network: that of the released code (3x3 convolutions, SiLU, the last one zero) or that of the paper's text
    (4x4, ReLU; its widths are 16, 32, 64, 128).
    Its weights are Gaussian, as in the paper (arXiv 2302.05543, section 3.2), drawn from torch's global
    generator: seed it first. trainable_copy "lite" and connections "gaussian" are what the paper's ablation replaces:
    one convolution for each block of the copy; Gaussian weights where zero convolutions are.
    only_mid_control: only the middle block's residual learns; the others stay zero convolutions, so that such a
    ControlNet is used like any other. device: default the U-Net's; on "meta" the ControlNet has shapes and no weights.
    Raises ValueError for hint_channels that miss the latents' size and for a U-Net that ControlNetModel cannot mirror.
    """
    halvings = len(hint_channels) - 1
    if 2**halvings != VAE_FACTOR:
        raise UserError(
            f"hint_channels {tuple(hint_channels)} halves the condition picture {halvings} times, "
            f"but latents have 1/{VAE_FACTOR} of its size: give four widths, e.g. (16, 32, 96, 256)"
        )
    for key, usable in _NOT_IN_A_CONTROLNET.items():
        if unet.config.get(key, usable) != usable:
            raise UserError(
                f"the U-Net's {key} is {unet.config[key]!r}, and a ControlNet cannot copy that (only {usable!r})"
            )
    shared = {key: unet.config[key] for key in _SHARED if key in unet.config}
    device = torch.device(device or unet.device)
    shared["conditioning_embedding_out_channels"] = tuple(hint_channels)
    plain = trainable_copy == "full" and hint_network == "released"
    with device:
        controlnet: Any = (
            ControlNetModel(**shared)
            if plain
            else VariantControlNet(trainable_copy=trainable_copy, hint_network=hint_network, **shared)
        )
    if device.type != "meta":
        _start(controlnet, unet, trainable_copy, connections, hint_network)
    if only_mid_control:
        keep_only_mid_control(controlnet)
    return controlnet.train()


def keep_only_mid_control(controlnet: ControlNetModel) -> None:
    """Takes the gradients of the other residuals' convolutions, which must be zero. Raises ValueError where not.

    They stay parameters of the optimizer, and so checkpoints and ZeRO have the same layout in every mode.
    """
    for parameter in controlnet.controlnet_down_blocks.parameters():
        if parameter.device.type != "meta" and parameter.any():
            raise UserError("only_mid_control needs a ControlNet whose other residuals' convolutions are still zero")
        parameter.register_hook(torch.zeros_like)


def _start(controlnet: Any, unet: Any, trainable_copy: str, connections: str, hint_network: str) -> None:
    """The weights before the first step."""
    for name in COPIED if trainable_copy == "full" else ("conv_in",):
        module = getattr(controlnet, name, None)
        if module is not None:
            module.load_state_dict(getattr(unet, name).state_dict())
    if trainable_copy == "lite":
        start_gaussian([*controlnet.down_blocks, controlnet.mid_block], SILU_GAIN)
    _start_hint_network(controlnet, SILU_GAIN if hint_network == "released" else RELU_GAIN)
    if connections == "gaussian":
        hint = controlnet.controlnet_cond_embedding
        start_gaussian([hint.conv_out, *controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block], 1.0)


def _start_hint_network(controlnet: ControlNetModel, gain: float) -> None:
    """Variance-preserving Gaussian weights and no biases; the last convolution stays zero.

    PyTorch's default weights shrink a sparse edge map to 3e-5 over the seven layers, beside biases a thousand times
    larger: the network then learns for hundreds of steps without seeing its condition.
    """
    hint: Any = controlnet.controlnet_cond_embedding
    start_gaussian([hint.conv_in, *hint.blocks], gain)


def check_fits(controlnet: ControlNetModel, unet: UNet2DConditionModel, where: str = "the ControlNet") -> None:
    """Raises ValueError where the ControlNet's configuration differs from the U-Net's in anything that both have."""
    for key in sorted(_SHARED):
        theirs, ours = controlnet.config.get(key), unet.config.get(key)
        if _plain(theirs) != _plain(ours):
            raise UserError(
                f"{where} was made for another base: its {key} is {_plain(theirs)!r}, "
                f"and the base's is {_plain(ours)!r}. Continue it on the base that it was trained with."
            )


def parameter_report(controlnet: nn.Module) -> ParameterReport:
    """Counts the parameters of a ControlNet, or of an engine around one, by their part."""
    counts = dict(copy=0, zero_convolutions=0, hint=0)
    for name, parameter in controlnet.named_parameters():
        if "controlnet_cond_embedding." in name:
            counts["hint"] += parameter.numel()
        elif "controlnet_down_blocks." in name or "controlnet_mid_block." in name:
            counts["zero_convolutions"] += parameter.numel()
        else:
            counts["copy"] += parameter.numel()
    return ParameterReport(**counts)


def control_residuals(
    controlnet: nn.Module,
    noisy_latents: Tensor,
    timesteps: Tensor,
    text: TextEncoding,
    conditioning: Tensor,
    conditioning_scale: float = 1.0,
) -> Residuals:
    """Runs a ControlNet of a U-Net, or an engine around one.

    noisy_latents (B, C, h, w); timesteps (B,) or () int64; conditioning (B, 3, 8h, 8w), RGB in [0, 1]. Inputs of any
    floating dtype are brought to the ControlNet's. conditioning_scale multiplies every residual.
    """
    height, width = noisy_latents.shape[-2:]
    if conditioning.shape[-2:] != (VAE_FACTOR * height, VAE_FACTOR * width):
        raise UserError(
            f"the condition is {conditioning.shape[-2]}x{conditioning.shape[-1]} pixels, "
            f"but latents of {height}x{width} need {VAE_FACTOR * height}x{VAE_FACTOR * width}"
        )
    dtype = next(controlnet.parameters()).dtype
    down, mid = controlnet(
        noisy_latents.to(dtype),
        timesteps,
        encoder_hidden_states=text.encoder_hidden_states.to(dtype),
        controlnet_cond=for_convolutions(conditioning.to(dtype)),
        conditioning_scale=conditioning_scale,
        added_cond_kwargs=text.added_cond_kwargs,
        return_dict=False,
    )
    return Residuals((tuple(down), (mid,)))


def encode_condition(base: Any, controlnet: nn.Module, conditioning: Tensor) -> Tensor:
    """Returns the condition pictures as they are: the hint network reads them."""
    return conditioning


def denoise(
    unet: UNet2DConditionModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    text: TextEncoding,
    residuals: Residuals | None,
) -> Tensor:
    """The locked U-Net's prediction (B, C, h, w) in its dtype: the noise, or v, as the base's prediction_type says.

    Its weights take no gradient; residuals do, through the middle block's output and the decoder. The encoder sees
    nothing that needs a gradient, so autograd keeps none of its activations.
    """
    dtype = unet.dtype
    added: dict[str, Any] = {}
    if residuals is not None:
        down, (mid,) = residuals.groups
        added["down_block_additional_residuals"] = tuple(residual.to(dtype) for residual in down)
        added["mid_block_additional_residual"] = mid.to(dtype)
    return unet(
        noisy_latents.to(dtype),
        timesteps,
        encoder_hidden_states=text.encoder_hidden_states.to(dtype),
        added_cond_kwargs=text.added_cond_kwargs,
        return_dict=False,
        **added,
    )[0]


def _plain(value: Any) -> Any:
    """JSON makes lists of tuples."""
    return tuple(value) if isinstance(value, list) else value
