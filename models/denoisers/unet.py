"""The ControlNet (arXiv 2302.05543): a trainable copy of the U-Net's encoder, tied to the locked U-Net by zero
convolutions.

    y_c = F(x; T) + Z(F(x + Z(c; T_z1); T_c); T_z2)                                                             (eq. 2)

`Z` are convolutions that start at zero, so an untrained ControlNet changes nothing, bit for bit.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.base import for_convolutions
from controlbooth.models.denoisers import control_lora
from controlbooth.models.denoisers.control_lora import COPIED, ControlLora
from controlbooth.models.denoisers.residuals import Residuals
from controlbooth.models.denoisers.variants import (
    HINT_CHANNELS,
    RELU_GAIN,
    SILU_GAIN,
    HintNetwork,
    TrainableCopy,
    VariantControlNet,
    check_condition_size,
    check_hint_channels,
    start_gaussian,
)
from controlbooth.models.text import TextEncoding

_SHARED = set(inspect.signature(ControlNetModel.__init__).parameters) & set(
    inspect.signature(UNet2DConditionModel.__init__).parameters
) - {"self"}
"""Configuration that both classes know. ControlNetModel.from_unet forgets addition_embed_type_num_heads, for one, which
changes no shape and so would change the copy's function silently."""

FITS = tuple(sorted(_SHARED))
"""Settings that a ControlNet and its base have alike."""


def must_fit(config: Any) -> tuple[str, ...]:
    """Returns the settings that a ControlNet with this configuration and its base have alike: the same for all."""
    return FITS


ZERO, ENTRY = ("controlnet_down_blocks.", "controlnet_mid_block."), ("controlnet_cond_embedding.",)
"""Beginnings of the names of zero convolutions, and of the hint network."""

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


def build_controlnet(
    unet: UNet2DConditionModel,
    hint_channels: Sequence[int] = HINT_CHANNELS,
    device: str | torch.device | None = None,
    *,
    trainable_copy: TrainableCopy = "full",
    connections: Literal["zero", "gaussian"] = "zero",
    hint_network: HintNetwork = "released",
    only_mid_control: bool = False,
    rank: int | None = None,
) -> ControlNetModel:
    """Builds a trainable ControlNet for `unet`, in float32: copied encoder, zero convolutions, hint network.

    hint_channels: widths of the hint network. Each step from one width to the next halves the picture: four widths.
    hint_network: that of the released code (3x3 convolutions, SiLU, the last one zero) or that of the paper's text
    (4x4, ReLU; its widths are 16, 32, 64, 128).
    Its weights are Gaussian, as in the paper (arXiv 2302.05543, section 3.2), drawn from torch's global
    generator: seed it first. trainable_copy "lite" and connections "gaussian" are what the paper's ablation replaces:
    one convolution for each block of the copy; Gaussian weights where zero convolutions are.
    only_mid_control: only the middle block's residual learns; the others stay zero convolutions, so that such a
    ControlNet is used like any other. rank: makes a ControlLora, whose copy is the base's own weights with low-rank
    differences of this rank; it has no variants. device: default the U-Net's; on "meta" the ControlNet has shapes and
    no weights. Raises ValueError for hint_channels that miss the latents' size and for a U-Net that ControlNetModel
    cannot mirror.
    """
    check_hint_channels(hint_channels)
    for key, usable in _NOT_IN_A_CONTROLNET.items():
        if unet.config.get(key, usable) != usable:
            raise UserError(
                f"the U-Net's {key} is {unet.config[key]!r}, and a ControlNet cannot copy that (only {usable!r})"
            )
    shared = {key: unet.config[key] for key in _SHARED if key in unet.config}
    device = torch.device(device or unet.device)
    shared["conditioning_embedding_out_channels"] = tuple(hint_channels)
    plain = trainable_copy == "full" and hint_network == "released"
    controlnet: Any
    if rank is not None:
        controlnet = _control_lora(unet, rank, device, shared)
    else:
        with device:
            controlnet = (
                ControlNetModel(**shared)
                if plain
                else VariantControlNet(trainable_copy=trainable_copy, hint_network=hint_network, **shared)
            )
        if device.type != "meta":
            _copy(controlnet, unet, trainable_copy)
    if device.type != "meta":
        _start(controlnet, trainable_copy, connections, hint_network)
    if only_mid_control:
        keep_only_mid_control(controlnet)
    return controlnet.train()


def keep_only_mid_control(controlnet: ControlNetModel) -> None:
    """Makes the gradients of all residuals' convolutions but the middle block's zero.

    The convolutions must be zero themselves: raises ValueError where not. They stay parameters of the optimizer, and so
    checkpoints and ZeRO have the same layout in every mode.
    """
    for parameter in controlnet.controlnet_down_blocks.parameters():
        if parameter.device.type != "meta" and parameter.any():
            raise UserError("only_mid_control needs a ControlNet whose other residuals' convolutions are still zero")
        parameter.register_hook(torch.zeros_like)


def _control_lora(unet: Any, rank: int, device: torch.device, shared: dict[str, Any]) -> ControlLora:
    with torch.device("meta"):  # the copy's own weights would be thrown away
        controlnet = ControlLora(rank=rank, **shared)
    if device.type != "meta":
        control_lora.start(controlnet, device)
    control_lora.share_weights(controlnet, unet)
    return controlnet


def _copy(controlnet: Any, unet: Any, trainable_copy: str) -> None:
    for name in COPIED if trainable_copy == "full" else ("conv_in",):
        module = getattr(controlnet, name, None)
        if module is not None:
            module.load_state_dict(getattr(unet, name).state_dict())


def _start(controlnet: Any, trainable_copy: str, connections: str, hint_network: str) -> None:
    """Sets the other weights that a ControlNet has before the first step: Gaussian ones."""
    if trainable_copy == "lite":
        start_gaussian([*controlnet.down_blocks, controlnet.mid_block], SILU_GAIN)
    _start_hint_network(controlnet, SILU_GAIN if hint_network == "released" else RELU_GAIN)
    if connections == "gaussian":
        hint = controlnet.controlnet_cond_embedding
        start_gaussian([hint.conv_out, *controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block], 1.0)


def _start_hint_network(controlnet: ControlNetModel, gain: float) -> None:
    """Gives the hint network variance-preserving Gaussian weights and zero biases; its last convolution stays zero.

    PyTorch's default weights shrink a sparse edge map to 3e-5 over the seven layers, beside biases a thousand times
    larger: the network then learns for hundreds of steps without seeing its condition.
    """
    hint: Any = controlnet.controlnet_cond_embedding
    start_gaussian([hint.conv_in, *hint.blocks], gain)


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
    check_condition_size(conditioning, noisy_latents)
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


def finish_reading(controlnet: ControlNetModel) -> ControlNetModel:
    """Returns a ControlNet that was read from a file as it is: all of it learns."""
    return controlnet


def check_usable(config: Any, where: str) -> None:
    """Accepts every ControlNet: whatever ControlNetModel can be of RGB conditions can be used here."""


def encode_condition(base: Any, controlnet: nn.Module, conditioning: Tensor) -> Tensor:
    """Returns the condition pictures as they are: the hint network reads them."""
    return conditioning


def reads_latents(controlnet: nn.Module) -> bool:
    """Says that no ControlNet of a U-Net reads its condition's latents."""
    return False


def denoise(
    unet: UNet2DConditionModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    text: TextEncoding,
    residuals: Residuals | None,
) -> Tensor:
    """Predicts the noise, or v, as the base's prediction_type says, with the locked U-Net: (B, C, h, w) in its dtype.

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
