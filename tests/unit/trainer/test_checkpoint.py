import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from controlbooth.data.order.draws import hash64
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run.attempt import Attempt
from controlbooth.trainer.run.checkpoint import (
    CheckpointError,
    check_weights,
    complete_checkpoints,
    folder_of,
    is_complete,
    latest_checkpoint,
    needs_universal,
    prune,
    read_state,
)
from controlbooth.trainer.run.continuing import check_same_run
from controlbooth.trainer.run.integrity import (
    COMPLETE,
    files_damage,
    folder_digest,
    records_damage,
    sizes_of,
    write_marker,
)
from controlbooth.trainer.run.torch_files import tensors_only


def write(run, step, metrics=None):
    folder = folder_of(run, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "metrics": metrics or {}}))
    (folder / "config.yaml").write_text("name: run\n")
    (folder / "weights").write_bytes(b"12345678")
    write_marker(folder)
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


def test_the_best_is_told_by_the_figure_of_the_trained_kind_before_that_of_edges(tmp_path):
    for step, depth, edges in ((1, 0.9, 0.1), (2, 0.5, 0.9), (3, 0.7, 0.2), (4, 0.6, 0.3)):
        write(tmp_path, step, {"loss": 0.1, "edge_f1": edges, "depth_delta": depth})
    prune(tmp_path, keep=1, keep_best=1, attempt=start(tmp_path), committed=folder_of(tmp_path, 4))
    assert names(tmp_path) == ["step-00000001", "step-00000004"]


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
    (folder / "config.yaml").write_text("name: run\nmodel:\n  base: miniature\n")
    torch.save({"moments": torch.zeros(1000)}, folder / "deepspeed" / "states.pt")
    save_file({"weight": torch.zeros(1000)}, folder / "controlnet" / "weights.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step, "digest": folder_digest(folder / "controlnet")}))
    write_marker(folder)
    return folder


def as_before_digests(folder):
    """With the marker that older versions wrote: sizes alone."""
    (folder / COMPLETE).unlink()
    (folder / COMPLETE).write_text(json.dumps(sizes_of(folder)))
    return folder


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["deepspeed/states.pt", "controlnet/weights.safetensors", "state.json", "config.yaml", "COMPLETE"]
)
def test_a_checkpoint_of_which_a_byte_has_changed_is_passed_over_with_a_warning(tmp_path, alone, name):
    older, newer = whole_checkpoint(tmp_path, 1), whole_checkpoint(tmp_path, 2)
    told = []
    assert latest_checkpoint(tmp_path, alone, told.append) == newer and not told
    change_a_byte(newer / name)
    assert is_complete(newer) == (name != "COMPLETE")
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
def test_a_run_whose_only_checkpoint_has_a_damaged_marker_does_not_begin_anew_without_a_word(tmp_path, alone, content):
    folder = whole_checkpoint(tmp_path, 1)
    (folder / COMPLETE).write_text(content)
    assert names(tmp_path) == []
    with pytest.raises(CheckpointError, match="COMPLETE: .* There is no other: delete them to begin anew"):
        latest_checkpoint(tmp_path, alone, print)
    with pytest.raises(CheckpointError, match="is damaged, in COMPLETE"):
        read_state(folder)


@pytest.mark.slow
def test_every_flipped_bit_of_the_small_files_of_a_checkpoint_is_told(tmp_path):
    """Whatever it makes of them: another step, another setting, another file that is not looked at any more."""
    folder = whole_checkpoint(tmp_path, 2)
    for name in ("state.json", "config.yaml", COMPLETE):
        content = (folder / name).read_bytes()
        for bit in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(flipped)
            assert records_damage(folder) is not None, (name, bit)
        (folder / name).write_bytes(content)
    assert records_damage(folder) is None


def test_states_that_were_swapped_for_those_of_another_step_are_told(tmp_path, alone):
    older, newer = whole_checkpoint(tmp_path, 1), whole_checkpoint(tmp_path, 2)
    torch.save({"moments": torch.ones(1000)}, newer / "deepspeed" / "states.pt")
    write_marker(newer)
    assert latest_checkpoint(tmp_path, alone, print) == newer
    (newer / "deepspeed" / "states.pt").write_bytes((older / "deepspeed" / "states.pt").read_bytes())
    assert latest_checkpoint(tmp_path, alone, print) == older


def test_checkpoints_of_before_digests_are_gone_on_from_and_what_can_be_told_of_them_is(tmp_path, alone):
    older, newer = (as_before_digests(whole_checkpoint(tmp_path, step)) for step in (1, 2))
    assert latest_checkpoint(tmp_path, alone, print) == newer
    (newer / "state.json").write_text((newer / "state.json").read_text().replace('"step": 2', '"step": 3'))
    told = []
    assert latest_checkpoint(tmp_path, alone, told.append) == older and "state.json: its step is 3" in told[0]
    (older / "config.yaml").write_text((older / "config.yaml").read_text().replace("model:", "model;"))
    with pytest.raises(CheckpointError, match="in config.yaml: "):
        latest_checkpoint(tmp_path, alone, print)


@pytest.mark.parametrize("name", ["step-00000002-backup", "step-2", "step-00000002.old", "step-best"])
def test_a_copy_that_somebody_made_beside_the_checkpoints_is_neither_read_nor_deleted(tmp_path, alone, name):
    whole_checkpoint(tmp_path, 1)
    shutil.copytree(whole_checkpoint(tmp_path, 2), tmp_path / "checkpoints" / name)
    whole_checkpoint(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    prune(tmp_path, keep=1, keep_best=0, attempt=start(tmp_path), committed=folder_of(tmp_path, 3))
    assert names(tmp_path) == ["step-00000003"] and (tmp_path / "checkpoints" / name / COMPLETE).is_file()


class MakesAFile:
    """Unpickled, it opens a file for writing, as it could call anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_a_checkpoint_runs_nothing_whatever_its_reader_asks_for(tmp_path):
    torch.save({"module": MakesAFile(tmp_path / "made")}, tmp_path / "states.pt")
    with pytest.raises(CheckpointError, match="could run code when it is read: it is refused"):
        with tensors_only(tmp_path):
            torch.load(tmp_path / "states.pt", weights_only=False)  # as DeepSpeed does
    assert not (tmp_path / "made").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


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
    torch.save({}, tmp_path / "another.pt")
    (tmp_path / COMPLETE).unlink(missing_ok=True)
    write_marker(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= mask
    path.write_bytes(content)
    if files_damage(tmp_path, share=1, of=2) is None:
        try:
            loaded = torch.load(path)["moments"]
        except (RuntimeError, ValueError, LookupError, pickle.UnpicklingError):
            return  # a record that PyTorch no longer finds, or cannot read
        assert torch.equal(loaded, torch.arange(100.0))


@pytest.mark.slow
def test_no_changed_bit_of_a_small_file_is_gone_on_from_and_none_goes_without_a_word(tmp_path, alone):
    older, newer = whole_checkpoint(tmp_path, 1), whole_checkpoint(tmp_path, 2)
    for name in ("state.json", "config.yaml", COMPLETE):
        path = newer / name
        data = path.read_bytes()
        for bit in range(hash64("bit", name) % 11, 8 * len(data), 11):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            told = []
            assert latest_checkpoint(tmp_path, alone, told.append) == older, (name, bit)
            assert f"{newer} is damaged, in " in told[0] and len(told[0].splitlines()) == 1
        path.write_bytes(data)
    assert latest_checkpoint(tmp_path, alone, print) == newer


@pytest.mark.parametrize("what", ["cut", "emptied", "zeroed", "exchanged", "taken away", "a folder", "one more"])
def test_a_checkpoint_with_any_file_damaged_is_passed_over_by_name(tmp_path, alone, what):
    older, newer = whole_checkpoint(tmp_path, 1), whole_checkpoint(tmp_path, 2)
    torch.save({"moments": torch.ones(1000)}, older / "deepspeed" / "states.pt")
    write_marker(older)
    for name in ("deepspeed/states.pt", "controlnet/weights.safetensors", "state.json", "config.yaml", COMPLETE):
        path = newer / name
        data = path.read_bytes()
        if what == "cut":
            path.write_bytes(data[:-1])
        elif what == "emptied":
            path.write_bytes(b"")
        elif what == "zeroed":
            path.write_bytes(bytes(len(data)))
        elif what == "exchanged" and name.endswith(".pt"):
            path.write_bytes((older / name).read_bytes())
        elif what == "one more" and name.endswith(".pt"):
            path.with_name("zero_pp_rank_9_states.pt").write_bytes(data)
        elif what in ("taken away", "a folder"):
            path.unlink()
            if what == "a folder":
                path.mkdir()
        else:
            continue
        told = []
        assert latest_checkpoint(tmp_path, alone, told.append) == older and f"{newer} is damaged" in told[0]
        if what == "a folder":
            path.rmdir()
        path.with_name("zero_pp_rank_9_states.pt").unlink(missing_ok=True)
        path.write_bytes(data)
        assert latest_checkpoint(tmp_path, alone, print) == newer


def test_checkpoints_of_later_steps_do_not_count_at_pruning_nor_do_facts_that_cannot_be_read(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, {"edge_f1": step / 10})
    for step in (2, 4):
        path = folder_of(tmp_path, step) / "state.json"
        path.write_bytes(b"?" * path.stat().st_size)
    prune(tmp_path, keep=1, keep_best=1, attempt=start(tmp_path), committed=folder_of(tmp_path, 3))
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_only_split_states_need_to_be_split_anew():
    assert needs_universal(dict(zero_stage=2, world_size=4), 2)
    assert not needs_universal(dict(zero_stage=2, world_size=2), 2)
    assert not needs_universal(dict(zero_stage=0, world_size=4), 2)
    older = dict(zero_stage=1, world_size=2, precision="bf16")  # by DeepSpeed's BF16_Optimizer, which splits otherwise
    assert needs_universal(older, 2) and not needs_universal(older | dict(precision="fp32"), 2)
    assert not needs_universal(older | dict(deepspeed_optimizer="DeepSpeedZeroOptimizer"), 2)
