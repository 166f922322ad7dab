"""Against real SQLite stores, and an HTTP server in front of one that dies, hangs, and loses its answers.

The server speaks the REST protocol with the messages and the store of MLflow; only the dispatch is written here,
because the package with the real one is ten times as large as what a trainer needs.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.files.records import Damaged
from controlbooth.trainer.config.loading import build_config, dump
from controlbooth.trainer.tracking import tracker as tracking
from controlbooth.trainer.tracking.mlflow_run import EVALUATION, MlflowRun
from controlbooth.trainer.tracking.spool import STREAMS, Spool, read_metrics
from controlbooth.trainer.tracking.system import system_metrics
from controlbooth.trainer.tracking.tracker import Input, Tracker, flatten, table_json

NEVER = 3600.0


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """MLflow takes seconds to make its tables: once is enough."""
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(empty_store, tmp_path) -> str:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(tracking, "SEND_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "FIRST_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "LAST_RETRY_SECONDS", 0.2)


def start(folder: Path, uri: str, params=None, tags=None) -> Tracker:
    return Tracker(folder, uri, "tests", "a run", params or {"seed": 0}, tags or {}, system_metrics_seconds=NEVER)


def client_and_run(uri: str):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert len(runs) == 1
    return client, runs[0]


def history(uri: str, name: str) -> list[tuple[int, float]]:
    client, run = client_and_run(uri)
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# The file


def test_what_was_logged_is_in_the_file_on_return_and_reads_back_with_nan_and_infinity(tmp_path):
    tracker = start(tmp_path / "run", f"http://127.0.0.1:{closed_port()}")
    tracker.log(1, {"loss": 0.5, "norm": float("inf")})
    tracker.log(2, {"loss": float("nan")})
    (step, at, metrics), (_, _, last) = read_metrics(tmp_path / "run")
    assert (step, metrics) == (1, {"loss": 0.5, "norm": float("inf")}) and abs(time.time() - at) < 60
    assert last["loss"] != last["loss"]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    tracker.close(0)


def test_a_torn_last_line_is_dropped_and_the_next_line_is_whole(tmp_path):
    spool = Spool(tmp_path, "uri", "tests")
    spool.append({"step": 1, "metrics": {"loss": 1.0}})
    spool.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step":2,"metrics":{"lo')
    assert [step for step, _, _ in read_metrics(tmp_path)] == [1]
    spool = Spool(tmp_path, "uri", "tests")
    spool.append({"step": 2, "metrics": {"loss": 2.0}})
    assert [step for step, _, _ in read_metrics(tmp_path)] == [1, 2]
    spool.close()


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":1' + "0" * 200_000)
    Spool(tmp_path, "uri", "tests").close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_damaged_line_is_left_out_and_named(tmp_path, caplog):
    spool = Spool(tmp_path, "uri", "tests")
    spool.append({"step": 1, "metrics": {"loss": 1.0}})
    spool.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\0\0\0\0\n" + '{"step":3,"time":0,"metrics":{"loss":3.0}}\n')
    assert [step for step, _, _ in read_metrics(tmp_path)] == [1, 3]
    assert "It is left out" in caplog.text


@pytest.mark.parametrize("left", ["nothing", "its beginning", "another file", "an older copy that has grown"])
def test_lines_that_were_deleted_or_put_back_as_they_were_are_noticed_and_sent_from_the_begin(tmp_path, caplog, left):
    spool = Spool(tmp_path, "uri", "tests")
    for step in range(1, 6):
        spool.append({"step": step, "metrics": {"loss": float(step)}})
    records, generation = spool.read("metrics", 4)
    spool.acknowledge("metrics", records[-1][1], generation)
    spool.close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    changed = {
        "nothing": None,
        "its beginning": b"".join(lines[:2]),
        "another file": b"".join(line.replace(b"loss", b"less") for line in lines),
        "an older copy that has grown": b"".join([*lines[:2], *[line.replace(b"loss", b"rate") for line in lines[2:]]]),
    }[left]
    (tmp_path / "metrics.jsonl").unlink()
    if changed is not None:
        (tmp_path / "metrics.jsonl").write_bytes(changed)
    spool = Spool(tmp_path, "uri", "tests")
    assert "is not the file of which" in caplog.text and "is sent again" in caplog.text
    spool.append({"step": 6, "metrics": {"loss": 6.0}})
    there = len((changed or b"").splitlines())
    assert len(spool.read("metrics", 99)[0]) == there + 1
    spool.close()
    caplog.clear()
    Spool(tmp_path, "uri", "tests").close()
    assert not caplog.text  # it is told once


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_lines_that_are_taken_away_in_mid_run_are_put_back_with_those_before(tmp_path, caplog, how):
    (tmp_path / "start").mkdir()
    spool = Spool(tmp_path, "uri", "tests", made_in=tmp_path / "start")
    spool.append({"step": 1, "metrics": {"loss": 1.0}})
    (tmp_path / "metrics.jsonl").unlink()
    if how == "replaced":
        (tmp_path / "metrics.jsonl").write_text("")
    spool.append({"step": 2, "metrics": {"loss": 2.0}})
    assert [record["step"] for (record, _) in spool.read("metrics", 9)[0]] == [1, 2]
    spool.append({"step": 3, "metrics": {"loss": 3.0}})
    assert spool.unsent() == 3 and "It is put back, with all its lines" in caplog.text
    (tmp_path / "start").rmdir()  # a newer start has taken the run, and its lines stay
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_text("")
    assert spool.unsent() == 0 and (tmp_path / "metrics.jsonl").read_text() == ""
    spool.close()


def test_what_was_sent_is_known_again_whatever_is_cut_and_logged_in_between(tmp_path, caplog):
    for last in (3, 9, 4, 300):
        spool = Spool(tmp_path, "uri", "tests")
        spool.cut_back(last - 3)
        for step in range(last - 2, last + 1):
            spool.append({"step": step, "metrics": {f"loss {n}": 0.5 for n in range(50)}})
        for stream in STREAMS:
            records, generation = spool.read(stream, 2)
            if records:
                spool.acknowledge(stream, records[-1][1], generation)
        spool.close()
    assert not caplog.text


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_a_bit_of_what_was_sent_can_change_no_place_without_a_word(tmp_path_factory, number):
    folder = tmp_path_factory.mktemp("run")
    spool = Spool(folder, "uri", "tests")
    for step in range(3):
        spool.append({"step": step, "metrics": {"loss": 1.0}})
    records, generation = spool.read("metrics", 2)
    spool.acknowledge("metrics", records[-1][1], generation)
    spool.close()
    before = spool.state
    data = bytearray((folder / "tracking.json").read_bytes())
    data[number // 8 % len(data)] ^= 1 << number % 8
    (folder / "tracking.json").write_bytes(data)
    try:
        spool = Spool(folder, "uri", "tests")
    except Damaged as error:
        assert "tracking.json cannot be read" in str(error) and "Delete it to send all of metrics.jsonl" in str(error)
    else:
        assert spool.state == before
        spool.close()


def test_cutting_back_removes_later_steps_and_keeps_what_has_no_step(tmp_path):
    spool = Spool(tmp_path, "uri", "tests")
    for step in range(1, 6):
        spool.append({"step": step, "metrics": {"loss": float(step)}})
        spool.append({"system": {"cpu_percent": float(step)}})
    spool.cut_back(3)
    spool.append({"step": 4, "metrics": {"loss": 40.0}})
    assert [metrics["loss"] for _, _, metrics in read_metrics(tmp_path)] == [1, 2, 3, 40]
    assert (tmp_path / "metrics.jsonl").read_text().count("system") == 5
    spool.close()


def test_cutting_back_never_leaves_the_acknowledged_offset_ahead(tmp_path):
    spool = Spool(tmp_path, "uri", "tests")
    for step in range(1, 6):
        spool.append({"step": step, "metrics": {"loss": float(step)}})
    records, generation = spool.read("metrics", 4)
    spool.acknowledge("metrics", records[-1][1], generation)
    spool.cut_back(2)
    spool.acknowledge("metrics", records[-1][1], generation)  # a sender that was still at work
    spool.append({"step": 3, "metrics": {"loss": 30.0}})
    assert [record["step"] for record, _ in spool.read("metrics", 10)[0]] == [3]
    spool.close()


def test_an_unreadable_state_names_the_way_out(tmp_path):
    (tmp_path / "tracking.json").write_text("{")
    with pytest.raises(ValueError, match="Delete it to send all of metrics.jsonl again"):
        Spool(tmp_path, "uri", "tests")


def test_a_killed_process_loses_no_finished_call(tmp_path):
    program = """
import os, sys
from controlbooth.trainer.tracking.spool import Spool
from pathlib import Path
spool = Spool(Path(sys.argv[1]), "uri", "tests")
for step in range(1, 10**9):
    spool.append({"step": step, "metrics": {"loss": 1.0 / step}})
    os.write(1, b"%d\\n" % step)
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(200):
        process.stdout.readline()
    process.kill()
    said = 200 + process.stdout.read().count(b"\n")
    process.wait()
    steps = [step for step, _, _ in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= said


# SQLite


@pytest.mark.slow
def test_everything_that_is_logged_arrives_once(tmp_path, uri):
    from PIL import Image

    folder = tmp_path / "run"
    tracker = start(folder, uri, {"model": {"base": "x" * 900}, **{f"p{n}": n for n in range(250)}}, {"commit": "abc"})
    for step in range(1, 1201):  # more values than one call takes
        tracker.log(step, {"loss": 1 / step, "rate": float("nan")})
    tracker.log(1200, {"f1": 0.5})
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    (folder / "run.yaml").write_text("name: a")
    tracker.log_image(folder / "grid.png", "validation/grid", 1200)
    tracker.log_artifact(folder / "run.yaml")
    tracker.log_checkpoint(1200, "digest", "file:///run/checkpoint", {"f1": 0.5}, tracker.times(1200))
    tracker.finish("FINISHED")
    assert tracker.close(60) == 0

    client, run = client_and_run(uri)
    assert run.info.status == "FINISHED" and run.info.run_name == "a run" and run.data.tags["commit"] == "abc"
    assert len(run.data.params) == 251 and len(run.data.params["model.base"]) == 500
    assert history(uri, "train/loss") == [(step, 1 / step) for step in range(1, 1201)]
    assert history(uri, "train/f1") == [(1200, 0.5)]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"images", "run.yaml", "validation"}
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2  # the picture and its thumbnail
    (model,) = client.search_logged_models([run.info.experiment_id], "metrics.`train/f1` > 0.4")
    assert (model.tags["uri"], model.tags["step"], str(model.status)) == ("file:///run/checkpoint", "1200", "READY")
    assert [(output.model_id, output.step) for output in run.outputs.model_outputs] == [(model.model_id, 1200)]
    assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())


def test_metrics_are_grouped_in_mlflow_and_keep_their_names_in_the_file(tmp_path, uri):
    tracker = start(tmp_path / "run", uri)
    tracker.log(1, {"loss": 0.5, "validation/edge_f1": 0.4})
    tracker.log_checkpoint(1, "digest", "file:///there", {"loss": 0.5, "validation/edge_f1": 0.4}, tracker.times(1))
    tracker._spool.append({"system": {"cpu_percent": 50.0}})
    assert tracker.close(60) == 0
    client, run = client_and_run(uri)
    assert set(run.data.metrics) == {"train/loss", "validation/edge_f1", "system/cpu_percent"}
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert {metric.key for metric in model.metrics} == {"train/loss", "validation/edge_f1"}
    assert history(uri, "train/loss") == [(1, 0.5)]  # the model's point is the run's
    assert [metrics for _, _, metrics in read_metrics(tmp_path / "run")] == [{"loss": 0.5, "validation/edge_f1": 0.4}]


def test_the_newest_picture_of_a_series_has_a_name_that_stays(tmp_path, uri):
    from PIL import Image

    folder = tmp_path / "run"
    tracker = start(folder, uri)
    for step, shade in ((10, 1), (20, 2)):
        Image.new("L", (8, 8), shade).save(folder / f"{step}.png")
        tracker.log_image(folder / f"{step}.png", "samples", step)
    assert tracker.close(60) == 0
    client, run = client_and_run(uri)
    with Image.open(client.download_artifacts(run.info.run_id, "samples.png", str(tmp_path))) as picture:
        assert picture.getpixel((0, 0)) == 2
    assert len(client.list_artifacts(run.info.run_id, "images")) == 4  # the series: pictures and their thumbnails


def test_a_thumbnail_that_was_cut_off_is_sent_by_the_next_try(tmp_path, uri):
    from PIL import Image

    folder = tmp_path / "run"
    tracker = start(folder, uri)
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    tracker.log_image(folder / "grid.png", "samples", 1)
    assert tracker.close(60) == 0
    client, run = client_and_run(uri)
    before = {file.path for file in client.list_artifacts(run.info.run_id, "images")}
    (thumbnail,) = (tmp_path / "mlartifacts").rglob("*.webp")
    thumbnail.unlink()
    state = json.loads((folder / "tracking.json").read_text())
    del state["digest"], state["marks"]  # as versions before wrote it
    (folder / "tracking.json").write_text(json.dumps(state | {"acknowledged": {"metrics": 0, "artifacts": 0}}))
    assert start(folder, uri).close(60) == 0
    assert {file.path for file in client.list_artifacts(run.info.run_id, "images")} == before and len(before) == 2


def test_a_table_is_one_that_mlflow_itself_reads_and_shows(tmp_path, uri):
    folder = tmp_path / "run"
    tracker = start(folder, uri)
    for value in (0.5, 0.75):  # an evaluation again replaces the rows, where log_table would add some
        (folder / "figures.json").write_text(table_json(["figure", "mean"], [["edge F1", value], ["IoU", None]]))
        tracker.log_table(folder / "figures.json")
        wait_for(lambda: tracker._spool.unsent() == 0)
    assert tracker.close(60) == 0
    client, run = client_and_run(uri)
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "figures.json", "type": "table"}]
    file = client.download_artifacts(run.info.run_id, "figures.json", str(tmp_path))
    table = client._read_from_file(file)  # as load_table does, which takes its store from a global
    assert list(table["figure"]) == ["edge F1", "IoU"] and list(table["mean"])[0] == 0.75


def test_data_sets_are_inputs_of_the_run_once_however_often_it_is_started(tmp_path, uri):
    inputs = [
        Input("photos", "0123456789abcdef" * 4, "/data/photos", 8192, "training"),
        Input("held-out", "fedcba9876543210" * 2, "s3://bucket/held-out", 64, "held-out"),
    ]
    for _ in range(2):
        tracker = start(tmp_path / "run", uri)
        tracker.log_inputs(inputs)
        assert tracker.close(60) == 0
    _, run = client_and_run(uri)
    found = {one.dataset.name: one for one in run.inputs.dataset_inputs}
    assert len(run.inputs.dataset_inputs) == 2
    assert json.loads(found["photos"].dataset.profile) == {"fingerprint": "0123456789abcdef" * 4, "num_rows": 8192}
    assert json.loads(found["held-out"].dataset.source) == {"uri": "s3://bucket/held-out"}
    assert [one.dataset.source_type for one in (found["photos"], found["held-out"])] == ["local", "s3"]
    assert {tag.key: tag.value for tag in found["held-out"].tags} == {"mlflow.data.context": "held-out"}


def test_the_description_grows_by_parts_and_survives_a_restart(tmp_path, uri):
    tracker = start(tmp_path / "run", uri)
    tracker.describe(what="A run.", details="Of steps.", control="Not yet.")
    assert tracker.close(60) == 0
    tracker = start(tmp_path / "run", uri)
    tracker.describe(what="A run.", control="Control is there.")
    tracker.describe(evaluation="Measured.")
    lines = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    tracker.describe(what="A run.")  # nothing new
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == lines
    assert tracker.close(60) == 0
    _, run = client_and_run(uri)
    assert run.data.tags["mlflow.note.content"] == "A run.\n\nControl is there.\n\nMeasured.\n\nOf steps."


def test_who_starts_a_run_is_told_once_how_to_open_its_page(tmp_path, uri):
    told = []
    tracker = Tracker(tmp_path / "run", uri, "tests", "a run", {}, {}, NEVER, tell=told.append)
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    assert tracker.close(60) == 0
    _, run = client_and_run(uri)
    page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    assert told == [[f"mlflow ui --backend-store-uri {uri}", f"http://127.0.0.1:5000{page}"]]


def test_sending_everything_again_changes_nothing(tmp_path, uri):
    from PIL import Image

    folder = tmp_path / "run"
    tracker = start(folder, uri)
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    (folder / "table.json").write_text(table_json(["a"], [[1.0]]))
    tracker.log_table(folder / "table.json")
    tracker.log_inputs([Input("photos", "abc", "/data", 3, "training")])
    tracker.log(1, {"loss": 1.0})
    tracker.log_image(folder / "grid.png", "grid", 1)
    times = tracker.times(1)
    tracker.log(2, {"loss": 0.5})  # the checkpoint of step 1 is committed after it
    tracker.log_checkpoint(1, "digest", "file:///checkpoint", {"loss": 1.0}, times)
    assert tracker.close(60) == 0
    state = json.loads((folder / "tracking.json").read_text())
    del state["digest"], state["marks"]  # as versions before wrote it
    # as if the process had died after each answer and before it was noted, the creation of the run included
    state |= {"acknowledged": {"metrics": 0, "artifacts": 0}, "run_id": None}
    (folder / "tracking.json").write_text(json.dumps(state))
    assert start(folder, uri).close(60) == 0

    client, run = client_and_run(uri)
    assert history(uri, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2
    assert len(client.search_logged_models([run.info.experiment_id])) == 1
    assert len(run.outputs.model_outputs) == 1
    assert len(run.inputs.dataset_inputs) == 1 and len(json.loads(run.data.tags["mlflow.loggedArtifacts"])) == 1


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_with_each_step_once(tmp_path, uri):
    tracker = start(tmp_path / "run", uri)
    for step in range(1, 8):
        tracker.log(step, {"loss": float(step), "seconds": 0.1})
    assert tracker.close(60) == 0  # killed at step 7; the checkpoint is of step 5
    tracker = start(tmp_path / "run", uri)
    tracker.cut_back(5)
    for step in range(6, 11):
        tracker.log(step, {"loss": float(step), "seconds": 0.2})
    tracker.finish("FINISHED")
    assert tracker.close(60) == 0
    assert history(uri, "train/loss") == [(step, float(step)) for step in range(1, 11)]
    assert [step for step, _ in history(uri, "train/seconds")] == list(range(1, 11))
    assert [step for step, _, _ in read_metrics(tmp_path / "run")] == list(range(1, 11))


def test_changed_params_become_tags_and_repeated_steps_are_then_sent_again(tmp_path, uri):
    tracker = start(tmp_path / "run", uri, {"optimizer": {"learning_rate": 1e-5}, "seed": 1})
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 2.0})
    assert tracker.close(60) == 0
    tracker = start(tmp_path / "run", uri, {"optimizer": {"learning_rate": 2e-5}, "seed": 1})
    tracker.cut_back(1)
    tracker.log(2, {"loss": 20.0})
    assert tracker.close(60) == 0
    _, run = client_and_run(uri)
    assert run.data.params == {"optimizer.learning_rate": "1e-05", "seed": "1"}
    assert run.data.tags["changed.optimizer.learning_rate"] == "2e-05"
    assert history(uri, "train/loss") == [(1, 1.0), (2, 2.0), (2, 20.0)]


def test_a_param_that_was_renamed_is_no_changed_one(tmp_path, uri):
    tracker = start(tmp_path / "run", uri, {"data": {"columns": "latents"}})
    assert tracker.close(60) == 0
    tracker = start(tmp_path / "run", uri, {"data": {"latent_cache": "latents"}})
    assert tracker.close(60) == 0
    _, run = client_and_run(uri)
    assert run.data.params == {"data.columns": "latents"}
    assert not [name for name in run.data.tags if name.startswith("changed.")]
    tracker = start(tmp_path / "run", uri, {"data": {"latent_cache": "others"}})
    assert tracker.close(60) == 0
    _, run = client_and_run(uri)
    assert run.data.tags["changed.data.latent_cache"] == "others"


def test_evaluations_arrive_in_any_order_of_steps_and_again_and_none_twice(tmp_path, uri):
    name = f"{EVALUATION}with-control/edge_f1"
    for step, value in ((800, 0.8), (400, 0.4), (800, 0.81)):
        tracker = start(tmp_path / "run", uri)
        tracker.log(step, {name: value})
        assert tracker.close(20) == 0
    assert history(uri, name) == [(400, 0.4), (800, 0.8), (800, 0.81)]
    state = json.loads((tmp_path / "run" / "tracking.json").read_text())
    del state["digest"], state["marks"]  # as versions before wrote it
    state["acknowledged"] = {"metrics": 0, "artifacts": 0}  # as if no answer had come
    (tmp_path / "run" / "tracking.json").write_text(json.dumps(state))
    assert start(tmp_path / "run", uri).close(20) == 0
    assert history(uri, name) == [(400, 0.4), (800, 0.8), (800, 0.81)]


def test_an_evaluation_is_published_on_a_disk_without_locks_and_not_beside_a_training(
    tmp_path, uri, monkeypatch, capsys
):
    from controlbooth.trainer.evaluation.publish import (
        TABLE,
        publish,  # torch, which the others do without
    )

    run = tmp_path / "runs" / "edges"
    (run / "evaluation").mkdir(parents=True)
    tree = dict(
        name="edges", output=str(tmp_path / "runs"), max_steps=9, global_batch_size=1, micro_batch_size=1,
        model=dict(base="miniature"), data=dict(shards="s", condition="edges"),
        tracking=dict(uri=uri, experiment="tests"),
    )  # fmt: skip
    config = build_config(tree)
    (run / "config.yaml").write_text(dump(config))
    one = dict(mean=0.5, low=0.4, high=0.6)
    controlled = dict(edge_f1=one | dict(chance=dict(mean=0.1), share=dict(mean=0.8)), says_color=dict(mean=0.7))
    result = dict(
        figures={"without control": {"edge_f1": one}, "with control": controlled}, step=9, samples=4, resolution=64,
        sets={"FID": dict(values={"with control": 12.0})}, sampler=dict(scheduler="ddim", steps=2, guidance=1.0),
    )  # fmt: skip
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(result))
    with (run / ".lock").open("w") as training:
        fcntl.flock(training, fcntl.LOCK_EX)
        publish(run, config, result)
    assert "is training" in capsys.readouterr().out and not (run / "tracking.json").exists()

    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    publish(run, config, result)
    _, logged = client_and_run(uri)
    assert logged.data.metrics == {  # and no chart of a single point for each of the others
        "evaluation/edge_f1": 0.5, "evaluation/edge_f1_chance": 0.1, "evaluation/edge_f1_share": 0.8,
    }  # fmt: skip
    assert json.loads(logged.data.tags["mlflow.loggedArtifacts"]) == [{"path": TABLE, "type": "table"}]
    table = json.loads((run / "evaluation" / TABLE).read_text())
    assert table["data"][:2] == [
        ["edge_f1", "without control", 0.5, "", "", 0.4, 0.6],
        ["edge_f1", "with control", 0.5, 0.1, 0.8, 0.4, 0.6],
    ]
    assert table["data"][-1][:3] == ["FID", "with control", 12.0]
    said = "edge f1 0.500, chance 0.100: 80% of what is possible."
    assert said in logged.data.tags["mlflow.note.content"].splitlines()[0]  # which the page shows without being asked
    page = f"/#/experiments/{logged.info.experiment_id}/runs/{logged.info.run_id}"
    assert page in capsys.readouterr().out


def test_one_refused_record_does_not_hold_up_the_others_and_stays_in_the_file(tmp_path, uri, caplog):
    tracker = start(tmp_path / "run", uri)
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"a name with * in it": 1.0})
    tracker.log(3, {"loss": 3.0})
    tracker.log_artifact(tmp_path / "gone.png")
    assert tracker.close(60) == 0
    assert history(uri, "train/loss") == [(1, 1.0), (3, 3.0)]
    assert "MLflow refuses {'time'" in caplog.text and "gone.png" in caplog.text
    assert "a name with *" in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "error",
    [
        "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest",
        '(psycopg.errors.UniqueViolation) duplicate key value violates unique constraint "dataset_pk"',
        "(psycopg2.InterfaceError) connection already closed",
    ],
)
def test_a_data_set_that_another_run_adds_at_the_same_time_is_sent_again(tmp_path, uri, monkeypatch, error):
    """As MLflow's SQL store reports it: with the code of a bad request."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST

    calls, real = [], MlflowClient.log_inputs

    def clash_once(client, run_id, *rest, **named):
        calls.append(run_id)
        if len(calls) == 1:
            raise MlflowException(error, error_code=BAD_REQUEST)
        return real(client, run_id, *rest, **named)

    monkeypatch.setattr(MlflowClient, "log_inputs", clash_once)
    tracker = start(tmp_path / "run", uri)
    tracker.log_inputs([Input("scenes", "0" * 32, "/data/scenes", 60, "training")])
    assert tracker.close(60) == 0
    assert len(calls) == 2
    assert len(MlflowClient(uri).get_run(calls[0]).inputs.dataset_inputs) == 1


def test_a_deleted_run_loses_nothing_and_takes_all_when_it_is_restored(tmp_path, uri, caplog):
    tracker = start(tmp_path / "run", uri)
    tracker.log(1, {"loss": 1.0})
    assert tracker.close(60) == 0
    client, run = client_and_run(uri)
    client.delete_run(run.info.run_id)
    tracker = start(tmp_path / "run", uri)
    tracker.log(2, {"loss": 2.0})
    assert tracker.close(0.5) == 2  # with the line that it runs again
    assert "MLflow does not take metrics" in caplog.text
    client.restore_run(run.info.run_id)
    assert start(tmp_path / "run", uri).close(60) == 0
    assert history(uri, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_artifacts_that_cannot_be_stored_do_not_hold_back_metrics(tmp_path, uri):
    folder = tmp_path / "run"
    tracker = start(folder, uri)
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    (folder / "run.yaml").write_text("name: a")
    tracker.log_artifact(folder / "run.yaml")
    tracker.log(1, {"loss": 1.0})
    assert tracker.close(3) == 1
    assert history(uri, "train/loss") == [(1, 1.0)]
    (tmp_path / "mlartifacts").unlink()
    assert start(folder, uri).close(60) == 0
    client, run = client_and_run(uri)
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["run.yaml"]


def test_metrics_that_are_logged_while_a_long_row_of_artifacts_is_sent_wait_for_one_of_them(tmp_path, uri, monkeypatch):
    """After an outage artifacts take minutes: the curves go on, and a run that ends in them leaves nothing behind."""
    settings = dict(system_metrics_seconds=NEVER, threads=False)
    tracker = Tracker(tmp_path / "run", uri, "tests", "a run", {"seed": 0}, {}, **settings)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("a picture")
        tracker.log_artifact(tmp_path / f"{number}.txt")
    sent, send = [], MlflowRun.send

    def send_and_train_on(run, records):
        send(run, records)
        sent.extend(kind for record in records for kind in ("step", "artifact") if kind in record)
        if "artifact" in records[0]:
            tracker.log(len(sent), {"loss": 1.0})

    monkeypatch.setattr(MlflowRun, "send", send_and_train_on)
    assert tracker.send_pending(at_once=True) and tracker.is_sent()
    assert sent == 3 * ["artifact", "step"]
    assert [step for step, _ in history(uri, "train/loss")] == [1, 3, 5]


def test_another_store_gets_the_run_from_its_first_line(tmp_path, uri, empty_store):
    tracker = start(tmp_path / "run", uri, {"seed": 5})
    tracker.log(1, {"loss": 1.0})
    assert tracker.close(60) == 0
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(empty_store, other / "mlflow.db")
    assert start(tmp_path / "run", f"sqlite:///{other / 'mlflow.db'}", {"seed": 5}).close(60) == 0
    assert history(f"sqlite:///{other / 'mlflow.db'}", "train/loss") == [(1, 1.0)]
    assert client_and_run(f"sqlite:///{other / 'mlflow.db'}")[1].data.params == {"seed": "5"}


# A server


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """MLflow's REST calls that a tracker makes for metrics, answered from a SQLite store, with faults on demand."""

    def __init__(self, store_uri: str, port: int):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        self.store = SqlAlchemyStore(store_uri, "./unused")
        self.fault = ""  # "", "unavailable", "hang" or "lose the answer"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                query = {key: value[0] for key, value in parse_qs(urlsplit(self.path).query).items()}
                outer.answer(self, query)

            def do_POST(self):
                outer.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict) -> None:
        from mlflow.exceptions import MlflowException

        if self.fault == "hang":
            time.sleep(5)
            return
        if self.fault == "unavailable":
            return self.reply(handler, 503, "<html>no healthy upstream</html>")
        try:
            response = self.call(urlsplit(handler.path).path.partition("/mlflow/")[2], body)
        except MlflowException as error:
            return self.reply(handler, error.get_http_status_code(), error.serialize_as_json())
        if self.fault == "lose the answer":
            self.fault = ""
            handler.connection.close()
            return
        self.reply(handler, 200, response)

    def reply(self, handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(text.encode())

    def call(self, name: str, body: dict) -> str:
        from mlflow.entities import Metric, Param, RunStatus, RunTag
        from mlflow.protos import service_pb2 as messages
        from mlflow.utils.proto_json_utils import message_to_json, parse_dict

        def parsed(message):
            parse_dict(body, message)
            return message

        if name == "experiments/get-by-name":
            experiment = self.store.get_experiment_by_name(body["experiment_name"])
            if experiment is None:
                from mlflow.exceptions import MlflowException

                raise MlflowException("no such experiment", error_code=messages_code("RESOURCE_DOES_NOT_EXIST"))
            return message_to_json(messages.GetExperimentByName.Response(experiment=experiment.to_proto()))
        if name == "experiments/create":
            return json.dumps({"experiment_id": self.store.create_experiment(body["name"])})
        if name == "runs/search":
            runs = self.store.search_runs(body["experiment_ids"], body["filter"], 1, 1)
            return message_to_json(messages.SearchRuns.Response(runs=[run.to_proto() for run in runs]))
        if name == "runs/create":
            tags = [RunTag(tag["key"], tag["value"]) for tag in body["tags"]]
            run = self.store.create_run(body["experiment_id"], "", body["start_time"], tags, body["run_name"])
            return message_to_json(messages.CreateRun.Response(run=run.to_proto()))
        if name == "runs/get":
            return message_to_json(messages.GetRun.Response(run=self.store.get_run(body["run_id"]).to_proto()))
        if name == "runs/update":
            status = RunStatus.from_string(body["status"]) if isinstance(body["status"], str) else body["status"]
            info = self.store.update_run_info(body["run_id"], status, body.get("end_time"), None)
            return message_to_json(messages.UpdateRun.Response(run_info=info.to_proto()))
        if name == "runs/log-batch":
            batch = parsed(messages.LogBatch())
            self.store.log_batch(
                batch.run_id,
                [Metric.from_proto(metric) for metric in batch.metrics],
                [Param.from_proto(param) for param in batch.params],
                [RunTag.from_proto(tag) for tag in batch.tags],
            )
            return "{}"
        raise AssertionError(f"the tracker called {name}, which this server does not know")


def messages_code(name: str) -> int:
    from mlflow.protos.databricks_pb2 import ErrorCode

    return ErrorCode.Value(name)


def test_a_server_that_is_away_at_the_start_gets_everything_when_it_comes(tmp_path, uri):
    port = closed_port()
    tracker = start(tmp_path / "run", f"http://127.0.0.1:{port}")
    for step in range(1, 101):
        tracker.log(step, {"loss": float(step)})
    assert tracker._spool.unsent() == 102  # with the params and that it runs: nothing waited for anybody
    server = Server(uri, port)
    tracker.finish("FINISHED")
    assert tracker.close(60) == 0
    server.stop()
    assert history(uri, "train/loss") == [(step, float(step)) for step in range(1, 101)]
    assert client_and_run(uri)[1].info.status == "FINISHED"


def test_a_server_that_dies_and_comes_back_misses_nothing_and_has_nothing_twice(tmp_path, uri, caplog):
    server = Server(uri, 0)
    port = server.http.server_port
    tracker = start(tmp_path / "run", server.uri)
    tracker.log(1, {"loss": 1.0})
    wait_for(lambda: tracker._spool.unsent() == 0)
    server.stop()
    for step in range(2, 51):
        tracker.log(step, {"loss": float(step)})
    wait_for(lambda: "does not take metrics" in caplog.text)
    server = Server(uri, port)
    wait_for(lambda: tracker._spool.unsent() == 0)
    wait_for(lambda: "MLflow takes metrics again" in caplog.text)  # said a moment after the last line is sent
    for fault in ("lose the answer", "unavailable"):
        server.fault = fault
        tracker.log({"lose the answer": 51, "unavailable": 52}[fault], {"loss": 0.0})
        time.sleep(0.3)
        server.fault = ""
        wait_for(lambda: tracker._spool.unsent() == 0)
    assert tracker.close(60) == 0
    server.stop()
    assert [step for step, _ in history(uri, "train/loss")] == list(range(1, 53))


def test_a_server_that_hangs_or_never_comes_delays_close_no_longer_than_it_was_told(tmp_path, uri, caplog):
    server = Server(uri, 0)
    server.fault = "hang"
    tracker = start(tmp_path / "run", server.uri)
    for step in range(1, 101):
        tracker.log(step, {"loss": float(step)})  # the server has not answered yet, and never will
    left = tracker.close(0.5)
    assert left == 102  # and that it runs, and the params
    assert "102 lines of" in caplog.text and "are sent when the run is started again" in caplog.text
    server.fault = ""
    assert start(tmp_path / "run", server.uri).close(60) == 0
    server.stop()
    assert len(history(uri, "train/loss")) == 100


# The rest


def test_params_are_flattened_to_dotted_names_and_long_values_are_cut():
    flat = flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": "x" * 501})
    assert flat == {"a.b.c": "1", "a.d": "[1, 2]", "e": "None", "f": "x" * 499 + "…"}


def test_system_metrics_reach_the_file_with_the_gpus_that_nvidia_smi_names(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '0, 87, 20480'\necho '1, [N/A], [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    values = system_metrics(tmp_path)
    assert values["gpu_0_percent"] == 87 and values["gpu_0_memory_gib"] == 20 and "gpu_1_percent" not in values
    assert 0 <= values["cpu_percent"] <= 100 and values["process_memory_gib"] > 0.01 and values["disk_free_gib"] > 0

    port = closed_port()
    tracker = Tracker(tmp_path / "run", f"http://127.0.0.1:{port}", "tests", "a run", {}, {}, 0.01)
    wait_for(lambda: '"system"' in (tmp_path / "run" / "metrics.jsonl").read_text())
    tracker.close(0)


def test_importing_the_tracker_does_not_import_mlflow():
    program = "import sys, controlbooth.trainer.tracking.tracker; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
