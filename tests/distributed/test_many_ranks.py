"""What a rank that is not the first of its machine leaves to others, and what all do together."""

import pytest
import tiny


@pytest.fixture(scope="module")
def starts(world_folder):
    return tiny.torchrun(2, "start_calls", world_folder)


def names(rank, part):
    return {name: count for name, count in rank["names"].items() if name.startswith(part)}


@pytest.mark.parametrize("start", ["new", "resumed"])
def test_a_rank_leaves_shards_held_out_samples_and_the_bases_digest_to_the_first_one(starts, start):
    first, second = starts[start]
    for part in ("train", "held"):
        assert any(name.endswith(".tar.idx") for name in names(first, part)) and not names(second, part), second
    assert first["hashed"] > 0 == second["hashed"]


def test_a_rank_lists_no_checkpoints_and_looks_into_the_one_that_it_goes_on_from(starts):
    first, second = starts["resumed"]
    run = "runs/touched/checkpoints"
    assert run in first["names"] and run not in second["names"]
    assert set(names(second, f"{run}/step")) and all("step-00000004" in name for name in names(second, f"{run}/step"))


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_split_a_checkpoint_by_parameter_as_one_does_and_fail_together_where_a_file_is_damaged(
    world_folder, tmp_path, stage
):
    for name in ("base", "train", "held"):
        (tmp_path / name).symlink_to(world_folder / name)
    tiny.torchrun(2, "trained", tmp_path, "split", str(stage))
    found = tiny.torchrun(4, "split_again", tmp_path)
    assert found["all"] == found["one"] and '"zero/' in found["all"]
    assert all(found["errors"]) and len(found["errors"]) == 4 and not found["left"], found
