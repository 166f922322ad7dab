"""Samples held-out conditions between steps, measures how far they are followed, and judges when control has come."""

import hashlib
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from controlbooth.data.order import draws
from controlbooth.models.base import Base
from controlbooth.models.sampling import drawn_by
from controlbooth.trainer.config.run import ValidationConfig
from controlbooth.trainer.controlnet.session import Run
from controlbooth.trainer.controlnet.step import DeviceBatch, prediction_and_target
from controlbooth.trainer.engine import ema
from controlbooth.trainer.engine.distributed import World, from_first_rank, gather_objects
from controlbooth.trainer.evaluation.drawing import generate
from controlbooth.trainer.evaluation.extract import Extract, fidelity
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.evaluation.held_out import HeldOutSet
from controlbooth.trainer.evaluation.kinds import LOWER_IS_BETTER
from controlbooth.trainer.evaluation.prompted import draw_prompts
from controlbooth.trainer.evaluation.statistics import share_of_possible
from controlbooth.trainer.evaluation.strips import CAPTIONS, STRIPS, write_strip
from controlbooth.trainer.evaluation.verdict import (
    CONTROL,
    USUAL_STEPS,
    WITHOUT_CONTROL,
    Verdict,
    as_tree,
    describe,
    judge_run,
    read_verdict,
)
from controlbooth.trainer.losses import squared_error
from controlbooth.trainer.run.attempt import Attempt, write_file, write_text
from controlbooth.trainer.run.process import say
from controlbooth.trainer.tracking.run_page import describe_control


def validate_and_log(run: Run) -> dict[str, float]:
    """Validates on all ranks; rank 0 logs the figures and the pictures of samples. Returns the figures, by name."""
    assert run.held is not None
    run.watchdog.begin("the validation", run.step)
    grid = run.folder / "samples" / f"step-{run.step:08d}.png"
    prompted = grid.parent / "prompts" / grid.name
    began = time.perf_counter()
    with ema.averaged_weights(run.engine, run.average):
        figures = validate(
            run.base,
            run.engine.module,
            run.held,
            run.config.validation,
            run.world,
            grid,
            run.extract,
            run.attempt,
        )
        if run.config.validation.prompts:
            draw_prompts(run.base, run.engine.module, run.held, run.config.validation, run.world, prompted, run.attempt)
    if run.tracker is not None:
        run.tracker.log(run.step, {f"validation/{name}": value for name, value in figures.items()})
        run.tracker.log_image(grid, "samples", run.step)
        if run.config.validation.prompts:
            run.tracker.log_image(prompted, "prompts", run.step)
    say(run.world, f"step {run.step}: {describe_figures(figures)} ({time.perf_counter() - began:.0f} s)")
    note_verdict(run, validated=True)
    return figures


def note_verdict(run: Run, validated: bool) -> None:
    """Judges the validations up to now, on rank 0's disk; writes, says and tags what is new. Called by every rank.

    validated: this step was just validated, so that it gets a point in the curves of MLflow. Without, it is a start,
    whose validations may have been cut back to its checkpoint's step, and the verdict with them.
    """
    assert run.held is not None
    verdict = None
    if run.world.rank == 0:
        before = run.verdict if validated else read_verdict(run.folder)
        verdict = judge_run(run.folder, len(run.held.keys))
        write_text(run.attempt, run.folder / CONTROL, json.dumps(as_tree(verdict), indent=1))
        if validated and verdict.announced and run.tracker is not None:
            run.tracker.log(run.step, {"convergence/step": verdict.announced.step})
        changed = verdict.events != (before.events if before else ())
        if changed or (verdict.events and not validated):
            report_verdict(run, verdict, "" if validated or not changed else f"as of step {run.step}: ")
        elif not verdict.events and run.step > USUAL_STEPS and not run.warned:
            say(run.world, "warning: " + describe(verdict))
            run.warned = True
        if verdict.figure and run.tracker is not None:
            run.tracker.describe(control=describe_control(describe(verdict)))
    run.verdict = from_first_rank(verdict)


def report_verdict(run: Run, verdict: Verdict, since: str) -> None:
    """Says it, and tags it in MLflow. since: what is said before it."""
    say(run.world, since + describe(verdict))
    if run.tracker is not None:
        step = str(verdict.announced.step) if verdict.announced else "withdrawn" if verdict.events else "not yet"
        run.tracker.set_tags({"converged_at_step": step})


def converged_long_ago(run: Run) -> bool:
    """Tells whether the run was asked to end now, because control came long enough ago."""
    patience = run.config.validation.stop_after_convergence
    announced = run.verdict.announced if run.verdict else None
    return patience is not None and announced is not None and run.step >= announced.step + patience


BESIDE = ("_chance", "_real", "_share", "_share_low", "_share_high")
"""Ends of the names of what stands beside a figure of control."""


@torch.no_grad()
def fixed_noise_loss(base: Base, controlnet: nn.Module, held: HeldOutSet, size: int, world: World) -> float:
    """Computes the mean squared error of predictions on the held-out set, with noise and timesteps that never change
    and no prompt dropped.

    So it can be compared between steps and between runs, which the training loss cannot.
    """
    count = len(held.keys)
    mine = [i % count for i in range(world.rank, -(-count // world.world_size) * world.world_size, world.world_size)]
    factor = base.family.vae_factor
    shape = (base.latent_channels, held.targets.shape[1] // factor, held.targets.shape[2] // factor)
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
            levels=on_device(base.process.even_levels(positions, count)),
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
    """Measures pictures made with control, with control and no prompt, and without control, (N, H, W, 3) uint8 each.
    Returns means over the set, by name.

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


def describe_figures(figures: Mapping[str, float]) -> str:
    """Formats what `validate` returns in one line for people, with chance and share behind the figure that they belong
    to.

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
    """Draws samples, measures them and saves pictures of them. Returns the figures, by name, on every rank.

    grid: where rank 0 draws a picture of condition | without control | with control | control, no prompt | target. What
    the base makes by itself is made on the first call, and kept beside it as an .npy for as long as nothing that it
    depends on changes. attempt: the start that has taken the run; files are made in its folder. Raises Superseded.
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
