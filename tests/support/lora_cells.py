"""LoRAs of random numbers for each family, and what each loader makes of each form of file."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lora_readers import expected_in_comfy, expected_in_kohya, read_as_comfy, read_as_kohya, read_by_diffusers, verdict
from safetensors.torch import save_file
from torch import Tensor

from controlbooth.data.errors import UserError
from controlbooth.models.families import FAMILIES as FAMILY
from controlbooth.models.lora_files.comfy_form import to_comfy
from controlbooth.models.lora_files.diffusers_form import to_diffusers
from controlbooth.models.lora_files.kohya_form import to_kohya
from controlbooth.models.lora_files.layers import Lora, LoraLayer, Shapes, layer_shapes

FAMILIES = ("sd15", "sd21", "sdxl", "miniature", "sd3", "flux")
FORMS = ("diffusers", "kohya", "comfy")
LOADERS = ("diffusers", "kohya", "comfy")
TARGETS = {
    "attention": r"(unet|transformer)\..*attn\d?\.(to_|add_).*",
    "blocks": r"unet\.(down|up|mid)_block.*|transformer\.(single_)?transformer_blocks\..*",
    "clip": r"text_encoder(_2)?\.text_model\.encoder\.layers\..*",
    "t5": r"text_encoder_[23]\.encoder\.block\..*",
}
"""What a LoRA adapts -> the layers' full names."""


def random_lora(shapes: Shapes, seed: int, ranks: Sequence[int] = (2, 3), alphas: Sequence[float] = (1.0, 5.0)) -> Lora:
    """A LoRA of all layers in `shapes`, ranks and alphas in turn."""
    generator = torch.Generator().manual_seed(seed)
    lora: Lora = {}
    for number, (name, shape) in enumerate(shapes.items()):
        rank, kernel = ranks[number % len(ranks)], len(shape) - 2
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *[1] * max(kernel, 0), generator=generator)
        lora[name] = LoraLayer(down, up, alphas[number % len(alphas)])
    return lora


def shuffled(lora: Lora) -> Lora:
    """The same LoRA with the layers of each shape in another order, as a wrong table of names would have it."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, layer in lora.items():
        by_shape.setdefault((len(layer.up), *layer.down.shape[1:]), []).append(name)
    return {
        name: lora[other]
        for names in by_shape.values()
        for name, other in zip(names, [*names[1:], names[0]], strict=True)
    }


def targets_of(shapes: Shapes, target: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if re.fullmatch(TARGETS[target], name)}


def tensors_in(form: str, lora: Lora, family: str, shapes: Shapes) -> dict[str, Tensor]:
    if form == "diffusers":
        return to_diffusers(lora)
    return (to_kohya if form == "kohya" else to_comfy)(lora, family, shapes)


def pipeline_of(base: Any) -> Any:
    """A pipeline of diffusers of a base's networks, enough to load a LoRA into."""
    import diffusers

    name = {"sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
    kind = getattr(diffusers, name.get(base.family.name, "StableDiffusionPipeline"))
    parts = dict(zip((part.folder for part in base.family.text_encoders), base.text_encoders, strict=True))
    parts |= dict(zip(base.family.tokenizers, base.tokenizers, strict=True))
    parts |= {base.family.denoiser.folder: base.denoiser, "vae": base.vae}
    more = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    parts |= more if kind.__name__ == "StableDiffusionPipeline" else {}
    return kind(**parts, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())


def wide_flux() -> Any:
    """One single block of FLUX.1 at its own width, since diffusers' reading of the authors' names knows no other.

    Its weights are never written, and take no memory.
    """
    import diffusers

    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=0, num_single_layers=1, guidance_embeds=True)
    transformer.to_empty(device="cpu")
    shapes = {
        f"transformer.{name}": tuple(module.weight.shape)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("single_transformer_blocks.")
    }
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer, vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    return SimpleNamespace(family=FAMILY["flux"], shapes=shapes, pipeline=pipeline)


def read_by(loader: str, base: Any, path: Path, deltas: dict[str, Tensor]) -> str:
    """What a loader makes of a file: "equal", in how many layers it is, or how it ended."""
    if loader == "diffusers":
        pipeline = base.pipeline if hasattr(base, "pipeline") else pipeline_of(base)
        try:
            return verdict(deltas, read_by_diffusers(pipeline)(path))
        except (ValueError, KeyError, AssertionError, RuntimeError, AttributeError, IndexError) as error:
            return f"raises {type(error).__name__}"
    read, expect = {
        "kohya": (read_as_kohya, expected_in_kohya),
        "comfy": (read_as_comfy, expected_in_comfy),
    }[loader]
    return verdict(expect(base, deltas), read(base, path)[0])


Change = Callable[[Lora], Lora]


def cell(base: Any, target: str, form: str, loader: str, folder: Path, change: Change = dict) -> str:
    """One cell of the matrix. change: what is done to the LoRA before it is written."""
    family = base.family.name
    if loader in ("kohya", "comfy") and family == "miniature":
        return "no such base"
    if loader == "kohya" and form != "kohya":
        return "-"  # the scripts read their own form alone
    chosen = targets_of(layer_shapes(base), target)
    if (family, loader) != ("flux", "diffusers") or form == "diffusers" or target in ("clip", "t5"):
        return written_and_read(base, chosen, form, loader, folder, change)
    double = {name: shape for name, shape in chosen.items() if ".single_" not in name}
    made = written_and_read(base, double, form, loader, folder, change)
    wide = wide_flux()
    single = targets_of(wide.shapes, target)
    return made if made != "equal" else written_and_read(wide, single, form, loader, folder, change)


def written_and_read(base: Any, chosen: Shapes, form: str, loader: str, folder: Path, change: Change) -> str:
    shapes = base.shapes if hasattr(base, "shapes") else layer_shapes(base)
    lora = random_lora(chosen, seed=7)
    deltas = {name: layer.delta() for name, layer in lora.items()}
    try:
        tensors = tensors_in(form, change(lora), base.family.name, shapes)
    except UserError:
        return "refused"
    path = folder / f"{base.family.name}.{form}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return read_by(loader, base, path, deltas)


def rows(families: Sequence[str] = FAMILIES) -> Iterator[tuple[str, str]]:
    for family in families:
        for target in TARGETS:
            if target != "t5" or family in ("sd3", "flux"):
                yield family, target
