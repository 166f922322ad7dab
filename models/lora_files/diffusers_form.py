"""LoRAs by the names of diffusers' load_lora_weights: `unet.a.b.lora_A.weight`, `transformer.a.b.lora_B.weight`.

The tensors have no alphas: without one diffusers and ComfyUI take the rank, and diffusers refuses SD3's files with one.
Where alpha is another number, B is scaled instead.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from controlbooth.data.errors import UserError
from controlbooth.models.lora_files.layers import Lora, checked_layer
from controlbooth.models.lora_files.text_names import is_clip_layer, refuse

SETTINGS = "lora_adapter_metadata"
"""In the header of files that diffusers has written: JSON with peft's settings, such as unet.lora_alpha."""


def to_diffusers(lora: Lora) -> dict[str, Tensor]:
    """Returns the tensors of a file in diffusers' form.

    Raises ValueError for a layer that its loaders pass over: T5's, and of CLIP all but the layers of its blocks.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.items():
        if name.startswith("text_encoder") and not is_clip_layer(name):
            raise refuse(name, "diffusers")
        scale = layer.alpha / layer.rank
        tensors[f"{name}.lora_A.weight"] = layer.down
        tensors[f"{name}.lora_B.weight"] = layer.up if scale == 1.0 else layer.up * scale
    return tensors


def from_diffusers(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Lora:
    """Reads the tensors of such a file. header: what safetensors' metadata says.

    An alpha is taken from a layer's `.alpha`, else from peft's settings in the header; else it is the rank. Raises
    ValueError for tensors that are no part of a LoRA in this form.
    """
    tensors = dict(tensors)
    settings: dict[str, Any] = json.loads((header or {}).get(SETTINGS, "{}"))
    lora: Lora = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        down, up = tensors.pop(key), tensors.pop(f"{name}.lora_B.weight", None)
        if up is None:
            raise UserError(f"{name} has a lora_A and no lora_B: the file is incomplete")
        stored = tensors.pop(f"{name}.alpha", None)
        alpha = float(stored) if stored is not None else _alpha_of(name, settings, len(down))
        lora[_with_text_model(name)] = checked_layer(name, down, up, alpha)
    if tensors or not lora:
        what = f"{sorted(tensors)[0]} is no part of one" if tensors else "it has no lora_A"
        raise UserError(f"this is no LoRA in diffusers' form: {what}")
    return lora


def _with_text_model(name: str) -> str:
    return re.sub(r"^(text_encoder(?:_2)?)\.encoder\.layers\.", r"\1.text_model.encoder.layers.", name)


def _alpha_of(name: str, settings: Mapping[str, Any], rank: int) -> float:
    """Returns the alpha that peft's settings give a layer: by a pattern of its name, or that of all layers."""
    folder, _, inner = name.partition(".")
    for pattern, alpha in settings.get(f"{folder}.alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", inner):
            return float(alpha)
    return float(settings.get(f"{folder}.lora_alpha", rank))
