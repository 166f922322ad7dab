"""What differs between base models: how a family is recognised, and how its prompts become what the U-Net reads.

Adding a family: an Architecture where single files are to be read, one entry in FAMILIES, one branch in `identify`, and
a text encoding in TEXT_ENCODINGS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from controlbooth.models import architectures

if TYPE_CHECKING:
    from controlbooth.models.base import Base


@dataclass(frozen=True)
class Family:
    name: str
    title: str
    text_encoder_count: int
    prediction_type: str
    """What the family's published base predicts; a folder's own scheduler configuration overrules it."""
    architecture: architectures.Architecture | None
    """Module configurations for single files; None: the family exists only as folders, which bring their own."""
    vae_factor: int = 8
    """Pixels of a picture per latent position, on each side."""


FAMILIES = {
    family.name: family
    for family in (
        Family("sd15", "Stable Diffusion 1.x", 1, "epsilon", architectures.SD15),
        Family("sd21", "Stable Diffusion 2.x", 1, "v_prediction", architectures.SD21),
        Family("sdxl", "Stable Diffusion XL", 2, "epsilon", architectures.SDXL),
        Family("miniature", "the miniature shipped with controlbooth", 1, "v_prediction", None),
    )
}

_SUPPORTED = "Supported bases: " + ", ".join(f"{family.title} ({name})" for name, family in FAMILIES.items()) + "."


def identify(config_or_shapes: Mapping[str, Any]) -> Family:
    """The family of a base.

    Takes either a diffusers U-Net configuration (unet/config.json) or, of a single file, a mapping of tensor names to
    shapes. Only what makes a family is looked at, never its sizes, so that a small test model is recognised too.
    Raises ValueError for a model that is no base of a known family; the message says what it is.
    """
    if any("." in key for key in config_or_shapes):
        return _identify_single_file(config_or_shapes)
    return _identify_unet_config(config_or_shapes)


def check_family(requested: str, found: Family, where: str) -> Family:
    """`requested` ("auto" or a family's name) against what was found at `where`. Raises ValueError if they differ."""
    if requested != "auto" and requested not in FAMILIES:
        raise ValueError(f"family {requested!r} is not known. Use auto, {', '.join(FAMILIES)}.")
    if requested not in ("auto", found.name):
        raise ValueError(
            f"family is {requested!r} ({FAMILIES[requested].title}), but {where} holds {found.title}. "
            f"Use family {found.name!r} or 'auto', or give another base."
        )
    return found


def _identify_unet_config(config: Mapping[str, Any]) -> Family:
    class_name = config.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        raise ValueError(f"the base's denoiser is a {class_name}, not a UNet2DConditionModel. {_SUPPORTED}")
    in_channels, out_channels = config.get("in_channels", 4), config.get("out_channels", 4)
    if in_channels != out_channels:
        kind = {9: "an inpainting model", 8: "an instruction-editing model"}.get(in_channels, "no text-to-image model")
        raise ValueError(
            f"the U-Net takes {in_channels} channels and predicts {out_channels}: {kind}. "
            f"Give the text-to-image base that it was made from. {_SUPPORTED}"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim"):
        if config.get(key) is not None:
            raise ValueError(
                f"the U-Net's {key} is {config[key]!r}, which no supported family has "
                f"(an upscaler, a distilled or an image-conditioned model). {_SUPPORTED}"
            )
    addition = config.get("addition_embed_type")
    if addition == "text_time":
        if config.get("projection_class_embeddings_input_dim") == 2560:  # 4 sizes and a score; the base has 6 sizes
            raise ValueError("this is the SDXL refiner. Give the SDXL base, or a model made from it.")
        return FAMILIES["sdxl"]
    if addition == "text":
        return FAMILIES["miniature"]
    if addition is not None:
        raise ValueError(f"the U-Net's addition_embed_type {addition!r} belongs to no supported family. {_SUPPORTED}")
    return FAMILIES["sd21" if config.get("use_linear_projection") else "sd15"]


_FOREIGN_KEYS = (  # part of a key -> what such a file is
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux or a relative of it"),
    ("double_stream_blocks.", "a diffusion transformer"),
    ("patchify_proj.", "a video model"),
    ("control_model.", "a ControlNet, not a base model: give it as model.controlnet"),
    ("controlnet_cond_embedding.", "a ControlNet, not a base model: give it as model.controlnet"),
    ("lora_", "a LoRA, not a base model"),
    ("down_blocks.", "a single module in diffusers' layout: give the folder that holds unet/, vae/ and text_encoder/"),
)


def _identify_single_file(shapes: Mapping[str, Any]) -> Family:
    for part, kind in _FOREIGN_KEYS:
        if any(part in key for key in shapes):
            raise ValueError(f"this file is {kind}. {_SUPPORTED}")
    entry = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    if entry is None:
        raise ValueError(
            "this file has no model.diffusion_model.input_blocks.0.0.weight, so it is no whole Stable Diffusion "
            f"checkpoint in the original layout. {_SUPPORTED}"
        )
    if entry[1] != 4:
        kind = "an inpainting model" if entry[1] == 9 else "not a text-to-image model"
        raise ValueError(f"the U-Net of this file takes {entry[1]} channels: {kind}. {_SUPPORTED}")
    prefixes = {
        "conditioner.embedders.1.model.": "sdxl",
        "cond_stage_model.model.": "sd21",
        "cond_stage_model.transformer.": "sd15",
    }
    for prefix, name in prefixes.items():
        if any(key.startswith(prefix) for key in shapes):
            return FAMILIES[name]
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        raise ValueError("this file is the SDXL refiner. Give the SDXL base, or a model made from it.")
    raise ValueError(
        "this file holds no text encoder (none of " + ", ".join(f"{prefix}*" for prefix in prefixes) + "). "
        "Give a whole checkpoint, or a diffusers folder."
    )


@dataclass(frozen=True)
class TextEncoding:
    """What a prompt becomes, on the base's device."""

    encoder_hidden_states: Tensor
    """(B, L, D) in the base's dtype: one vector a token, read by cross-attention."""
    added_cond_kwargs: dict[str, Tensor] = field(default_factory=dict)
    """SDXL: text_embeds (B, P), the pooled embedding, and time_ids (B, 6) float32, see `time_ids_of`. Others: empty."""


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
    return _with_sizes(base, hidden_states, pooled, picture_size, original_sizes, crops)


def encode_with_dropout(
    base: "Base",
    captions: Sequence[str],
    *,
    picture_size: tuple[int, int] | None = None,
    original_sizes: Tensor | None = None,
    crops: Tensor | None = None,
) -> TextEncoding:
    """Captions -> the same encoding as `encode_prompts`, at the price of the non-empty ones.

    A dropped prompt is the empty string. Half of a ControlNet's prompts are, so its embedding is computed once and kept
    on the base. Sizes as in `encode_prompts`.
    """
    kept = [row for row, caption in enumerate(captions) if caption]
    empty_states, empty_pooled = base.empty_prompt(TEXT_ENCODINGS[base.family.name])
    hidden_states = empty_states.repeat(len(captions), 1, 1)
    pooled = None if empty_pooled is None else empty_pooled.repeat(len(captions), 1)
    if kept:
        kept_states, kept_pooled = TEXT_ENCODINGS[base.family.name](base, [captions[row] for row in kept])
        hidden_states[kept] = kept_states
        if pooled is not None:
            pooled[kept] = kept_pooled
    return _with_sizes(base, hidden_states, pooled, picture_size, original_sizes, crops)


def time_ids_of(
    count: int,
    picture_size: tuple[int, int],
    original_sizes: Tensor | None = None,
    crops: Tensor | None = None,
) -> Tensor:
    """SDXL's size conditioning (arXiv 2307.01952, section 2.2): (count, 6) float32, in pixels, of each sample
    original height and width, crop's top and left, and target height and width.

    Without original_sizes (count, 2) the picture was not resized, without crops (count, 2) it was not cropped.
    """
    target = torch.tensor(picture_size, dtype=torch.float32).repeat(count, 1)
    originals = target if original_sizes is None else original_sizes.to("cpu", torch.float32)
    corners = torch.zeros(count, 2) if crops is None else crops.to("cpu", torch.float32)
    for name, tensor in (("original_sizes", originals), ("crops", corners)):
        if tensor.shape != (count, 2):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {count} prompts need ({count}, 2)")
    return torch.cat([originals, corners, target], dim=1)


def _with_sizes(base, hidden_states, pooled, picture_size, original_sizes, crops) -> TextEncoding:
    if pooled is None:
        return TextEncoding(hidden_states)
    if picture_size is None:
        raise ValueError(
            f"{base.family.title} is conditioned on the size of the picture: "
            "give picture_size=(height, width) in pixels with the prompts."
        )
    time_ids = time_ids_of(len(hidden_states), picture_size, original_sizes, crops)
    time_ids = time_ids.to(hidden_states.device)  # not in half precision: bf16 has no 1001
    return TextEncoding(hidden_states, {"text_embeds": pooled, "time_ids": time_ids})


def _tokens(base: "Base", index: int, prompts: list[str]) -> Tensor:
    """(B, L) int64 on the base's device, padded and cut to the tokenizer's model_max_length."""
    tokenizer = base.tokenizers[index]
    encoded = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids.to(base.device)


def _last_layer(base: "Base", prompts: list[str]) -> tuple[Tensor, None]:
    """SD1.5, SD2.1, miniature: the encoder's last layer, normalised. (B, L, D)."""
    return base.text_encoders[0](_tokens(base, 0, prompts)).last_hidden_state, None


def _two_encoders(base: "Base", prompts: list[str]) -> tuple[Tensor, Tensor]:
    """SDXL: the penultimate layers of both encoders side by side (B, L, D1 + D2), and the second's pooled (B, P)."""
    outputs = [
        encoder(_tokens(base, index, prompts), output_hidden_states=True)
        for index, encoder in enumerate(base.text_encoders)
    ]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds


TEXT_ENCODINGS = {"sd15": _last_layer, "sd21": _last_layer, "miniature": _last_layer, "sdxl": _two_encoders}
"""Family name -> (base, prompts) -> hidden states (B, L, D) and pooled embedding (B, P) or None."""
