"""Optimizers besides AdamW, on ranks of torchrun: they move weights as their libraries alone do, and resume exactly."""

import json
import shutil

import numpy as np
import pytest
import tiny
from trainings import finish, logged, run_file, start

RATES = {"adamw8bit": 1e-2, "adafactor": 1e-2, "muon": 1e-2, "prodigy": 1.0}
CASES = [(name, ranks, stage) for name in RATES for ranks, stage in ((1, 2), (2, 1), (3, 2))]
CASES = [case for case in CASES if case[:2] in [("prodigy", 1)] or case[0] != "prodigy"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `whole_tensors` of the worker says, by (optimizer, ranks, stage), and the folder of its checkpoints."""
    folder, known = tmp_path_factory.mktemp("whole"), {}

    def find(name, ranks, stage):
        if (name, ranks, stage) not in known:
            known[name, ranks, stage] = tiny.torchrun(
                ranks, "whole_tensors", folder, name, str(stage), str(RATES[name])
            )
        return known[name, ranks, stage], folder

    return find


@pytest.mark.parametrize(("name", "ranks", "stage"), CASES)
def test_ranks_move_weights_as_the_library_does_alone_and_skip_what_is_not_finite(found, name, ranks, stage):
    answer, _ = found(name, ranks, stage)
    assert answer["skipped"] == [False, False, True, False] and answer["untouched"]
    assert answer["moved"] and (answer["cut"] > 0) == (ranks > 1)
    # A third of three times a gradient is rounded, which products in bf16 and states of 8 bits make more of
    assert answer["apart"] <= (0.0 if ranks < 3 else RATES[name]), answer


@pytest.mark.parametrize(("name", "ranks", "stage"), CASES)
def test_a_saved_step_is_gone_on_from_bit_for_bit_and_takes_the_memory_that_is_planned(found, name, ranks, stage):
    answer, _ = found(name, ranks, stage)
    assert answer["loaded"] and answer["resumed"]
    # bitsandbytes has two tables of 256 numbers, and not of every tensor; Prodigy none of weights that begin at 0
    assert answer["planned"] <= answer["states"] <= answer["planned"] + 2048, answer


@pytest.mark.parametrize(("before", "after"), [(2, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("name", ["adamw8bit", "adafactor", "muon"])
def test_states_go_over_to_another_number_of_ranks_bit_for_bit(found, name, before, after):
    stage = {1: 2, 2: 1, 3: 2}[before]
    _, folder = found(name, before, stage)
    answer = tiny.torchrun(after, "whole_tensors_elsewhere", folder, name, str(stage), str(before))
    assert answer == dict(names=True, weights=True, states=True)


@pytest.mark.parametrize("name", ["adamw8bit", "muon"])
def test_a_run_that_goes_on_ends_as_one_that_did_not_stop_and_on_one_rank_within_rounding(world_folder, name):
    optimizer = dict(name=name, learning_rate=1e-3)
    finish(start(run_file(world_folder, f"{name}-whole", optimizer=optimizer), 2))
    whole = world_folder / "runs" / f"{name}-whole"
    for ranks in (2, 1):
        again = whole.with_name(f"{name}-again-on-{ranks}")
        shutil.copytree(whole, again)
        for step in (4, 6):
            shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
        assert "at step 2" in finish(start(run_file(world_folder, again.name, optimizer=optimizer), ranks))
        ours, theirs = (tiny.weights(run / "checkpoints" / "step-00000006") for run in (again, whole))
        for weight, tensor in theirs.items():
            if ranks == 2:
                assert np.array_equal(ours[weight], tensor), weight
            else:
                np.testing.assert_allclose(ours[weight], tensor, atol=1e-3, err_msg=weight)
        assert [*logged(again, "loss")] == [1, 2, 3, 4, 5, 6]
    state = json.loads((whole / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["optimizer"] == name


def test_another_optimizer_and_ranks_that_prodigy_cannot_serve_are_refused_at_the_start(world_folder):
    finish(start(run_file(world_folder, "changed", max_steps=2), 1))
    path = run_file(world_folder, "changed", max_steps=4, optimizer=dict(name="muon"))
    output, _ = start(path, 1).communicate(timeout=600)
    assert "was saved with optimizer.name 'adamw', and this run has 'muon'. Set it back" in output
    path = run_file(world_folder, "estimated", optimizer=dict(name="prodigy", learning_rate=1.0))
    output, _ = start(path, 2).communicate(timeout=600)
    assert "which its library takes on one rank, and there are 2: start one" in output
