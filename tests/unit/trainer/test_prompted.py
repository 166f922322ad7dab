"""Pictures of a user's own prompts at a ControlNet's validations."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import ValidationConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.evaluation.drawing import generate
from controlbooth.trainer.evaluation.grids import MARGIN, TILE
from controlbooth.trainer.evaluation.held_out import HeldOutSet
from controlbooth.trainer.evaluation.prompted import draw_prompts
from controlbooth.trainer.run.attempt import Attempt

ALONE = World(0, 1, 0, torch.device("cpu"))


def tile(grid, row, column):
    """A picture of a grid at its own 32 pixels."""
    left, top = MARGIN + column * (TILE + MARGIN), 30 + row * (TILE + MARGIN)
    enlarged = np.asarray(grid)[top : top + TILE, left : left + TILE]
    return cv2.resize(enlarged, (32, 32), interpolation=cv2.INTER_NEAREST)


def test_each_prompt_is_drawn_under_the_conditions_that_are_shown_with_the_noise_of_their_captions(tmp_path, load_tiny):
    base = load_tiny("sd15")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    held = HeldOutSet(
        "gray", ["a", "b", "c"], [(0, 0), (0, 1), (0, 2)], ["a cat", "a dog", "a cow"], pixels, pixels, None, None
    )
    prompts = ("a cat", "a red house")
    config = ValidationConfig(samples=3, grid=2, sampling_steps=2, guidance_scale=2.0, prompts=prompts)
    controlnet, attempt = build_controlnet(base.denoiser), Attempt(tmp_path, 1, "id")
    attempt.folder.mkdir()
    path = tmp_path / "samples" / "prompts" / "step-00000003.png"
    draw_prompts(base, controlnet, held, config, ALONE, path, attempt)
    grid = Image.open(path)
    captioned = generate(base, controlnet, held, config, ALONE)
    assert [np.array_equal(tile(grid, 0, column), pixels[column]) for column in range(2)] == [True, True]
    assert np.array_equal(tile(grid, 1, 0), captioned[0])
    assert not np.array_equal(tile(grid, 1, 1), captioned[1]) and not np.array_equal(tile(grid, 2, 0), captioned[0])
    assert grid.height == 30 + 3 * (TILE + MARGIN)


def test_an_empty_prompt_is_refused_since_validation_draws_without_one_anyway():
    tree = dict(name="r", max_steps=1, global_batch_size=1, micro_batch_size=1, model=dict(base="miniature"))
    tree |= dict(data=dict(shards="s", condition="edges"), validation=dict(prompts=["a house", ""]))
    with pytest.raises(ConfigError, match="validation.prompts.1' is ''"):
        build_config(tree)
