import json

import pytest

from controlbooth.trainer.attempt import Attempt
from controlbooth.trainer.checkpoint import (
    COMPLETE,
    CheckpointError,
    check_same_run,
    complete_checkpoints,
    folder_of,
    needs_universal,
    prune,
)


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
    prune(tmp_path, keep=2, keep_best=1, attempt=start(tmp_path))
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert not list(start(tmp_path).folder.iterdir())


def test_pruning_without_keep_best_keeps_only_the_latest(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, {"edge_f1": 1.0 / step})
    prune(tmp_path, keep=1, keep_best=0, attempt=start(tmp_path))
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


def test_only_split_states_need_to_be_split_anew():
    assert needs_universal(dict(zero_stage=2, world_size=4), 2)
    assert not needs_universal(dict(zero_stage=2, world_size=2), 2)
    assert not needs_universal(dict(zero_stage=0, world_size=4), 2)
