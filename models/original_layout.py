"""Key names of the original Stable Diffusion and ControlNet code, against those of diffusers.

The original code numbers its blocks through (`input_blocks.7.1.proj_in`), diffusers names them by level
(`down_blocks.2.attentions.0.proj_in`). For ControlNets `key_map` is the one table, read in both directions; base models
are only read, through diffusers' own conversion functions.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlbooth.models.architectures import Architecture
from controlbooth.models.base import vae_dtype
from controlbooth.models.weights import save_weights

PREFIX = "control_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MLP = {"linear_1": "0", "linear_2": "2"}


def key_map(controlnet: nn.Module, layers_per_block: int) -> dict[str, str]:
    """diffusers' name of every tensor of a ControlNet -> its original name, without the `control_model.` prefix.

    Raises ValueError for a module that the original layout has no name for: the miniature's pooled text.
    """
    return {key: _original_key(key, layers_per_block) for key in controlnet.state_dict()}


def _original_key(key: str, layers_per_block: int) -> str:
    """One name. `input_blocks.0` is conv_in; a level has layers_per_block blocks and, but the last, a downsampler."""
    if match := re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.+)", key):
        level, kind, index, rest = int(match[1]), match[2], int(match[3]), match[4]
        first = 1 + level * (layers_per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers_per_block}.0.{rest.replace('conv.', 'op.')}"
        if kind == "attentions":
            return f"input_blocks.{first + index}.1.{rest}"
        return f"input_blocks.{first + index}.0.{_renamed(rest, _RESNET)}"
    if match := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", key):
        return f"middle_block.{2 * int(match[1])}.{_renamed(match[2], _RESNET)}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", key):
        return f"middle_block.1.{match[1]}"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.+)", key):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    if match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.+)", key):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{match[2]}"  # every second module is a SiLU
    if match := re.fullmatch(r"(time_embedding|add_embedding)\.(linear_[12]\..+)", key):
        return {"time_embedding": "time_embed.", "add_embedding": "label_emb.0."}[match[1]] + _renamed(match[2], _MLP)
    fixed = {
        "conv_in.": "input_blocks.0.0.",
        "controlnet_mid_block.": "middle_block_out.0.",
        "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
        "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",  # after conv_in and six blocks
    }
    for start, original in fixed.items():
        if key.startswith(start):
            return original + key.removeprefix(start)
    raise ValueError(
        f"{key} has no name in the original layout, which image UIs read for Stable Diffusion 1.5, 2.1 and XL only. "
        "Export this ControlNet in the diffusers format."
    )


def _renamed(rest: str, names: Mapping[str, str]) -> str:
    first, separator, last = rest.partition(".")
    return f"{names[first]}{separator}{last}"


def save(controlnet: ControlNetModel, path: Path) -> None:
    names = key_map(controlnet, controlnet.config["layers_per_block"])
    state = controlnet.state_dict()
    weights = {PREFIX + names[key]: tensor.detach().cpu() for key, tensor in state.items()}
    save_weights(weights, path, metadata={"format": "pt"})


def is_original(weights: Mapping[str, Tensor]) -> bool:
    return any(key.removeprefix(PREFIX).startswith("input_hint_block.") for key in weights)


def hint_channels(weights: Mapping[str, Tensor], where: str) -> tuple[int, ...]:
    """Widths of the hint network of a ControlNet file in either layout. Raises ValueError if it holds none."""
    if is_original(weights):
        keys = [f"input_hint_block.{number}.weight" for number in (0, 4, 8, 12)]
        weights = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    else:
        keys = [f"controlnet_cond_embedding.{name}.weight" for name in ("conv_in", "blocks.1", "blocks.3", "blocks.5")]
    missing = [key for key in keys if key not in weights]
    if missing:
        raise ValueError(f"{where} is not a ControlNet in the original or the diffusers layout: it has no {missing[0]}")
    return tuple(int(weights[key].shape[0]) for key in keys)


def to_diffusers(weights: Mapping[str, Tensor], controlnet: ControlNetModel) -> dict[str, Tensor]:
    """A ControlNet file's tensors under diffusers' names; a file that has these already is returned as it is."""
    if not is_original(weights):
        return dict(weights)
    names = {original: key for key, original in key_map(controlnet, controlnet.config["layers_per_block"]).items()}
    stripped = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    return {names.get(key, key): tensor for key, tensor in stripped.items()}  # an unknown name is reported by `fill`


def fill(module: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Makes `weights` the parameters of `module`, which may be on the meta device. Every name and shape must match."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{where} does not fit {type(module).__name__}: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}. It was made for another base, or is incomplete."
        )
    for key, shape in expected.items():
        if found[key] != shape:
            raise ValueError(
                f"{where} does not fit {type(module).__name__}: {key} has shape {found[key]}, "
                f"and the base needs {shape}. It was made for another base."
            )
    module.load_state_dict({key: tensor.to(dtype) for key, tensor in weights.items()}, assign=True)


def build_base(
    state: Mapping[str, Tensor], architecture: Architecture, dtype: torch.dtype, where: str
) -> tuple[UNet2DConditionModel, AutoencoderKL, tuple[nn.Module, ...]]:
    """U-Net, VAE and text encoders from a whole checkpoint in the original layout, on the CPU."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**architecture.unet), AutoencoderKL(**architecture.vae)
    fill(unet, convert_ldm_unet_checkpoint(state, unet.config), dtype, f"the U-Net of {where}")
    fill(vae, convert_ldm_vae_checkpoint(state, vae.config), vae_dtype(vae.config, dtype), f"the VAE of {where}")
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = []
    for number, config in enumerate(architecture.text_encoders):
        encoder = classes[number](CLIPTextConfig(**config))
        fill(encoder, _text_weights(state, encoder), dtype, f"text encoder {number + 1} of {where}")
        encoders.append(encoder)
    return unet, vae, tuple(encoders)


def _text_weights(state: Mapping[str, Tensor], encoder: Any) -> dict[str, Tensor]:
    """CLIP-L keeps transformers' names under a prefix; OpenCLIP (SD2.1, and the second of SDXL) has its own names."""
    is_second = isinstance(encoder, CLIPTextModelWithProjection)
    if is_second or "cond_stage_model.model.token_embedding.weight" in state:
        prefix = "conditioner.embedders.1.model." if is_second else "cond_stage_model.model."
        weights = convert_open_clip_checkpoint(encoder, state, prefix=prefix)
    else:
        weights = convert_ldm_clip_checkpoint(state)
    # older files hold the position ids, which are a buffer
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith("position_ids")}
    if not hasattr(encoder, "text_model"):  # transformers 5.6 made CLIPTextModel flat
        weights = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    return weights
