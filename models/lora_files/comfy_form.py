"""LoRAs by the names that ComfyUI saves itself: the authors' layer after `diffusion_model.`, with its dots.

`diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight`, and of text encoders
`text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight`. ComfyUI reads these
for every family, kohya's names too, and diffusers' of transformers and text encoders; of U-Nets in diffusers' form it
passes over the attention.
"""

from collections.abc import Mapping

from torch import Tensor

from controlbooth.models.lora_files.layers import Lora, Shapes
from controlbooth.models.lora_files.named_layers import from_named, to_named
from controlbooth.models.lora_files.original_names import Original, original_layers
from controlbooth.models.lora_files.text_names import comfy_prefixes, is_text_layer, refuse_form


def comfy_layers(family: str, shapes: Shapes) -> list[Original]:
    """Returns the layers that ComfyUI's form names, for the base of these shapes."""
    rows = [Original(f"diffusion_model.{row.name}", row.parts, row.swapped) for row in original_layers(family, shapes)]
    for folder, prefix in comfy_prefixes(family).items():
        own = [name for name in shapes if name.startswith(f"{folder}.") and is_text_layer(name)]
        rows += [Original(f"{prefix}.{name.removeprefix(f'{folder}.')}", (name,)) for name in own]
    return rows


def to_comfy(lora: Lora, family: str, shapes: Shapes) -> dict[str, Tensor]:
    """Returns the tensors of a file in ComfyUI's form. Raises ValueError for a layer or base that it has no name
    for."""
    refuse_form("comfy", family)
    return to_named(lora, comfy_layers(family, shapes), shapes, "comfy")


def from_comfy(tensors: Mapping[str, Tensor], family: str, shapes: Shapes) -> Lora:
    """Reads the tensors of a file in ComfyUI's form. Raises ValueError for what is of no layer of this base."""
    refuse_form("comfy", family)
    return from_named(tensors, comfy_layers(family, shapes), shapes, "comfy")
