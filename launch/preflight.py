"""Cheap checks before accelerators are spent: paths, arithmetic and disk space, without torch, in milliseconds.

All problems are returned together, each with its value and its remedy. What only a loaded model or a read sample can
tell is checked by the trainer; here is what people get wrong, found before anything starts.
"""

import contextlib
import fcntl
import glob
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import braceexpand

from controlbooth.launch.torchrun import Node, world_size
from controlbooth.trainer.config import (
    BUILT_IN,
    ConfigError,
    RunConfig,
    base_folder,
    base_path,
    gradient_accumulation_steps,
    run_folder,
    sources,
)

COPIED = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
"""Parts of a diffusers U-Net of which a ControlNet has a copy."""
COPIED_ORIGINAL = tuple(
    f"model.diffusion_model.{part}." for part in ("input_blocks", "time_embed", "label_emb", "middle_block")
)
"""The same in a single file of the original layout."""
DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")
"""Those that learn too when the decoder is unlocked."""
DECODER_ORIGINAL = tuple(f"model.diffusion_model.{part}." for part in ("output_blocks", "out"))
TRAINING_BYTES = 4 + 4 + 4 + 4
"""A trained parameter in a checkpoint: the weight, its fp32 master copy and Adam's two moments. An upper bound."""


def preflight(config: RunConfig, node: Node, on_node: bool = True) -> list[str]:
    """Problems that would stop the run, or make it worthless; none is an empty list.

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
    if config.model.attention == "xformers":
        if node.gpus == 0:
            yield "model.attention is xformers, which has no CPU kernels, and there is no GPU here. Use auto"
        elif importlib.util.find_spec("xformers") is None:
            yield 'model.attention is xformers, which is not installed: pip install "controlbooth[cuda]", or use auto'


def check_data(config: RunConfig, node: Node) -> Iterator[str]:
    shards: dict[str, set[str]] = {"data.shards": set()}
    named = [("data.shards", source.shards) for source in sources(config)]
    for key, location in (*named, ("data.held_out", config.data.held_out)):
        if location is None:
            continue
        try:
            found = find_shards(location)
            shards.setdefault(key, set()).update(uri if is_remote(uri) else str(Path(uri).resolve()) for uri in found)
            remote = [uri for uri in found if is_remote(uri)]
            if remote and key == "data.shards" and config.data.cache is None:
                yield (
                    f"data.shards is {location!r}, with {len(remote)} shards in a store (first: {remote[0]}), and "
                    "data.cache is not set: give a folder on a local disk of each node"
                )
        except (OSError, ValueError) as error:
            yield f"{key} is {location!r}: {error}"
    common = shards["data.shards"] & shards.get("data.held_out", set())
    if common:
        yield (
            f"{len(common)} shards are both in data.shards and in data.held_out (first: {min(common)}), so validation "
            "would measure what was trained on. Name other shards in data.held_out"
        )


def find_shards(location: str) -> list[str]:
    """Paths of the tars that a location names, all of them existing, and the URIs that a manifest lists, not asked for.

    Raises FileNotFoundError and ValueError.
    """
    if is_remote(location):
        raise ValueError(
            f"remote shards are indexed first: run `controlbooth data index '{location}' --manifest set.jsonl`, "
            "and name set.jsonl here"
        )
    path = Path(location)
    manifest = path / "manifest.jsonl" if path.is_dir() else path
    remote = []
    if manifest.suffix == ".jsonl" and manifest.exists():
        uris = [row["uri"] for row in _manifest_rows(manifest)]
        remote = [uri for uri in uris if is_remote(uri)]
        found = [manifest.parent / uri for uri in uris if not is_remote(uri)]
    elif path.is_dir():
        found = sorted(path.glob("*.tar"))
    else:
        try:
            patterns = list(braceexpand.braceexpand(location))
        except ValueError as error:
            raise ValueError("its braces do not match; write shards-{000..009}.tar") from error
        names = [sorted(glob.glob(one)) if glob.has_magic(one) else [one] for one in patterns]
        found = [Path(name) for group in names for name in group]
    remedy = "correct the path, or write shards with `controlbooth data pack`"
    if not found and not remote:
        raise FileNotFoundError(f"there are no .tar shards; {remedy}")
    if missing := [shard for shard in found if not shard.is_file()]:
        some = f"{len(missing)} of {len(found)} shards do not exist (first: {missing[0]})"
        raise FileNotFoundError(f"{some if len(found) > 1 else 'it does not exist'}; {remedy}")
    return [*map(str, found), *remote]


def is_remote(location: str) -> bool:
    """Whether it is a URI; `data.storage` says which of them are read."""
    return "://" in location


def _manifest_rows(manifest: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(manifest.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(row | {"uri": row["uri"]})  # each of which fails where it is no row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {manifest} is no shard row ({error!r}): "
                f"run `controlbooth data index {manifest.parent}`"
            ) from error
    return rows


def check_cache(config: RunConfig, node: Node) -> Iterator[str]:
    """Whether the disk has what the cache of remote shards may come to hold."""
    cache = config.data.cache
    manifests = [Path(source.shards) for source in sources(config) if source.shards.endswith(".jsonl")]
    if cache is None:
        return
    try:
        rows = [row for manifest in manifests if manifest.is_file() for row in _manifest_rows(manifest)]
        data_set = sum(row.get("bytes", 0) for row in rows if is_remote(row["uri"]))
    except ValueError:
        return  # check_data has said which line is wrong
    existing = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield f"data.cache is {cache}, but {existing} is no folder that can be written to. Change data.cache"
        return
    there = sum(path.stat().st_size for path in cache.glob("*.tar")) if cache.is_dir() else 0
    needed, free = min(data_set, config.data.cache_gib * 2**30) - there, shutil.disk_usage(existing).free
    if needed > free:
        yield (
            f"the cache in {cache} will come to hold {_gib(needed)} GiB more, and its disk has {_gib(free)} GiB free. "
            f"Free some, change data.cache, or lower data.cache_gib={config.data.cache_gib:g}"
        )


def check_base(config: RunConfig, node: Node) -> Iterator[str]:
    yield from base_problems(config.model.base, config.model.family)
    if config.model.controlnet != "unet" and not Path(config.model.controlnet).exists():
        yield (
            f"model.controlnet is {config.model.controlnet!r}, which does not exist: "
            "give the folder of a ControlNet to go on from, or 'unet' to start one from the base"
        )


def base_problems(name: str, family: str) -> Iterator[str]:
    """Why the base of this name cannot be taken as a model of this family."""
    base, named = base_folder(name), f"model.base is {name!r}"
    if name == BUILT_IN and not (base / "unet" / "config.json").is_file():
        yield f"{named}, but its weights are not in {base}: this install is incomplete, install controlbooth again"
    elif not base.exists():
        yield (
            f"{named}, which does not exist: give a diffusers folder, a .safetensors file or '{BUILT_IN}'; "
            "nothing is downloaded from a hub"
        )
    elif base.is_dir() and not (base / "unet" / "config.json").is_file():
        yield (
            f"{named}, but there is no {base / 'unet' / 'config.json'}: "
            "give the folder of a whole Stable Diffusion model, which holds unet/, vae/, text_encoder/ and tokenizer/"
        )
    elif not base_weights(base):
        yield (
            f"{named}, but there is no .safetensors file of its U-Net, the one format that cannot run code when it is "
            "read: convert the model with save_pretrained(..., safe_serialization=True)"
        )
    else:
        for file in base_weights(base):
            try:
                safetensors_header(file)
            except ValueError as error:
                yield f"{named}: {error}"
        if base.is_dir():
            yield from _check_family(family, base)


def _check_family(family: str, base: Path) -> Iterator[str]:
    """Only SDXL is told apart here, the mistake that wastes a download; the loader tells all families."""
    is_xl = json.loads((base / "unet" / "config.json").read_text()).get("addition_embed_type") == "text_time"
    if family != "auto" and is_xl != (family == "sdxl"):
        yield f"model.family is {family}, but {base} is {'' if is_xl else 'not '}Stable Diffusion XL. Use auto"


def check_output(config: RunConfig, node: Node) -> Iterator[str]:
    folder = run_folder(config)
    existing = nearest(folder)
    if not existing.is_dir():
        yield f"the run's folder would be {folder}, but {existing} is a file. Change output or name"
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        yield f"the run's folder would be {folder}, but {existing} is not writable. Change output"
        return
    try:
        checkpoint = checkpoint_bytes(config)
    except ValueError:
        return  # check_base has said what is wrong with the weights that this is estimated from
    kept = config.checkpoint.keep + config.checkpoint.keep_best + 1  # a new one is complete before an old one goes
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    needed, free = max(0, kept * checkpoint - there), shutil.disk_usage(existing).free
    if needed > free:
        yield (
            f"{kept} checkpoints of about {_gib(checkpoint)} GiB need {_gib(needed)} GiB more in {existing}, which has "
            f"{_gib(free)} GiB free. Free some, change output, or lower checkpoint.keep or checkpoint.keep_best"
        )


def nearest(path: Path) -> Path:
    """The path itself or the innermost of its parents, whichever exists: what decides whether it can be made."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def check_columns(config: RunConfig, node: Node) -> Iterator[str]:
    """Whether there are any; the trainer compares what they are of."""
    folder = config.data.columns
    if folder is not None and not (folder / "columns.json").is_file():
        yield (
            f"data.columns is {folder}, which holds no column caches: write them with `controlbooth data precompute` "
            "and the arguments of this run, or leave data.columns out"
        )


def check_free(config: RunConfig, node: Node) -> Iterator[str]:
    yield from free_problems(run_folder(config))


def free_problems(folder: Path) -> Iterator[str]:
    """Whether another training holds a run's folder. The trainer takes it; here it is only asked."""
    lock = folder / ".lock"
    if not lock.exists() or "CONTROLBOOTH_ATTEMPT" in os.environ:  # by which an engine may replace a start of its own
        return
    with contextlib.suppress(OSError), lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield f"{folder} is in use by another training{holder(folder)}. Wait for it, stop it, or change name"


def holder(folder: Path) -> str:
    """Who has taken a run's folder last, as attempt.json says; empty where there is none."""
    record = folder / "attempt.json"
    facts = json.loads(record.read_text()) if record.is_file() else {}
    if not facts:
        return ""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["time"]))
    return f": process {facts['process']} on {facts['host']}, since {since}"


CHECKS = (check_free, check_ranks, check_data, check_cache, check_columns, check_base, check_output)


def base_weights(base: Path) -> list[Path]:
    """The .safetensors files that hold the base's U-Net."""
    return sorted((base / "unet").glob("*.safetensors")) if base.is_dir() else [base] * (base.suffix == ".safetensors")


def checkpoint_bytes(config: RunConfig) -> int:
    """An upper estimate of one checkpoint's size, from the headers of the base. Raises ValueError for damaged ones."""
    base = base_path(config)
    shapes: dict[str, list[int]] = {}
    for file in base_weights(base):  # a name that comes again is a variant of the same weights, such as fp16
        shapes |= {name: entry["shape"] for name, entry in safetensors_header(file).items()}
    learning = COPIED if base.is_dir() else COPIED_ORIGINAL
    if config.model.unlock_decoder_at is not None:
        learning += DECODER if base.is_dir() else DECODER_ORIGINAL
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(learning))
    return parameters * (TRAINING_BYTES + (4 if config.optimizer.ema_decay else 0))


def safetensors_header(file: Path) -> dict[str, Any]:
    """name -> {dtype, shape, data_offsets} of every tensor. Raises ValueError for a file that is none or incomplete."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        try:
            header = json.loads(stream.read(length)) if length < size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{file} is not a safetensors file; a pointer of git-lfs is not its content. Fetch it again")
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{file} has {size} bytes where its header says {8 + length + end}. Fetch it again")
    return header


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f}"
