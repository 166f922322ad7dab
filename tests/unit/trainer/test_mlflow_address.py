"""No password of a tracking URI is kept or shown, and a run's page is found."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.trainer.config.loading import build_config, changes, dump, load_config
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.tracking.mlflow_address import how_to_open, how_to_open_saved, without_secrets
from controlbooth.trainer.tracking.spool import Spool
from controlbooth.trainer.tracking.tracker import Tracker

SECRET = "pa55-w0rd"
TREE = dict(
    name="edges", max_steps=9, global_batch_size=1, micro_batch_size=1,
    model=dict(base="miniature"), data=dict(shards="s", condition="edges"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "clean"),
    [
        (f"http://me:{SECRET}@host:5000/x", "http://host:5000/x"),
        (f"https://{SECRET}@host", "https://host"),
        (f"http://me:{SECRET}/with/@slashes@[::1]:80/x", "http://[::1]:80/x"),
        (f"http://me:{SECRET}#@host/x", "http://host/x"),
        (f"postgresql+psycopg://me:{SECRET}@host:5432/db", "postgresql+psycopg://me@host:5432/db"),
        (f"postgresql://host/db?user=me&password={SECRET}", "postgresql://host/db?user=me"),
    ],
)
def test_secrets_are_taken_out_and_refused_without_being_shown(uri, clean, tmp_path):
    assert without_secrets(uri) == clean and without_secrets(clean) == clean
    with pytest.raises(ConfigError, match="a user or a password was given in it") as refused:
        build_config(TREE | dict(tracking=dict(uri=uri)))
    assert SECRET not in str(refused.value) and clean in str(refused.value)
    with pytest.raises(ValueError) as refused:
        Tracker(tmp_path / "run", uri, "tests", "a run", {}, {}, 3600.0)
    assert SECRET not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000", "https://host/a@b", "http://[::1]:5000/a@b", "postgresql://me@host/db", "databricks",
        "databricks://profile", "sqlite:////data/me:you@home/mlflow.db", "mysql://host/db?charset=utf8", "runs/a@b",
    ],
)  # fmt: skip
def test_uris_without_secrets_are_left_as_they_are(uri):
    assert without_secrets(uri) == uri


@given(st.text(st.characters(codec="ascii", exclude_categories=["C"], exclude_characters="/"), min_size=8))
def test_whatever_a_password_has_in_it_nothing_of_it_is_left(password):
    clean = without_secrets(f"http://me:{password}@host:5000/path")
    assert clean == "http://host:5000/path"


def test_a_run_begun_before_with_a_password_goes_on_without_it(tmp_path):
    text = dump(build_config(TREE)).replace("uri: null", f"uri: http://me:{SECRET}@host:5000")
    assert SECRET in text
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(tmp_path / "config.yaml")
    assert config.tracking.uri == "http://host:5000"
    assert SECRET not in str(changes(text, dump(build_config(TREE))))
    (tmp_path / "run.yaml").write_text(text)  # a file of a person's
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        load_config(tmp_path / "run.yaml")

    Spool(tmp_path, f"http://me:{SECRET}@host:5000", "tests").close()
    state = json.loads((tmp_path / "tracking.json").read_text())
    del state["digest"]  # which versions before did not write
    (tmp_path / "tracking.json").write_text(json.dumps(state | dict(run_id="its-run")))
    spool = Spool(tmp_path, "http://host:5000", "tests")
    assert spool.state.run_id == "its-run"  # and not sent once more, as to another server
    assert SECRET not in (tmp_path / "tracking.json").read_text()
    spool.close()


def test_a_users_name_and_password_reach_the_server_from_the_environment(tmp_path, monkeypatch):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Authorization"))
            self.send_response(503)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    tracker = Tracker(tmp_path, f"http://127.0.0.1:{server.server_port}", "tests", "a run", {}, {}, 3600.0)
    end = time.monotonic() + 60
    while not asked and time.monotonic() < end:  # importing MLflow takes seconds
        time.sleep(0.02)
    tracker.close(0)
    server.shutdown()
    assert asked[0] == "Basic bWU6cGE1NS13MHJk"
    assert not any(SECRET in path.read_text() for path in tmp_path.iterdir())


def test_a_server_has_the_runs_page_and_a_store_the_command_that_serves_it(tmp_path, monkeypatch):
    page = "/#/experiments/3/runs/abc"
    assert how_to_open("http://host:5000/", "3", "abc") == [f"http://host:5000{page}"]
    monkeypatch.chdir(tmp_path)
    command, address = how_to_open("sqlite:///my runs/mlflow.db", "3", "abc", ".venv/bin/mlflow")
    assert command == f".venv/bin/mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/my runs/mlflow.db'"
    assert address == f"http://127.0.0.1:5000{page}"
    assert how_to_open_saved(tmp_path) == []
    spool = Spool(tmp_path, "http://host:5000", "tests")
    assert how_to_open_saved(tmp_path) == []
    spool.update(experiment_id="3", run_id="abc")
    assert how_to_open_saved(tmp_path) == [f"http://host:5000{page}"]
    spool.close()
