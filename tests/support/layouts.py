"""Networks in other layouts than one diffusers file: under original names, or in several files."""

import json
from pathlib import Path

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
