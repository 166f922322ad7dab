"""What `controlbooth quickstart` runs, and which finished model it refuses to show as another one."""

import json

import pytest

from controlbooth.launch.cli import main as controlbooth
from controlbooth.launch.commands import quickstart
from controlbooth.trainer.config.loading import dump, load_config
from controlbooth.trainer.config.run import run_folder
from controlbooth.trainer.run.integrity import write_marker


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The commands that were run, none of which does anything, in an empty folder."""
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "gpu_count", lambda: 0)
    monkeypatch.setattr(quickstart, "verb", lambda command: commands.append(quickstart.shown(command)) or 0.0)
    monkeypatch.setattr(quickstart, "summary", lambda *_: "the summary")

    def train(run_file, overrides, processes):
        commands.append(quickstart.shown(quickstart.train_command(run_file, overrides, processes)))
        return 0

    monkeypatch.setattr(quickstart, "train", train)
    return commands


def leave(step: int, *overrides: str) -> None:
    """What a training leaves in its folder, as far as it is asked for."""
    config = load_config(quickstart.CONFIG, overrides)
    checkpoint = run_folder(config) / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    (checkpoint / "config.yaml").write_text(dump(config))
    write_marker(checkpoint)


@pytest.mark.parametrize("overrides", [[], ["max_steps=100", "engine.zero_stage=3", "name=a.b"]])
def test_a_dry_run_the_headings_and_what_is_run_are_the_same_commands(ran, capsys, overrides):
    assert controlbooth(["quickstart", *overrides, "--dry-run"]) == 0
    dry = capsys.readouterr().out.splitlines()
    assert ran == [] and overrides == [word for word in dry[2].split() if "=" in word]
    assert controlbooth(["quickstart", *overrides]) == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("== ")]
    assert dry == ran == [heading.partition(": ")[2] for heading in headings]


def test_a_finished_run_of_other_settings_is_not_measured_as_the_one_that_is_asked_for(ran, capsys):
    leave(1600)
    for _ in range(2):  # the same command again measures
        assert controlbooth(["quickstart", "output=runs"]) == 0
    assert len(ran) == 10
    ran.clear()
    for words in (["max_steps=100", "engine.zero_stage=3"], ["max_steps=100", "engine.zero_stage=3", "--dry-run"]):
        assert controlbooth(["quickstart", *words]) == 2
        assert (
            "runs/quickstart has been trained up to step 1600 with other settings than are asked for: "
            "max_steps: 1600 -> 100; engine.zero_stage: 2 -> 3. Train into another folder with name=NAME, "
            "delete runs/quickstart, or leave the change out"
        ) in capsys.readouterr().err
    assert ran == []
    assert controlbooth(["quickstart", "max_steps=100", "engine.zero_stage=3", "name=short"]) == 0
    assert controlbooth(["quickstart", "max_steps=3200"]) == 0  # goes on
