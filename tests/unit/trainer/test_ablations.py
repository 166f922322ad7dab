"""Which runs `controlbooth ablate` trains, and which it refuses to go on with."""

import json
import os
import shlex
import sys

import cv2
import pytest

from controlbooth.data.errors import UserError
from controlbooth.launch.commands import ablate as ablations
from controlbooth.launch.commands.sweep import values_of
from controlbooth.trainer.config.loading import dump, load_config
from controlbooth.trainer.config.run import run_folder
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.sweeps import describe_choice, draw_sweep, shares_of

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


@pytest.mark.parametrize(
    ("sweep", "points", "values"),
    [
        ("optimizer.learning_rate=1e-5..1e-3", 3, ["1e-05", "0.0001", "0.001"]),
        ("optimizer.learning_rate=1e-6..1e-3", 4, ["1e-06", "1e-05", "0.0001", "0.001"]),
        ("data.prompt_dropout=0.5,0,0.25", 5, ["0", "0.25", "0.5"]),
        ("model.rank=4,16", 5, ["4", "16"]),
    ],
)
def test_a_sweep_ascends_evenly_on_a_logarithmic_scale_or_takes_the_values_that_are_given(sweep, points, values):
    assert values_of(sweep, points) == (sweep.partition("=")[0], values)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("optimizer.learning_rate", "'' is no number"),
        ("learning_rate=1..2", "names no field such as optimizer.learning_rate"),
        ("optimizer.learning_rate=1e-3..1e-5", "a range ascends from a number above 0"),
        ("optimizer.learning_rate=0..1", "a range ascends from a number above 0"),
        ("optimizer.learning_rate=1e-4", "at least two values"),
        ("optimizer.learning_rate=1e-4,1e-4", "at least two values"),
        ("optimizer.learning_rate=1e-4..nan", "'nan' is no number"),
        ("optimizer.name=muon,adamw", "'muon' is no number"),
    ],
)
def test_what_is_no_sweep_is_refused_with_its_forms(sweep, message):
    with pytest.raises(UserError, match=message):
        values_of(sweep, 5)


def test_a_run_that_fails_does_not_end_a_sweep_and_one_that_is_stopped_does(ablate, tmp_path, monkeypatch):
    run, output, called = tmp_path / "run.yaml", f"output={tmp_path}", []
    monkeypatch.setattr(ablations.child_process, "call", lambda command, environment: called.append(command) or 0)
    left = {"0.001": ("finished", 0), "0.01": ("finished", 0), "0.1": ("failed", 1)}

    def train(path, changes, processes):
        state, status = left[named(changes).removeprefix("optimizer.learning_rate-").removesuffix("-0")]
        folder = run_folder(load_config(path, changes))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "status.json").write_text(json.dumps({"state": state, "step": 500}))
        return status

    monkeypatch.setattr(ablations, "train", train)
    sweep = [str(run), "--sweep", "optimizer.learning_rate=1e-3,1e-2,1e-1", output]
    assert ablations.main(sweep) == 0
    assert called[0][-2:] == ["--sweep=optimizer.learning_rate", "--failed=1"]
    listed = json.loads((tmp_path / "first-learning_rate" / "runs.json").read_text())
    assert [one["variant"] for one in listed] == ["optimizer.learning_rate=0.001", "optimizer.learning_rate=0.01"]
    left |= {"0.1": ("stopped", 130)}
    assert ablations.main(sweep) == 130 and len(called) == 1
    left |= dict.fromkeys(left, ("failed", 1))
    with pytest.raises(ConfigError, match="all 3 runs of the sweep have failed"):
        ablations.main([*sweep, f"output={tmp_path / 'other'}"])


def rows_of(shares):
    return [
        dict(variant=f"optimizer.learning_rate={value:g}", seed=0, prompt=prompt, edge_f1=0.5, edge_f1_share=share)
        for value, pair in shares.items()
        for prompt, share in zip(("perfect", "none"), pair, strict=True)
    ]


def test_the_best_value_of_a_sweep_is_told_with_what_comes_near_it_and_drawn(tmp_path):
    field = "optimizer.learning_rate"
    table = rows_of({1e-5: (0.1, 0.0), 1e-4: (0.6, 0.5), 1e-3: (0.62, 0.4)})
    figure, shares = shares_of([*table, dict(variant="real pictures", seed=None, prompt="none", edge_f1=0.9)], field)
    told = describe_choice(field, figure, shares, failed=1)
    assert told.startswith("best: optimizer.learning_rate=0.0001, with 55 % of what is possible in edge f1")
    assert "less than 5 % below it: 0.001" in told and "1 runs failed" in told and "at the end" not in told
    assert draw_sweep(tmp_path / "sweep.png", field, figure, shares) is None
    assert cv2.imread(str(tmp_path / "sweep.png")).std() > 5
    rising = shares_of(rows_of({1e-4: (0.3, 0.2), 1e-3: (0.6, 0.4)}), field)
    assert "sweep further on that side" in describe_choice(field, *rising, failed=0)
    asleep = shares_of(rows_of({1e-5: (0.0, 0.0), 1e-4: (0.02, 0.01), 1e-3: (0.0, 0.0)}), field)
    assert "None of them has learned to obey yet" in describe_choice(field, *asleep, failed=0)
    assert "no value of" in describe_choice(field, *shares_of([], field), failed=0)
