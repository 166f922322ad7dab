"""`controlbooth launch status` of runs that were never submitted as a job."""

import fcntl
import json
import time

import pytest
import yaml

from controlbooth.launch.cli import main as controlbooth
from controlbooth.launch.progress import duration


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def run(tmp_path):
    """A ControlNet run at step 40 of 100, 0.5 s a step, with a torn last line."""
    folder, now = tmp_path / "first", time.time()
    steps = [
        dict(step=step, time=now - (40 - step) / 2, metrics={"loss": 1 / step, "samples_per_second": 16.0})
        for step in range(1, 41)
    ]
    validated = dict(step=20, time=now, metrics={"validation/edge_f1": 0.75, "validation/fixed_noise_loss": 0.1})
    write(folder / "metrics.jsonl", lines(*steps[:20], validated, *steps[20:]) + '{"step": 41, "met')
    write(folder / "config.yaml", yaml.safe_dump(dict(max_steps=100)))
    write(folder / "status.json", dict(state="running", step=20))
    write(folder / "checkpoints" / "step-00000020" / "COMPLETE", "{}")
    state = dict(uri="sqlite:///runs/mlflow.db", experiment_id="7", run_id="abc")
    write(folder / "tracking.json", state)
    return folder


def test_a_plain_training_tells_step_speed_time_left_losses_figures_and_its_page(run, capsys):
    assert controlbooth(["launch", "status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "run         first: running at step 40" in said
    assert "step        40 of 100, 2 steps/s, 30 s left" in said
    assert "last        loss 0.025, samples_per_second 16" in said
    assert "validation  of step 20: edge_f1 0.75, fixed_noise_loss 0.1" in said
    assert "checkpoint  step-00000020" in said
    assert "runs/mlflow.db, then http://127.0.0.1:5000/#/experiments/7/runs/abc" in said
    assert "nothing is at work on it, as far as its lock tells; `controlbooth train RUN.yaml` goes on" in said


def test_a_lock_that_is_held_tells_that_it_is_being_trained(run, capsys):
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        controlbooth(["launch", "status", str(run)])
    assert "it is being trained now" in capsys.readouterr().out


def test_a_failed_run_says_why_and_ends_with_status_1(run, capsys):
    write(run / "status.json", dict(state="failed", error="rank 0: OSError: the disk is full"))
    assert controlbooth(["launch", "status", str(run)]) == 1
    assert "error       rank 0: OSError: the disk is full" in capsys.readouterr().out


def test_a_run_of_subjects_is_a_table_of_them(tmp_path, capsys):
    folder, now = tmp_path / "pets", time.time()
    write(folder / "subjects.json", [dict(name=name, steps=20) for name in ("rex", "mug", "cup")])
    write(folder / "subjects" / "rex" / "status.json", dict(state="training", step=8, steps=20))
    losses = [dict(step=n, time=now, metrics={"train/instance_loss": 0.1 * n}) for n in range(1, 11)]
    write(folder / "subjects" / "rex" / "metrics.jsonl", lines(*losses))
    write(folder / "subjects" / "rex" / "best.json", dict(step=5))
    write(folder / "subjects" / "cup" / "status.json", dict(state="failed", error="has no pictures"))
    together = [
        dict(step=n, time=now - 11 + n, metrics={"train/subjects_in_training": 2.0, "train/step_seconds": 1.0})
        for n in range(1, 12)
    ]
    write(folder / "metrics.jsonl", lines(*together))
    assert controlbooth(["launch", "status", str(folder)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "subjects    3: 0 finished, 1 training, 1 waiting, 1 failed"
    assert "speed       2 steps of single subjects a second, 16 s left" in said
    assert "            rex   training  10 of 20  0.5500  best step 5" in said
    assert "            mug   waiting   0 of 20" in said
    assert "            cup   failed    0 of 20           has no pictures" in said


def test_a_folder_of_no_run_is_refused(tmp_path, capsys):
    assert controlbooth(["launch", "status", str(tmp_path)]) == 2
    assert "and no job was submitted for it: give the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (600, "10 min"), (11100, "3 h 5 min"), (187200, "2 d 4 h")]
)
def test_durations_are_told_in_two_units(seconds, text):
    assert duration(seconds) == text
