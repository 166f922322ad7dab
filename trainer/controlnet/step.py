"""A rank's share of an optimizer step: from decoded micro-batches to gradients. `apply_gradients` of the engine moves
the weights, called by train.py."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from controlbooth.data.errors import UserError
from controlbooth.data.loading.batches import MicroBatch
from controlbooth.models.base import Base, Encoded
from controlbooth.models.denoisers.registry import condition_latents, encode_condition
from controlbooth.models.unlocked_decoder import controlled_prediction
from controlbooth.trainer.encoding import (
    captions_of,
    condition_of,
    encode_kept,
    encode_posterior,
    posterior_of,
    sample_posterior,
    to_conditioning,
    to_pixel_values,
    with_empty_prompts,
)
from controlbooth.trainer.losses import weighted_mse


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch of B samples on the device, in the network's ranges."""

    pixel_values: Tensor | None
    """(B, 3, H, W) float32 in [-1, 1]; None where the posterior is known."""
    conditioning_pixel_values: Tensor | None
    """(B, 3, H, W) float32 in [0, 1]; None where its latents are known."""
    captions: list[str]
    levels: Tensor
    """Of noise, (B,) int64."""
    noise: Tensor
    """(B, C, h, w) float32."""
    posterior_noise: Tensor
    """(B, C, h, w) float32, for the sample that is taken of the VAE's posterior."""
    weights: Tensor
    """(B,) float32: 0 where no sample could be read."""
    posterior: tuple[Tensor, Tensor] | None = None
    """Mean and standard deviation (B, C, h, w) in the VAE's dtype, from the latent cache."""
    text: Encoded | None = None
    """Of the captions that are not empty, from the latent cache; None too where all are empty."""
    condition: Tensor | None = None
    """The condition's latents (B, C, h, w), unscaled, in the VAE's dtype, from the latent cache."""


def to_device(batch: MicroBatch, device: torch.device) -> DeviceBatch:
    """Copies a micro-batch to the device, and there scales uint8 pixels to the networks' ranges.

    Raises ValueError for a batch without conditions.
    """
    encoded = batch.encoded
    condition = None if encoded is None else condition_of(encoded, device)
    if batch.conditioning is None and condition is None:
        raise UserError("a ControlNet is trained on conditions, and the loader was made without a condition kind")

    def on_device(array) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    conditioning = batch.conditioning
    return DeviceBatch(
        pixel_values=None if batch.pixel_values is None else to_pixel_values(on_device(batch.pixel_values)),
        conditioning_pixel_values=None if conditioning is None else to_conditioning(on_device(conditioning)),
        captions=batch.captions,
        levels=on_device(batch.timesteps),
        noise=on_device(batch.noise),
        posterior_noise=on_device(batch.posterior_noise),
        weights=on_device(batch.weights),
        posterior=None if encoded is None else posterior_of(encoded, device),
        text=None if encoded is None else captions_of(encoded, device),
        condition=condition,
    )


def condition_input(base: Base, controlnet: nn.Module, batch: DeviceBatch) -> Tensor:
    """Makes what the ControlNet reads of the conditions: their pixels as they are, as a U-Net's does, or latents."""
    if batch.condition is not None:
        return condition_latents(base, controlnet, batch.condition)
    assert batch.conditioning_pixel_values is not None, "a batch has conditions, or what the VAE made of them"
    return encode_condition(base, controlnet, batch.conditioning_pixel_values)


def prediction_and_target(base: Base, controlnet: nn.Module, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
    """Returns what the controlled network predicts from the noisy latents, and what it should predict, (B, C, h, w)
    each."""
    with torch.no_grad():
        with record_function("encode picture"):
            posterior = batch.posterior if batch.pixel_values is None else encode_posterior(base, batch.pixel_values)
            assert posterior is not None, "a batch has pictures, or what the VAE made of them"
            latents = sample_posterior(base, *posterior, batch.posterior_noise).float()  # (B, C, h, w)
        with record_function("encode prompt"):  # dropped prompts share one cached embedding
            height, width = (base.family.vae_factor * side for side in latents.shape[-2:])
            encoded = encode_kept(base, batch.captions) if batch.posterior is None else batch.text
            text = with_empty_prompts(base, batch.captions, encoded, picture_size=(height, width))
        with record_function("encode condition"):
            condition = condition_input(base, controlnet, batch)
        noisy = base.process.noised(latents, batch.noise, batch.levels)

    with record_function("predict"):  # the copy and its zero layers take gradients, what is locked none
        prediction = controlled_prediction(base, controlnet, noisy.latents, noisy.times, text, condition)
    return prediction, noisy.target


def controlnet_loss(base: Base, controlnet: nn.Module, batch: DeviceBatch, min_snr_gamma: float | None) -> Tensor:
    """Returns the loss of one micro-batch, a float32 scalar: the mean squared error of the controlled prediction,
    weighted by sample and by noise level."""
    prediction, target = prediction_and_target(base, controlnet, batch)
    weights, by_level = batch.weights, base.process.loss_weights(batch.levels, target.shape, min_snr_gamma)
    return weighted_mse(prediction, target, weights if by_level is None else weights * by_level)


def controlnet_step(
    base: Base,
    engine: nn.Module,
    backward: Callable[[Tensor], None],
    micro_batches: list[MicroBatch],
    min_snr_gamma: float | None,
    device: torch.device,
    keeping: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Runs this rank's share of one optimizer step: forward and backward over its micro-batches.

    `backward` takes a micro-batch's loss and accumulates its gradients, divided by the number of micro-batches. Returns
    the loss of each micro-batch, (micro-batches,) float32 on the device, without waiting for it. Weights do not change
    here: engine.apply_gradients takes the step. keeping: says where what the backward pass needs is kept until then.
    """
    losses = []
    for micro_batch in micro_batches:
        batch = to_device(micro_batch, device)
        with keeping():
            loss = controlnet_loss(base, engine, batch, min_snr_gamma)
        with record_function("backward"):
            backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses)
