"""A base model as the rest of the system sees it: frozen modules, and pictures to latents and back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from controlbooth.data.errors import UserError
from controlbooth.models.recognition import Family

Encoded = tuple[Tensor, Tensor | None]
"""Hidden states (B, L, D) and the pooled embedding (B, P), or None where the family has none."""


def for_convolutions(pictures: Tensor) -> Tensor:
    """The same (B, C, H, W) in the order of memory in which a network of convolutions takes them fastest.

    On a CPU that is channels last: all of a VAE's tensors then are, and encoding 128 px takes half of the time in fp32
    and two thirds in bf16. A U-Net gains nothing, whose attention wants another order. On a GPU it is not measured yet.
    """
    return pictures.contiguous(memory_format=torch.channels_last) if pictures.device.type == "cpu" else pictures


@dataclass(eq=False)
class Base:
    """A frozen base model. Every module is in eval mode, on one device, and takes no gradient for its weights."""

    family: Family
    path: Path
    vae: Any
    """An AutoencoderKL."""
    text_encoders: tuple[Any, ...]
    """A CLIPTextModel; of SDXL also a CLIPTextModelWithProjection."""
    tokenizers: tuple[Any, ...]
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    digest: str
    """SHA-256 over the names and bytes of the weights files that were read."""
    identity: dict[str, Any] = field(default_factory=dict, repr=False)
    """All that its results depend on, by name: `identity.base_identity`."""
    zero_empty_prompt: bool = False
    """SDXL: a sampling pipeline without a negative prompt guides away from zeros, not from the empty prompt."""
    _empty: Encoded | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def prediction_type(self) -> str:
        """epsilon or v_prediction."""
        return self.noise_scheduler.config["prediction_type"]

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures that the U-Net was made for."""
        size = self.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.family.vae_factor, width * self.family.vae_factor

    @torch.no_grad()
    def posterior(self, pixel_values: Tensor) -> Any:
        """(B, 3, H, W) in [-1, 1] -> the VAE's posterior over latents before scaling, with `mean` and `std`."""
        pixel_values = pixel_values.to(self.vae.device, self.vae.dtype)
        return self.vae.encode(for_convolutions(pixel_values)).latent_dist

    @torch.no_grad()
    def encode_latents(self, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, H/8, W/8) in the base's dtype.

        `noise`, a standard normal of the latents' shape, draws from the posterior: mean + std * noise. Without it the
        result is the posterior's mode. The noise is an argument so that the caller decides on whose seed it depends.
        """
        posterior = self.posterior(pixel_values)
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return ((latents - self._shift) * self.vae.config["scaling_factor"]).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixel values (B, 3, 8h, 8w) about [-1, 1], not clipped, in the VAE's dtype."""
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config["scaling_factor"] + self._shift
        return self.vae.decode(for_convolutions(latents)).sample

    def empty_prompt(self, encode: Callable[["Base", list[str]], Encoded]) -> Encoded:
        """The encoding of "" with one row; computed once by `encode`, then kept."""
        if self._empty is None:
            with torch.inference_mode(False):  # an inference tensor, kept, would break the next training step
                self._empty = encode(self, [""])
        return self._empty

    @property
    def _shift(self) -> float:
        return self.vae.config["shift_factor"] or 0.0


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The dtype for a VAE under a base of `dtype`: float32 where half precision overflows, as SDXL's VAE does."""
    return torch.float32 if dtype == torch.float16 and config.get("force_upcast", True) else dtype


def _check_numbers(vae: Mapping[str, Any], unet: Mapping[str, Any], where: Path) -> None:
    """Raises ValueError where a configuration holds no number where one is reckoned with, which no shape tells."""
    scaling, shift, size = vae["scaling_factor"], vae.get("shift_factor"), unet["sample_size"]
    if not _is_number(scaling) or scaling <= 0:
        raise UserError(f"{where}: the VAE's scaling_factor is {scaling!r}, and a number above 0 belongs there")
    if shift is not None and not _is_number(shift):
        raise UserError(f"{where}: the VAE's shift_factor is {shift!r}, and a number or null belongs there")
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"{where}: the U-Net's sample_size is {size!r}, and a size of latents belongs there")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_parts_fit(base: Base) -> None:
    """Raises ValueError where the parts of a folder are of different models, which would fail inside the first step."""
    vae, unet, where = base.vae.config, base.unet.config, base.path
    _check_numbers(vae, unet, where)
    if vae["latent_channels"] != unet["in_channels"]:
        raise UserError(
            f"{where}: the VAE has {vae['latent_channels']} latent channels and the U-Net takes {unet['in_channels']}"
        )
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if factor != base.family.vae_factor:
        raise UserError(f"{where}: the VAE's factor is {factor}; {base.family.title} has {base.family.vae_factor}")
    if vae.get("latents_mean") is not None:
        raise UserError(f"{where}: the VAE's latents_mean (Playground's normalisation) is not supported")
    if base.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"{where}: prediction_type {base.prediction_type!r} is neither epsilon nor v_prediction")
    width = sum(encoder.config.hidden_size for encoder in base.text_encoders)
    if width != unet["cross_attention_dim"]:
        raise UserError(
            f"{where}: the text encoders give {width} features, the U-Net's cross_attention_dim is "
            f"{unet['cross_attention_dim']}"
        )
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders, strict=True):
        positions, words = encoder.config.max_position_embeddings, encoder.config.vocab_size
        if tokenizer.model_max_length > positions:
            raise UserError(
                f"{where}: the tokenizer's model_max_length is {tokenizer.model_max_length}, but the text encoder has "
                f"{positions} positions. Set model_max_length to {positions} in tokenizer_config.json."
            )
        if len(tokenizer) > words:
            raise UserError(f"{where}: the tokenizer has {len(tokenizer)} tokens and the text encoder {words}")
