"""Control-LoRAs in one file, as Stability has published them and ComfyUI reads and writes them.

Names are those of the original ControlNet code without a prefix. In place of a layer's `weight` there are `up` and
`down`, whose product is what the layer has more than the base's: of convolutions `down` (r, in, kh, kw) and `up`
(out, r, 1, 1). A tensor that a file does not hold is the base's. The empty tensor `lora_controlnet` says what it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlbooth.data.errors import UserError
from controlbooth.models.files.loading import Weight
from controlbooth.models.files.stored import Stored
from controlbooth.models.files.weights import save_weights
from controlbooth.models.lora import DIFFERENCES, product
from controlbooth.models.single_files.unet_file import key_map, original_key

MARK = "lora_controlnet"


def save(trained: Mapping[str, Tensor], layers_per_block: int, path: Path) -> None:
    """Writes the trained tensors, given by diffusers' names.

    Raises ValueError for the miniature, whose pooled text has no name in that layout.
    """
    weights = {original_key(name, layers_per_block): tensor.detach().cpu() for name, tensor in trained.items()}
    save_weights(weights | {MARK: torch.zeros(0)}, path, metadata={"format": "pt"})


def is_control_lora(weights: Mapping[str, Any]) -> bool:
    return MARK in weights


def merged_weights(weights: Mapping[str, Weight], controlnet: Any, unet: Any, where: str) -> dict[str, Weight]:
    """Returns the weights of a whole ControlNet by diffusers' names: the file's, and the base's plus its differences.

    controlnet: for the base, without weights. Raises ValueError for differences of layers that the base does not have,
    or has in other shapes.
    """
    own, used, result = unet.state_dict(), {MARK}, {}
    for name, original in key_map(controlnet, controlnet.config["layers_per_block"]).items():
        parts = [original.removesuffix(".weight") + end for end in DIFFERENCES]
        if original in weights:
            used.add(original)
            result[name] = weights[original]
        elif original.endswith(".weight") and name in own and all(part in weights for part in parts):
            used.update(parts)
            down, up = (_read(weights[part]) for part in parts)
            result[name] = _sum(own[name], up, down, f"{where}: {parts[1]}")
        elif name in own:
            result[name] = _on_host(own[name])
    if unknown := sorted(weights.keys() - used):
        raise UserError(
            f"{where} holds {len(unknown)} tensors that a control-LoRA for this base has not "
            f"({', '.join(unknown[:4])}): it was made for another base"
        )
    return result


def _sum(weight: Tensor, up: Tensor, down: Tensor, where: str) -> Tensor:
    wanted = (weight.shape[0], weight[0].numel())
    found = (up.flatten(1).shape, down.flatten(1).shape)
    if (found[0][0], found[1][1]) != wanted or found[0][1] != found[1][0]:
        raise UserError(f"{where} and its `down` make no matrix of {wanted}: it was made for another base")
    return _on_host(weight).float() + product(up, down, weight)


def _on_host(weight: Tensor) -> Tensor:
    """Returns a tensor on the CPU, or as it is where it has no values."""
    return weight.detach() if weight.is_meta else weight.detach().cpu()


def _read(weight: Weight) -> Tensor:
    return weight.read() if isinstance(weight, Stored) else weight
