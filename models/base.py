"""A base model as the rest of the system sees it: frozen modules, and pictures to latents and back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlbooth.data.errors import UserError
from controlbooth.models.families import Family
from controlbooth.models.noise.process import Process

Encoded = tuple[Tensor, Tensor | None]
"""Hidden states (B, L, D) and the pooled embedding (B, P), or None where the family has none."""


def for_convolutions(pictures: Tensor) -> Tensor:
    """Returns the same pictures (B, C, H, W) in the memory layout in which a convolutional network is fastest.

    On a CPU that is channels last: all of a VAE's tensors then have that layout, and encoding 128 px takes half of the
    time in fp32 and two thirds in bf16. A U-Net gains nothing, because its attention needs another layout. On a GPU
    this is not measured yet, and pictures stay as they are.
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
    """A CLIPTextModel; of SDXL also a CLIPTextModelWithProjection; of SD3 two of these, and a T5EncoderModel where the
    run has it; of FLUX.1 a CLIPTextModel and a T5EncoderModel."""
    tokenizers: tuple[Any, ...]
    denoiser: Any
    """The network that is controlled: a UNet2DConditionModel, SD3Transformer2DModel or FluxTransformer2DModel."""
    process: Process
    """How it was trained to denoise."""
    digest: str
    """SHA-256 over the names and bytes of the weights files that were read."""
    identity: dict[str, Any] = field(default_factory=dict, repr=False)
    """All that its results depend on, by name: `identity.base_identity`."""
    text_tokens: int = 0
    """Of T5, to which prompts are filled up or cut; 0 where the family has none."""
    zero_empty_prompt: bool = False
    """SDXL: a sampling pipeline without a negative prompt guides away from zeros, not from the empty prompt."""
    text_by_row: bool = False
    """Whether each row of prompts is read by text encoders of its own, as adapters of many subjects make it: what is
    read in one row, such as the empty prompt, then holds for no other."""
    _empty: Encoded | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def prediction_type(self) -> str:
        """Returns epsilon, v_prediction or flow."""
        return self.process.prediction_type

    @property
    def picture_size(self) -> tuple[int, int]:
        """Returns height and width in pixels of the pictures that the denoiser was made for."""
        size = self.denoiser.config.get("sample_size", 128)  # FLUX.1 names none, and was made for 1024 pixels
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.family.vae_factor, width * self.family.vae_factor

    @property
    def latent_channels(self) -> int:
        """Returns the number of channels of the VAE's latents."""
        return int(self.vae.config["latent_channels"])

    @property
    def pixel_multiple(self) -> int:
        """Returns how many pixels a picture's sides must be multiples of, so that latents can be halved or packed."""
        config = self.denoiser.config
        if self.family.is_transformer:
            return self.family.vae_factor * (config["patch_size"] if "sample_size" in config else 2)
        return self.family.vae_factor * 2 ** (len(config["block_out_channels"]) - 1)

    @torch.no_grad()
    def posterior(self, pixel_values: Tensor) -> Any:
        """Encodes pixels (B, 3, H, W) in [-1, 1] as the VAE's posterior of unscaled latents, with `mean` and `std`."""
        pixel_values = pixel_values.to(self.vae.device, self.vae.dtype)
        return self.vae.encode(for_convolutions(pixel_values)).latent_dist

    @torch.no_grad()
    def encode_latents(self, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encodes pixel values (B, 3, H, W) in [-1, 1] as scaled latents (B, C, H/8, W/8) in the base's dtype.

        `noise`, a standard normal of the latents' shape, draws from the posterior: mean + std * noise. Without it the
        result is the posterior's mode. The noise is an argument so that the caller decides on whose seed it depends.
        """
        posterior = self.posterior(pixel_values)
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return self.scaled(latents)

    def scaled(self, latents: Tensor, shifted: bool = True) -> Tensor:
        """Scales the VAE's latents to those that the network is trained on, in the base's dtype.

        shifted: whether `latent_shift` is subtracted before.
        """
        shift = self.latent_shift if shifted else 0.0
        return ((latents - shift) * self.vae.config["scaling_factor"]).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents (B, C, h, w) to pixels (B, 3, 8h, 8w) about [-1, 1], unclipped, in the VAE's dtype."""
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config["scaling_factor"] + self.latent_shift
        return self.vae.decode(for_convolutions(latents)).sample

    def empty_prompt(self, encode: Callable[["Base", list[str]], Encoded]) -> Encoded:
        """Returns the encoding of "" with one row; `encode` computes it at the first call, and it is then kept."""
        if self._empty is None:
            with torch.inference_mode(False):  # an inference tensor, kept, would break the next training step
                self._empty = encode(self, [""])
        return self._empty

    @property
    def latent_shift(self) -> float:
        """Returns what is subtracted from latents before they are scaled; 0 except for SD3 and FLUX.1."""
        return self.vae.config["shift_factor"] or 0.0


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype for a VAE under a base of `dtype`: float32 where half precision overflows, as SDXL's VAE does.

    config: the VAE's. Its force_upcast says whether half precision overflows; where it is left out it counts as true.
    """
    return torch.float32 if dtype == torch.float16 and config.get("force_upcast", True) else dtype


def _check_numbers(vae: Mapping[str, Any], denoiser: Mapping[str, Any], network: str, where: Path) -> None:
    """Raises ValueError if a scaling_factor, shift_factor or sample_size is not a number that can be computed with.

    The shapes of the weights do not show such a fault, so it would otherwise go unnoticed.
    """
    scaling, shift, size = vae["scaling_factor"], vae.get("shift_factor"), denoiser.get("sample_size", 128)
    if not _is_number(scaling) or scaling <= 0:
        raise UserError(f"{where}: the VAE's scaling_factor is {scaling!r}, and a number above 0 belongs there")
    if shift is not None and not _is_number(shift):
        raise UserError(f"{where}: the VAE's shift_factor is {shift!r}, and a number or null belongs there")
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"{where}: the {network}'s sample_size is {size!r}, and a size of latents belongs there")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_parts_fit(base: Base) -> None:
    """Raises ValueError where the parts of a folder are of different models, which would fail inside the first step."""
    vae, denoiser, where = base.vae.config, base.denoiser.config, base.path
    name = "transformer" if base.family.is_transformer else "U-Net"
    _check_numbers(vae, denoiser, name, where)
    channels = denoiser["in_channels"] // (4 if base.family.packs_latents else 1)
    if vae["latent_channels"] != channels:
        raise UserError(
            f"{where}: the VAE has {vae['latent_channels']} latent channels and the {name} takes {channels}"
        )
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if factor != base.family.vae_factor:
        raise UserError(f"{where}: the VAE's factor is {factor}; {base.family.title} has {base.family.vae_factor}")
    if vae.get("latents_mean") is not None:
        raise UserError(f"{where}: the VAE's latents_mean (Playground's normalisation) is not supported")
    _check_texts_fit(base)
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders, strict=True):
        positions, words = getattr(encoder.config, "max_position_embeddings", None), encoder.config.vocab_size
        if positions is not None and tokenizer.model_max_length > positions:
            raise UserError(
                f"{where}: the tokenizer's model_max_length is {tokenizer.model_max_length}, but the text encoder has "
                f"{positions} positions. Set model_max_length to {positions} in tokenizer_config.json."
            )
        if len(tokenizer) > words:
            raise UserError(f"{where}: the tokenizer has {len(tokenizer)} tokens and the text encoder {words}")


def _check_texts_fit(base: Base) -> None:
    """Raises ValueError where what the text encoders give is not what the denoiser takes."""
    denoiser, where = base.denoiser.config, base.path
    clips = [encoder for encoder in base.text_encoders if encoder.config.model_type != "t5"]
    if not base.family.is_transformer:
        width = sum(encoder.config.hidden_size for encoder in base.text_encoders)
        if width != denoiser["cross_attention_dim"]:
            raise UserError(
                f"{where}: the text encoders give {width} features, the U-Net's cross_attention_dim is "
                f"{denoiser['cross_attention_dim']}"
            )
        return
    pools = [
        encoder.config.projection_dim if "Projection" in type(encoder).__name__ else encoder.config.hidden_size
        for encoder in clips
    ]
    if sum(pools) != denoiser["pooled_projection_dim"]:
        raise UserError(
            f"{where}: the CLIP text encoders pool {sum(pools)} features, and the transformer's pooled_projection_dim "
            f"is {denoiser['pooled_projection_dim']}"
        )
    joint = denoiser["joint_attention_dim"]
    for encoder in base.text_encoders:
        if encoder.config.model_type == "t5" and encoder.config.d_model != joint:
            raise UserError(
                f"{where}: T5 gives {encoder.config.d_model} features, and the transformer's joint_attention_dim is "
                f"{joint}"
            )
    if base.family.name == "miniature-dit" and clips[0].config.hidden_size != joint:
        raise UserError(
            f"{where}: the text encoder gives {clips[0].config.hidden_size} features, and the transformer's "
            f"joint_attention_dim is {joint}"
        )
    if base.family.name == "sd3" and sum(encoder.config.hidden_size for encoder in clips) > joint:
        raise UserError(f"{where}: the CLIP text encoders give more features than joint_attention_dim={joint}")
