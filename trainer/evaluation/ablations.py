"""What variants of a run are worth under four kinds of prompt, as arXiv 2302.05543, figure 8, compares them.

    python -m controlbooth.trainer.evaluation.ablations FOLDER      called by `controlbooth ablate`, which made the runs

FOLDER/ablations.json holds every figure, and FOLDER/ablations.png the pictures of the first seed of each variant. Of a
sweep of one field, FOLDER/sweep.png has the figures over its values.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from tqdm import tqdm

from controlbooth.data.arguments import whole_number
from controlbooth.data.files.records import is_text, is_whole, read_json_list
from controlbooth.data.files.whole import replaced, write_whole
from controlbooth.data.secrets import error_text
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.models.base import Base
from controlbooth.models.sampling import drawn_by
from controlbooth.models.unlocked_decoder import load_networks
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.evaluation.drawing import generate
from controlbooth.trainer.evaluation.extract import Extract, Fidelity, extractor, fidelity
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.evaluation.held_out import HeldOutSet, load_held_out
from controlbooth.trainer.evaluation.kinds import LOWER_IS_BETTER
from controlbooth.trainer.evaluation.statistics import share_of_possible
from controlbooth.trainer.evaluation.sweeps import describe_choice, draw_sweep, shares_of
from controlbooth.trainer.evaluation.verdict import describe_run
from controlbooth.trainer.run.base import open_base
from controlbooth.trainer.run.checkpoint import complete_checkpoints, read_state
from controlbooth.trainer.run.same_base import check_same_base

SHOWN = 2
ABLATE = "Start `controlbooth ablate` again, which writes it anew"
LISTED = {"variant": is_text, "seed": is_whole, "run": is_text}
"""Fields of the entries of runs.json."""
"""Held-out conditions in the picture."""


def prompts_of(captions: Sequence[str]) -> dict[str, list[str]]:
    """Makes the prompts of the paper's four settings from N captions: setting -> N prompts.

    none: empty prompts. insufficient: only the background, without what stands before it. conflicting: the caption of
    the next sample. perfect: the captions themselves.
    """
    return {
        "none": [""] * len(captions),
        "insufficient": ["on " + caption.partition(" on ")[2] for caption in captions],
        "conflicting": [*captions[1:], captions[0]],
        "perfect": list(captions),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m controlbooth.trainer.evaluation.ablations", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=whole_number(), default=48)
    parser.add_argument("--sweep", metavar="FIELD", help="say which of its values is the best")
    parser.add_argument("--failed", type=int, default=0, help="runs of the sweep that have failed")
    options = parser.parse_args(arguments)
    listed = options.folder / "runs.json"
    if not listed.is_file():
        raise ConfigError(f"{listed} does not exist: {options.folder} is no folder of `controlbooth ablate`")
    entries = read_json_list(listed, ABLATE, LISTED)
    runs = [(one["variant"], one["seed"], options.folder / one["run"]) for one in entries]
    config = load_config(runs[0][2] / "config.yaml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = open_base(config, torch.float32, device)
    assert config.data.held_out
    held = load_held_out(
        open_dataset(config.data.held_out), options.samples, config.data.condition, config.data.resolution
    )
    world = World(0, 1, 0, device)
    prompts = prompts_of(held.captions)
    plain = {name: generate(base, None, held, config.validation, world, texts) for name, texts in prompts.items()}
    table: list[dict[str, Any]] = []
    shown: dict[str, dict[str, np.ndarray]] = {"the base alone": plain}
    extract = extractor(held, {}, str(device))
    real = fidelity(held.targets, held, range(len(held.keys)), extract)
    for name, images in plain.items():
        table.append(dict(variant="the base alone", seed=None, prompt=name) | means(images, held, extract, real))
    for variant, seed, run in tqdm(runs, unit="run", desc="drawing"):
        pictures = draw_run(run, base, held, prompts, world)
        shown.setdefault(variant, pictures)
        for name, images in pictures.items():
            table.append(dict(variant=variant, seed=seed, prompt=name) | means(images, held, extract, real))
    for name in prompts:
        row = dict(variant="real pictures", seed=None, prompt=name)
        table.append(row | means(held.targets, held, extract, real))
    control = {f"{variant}, seed {seed}": describe_run(run) for variant, seed, run in runs}
    tree = dict(samples=options.samples, figures=table, control=control)
    write_whole(options.folder / "ablations.json", json.dumps(tree, indent=2).encode())
    draw(options.folder / "ablations.png", shown, held, prompts)
    print(describe_table(table))
    for name, told in control.items():
        print(f"{name}: {told}")
    print(f"pictures: {options.folder / 'ablations.png'}")
    if options.sweep:
        tell_sweep(options.folder, options.sweep, table, options.failed)
    return 0


def tell_sweep(folder: Path, field: str, table: Sequence[dict[str, Any]], failed: int) -> None:
    """Draws FOLDER/sweep.png and prints which value of the field to take."""
    figure, shares = shares_of(table, field)
    if shares:
        why_not = draw_sweep(folder / "sweep.png", field, figure, shares)
        print(why_not or f"curves: {folder / 'sweep.png'}")
    print(describe_choice(field, figure, shares, failed))


def draw_run(
    run: Path, base: Base, held: HeldOutSet, prompts: dict[str, list[str]], world: World
) -> dict[str, np.ndarray]:
    """Draws a run's pictures for each kind of prompt: kind -> (N, H, W, 3) uint8.

    Keeps them in a file in the run's folder, and reads them from there as long as the checkpoint, the base, the prompts
    and the held-out conditions are the same. Raises ConfigError where the run has no whole checkpoint, or the base has
    changed.
    """
    whole = complete_checkpoints(run)
    if not whole:
        raise ConfigError(f"{run} holds no whole checkpoint: `controlbooth ablate` goes on where it was")
    checkpoint = whole[-1]
    config: RunConfig = load_config(checkpoint / "config.yaml")
    state = read_state(checkpoint)
    remedy = "Put it back as it was: the runs of an ablation are compared on one base"
    check_same_base(state, base, f"at step {state['step']} of {run}", remedy)
    asked = hashlib.sha256(held.conditions.tobytes() + repr((prompts, drawn_by(base))).encode()).hexdigest()
    kept = run / f".ablation-{state['digest'][:12]}-{asked[:12]}.npz"
    if kept.is_file():
        with np.load(kept) as file:
            return {name: file[name] for name in prompts}
    base, controlnet = load_networks(checkpoint / "controlnet", base)
    controlnet.requires_grad_(False).eval().to(world.device)
    pictures = {
        name: generate(base, controlnet, held, config.validation, world, texts) for name, texts in prompts.items()
    }
    with replaced(kept) as temporary, open(temporary, "wb") as file:
        np.savez(file, **pictures)  # type: ignore[arg-type]
    return pictures


def means(images: np.ndarray, held: HeldOutSet, extract: Extract | None, real: Fidelity) -> dict[str, float]:
    """Computes the mean of each figure over the pictures, by name, with its chance and its share of what is possible.

    Beside each figure NAME stand NAME_chance and NAME_share. NAME_share is left out where real pictures are not
    certainly better than chance, and both are left out where only one condition is held out. real: the fidelity of the
    real pictures.
    """
    own = fidelity(images, held, range(len(held.keys)), extract)
    figures = {}
    for name, values in own.values.items():
        figures[name] = float(values.mean())
        if name in own.chances:
            chances = own.chances[name]
            share = share_of_possible(values, chances, real.values[name], lower_is_better=name in LOWER_IS_BETTER)
            figures |= {f"{name}_chance": float(chances.mean()), f"{name}_share": share["mean"]}
    return {name: value for name, value in figures.items() if np.isfinite(value)}


def draw(path: Path, shown: dict[str, dict[str, np.ndarray]], held: HeldOutSet, prompts: dict[str, list[str]]) -> None:
    """Writes a PNG of SHOWN conditions: one row for each condition and kind of prompt, one column for each variant."""
    rows = [(number, name) for number in range(min(SHOWN, len(held.keys))) for name in prompts]
    columns = {"condition": np.stack([held.conditions[number] for number, _ in rows])}
    for variant, pictures in shown.items():
        columns[variant] = np.stack([pictures[name][number] for number, name in rows])
    columns["target"] = np.stack([held.targets[number] for number, _ in rows])
    draw_grid(path, columns, [f"{name}: {prompts[name][number]}" for number, name in rows])


def describe_table(table: Sequence[dict[str, Any]]) -> str:
    """Writes the table as text: the mean of each figure over seeds, with +- the standard deviation of several seeds."""
    variants = list(dict.fromkeys(row["variant"] for row in table))
    prompts = list(dict.fromkeys(row["prompt"] for row in table))
    width = max(map(len, variants)) + 2
    lines = []
    for figure in dict.fromkeys(name for row in table for name in row if name not in ("variant", "seed", "prompt")):
        lines.append(f"{figure.replace('_', ' '):<{width}}" + "".join(f"{name:>18}" for name in prompts))
        for variant in variants:
            cells = []
            for name in prompts:
                own = [row for row in table if row["variant"] == variant and row["prompt"] == name]
                values = [row[figure] for row in own if figure in row]
                spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.3f}{spread}" if values else "-")
            seeds = len([row for row in table if row["variant"] == variant]) // len(prompts)
            lines.append(
                variant.ljust(width) + "".join(f"{cell:>18}" for cell in cells) + f"   {seeds} seeds" * (seeds > 1)
            )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(error_text(error), file=sys.stderr)
        sys.exit(2)
