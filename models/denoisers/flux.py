"""FLUX.1-dev: a transformer with double and single blocks, distilled for guidance, and its ControlNet.

Latents are packed: each square of 2x2 positions is one token. The ControlNet copies the first double and the first
single blocks; its condition comes in as packed latents, by a linear layer that starts at zero.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxControlNetModel
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.denoisers.foreign import has_hint_block, is_union, union_mode
from controlbooth.models.denoisers.residuals import Residuals
from controlbooth.models.denoisers.transformer_copy import (
    check_count,
    condition_mean,
    copy_parts,
    on_device,
    shared_settings,
    used_evenly,
    without_dead_ends,
)
from controlbooth.models.text import TextEncoding

COPIED = ("time_text_embed", "context_embedder", "x_embedder", "transformer_blocks", "single_transformer_blocks")
USUAL_BLOCKS = (4, 4)
"""Double and single ones, of 19 and 38."""
ZERO, ENTRY = ("controlnet_blocks.", "controlnet_single_blocks."), ("controlnet_x_embedder.", "input_hint_block.")


def pack(latents: Tensor) -> Tensor:
    """Packs latents (B, C, h, w) into tokens (B, h/2 * w/2, 4 C), one for each square of 2x2 positions."""
    batch, channels, height, width = latents.shape
    squares = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpacks tokens (B, h/2 * w/2, 4 C) into latents (B, C, h, w): the inverse of `pack`."""
    batch, _, features = tokens.shape
    squares = tokens.view(batch, height // 2, width // 2, features // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """Returns zero, row and column of each picture token, (h/2 * w/2, 3), in the dtype and on the device of `like`."""
    places = torch.zeros(height // 2, width // 2, 3, device=like.device)
    places[..., 1] += torch.arange(height // 2, device=like.device)[:, None]
    places[..., 2] += torch.arange(width // 2, device=like.device)[None, :]
    return places.reshape(-1, 3).to(like)


def inputs_of(network: Any, noisy_latents: Tensor, times: Tensor, text: TextEncoding, dtype: torch.dtype) -> Any:
    """Makes the arguments that the base and its ControlNet are both called with. times: (B,) or (), 1000 sigma."""
    states = text.encoder_hidden_states.to(dtype)
    config = getattr(network, "module", network).config
    return dict(
        hidden_states=pack(noisy_latents.to(dtype)),
        timestep=times.expand(len(noisy_latents)).to(dtype) / 1000,
        guidance=text.added_cond_kwargs["guidance"] if config["guidance_embeds"] else None,
        pooled_projections=text.added_cond_kwargs["pooled_projections"].to(dtype),
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3, dtype=dtype, device=states.device),
        img_ids=_places(*noisy_latents.shape[-2:], like=states),
        return_dict=False,
    )


def denoise(
    transformer: Any, noisy_latents: Tensor, times: Tensor, text: TextEncoding, residuals: Residuals | None
) -> Tensor:
    """Predicts the velocity (B, 16, h, w) in the transformer's dtype. times: (B,) or (), 1000 sigma."""
    dtype = transformer.dtype
    added: dict[str, Any] = {}
    if residuals is not None:
        names = ("controlnet_block_samples", "controlnet_single_block_samples")
        groups = ([residual.to(dtype) for residual in group] or None for group in residuals.groups)
        added = dict(zip(names, groups, strict=True)) | {"controlnet_blocks_repeat": residuals.repeated}
    tokens = transformer(**inputs_of(transformer, noisy_latents, times, text, dtype), **added)[0]
    return unpack(tokens, *noisy_latents.shape[-2:])


def control_residuals(
    controlnet: nn.Module, noisy_latents: Tensor, times: Tensor, text: TextEncoding, condition: Tensor, scale: float
) -> Residuals:
    """Runs the ControlNet, or an engine around one. condition: as `encode_condition` makes it."""
    dtype = next(controlnet.parameters()).dtype
    config: Any = getattr(controlnet, "module", controlnet).config
    added = {"controlnet_mode": union_mode(controlnet, len(condition), condition.device)} if is_union(config) else {}
    double, single = controlnet(
        **inputs_of(controlnet, noisy_latents, times, text, dtype),
        controlnet_cond=condition.to(dtype),
        conditioning_scale=scale,
        **added,
    )
    return Residuals((tuple(double or ()), tuple(single or ())), repeated=has_hint_block(config))


def encode_condition(base: Any, controlnet: nn.Module, conditioning: Tensor) -> Tensor:
    """Makes packed latents (B, tokens, 64) of conditions (B, 3, H, W) in [0, 1]: the posterior's mode, scaled as
    pictures are. A ControlNet of XLabs' kind gets pixels in [-1, 1]."""
    if not reads_latents(controlnet):
        return 2.0 * conditioning - 1.0
    return condition_latents(base, controlnet, condition_mean(base, conditioning))


def reads_latents(controlnet: nn.Module) -> bool:
    """Tells whether a ControlNet, or an engine around one, reads the latents of its condition, and no pixels."""
    module: Any = getattr(controlnet, "module", controlnet)
    return not has_hint_block(module.config)


def condition_latents(base: Any, controlnet: nn.Module, mean: Tensor) -> Tensor:
    """Makes of `condition_mean`, (B, 16, h, w), what the ControlNet reads: scaled and packed, in the base's dtype."""
    return pack(base.scaled(mean))


def build_controlnet(
    transformer: Any,
    copied_blocks: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    *,
    hint_channels: Sequence[int] | None = None,
) -> Any:
    """Makes a trainable ControlNet in float32, with the first blocks of the base and zeros where it is tied to it.

    copied_blocks: numbers of double and of single blocks, the second may be 0. Default: 4 and 4, or for a smaller base
    the most of each that work up to half. Raises ValueError for numbers that leave a residual unused, and for
    hint_channels, which make conditions come in as pixels.
    """
    if hint_channels is not None:
        raise UserError(
            "model.condition_entry=pixels is for Stable Diffusion 3, and conditions of FLUX.1 come in as latents: "
            "leave it out"
        )
    double, single = _counts(copied_blocks, transformer.config["num_layers"], transformer.config["num_single_layers"])
    settings: dict[str, Any] = shared_settings(FluxControlNetModel, transformer.config)
    settings |= dict(num_layers=double, num_single_layers=single)
    device = on_device(device, transformer)
    with device:
        controlnet: Any = FluxControlNetModel(**settings)
    if device.type != "meta":
        copy_parts(controlnet, transformer, COPIED)
    return finish_reading(controlnet).train()


def finish_reading(controlnet: Any) -> Any:
    """Prepares a ControlNet that was read from a file for training."""
    last = controlnet.transformer_blocks[-1]
    return without_dead_ends(controlnet, nn.Module() if len(controlnet.single_transformer_blocks) else last)


def _counts(copied_blocks: Sequence[int] | None, double: int, single: int) -> tuple[int, int]:
    if copied_blocks is None:
        first, second = (
            next(count for count in range(min(usual, max(1, blocks // 2)), 0, -1) if used_evenly(blocks, count))
            for usual, blocks in zip(USUAL_BLOCKS, (double, single), strict=True)
        )
        return first, second
    if len(copied_blocks) != 2:
        raise UserError(
            f"model.copied_blocks is {list(copied_blocks)}, and this base has double and single blocks: give a number "
            "of each, such as [4, 4]; the second may be 0"
        )
    check_count("double", double, copied_blocks[0], used_evenly)
    if copied_blocks[1]:
        check_count("single", single, copied_blocks[1], used_evenly)
    return copied_blocks[0], copied_blocks[1]


FITS = (
    "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "pooled_projection_dim", "axes_dims_rope",
)  # fmt: skip
"""Settings that a ControlNet and its base have alike. Each is told its guidance or not as it says itself."""


def must_fit(config: Any) -> tuple[str, ...]:
    """Returns the settings that a ControlNet with this configuration and its base have alike."""
    return tuple(name for name in FITS if name != "patch_size" or not has_hint_block(config))  # there of the hint's


def check_usable(config: Any, where: str) -> None:
    """Raises ValueError for a ControlNet of this class that cannot be used here. where: its folder."""
    if has_hint_block(config):
        features = config["conditioning_embedding_channels"] * config["patch_size"] ** 2
        if features != config["in_channels"]:
            raise UserError(
                f"{where}: its hint network (XLabs' kind) gives {features} numbers a token, patch_size "
                f"{config['patch_size']} squared times conditioning_embedding_channels "
                f"{config['conditioning_embedding_channels']}, and in_channels is {config['in_channels']}. Fetch its "
                "config.json again"
            )
