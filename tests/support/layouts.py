"""Networks in other layouts than one diffusers file: under original names, or in several files."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def original_vae(vae: nn.Module, levels: int) -> dict[str, Tensor]:
    """Gives a VAE's weights the names of the original code. levels: of its encoder."""
    names = {
        ".mid_block.resnets.0": ".mid.block_1",
        ".mid_block.resnets.1": ".mid.block_2",
        ".mid_block.attentions.0": ".mid.attn_1",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        ".resnets.": ".block.",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "down_blocks": "down",
    }
    weights = {}
    for key, tensor in vae.state_dict().items():
        name = key
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        for level in range(levels):  # the original counts the decoder's levels from the smallest picture's end
            name = name.replace(f"up_blocks.{level}.", f"up.{levels - 1 - level}.")
        is_projection = "attn_1" in name and name.endswith("weight") and tensor.ndim == 2
        weights[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_projection else tensor
    return weights


def weights_of(base: Path, part: str) -> Path:
    """Returns the one file of a network in a diffusers folder."""
    return next((base / part).glob("*.safetensors"))


def sharded(base: Path, part: str, index: bool = True) -> list[Path]:
    """Splits a network's file into two, as the libraries write those above 5 or 10 GB."""
    whole = weights_of(base, part)
    weights, names = load_file(whole), {}
    parts = [whole.with_name(whole.name.replace(".safetensors", f"-0000{n}-of-00002.safetensors")) for n in (1, 2)]
    for number, file in enumerate(parts):
        own = {name: tensor for row, (name, tensor) in enumerate(sorted(weights.items())) if row % 2 == number}
        save_file(own, file, metadata={"format": "pt"})
        names |= dict.fromkeys(own, file.name)
    whole.unlink()
    if index:
        (whole.parent / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": names}))
    return parts


def renamed(name: str, names: dict[str, str]) -> str:
    """Replaces whole components of a name, the longest ones first."""
    for ours in sorted(names, key=len, reverse=True):
        name = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", names[ours], name)
    return name


def swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


EDGES = {
    "sd3": {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    "flux": {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
}
BLOCKS = {
    "sd3": {
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    },
    "flux": {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "norm.linear": "modulation.lin",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "proj_out": "linear2",
    },
}
JOINED = {  # the first of tensors that lie in one -> those, and that one
    "sd3": [
        ("attn", ("to_q", "to_k", "to_v"), "x_block.attn.qkv"),
        ("attn", ("add_q_proj", "add_k_proj", "add_v_proj"), "context_block.attn.qkv"),
        ("attn2", ("to_q", "to_k", "to_v"), "x_block.attn2.qkv"),
    ],
    "flux": [
        ("attn", ("to_q", "to_k", "to_v"), "img_attn.qkv"),
        ("attn", ("add_q_proj", "add_k_proj", "add_v_proj"), "txt_attn.qkv"),
    ],
}


def original_transformer(transformer: Any, family: str) -> dict[str, Tensor]:
    """Gives the transformer's weights the names that its authors' code would have saved them under."""
    state = transformer.state_dict()
    last = transformer.config["num_layers"] - 1
    single = re.compile(r"single_transformer_blocks\.\d+\.")
    result: dict[str, Tensor] = {}
    blocks = sorted({match[0] for name in state if (match := re.match(r"(single_)?transformer_blocks\.\d+\.", name))})
    for start in blocks:
        own = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
        number = start.split(".")[1]
        theirs = {"sd3": "joint_blocks", "flux": "double_blocks"}[family]
        theirs = f"{'single_blocks' if single.match(start) else theirs}.{number}."
        joined = JOINED[family]
        if single.match(start):
            joined = []
            for kind in ("weight", "bias"):
                four = (*(f"attn.{name}" for name in ("to_q", "to_k", "to_v")), "proj_mlp")
                if f"proj_mlp.{kind}" in own:
                    result[f"{theirs}linear1.{kind}"] = torch.cat([own.pop(f"{name}.{kind}") for name in four])
        for module, three, name in joined:
            for kind in ("weight", "bias"):
                if f"{module}.{three[0]}.{kind}" in own:
                    parts = [own.pop(f"{module}.{one}.{kind}") for one in three]
                    result[f"{theirs}{name}.{kind}"] = torch.cat(parts)
        names = dict(BLOCKS[family])
        if family == "flux":
            at = "" if single.match(start) else "img_attn."
            names |= {"attn.norm_q": f"{at}norm.query_norm", "attn.norm_k": f"{at}norm.key_norm"}
        for name, tensor in own.items():
            if family == "sd3" and int(number) == last and name.startswith("norm1_context"):
                tensor = swapped(tensor)
            new = renamed(name, names)
            if family == "flux" and "_norm." in new:
                new = new.replace(".weight", ".scale")
            result[theirs + new] = tensor
    for name, tensor in state.items():
        result[renamed(name, EDGES[family])] = swapped(tensor) if name.startswith("norm_out") else tensor
    return result
