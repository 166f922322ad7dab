"""LoRAs by the names of kohya's sd-scripts: `lora_unet_a_b.lora_down.weight`, `.lora_up.weight` and `.alpha`.

The words are a layer's name in kohya's own network, with _ for each dot. Of Stable Diffusion 1 and 2 those are
diffusers' names; of SDXL, SD3 and FLUX.1 the authors', where q, k and v (of FLUX.1's single blocks the MLP too) are one
layer.
"""

from collections.abc import Mapping

from torch import Tensor

from controlbooth.models.families import FAMILIES
from controlbooth.models.lora_files.layers import Lora, Shapes, with_one_alpha
from controlbooth.models.lora_files.named_layers import from_named, to_named
from controlbooth.models.lora_files.original_names import Original, original_layers
from controlbooth.models.lora_files.text_names import is_text_layer, kohya_prefixes, refuse_form

BY_ORIGINAL_NAMES = ("sdxl", "sd3", "flux")


def kohya_layers(family: str, shapes: Shapes) -> list[Original]:
    """Returns the layers that kohya's form names, for the base of these shapes."""
    if family in BY_ORIGINAL_NAMES:
        denoiser = original_layers(family, shapes)
    else:
        denoiser = [Original(name.removeprefix("unet."), (name,)) for name in shapes if name.startswith("unet.")]
    rows = [Original(f"lora_unet_{_word(row.name)}", row.parts, row.swapped) for row in denoiser]
    for folder, prefix in kohya_prefixes(family).items():
        own = [name for name in shapes if name.startswith(f"{folder}.") and is_text_layer(name)]
        rows += [Original(f"{prefix}_{_word(name.removeprefix(f'{folder}.'))}", (name,)) for name in own]
    return rows


def to_kohya(lora: Lora, family: str, shapes: Shapes) -> dict[str, Tensor]:
    """Returns the tensors of a file in kohya's form. Raises ValueError for a layer or base that it has no name for.

    Of a U-Net all layers get one alpha: diffusers 0.42 finds no other alphas than the most frequent one for attention
    and text encoders, and would scale these layers wrongly without a word.
    """
    refuse_form("kohya", family)
    lora = with_one_alpha(lora) if not FAMILIES[family].is_transformer else lora
    return to_named(lora, kohya_layers(family, shapes), shapes, "kohya")


def from_kohya(tensors: Mapping[str, Tensor], family: str, shapes: Shapes) -> Lora:
    """Reads the tensors of a file in kohya's form. Raises ValueError for what is of no layer of this base."""
    refuse_form("kohya", family)
    return from_named(tensors, kohya_layers(family, shapes), shapes, "kohya")


def _word(name: str) -> str:
    return name.replace(".", "_")
