"""Runs against what deploy/compose.yaml describes: nothing is lost and nothing is twice, whatever dies meanwhile."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import trainings
import writers
from browser import browser, click, furnish, open_page, settle, text, why_no_browser
from points import Count, count, run_id

from controlbooth.deploy.retrain import registry
from controlbooth.deploy.retrain.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry
from controlbooth.trainer.run.checkpoint import complete_checkpoints, read_state
from controlbooth.trainer.tracking.mlflow_address import how_to_open_saved

pytestmark = pytest.mark.tracking

AWAY_SECONDS = 5.0
WRITERS, PROCESSES, STEPS, WRITING_SECONDS = 100, 2, 60, 40.0


def outage(stack, name: str, start) -> float:
    """Kills a service, and starts it again after a while; -> seconds until it answered again."""
    began = time.monotonic()
    stack.kill(name)
    time.sleep(AWAY_SECONDS)
    start()
    return time.monotonic() - began


@pytest.fixture(scope="module")
def trained(world, stack, tell) -> Path:
    """A ControlNet run in which the database is killed and back, then the server; measured afterwards."""
    checks = dict(every_steps=30, samples=4, grid=2, sampling_steps=2, guidance_scale=1.0, at_start=True)
    path = trainings.run_file(
        world, "edges", max_steps=150, validation=checks, checkpoint=dict(every_steps=30, keep=10),
        tracking=dict(uri=stack.uri, experiment="edges", system_metrics_seconds=1.0),
    )  # fmt: skip
    run = world / "runs" / "edges"
    process = trainings.start(path, 1, MLFLOW_HTTP_REQUEST_TIMEOUT="30")
    trainings.wait_for_step(run, 10)
    database = outage(stack, "postgres", stack.start_database)
    trainings.wait_for_step(run, 60)
    assert process.poll() is None
    server = outage(stack, "mlflow", stack.start_server)
    output = trainings.finish(process)
    assert f"MLflow: {how_to_open_saved(run)[0]}" in output
    command = ["-m", "controlbooth.launch.cli", "evaluate", str(run), "--samples", "4"]
    measured = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert measured.returncode == 0, measured.stderr[-3000:]
    assert how_to_open_saved(run)[0] in measured.stdout
    tell(f"ControlNet run: server away for {server:.0f} s, database for {database:.0f} s")
    return run


def test_a_run_has_every_point_once_although_server_and_database_died_meanwhile(trained, client, tell):
    found = count(client, trained)
    tell(f"ControlNet run: {found}")
    assert found.sent > 1500 and (found.lost, found.twice) == (0, 0)
    assert client.get_run(run_id(trained)).info.status == "FINISHED"


def test_its_pictures_models_and_data_sets_have_come_through_the_proxy(trained, client, tmp_path):
    run = client.get_run(run_id(trained))
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    steps = [f"samples+step+{step}+" for step in range(0, 151, 30)]
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(images) == len(steps) and all(any(step in path for path in images) for step in steps)
    newest = client.download_artifacts(run.info.run_id, "samples.png", str(tmp_path))
    assert Path(newest).stat().st_size > 1000
    table = json.loads(
        Path(client.download_artifacts(run.info.run_id, "evaluation-table.json", str(tmp_path))).read_text()
    )
    assert ["edge_f1", "with control"] in [row[:2] for row in table["data"]]

    models = client.search_logged_models([run.info.experiment_id])
    digests = [read_state(one)["digest"] for one in complete_checkpoints(trained)]
    assert sorted(model.tags["digest"] for model in models) == sorted(digests) and len(digests) == 5
    assert all(str(model.status) == "READY" for model in models)
    inputs = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    assert {context: json.loads(one.profile)["num_rows"] for context, one in inputs.items()} == {
        "training": 60, "held-out": 8
    }  # fmt: skip
    assert run.data.tags["mlflow.note.content"].startswith("ControlNet for **edges**")
    (found,) = client.search_runs([run.info.experiment_id], "tags.condition = 'edges' and tags.task = 'controlnet'")
    assert found.info.run_id == run.info.run_id


def test_a_champion_is_promoted_and_taken_back_in_its_registry(trained, stack, tmp_path):
    there = Registry(stack.uri, "edges")
    registry.claim(there, tmp_path / "state")
    for place, checkpoint in enumerate(complete_checkpoints(trained)[:2]):
        version = registry.register(there, run_id(trained), read_state(checkpoint)["digest"], {"round": str(place)})
        assert version is not None and version.checkpoint == checkpoint
        registry.promote(there, version.number, version.number - 1 or None)
    assert {alias: one.number for alias, one in registry.aliases(there).items()} == {
        CHAMPION: 2, CHALLENGER: 2, PREVIOUS: 1
    }  # fmt: skip
    assert registry.rollback(there)[1].number == 1
    assert registry.aliases(there)[CHAMPION].number == 1


def test_a_hundred_runs_that_write_at_once_lose_nothing(stack, client, tmp_path, tell):
    share = WRITERS // PROCESSES
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, writers.__file__, stack.uri, str(tmp_path), *map(str, (n * share, share, STEPS)),
             str(WRITING_SECONDS)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30"},
        )
        for n in range(PROCESSES)
    ]  # fmt: skip
    time.sleep(WRITING_SECONDS / 4)
    server = outage(stack, "mlflow", stack.start_server)
    database = outage(stack, "postgres", stack.start_database)
    left = [int(process.communicate(timeout=420)[0]) for process in processes]
    seconds = time.monotonic() - began
    folders = [tmp_path / writers.run_name(number) for number in range(WRITERS)]
    runs = client.search_runs([client.get_experiment_by_name("writers").experiment_id], max_results=1000)
    counted = sum((count(client, folder) for folder in folders), Count(0, 0, 0))
    tell(
        f"{WRITERS} runs at once: {counted}; {seconds:.0f} s, server away for {server:.0f} s, database {database:.0f} s"
    )
    assert left == [0] * PROCESSES
    assert sorted(run.info.run_id for run in runs) == sorted(map(run_id, folders))
    assert counted == Count(WRITERS * STEPS * len(writers.METRICS), 0, 0)
    ended = Counter((run.info.status, len(run.inputs.dataset_inputs)) for run in runs)
    assert ended == {("FINISHED", 1): WRITERS}  # each has one data set
    with_files = [run for run in runs if int(run.data.params["number"]) % writers.FILES_EVERY == 0]
    assert len(with_files) == WRITERS / writers.FILES_EVERY
    for run in with_files:
        assert len(run.outputs.model_outputs) == 1
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert names == {"images", "samples.png", "table.json"}
        assert len(client.list_artifacts(run.info.run_id, "images")) == 2


def test_nobody_is_told_the_password_of_the_database(trained, stack, client):
    """The server alone has it, in its environment."""
    import psutil

    for path in trained.rglob("*"):
        assert not path.is_file() or stack.password.encode() not in path.read_bytes(), path
    for log in stack.folder.glob("*.log"):
        assert stack.password not in log.read_text(), log
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not any(stack.password in command for command in commands)


@pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))
def test_a_reader_finds_description_data_groups_and_table_on_the_printed_page(trained, stack):
    (page,) = how_to_open_saved(trained)
    with browser() as driver:
        furnish(driver, stack.uri)
        open_page(driver, page, "ControlNet for edges on base", "Evaluation of step 150")
        shown = text(driver)
        for words in ("train/loss", "validation/edge_f1", "evaluation/edge_f1", "/train (", "controlbooth.trainer"):
            assert words in shown, words
        click(driver, "Show more")
        assert "samples.png" in settle(driver)
        groups = open_page(driver, f"{page}/model-metrics", "Add section").splitlines()
        assert {"train", "validation", "evaluation"} <= set(groups)
        rows = open_page(driver, f"{page}/artifacts/evaluation-table.json", "real pictures")
        assert "View as table" in rows and "share" in rows
