"""A local MLflow store is made whole or not at all, whoever is killed and however many make it at once."""

import contextlib
import logging
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from controlbooth.trainer.tracking.mlflow_store import make_store, store_file
from controlbooth.trainer.tracking.tracker import Tracker

MAKE = "import sys; from controlbooth.trainer.tracking.mlflow_store import make_store; make_store(sys.argv[1])"
RUN = """
import sys
from mlflow import MlflowClient
from controlbooth.trainer.tracking.mlflow_store import make_store
make_store(sys.argv[1])
client = MlflowClient(sys.argv[1])
client.create_run(client.get_experiment_by_name("Default").experiment_id, run_name=sys.argv[2])
"""


def start(uri, program=MAKE, *arguments):
    return subprocess.Popen([sys.executable, "-c", program, uri, *arguments], start_new_session=True)


def run_names(uri):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return {run.info.run_name for run in client.search_runs([one.experiment_id for one in client.search_experiments()])}


def half_make(path, age_seconds=3600.0):
    """What a killed MLflow leaves: some of its tables, and nothing in them."""
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        store.execute("CREATE TABLE registered_models (name VARCHAR(256))")
        store.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        store.execute("INSERT INTO alembic_version VALUES ('2b4d017a5e9b')")
        store.commit()
    os.utime(path, (time.time() - age_seconds,) * 2)


@pytest.mark.slow
def test_killed_while_it_is_made_it_is_not_there_and_the_next_start_makes_it(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = start(uri)
    while not any(path.stat().st_size for path in tmp_path.glob(".mlflow.db.making-*")):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    make_store(uri)
    assert run_names(uri) == set()
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


@pytest.mark.slow
def test_where_the_disk_was_full_the_same_process_makes_it_when_there_is_room(tmp_path):
    from sqlalchemy.exc import SQLAlchemyError

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SQLAlchemyError):
            make_store(uri)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "mlflow.db").exists()
    make_store(uri)
    assert run_names(uri) == set()


@pytest.mark.slow
def test_several_that_make_it_at_once_all_have_their_runs_in_it(tmp_path):
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    names = ["a", "b", "c"]
    processes = [start(uri, RUN, name) for name in names]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    assert run_names(uri) == set(names)


def test_a_store_that_was_left_half_made_is_replaced_and_a_run_is_tracked_there(tmp_path, caplog):
    path = tmp_path / "mlflow.db"
    half_make(path)
    path.with_name("mlflow.db-journal").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(tmp_path / "run", f"sqlite:///{path}", "tests", "a run", {"seed": 0}, {}, 3600.0)
        tracker.log(1, {"loss": 0.5})
        tracker.finish("FINISHED")
        assert tracker.close(timeout_seconds=300.0) == 0
    assert f"{path} was left half made, with nothing in it: it is now mlflow.db.half-made-" in caplog.text
    assert list(tmp_path.glob("mlflow.db.half-made-????????"))
    assert run_names(f"sqlite:///{path}") == {"a run"}


def test_the_database_of_another_program_is_never_replaced(tmp_path):
    path = tmp_path / "study.db"
    with contextlib.closing(sqlite3.connect(path)) as study:
        study.execute("CREATE TABLE studies (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT)")
        study.execute("INSERT INTO studies (name) VALUES ('a study')")
        study.commit()
    os.utime(path, (0, 0))
    make_store(f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as study:
        assert study.execute("SELECT name FROM studies").fetchall() == [("a study",)]


@pytest.mark.parametrize("table", ["experiments", "registered_models"])
def test_a_store_with_something_in_it_is_never_replaced(tmp_path, table):
    path = tmp_path / "mlflow.db"
    half_make(path)
    with contextlib.closing(sqlite3.connect(path)) as store:
        store.execute(f"INSERT INTO {table} VALUES (1)")
        store.commit()
    before = path.read_bytes()
    make_store(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_what_is_no_database_is_left_for_mlflow_to_name(tmp_path):
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"notes of a person, of more than one page\n" * 200)
    make_store(f"sqlite:///{path}")
    assert path.read_bytes().startswith(b"notes")


@pytest.mark.parametrize(
    "uri", ["http://server:5000", "postgresql://user@server/mlflow", "sqlite://", "sqlite:///:memory:", "databricks"]
)
def test_a_store_that_is_no_local_file_is_left_alone(uri):
    assert store_file(uri) is None
    make_store(uri)
