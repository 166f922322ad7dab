"""Runs of subjects on a tiny base, as MLflow has them afterwards."""

import time

import pytest
from mlflow import MlflowClient
from studios import NAMES, difference, finish, kill, run_file, start, states, weights

from controlbooth.trainer.tracking.spool import read_metrics


def tracked(studio, name):
    """-> the client, the run of the job, and those of its subjects by name. Raises where there is not one of each."""
    client = MlflowClient(f"sqlite:///{studio / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("controlbooth").experiment_id
    (job,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{job.info.run_id}'")
    by_name = {run.info.run_name: run for run in children}
    assert len(by_name) == len(children)
    return client, job, by_name


def steps_of(client, run, metric):
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


@pytest.fixture(scope="module")
def whole(studio):
    """All six in stacks of four, undisturbed."""
    finish(start(studio, run_file(studio, "tracked")))
    return "tracked"


def test_a_job_has_one_run_and_each_subject_one_below_it_with_every_step_once(studio, whole):
    client, job, children = tracked(studio, whole)
    assert children.keys() == set(NAMES) and job.info.status == "FINISHED"
    assert job.data.metrics["subjects/finished"] == 6 and job.data.metrics["subjects/left"] == 0
    assert {"step_seconds", "samples_per_second", "stall_percent", "peak_memory_gib", "instance_loss"} <= {
        name.removeprefix("train/") for name in job.data.metrics
    }
    for number, name in enumerate(NAMES):
        run = children[name]
        word = ["red", "blue", "green", "teal", "pink", "gray"][number]
        assert (run.info.status, run.data.tags["state"], run.data.tags["class_noun"]) == (
            "FINISHED",
            "finished",
            "star",
        )
        assert run.data.params["instance_prompt"] == f"a {word} star" and run.data.params["identifier"] == word
        assert (run.data.params["steps"], run.data.params["rank"]) == ("12", "4")
        for metric in ("train/instance_loss", "train/prior_loss"):
            assert steps_of(client, run, metric) == list(range(1, 13))


def test_a_killed_run_logs_no_step_twice_and_its_weights_are_bitwise_those_of_one_that_was_not(studio, whole):
    looks = dict(every_steps=3, prompts=["a {identifier} {class_noun}"], pictures=1, sampling_steps=1, guidance_scale=1)
    path = run_file(studio, "tracked-killed", validation=looks)
    state = studio / "runs" / "tracked-killed" / "state" / "of-1" / "rank-0.safetensors"
    process, written = start(studio, path), set()
    deadline = time.monotonic() + 200
    while len(written) < 2:  # at the start, and after the first steps
        assert time.monotonic() < deadline and process.poll() is None
        written |= {state.stat().st_mtime_ns} if state.exists() else set()
        time.sleep(0.005)
    kill(process)
    finish(start(studio, path))
    client, _, children = tracked(studio, "tracked-killed")
    for name in NAMES:
        assert difference(weights(studio, "tracked-killed", name), weights(studio, whole, name)) == 0.0
        own = studio / "runs" / "tracked-killed" / "subjects" / name
        lines = [step for step, _, metrics in read_metrics(own) if "train/instance_loss" in metrics]
        assert lines == steps_of(client, children[name], "train/instance_loss") == list(range(1, 13))
        assert steps_of(client, children[name], "validation/instance_loss") == [0, 3, 6, 9, 12]
        pictures = client.list_artifacts(children[name].info.run_id, "images")
        assert len([one for one in pictures if one.path.endswith(".png")]) == 5


@pytest.mark.parametrize("how", ["ranks", "tasks"])
def test_ranks_and_tasks_of_an_array_log_to_one_run_each_under_its_own_name(studio, how):
    path = run_file(studio, f"tracked-{how}", steps=4)
    if how == "ranks":
        finish(start(studio, path, processes=2))
    else:
        for task in [start(studio, path, rows=rows) for rows in ("0:3", "3:6")]:
            finish(task)
    client, job, children = tracked(studio, f"tracked-{how}")
    assert children.keys() == set(NAMES) and job.info.status == "FINISHED"
    assert all(steps_of(client, run, "train/instance_loss") == [1, 2, 3, 4] for run in children.values())
    parts = {"ranks": ("", "rank-1/"), "tasks": ("rows-0-3/", "rows-3-6/")}[how]
    timed = {name for name in job.data.metrics if name.endswith("/step_seconds")}
    assert timed == {f"train/{part}step_seconds" for part in parts}
    assert job.data.metrics["subjects/finished"] == 6


def test_a_subject_that_fails_and_one_that_never_could_be_trained_say_why(studio, whole):
    import yaml

    rows = yaml.safe_load((studio / "subjects.yaml").read_text())[:1]
    rows += [dict(rows[0], name="wild", identifier="small", learning_rate=1e39), dict(rows[0], name="typed", steps="x")]
    (studio / "tracked-faulty.yaml").write_text(yaml.safe_dump(rows))
    finish(start(studio, run_file(studio, "tracked-faults", steps=4), subjects="tracked-faulty.yaml"), status=1)
    _, job, children = tracked(studio, "tracked-faults")
    assert job.info.status == "FAILED" and job.data.metrics["subjects/failed"] == 2
    assert {name: run.info.status for name, run in children.items()} == dict(
        {NAMES[0]: "FINISHED"}, wild="FAILED", typed="FAILED"
    )
    told = states(studio, "tracked-faults")
    for name in ("wild", "typed"):
        assert children[name].data.tags["reason"] == told[name]["error"] and told[name]["error"]
