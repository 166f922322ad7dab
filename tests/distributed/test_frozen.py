"""A frozen base in fewer bits, split over ranks or streamed: real trainings on ranks of torchrun."""

import shutil

import bases
import numpy as np
import pytest
import tiny
from trainings import finish, logged, run_file, start

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


def changed(folder, name, frozen, **model):
    return run_file(folder, name, **RUN, model=dict(frozen=frozen, **model))


def last_weights(folder, name):
    return tiny.weights(folder / "runs" / name / "checkpoints" / "step-00000004")


def same(folder, name, other):
    """Whether two runs have the same losses, validations and weights, bit for bit."""
    figures, others = (
        [logged(folder / "runs" / one, what) for what in ("loss", "validation/fixed_noise_loss", "validation/edge_f1")]
        for one in (name, other)
    )
    weights, its = last_weights(folder, name), last_weights(folder, other)
    return figures == others and all(np.array_equal(weights[name], tensor) for name, tensor in its.items())


@pytest.fixture(scope="module")
def whole(folder):
    """What a run of 4 steps on 2 ranks with a whole base in int8 has printed."""
    return finish(start(changed(folder, "whole", dict(precision="int8")), 2))


def test_a_base_split_over_two_ranks_gives_bitwise_the_run_of_a_whole_one(folder, whole):
    printed = finish(start(changed(folder, "split", dict(precision="int8", shards="node")), 2))
    assert "int8, split over 2 ranks" in printed
    assert same(folder, "split", "whole")


def test_shares_that_wait_in_host_memory_and_checkpointed_gradients_change_no_bit(folder, whole):
    frozen = dict(precision="int8", shards="world", stream="cpu")
    printed = finish(start(changed(folder, "both", frozen, gradient_checkpointing=True), 2))
    assert "int8, split over 2 ranks, blocks in host memory" in printed
    assert same(folder, "both", "whole")


def parted(folder, name):
    """Makes a run that has come to step 2 of the whole one."""
    shutil.copytree(folder / "runs" / "whole", folder / "runs" / name)
    shutil.rmtree(folder / "runs" / name / "checkpoints" / "step-00000004")


@pytest.mark.parametrize("folder", ["flux"], indirect=True)
def test_a_run_goes_on_with_its_base_held_otherwise_and_ends_with_the_same_bits(folder, whole):
    parted(folder, "parted")
    printed = finish(start(changed(folder, "parted", dict(precision="int8", shards="node", stream="cpu")), 2))
    assert "going on from" in printed and "model.frozen.stream: none -> cpu" in printed
    assert same(folder, "parted", "whole")


@pytest.mark.parametrize("folder", ["flux"], indirect=True)
def test_a_run_does_not_go_on_with_its_base_in_another_precision(folder, whole):
    parted(folder, "other")
    process = start(changed(folder, "other", {}), 1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode and "was saved with model.frozen.precision 'int8', and this run has 'engine'" in output
