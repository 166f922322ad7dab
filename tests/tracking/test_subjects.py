"""Runs of subjects on the same services: a run for the job, one below it for each subject, and a server that dies."""

import time

import pytest
import studios
from points import Count, count, run_id

pytestmark = pytest.mark.tracking


def test_each_subject_has_every_point_once_below_the_run_of_the_job(world, stack, client, tell):
    tracking = dict(uri=stack.uri, experiment="subjects", system_metrics_seconds=1.0)
    looks = dict(every_steps=10, prompts=["a {identifier} {class_noun}"], pictures=1, sampling_steps=1)
    path = studios.run_file(world, "pets", steps=40, tracking=tracking, validation=looks)
    run = world / "runs" / "pets"
    process = studios.start(world, path, MLFLOW_HTTP_REQUEST_TIMEOUT="30")
    end = time.monotonic() + 300
    while not any(run.glob("subjects/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    stack.kill("mlflow")
    stack.start_server()
    studios.finish(process)
    folders = [run / "subjects" / name for name in studios.NAMES]
    counted = sum((count(client, folder) for folder in folders), Count(0, 0, 0))
    tell(f"{len(folders)} subjects: {counted}")
    assert counted.sent > 400 and (counted.lost, counted.twice) == (0, 0)
    experiment = client.get_experiment_by_name("subjects").experiment_id
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id(run)}'")
    assert sorted(one.info.run_id for one in below) == sorted(map(run_id, folders))
    assert all(one.info.status == "FINISHED" for one in below)
    for one in below:
        pictures = [file.path for file in client.list_artifacts(one.info.run_id, "images")]
        assert len([path for path in pictures if path.endswith(".png")]) == 5  # of steps 0, 10, 20, 30 and 40
