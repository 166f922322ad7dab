"""The ControlNet step as diffusers' example program makes it, called plainly: what ours is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from controlbooth.models.base import Base
    from controlbooth.trainer.controlnet.step import DeviceBatch


def plain_loss(base: Base, controlnet: Any, batch: DeviceBatch, autocast: bool) -> Tensor:
    """Noise prediction error of one micro-batch, a float32 scalar, on the draws that our step would use.

    autocast: the ControlNet is in fp32 and runs in the base's dtype, which is how that program trains in bf16.
    """
    unet: Any = base.denoiser
    with torch.no_grad():
        assert batch.pixel_values is not None, "the plain step has no latent cache"
        posterior = base.vae.encode(batch.pixel_values.to(base.dtype)).latent_dist
        latents = posterior.mean + posterior.std * batch.posterior_noise.to(base.dtype)
        latents = latents * base.vae.config.scaling_factor
        noisy = base.process.scheduler.add_noise(latents.float(), batch.noise, batch.levels).to(base.dtype)  # type: ignore[arg-type]
        tokenizer = base.tokenizers[0]
        length = tokenizer.model_max_length
        words = tokenizer(batch.captions, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        text = base.text_encoders[0](words.input_ids, return_dict=False)[0]
        hint = batch.conditioning_pixel_values.to(base.dtype)
    with torch.autocast("cpu", dtype=base.dtype, enabled=autocast):
        down, mid = controlnet(noisy, batch.levels, encoder_hidden_states=text, controlnet_cond=hint, return_dict=False)
    said = unet(
        noisy,
        batch.levels,
        encoder_hidden_states=text,
        down_block_additional_residuals=[one.to(base.dtype) for one in down],
        mid_block_additional_residual=mid.to(base.dtype),
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(said.float(), batch.noise.float())
