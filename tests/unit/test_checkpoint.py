import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from controlbooth.trainer.attempt import Attempt
from controlbooth.trainer.checkpoint import (
    COMPLETE,
    CheckpointError,
    check_same_run,
    check_weights,
    complete_checkpoints,
    folder_of,
    is_complete,
    latest_checkpoint,
    needs_universal,
    prune,
    read_state,
)
from controlbooth.trainer.distributed import World
from controlbooth.trainer.integrity import first_damage, folder_digest


def write(run, step, metrics=None):
    folder = folder_of(run, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "metrics": metrics or {}}))
    (folder / "weights").write_bytes(b"12345678")
    (folder / COMPLETE).write_text(json.dumps({"weights": 8}))
    return folder


def start(run):
    attempt = Attempt(run, 1, "id")
    attempt.folder.mkdir(exist_ok=True)
    return attempt


def names(run):
    return [path.name for path in complete_checkpoints(run)]


def test_a_folder_without_its_marker_or_with_a_short_or_missing_file_is_no_checkpoint(tmp_path):
    whole, unmarked, short, missing = (write(tmp_path, step) for step in (1, 2, 3, 4))
    (unmarked / COMPLETE).unlink()
    (short / "weights").write_bytes(b"123")
    (missing / "weights").unlink()
    (tmp_path / "checkpoints" / ".step-00000005.partial").mkdir()
    assert names(tmp_path) == [whole.name]


def test_pruning_keeps_the_latest_and_the_best(tmp_path):
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.4), (4, 0.5), (5, None)):
        write(tmp_path, step, {} if score is None else {"edge_f1": score})
    prune(tmp_path, keep=2, keep_best=1, attempt=start(tmp_path), committed=folder_of(tmp_path, 5))
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert not list(start(tmp_path).folder.iterdir())


def test_pruning_without_keep_best_keeps_only_the_latest(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, {"edge_f1": 1.0 / step})
    prune(tmp_path, keep=1, keep_best=0, attempt=start(tmp_path), committed=folder_of(tmp_path, 3))
    assert names(tmp_path) == ["step-00000003"]


def test_another_precision_stage_or_base_is_refused_with_the_field_to_set_back(tmp_path):
    saved = dict(zero_stage=2, precision="bf16", base_digest="a", condition="edges")
    (tmp_path / "config.yaml").write_text("model: {trainable_copy: full, hint_channels: [8, 16]}")
    now = saved | dict(model=dict(trainable_copy="full", hint_channels=[8, 16], since_a_later_version=1))
    check_same_run(saved, now, tmp_path)
    with pytest.raises(CheckpointError, match="engine.zero_stage 2, and this run has 3. Set it back"):
        check_same_run(saved, now | dict(zero_stage=3), tmp_path)
    with pytest.raises(CheckpointError, match="model.base, of digest 'a', and this run has 'b'"):
        check_same_run(saved, now | dict(base_digest="b"), tmp_path)
    with pytest.raises(CheckpointError, match="model.trainable_copy 'full', and this run has 'lite'"):
        check_same_run(saved, now | dict(model=dict(trainable_copy="lite")), tmp_path)


@pytest.fixture
def alone():
    """The only rank of a world."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    torch.distributed.destroy_process_group()


def whole_checkpoint(run, step):
    """With a file of PyTorch's and trained weights."""
    folder = folder_of(run, step)
    for name in ("deepspeed", "controlnet"):
        (folder / name).mkdir(parents=True)
    torch.save({"moments": torch.zeros(1000)}, folder / "deepspeed" / "states.pt")
    save_file({"weight": torch.zeros(1000)}, folder / "controlnet" / "weights.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step, "digest": folder_digest(folder / "controlnet")}))
    files = [path for path in folder.rglob("*") if path.is_file()]
    (folder / COMPLETE).write_text(json.dumps({str(path.relative_to(folder)): path.stat().st_size for path in files}))
    return folder


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["deepspeed/states.pt", "controlnet/weights.safetensors", "state.json"])
def test_a_checkpoint_of_which_a_byte_has_changed_is_passed_over_with_a_warning(tmp_path, alone, name):
    older, newer = whole_checkpoint(tmp_path, 1), whole_checkpoint(tmp_path, 2)
    told = []
    assert latest_checkpoint(tmp_path, alone, told.append) == newer and not told
    if name == "state.json":
        (newer / name).write_bytes(b"?" * (newer / name).stat().st_size)
    else:
        change_a_byte(newer / name)
    assert is_complete(newer)
    assert latest_checkpoint(tmp_path, alone, told.append) == older
    assert len(told) == 1 and f"{newer} is damaged, in {name.split('/')[0]}" in told[0]
    if not name.endswith(".pt"):
        check_weights(older)
        with pytest.raises(CheckpointError, match="is damaged, in .* Delete it to use an older one"):
            check_weights(newer)
    change_a_byte(older / "deepspeed" / "states.pt")
    with pytest.raises(CheckpointError, match="There is no other: delete them to begin anew"):
        latest_checkpoint(tmp_path, alone, told.append)


@pytest.mark.parametrize("content", ["", "5", "{"])
def test_a_damaged_marker_makes_no_whole_checkpoint_and_damaged_facts_are_named(tmp_path, alone, content):
    folder = whole_checkpoint(tmp_path, 1)
    (folder / COMPLETE).write_text(content)
    assert names(tmp_path) == [] and latest_checkpoint(tmp_path, alone, print) is None
    (folder / "state.json").write_text("")
    with pytest.raises(CheckpointError, match="state.json is damaged"):
        read_state(folder)


def test_what_others_have_put_beside_the_weights_is_no_damage(tmp_path, alone):
    folder = whole_checkpoint(tmp_path, 1)
    (folder / "controlnet" / ".DS_Store").write_bytes(b"x")
    (folder / "controlnet" / ".cache").mkdir()
    check_weights(folder)
    assert latest_checkpoint(tmp_path, alone, print) == folder


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0.0, 1.0, exclude_max=True), mask=st.integers(1, 255))
def test_no_changed_byte_of_an_archive_that_is_not_told_changes_a_tensor_unseen(tmp_path, place, mask):
    path = tmp_path / "states.pt"
    torch.save({"moments": torch.arange(100.0)}, path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= mask
    path.write_bytes(content)
    if first_damage(tmp_path, ["another.pt", "states.pt"], share=1, of=2) is None:
        try:
            loaded = torch.load(path)["moments"]
        except (RuntimeError, ValueError, LookupError):  # a record that PyTorch no longer finds, or cannot read
            return
        assert torch.equal(loaded, torch.arange(100.0))


def test_checkpoints_of_later_steps_do_not_count_at_pruning_nor_do_facts_that_cannot_be_read(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, {"edge_f1": step / 10})
    for step in (2, 4):
        (folder_of(tmp_path, step) / "state.json").write_bytes(b"?")
    prune(tmp_path, keep=1, keep_best=1, attempt=start(tmp_path), committed=folder_of(tmp_path, 3))
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_only_split_states_need_to_be_split_anew():
    assert needs_universal(dict(zero_stage=2, world_size=4), 2)
    assert not needs_universal(dict(zero_stage=2, world_size=2), 2)
    assert not needs_universal(dict(zero_stage=0, world_size=4), 2)
