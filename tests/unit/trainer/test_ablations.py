"""Which runs `controlbooth ablate` trains, and which it refuses to go on with."""

import json
import os
import shlex
import sys

import pytest

from controlbooth.launch.commands import ablate as ablations
from controlbooth.trainer.config.loading import dump, load_config
from controlbooth.trainer.config.run import run_folder
from controlbooth.trainer.config.section import ConfigError

RUN = """
name: first
max_steps: 500
global_batch_size: 8
micro_batch_size: 8
model: {base: miniature}
data: {shards: shards/, condition: edges}
"""
GRID = """
name: grid
run: run.yaml
variants: {full: {}, lite: {changes: [model.trainable_copy=lite]}}
"""


@pytest.fixture
def ablate(tmp_path, monkeypatch):
    """Overrides -> the runs that would be trained, all of which fail. Data is taken for packed."""
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "grid.yaml").write_text(GRID)
    started = []
    monkeypatch.setattr(ablations, "packing", lambda config: [])
    monkeypatch.setattr(ablations, "train", lambda run, changes, processes: started.append(named(changes)) or 1)

    def call(*overrides):
        started.clear()
        ablations.main([str(tmp_path / "grid.yaml"), f"output={tmp_path}", *overrides])
        return list(started)

    return call


def named(changes):
    return next(change.partition("=")[2] for change in changes if change.startswith("name="))


def leave(tmp_path, name, step, *changes, state="finished"):
    """What a training leaves in its folder, as far as it is asked for."""
    own = [f"output={tmp_path / 'grid'}", f"name={name}", *changes]
    if name == "lite-0":
        own.append("model.trainable_copy=lite")
    config = load_config(tmp_path / "run.yaml", own)
    run_folder(config).mkdir(parents=True, exist_ok=True)
    (run_folder(config) / "config.yaml").write_text(dump(config))
    (run_folder(config) / "status.json").write_text(json.dumps({"state": state, "step": step}))


def test_only_runs_that_have_all_their_steps_are_not_started_again(ablate, tmp_path):
    assert ablate() == ["full-0"]
    leave(tmp_path, "full-0", 500)
    assert ablate() == ["lite-0"]
    leave(tmp_path, "full-0", 100, "max_steps=100")
    assert ablate() == ["full-0"]  # and trains the 400 steps that are left
    leave(tmp_path, "full-0", 200, state="stopped")
    assert ablate() == ["full-0"]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (["optimizer.learning_rate=1e-3"], "grid/lite-0 was trained with optimizer.learning_rate=0.001, now it is"),
        (["data.condition=depth", "data.resolution=64"], "condition=depth, now it is edges; data.resolution=64, now"),
        (["max_steps=1000"], "max_steps=1000, now it is 500.*output=FOLDER"),
        (["engine.zero_stage=1"], "engine.zero_stage=1, now it is 2"),
    ],
)
def test_a_run_of_other_settings_is_refused_before_any_is_trained(ablate, tmp_path, before, message):
    leave(tmp_path, "lite-0", 500, *before)
    for dry in ([], ["--dry-run"]):
        with pytest.raises(ConfigError, match=message):
            ablate(*dry)
    assert ablate("output=" + os.path.join(tmp_path, "elsewhere")) == ["full-0"]


def test_a_run_whose_learning_rate_was_to_end_earlier_is_refused(ablate, tmp_path):
    leave(tmp_path, "full-0", 100, "max_steps=100", "optimizer.schedule=cosine")
    with pytest.raises(ConfigError, match="max_steps=100, now it is 500.*learning rate"):
        ablate("optimizer.schedule=cosine")


def test_a_longer_run_and_another_cadence_go_on_in_the_same_folder(ablate, tmp_path):
    leave(tmp_path, "full-0", 100, "max_steps=100", "checkpoint.every_steps=50", "checkpoint.keep=5")
    leave(tmp_path, "lite-0", 500, "validation.every_steps=7")
    assert ablate() == ["full-0"]


def test_a_dry_run_prints_the_commands_of_this_environment_with_their_ranks(ablate, tmp_path, capsys):
    assert ablate("--dry-run", "--processes", "2", "max_steps=7") == []
    full, lite, measuring = capsys.readouterr().out.splitlines()
    for line in (full, lite):
        assert line.startswith(f"controlbooth train {tmp_path / 'run.yaml'} ") and line.endswith(" --processes 2")
        assert " max_steps=7 " in line
    python, *words = shlex.split(measuring)
    assert os.path.samefile(python, sys.executable)
    assert words == ["-m", "controlbooth.trainer.evaluation.ablations", str(tmp_path / "grid"), "--samples=48"]
