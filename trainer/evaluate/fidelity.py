"""`controlbooth fidelity RUN`: what a run's control is worth on its held-out set, beside pictures that bound it."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from controlbooth.data.manifest import open_dataset
from controlbooth.data.scenes import Scene, SceneObject, render, scene
from controlbooth.models.pretrained import load_base, load_controlnet
from controlbooth.trainer.checkpoint import complete_checkpoints, read_state
from controlbooth.trainer.config import ConfigError, RunConfig, base_path, load_config
from controlbooth.trainer.distributed import World
from controlbooth.trainer.evaluate.control import control_fidelity
from controlbooth.trainer.evaluate.grids import draw_grid
from controlbooth.trainer.evaluate.judge import load_judge, obedience, read
from controlbooth.trainer.evaluate.validate import HeldOutSet, generate, load_held_out
from controlbooth.trainer.spool import read_metrics


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="controlbooth fidelity",
        description="Samples a run's held-out conditions without control, with control, and with control and no "
        "prompt, extracts the condition again from each picture and prints how well it matches. "
        "Writes RUN/fidelity.json and RUN/fidelity.png.",
        epilog="example:\n  controlbooth fidelity runs/quickstart --samples 64",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--samples", type=int, default=64, help="held-out conditions (default: 64)")
    options = parser.parse_args(argv)
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}; at least one picture is needed")
    if not (options.run / "config.yaml").is_file():
        raise ConfigError(
            f"{options.run} holds no config.yaml, so it is no run. Give the folder that `controlbooth train` made"
        )
    whole = complete_checkpoints(options.run)
    if not whole:
        raise ConfigError(f"{options.run} holds no whole checkpoint yet. Train it further")
    config = load_config(whole[-1] / "config.yaml")
    if config.data.held_out is None:
        raise ConfigError(f"{options.run} has no held-out shards: start it again with data.held_out=SHARDS")
    result = measure(config, options.run, whole[-1], options.samples)
    target = options.run / "fidelity.json"
    temporary = target.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=2))
    temporary.replace(target)
    print(table(result))
    print(f"pictures: {options.run / 'fidelity.png'}")
    return 0


def measure(config: RunConfig, run: Path, checkpoint: Path, samples: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(base_path(config), config.model.family, torch.float32, device)
    controlnet: Any = load_controlnet(checkpoint / "controlnet", base.unet)
    controlnet.eval().to(device)
    assert config.data.held_out
    dataset = open_dataset(config.data.held_out)
    held = load_held_out(dataset, samples, config.data.condition, config.data.resolution)
    world = World(0, 1, 0, device)
    ways = {
        "without control": (None, False),
        "with control": (controlnet, False),
        "with control, no prompt": (controlnet, True),
    }
    images = {
        name: generate(base, network, held, config.validation, world, empty_prompt, progress=name)
        for name, (network, empty_prompt) in ways.items()
    }
    scenes = scenes_of(held)
    if scenes:
        size = config.data.resolution
        images["discs at the true places"] = np.stack([render(discs(what, size), size).image for what in scenes])
    images["real pictures"] = held.targets
    figures: dict[str, dict[str, float]] = {}
    for name, pictures in images.items():
        values = control_fidelity(pictures, held.edges, held.segmentation)
        figures[name] = {key: float(value.mean()) for key, value in values.items()}
        if scenes and config.data.resolution == 64 and name != "discs at the true places":
            figures[name] |= {
                f"says_{key}": value for key, value in obedience(read(load_judge(), pictures), scenes).items()
            }
    shown = slice(0, 8)
    columns = {"condition": held.conditions[shown], **{n: i[shown] for n, i in images.items() if n != "real pictures"}}
    draw_grid(run / "fidelity.png", columns | {"target": held.targets[shown]}, held.captions[shown])
    state = read_state(checkpoint)
    return dict(
        samples=samples,
        step=state["step"],
        digest=state["digest"],
        pictures=figures,
        snapped_at=snapped_at(run),
        curve=validation_curve(run, "mask_iou"),
    )


def scenes_of(held: HeldOutSet) -> list[Scene]:
    """The scenes behind keys such as scene-1000003-00000007; empty where the set holds anything else."""
    parts = [key.split("-") for key in held.keys]
    if not all(len(part) == 3 and part[0] == "scene" and part[1].isdigit() and part[2].isdigit() for part in parts):
        return []
    scenes = [scene(int(part[1]), int(part[2])) for part in parts]
    return scenes if [what.caption for what in scenes] == held.captions else []


def discs(what: Scene, size: int) -> Scene:
    """The scene with each object replaced by a disc of its area at its centre of mass: place and size, no outline."""
    rendering = render(what, size)
    objects = []
    for place, thing in enumerate(what.objects):
        rows, columns = np.nonzero(rendering.instances == place + 1)
        radius = (len(rows) / np.pi) ** 0.5 / size / 0.95  # a ball fills .95 of its radius
        x, y = (columns.mean() + 0.5) / size, (rows.mean() + 0.5) / size
        objects.append(
            SceneObject("ball", thing.colour, thing.size, float(x), float(y), float(radius), 0.0, thing.tint)
        )
    return Scene(tuple(objects), what.background, what.horizon, what.slope)


def validation_curve(run: Path, name: str) -> dict[int, float]:
    return {
        step: metrics[f"validation/{name}"] for step, _, metrics in read_metrics(run) if f"validation/{name}" in metrics
    }


def snapped_at(run: Path) -> int | None:
    """The first validated step at which the mask IoU (or, without masks, the edge F1) is past the middle between its
    first and its best value, if it rose by at least .15 at all."""
    for name in ("mask_iou", "edge_f1"):
        curve = validation_curve(run, name)
        if curve:
            first, best = curve[min(curve)], max(curve.values())
            above = [step for step, value in sorted(curve.items()) if value >= (first + best) / 2]
            return above[0] if best - first >= 0.15 else None
    return None


def table(result: dict[str, Any]) -> str:
    names = list(dict.fromkeys(key for figures in result["pictures"].values() for key in figures))
    width = max(map(len, result["pictures"])) + 2
    heads = [name.removeprefix("says_").replace("_", " ") for name in names]
    lines = [
        f"{result['samples']} held-out conditions, step {result['step']}",
        " " * width + "".join(f"{h:>15}" for h in heads),
    ]
    for picture, figures in result["pictures"].items():
        cells = [f"{figures[name]:.3f}" if name in figures else "-" for name in names]
        lines.append(picture.ljust(width) + "".join(f"{cell:>15}" for cell in cells))
    curve = ", ".join(f"{step}: {value:.2f}" for step, value in sorted(result["curve"].items()))
    lines += [
        f"mask IoU over steps: {curve}",
        f"control snapped into place at step: {result['snapped_at'] or 'not yet'}",
    ]
    return "\n".join(lines)
