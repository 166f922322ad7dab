"""The runs of a job's subjects in MLflow, against a real SQLite store; training is left out."""

import json
import shutil
import socket
import threading
import time

import pytest
import torch

from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth import tracking as subject_tracking
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.dreambooth.tracking import SubjectTracking, pause_seconds
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run.attempt import Attempt
from controlbooth.trainer.tracking import tracker as tracking_module
from controlbooth.trainer.tracking.spool import read_metrics
from controlbooth.trainer.tracking.tracker import Tracker

NEVER = 3600.0


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """MLflow takes seconds to make its tables: once is enough."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def output(empty_store, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking_module, "SEND_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(subject_tracking, "LONGEST_PAUSE_SECONDS", 0.05)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def task(name):
    return Task(name, (), "dog", "olis", "a olis dog", "a dog", 10, 1e-3, 4)


def start(output, number=1, rank=0, rows=None, uri=None):
    """A start of the run `pets`, or of a task of its array."""
    settings = dict(system_metrics_seconds=NEVER, uri=uri)
    tree = dict(name="pets", output=output, model=dict(base="miniature"), tracking=settings)
    config = SubjectRunConfig.model_validate(tree)
    folder = output / "pets"
    attempt = Attempt(folder / "rows" / rows if rows else folder, number, "id")
    attempt.folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "subjects.json").exists():
        (folder / "subjects.json").write_text(json.dumps([dict(name="rex"), dict(name="mug")]))
    return SubjectTracking(config, folder, attempt, World(rank, 2, rank, torch.device("cpu")), {"method": "lora"})


def runs_of(output):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("controlbooth")
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    assert len({run.info.run_name for run in found}) == len(found)
    return client, {run.info.run_name: run for run in found}


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_subject_waits_trains_and_ends_in_one_run_below_that_of_the_job(output):
    tracking = start(output)
    with tracking.open({}) as closing:
        tracking.queue([task("rex"), task("mug")])
        wait_for(lambda: {"rex", "mug"} <= runs_of(output)[1].keys())
        wait_for(lambda: runs_of(output)[1]["mug"].data.tags.get("state") == "queued")
        assert runs_of(output)[1]["rex"].info.status == "SCHEDULED"
        tracking.begin(task("rex"), 0)
        tracking.log("rex", 1, {"train/instance_loss": 0.5, "train/prior_loss": float("nan")})
        wait_for(lambda: runs_of(output)[1]["rex"].info.status == "RUNNING")
        tracking.end(task("rex"), "finished")
        closing.stopped = True
    _, runs = runs_of(output)
    assert {name: run.info.status for name, run in runs.items()} == dict(pets="KILLED", rex="FINISHED", mug="SCHEDULED")
    assert runs["rex"].data.metrics == {"train/instance_loss": 0.5}
    assert all(runs[name].data.tags["mlflow.parentRunId"] == runs["pets"].info.run_id for name in ("rex", "mug"))
    assert runs["rex"].data.params["class_noun"] == "dog" and runs["rex"].data.tags["identifier"] == "olis"


def test_steps_that_are_repeated_after_a_restart_are_there_once(output):
    with start(output).open({}):
        pass
    first = start(output, 2)
    with pytest.raises(RuntimeError), first.open({}):
        first.begin(task("rex"), 0)
        for step in range(1, 6):
            first.log("rex", step, {"train/instance_loss": step / 10})
        raise RuntimeError("killed")
    assert runs_of(output)[1]["pets"].info.status == "FAILED"
    second = start(output, 3)
    with second.open({}):
        second.begin(task("rex"), 3)
        for step in range(4, 8):
            second.log("rex", step, {"train/instance_loss": step / 10})
        second.end(task("rex"), "finished")
    client, runs = runs_of(output)
    points = client.get_metric_history(runs["rex"].info.run_id, "train/instance_loss")
    assert [(point.step, point.value) for point in points] == [(step, step / 10) for step in range(1, 8)]
    assert [step for step, _, _ in read_metrics(output / "pets" / "subjects" / "rex")] == list(range(1, 8))


@pytest.mark.slow
def test_many_subjects_take_no_more_threads_and_no_more_open_files_than_few(output):
    import psutil

    tracking = start(output)
    with tracking.open({}):
        threads = threading.active_count()
        tracking.queue([task(f"subject-{number}") for number in range(12)])
        for number in range(4):
            tracking.begin(task(f"subject-{number}"), 0)
            tracking.end(task(f"subject-{number}"), "finished")
        wait_for(lambda: len(runs_of(output)[1]) == 13)
        wait_for(lambda: sum(one.path.endswith(".jsonl") for one in psutil.Process().open_files()) == 1)
        assert threading.active_count() <= threads
    assert sum(run.info.status == "FINISHED" for run in runs_of(output)[1].values()) == 4


def test_tasks_of_an_array_that_start_at_once_make_one_run_of_the_job(output):
    everyone = [start(output, rows=f"{n}-{n + 1}") for n in range(3)]
    for number, tracking in enumerate(everyone):
        with tracking.open({}):
            tracking.begin(task(f"subject-{number}"), 0)
            tracking.log_step({"train/step_seconds": 1.0 + number})
            tracking.end(task(f"subject-{number}"), "finished")
    _, runs = runs_of(output)
    job = runs.pop("pets")
    assert runs.keys() == {f"subject-{number}" for number in range(3)}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {job.info.run_id}
    assert job.data.metrics["train/rows-2-3/step_seconds"] == 3.0
    assert not list((output / "pets").glob("metrics.jsonl"))


def test_a_list_of_subjects_that_cannot_be_read_for_a_moment_does_not_end_the_sending(output, caplog):
    tracking = start(output)
    listed = output / "pets" / "subjects.json"
    with tracking.open({}):
        tracking.begin(task("rex"), 0)
        listed.write_text("")
        tracking._changed = True
        wait_for(lambda: "cannot be told now" in caplog.text)
        listed.write_text(json.dumps([dict(name="rex")]))
        tracking.log("rex", 1, {"train/instance_loss": 0.5})
        wait_for(lambda: "rex" in runs_of(output)[1] and runs_of(output)[1]["rex"].data.metrics)
        tracking.end(task("rex"), "finished")


def test_processes_that_create_the_run_of_a_job_at_the_same_moment_agree_on_one(output):
    """As MlflowRun does it, with all of them past the search when the first one creates."""
    from mlflow import MlflowClient

    from controlbooth.trainer.tracking.mlflow_run import MlflowRun
    from controlbooth.trainer.tracking.spool import shared_state

    uri, folder = f"sqlite:///{output / 'mlflow.db'}", output / "pets"
    keys = {shared_state(folder, uri, "tests").key for _ in range(5)}
    assert len(keys) == 1
    client, ids = MlflowClient(uri), []
    ready = threading.Barrier(4)

    def connect():
        ready.wait()
        ids.append(MlflowRun(shared_state(folder, uri, "tests"), "pets", folder, False, None, folder).run_id)

    threads = [threading.Thread(target=connect) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert ids == [run.info.run_id] * 4


def test_a_dead_server_holds_no_step_up_and_what_it_missed_is_sent_when_it_is_back(output, monkeypatch):
    connect, waited = socket.socket.connect, []

    def connecting(one, address):
        waited.append(threading.current_thread())
        return connect(one, address)

    monkeypatch.setattr(socket.socket, "connect", connecting)
    first = start(output, uri="http://127.0.0.1:9")
    first.begin(task("rex"), 0)
    for step in range(1, 101):
        first.log("rex", step, {"train/instance_loss": 0.5})
    first._close(0.5)
    assert waited and threading.current_thread() not in waited  # only the thread that sends has asked the server
    assert not runs_of(output)[1]
    back = start(output, 2)
    with back.open({}):
        back.begin(task("rex"), 100)
        back.end(task("rex"), "finished")
    client, runs = runs_of(output)
    points = client.get_metric_history(runs["rex"].info.run_id, "train/instance_loss")
    assert [point.step for point in points] == list(range(1, 101))
    state = json.loads((output / "pets" / "subjects" / "rex" / "tracking.json").read_text())
    assert state["run_id"] == runs["rex"].info.run_id


def test_what_is_measured_afterwards_goes_to_the_run_that_the_training_logged_to(output):
    tracking = start(output)
    with tracking.open({}):
        tracking.begin(task("rex"), 0)
        tracking.end(task("rex"), "finished")
    config, folder = tracking._config, output / "pets"
    settings = (f"sqlite:///{output / 'mlflow.db'}", config.tracking.experiment)
    parent = Tracker(folder, *settings, "pets", {}, {}, NEVER, status=None, shared=folder, threads=False)
    child = Tracker(folder / "subjects" / "rex", *settings, "rex", {}, {}, NEVER, parent=parent, threads=False)
    child.log(10, {"evaluation/dino": 0.5})
    assert child.send_pending(at_once=True) and child.is_sent()
    assert runs_of(output)[1]["rex"].data.metrics == {"evaluation/dino": 0.5}


def test_a_job_that_one_task_has_ended_is_not_set_running_by_what_another_wrote_before(tmp_path):
    """Tasks send at their own pace, so what was written first may come last."""
    from mlflow import MlflowClient

    from controlbooth.trainer.tracking.mlflow_run import MlflowRun
    from controlbooth.trainer.tracking.spool import shared_state

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = MlflowRun(shared_state(tmp_path, uri, "tests"), "pets", tmp_path, False, None, tmp_path)

    def status() -> str:
        return MlflowClient(uri).get_run(run.run_id).info.status

    run.send([{"status": "FINISHED", "time": 20.0}])
    run.send([{"status": "RUNNING", "time": 10.0}])
    assert status() == "FINISHED"
    run.send([{"status": "RUNNING", "time": 30.0}])  # of a later start
    assert status() == "RUNNING"


def test_rounds_of_sending_come_less_often_the_more_they_cost_and_once_a_minute_at_least():
    assert [pause_seconds(spent) for spent in (0.0, 0.02, 0.1, 5.0)] == [5.0, 5.0, 20.0, 60.0]
