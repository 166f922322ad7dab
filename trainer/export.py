"""`controlbooth export RUN OUT`: a checkpoint's weights in a format that others load, with a model card beside them."""

import argparse
import json
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from controlbooth.data.arguments import whole_number
from controlbooth.trainer.config import BUILT_IN, RunConfig, base_path, data_set_name, load_config
from controlbooth.trainer.disk import named_when_full

EXAMPLES = """\
examples:
  controlbooth export runs/edges exported/edges                       the latest checkpoint, as diffusers reads it
  controlbooth export runs/edges exported/edges --best --dtype fp16   the best validated one, at half the size
  controlbooth export runs/edges exported/ui --format single-file     one .safetensors for image UIs
"""
BEST_METRIC = "edge_f1"
PIPELINES = {"sdxl": "StableDiffusionXLControlNetPipeline"}
TAGS = {"sdxl": "stable-diffusion-xl"}
UNPUBLISHED = ("output", "tracking")
"""Sections of a run's configuration that say where it ran, not what it is, and may hold addresses and passwords."""


@dataclass(frozen=True)
class Exported:
    """What the model card tells."""

    config: RunConfig
    state: dict[str, Any]
    """state.json of the checkpoint."""
    family: str
    title: str
    dtype: str
    weights: str
    """The weights file's name in OUT."""
    grid: bool
    """Whether samples.png lies beside the card."""
    unet: bool = False
    """Whether unet/ lies there too, with a decoder that has learned with the ControlNet."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0. Raises ValueError or OSError, with what to do, for a run or folder that cannot be used."""
    arguments = _parser().parse_args(argv)
    checkpoint = find_checkpoint(arguments.run, arguments.step, arguments.best)
    export(arguments.run, checkpoint, arguments.out, arguments.format, arguments.dtype, arguments.force)
    print(f"{arguments.out}: {checkpoint.name} of {arguments.run}, {arguments.format}, {arguments.dtype}")
    print(f"How to use it: {arguments.out / 'README.md'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlbooth export",
        description="Write a run's ControlNet in a format that others load, with a model card.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run: it holds config.yaml and checkpoints/")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it must not exist, or be empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step", type=whole_number(0), metavar="N", help="the checkpoint of step N (default: the latest)"
    )
    which.add_argument("--best", action="store_true", help=f"the checkpoint with the highest {BEST_METRIC}")
    parser.add_argument("--format", choices=("diffusers", "single-file"), default="diffusers")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the written weights")
    parser.add_argument("--force", action="store_true", help="replace OUT and everything in it")
    return parser


def find_checkpoint(run: Path, step: int | None = None, best: bool = False) -> Path:
    """The folder of the latest complete checkpoint, of that of `step`, or of the best by edge F1.

    Raises FileNotFoundError where there is no such checkpoint; the message lists those that exist.
    """
    from controlbooth.trainer.checkpoint import complete_checkpoints, read_state

    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run / 'config.yaml'} does not exist, so {run} is no folder of a run")
    states = {path: read_state(path) for path in complete_checkpoints(run)}
    if not states:
        load_config(run / "config.yaml")  # which refuses a DreamBooth run by its name
        raise FileNotFoundError(f"{run / 'checkpoints'} holds no complete checkpoint. Train on until the first.")
    steps = ", ".join(str(state["step"]) for state in states.values())
    if step is not None:
        found = [path for path, state in states.items() if state["step"] == step]
        if not found:
            raise FileNotFoundError(f"{run} has no complete checkpoint of step {step}. There are: {steps}.")
        return found[0]
    if best:
        scores = {path: (state.get("metrics") or {}).get(BEST_METRIC) for path, state in states.items()}
        scored = {path: score for path, score in scores.items() if score is not None}
        if not scored:
            raise FileNotFoundError(
                f"no checkpoint of {run} (steps {steps}) has {BEST_METRIC}: it is measured where data.held_out is set "
                "and its samples hold edges. Choose one with --step N."
            )
        return max(scored, key=lambda path: (scored[path], states[path]["step"]))
    return max(states, key=lambda path: states[path]["step"])


def export(run: Path, checkpoint: Path, out: Path, format: str, dtype: str, force: bool = False) -> None:
    """Writes OUT whole or not at all: into a hidden folder beside it, which then takes its name.

    Raises FileExistsError where OUT holds something and `force` is not given, ValueError for what cannot be written,
    OSError on a full disk.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file. Give a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty. Give another folder, or --force to replace it with all it holds.")
    if run.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} holds the run {run}, and would be replaced. Give a folder outside of it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex  # the process's id is not, in containers
    partial = out.with_name(f".{out.name}.partial-{unique}")
    replaced = out.with_name(f".{out.name}.replaced-{unique}")
    partial.mkdir()
    try:
        with named_when_full(out):
            _write(run, checkpoint, partial, format, dtype)
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)


def _write(run: Path, checkpoint: Path, folder: Path, format: str, dtype: str) -> None:
    import torch

    from controlbooth.models.families import identify
    from controlbooth.models.pretrained import DECODER_FILE, controlnet_class, save_controlnet, save_single_file
    from controlbooth.trainer.checkpoint import check_weights, read_state

    config = load_config(checkpoint / "config.yaml")
    state = read_state(checkpoint)
    check_weights(checkpoint)
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    controlnet: Any = controlnet_class(checkpoint / "controlnet").from_pretrained(
        checkpoint / "controlnet", torch_dtype=torch_dtype, use_safetensors=True, local_files_only=True
    )
    unlocked = (checkpoint / "controlnet" / DECODER_FILE).is_file()
    if unlocked and format != "diffusers":
        raise ValueError(
            f"{checkpoint.name} has a decoder that has learned with the ControlNet, and a single file has no place for "
            "it: export it with --format diffusers, which writes the U-Net beside the ControlNet"
        )
    # a ControlNet's configuration says of its base all that tells families apart
    unet_like = dict(controlnet.config) | {"_class_name": "UNet2DConditionModel"}
    family = identify(unet_like | {"out_channels": unet_like["in_channels"]})
    if format == "single-file" and family.architecture is None:
        raise ValueError(
            f"{run} has {family.title} as its base, which has no original layout; a single file is in that layout, and "
            "image UIs read it for Stable Diffusion 1.x, 2.x and XL. Export this one with --format diffusers"
        )
    if format == "diffusers":
        save_controlnet(controlnet, folder)
        weights = "diffusion_pytorch_model.safetensors"
    else:
        weights = f"{config.name}.safetensors"
        save_single_file(controlnet, folder / weights)
    if unlocked:
        _write_unet(config, state, checkpoint, folder, torch_dtype)
    grid = run / "samples" / f"{checkpoint.name}.png"
    if grid.is_file():
        shutil.copyfile(grid, folder / "samples.png")
    exported = Exported(config, state, family.name, family.title, dtype, weights, grid.is_file(), unlocked)
    (folder / "README.md").write_text(model_card(exported))


def _write_unet(config: RunConfig, state: dict[str, Any], checkpoint: Path, folder: Path, dtype: Any) -> None:
    """The whole U-Net: locked parts from the base, which must be there and the one that was trained on."""
    from controlbooth.models.decoder import load_networks
    from controlbooth.models.pretrained import UNET_FOLDER, load_base
    from controlbooth.models.weights import save_pretrained

    base = load_base(base_path(config), config.model.family, dtype, "cpu")
    if base.digest != state["base_digest"]:
        raise ValueError(
            f"{base.path} is not the base that {checkpoint.name} was trained on: its weights have the digest "
            f"{base.digest[:12]}, and were {state['base_digest'][:12]}. The U-Net is made of both: put that base back"
        )
    unet: Any = load_networks(checkpoint / "controlnet", base)[0].unet
    save_pretrained(unet, folder / UNET_FOLDER)


def model_card(exported: Exported) -> str:
    """README.md: a YAML header for model hubs, then what this is, how to use it, how it did and how it was made."""
    config, state = exported.config, exported.state
    header = dict(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=_base_name(config),
        tags=["controlnet", TAGS.get(exported.family, "stable-diffusion"), config.data.condition_name, "controlbooth"],
    )
    is_single = exported.weights != "diffusion_pytorch_model.safetensors"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {config.name}",
        f"A ControlNet for {exported.title} (`{_base_name(config)}`) that follows **{config.data.condition_name}** "
        f"pictures. Trained with controlbooth for {state['step']:,} steps of {config.global_batch_size} samples "
        f"at {config.data.resolution} pixels.",
        _unet_note(exported) if exported.unet else "",
        "![Samples of the validation set](samples.png)" if exported.grid else "",
        "## Use",
        _single_file_usage(exported) if is_single else f"In this folder:\n\n```python\n{usage(exported)}```",
        "## Figures",
        _metrics_table(state.get("metrics") or {}),
        "## Origin",
        _origin_table(exported),
        "<details><summary>Configuration of the run</summary>\n",
        f"```yaml\n{_published_config(config)}```\n\n</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def usage(exported: Exported) -> str:
    """A script that loads the diffusers folder it lies in and turns condition.png into picture.png."""
    config = exported.config
    pipeline = PIPELINES.get(exported.family, "StableDiffusionControlNetPipeline")
    base = config.model.base
    if base == BUILT_IN:
        base_line, base_name = "from controlbooth.models.pretrained import MINIATURE\n", "MINIATURE"
    else:
        base_line, base_name = "", json.dumps(base)
    load = "from_single_file" if base.endswith(".safetensors") else "from_pretrained"
    size = config.data.resolution
    model = config.model
    if model.trainable_copy == "full" and model.hint_network == "released":
        own_line, name = "", "ControlNetModel"
        imported = f"ControlNetModel, DDIMScheduler, {pipeline}"
    else:
        own_line, name = "from controlbooth.models.variants import VariantControlNet\n", "VariantControlNet"
        imported = f"DDIMScheduler, {pipeline}"
    unet_line = unet_argument = ""
    if exported.unet:
        imported += ", UNet2DConditionModel"
        unet_line = 'unet = UNet2DConditionModel.from_pretrained("unet", torch_dtype=torch.float32)\n'
        unet_argument = "unet=unet, "
    return f"""\
import torch
{base_line}{own_line}from diffusers import {imported}
from diffusers.utils import load_image

controlnet = {name}.from_pretrained(".", torch_dtype=torch.float32)
{unet_line}pipeline = {pipeline}.{load}(
    {base_name}, {unet_argument}controlnet=controlnet, torch_dtype=torch.float32
)
# Many bases' scheduler files leave these out, and clip latents by the defaults for pixels then.
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
condition = load_image("condition.png")
assert condition.size == ({size}, {size}), "make the condition at {size} x {size} pixels: shrinking blurs lines"
picture = pipeline(
    "a prompt like the captions of the training set",
    image=condition,
    num_inference_steps={config.validation.sampling_steps},
    guidance_scale={config.validation.guidance_scale},
    generator=torch.Generator().manual_seed(0),
).images[0]
picture.save("picture.png")
"""


def _unet_note(exported: Exported) -> str:
    config = exported.config
    return (
        f"The decoder of the U-Net has learned with it, from step {config.model.unlock_decoder_at:,} on at a learning "
        f"rate of {config.optimizer.decoder_learning_rate:g}. Use it with the U-Net in `unet/`, not with the base's."
    )


def _single_file_usage(exported: Exported) -> str:
    return (
        f"`{exported.weights}` has the key names of the original ControlNet code (`control_model.*`). Put it where "
        f"your image UI keeps its ControlNets, and use it with a checkpoint of {exported.title}; without a "
        f"preprocessor if the picture that you give is already of the kind {exported.config.data.condition_name}."
    )


def _metrics_table(metrics: dict[str, Any]) -> str:
    if not metrics:
        return "This checkpoint was not validated."
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join(["On held-out samples:\n", "| figure | value |", "| --- | --- |", *rows])


def _origin_table(exported: Exported) -> str:
    config, state = exported.config, exported.state
    decay = config.optimizer.ema_decay
    rows = {
        "step": state["step"],
        "samples seen": f"{state['step'] * config.global_batch_size:,}",
        "weights": exported.dtype if decay is None else f"{exported.dtype}, moving average with decay {decay}",
        "digest of the checkpoint's weights": state.get("digest"),
        "data set": data_set_name(config),
        "fingerprint of the data set": state.get("dataset_fingerprint"),
        "digest of the base model": state.get("base_digest"),
        "prompt dropout": config.data.prompt_dropout,
        "seed": config.seed,
    }
    shown = [f"| {name} | `{value}` |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *shown])


def _published_config(config: RunConfig) -> str:
    tree = config.model_dump(mode="json")
    return yaml.safe_dump({key: value for key, value in tree.items() if key not in UNPUBLISHED}, sort_keys=False)


def _base_name(config: RunConfig) -> str:
    """The base as a card names it: a hub's owner/name or the last part of a path, which means nothing elsewhere."""
    base = config.model.base
    return base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else Path(base).name
