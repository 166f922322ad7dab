"""Key names of the original Stable Diffusion and ControlNet code, against those of diffusers.

The original code numbers its blocks through (`input_blocks.7.1.proj_in`), diffusers names them by level
(`down_blocks.2.attentions.0.proj_in`). For ControlNets `key_map` is the one table, read in both directions; base models
are only read, through diffusers' own conversion functions.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlbooth.data.errors import UserError
from controlbooth.models.architectures import Architecture
from controlbooth.models.base import vae_dtype
from controlbooth.models.files.loading import Weight, fill
from controlbooth.models.files.stored import Stored
from controlbooth.models.files.weights import save_weights

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
    """Returns diffusers' name of each tensor of a ControlNet -> its original name, without the `control_model.` prefix.

    Raises ValueError for a module that the original layout has no name for: the miniature's pooled text.
    """
    return {key: original_key(key, layers_per_block) for key in controlnet.state_dict()}


def original_key(key: str, layers_per_block: int) -> str:
    """Returns the original name of one tensor. Raises ValueError as `key_map`.

    `input_blocks.0` is conv_in; a level has layers_per_block blocks and, except the last level, a downsampler.
    """
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
    raise UserError(
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


def is_original(weights: Mapping[str, Weight]) -> bool:
    return any(key.removeprefix(PREFIX).startswith("input_hint_block.") for key in weights)


def hint_channels(weights: Mapping[str, Weight], where: str) -> tuple[int, ...]:
    """Returns the widths of the hint network of a ControlNet file in either layout. Raises ValueError without one."""
    if is_original(weights):
        keys = [f"input_hint_block.{number}.weight" for number in (0, 4, 8, 12)]
        weights = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    else:
        keys = [f"controlnet_cond_embedding.{name}.weight" for name in ("conv_in", "blocks.1", "blocks.3", "blocks.5")]
    missing = [key for key in keys if key not in weights]
    if missing:
        raise UserError(f"{where} is not a ControlNet in the original or the diffusers layout: it has no {missing[0]}")
    return tuple(int(weights[key].shape[0]) for key in keys)


def condition_channels(weights: Mapping[str, Weight]) -> int:
    """Returns how many channels the conditions of a ControlNet file have, or 0 if its first layer is no convolution.

    weights: those of a file that `hint_channels` has accepted.
    """
    first = "input_hint_block.0.weight" if is_original(weights) else "controlnet_cond_embedding.conv_in.weight"
    weight = next(tensor for key, tensor in weights.items() if key.removeprefix(PREFIX) == first)
    return int(weight.shape[1]) if weight.ndim == 4 else 0


def to_diffusers(weights: Mapping[str, Weight], controlnet: ControlNetModel) -> dict[str, Weight]:
    """Renames a ControlNet file's tensors to diffusers' names; a file that has these already keeps them."""
    if not is_original(weights):
        return dict(weights)
    names = {original: key for key, original in key_map(controlnet, controlnet.config["layers_per_block"]).items()}
    stripped = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    return {names.get(key, key): tensor for key, tensor in stripped.items()}  # an unknown name is reported by `fill`


def build_base(
    state: Mapping[str, Stored], architecture: Architecture, dtype: torch.dtype, where: str
) -> tuple[UNet2DConditionModel, AutoencoderKL, tuple[nn.Module, ...]]:
    """Builds U-Net, VAE and text encoders from a whole checkpoint in the original layout, on the CPU.

    Raises ValueError for tensors that are missing, unknown, of another shape or no numbers.
    """
    with init_empty_weights(include_buffers=False):
        unet, vae = UNet2DConditionModel(**architecture.denoiser), AutoencoderKL(**architecture.vae)
    named = f"the U-Net of {where}"
    fill(unet, converted(convert_ldm_unet_checkpoint, state, _UNET, named, unet.config), dtype, named)
    named = f"the VAE of {where}"
    weights = converted(convert_ldm_vae_checkpoint, state, _VAE, named, vae.config)
    fill(vae, weights, vae_dtype(vae.config, dtype), named)
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = []
    for number, config in enumerate(architecture.text_encoders):
        named = f"text encoder {number + 1} of {where}"
        with init_empty_weights(include_buffers=False):
            encoder = classes[number](CLIPTextConfig(**config))
        fill(encoder, _text_weights(state, encoder, named), dtype, named)
        encoders.append(encoder)
    return unet, vae, tuple(encoders)


def converted(
    convert: Callable[..., dict[str, Any]], state: Mapping[str, Stored], prefix: str, where: str, *arguments: Any
) -> dict[str, Stored]:
    """Converts the tensors under a prefix with a function of diffusers, or one like it.

    Raises ValueError for a tensor that is missing, unknown or of another shape. The unknown are looked for here, since
    these functions look up what they need by name, and pass over what they do not know.
    """
    try:
        made = convert(dict(state), *arguments)
    except KeyError as error:
        raise UserError(f"{where} lacks the tensor {error.args[0]}: the file is incomplete. Fetch it again") from None
    except (RuntimeError, IndexError, TypeError) as error:
        raise UserError(f"{where} has a tensor of another shape ({error}). Fetch the file again") from error
    taken = frozenset[str]().union(*(stored.names for stored in made.values()))
    unknown = [
        name
        for name, stored in state.items()
        if name.startswith(prefix) and not stored.names <= taken and not _LEFT_OUT.search(name.removeprefix(prefix))
    ]
    if unknown:
        raise UserError(
            f"{where} holds {len(unknown)} tensors that are unknown ({', '.join(unknown[:4])}): the file is of another "
            "model. Fetch it again"
        )
    return made


_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_LEFT_OUT = re.compile(r"^loss\.|position_ids$|logit_scale$|^model_ema\.|text_projection")
"""Names of tensors that are left out rightly."""


def _text_weights(state: Mapping[str, Stored], encoder: Any, where: str) -> dict[str, Stored]:
    """Returns the weights of a text encoder under transformers' names.

    CLIP-L has these names already, under a prefix; OpenCLIP (SD2.1, and the second of SDXL) has its own. Of OpenCLIP's
    layers the last is left out where the encoder has one less, as Stable Diffusion 2 reads it.
    """
    is_second = isinstance(encoder, CLIPTextModelWithProjection)
    if is_second or "cond_stage_model.model.token_embedding.weight" in state:
        prefix = "conditioner.embedders.1.model." if is_second else "cond_stage_model.model."
        beyond = f"{prefix}transformer.resblocks.{encoder.config.num_hidden_layers}."
        own = {name: tensor for name, tensor in state.items() if not name.startswith((beyond, f"{prefix}visual."))}
        return converted(lambda found: convert_open_clip_checkpoint(encoder, found, prefix=prefix), own, prefix, where)
    is_first = any(name.startswith("conditioner.embedders.0.") for name in state)
    prefix = "conditioner.embedders.0." if is_first else "cond_stage_model."
    return converted(convert_ldm_clip_checkpoint, state, prefix, where)
