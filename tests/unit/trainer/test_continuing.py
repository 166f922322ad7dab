"""What a start would do with a run's folder, told before it starts."""

import json

import pytest

from controlbooth.launch.commands.train import plan
from controlbooth.launch.preflight.run import check_early_stop
from controlbooth.launch.ranks.torchrun import Node
from controlbooth.trainer.config.loading import build_config, dump
from controlbooth.trainer.run.continuing import describe_start, found_before, is_finished
from controlbooth.trainer.run.integrity import write_marker

HERE = Node(processes=1, cores=2, gpus=0, head_port=29500)


def config(output="runs", **changes):
    tree = dict(
        name="run", output=output, max_steps=100, global_batch_size=1, micro_batch_size=1,
        model=dict(base="miniature"), data=dict(shards="t", held_out="h", condition="edges", resolution=64),
        optimizer=dict(learning_rate=3e-4), validation=dict(every_steps=25),
    )  # fmt: skip
    return build_config(tree | changes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "run"


def save(folder, step, whole=True):
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(dump(config()))
    (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    if whole:
        write_marker(checkpoint)


def test_a_new_run_is_called_one(folder):
    save(folder, 50, whole=False)
    assert describe_start(config()) == ["run in runs/run, which is new"]


def test_a_finished_run_of_the_same_settings_is_told_to_be_finished(folder):
    save(folder, 100)
    told = "runs/run is finished at step 100. Raise max_steps=100 to go on, or change the name"
    assert describe_start(config()) == [told]
    assert describe_start(config(output=str(folder.parent)))[0].endswith(told.removeprefix("runs/run"))


def test_a_finished_run_of_other_settings_is_told_with_what_differs(folder):
    save(folder, 50)
    save(folder, 100)
    other = config(optimizer=dict(learning_rate=1e-4))
    before = found_before(other)
    assert before is not None and before.step == 100 and is_finished(before, other)
    (told,) = describe_start(other)
    assert told.endswith(
        "or change the name. It was trained with other settings, and is not trained with these: "
        "optimizer.learning_rate: 0.0003 -> 0.0001"
    )
    assert told in plan(other, HERE)


def test_a_run_that_goes_on_is_told_from_where_and_with_which_changes(folder):
    save(folder, 50)
    assert describe_start(config()) == ["run in runs/run, which goes on from step 50"]
    told = describe_start(config(optimizer=dict(learning_rate=1e-4)))
    assert told[1] == "changed since step 50: optimizer.learning_rate: 0.0003 -> 0.0001"


def test_a_run_from_before_a_key_was_renamed_goes_on_without_a_change(folder):
    save(folder, 50)
    saved = folder / "checkpoints" / "step-00000050"
    text = (saved / "config.yaml").read_text()
    assert "latent_cache: null" in text
    (saved / "config.yaml").write_text(text.replace("latent_cache: null", "columns: latents"))
    write_marker(saved)
    data = dict(shards="t", held_out="h", condition="edges", resolution=64)
    for name in ("columns", "latent_cache"):
        assert describe_start(config(data=data | {name: "latents"}))[1:] == []
    changed = describe_start(config(data=data | {"latent_cache": "others"}))[1]
    assert changed == "changed since step 50: data.latent_cache: latents -> others"


def test_the_plan_warns_of_a_run_that_can_never_announce_and_refuses_one_that_is_to_end_by_it(folder):
    assert "warning" not in plan(config(), HERE)
    few = config(validation=dict(every_steps=25, samples=4))
    assert "warning    control cannot be announced by validation.samples=4" in plan(few, HERE)
    assert list(check_early_stop(few, HERE)) == []
    (problem,) = check_early_stop(config(validation=dict(samples=4, stop_after_convergence=10)), HERE)
    assert problem.startswith("validation.stop_after_convergence=10 would never end the run: control cannot")
