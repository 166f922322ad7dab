"""Pictures of a user's own prompts under held-out conditions, beside those that a validation draws of the captions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from controlbooth.models.base import Base
from controlbooth.trainer.config.run import ValidationConfig
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.evaluation.drawing import generate
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.evaluation.held_out import HeldOutSet
from controlbooth.trainer.run.attempt import Attempt, write_file


def draw_prompts(
    base: Base,
    controlnet: nn.Module,
    held: HeldOutSet,
    config: ValidationConfig,
    world: World,
    grid: Path,
    attempt: Attempt,
) -> None:
    """Draws each of config.prompts under the first config.grid held-out conditions, on all ranks; rank 0 writes `grid`.

    One column a condition, which the first row shows, and one row a prompt. A picture has the noise that it has under
    its own caption, so that what differs comes from the prompt. Raises Superseded.
    """
    shown = replace(
        held,
        keys=held.keys[: config.grid],
        places=held.places[: config.grid],
        captions=held.captions[: config.grid],
        targets=held.targets[: config.grid],
        conditions=held.conditions[: config.grid],
        edges=None,
        segmentation=None,
    )
    rows = [shown.conditions]
    for prompt in config.prompts:
        rows.append(generate(base, controlnet, shown, config, world, [prompt] * len(shown.keys)))
    if world.rank == 0:
        columns = {f"condition {n + 1}": np.stack([row[n] for row in rows]) for n in range(len(shown.keys))}
        write_file(attempt, grid, lambda path: draw_grid(path, columns, ["the condition", *config.prompts]))
