"""`controlbooth dreambooth export`: a trained subject as one file, by the names that a program reads."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from controlbooth.data.files.whole import replaced
from controlbooth.models.files.loading import read_tensors
from controlbooth.models.files.weights import save_weights
from controlbooth.models.pretrained import load_tokenizers
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.dreambooth.manifest import read_record
from controlbooth.trainer.dreambooth.stack import LORA_FILE
from controlbooth.trainer.dreambooth.status import status_of
from controlbooth.trainer.dreambooth.validation import BEST_LORA
from controlbooth.trainer.run.disk_full import named_when_full


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth dreambooth export` is asked, and returns its exit status."""
    config, tasks = read_record(options.run)
    task = next((task for task in tasks if task.name == options.subject), None)
    if task is None:
        raise ConfigError(
            f"{options.run} has no subject {options.subject!r}; it has {', '.join(t.name for t in tasks)}"
        )
    state = status_of(options.run, task.name).get("state", "waiting")
    if state != "finished" and not options.best:
        raise ConfigError(f"{task.name} is {state}, and has nothing to export before it is finished")
    if config.method == "full":
        raise ConfigError(
            f"{task.name} was trained with method=full, which leaves a whole pipeline and no LoRA: "
            f"{options.run / 'subjects' / task.name / 'pipeline'}"
        )
    if options.out.suffix != ".safetensors":
        raise ConfigError(f"{options.out} must end in .safetensors")
    if options.out.exists() and not options.force:
        raise ConfigError(f"{options.out} is there already; --force writes over it")
    weights = read_tensors([trained_file(options.run, task.name, options.best)])
    metadata = {"format": "pt", "prompt": task.instance_prompt, "base_model": config.model.base}
    if options.format == "kohya":
        if len(load_tokenizers(base_folder(config.model.base))) > 1:
            raise ConfigError(
                "kohya's files for Stable Diffusion XL name layers as the original code does, which is not written "
                "here: use --format diffusers, which diffusers and most UIs read too"
            )
        if other := sorted({name.partition(".")[0] for name in weights} - {"unet"}):
            raise ConfigError(
                f"{task.name} has adapters in {other[0]}, and kohya's names are written of U-Nets alone: use --format "
                "diffusers, which diffusers and ComfyUI read too"
            )
        weights = kohya_names(weights)
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": str(task.rank)}
        metadata |= {"ss_network_alpha": str(task.rank)}
    with named_when_full(options.out), replaced(options.out) as temporary:
        save_weights(weights, temporary, metadata)
    print(f"{options.out}: {task.name}, {options.format}; prompt it with {task.instance_prompt!r}")
    return 0


def trained_file(run: Path, name: str, best: bool) -> Path:
    """Returns the LoRA file of a subject's last step, or with `best` that of its best step.

    Raises ConfigError where no step was found to be the best.
    """
    own = run / "subjects" / name
    if not best:
        return own / LORA_FILE
    if not (own / BEST_LORA).is_file():
        raise ConfigError(
            f"{name} has no {BEST_LORA}: no step of it was seen to be learnt and not copied yet, or its run had no "
            "validation.encoders that could tell. Leave --best out for the last step"
        )
    return own / BEST_LORA


def kohya_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors from peft's names (unet.a.b.lora_A.weight) to kohya's (lora_unet_a_b.lora_down.weight).

    An alpha is added to each layer. kohya's scripts scale by alpha / rank, and ours does not scale, so alpha is the
    rank.
    """
    renamed = {}
    for name, tensor in weights.items():
        layer, _, side = name.removeprefix("unet.").partition(".lora_")
        key = f"lora_unet_{layer.replace('.', '_')}"
        if side == "A.weight":
            renamed[f"{key}.lora_down.weight"] = tensor
            renamed[f"{key}.alpha"] = torch.tensor(float(len(tensor)))
        else:
            renamed[f"{key}.lora_up.weight"] = tensor
    return renamed
