"""One step of DreamBooth: instance loss and prior loss of every subject in a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from controlbooth.models.base import Base
from controlbooth.models.denoisers.registry import denoise
from controlbooth.models.text import TextEncoding, encode_prompts
from controlbooth.trainer.losses import squared_error

Text = TextEncoding | list[str]
"""Of a batch's rows; prompts where a text encoder learns too."""


@dataclass(frozen=True)
class SubjectBatch:
    """One step of K subjects with b rows each, subject after subject; a subject's own pictures, then its class's."""

    latents: Tensor
    """(K * b, C, h, w) float32, sampled from the VAE's posterior and scaled."""
    text: Text
    """K * b rows."""
    levels: Tensor
    """Of noise, (K * b,) int64. Those of class pictures are drawn independently, arXiv 2208.12242, eq. 2."""
    noise: Tensor
    """(K * b, C, h, w) float32."""
    instance_rows: int
    """Of each subject's b rows; the rest are class pictures."""


def predict(base: Base, side: int, noisy_latents: Tensor, times: Tensor, text: Text) -> Tensor:
    """Predicts (B, C, h, w) with the base's own networks, whatever has been put into them.

    side: of the pictures, in pixels. Shapes and dtypes are as in `registry.denoise`.
    """
    if isinstance(text, list):
        text = encode_prompts(base, text, picture_size=(side, side))
    return denoise(base.denoiser, noisy_latents, times, text)


def dreambooth_step(
    base: Base,
    network: Callable[[Tensor, Tensor, Text], Tensor],
    backward: Callable[[Tensor], None],
    batch: SubjectBatch,
    subjects: int,
    prior_loss_weight: float,
    min_snr_gamma: float | None,
) -> tuple[Tensor, Tensor]:
    """Runs forward and backward of a step of K subjects. Returns their instance and prior losses, (K,) float32 each.

    network(noisy latents, timesteps, text) holds what learns: the stacked adapters of K subjects, or for one subject
    all layers. `backward` leaves the gradients in place; no optimizer step is made. What is differentiated is the sum
    over subjects of instance loss + prior_loss_weight * prior loss (arXiv 2208.12242, eq. 2), so a subject's gradient
    does not depend on how many others there are.
    """
    noisy = base.process.noised(batch.latents, batch.noise, batch.levels)
    prediction = network(noisy.latents, noisy.times, batch.text)  # (K * b, C, h, w)
    errors = squared_error(prediction, noisy.target)  # (K * b,)
    weights = base.process.loss_weights(batch.levels, noisy.target.shape, min_snr_gamma)
    if weights is not None:  # by each row's own level
        errors = errors * weights
    errors = errors.view(subjects, -1)

    instance_losses = errors[:, : batch.instance_rows].mean(1)
    prior_losses = torch.zeros_like(instance_losses)
    if errors.shape[1] > batch.instance_rows:
        prior_losses = errors[:, batch.instance_rows :].mean(1)
    backward((instance_losses + prior_loss_weight * prior_losses).sum())
    return instance_losses.detach(), prior_losses.detach()
