"""How other programs read LoRA files: which layer of a network each key is of, and what they add to its weight.

diffusers reads here with its own code. kohya's sd-scripts and ComfyUI are not installed, so what they do is written
anew from the names that they publish, no code of theirs:

- sd-scripts at 48d368f: networks/lora.py, lora_sd3.py and lora_flux.py (prefixes lora_unet, lora_te, lora_te1 to 3; the
  classes whose layers are adapted; alpha 0 or none is the rank), library/sdxl_model_util.py (SDXL's layers).
- ComfyUI: comfy/lora.py (model_lora_keys_unet, model_lora_keys_clip, load_lora) and comfy/utils.py (the names of
  diffusers for layers, and their rows in q, k and v), as of 2025.

A reader returns what it adds to each weight and the keys that it passed over.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from layouts import original_transformer
from safetensors.torch import load_file
from torch import Tensor

Deltas = dict[str, Tensor]
CLIP_LAYER = r"text_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.\w+"
T5_LAYER = r"encoder\.block\.\d+\.layer\.\d\.\w+\.\w+"


def product(up: Tensor, down: Tensor, alpha: float | None) -> Tensor:
    scale = 1.0 if alpha is None else alpha / len(down)
    return scale * (up.double().flatten(1) @ down.double().flatten(1)).view(len(up), *down.shape[1:])


# The networks of each program, of whose layers the deltas are


def unet_names(unet: Any) -> dict[str, str]:
    """diffusers' names of a U-Net's layers -> the authors', as ComfyUI and sd-scripts publish them."""
    names = [name for name, one in unet.named_modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)]
    count = unet.config["layers_per_block"]
    starts = {"mid_block.attentions.0.": "middle_block.1."}
    starts |= {f"mid_block.resnets.{i}.": f"middle_block.{2 * i}." for i in range(2)}
    for level in range(len(unet.config["block_out_channels"])):
        for i in range(count):
            at = 1 + (count + 1) * level + i
            starts[f"down_blocks.{level}.resnets.{i}."] = f"input_blocks.{at}.0."
            starts[f"down_blocks.{level}.attentions.{i}."] = f"input_blocks.{at}.1."
        starts[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(count + 1) * (level + 1)}.0.op"
        for i in range(count + 1):
            at = (count + 1) * level + i
            starts[f"up_blocks.{level}.resnets.{i}."] = f"output_blocks.{at}.0."
            starts[f"up_blocks.{level}.attentions.{i}."] = f"output_blocks.{at}.1."
        after = 2 if any(name.startswith(f"up_blocks.{level}.attentions.") for name in names) else 1
        starts[f"up_blocks.{level}.upsamplers.0."] = f"output_blocks.{(count + 1) * (level + 1) - 1}.{after}."
    inner = {
        "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }  # fmt: skip
    edges = {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip
    result = {}
    for name in names:
        start = next((start for start in starts if name.startswith(start)), None)
        if start is not None:
            rest = name.removeprefix(start)
            result[name] = starts[start] + (inner.get(rest, rest) if ".resnets." in start else rest)
        elif name in edges:
            result[name] = edges[name]
    return result


def original_deltas(denoiser: Any, family: str, deltas: Mapping[str, Tensor]) -> Deltas:
    """The authors' names of a denoiser's layers -> what is added to their weights, zero included.

    deltas: of diffusers' layers, by their names in the denoiser.
    """
    layers = {name: one for name, one in denoiser.named_modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)}
    whole = {name: deltas.get(name, torch.zeros(one.weight.shape).double()) for name, one in layers.items()}
    if family in ("sd3", "flux"):
        state = {f"{name}.weight": tensor for name, tensor in whole.items()}
        made = original_transformer(SimpleNamespace(state_dict=lambda: state, config=denoiser.config), family)
        return {name.removesuffix(".weight"): tensor for name, tensor in made.items() if name.endswith(".weight")}
    names = unet_names(denoiser)
    return {names[name]: tensor for name, tensor in whole.items() if name in names}


def clip_names(encoder: Any) -> list[str]:
    """The layers of a text encoder's blocks, by the names that its files have."""
    names = [name for name, one in encoder.named_modules() if isinstance(one, torch.nn.Linear)]
    names = [name if name.startswith(("text_", "encoder.block")) else f"text_model.{name}" for name in names]
    return [name for name in names if re.fullmatch(f"{CLIP_LAYER}|{T5_LAYER}", name)]


def encoders_of(base: Any) -> dict[str, Any]:
    return {part.folder: one for part, one in zip(base.family.text_encoders, base.text_encoders, strict=True)}


# kohya's scripts

KOHYA_TEXT = {
    "sd15": ("lora_te",), "sd21": ("lora_te",), "miniature": ("lora_te",), "sdxl": ("lora_te1", "lora_te2"),
    "sd3": ("lora_te1", "lora_te2", "lora_te3"), "flux": ("lora_te1", "lora_te3"),
}  # fmt: skip
KOHYA_MODULES = {
    "sdxl": r"(input_blocks\.(?!0\.)|middle_block|output_blocks).*",
    "sd3": r"joint_blocks\.\d+\.(x|context)_block\..*",
    "flux": r"(double|single)_blocks\..*",
    "sd15": r"(down|up)_blocks\..*|mid_block\..*",
}


def expected_in_kohya(base: Any, deltas: Mapping[str, Tensor]) -> Deltas:
    """What a LoRA adds to the layers of kohya's networks. deltas: by full names in the base."""
    family, folder = base.family.name, base.family.denoiser.folder
    own = {name.removeprefix(f"{folder}."): one for name, one in deltas.items() if name.startswith(f"{folder}.")}
    if family in ("sdxl", "sd3", "flux"):
        result = {f"{folder}.{name}": one for name, one in original_deltas(base.denoiser, family, own).items()}
    else:
        result = {f"{folder}.{name}": one for name, one in own.items()}
    return result | {name: one for name, one in deltas.items() if not name.startswith(f"{folder}.")}


def read_as_kohya(base: Any, path: Path) -> tuple[Deltas, set[str]]:
    tensors = load_file(path)
    family, folder = base.family.name, base.family.denoiser.folder
    if family in ("sdxl", "sd3", "flux"):
        names = list(original_deltas(base.denoiser, family, {}))
    else:
        names = [name for name, one in base.denoiser.named_modules() if hasattr(one, "weight") and one.weight.ndim > 1]
    pattern = KOHYA_MODULES.get(family, KOHYA_MODULES["sd15"])
    layers = {
        f"lora_unet_{name.replace('.', '_')}": f"{folder}.{name}" for name in names if re.fullmatch(pattern, name)
    }
    for (part, encoder), prefix in zip(encoders_of(base).items(), KOHYA_TEXT[family], strict=True):
        layers |= {f"{prefix}_{name.replace('.', '_')}": f"{part}.{name}" for name in clip_names(encoder)}
    deltas: Deltas = {}
    for key in [key for key in tensors if key.endswith(".lora_down.weight") and key.split(".")[0] in layers]:
        word = key.split(".")[0]
        alpha = tensors.pop(f"{word}.alpha", None)
        rank = None if alpha is None or float(alpha) == 0 else float(alpha)
        deltas[layers[word]] = product(tensors.pop(f"{word}.lora_up.weight"), tensors.pop(key), rank)
    return deltas, set(tensors)


# ComfyUI

COMFY_TEXT = {
    "sd15": ("clip_l",), "sd21": ("clip_h",), "sdxl": ("clip_l", "clip_g"), "sd3": ("clip_l", "clip_g", "t5xxl"),
    "flux": ("clip_l", "t5xxl"),
}  # fmt: skip
Target = tuple[str, int, int]
"""A weight, and the rows of it that a key is of; rows 0 to -1 are all."""


def expected_in_comfy(base: Any, deltas: Mapping[str, Tensor]) -> Deltas:
    """What a LoRA adds to the weights of ComfyUI's networks."""
    family, folder = base.family.name, base.family.denoiser.folder
    own = {name.removeprefix(f"{folder}."): one for name, one in deltas.items() if name.startswith(f"{folder}.")}
    result = {f"diffusion_model.{name}": one for name, one in original_deltas(base.denoiser, family, own).items()}
    parts = dict(zip(encoders_of(base), COMFY_TEXT[family], strict=True))
    for name, one in deltas.items():
        part, _, inner = name.partition(".")
        if part in parts:
            result[f"{parts[part]}.transformer.{inner}"] = one
    return result


def comfy_keys(base: Any) -> dict[str, Target]:
    """What a key may begin with -> the weight that it is of."""
    family = base.family.name
    keys: dict[str, Target] = {}
    for name in original_deltas(base.denoiser, family, {}):
        for key in (f"lora_unet_{name.replace('.', '_')}", f"diffusion_model.{name}"):
            keys[key] = (f"diffusion_model.{name}", 0, -1)
    if family in ("sd3", "flux"):
        for name, target in transformer_rows(base.denoiser, family).items():
            for key in (f"transformer.{name}", f"lora_transformer_{name.replace('.', '_')}"):
                keys[key] = target
    else:
        for name, theirs in unet_names(base.denoiser).items():
            target = (f"diffusion_model.{theirs}", 0, -1)
            keys[f"lora_unet_{name.replace('.', '_')}"] = target
            processor = re.sub(r"\.to_out\.0$", ".to_out", name).replace(".to_", ".processor.to_")
            keys |= dict.fromkeys((processor, f"unet.{processor}"), target)
    present = COMFY_TEXT[family]
    for encoder, theirs in zip(base.text_encoders, present, strict=True):
        for name in clip_names(encoder):
            target = (f"{theirs}.transformer.{name}", 0, -1)
            word = name.replace(".", "_")
            keys[f"text_encoders.{target[0]}"] = target
            if theirs == "t5xxl":
                keys |= dict.fromkeys(
                    (f"lora_te{max(3, len(present))}_{word}", f"lora_te{len(present)}_{word}"), target
                )
            elif theirs == "clip_g":
                keys |= dict.fromkeys((f"lora_te2_{word}", f"text_encoder_2.{name}"), target)
            else:
                keys |= dict.fromkeys((f"lora_te_{word}", f"lora_te1_{word}", f"text_encoder.{name}"), target)
    return keys


def transformer_rows(transformer: Any, family: str) -> dict[str, Target]:
    """diffusers' names of the layers of a transformer's blocks -> the weight and rows that they are of."""
    width = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    places = {
        "sd3": {
            "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj", "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
            "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
        },
        "flux": {
            "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
            "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
        },
    }[family]  # fmt: skip
    fused = {
        "sd3": {
            "attn.to_": "x_block.attn.qkv",
            "attn.add_": "context_block.attn.qkv",
            "attn2.to_": "x_block.attn2.qkv",
        },
        "flux": {"attn.to_": "img_attn.qkv", "attn.add_": "txt_attn.qkv"},
    }[family]
    rows: dict[str, Target] = {}
    for name, module in transformer.named_modules():
        match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", name)
        if match is None or not isinstance(module, torch.nn.Linear):
            continue
        single, number, rest = match.groups()
        letter = re.fullmatch(r"(attn2?\.(?:to_|add_))([qkv])(?:_proj)?", rest)
        if single:
            place = {"proj_out": "linear2", "norm.linear": "modulation.lin"}.get(rest, "linear1")
            at = f"diffusion_model.single_blocks.{number}.{place}"
            top = "qkv".index(letter[2]) * width if letter else 3 * width
            rows[name] = (at, top, module.out_features) if place == "linear1" else (at, 0, -1)
            continue
        at = f"diffusion_model.{'joint' if family == 'sd3' else 'double'}_blocks.{number}."
        if letter:
            rows[name] = (at + fused[letter[1]], "qkv".index(letter[2]) * width, width)
        else:
            rows[name] = (at + places[rest], 0, -1)
    return rows


def read_as_comfy(base: Any, path: Path) -> tuple[Deltas, set[str]]:
    tensors, deltas = (
        load_file(path),
        {name: torch.zeros_like(one) for name, one in expected_in_comfy(base, {}).items()},
    )
    endings = ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"))
    for key, (name, top, height) in comfy_keys(base).items():
        alpha = tensors.pop(f"{key}.alpha", None)
        for up, down in endings:
            if key + up not in tensors:
                continue
            added = product(tensors.pop(key + up), tensors.pop(key + down), None if alpha is None else float(alpha))
            rows = deltas.setdefault(name, torch.zeros_like(added))
            rows = rows if height < 0 else rows[top : top + height]
            rows += added.view(rows.shape)
    return deltas, set(tensors)


# diffusers


def read_by_diffusers(pipeline: Any) -> Callable[[Path], Deltas]:
    """Returns a reader by a pipeline's load_lora_weights. What it adds is by full names in the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def read(path: Path) -> Deltas:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="read")
        deltas: Deltas = {}
        for folder in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
            network = getattr(pipeline, folder, None)
            for name, module in network.named_modules() if network is not None else ():
                if isinstance(module, BaseTunerLayer) and "read" in module.lora_A:
                    inner = (
                        name
                        if re.match(r"text_model\.|encoder\.block", name) or folder[:4] != "text"
                        else f"text_model.{name}"
                    )
                    deltas[f"{folder}.{inner}"] = module.get_delta_weight("read").double()
        pipeline.unload_lora_weights()
        return deltas

    return read


def verdict(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Tells whether all that is added is what should be: "equal", or in how many of the layers it is.

    Equal is within 1e-5 of a layer's largest value; what is added elsewhere counts as a layer that is wrong.
    """
    names = [name for name, one in expected.items() if one.any()]
    others = [name for name, one in found.items() if name not in names and one.any()]
    right = [
        name
        for name in names
        if name in found and (found[name] - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()
    ]
    whole = len(names) + len(others)
    return "equal" if len(right) == whole else f"{len(right)} of {whole}"
