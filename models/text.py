"""How a family's prompts become what its U-Net reads; families.py tells what adding a family takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from controlbooth.data.errors import UserError

if TYPE_CHECKING:
    from controlbooth.models.base import Base


@dataclass(frozen=True)
class TextEncoding:
    """What a prompt becomes, on the base's device."""

    encoder_hidden_states: Tensor
    """(B, L, D) in the base's dtype: one vector a token, read by cross-attention."""
    added_cond_kwargs: dict[str, Tensor] = field(default_factory=dict)
    """SDXL: text_embeds (B, P), the pooled embedding, and time_ids (B, 6) float32, see `time_ids_of`. Transformers:
    pooled_projections (B, P), and of FLUX.1 guidance (B,) float32. Others: empty."""


def encode_prompts(
    base: "Base",
    prompts: Sequence[str],
    *,
    picture_size: tuple[int, int] | None = None,
    original_sizes: Tensor | None = None,
    crops: Tensor | None = None,
) -> TextEncoding:
    """Sends every prompt, empty ones too, through the text encoder. Prompts are cut at the tokenizer's length.

    picture_size (height, width) of the picture in pixels, original_sizes (B, 2) before resizing and crops (B, 2), top
    and left, are read by SDXL only, which is conditioned on them; other families ignore them. See `time_ids_of`.
    """
    hidden_states, pooled = TEXT_ENCODINGS[base.family.name](base, list(prompts))
    return with_rest(base, hidden_states, pooled, picture_size, original_sizes, crops)


def encode_with_dropout(
    base: "Base",
    captions: Sequence[str],
    *,
    picture_size: tuple[int, int] | None = None,
    original_sizes: Tensor | None = None,
    crops: Tensor | None = None,
    guidance: float | None = None,
) -> TextEncoding:
    """Encodes captions as `encode_prompts` does, at the price of the non-empty ones.

    A dropped prompt is the empty string. Half of a ControlNet's prompts are, so its embedding is computed once and kept
    on the base. Sizes are as in `encode_prompts`. guidance: the number that FLUX.1 is given; by default the one that it
    is trained with.
    """
    if base.text_by_row:
        hidden_states, pooled = TEXT_ENCODINGS[base.family.name](base, list(captions))
        return with_rest(base, hidden_states, pooled, picture_size, original_sizes, crops, guidance)
    kept = [row for row, caption in enumerate(captions) if caption]
    empty_states, empty_pooled = base.empty_prompt(TEXT_ENCODINGS[base.family.name])
    hidden_states = empty_states.repeat(len(captions), 1, 1)
    pooled = None if empty_pooled is None else empty_pooled.repeat(len(captions), 1)
    if kept:
        kept_states, kept_pooled = TEXT_ENCODINGS[base.family.name](base, [captions[row] for row in kept])
        hidden_states[kept] = kept_states
        if pooled is not None:
            pooled[kept] = kept_pooled
    return with_rest(base, hidden_states, pooled, picture_size, original_sizes, crops, guidance)


def time_ids_of(
    count: int,
    picture_size: tuple[int, int],
    original_sizes: Tensor | None = None,
    crops: Tensor | None = None,
) -> Tensor:
    """Returns SDXL's size conditioning (arXiv 2307.01952, section 2.2), (count, 6) float32, in pixels.

    Of each sample it is original height and width, the crop's top and left, and target height and width. Without
    original_sizes (count, 2) the picture was not resized, without crops (count, 2) it was not cropped. Raises
    ValueError for other shapes.
    """
    target = torch.tensor(picture_size, dtype=torch.float32).repeat(count, 1)
    originals = target if original_sizes is None else original_sizes.to("cpu", torch.float32)
    corners = torch.zeros(count, 2) if crops is None else crops.to("cpu", torch.float32)
    for name, tensor in (("original_sizes", originals), ("crops", corners)):
        if tensor.shape != (count, 2):
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, but {count} prompts need ({count}, 2)")
    return torch.cat([originals, corners, target], dim=1)


def with_rest(
    base: "Base",
    hidden_states: Tensor,
    pooled: Tensor | None,
    picture_size: tuple[int, int] | None,
    original_sizes: Tensor | None = None,
    crops: Tensor | None = None,
    guidance: float | None = None,
) -> TextEncoding:
    """Adds the other inputs of a family's network to the encoded text: see TextEncoding.added_cond_kwargs.

    Raises ValueError for SDXL without picture_size.
    """
    if pooled is None:
        return TextEncoding(hidden_states)
    if base.family.is_transformer:
        added = {"pooled_projections": pooled}
        if base.family.embeds_guidance:
            told = base.process.settings.embedded_guidance if guidance is None else guidance  # type: ignore[union-attr]
            added["guidance"] = torch.full((len(pooled),), told, dtype=torch.float32, device=pooled.device)
        return TextEncoding(hidden_states, added)
    if picture_size is None:
        raise UserError(
            f"{base.family.title} is conditioned on the size of the picture: "
            "give picture_size=(height, width) in pixels with the prompts."
        )
    time_ids = time_ids_of(len(hidden_states), picture_size, original_sizes, crops)
    time_ids = time_ids.to(hidden_states.device)  # not in half precision: bf16 has no 1001
    return TextEncoding(hidden_states, {"text_embeds": pooled, "time_ids": time_ids})


def _tokens(base: "Base", index: int, prompts: list[str]) -> Tensor:
    """Tokenizes prompts: (B, L) int64 on the base's device, padded and cut to the tokenizer's model_max_length."""
    tokenizer = base.tokenizers[index]
    encoded = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids.to(base.device)


def _last_layer(base: "Base", prompts: list[str]) -> tuple[Tensor, None]:
    """Encodes prompts for SD1.5, SD2.1 and the miniature: the encoder's last layer, normalised, (B, L, D), and None."""
    return base.text_encoders[0](_tokens(base, 0, prompts)).last_hidden_state, None


def _two_encoders(base: "Base", prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Encodes prompts for SDXL: hidden states (B, L, D1 + D2), and the second encoder's pooled embedding (B, P).

    The hidden states are the penultimate layers of both encoders side by side.
    """
    outputs = [
        encoder(_tokens(base, index, prompts), output_hidden_states=True)
        for index, encoder in enumerate(base.text_encoders)
    ]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds


def _t5(base: "Base", index: int, prompts: list[str]) -> Tensor:
    """Returns T5's last layer, (B, base.text_tokens, D). Padding tokens are not masked, as in the pipelines."""
    encoded = base.tokenizers[index](
        prompts, padding="max_length", max_length=base.text_tokens, truncation=True, return_tensors="pt"
    )
    return base.text_encoders[index](encoded.input_ids.to(base.device))[0]


def _three_encoders(base: "Base", prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Encodes prompts for SD3: hidden states (B, L + T, D), and both pooled projections (B, P1 + P2).

    The hidden states are the penultimate layers of two CLIPs side by side, padded with zeros to T5's width, followed by
    T5's states, or by zeros where the run has no T5.
    """
    outputs = [
        encoder(_tokens(base, index, prompts), output_hidden_states=True)
        for index, encoder in enumerate(base.text_encoders[:2])
    ]
    clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
    width = int(base.denoiser.config["joint_attention_dim"])
    if len(base.text_encoders) == 3:
        long = _t5(base, 2, prompts)
    else:
        long = clip.new_zeros(len(prompts), base.text_tokens, width)
    clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
    return torch.cat([clip, long], dim=-2), pooled


def _clip_and_t5(base: "Base", prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Encodes prompts for FLUX.1: T5's states (B, T, D), and CLIP's pooled output (B, P)."""
    return _t5(base, 1, prompts), base.text_encoders[0](_tokens(base, 0, prompts)).pooler_output


def _one_encoder_pooled(base: "Base", prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Encodes prompts for the miniature with a transformer: the last layer (B, L, D) and the pooled state (B, D).

    The last layer is normalised.
    """
    read = base.text_encoders[0](_tokens(base, 0, prompts))
    return read.last_hidden_state, read.pooler_output


TEXT_ENCODINGS = {
    "sd15": _last_layer,
    "sd21": _last_layer,
    "miniature": _last_layer,
    "sdxl": _two_encoders,
    "sd3": _three_encoders,
    "flux": _clip_and_t5,
    "miniature-dit": _one_encoder_pooled,
}
"""Family name -> (base, prompts) -> hidden states (B, L, D) and pooled embedding (B, P) or None."""
