"""Writes a fully trained subject as a diffusers folder, and finds it again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlbooth.models.base import Base
from controlbooth.models.files.loading import read_tensors
from controlbooth.models.files.weight_files import read_json, variant_of, weights_files
from controlbooth.models.files.weights import save_pretrained, save_weights
from controlbooth.models.pretrained import WEIGHTS_STEM, parts_of
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.run import checkpoint as checkpoints
from controlbooth.trainer.run.attempt import Attempt, move
from controlbooth.trainer.run.base import open_base
from controlbooth.trainer.run.disk_full import named_when_full

PIPELINE = "pipeline"


WEIGHTS = "network"


NETWORKS = {
    "unet": "unet.",
    "transformer": "transformer.",
    "text_encoder": "text_encoders.0.",
    "text_encoder_2": "text_encoders.1.",
}
"""Folder in the pipeline -> what its parameters' names begin with in FullNetwork, of all networks that may learn."""


def write_weights(engine: Any, weights: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    save_weights(weights, folder / "weights.safetensors")


def put_pipeline(config: SubjectRunConfig, weights: dict[str, Tensor], folder: Path, attempt: Attempt) -> None:
    """Writes a pipeline with these weights in place of one that may be there, whole or not at all.

    Raises Superseded where a newer start has taken the run.
    """
    made = attempt.folder / folder.name
    with named_when_full(folder):
        write_pipeline(config, weights, made)
    if folder.exists():
        checkpoints.delete(folder, attempt)
    move(attempt, made, folder)


def write_pipeline(config: SubjectRunConfig, weights: dict[str, Tensor], made: Path) -> None:
    """Copies the base's folder with these weights, by their names in FullNetwork, in place of its own.

    All networks are written in float32 under the names that diffusers looks for by itself. Otherwise, from a base that
    has only half-precision variants, the trained networks would be found and the others not, or in another dtype.
    """
    where = base_folder(config.model.base)
    fresh = open_base(config, torch.float32, torch.device("cpu"))
    parts = parts_of(fresh)
    others = shutil.ignore_patterns("*.md", ".*")

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {*others(folder, names), *(parts if Path(folder) == where else ())}

    shutil.copytree(where, made, ignore=left_out)
    for part, module in parts.items():
        prefix = NETWORKS.get(part, "no network that learns")
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if own:
            learnt = {name for name, _ in module.named_parameters()}
            kept = {name: tensor for name, tensor in module.state_dict().items() if name not in learnt}
            module.load_state_dict(kept | own)  # kept: such as SD3's table of places, which is no parameter
        save_pretrained(module, made / part)
    for folder in sorted(path for path in made.iterdir() if path.is_dir() and path.name not in parts):
        without_variant(folder)


def without_variant(folder: Path) -> None:
    """Rewrites weights that a folder has as a variant alone, such as a safety checker's, by the plain name in
    float32."""
    for stem in (WEIGHTS_STEM, "model"):
        try:
            files = weights_files(folder, stem)
        except OSError:  # none of this name
            continue
        if variant_of(files[0]) is None:
            continue
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor.clone()
            for name, tensor in read_tensors(files).items()
        }
        save_weights(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        for file in (*files, *folder.glob(f"{stem}.safetensors.index.*.json")):
            file.unlink()
        config = folder / "config.json"
        if config.is_file():
            tree = {name: value for name, value in read_json(config).items() if name not in ("dtype", "torch_dtype")}
            config.write_text(json.dumps(tree, indent=2))


def base_of_subject(config: SubjectRunConfig, base: Base, pipeline: Path) -> Base:
    """Returns `base` with the trained networks of a finished subject's pipeline in place of its own."""
    own = open_base(config, base.dtype, base.device, where=pipeline)
    return replace(base, denoiser=own.denoiser, text_encoders=own.text_encoders, _empty=None)
