"""Runs of many subjects on a tiny base, on ranks of torchrun."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import cv2
import forked
import numpy as np
import psutil
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from studios import NAMES, difference, finish, kill, run_file, start, states, weights

from controlbooth.launch.commands.dreambooth_export import main as export_main
from controlbooth.models.lora import ATTENTION, attach_adapters, load_subject
from controlbooth.models.pretrained import load_base
from controlbooth.models.sampling import initial_noise, sample
from controlbooth.trainer.config.subjects import load_run
from controlbooth.trainer.dreambooth.manifest import load_subjects, settle
from controlbooth.trainer.dreambooth.stack_state import State, plan_ranks, read_state, write_state
from controlbooth.trainer.run.attempt import Attempt


@pytest.fixture(scope="module")
def whole(studio):
    """All six in stacks of four, undisturbed."""
    finish(start(studio, run_file(studio, "whole")))
    return "whole"


def test_subjects_together_end_as_each_does_alone(studio, whole):
    alone = run_file(studio, "alone", subjects_per_batch=1)
    finish(start(studio, alone))
    for name in NAMES:
        ours, theirs = weights(studio, whole, name), weights(studio, "alone", name)
        assert difference(ours, theirs) < 2e-5
        assert max(np.abs(theirs[key]).max() for key in theirs if "lora_B" in key) > 1e-3


def test_two_ranks_share_the_subjects_and_end_with_the_same_weights(studio, whole):
    finish(start(studio, run_file(studio, "ranks"), processes=2))
    assert all(difference(weights(studio, "ranks", name), weights(studio, whole, name)) < 2e-5 for name in NAMES)


LATE = str(Path(__file__).parent / "workers" / "late.py")


def test_a_rank_that_ends_first_waits_for_one_that_trains_longer_than_a_collective_may_take(studio):
    rows = yaml.safe_load((studio / "subjects.yaml").read_text())
    (studio / "late-subjects.yaml").write_text(yaml.safe_dump(rows[:2]))
    path = run_file(studio, "late", steps=2, prior=dict(weight=0.0))
    worker = (LATE, "trainer.dreambooth.train", "trainer.dreambooth.stack", "run_stack")
    output = finish(start(studio, path, processes=2, subjects="late-subjects.yaml", worker=worker))
    assert "2 subjects finished, 0 failed" in output


def test_a_rank_that_has_measured_its_subjects_waits_for_one_that_measures_longer(studio, whole):
    measuring = ("launch.commands.dreambooth_measure", "trainer.dreambooth.measuring.measure", "draw")
    words = [LATE, *measuring, studio / "runs" / whole, "--prompts", "2", "--images", "2"]
    done = forked.run(2, words, **forked.BEFORE_IMPORTS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "6 subjects, 2 prompts x 2 images" in done.stdout


def test_a_run_killed_twice_trains_each_subject_to_bitwise_the_same_weights(studio, whole):
    path = run_file(studio, "killed", steps=12)
    state = studio / "runs" / "killed" / "state" / "of-1" / "rank-0.safetensors"
    for _ in range(2):
        process = start(studio, path)
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.monotonic() + 200
        while not state.exists() or state.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        kill(process)
    finish(start(studio, path))
    assert all(difference(weights(studio, "killed", name), weights(studio, whole, name)) == 0.0 for name in NAMES)
    assert all(status["state"] == "finished" and status["step"] == 12 for status in states(studio, "killed").values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_status_tells_what_is_saved_of_a_subject_and_of_a_stopped_one_that_nothing_runs(studio, method):
    run = f"stopped-{method}"
    path = run_file(studio, run, steps=400, method=method, subjects_per_batch=2)
    process = start(studio, path)
    deadline = time.monotonic() + 200
    while not any(status["state"] == "training" and status["step"] >= 4 for status in states(studio, run).values()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    for rank in psutil.Process(process.pid).children():
        rank.send_signal(signal.SIGTERM)
    assert "0 subjects finished, 0 failed, 6 to go" in finish(process)
    told = states(studio, run)
    assert len(told) == (2 if method == "lora" else 1)
    assert {(status["state"], status["steps"]) for status in told.values()} == {("stopped", 400)}
    if method == "lora":
        saved = {name: int(tensors["step"]) for name, tensors in begun(studio / "runs" / run / "state", 1).items()}
    else:
        (checkpoint,) = (studio / "runs" / run).glob("subjects/*/checkpoints/step-*")
        saved = {checkpoint.parents[1].name: int(checkpoint.name.removeprefix("step-"))}
    assert {name: status["step"] for name, status in told.items()} == saved


def test_a_run_goes_on_with_another_number_of_ranks(studio, whole):
    path = run_file(studio, "moved", subjects_per_batch=6)
    process = start(studio, path, processes=1)
    state = studio / "runs" / "moved" / "state" / "of-1" / "rank-0.safetensors"
    written = 0
    while written < 2:  # at the start, and after the first steps
        assert process.poll() is None
        before = state.stat().st_mtime_ns if state.exists() else 0
        time.sleep(0.005)
        written += state.exists() and state.stat().st_mtime_ns != before
    kill(process)
    path.write_text(path.read_text().replace("subjects_per_batch: 6", "subjects_per_batch: 2"))
    finish(start(studio, path, processes=2))
    assert all(difference(weights(studio, "moved", name), weights(studio, whole, name)) < 2e-5 for name in NAMES)


def test_what_a_killed_rank_left_half_written_is_deleted_when_the_number_of_ranks_changes(studio, tmp_path):
    config = load_run(run_file(studio, "half"))
    tasks, _ = settle(load_subjects(studio / "subjects.yaml")[0], config)
    attempt = Attempt(tmp_path, 1, "id")
    attempt.folder.mkdir()
    plan_ranks(attempt, config, tasks, {}, 1)
    (tmp_path / "state" / "of-1" / "rank-0.partial").write_bytes(b"half a file")
    plan_ranks(attempt, config, tasks, {}, 2)
    state = tmp_path / "state"
    left = sorted(str(path.relative_to(state)) for path in state.rglob("rank-*"))
    assert left == ["of-1/rank-0.safetensors", "of-2/rank-0.safetensors", "of-2/rank-1.safetensors"]
    assert {name for path in state.glob("of-2/*") for name in read_state(path).queue} == set(NAMES)


def test_a_state_that_was_cut_off_is_named_and_its_subjects_end_with_bitwise_the_same_weights(studio, whole):
    path, run = run_file(studio, "cut-off"), studio / "runs" / "cut-off"
    state = run / "state" / "of-1" / "rank-0.safetensors"
    process = start(studio, path)
    while not (state.exists() and begun(run / "state", 1)):
        assert process.poll() is None
        time.sleep(0.005)
    kill(process)
    state.write_bytes(state.read_bytes()[:1000])
    next((run / "subjects").glob("*/status.json")).write_text('{"sta')
    output = finish(start(studio, path))
    assert f"{state} cannot be read" in output and "Of 6 subjects that are not finished, 0 go on" in output
    assert all(difference(weights(studio, "cut-off", name), weights(studio, whole, name)) == 0.0 for name in NAMES)


@pytest.mark.parametrize(
    ("damage", "told", "steps"),
    [
        (lambda state: None, "", [8, 8, 0, 4, 0, 0]),
        (lambda state: (state / "CURRENT").write_text(""), "CURRENT is '', and no name", [8, 8, 0, 4, 0, 0]),
        (lambda state: (state / "CURRENT").write_text("of-9\x00"), "and no name", [8, 8, 0, 4, 0, 0]),
        (lambda state: (state / "CURRENT").unlink(), "", [8, 8, 0, 4, 0, 0]),
        (lambda state: (state / "of-2" / "rank-1.safetensors").unlink(), "No such file", [8, 4, 0, 4, 0, 0]),
        (lambda state: (state / "of-2" / "rank-0.safetensors").write_bytes(b""), "cannot be read", [4, 8, 0, 4, 0, 0]),
    ],
)
def test_what_is_damaged_of_a_state_is_told_and_the_newest_whole_state_of_each_subject_is_taken(
    studio, tmp_path, capsys, damage, told, steps
):
    config = load_run(run_file(studio, "damaged"))
    tasks, _ = settle(load_subjects(studio / "subjects.yaml")[0], config)
    attempt = Attempt(tmp_path, 1, "id")
    attempt.folder.mkdir()
    state = tmp_path / "state"

    def at(step, *numbers):
        return {NAMES[number]: {"step": torch.tensor(step)} for number in numbers}

    write_state(attempt, state / "of-1" / "rank-0.safetensors", State(at(4, 0, 1), [], at(4, 3)))
    write_state(attempt, state / "of-2" / "rank-0.safetensors", State(at(8, 0), [], at(4, 3)))
    write_state(attempt, state / "of-2" / "rank-1.safetensors", State(at(8, 1), [], {}))
    for number, one in enumerate(("of-1/rank-0", "of-2/rank-0", "of-2/rank-1")):
        os.utime(state / f"{one}.safetensors", (number, number))
    (state / "CURRENT").write_text("of-2")
    damage(state)
    plan_ranks(attempt, config, tasks, {}, 1)
    assert (state / "CURRENT").read_text() == "of-1"
    assert told in (said := capsys.readouterr().err) and bool(said) == bool(told)
    saved = begun(state, 1)
    assert [int(saved[name]["step"]) if name in saved else 0 for name in NAMES] == steps
    assert not told or "Of 6 subjects that are not finished, 3 go on" in said


def test_a_subject_that_cannot_be_trained_says_why_and_the_others_finish(studio, whole):
    rows = yaml.safe_load((studio / "subjects.yaml").read_text())
    bad = studio / "pictures" / "bad"
    for name in ("broken", "tiny", "copies", "empty", "link", "folder/0.png"):
        (bad / name).mkdir(parents=True)
    (bad / "link" / "0.png").symlink_to("nowhere")
    (bad / "broken" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    cv2.imwrite(str(bad / "tiny" / "0.png"), np.zeros((9, 9, 3), np.uint8))
    for copy in "01":
        cv2.imwrite(str(bad / "copies" / f"{copy}.png"), np.full((64, 64, 3), 99, np.uint8))
    words = ["small", "large", "white", "brown", "black", "yellow"]
    names = ("broken", "tiny", "copies", "empty", "link", "folder")
    rows = [dict(name=n, images=f"pictures/bad/{n}", class_noun="star", identifier=w)
            for n, w in zip(names, words, strict=True)] + rows[:2]  # fmt: skip
    rows += [dict(rows[-1], learning_rate="quick", name="typed"), dict(name="diverges", images=rows[-1]["images"],
             class_noun="star", identifier="orange", learning_rate=1e30)]  # fmt: skip
    (studio / "bad.yaml").write_text(yaml.safe_dump(rows))
    path = run_file(studio, "faulty", steps=40, max_grad_norm=1e30)
    output = finish(start(studio, path, subjects="bad.yaml"), status=1)
    told = states(studio, "faulty")
    assert told.keys() >= set(NAMES[:2]), output
    assert [told[name]["state"] for name in NAMES[:2]] == ["finished"] * 2
    for name, why in (
        ("broken", "0.png: .* cannot be decoded"),
        ("tiny", "9 x 9 pixels, too few"),
        ("copies", "1 of its 2 pictures are copies"),
        ("empty", "has no pictures"),
        ("link", "0.png cannot be read: No such file"),
        ("folder", "0.png cannot be read: Is a directory"),
        ("typed", "'learning_rate' is 'quick'"),
        ("diverges", "no finite gradient.*Lower its learning_rate=1e.30"),
    ):
        assert told[name]["state"] == "failed" and re.search(why.replace("1e+30", r"1e\+30"), told[name]["error"]), (
            told[name]
        )
    assert "2 subjects finished, 8 failed" in output


def test_a_subject_that_ends_without_numbers_has_failed_and_spoils_no_other_of_its_stack(studio, whole):
    rows = yaml.safe_load((studio / "subjects.yaml").read_text())[:2]
    spoilers = [dict(name="weights", steps=1, learning_rate=1e39), dict(name="loss", steps=8, learning_rate=1e30)]
    more = [
        rows[0] | spoiler | dict(identifier=word) for spoiler, word in zip(spoilers, ["small", "large"], strict=True)
    ]
    (studio / "spoilers.yaml").write_text(yaml.safe_dump(rows + more))
    output = finish(start(studio, run_file(studio, "spoiled"), subjects="spoilers.yaml"), status=1)
    assert "2 subjects finished, 2 failed" in output
    told = states(studio, "spoiled")
    assert {name: one["state"] for name, one in told.items()} == dict.fromkeys(NAMES[:2], "finished") | dict(
        weights="failed", loss="failed"
    )
    assert "its weights are no finite numbers after step 1. Lower its learning_rate=1e+39" in told["weights"]["error"]
    assert "its loss is nan at its last step, 8. Lower its learning_rate=1e+30" in told["loss"]["error"]
    written = {path.parent.name for path in (studio / "runs" / "spoiled").rglob("pytorch_lora_weights.safetensors")}
    assert written == set(NAMES[:2])
    assert all(difference(weights(studio, "spoiled", name), weights(studio, whole, name)) < 2e-5 for name in NAMES[:2])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_begun_subject_whose_pictures_are_lost_stops_no_other_and_goes_on_when_they_are_back(
    studio, whole, processes
):
    run = f"lost-{processes}"
    rows = yaml.safe_load((studio / "subjects.yaml").read_text())[:3]
    for name in NAMES[:3]:
        shutil.copytree(studio / "pictures" / name, studio / run / name)
    rows = [dict(row, images=f"{run}/{row['name']}") for row in rows]
    rows[0]["rank"] = 8  # so that the stack has another rank without it
    (studio / f"{run}-subjects.yaml").write_text(yaml.safe_dump(rows))
    path, state = run_file(studio, run), studio / "runs" / run / "state"
    process = start(studio, path, subjects=f"{run}-subjects.yaml")
    seen = set()
    while len(seen) < 2:  # it is written at the start, and after the first steps
        assert process.poll() is None
        seen |= {file.stat().st_mtime_ns for file in state.glob("of-1/*")}
        time.sleep(0.005)
    kill(process)

    for picture in (studio / run / NAMES[0]).iterdir():
        picture.unlink()
    (studio / run / NAMES[1] / "1.png").write_bytes(b"no picture")
    output = finish(start(studio, path, processes=processes, subjects=f"{run}-subjects.yaml"), status=1)
    assert "1 subjects finished, 2 failed" in output
    told = states(studio, run)
    assert [told[name]["state"] for name in NAMES[:3]] == ["failed", "failed", "finished"]
    assert "has no pictures" in told[NAMES[0]]["error"] and "1.png: " in told[NAMES[1]]["error"]
    assert {name for name, saved in begun(state, processes).items() if int(saved["step"]) >= 4} == set(NAMES[:2])

    for name in NAMES[:2]:
        shutil.copytree(studio / "pictures" / name, studio / run / name, dirs_exist_ok=True)
    finish(start(studio, path, processes=processes, subjects=f"{run}-subjects.yaml"))
    assert all(one["state"] == "finished" for one in states(studio, run).values())
    assert all(difference(weights(studio, run, name), weights(studio, whole, name)) < 2e-5 for name in NAMES[1:3])
    assert begun(state, processes) == {}


def begun(state, processes):
    """Name -> tensors of the subjects that ranks keep something of."""
    files = [read_state(file) for file in state.glob(f"of-{processes}/*")]
    return {name: saved for file in files for name, saved in (file.slots | file.waiting).items()}


@pytest.mark.parametrize("layers", ["attention", "attention+convolutions"])
def test_an_export_by_kohyas_names_draws_the_same_picture_in_diffusers(studio, layers, tmp_path):
    name = f"kohya-{len(layers)}"
    path = run_file(studio, name, adapter=dict(layers=layers, rank=4), steps=4, learning_rate=1e-1)
    rows = yaml.safe_load((studio / "subjects.yaml").read_text())[:1]
    (studio / "one.yaml").write_text(yaml.safe_dump(rows))
    finish(start(studio, path, subjects="one.yaml"))
    pictures = []
    for kind in ("diffusers", "kohya"):
        out = tmp_path / f"{kind}.safetensors"
        assert export_main([str(studio / "runs" / name), NAMES[0], str(out), "--format", kind]) == 0
        pipeline = StableDiffusionPipeline.from_pretrained(studio / "base", safety_checker=None)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        arguments = dict(num_inference_steps=2, output_type="np", latents=noise)
        plain = pipeline("a red star", **arguments).images
        pipeline.load_lora_weights(tmp_path, weight_name=out.name)
        pictures.append(pipeline("a red star", **arguments).images)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-5 and np.abs(pictures[0] - plain).max() > 1e-2
    with pytest.raises(ValueError, match="is there already; --force"):
        export_main([str(studio / "runs" / name), NAMES[0], str(out)])
    with pytest.raises(ValueError, match="has no subject 'rex'; it has subject-0"):
        export_main([str(studio / "runs" / name), "rex", str(tmp_path / "x.safetensors")])


def test_what_is_exported_draws_the_same_picture_in_diffusers_own_pipeline(studio, whole):
    ours = load_base(studio / "base", "auto", torch.float32, torch.device("cpu"))
    saved = {
        key.removeprefix("unet."): torch.from_numpy(value) * 20
        for key, value in weights(studio, whole, NAMES[0]).items()
    }
    plain = sample(ours, ["a red star"], seeds=[3], steps=4, guidance_scale=2.0)
    load_subject(attach_adapters(ours.denoiser, ATTENTION, 1, 4), 0, saved)
    made = sample(ours, ["a red star"], seeds=[3], steps=4, guidance_scale=2.0)
    assert not torch.equal(made, plain)

    pipeline = StableDiffusionPipeline.from_pretrained(studio / "base", safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights({f"unet.{key}": value for key, value in saved.items()})
    theirs = pipeline(
        "a red star", num_inference_steps=4, guidance_scale=2.0, output_type="np",
        latents=initial_noise(ours, [3], 64, 64),
    ).images  # fmt: skip
    assert np.abs(np.round(theirs * 255) - made.numpy()).max() <= 1


# Tasks of an array


def test_tasks_that_train_rows_of_the_manifest_at_once_end_as_one_run_does(studio, whole):
    path = run_file(studio, "tasks")
    tasks = [start(studio, path, rows=rows) for rows in ("0:4", "4:6")]
    for task in tasks:
        finish(task)
    assert all(difference(weights(studio, "tasks", name), weights(studio, whole, name)) < 2e-5 for name in NAMES)
    assert "overlap. Take as many --subjects-per-task as before" in finish(start(studio, path, rows="3:5"), status=1)
    assert "was begun as an array" in finish(start(studio, path), status=1)
    whole_path = run_file(studio, "whole")
    assert "was begun by `controlbooth dreambooth run`" in finish(start(studio, whole_path, rows="0:2"), status=1)
    assert "--rows is '0:9', but it is FIRST:END, with 0 <= FIRST < END <= 6" in finish(
        start(studio, path, rows="0:9"), status=1
    )


def files(folder):
    """path -> which file it is, and when it was written: a stale task would write the same bytes."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (one.st_ino, one.st_mtime_ns) for path, one in found.items()}


def test_a_stale_task_that_wakes_before_it_writes_a_subject_writes_nothing_over_its_successor(studio):
    path, run = run_file(studio, "stale"), studio / "runs" / "stale"
    asleep = (str(Path(__file__).parent / "workers" / "asleep.py"),)
    old = start(studio, path, rows="0:2", worker=asleep, CONTROLBOOTH_ATTEMPT="1000")
    deadline = time.monotonic() + 200
    while not (stopped := [one for one in psutil.Process(old.pid).children() if one.status() == psutil.STATUS_STOPPED]):
        assert time.monotonic() < deadline and old.poll() is None
        time.sleep(0.1)
    assert not list((run / "subjects").rglob("*.safetensors"))
    finish(start(studio, path, rows="0:2", CONTROLBOOTH_ATTEMPT="1001"))
    before = files(run)
    assert {name for name in before if name.endswith("weights.safetensors")} == {
        f"subjects/{name}/pytorch_lora_weights.safetensors" for name in NAMES[:2]
    }
    for one in stopped:
        one.send_signal(signal.SIGCONT)
    output = finish(old, status=1)
    assert "start 1001 (process" in output and "from this one, start 1000, which ends without writing" in output
    assert files(run) == before
