"""`controlbooth sample`: pictures from prompts and conditions, with one ControlNet or several."""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from tqdm import tqdm

from controlbooth.data.loading.held_out import held_out
from controlbooth.data.loading.tokens import describe_cut
from controlbooth.data.pictures.images import decode_image, prepare_condition, to_rgb
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.models.base import Base
from controlbooth.models.control_schedules import CONDITIONAL, SCHEDULES
from controlbooth.models.pretrained import load_base
from controlbooth.models.sampling import Control, sample
from controlbooth.models.unlocked_decoder import load_networks
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.engine.deepspeed import DTYPES, resolve_precision
from controlbooth.trainer.evaluation.drawing import write_png
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.run.checkpoint import check_weights, complete_checkpoints, read_state
from controlbooth.trainer.run.same_base import check_same_base

PICTURES_AT_ONCE = 8


@dataclass(frozen=True)
class Source:
    """A ControlNet that was named on the command line."""

    kind: str
    where: Path
    scale: float
    schedule: str
    branches: Any


@dataclass(frozen=True)
class Request:
    """What one picture is made of."""

    prompt: str
    conditions: dict[str, np.ndarray]
    """By kind, each (H, W, 3) uint8."""
    seed: int


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth sample` is asked, and returns its exit status."""
    sources = [parse_control(text, options.schedule, options.guess) for text in options.control]
    if len({source.kind for source in sources}) < len(sources):
        raise ConfigError("two --control have the same kind; name each kind once")
    folders = {source.kind: controlnet_folder(source.where) for source in sources}
    base_name = options.base or base_of(sources)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[resolve_precision("auto", device, zero_stage=1)]
    base = load_base(base_folder(base_name), "auto", dtype, device)
    if not options.base:
        check_bases(sources, base)
    base, networks = open_controls(folders, base)
    requests = make_requests(options, sources, base)
    prompts = [*(row.prompt for row in requests), *([options.negative] if options.negative else [])]
    if line := describe_cut(base.tokenizers, prompts, "prompts"):
        print(f"warning: {line}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures: list[np.ndarray] = []
    for first in tqdm(range(0, len(requests), PICTURES_AT_ONCE), unit="batch", desc="sample"):
        rows = requests[first : first + PICTURES_AT_ONCE]
        controls = [
            Control(
                networks[source.kind],
                to_conditioning([row.conditions[source.kind] for row in rows]),
                source.scale,
                source.schedule,
                source.branches,
                options.start,
                options.end,
            )
            for source in sources
        ]
        made = sample(
            base,
            [row.prompt for row in rows],
            controls,
            seeds=[row.seed for row in rows],
            steps=options.steps,
            guidance_scale=options.guidance or (base.family.usual_guidance if base.family.is_transformer else 5.0),
            scheduler=options.scheduler,
            negative_prompt=options.negative,
        )
        pictures += list(made.numpy())
    for number, picture in enumerate(pictures):
        write_png(options.out / f"{number:04d}.png", picture)
    columns = {source.kind: np.stack([row.conditions[source.kind] for row in requests]) for source in sources}
    draw_grid(options.out / "grid.png", columns | {"picture": np.stack(pictures)}, [row.prompt for row in requests])
    print(f"{options.out}: {len(pictures)} pictures, and beside their conditions in grid.png")
    return 0


def parse_control(text: str, schedules: Sequence[str], guess: bool) -> Source:
    """Parses a value of --control, such as "edges=runs/x:0.8", and chooses the schedule for its kind.

    schedules: values of --schedule, NAME or KIND=NAME. guess: whether control enters the conditional branch alone, with
    logspace unless a schedule is given. Raises ConfigError for what cannot be understood.
    """
    kind, equals, rest = text.partition("=")
    where, colon, scale = rest.rpartition(":")
    if not colon:
        where, scale = rest, "1"
    try:
        factor = float(scale)
    except ValueError:
        where, factor = rest, 1.0  # the colon is part of the path
    if not (kind and equals and where and math.isfinite(factor)):
        raise ConfigError(f"--control {text!r} is not understood; write KIND=FOLDER or KIND=FOLDER:SCALE")
    named = [one.partition("=") for one in schedules]
    own = [name for one, has_kind, name in named if has_kind and one == kind] or [
        one for one, has_kind, _ in named if not has_kind
    ]
    schedule = own[-1] if own else "logspace" if guess else "uniform"
    if schedule not in SCHEDULES:
        raise ConfigError(f"--schedule {schedule!r} is not known. Use {', '.join(SCHEDULES)}")
    alone = guess or schedule in CONDITIONAL
    return Source(kind, Path(where), factor, schedule, "conditional" if alone else "both")


def base_of(sources: Sequence[Source]) -> str:
    """Finds the base that the runs among the sources were trained on.

    Raises ConfigError where there is none, where there are several, or where a run was trained on another kind than its
    own.
    """
    found = {}
    for source in sources:
        if checkpoints := complete_checkpoints(source.where):
            config = load_config(checkpoints[-1] / "config.yaml")
            found[config.model.base] = source.where
            if config.data.condition_name != source.kind:
                raise ConfigError(
                    f"{source.where} was trained on {config.data.condition_name!r}, and --control says {source.kind!r}"
                )
    if len(found) > 1:
        raise ConfigError(f"the runs have different bases ({', '.join(found)}), so they cannot be combined")
    if not found:
        raise ConfigError("say which base: --base FOLDER. A ControlNet's own folder does not tell")
    return next(iter(found))


def check_bases(sources: Sequence[Source], base: Base) -> None:
    """Raises ConfigError where the base has changed since one of these runs was trained on it."""
    for source in sources:
        for checkpoint in complete_checkpoints(source.where)[-1:]:
            state = read_state(checkpoint)
            remedy = f"Put it back as it was, or say --base {base.path} to draw with what it is now"
            check_same_base(state, base, f"at step {state['step']} of {source.where}", remedy)


def controlnet_folder(where: Path) -> Path:
    """Finds a ControlNet's folder: of a run, that of its latest checkpoint; else the path itself.

    Raises ConfigError where nothing is there, or it holds no ControlNet, and CheckpointError where weights are damaged.
    """
    if not where.exists():
        raise ConfigError(f"--control names {where}, which does not exist")
    checkpoints = complete_checkpoints(where)
    if checkpoints:
        check_weights(checkpoints[-1])
    folder = checkpoints[-1] / "controlnet" if checkpoints else where
    if not (folder / "config.json").is_file() and not folder.is_file():
        raise ConfigError(f"{where} is neither a run with a whole checkpoint nor a ControlNet's folder")
    return folder


def open_controls(folders: Mapping[str, Path], base: Base) -> tuple[Base, dict[str, Any]]:
    """Loads the ControlNets by kind, frozen, and returns the base and them.

    The base has the decoder that one of them was trained with, if one was. folders: by kind. Raises ConfigError where
    two have a decoder of their own: a picture has one decoder.
    """
    opened = {kind: load_networks(folder, base, base.dtype, kind=kind) for kind, folder in folders.items()}
    changed = [kind for kind, (own, _) in opened.items() if own is not base]
    if len(changed) > 1:
        raise ConfigError(
            f"{' and '.join(changed)} were each trained with a decoder of their own (model.unlock_decoder_at), and a "
            "picture has one decoder: use them one at a time"
        )
    networks = {kind: network.eval().requires_grad_(False).to(base.device) for kind, (_, network) in opened.items()}
    return opened[changed[0]][0] if changed else base, networks


def make_requests(options: argparse.Namespace, sources: Sequence[Source], base: Base) -> list[Request]:
    """Makes the requests for all pictures, with their prompts and conditions, from shards or from files.

    Raises ConfigError where the conditions do not match the controls, or differ in shape.
    """
    if options.data:
        if options.condition:
            raise ConfigError("--condition and --data exclude each other: conditions come from one of them")
        return requests_of_shards(options, sources, base)
    given = dict(text.partition("=")[::2] for text in options.condition)
    if {*given} != {source.kind for source in sources}:
        wanted = ", ".join(source.kind for source in sources) or "none"
        raise ConfigError(f"--condition is given for {', '.join(given) or 'nothing'}, and the controls are: {wanted}")
    conditions = {kind: read_condition(Path(path), kind, base) for kind, path in given.items()}
    sizes = {picture.shape[:2] for picture in conditions.values()}
    if len(sizes) > 1:
        raise ConfigError(f"the conditions have different shapes once they fit the base: {sorted(sizes)}")
    prompts = options.prompt or [""]
    return [Request(prompt, conditions, options.seed + number) for prompt in prompts for number in range(options.count)]


def requests_of_shards(options: argparse.Namespace, sources: Sequence[Source], base: Base) -> list[Request]:
    side = base.picture_size[0]
    dataset = open_dataset(options.data)
    requests: list[Request] = []
    for source in sources or [None]:
        kind = None if source is None else source.kind
        samples = list(held_out(dataset, options.count, condition=kind, resolution=side))
        if not requests:
            requests = [Request(one.caption, {}, options.seed + number) for number, one in enumerate(samples)]
            places = [one.place for one in samples]
        if [one.place for one in samples] != places:
            raise ConfigError(f"not every sample of {options.data} has all conditions; pack or annotate it anew")
        if kind is not None:
            requests = [
                replace(
                    row, conditions=row.conditions | {kind: np.ascontiguousarray(one.conditioning.transpose(1, 2, 0))}
                )
                for row, one in zip(requests, samples, strict=True)
                if one.conditioning is not None
            ]
    if options.prompt:
        requests = [
            replace(row, prompt=options.prompt[number % len(options.prompt)]) for number, row in enumerate(requests)
        ]
    return [replace(row, prompt="") for row in requests] if options.guess and not options.prompt else requests


def read_condition(path: Path, kind: str, base: Base) -> np.ndarray:
    """Reads a condition and fits it to the base: (H, W, 3) uint8.

    Its short side becomes that of the base's pictures, and its long one is cut to a multiple of 8. Whether it holds
    lines or labels, which are resized differently, is decided by the kind's name, or else by the picture.
    """
    picture = decode_image(path.read_bytes(), path.stem, path.suffix.lstrip("."), background=0)
    short, (height, width) = min(base.picture_size), picture.shape[:2]
    factor = short / min(height, width)
    shape = tuple(max(short, int(side * factor) // 8 * 8) for side in (height, width))
    return to_rgb(prepare_condition(picture, (height, width), kind, (shape[0], shape[1])))


def to_conditioning(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Stacks conditions for the ControlNet: B pictures (H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255.0
