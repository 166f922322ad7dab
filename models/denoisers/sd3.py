"""Stable Diffusion 3 and 3.5: an MMDiT (arXiv 2403.03206), and its ControlNet.

The ControlNet copies the first blocks. Its condition comes in as latents, by a patch embedding that starts at zero, or
as pixels, by a hint network whose last layer does; each copied block ends in a linear layer that starts at zero. Block
i of the base adds residual int(i / interval).
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3ControlNetModel
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.denoisers.foreign import in_levels_of_stability, is_without_text
from controlbooth.models.denoisers.pixel_controlnet import PixelSD3ControlNet
from controlbooth.models.denoisers.residuals import Residuals
from controlbooth.models.denoisers.transformer_copy import (
    check_count,
    condition_mean,
    copy_parts,
    on_device,
    shared_settings,
    used_but_last,
    without_dead_ends,
)
from controlbooth.models.text import TextEncoding

COPIED = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks")
USUAL_BLOCKS = 12
"""Copied of 24 or 38, as in the released ControlNets."""
ZERO, ENTRY = ("controlnet_blocks.",), ("pos_embed_input.",)


def denoise(
    transformer: Any, noisy_latents: Tensor, times: Tensor, text: TextEncoding, residuals: Residuals | None
) -> Tensor:
    """Predicts the velocity (B, 16, h, w) in the transformer's dtype. times: (B,) or (), 1000 sigma."""
    dtype = transformer.dtype
    added: dict[str, Any] = {}
    if residuals is not None:
        added["block_controlnet_hidden_states"] = [residual.to(dtype) for residual in residuals.groups[0]]
    return transformer(
        hidden_states=noisy_latents.to(dtype),
        timestep=times.expand(len(noisy_latents)),
        encoder_hidden_states=text.encoder_hidden_states.to(dtype),
        pooled_projections=text.added_cond_kwargs["pooled_projections"].to(dtype),
        return_dict=False,
        **added,
    )[0]


def control_residuals(
    controlnet: nn.Module, noisy_latents: Tensor, times: Tensor, text: TextEncoding, condition: Tensor, scale: float
) -> Residuals:
    """Runs the ControlNet, or an engine around one. condition: as `encode_condition` makes it."""
    dtype = next(controlnet.parameters()).dtype
    pooled = text.added_cond_kwargs["pooled_projections"].to(dtype)
    module: Any = getattr(controlnet, "module", controlnet)
    (blocks,) = controlnet(
        hidden_states=noisy_latents.to(dtype),
        timestep=times.expand(len(noisy_latents)),
        encoder_hidden_states=None if is_without_text(module.config) else text.encoder_hidden_states.to(dtype),
        pooled_projections=torch.zeros_like(pooled) if _is_of_instantx(controlnet) else pooled,
        controlnet_cond=condition.to(dtype),
        conditioning_scale=scale,
        return_dict=False,
    )
    return Residuals((tuple(blocks),))


def _is_of_instantx(controlnet: nn.Module) -> bool:
    """Tells whether a ControlNet was trained, as the first ones were, with zeros for the pooled text, and conditions
    without the VAE's shift: the pipelines go by this setting for both."""
    module: Any = getattr(controlnet, "module", controlnet)
    return bool(module.config["force_zeros_for_pooled_projection"])


def encode_condition(base: Any, controlnet: nn.Module, conditioning: Tensor) -> Tensor:
    """Makes latents (B, 16, h, w) of conditions (B, 3, H, W) in [0, 1]: the posterior's mode, scaled as pictures are.

    A ControlNet that reads pixels gets the conditions as they are. The pipelines draw from the posterior, and the
    scripts of diffusers forget to bring [0, 1] to [-1, 1].
    """
    if not reads_latents(controlnet):
        return conditioning
    levels = in_levels_of_stability(controlnet, conditioning)
    mean = condition_mean(base, conditioning) if levels is None else base.posterior(levels).mean
    return condition_latents(base, controlnet, mean)


def reads_latents(controlnet: nn.Module) -> bool:
    """Tells whether a ControlNet, or an engine around one, reads the latents of its condition, and no pixels."""
    return not isinstance(getattr(controlnet, "module", controlnet), PixelSD3ControlNet)


def condition_latents(base: Any, controlnet: nn.Module, mean: Tensor) -> Tensor:
    """Makes of `condition_mean`, (B, 16, h, w), what the ControlNet reads: scaled, in the base's dtype.

    Some of the VAE's kernels leave channels last, and a patch embedding would then round otherwise than on a cache.
    """
    return base.scaled(mean, shifted=not _is_of_instantx(controlnet)).contiguous()


def build_controlnet(
    transformer: Any,
    copied_blocks: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    *,
    hint_channels: Sequence[int] | None = None,
) -> Any:
    """Makes a trainable ControlNet in float32, with the first blocks of the base and zeros where it is tied to it.

    copied_blocks: one number. Default: 12, or for a smaller base the most that work up to half of its blocks. Its
    configuration says that the pooled text and the VAE's shift are used, which the pipelines else leave out.
    hint_channels: widths of a hint network, drawn from torch's global generator, for conditions that come in as pixels.
    Raises ValueError for a number that leaves a residual unused, and for widths that miss the latents' size.
    """
    blocks = int(transformer.config["num_layers"])
    count = _count(copied_blocks, blocks)
    settings: dict[str, Any] = shared_settings(SD3ControlNetModel, transformer.config) | dict(
        num_layers=count, extra_conditioning_channels=0, force_zeros_for_pooled_projection=False
    )
    settings["dual_attention_layers"] = tuple(
        layer for layer in transformer.config["dual_attention_layers"] if layer < count
    )
    device = on_device(device, transformer)
    with device:
        controlnet: Any = (
            SD3ControlNetModel(**settings) if hint_channels is None else PixelSD3ControlNet(hint_channels, **settings)
        )
    if device.type != "meta":
        copy_parts(controlnet, transformer, COPIED)
        if hint_channels is not None:
            controlnet.pos_embed_input.start()
    return finish_reading(controlnet).train()


def finish_reading(controlnet: Any) -> Any:
    """Prepares a ControlNet that was read from a file for training."""
    return without_dead_ends(controlnet, controlnet.transformer_blocks[-1])


def _count(copied_blocks: Sequence[int] | None, blocks: int) -> int:
    if copied_blocks is None:
        least = max(1, blocks // 2)
        return next(count for count in range(min(USUAL_BLOCKS, least), 0, -1) if used_but_last(blocks, count))
    if len(copied_blocks) != 1:
        raise UserError(f"model.copied_blocks is {list(copied_blocks)}, and this base has one kind of block: give one")
    check_count("joint", blocks, copied_blocks[0], used_but_last)
    return copied_blocks[0]


FITS = (
    "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "caption_projection_dim", "pooled_projection_dim", "qk_norm", "pos_embed_max_size",
)  # fmt: skip
"""Settings that a ControlNet and its base have alike."""
OF_TEXT = ("joint_attention_dim", "caption_projection_dim", "qk_norm")
"""Those of the settings above that a ControlNet without text does not have."""


def must_fit(config: Any) -> tuple[str, ...]:
    """Returns the settings that a ControlNet with this configuration and its base have alike."""
    free = OF_TEXT if is_without_text(config) else ()
    without_table = not config.get("use_pos_embed", True) or config.get("pos_embed_type", "sincos") is None
    return tuple(name for name in FITS if name not in free and not (without_table and name == "pos_embed_max_size"))


def check_usable(config: Any, where: str) -> None:
    """Raises ValueError for a ControlNet of this class that cannot be used here. where: its folder."""
    if config.get("extra_conditioning_channels", 0):
        raise UserError(
            f"{where} takes {config['extra_conditioning_channels']} more channels beside the condition's latents, "
            "as one for inpainting does for its mask, which conditions here do not have. Give one whose "
            "extra_conditioning_channels is 0"
        )
