"""Stable Diffusion 3 and FLUX.1 from single files in the layouts of their authors.

Sizes are read off the tensors; what these do not tell stands in `SD3_FILE` and `FLUX_FILE` of architectures.py. SD3's
names are converted by diffusers. FLUX.1's are converted here, since diffusers' function knows one width alone.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from torch import nn
from transformers import CLIPTextConfig, T5Config

from controlbooth.data.errors import UserError
from controlbooth.models.base import vae_dtype
from controlbooth.models.families import VAE, Family, Part
from controlbooth.models.files.loading import fill
from controlbooth.models.files.stored import Stored
from controlbooth.models.single_files.unet_file import converted


def build_parts(
    state: Mapping[str, Stored], family: Family, parts: Iterable[Part], dtype: torch.dtype, where: str
) -> dict[str, nn.Module]:
    """Makes those networks that a file holds, by the names of their folders, on the CPU.

    Raises ValueError for tensors that are missing, unknown, of another shape or no numbers.
    """
    return {part.folder: _built(state, family, part, dtype, where) for part in parts}


def _built(state: Mapping[str, Stored], family: Family, part: Part, dtype: torch.dtype, where: str) -> nn.Module:
    layout, kind = family.single_file, part.kind
    assert layout is not None  # only of such families are single files recognised
    prefix = _UNPREFIXED if part == family.denoiser else layout.inside[part.folder]
    if part == family.denoiser and any(name.startswith(_PREFIX) for name in state):
        prefix = _PREFIX
    own: dict[str, Any] = {
        name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
    }
    if part == family.denoiser:
        named = f"the transformer of {where}"
        convert, read_off = _TRANSFORMERS[kind]
        config = layout.denoiser | _sizes(read_off, own, layout.denoiser["attention_head_dim"], named)
        return _filled(lambda: getattr(diffusers, kind)(**config), converted(convert, own, "", named), dtype, named)
    if part == VAE:
        named = f"the VAE of {where}"
        weights = converted(convert_ldm_vae_checkpoint, state, prefix, named, layout.vae)
        return _filled(lambda: AutoencoderKL(**layout.vae), weights, vae_dtype(layout.vae, dtype), named)
    number = family.text_encoders.index(part)
    settings, named = layout.text_encoders[number], f"text encoder {number + 1} of {where}"
    if number == 0:  # SD3 takes the first one's pooled states as they are, whatever projection the file has besides
        own["text_projection.weight"] = torch.eye(settings["projection_dim"])
    config_class = T5Config if kind == "T5EncoderModel" else CLIPTextConfig
    return _filled(lambda: getattr(transformers, kind)(config_class(**settings)), own, dtype, named)


def _filled(build: Callable[[], Any], weights: Mapping[str, Any], dtype: torch.dtype, named: str) -> Any:
    with init_empty_weights(include_buffers=False):
        module = build()
    fill(module, weights, dtype, named)
    return module


def _sizes(
    read_off: Callable[..., dict[str, Any]], own: Mapping[str, Stored], head_width: int, named: str
) -> dict[str, Any]:
    """Reads a configuration off the shapes of tensors. Raises ValueError where one is missing or of another rank."""
    try:
        return read_off(own, head_width)
    except KeyError as error:
        raise UserError(f"{named} lacks the tensor {error.args[0]}: the file is incomplete. Fetch it again") from None
    except IndexError:
        raise UserError(f"{named} has a tensor of another shape. Fetch the file again") from None


def _count(names: Iterable[str], blocks: str) -> int:
    """Counts blocks by the highest number in the names, so that a block that is missing is reported by its tensors."""
    numbers = [match[1] for name in names if (match := re.match(rf"{blocks}\.(\d+)\.", name))]
    return 1 + max(map(int, numbers), default=-1)


def _sizes_of_sd3(own: Mapping[str, Stored], head_width: int) -> dict[str, Any]:
    width, joint = own["context_embedder.weight"].shape[0], own["context_embedder.weight"].shape[1]
    entry = own["x_embedder.proj.weight"].shape
    dual = {int(match[1]) for name in own if (match := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", name))}
    return dict(
        patch_size=entry[2],
        in_channels=entry[1],
        out_channels=entry[1],
        num_layers=_count(own, "joint_blocks"),
        num_attention_heads=width // head_width,
        caption_projection_dim=width,
        joint_attention_dim=joint,
        pooled_projection_dim=own["y_embedder.mlp.0.weight"].shape[1],
        pos_embed_max_size=math.isqrt(own["pos_embed"].shape[1]),
        dual_attention_layers=tuple(sorted(dual)),
        qk_norm="rms_norm" if any(".attn.ln_q." in name for name in own) else None,
    )


def _sizes_of_flux(own: Mapping[str, Stored], head_width: int) -> dict[str, Any]:
    width, inputs = own["img_in.weight"].shape[0], own["img_in.weight"].shape[1]
    return dict(
        in_channels=inputs,
        num_layers=_count(own, "double_blocks"),
        num_single_layers=_count(own, "single_blocks"),
        num_attention_heads=width // head_width,
        joint_attention_dim=own["txt_in.weight"].shape[1],
        pooled_projection_dim=own["vector_in.in_layer.weight"].shape[1],
        guidance_embeds=True,
    )


_FLUX_EDGES = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
"""Outside of blocks: the author's name -> diffusers'."""
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}


def _flux_to_diffusers(own: Mapping[str, Any]) -> dict[str, Any]:
    """Converts names as diffusers' function for FLUX.1 does, for any width; what is unknown keeps its name."""
    width = own["img_in.weight"].shape[0]
    made: dict[str, Any] = {}
    for name, tensor in own.items():
        place, _, kind = name.rpartition(".")
        kind = "weight" if kind == "scale" else kind
        block = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", place)
        if block is None:
            if place == "final_layer.adaLN_modulation.1":  # shift and scale there, scale and shift in diffusers
                shift, scale = torch.chunk(tensor, 2, dim=0)
                tensor = torch.cat([scale, shift])
            made[f"{_FLUX_EDGES.get(place, place)}.{kind}"] = tensor
            continue
        names = _FLUX_DOUBLE if block[1] == "double" else _FLUX_SINGLE
        start = f"{'' if block[1] == 'double' else 'single_'}transformer_blocks.{block[2]}."
        new = names.get(block[3])
        if new is None:
            made[name] = tensor
        elif isinstance(new, str):
            made[f"{start}{new}.{kind}"] = tensor
        else:
            parts = torch.split(tensor, [width] * 3 + [tensor.shape[0] - 3 * width] * (len(new) - 3), dim=0)
            made |= {f"{start}{one}.{kind}": part for one, part in zip(new, parts, strict=True)}
    return made


_UNPREFIXED, _PREFIX = "", "model.diffusion_model."
_TRANSFORMERS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "SD3Transformer2DModel": (convert_sd3_transformer_checkpoint_to_diffusers, _sizes_of_sd3),
    "FluxTransformer2DModel": (_flux_to_diffusers, _sizes_of_flux),
}
"""How the tensors of a class are converted, and how its sizes are read off them."""
