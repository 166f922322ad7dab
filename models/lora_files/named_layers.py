"""Files that name each layer in one word and hold lora_down, lora_up and alpha of it: kohya's and ComfyUI's."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from controlbooth.data.errors import UserError
from controlbooth.models.lora_files.fusing import fused, parted, swapped_halves
from controlbooth.models.lora_files.layers import Lora, LoraLayer, Shapes, check_fits, checked_layer
from controlbooth.models.lora_files.original_names import Original
from controlbooth.models.lora_files.text_names import refuse


def to_named(lora: Lora, table: Sequence[Original], shapes: Shapes, form: str) -> dict[str, Tensor]:
    """Returns the tensors of a file. table: the layers that the form has, by its names.

    Raises ValueError for a layer that is in no row of the table, or not of the base with these shapes.
    """
    check_fits(lora, shapes)
    known = {part for row in table for part in row.parts}
    if unknown := next((name for name in lora if name not in known), None):
        raise refuse(unknown, form)
    tensors: dict[str, Tensor] = {}
    for row in table:
        parts = [lora.get(part) for part in row.parts]
        if all(part is None for part in parts):
            continue
        layer = parts[0] if len(parts) == 1 else fused(parts, [shapes[part][0] for part in row.parts])
        assert layer is not None
        layer = swapped_halves(layer) if row.swapped else layer
        tensors[f"{row.name}.lora_down.weight"] = layer.down
        tensors[f"{row.name}.lora_up.weight"] = layer.up
        tensors[f"{row.name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return tensors


def from_named(tensors: Mapping[str, Tensor], table: Sequence[Original], shapes: Shapes, form: str) -> Lora:
    """Reads the tensors of such a file. Without an alpha it is the rank.

    Raises ValueError for tensors that are of no layer in the table, and for a layer that does not fit the base.
    """
    tensors, lora = dict(tensors), {}
    for row in table:
        down, up = tensors.pop(f"{row.name}.lora_down.weight", None), tensors.pop(f"{row.name}.lora_up.weight", None)
        if down is None and up is None:
            continue
        if down is None or up is None:
            raise UserError(f"{row.name} has only one of lora_down and lora_up: the file is incomplete")
        stored = tensors.pop(f"{row.name}.alpha", None)
        layer = checked_layer(row.name, down, up, float(len(down) if stored is None else stored))
        layer = swapped_halves(layer) if row.swapped else layer
        lora |= _apart(layer, row, shapes)
    if tensors or not lora:
        what = f"{sorted(tensors)[0]} is of none of its layers" if tensors else "it has no lora_down"
        raise UserError(f"this is no LoRA of this base in the form {form!r}: {what}")
    check_fits(lora, shapes)
    return lora


def _apart(layer: LoraLayer, row: Original, shapes: Shapes) -> Lora:
    if len(row.parts) == 1:
        return {row.parts[0]: layer}
    rows = [shapes[part][0] for part in row.parts]
    if len(layer.up) != sum(rows):
        raise UserError(
            f"{row.name} has {len(layer.up)} outputs, and the base's has {sum(rows)}: it is of another base"
        )
    return {name: part for name, part in zip(row.parts, parted(layer, rows), strict=True) if part is not None}
