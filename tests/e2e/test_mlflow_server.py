"""Tracking against a real MLflow server that is killed and started again."""

import json
import socket
import time

import mlflow_server
import pytest

from controlbooth.trainer.tracking import tracker as tracking
from controlbooth.trainer.tracking.spool import read_metrics
from controlbooth.trainer.tracking.tracker import Tracker


@pytest.mark.skipif(not mlflow_server.PROGRAM.exists(), reason="needs the extra `mlflow`, which has the server")
def test_a_server_killed_in_mid_run_holds_nothing_up_and_has_every_point_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "SEND_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "LAST_RETRY_SECONDS", 1.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri, run = f"http://127.0.0.1:{port}", tmp_path / "run"
    server = mlflow_server.start(tmp_path, port)
    tracker = Tracker(run, uri, "tests", "a run", {"seed": 0}, {}, system_metrics_seconds=3600.0)
    try:
        for step in range(1, 101):
            tracker.log(step, {"loss": 1.0 / step})
        end = time.monotonic() + 120
        while tracker._spool.unsent():
            assert time.monotonic() < end, "the first points did not arrive"
            time.sleep(0.1)
        mlflow_server.stop(server)
        for step in range(101, 601):
            tracker.log(step, {"loss": 1.0 / step})
        # All of it was taken although nobody is there to take it.
        assert [step for step, _, _ in read_metrics(run)] == list(range(1, 601)) and tracker._spool.unsent() >= 500
        server = mlflow_server.start(tmp_path, port)
        tracker.finish("FINISHED")
        assert tracker.close(timeout_seconds=120.0) == 0

        from mlflow import MlflowClient

        run_id = json.loads((run / "tracking.json").read_text())["run_id"]
        points = MlflowClient(uri).get_metric_history(run_id, "train/loss")
        assert sorted((point.step, point.value) for point in points) == [(n, 1.0 / n) for n in range(1, 601)]
        assert MlflowClient(uri).get_run(run_id).info.status == "FINISHED"
    finally:
        mlflow_server.stop(server)
