"""Validation of a run: held-out conditions sampled and measured on all ranks, and pictures of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from controlbooth.data import draws
from controlbooth.models.base import Base
from controlbooth.models.decoder import networks_of
from controlbooth.models.sampling import Control, drawn_by, sample
from controlbooth.trainer.attempt import Attempt, write_file, write_text
from controlbooth.trainer.config import ValidationConfig
from controlbooth.trainer.distributed import World, from_first_rank, gather_objects
from controlbooth.trainer.evaluate.extract import Extract, fidelity
from controlbooth.trainer.evaluate.grids import draw_grid
from controlbooth.trainer.evaluate.held_out import HeldOutSet
from controlbooth.trainer.evaluate.kinds import LOWER_IS_BETTER
from controlbooth.trainer.evaluate.statistics import share_of_possible
from controlbooth.trainer.evaluate.strips import CAPTIONS, STRIPS, write_strip
from controlbooth.trainer.evaluate.verdict import WITHOUT_CONTROL
from controlbooth.trainer.losses import squared_error
from controlbooth.trainer.step import DeviceBatch, prediction_and_target

BESIDE = ("_chance", "_real", "_share", "_share_low", "_share_high")
"""Ends of the names of what stands beside a figure of control."""


def generate(
    base: Base,
    controlnet: nn.Module | None,
    held: HeldOutSet,
    config: ValidationConfig,
    world: World,
    prompts: Sequence[str] | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """One picture for each held-out condition, spread over ranks; (N, H, W, 3) uint8 on every rank.

    prompts: N texts instead of the captions; without any word in them there is no guidance.
    Picture i depends on i alone, so it is the same at every world size. Every rank makes equally many passes, since
    under ZeRO-3 each pass is a collective. progress: what a progress bar calls it; none without.
    """
    prompts = held.captions if prompts is None else prompts
    if controlnet is not None:
        base, controlnet = networks_of(base, controlnet)
    count, size = len(held.keys), config.micro_batch_size
    mine = [i % count for i in range(world.rank, -(-count // world.world_size) * world.world_size, world.world_size)]
    pictures: dict[int, np.ndarray] = {}
    for first in tqdm(range(0, len(mine), size), desc=progress, unit="batch", disable=progress is None):
        rows = mine[first : first + size]
        conditioning = torch.from_numpy(held.conditions[rows]).permute(0, 3, 1, 2).float() / 255.0
        images = sample(
            base,
            [prompts[row] for row in rows],
            [] if controlnet is None else [Control(controlnet, conditioning)],
            seeds=rows,
            steps=config.sampling_steps,
            guidance_scale=config.guidance_scale if any(prompts) else 1.0,
            picture_size=held.picture_size,
        )
        pictures |= dict(zip(rows, images.numpy(), strict=True))
    everyone = {row: image for part in gather_objects(pictures, world) for row, image in part.items()}
    return np.stack([everyone[row] for row in range(count)])


@torch.no_grad()
def fixed_noise_loss(base: Base, controlnet: nn.Module, held: HeldOutSet, size: int, world: World) -> float:
    """The training loss on the held-out set with noise and timesteps that never change, prompts kept: comparable
    between steps and between runs, which the training loss is not."""
    count = len(held.keys)
    mine = [i % count for i in range(world.rank, -(-count // world.world_size) * world.world_size, world.world_size)]
    factor, steps = base.family.vae_factor, int(base.noise_scheduler.config["num_train_timesteps"])
    shape = (base.unet.config["in_channels"], held.targets.shape[1] // factor, held.targets.shape[2] // factor)
    losses: dict[int, float] = {}
    for first in range(0, len(mine), size):
        rows = mine[first : first + size]
        positions = np.array(rows, np.int64)

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(world.device)

        batch = DeviceBatch(
            pixel_values=on_device(held.targets[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1.0,
            conditioning_pixel_values=on_device(held.conditions[rows]).permute(0, 3, 1, 2).float() / 255.0,
            captions=[held.captions[row] for row in rows],
            timesteps=on_device((positions * 2 + 1) * steps // (2 * count)),  # evenly over all noise levels
            noise=on_device(draws.noise(0, positions, shape)),
            posterior_noise=torch.zeros(len(rows), *shape, device=world.device),
            weights=torch.ones(len(rows), device=world.device),
        )
        errors = squared_error(*prediction_and_target(base, controlnet, batch))
        losses |= dict(zip(rows, errors.tolist(), strict=True))
    everyone = {row: loss for part in gather_objects(losses, world) for row, loss in part.items()}
    return float(np.mean([everyone[row] for row in range(count)]))


def fidelity_figures(
    controlled: np.ndarray, unprompted: np.ndarray, plain: np.ndarray, held: HeldOutSet, extract: Extract | None
) -> dict[str, float]:
    """Means over the set, of pictures made with control, with control and no prompt, and without control, (N, H, W, 3)
    uint8 each.

    For each figure NAME: NAME with captions, NAME_chance of the same pictures under the conditions of other samples,
    NAME_real of the real pictures, and NAME_share, _share_low and _share_high: the share of what is possible with its
    bootstrap interval, as `statistics.share_of_possible` has it. NAME_empty_prompt and NAME_empty_prompt_share are of
    the pictures without a prompt; NAME_without_control and its share are what the captions alone reach, which tell of
    what is in the conditions too. Chance and shares are left out where there is one sample, and shares where real
    pictures are not certainly better than chance.
    """
    rows = range(len(held.keys))
    pictures = (controlled, unprompted, plain, held.targets)
    own, bare, alone, real = (fidelity(images, held, rows, extract) for images in pictures)
    others = {"_empty_prompt": bare, WITHOUT_CONTROL: alone}
    figures = {}
    for name, values in own.values.items():
        figures |= {name: values.mean(), f"{name}_real": real.values[name].mean()}
        figures |= {f"{name}{suffix}": one.values[name].mean() for suffix, one in others.items()}
        if name not in own.chances:
            continue
        figures[f"{name}_chance"] = own.chances[name].mean()
        for suffix, one in ({"": own} | others).items():
            share = share_of_possible(
                one.values[name], one.chances[name], real.values[name], lower_is_better=name in LOWER_IS_BETTER
            )
            told = {"": share["mean"], "_low": share["low"], "_high": share["high"]}
            figures |= {f"{name}{suffix}_share{end}": value for end, value in told.items() if not (suffix and end)}
    return {name: float(value) for name, value in figures.items() if np.isfinite(value)}


def told(figures: Mapping[str, float]) -> str:
    """What `validate` returns, in one line for people: chance and share behind the figure that they belong to.

    What the base does without control, which is the same at every validation, is left out.
    """
    shown = []
    for name, value in figures.items():
        if WITHOUT_CONTROL in name or any(
            name.removesuffix(suffix) in figures for suffix in BESIDE if name.endswith(suffix)
        ):
            continue
        beside = [f"chance {figures[f'{name}_chance']:.3f}"] if f"{name}_chance" in figures else []
        beside += [f"{figures[f'{name}_share']:.0%} of what is possible"] if f"{name}_share" in figures else []
        shown.append(f"{name} {value:.3f}" + (f" ({', '.join(beside)})" if beside else ""))
    return ", ".join(shown)


def validate(
    base: Base,
    controlnet: nn.Module,
    held: HeldOutSet,
    config: ValidationConfig,
    world: World,
    grid: Path,
    extract: Extract | None,
    attempt: Attempt,
) -> dict[str, float]:
    """Samples, measures and draws. Returns the figures, by name, on every rank.

    grid: where rank 0 draws a picture of condition | without control | with control | target. What the base makes by
    itself is made on the first call, and kept beside it as an .npy for as long as nothing that it depends on changes.
    attempt: the start that has taken the run; files are made in its folder. Raises Superseded.
    """
    was_training = controlnet.training
    controlnet.eval()
    depends_on = (
        drawn_by(base),
        held.keys,
        held.captions,
        held.picture_size,
        config.sampling_steps,
        config.guidance_scale,
    )
    without_control = grid.with_name(
        f".without-control-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:12]}.npy"
    )
    if not all(gather_objects(without_control.exists(), world)):
        pictures = generate(base, None, held, config, world)
        if world.rank == 0:
            write_file(attempt, without_control, lambda path: np.save(path, pictures))
    controlled = generate(base, controlnet, held, config, world)
    unprompted = generate(base, controlnet, held, config, world, [""] * len(held.keys))
    figures = {"fixed_noise_loss": fixed_noise_loss(base, controlnet, held, config.micro_batch_size, world)}
    plain = from_first_rank(np.load(without_control) if world.rank == 0 else None)
    figures |= fidelity_figures(controlled, unprompted, plain, held, extract)
    if world.rank == 0:
        shown = slice(0, config.grid)
        columns = {
            "condition": held.conditions[shown],
            "without control": plain[shown],
            "with control": controlled[shown],
            "control, no prompt": unprompted[shown],
            "target": held.targets[shown],
        }
        write_file(attempt, grid, lambda path: draw_grid(path, columns, held.captions[shown]))
        strips = grid.parent / STRIPS.name
        for name, images in (
            ("conditions.png", held.conditions),
            ("targets.png", held.targets),
            (grid.name, controlled),
        ):
            write_file(attempt, strips / name, partial(write_strip, images=images[shown]))
        write_text(attempt, strips / CAPTIONS, json.dumps(held.captions[shown]))
    controlnet.train(was_training)
    return figures
