"""Cheap checks before accelerators are spent: paths, arithmetic and disk space, without torch, in milliseconds.

All problems are returned together, each with its value and its remedy. What only a loaded model or a read sample can
tell is checked by the trainer; here is what people get wrong, found before anything starts.
"""

import contextlib
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from controlbooth.data.files.locks import is_locked
from controlbooth.data.files.records import Damaged
from controlbooth.launch.preflight.data import (
    check_cache,
    check_data,
    check_latent_cache,
    check_readable,
    check_shards,
    gib,
)
from controlbooth.launch.ranks.torchrun import Node, world_size
from controlbooth.models.families import UNET, Family
from controlbooth.models.files.weight_files import read_json, safetensors_header, shapes_of, weights_files
from controlbooth.models.noise.checks import check_noise, scheduler_file
from controlbooth.models.recognition import (
    base_remedy,
    check_beside,
    check_controlnet,
    check_part,
    check_tokenizer,
    parts_beside,
    recognise,
)
from controlbooth.trainer.config.families import misplaced
from controlbooth.trainer.config.run import (
    BUILT_IN,
    RunConfig,
    base_folder,
    base_path,
    gradient_accumulation_steps,
    run_folder,
)
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.controlnet.starting import refusals
from controlbooth.trainer.evaluation.verdict import cannot_announce
from controlbooth.trainer.run.continuing import holder_of, read_record
from controlbooth.trainer.run.starting import nearest

COPIED = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
"""Parts of a diffusers U-Net of which a ControlNet has a copy."""
COPIED_ORIGINAL = tuple(
    f"model.diffusion_model.{part}." for part in ("input_blocks", "time_embed", "label_emb", "middle_block")
)
"""The same in a single file of the original layout."""
DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")
"""Those that learn too when the decoder is unlocked."""
DECODER_ORIGINAL = tuple(f"model.diffusion_model.{part}." for part in ("output_blocks", "out"))
CUDA_ATTENTION = ("cudnn", "efficient")
"""Of PyTorch's kernels, those that a CPU has not; models/attention.py."""
TRAINING_BYTES = 4 + 4 + 4 + 4
"""A trained parameter in a checkpoint: the weight, its fp32 master copy and Adam's two moments. An upper bound."""


def preflight(config: RunConfig, node: Node, on_node: bool = True) -> list[str]:
    """Returns the problems that would stop the run, or make it worthless; none is an empty list.

    on_node: whether this machine is to train it, and not only sees the same shared disks as those that do.
    """
    checks = CHECKS if on_node else [check for check in CHECKS if check is not check_cache]
    return [problem for check in checks for problem in check(config, node)]


def check_ranks(config: RunConfig, node: Node) -> Iterator[str]:
    try:
        gradient_accumulation_steps(config, world_size(node))
    except ConfigError as error:
        yield str(error)
    if 0 < node.gpus < node.processes:
        yield (
            f"{node.processes} processes need as many GPUs, and this machine shows {node.gpus}. "
            f"Use --processes {node.gpus}, or look at CUDA_VISIBLE_DEVICES"
        )
    if config.engine.precision == "fp16" and node.gpus == 0:
        yield "engine.precision is fp16, which needs a GPU, and there is none here. Use bf16, fp32, or auto"
    if config.model.attention in CUDA_ATTENTION and node.gpus == 0:
        yield f"model.attention is {config.model.attention}, which needs CUDA, and there is no GPU here. Use auto"
    if config.model.attention == "xformers":
        if node.gpus == 0:
            yield "model.attention is xformers, which has no CPU kernels, and there is no GPU here. Use auto"
        elif importlib.util.find_spec("xformers") is None:
            yield 'model.attention is xformers, which is not installed: pip install "controlbooth[cuda]", or use auto'


def check_base(config: RunConfig, node: Node) -> Iterator[str]:
    yield from base_problems(config)
    if config.model.controlnet != "unet":
        yield from controlnet_problems(Path(config.model.controlnet))


def controlnet_problems(path: Path) -> Iterator[str]:
    """Yields why a run cannot go on from the weights of this ControlNet, as far as its files' headers tell."""
    named = f"model.controlnet is {str(path)!r}"
    remedy = (
        "give the folder of a ControlNet to go on from, as RUN/checkpoints/step-N/controlnet is one, or 'unet' to "
        "start one from the base"
    )
    if not path.exists():
        yield f"{named}, which does not exist: {remedy}"
    elif path.is_dir() and not ((path / "config.json").is_file() and any(path.glob("*.safetensors"))):
        yield f"{named}, which holds no config.json with a .safetensors file beside it: {remedy}"
    elif path.is_file() and path.suffix != ".safetensors":
        yield f"{named}, which is no .safetensors file: {remedy}"
    elif path.is_file():
        yield from problem_of(named, lambda: safetensors_header(path))
    else:
        yield from problem_of(named, lambda: check_controlnet(read_json(path / "config.json"), str(path)))
        yield from problem_of(named, partial(_read_headers, path, UNET.stem))


def base_problems(config: RunConfig | SubjectRunConfig) -> Iterator[str]:
    """Yields why the base of a run cannot be taken as a model of its family, as far as its files' headers tell.

    Settings of the run that have no meaning with the base's family are problems too.

    The trainer compares every tensor with the network that it belongs to, and so does a dry run (network_check.py).
    """
    name = config.model.base
    base, named = base_folder(name), f"model.base is {name!r}"
    if name == BUILT_IN and not (base / "unet" / "config.json").is_file():
        yield f"{named}, but its weights are not in {base}: this install is incomplete, install controlbooth again"
    elif not base.exists():
        remedy = base_remedy(name)
        told = f". If it is a name on the Hugging Face hub, run `{remedy[0]}`, then give {remedy[1]}" if remedy else ""
        yield (
            f"{named}, which does not exist: give a diffusers folder, a .safetensors file or '{BUILT_IN}'; "
            f"nothing is downloaded from a hub{told}"
        )
    elif base.is_file() and base.suffix != ".safetensors":
        yield (
            f"{named}, but there is no .safetensors file of its U-Net, the one format that cannot run code when it is "
            f"read: {_converting(name)}"
        )
    else:
        yield from _part_problems(named, base, config)


def _converting(name: str) -> str:
    """Returns how a base of another format becomes one that is read."""
    remedy = base_remedy(name)
    if remedy is None:
        return "convert the model with save_pretrained(..., safe_serialization=True)"
    return f"convert it by `{remedy[0]}`, then give {remedy[1]}"


def _part_problems(named: str, base: Path, config: RunConfig | SubjectRunConfig) -> Iterator[str]:
    """Yields the problems of a folder or a single file that is there: whether it is of the family that is asked for,
    and whether all of its parts are there."""
    found: list[Family] = []
    yield from problem_of(named, lambda: found.append(recognise(base, config.model.family)))
    for family in found:
        yield from misplaced(config, family)
        family = family if config.model.t5 else family.without_t5()
        beside = base if base.is_dir() else base.parent
        scheduler = beside / "scheduler" / "scheduler_config.json"
        if base.is_dir():
            yield from problem_of(named, lambda: scheduler_file(base))
            for part in family.parts:
                yield from problem_of(named, partial(check_part, base, part))
                yield from problem_of(named, partial(_read_headers, base / part.folder, part.stem))
        else:
            for part in parts_beside(family, safetensors_header(base)):
                missing = list(problem_of(named, partial(check_beside, base, part)))
                yield from missing or problem_of(named, partial(_read_headers, beside / part.folder, part.stem))
        if scheduler.is_file():
            yield from problem_of(named, partial(_check_scheduler_file, family, scheduler))
        for name in family.tokenizers:
            yield from problem_of(named, partial(check_tokenizer, beside, name))


def _read_headers(folder: Path, stem: str) -> None:
    shapes_of(weights_files(folder, stem))


def _check_scheduler_file(family: Family, path: Path) -> None:
    check_noise(family, read_json(path), str(path))


def problem_of(named: str, check: Callable[[], object]) -> Iterator[str]:
    """Runs a check and yields the ValueError or OSError that it raises, with the name of what is checked; nothing where
    it raises nothing."""
    try:
        check()
    except (ValueError, OSError) as error:
        yield f"{named}: {error}" if named else str(error)


def check_room(config: RunConfig, node: Node) -> Iterator[str]:
    """Checks whether the disk has room for the checkpoints that are kept. Yields the problem."""
    folder = run_folder(config)
    existing = nearest(folder)
    try:
        checkpoint = checkpoint_bytes(config)
    except (ValueError, OSError):
        return  # check_base has said what is wrong with the weights that this is estimated from
    kept = config.checkpoint.keep + config.checkpoint.keep_best + 1  # a new one is complete before an old one goes
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    needed, free = max(0, kept * checkpoint - there), shutil.disk_usage(existing).free
    if needed > free:
        yield (
            f"{kept} checkpoints of about {gib(checkpoint)} GiB need {gib(needed)} GiB more in {existing}, which has "
            f"{gib(free)} GiB free. Free some, change output, or lower checkpoint.keep or checkpoint.keep_best"
        )


def check_early_stop(config: RunConfig, node: Node) -> Iterator[str]:
    patience = config.validation.stop_after_convergence
    if patience is not None and (why := cannot_announce(config)):
        yield f"validation.stop_after_convergence={patience} would never end the run: {why}"


def check_free(config: RunConfig, node: Node) -> Iterator[str]:
    yield from free_problems(run_folder(config))


def free_problems(folder: Path) -> Iterator[str]:
    """Yields a problem where another training holds a run's folder. The trainer takes its lock; this only looks."""
    if "CONTROLBOOTH_ATTEMPT" in os.environ:  # by which an engine may replace a start of its own
        return
    if is_locked(folder / ".lock"):
        with contextlib.suppress(Damaged):
            holder = holder_of(read_record(folder))
            yield f"{folder} is in use by another training{holder}. Wait for it, stop it, or change name"


def check_start(config: RunConfig, node: Node) -> Iterator[str]:
    """Checks what the start of the run checks too, before it writes anything. Yields the problems."""
    yield from refusals(config)


CHECKS = (
    check_free,
    check_ranks,
    check_data,
    check_shards,
    check_readable,
    check_cache,
    check_latent_cache,
    check_base,
    check_start,
    check_room,
    check_early_stop,
)


def base_weights(base: Path) -> list[Path]:
    """Returns the .safetensors files that hold the base's U-Net. Raises ValueError and OSError where there are none."""
    return weights_files(base / UNET.folder, UNET.stem) if base.is_dir() else [base]


def checkpoint_bytes(config: RunConfig) -> int:
    """Estimates one checkpoint's bytes, from above, by the base's headers. Raises ValueError and OSError for damage."""
    base = base_path(config)
    shapes = shapes_of(base_weights(base))
    learning = COPIED if base.is_dir() else COPIED_ORIGINAL
    if config.model.unlock_decoder_at is not None:
        learning += DECODER if base.is_dir() else DECODER_ORIGINAL
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(learning))
    return parameters * (TRAINING_BYTES + (4 if config.optimizer.ema_decay else 0))
