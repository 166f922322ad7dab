"""`controlbooth export RUN OUT`: a checkpoint's weights in a format that others load, with a model card beside them."""

import argparse
import shutil
import uuid
from pathlib import Path
from typing import Any

from controlbooth.data.errors import MissingFile, Occupied, UserError
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig, base_path
from controlbooth.trainer.evaluation.record import read_result
from controlbooth.trainer.model_card import LORA_FILE, WHOLE_FILE, Exported, model_card
from controlbooth.trainer.run.best import best_by
from controlbooth.trainer.run.disk_full import named_when_full


def run(arguments: argparse.Namespace) -> int:
    """Returns 0. Raises ValueError or OSError, with what to do, for a run or folder that cannot be used."""
    checkpoint = find_checkpoint(arguments.run, arguments.step, arguments.best)
    export(arguments.run, checkpoint, arguments.out, arguments.format, arguments.dtype, arguments.force)
    print(f"{arguments.out}: {checkpoint.name} of {arguments.run}, {arguments.format}, {arguments.dtype}")
    print(f"How to use it: {arguments.out / 'README.md'}")
    return 0


def find_checkpoint(run: Path, step: int | None = None, best: bool = False) -> Path:
    """Finds the folder of the latest complete checkpoint, or of that of `step`, or of the best one.

    The best is chosen by the figure of its validations that tells control, which is that of the trained kind where
    there is one. Raises FileNotFoundError where there is no such checkpoint; the message lists those that exist.
    """
    from controlbooth.trainer.run.checkpoint import complete_checkpoints, read_state

    if not (run / "config.yaml").is_file():
        raise MissingFile(f"{run / 'config.yaml'} does not exist, so {run} is no folder of a run")
    states = {path: read_state(path) for path in complete_checkpoints(run)}
    if not states:
        load_config(run / "config.yaml")  # which refuses a DreamBooth run by its name
        raise MissingFile(f"{run / 'checkpoints'} holds no complete checkpoint. Train on until the first.")
    steps = ", ".join(str(state["step"]) for state in states.values())
    if step is not None:
        found = [path for path, state in states.items() if state["step"] == step]
        if not found:
            raise MissingFile(f"{run} has no complete checkpoint of step {step}. There are: {steps}.")
        return found[0]
    if best:
        metrics = {path: state.get("metrics") or {} for path, state in states.items()}
        figure = best_by(metrics.values())
        scored = {path: own[figure] for path, own in metrics.items() if figure in own}
        if not scored:
            raise MissingFile(
                f"no checkpoint of {run} (steps {steps}) has a figure that tells control: it is measured where "
                "data.held_out is set and its samples hold the condition or edges. Choose one with --step N."
            )
        return max(scored, key=lambda path: (scored[path], states[path]["step"]))
    return max(states, key=lambda path: states[path]["step"])


def export(run: Path, checkpoint: Path, out: Path, format: str, dtype: str, force: bool = False) -> None:
    """Writes OUT whole or not at all: into a hidden folder beside it, which then takes its name.

    Raises FileExistsError where OUT holds something and `force` is not given, ValueError for what cannot be written,
    OSError on a full disk.
    """
    if out.exists() and not out.is_dir():
        raise Occupied(f"{out} is a file. Give a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise Occupied(f"{out} is not empty. Give another folder, or --force to replace it with all it holds.")
    if run.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds the run {run}, and would be replaced. Give a folder outside of it.")
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

    from controlbooth.models.denoisers.control_lora import ControlLora
    from controlbooth.models.denoisers.flux_control_lora import FluxControlLora, small_weights
    from controlbooth.models.families import identify
    from controlbooth.models.files.weights import save_weights
    from controlbooth.models.pretrained import (
        DECODER_FILE,
        read_controlnet,
        read_controlnet_folder,
        save_controlnet,
        save_single_file,
    )
    from controlbooth.trainer.run.checkpoint import check_weights, read_state

    config = load_config(checkpoint / "config.yaml")
    state = read_state(checkpoint)
    check_weights(checkpoint)
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    controlnet: Any = read_controlnet_folder(checkpoint / "controlnet", torch_dtype)
    unlocked = (checkpoint / "controlnet" / DECODER_FILE).is_file()
    if unlocked and format != "diffusers":
        raise UserError(
            f"{checkpoint.name} has a decoder that has learned with the ControlNet, and a single file has no place for "
            "it: export it with --format diffusers, which writes the U-Net beside the ControlNet"
        )
    family = identify(base_like(controlnet))
    if format == "single-file" and family.architecture is None:
        raise UserError(
            f"{run} has {family.title} as its base, which has no original layout; a single file is in that layout, and "
            "image UIs read it for Stable Diffusion 1.x, 2.x and XL. Export this one with --format diffusers"
        )
    if format == "diffusers":
        if isinstance(controlnet, ControlLora):
            base = _base_of(config, state, checkpoint, torch.float32, "The whole ControlNet")
            controlnet = read_controlnet(checkpoint / "controlnet", base.denoiser).to(torch_dtype)
        if isinstance(controlnet, FluxControlLora):
            weights = LORA_FILE
            save_weights(small_weights(controlnet), folder / weights)
        else:
            weights = WHOLE_FILE
            save_controlnet(controlnet, folder)
    else:
        weights = f"{config.name}.safetensors"
        save_single_file(controlnet, folder / weights)
    if unlocked:
        _write_unet(config, state, checkpoint, folder, torch_dtype)
    grid = run / "samples" / f"{checkpoint.name}.png"
    if grid.is_file():
        shutil.copyfile(grid, folder / "samples.png")
    evaluation = _evaluation_of(run, state["digest"])
    exported = Exported(
        config, state, family.name, family.title, dtype, weights, grid.is_file(), evaluation, unlocked,
        pixels=type(controlnet).__name__ == "PixelSD3ControlNet",
    )  # fmt: skip
    (folder / "README.md").write_text(model_card(exported))


def base_like(controlnet: Any) -> dict[str, Any]:
    """Converts a ControlNet's configuration to one like its base's, with all that tells families apart."""
    from controlbooth.models.denoisers.registry import denoiser_of

    config = dict(controlnet.config)
    return config | {"_class_name": denoiser_of(controlnet).base, "out_channels": config["in_channels"]}


def _write_unet(config: RunConfig, state: dict[str, Any], checkpoint: Path, folder: Path, dtype: Any) -> None:
    """Writes the whole U-Net, with the locked parts of the base. Raises ValueError where that is not the base that was
    trained on."""
    from controlbooth.models.files.weights import save_pretrained
    from controlbooth.models.pretrained import UNET_FOLDER
    from controlbooth.models.unlocked_decoder import load_networks

    base = _base_of(config, state, checkpoint, dtype, "The U-Net")
    unet: Any = load_networks(checkpoint / "controlnet", base)[0].denoiser
    save_pretrained(unet, folder / UNET_FOLDER)


def _base_of(config: RunConfig, state: dict[str, Any], checkpoint: Path, dtype: Any, made: str) -> Any:
    """Reads the base that a checkpoint was trained on. made: what is made of both, for the message.

    Raises ValueError where the base there is another one.
    """
    from controlbooth.models.pretrained import load_base
    from controlbooth.trainer.run.same_base import check_same_base

    base = load_base(base_path(config), config.model.family, dtype, "cpu")
    if base.digest != state["base_digest"]:
        raise UserError(
            f"{base.path} is not the base that {checkpoint.name} was trained on: its weights have the digest "
            f"{base.digest[:12]}, and were {state['base_digest'][:12]}. {made} is made of both: put that base back"
        )
    own = {"base": {"unet": state["base"]["unet"]}} if "unet" in state.get("base", {}) else {}  # of no other part
    check_same_base(own, base, f"at step {state['step']}", f"{made} is made of both: put that base back")
    return base


def _evaluation_of(run: Path, digest: str) -> dict[str, Any] | None:
    """Returns what `controlbooth evaluate` measured of the weights with this digest; None where it measured others, or
    none."""
    evaluation = read_result(run / "evaluation", "digest", "samples", "resolution", "figures", "sampler")
    return evaluation if evaluation and evaluation["digest"] == digest else None
