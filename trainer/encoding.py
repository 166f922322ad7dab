"""What the frozen encoders make of a micro-batch, computed here or taken from the latent cache; and what it depends on.

The same arithmetic serves both, so that a run with a latent cache takes the steps of one without. What it cannot make
equal is the rounding of another batch: kernels are chosen by size, so a picture that is encoded alone has other last
bits than among others, while its place and its neighbours change nothing. So both encode batches of exactly
micro_batch_size, filled up where there is less, and what else decides on kernels (`computed_here`) is kept in the
latent cache."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from controlbooth.data.condition_names import Values
from controlbooth.data.shards.latent_cache import CONDITION, EncodedBatch
from controlbooth.models.base import Base, Encoded
from controlbooth.models.identity import libraries, module_digest, tokenizer_digest
from controlbooth.models.text import TEXT_ENCODINGS, TextEncoding, with_rest
from controlbooth.trainer.config.run import RunConfig

IDENTITY_VERSION = 2


@torch.no_grad()
def encode_posterior(base: Base, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes pictures: (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the VAE's posterior, (B, C, h, w) in
    its dtype."""
    posterior = base.posterior(pixel_values)
    return posterior.mean, posterior.std


@torch.no_grad()
def sample_posterior(base: Base, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Draws scaled latents (B, C, h, w) in the base's dtype from the posterior. noise: (B, C, h, w) standard normal."""
    latents = mean + std * noise.to(mean)
    # Some of the VAE's kernels leave channels last, and a U-Net that went on so would round otherwise than on a cache.
    return base.scaled(latents).contiguous()


def to_pixel_values(pictures: Tensor) -> Tensor:
    """Converts pictures: (B, 3, H, W) uint8 -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1.0


def to_conditioning(conditions: Tensor) -> Tensor:
    """Converts conditions: (B, 3, H, W) uint8 -> float32 in [0, 1]."""
    return conditions.float() / 255.0


def encode_captions(base: Base, captions: list[str]) -> Encoded:
    """Encodes captions: returns hidden states (B, L, D), and pooled embeddings (B, P), or None if the base has none."""
    return TEXT_ENCODINGS[base.family.name](base, captions)


def encode_kept(base: Base, captions: list[str]) -> Encoded | None:
    """Encodes those captions that are not empty, in a batch as large as that of all; returns None if all are empty."""
    kept = [caption for caption in captions if caption]
    return encode_batch(base, kept, len(captions)) if kept else None


def encode_batch(base: Base, captions: list[str], batch: int) -> Encoded:
    """Encodes K captions in a batch of size `batch`, filled up with the last of them. Returns hidden states (K, L, D),
    and pooled embeddings (K, P) or None."""
    hidden_states, pooled = encode_captions(base, captions + captions[-1:] * (batch - len(captions)))
    return hidden_states[: len(captions)], None if pooled is None else pooled[: len(captions)]


def with_empty_prompts(
    base: Base, captions: list[str], encoded: Encoded | None, picture_size: tuple[int, int]
) -> TextEncoding:
    """Builds the encoding of all captions from that of those which are not empty; "" is encoded once and kept on the
    base.

    encoded: None where all are empty. picture_size: height and width in pixels.
    """
    kept = [row for row, caption in enumerate(captions) if caption]
    empty_states, empty_pooled = base.empty_prompt(TEXT_ENCODINGS[base.family.name])
    hidden_states = empty_states.repeat(len(captions), 1, 1)
    pooled = None if empty_pooled is None else empty_pooled.repeat(len(captions), 1)
    if encoded is not None:
        hidden_states[kept] = encoded[0]
        if pooled is not None and encoded[1] is not None:
            pooled[kept] = encoded[1]
    return with_rest(base, hidden_states, pooled, picture_size)


def posterior_of(encoded: EncodedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copies the cached mean and standard deviation (B, C, h, w) to the device, in the dtype in which they were
    computed."""
    return as_tensor(encoded.mean, encoded.latents_dtype, device), as_tensor(encoded.std, encoded.latents_dtype, device)


def condition_of(encoded: EncodedBatch, device: torch.device) -> Tensor | None:
    """Copies the cached mean of the conditions' posterior (B, C, h, w) to the device; None where there is none."""
    return None if encoded.condition is None else as_tensor(encoded.condition, encoded.latents_dtype, device)


def captions_of(encoded: EncodedBatch, device: torch.device) -> Encoded | None:
    if encoded.hidden_states is None:
        return None
    pooled = None if encoded.pooled is None else as_tensor(encoded.pooled, encoded.text_dtype, device)
    return as_tensor(encoded.hidden_states, encoded.text_dtype, device), pooled


def as_tensor(array: np.ndarray, dtype: str, device: torch.device) -> Tensor:
    """Copies an array of the latent cache to the device; bfloat16 is read from its bits."""
    tensor = torch.from_numpy(array)
    return (tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor).to(device, non_blocking=True)


def as_array(tensor: Tensor) -> np.ndarray:
    """Converts a tensor to an array of the latent cache, the inverse of `as_tensor`."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def dtype_name(module: Any) -> str:
    return str(module.dtype).removeprefix("torch.")


def latent_cache_identities(
    config: RunConfig, base: Base, shapes: tuple[tuple[int, int], ...], values: Values | None = None
) -> dict[str, dict[str, Any]]:
    """Returns what the run's latent cache depends on, for each kind of cache shard.

    shapes: (height, width) in pixels of the pictures of each bucket. values: what the condition is resized as; None
    where the ControlNet reads pixels, and the cache holds nothing of conditions.
    """
    latents = {
        "version": IDENTITY_VERSION,
        "vae": module_digest(base.vae),
        "dtype": dtype_name(base.vae),
        "shapes": [list(shape) for shape in shapes],
        "crop": "centre",
        "flips": config.data.random_flip,
    }
    name = config.data.condition
    return {
        "latents": latents,
        "text": {
            "version": IDENTITY_VERSION,
            "text_encoders": [module_digest(encoder) for encoder in base.text_encoders],
            "tokenizers": [tokenizer_digest(tokenizer) for tokenizer in base.tokenizers],
            "dtype": dtype_name(base.text_encoders[0]),
            "pooled": base.empty_prompt(TEXT_ENCODINGS[base.family.name])[1] is not None,
            **({"text_tokens": base.text_tokens} if base.text_tokens else {}),
        },
        **({} if values is None else {f"{CONDITION}{name}": latents | {"condition": name, "values": values}}),
    }


def computed_here(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Returns what decides how sums are rounded, as far as it is known: where these facts are equal, a latent cache
    holds exactly what would be computed here."""
    cuda = device.type == "cuda"
    return {
        "batch": config.micro_batch_size,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": 0 if cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: version for name, version in libraries().items() if name in ("diffusers", "transformers")},
    }
