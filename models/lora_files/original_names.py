"""Which layers of a denoiser are which of the authors' own code, whose names kohya's scripts and ComfyUI use.

The facts are those of diffusers' loaders/single_file_utils.py, which reads the authors' checkpoints; where it knows
only the published sizes, the blocks are counted here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from controlbooth.models.lora_files.layers import Shapes


@dataclass(frozen=True)
class Original:
    """A layer of the authors' code."""

    name: str
    parts: tuple[str, ...]
    """Full names of ours, whose outputs lie one below the other in it; mostly one."""
    swapped: bool = False
    """Whether the halves of its outputs are shift and scale there, and scale and shift here."""


_RESNET = {
    "time_emb_proj": "emb_layers.1",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_SD3: Mapping[str, tuple[str, ...]] = {
    "x_block.attn.qkv": _QKV,
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": _ADDED,
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_FLUX_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": _QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": _ADDED,
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_FLUX_SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_BLOCKS = {  # family -> (our list of blocks, the authors', what is in a block)
    "sd3": (("transformer_blocks", "joint_blocks", _SD3),),
    "flux": (
        ("transformer_blocks", "double_blocks", _FLUX_DOUBLE),
        ("single_transformer_blocks", "single_blocks", _FLUX_SINGLE),
    ),
}


def original_layers(family: str, shapes: Shapes) -> list[Original]:
    """Returns the layers of the authors' denoiser that a LoRA can adapt, for the base of these shapes.

    family: sd15, sd21, sdxl, sd3 or flux. Of transformers these are the layers of the blocks.
    """
    if family in _BLOCKS:
        return list(_transformer_layers(family, shapes))
    names = [name.removeprefix("unet.") for name in shapes if name.startswith("unet.")]
    return [Original(f"{_unet_name(name, names)}", (f"unet.{name}",)) for name in names]


def _transformer_layers(family: str, shapes: Shapes) -> Iterator[Original]:
    for ours, theirs, inside in _BLOCKS[family]:
        start = f"transformer.{ours}."
        numbers = sorted({int(name.split(".")[2]) for name in shapes if name.startswith(start)})
        for number in numbers:
            for name, parts in inside.items():
                full = tuple(f"{start}{number}.{part}" for part in parts)
                if full[0] in shapes:  # SD3's last block has no output of the text, and few blocks have attn2
                    swapped = parts == ("norm1_context.linear",) and shapes[full[0]][0] == 2 * shapes[full[0]][1]
                    yield Original(f"{theirs}.{number}.{name}", full, swapped)


def _unet_name(name: str, names: list[str]) -> str:
    """Returns the authors' name of a layer of a U-Net. names: of all its layers.

    Their blocks are numbered through, ours by level: a level has its residual blocks and then, except the last one, its
    downsampler, which is a block of its own; an upsampler is the last piece of the block before it.
    """
    edges = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    if name in edges:
        return edges[name]
    place = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
    assert place is not None, name
    side, level, kind, index, rest = place[1], int(place[2] or 0), place[3], int(place[4]), place[5]
    rest = _RESNET.get(rest, rest) if kind == "resnets" else rest
    if side is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    depths = [_resnets(names, f"{side}_blocks.{above}") for above in range(level + 1)]
    if side == "up":
        first = sum(depths[:-1])
        if kind == "upsamplers":
            attends = any(other.startswith(f"up_blocks.{level}.attentions.") for other in names)
            return f"output_blocks.{first + depths[-1] - 1}.{2 if attends else 1}.{rest}"
        return f"output_blocks.{first + index}.{1 if kind == 'attentions' else 0}.{rest}"
    first = 1 + sum(depth + 1 for depth in depths[:-1])
    if kind == "downsamplers":
        return f"input_blocks.{first + depths[-1]}.0.op"
    return f"input_blocks.{first + index}.{1 if kind == 'attentions' else 0}.{rest}"


def _resnets(names: list[str], block: str) -> int:
    return len({name.split(".")[3] for name in names if name.startswith(f"{block}.resnets.")})
