"""A frozen base in fewer bits, split over ranks or streamed: real trainings on ranks of torchrun."""

import random
import re
import shutil

import bases
import numpy as np
import pytest
import tiny
from trainings import finish, kill, logged, run_file, start, wait_for_step

BLOCKS = {"sd3": [2], "flux": [2, 2]}
RUN = dict(max_steps=4, validation=dict(every_steps=4, at_start=True), checkpoint=dict(every_steps=2))


@pytest.fixture(scope="module", params=["unet", *bases.TRANSFORMER_FAMILIES])
def folder(request, world_folder, tmp_path_factory):
    """A folder with base/ of a family, train/ and held/; runs go to runs/."""
    own, family = tmp_path_factory.mktemp(request.param), request.param
    for name in ("train", "held"):
        shutil.copytree(world_folder / name, own / name)
    if family == "unet":
        shutil.copytree(world_folder / "base", own / "base")
        tiny.write_model(own, hint_channels=[8, 8, 8, 8])
    else:
        bases.write_base(own / "base", family)
        tiny.write_model(own, copied_blocks=BLOCKS[family], text_tokens=bases.T5_TOKENS)
    return own


def trained(folder, name, ranks=2, checkpointing=False, **frozen):
    """Trains 4 steps; -> what it printed, its losses, validations and weights."""
    model = dict(frozen=frozen, gradient_checkpointing=checkpointing)
    printed = finish(start(run_file(folder, name, **RUN, model=model), ranks))
    run = folder / "runs" / name
    figures = {name: logged(run, name) for name in ("loss", "validation/fixed_noise_loss", "validation/edge_f1")}
    return printed, figures, tiny.weights(run / "checkpoints" / "step-00000004")


def same(one, other):
    _, figures, weights = one
    _, others, its = other
    return figures == others and all(np.array_equal(weights[name], tensor) for name, tensor in its.items())


@pytest.fixture(scope="module")
def whole(folder):
    return {precision: trained(folder, f"whole-{precision}", precision=precision) for precision in ("engine", "int8")}


@pytest.mark.parametrize("precision", ["engine", "int8"])
@pytest.mark.parametrize("stream", ["none", "cpu"])
@pytest.mark.parametrize("shards", ["none", "node", "world"])
def test_a_base_that_is_split_or_streamed_gives_bitwise_the_losses_and_weights_of_a_whole_one(
    folder, whole, precision, shards, stream
):
    held = trained(folder, f"{precision}-{shards}-{stream}", precision=precision, shards=shards, stream=stream)
    assert same(held, whole[precision])
