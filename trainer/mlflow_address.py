"""Addresses of MLflow: that none has a password in it, and where a reader opens a run.

A password in a URI would end up wherever the URI does: in config.yaml of the run and of its checkpoints, in job
scripts, in MLflow's own params, on consoles. So it is refused there, and comes to MLflow's client by the environment.
"""

import json
import shlex
from pathlib import Path

from controlbooth.data.secrets import without_secrets
from controlbooth.trainer.mlflow_store import store_file

STATE = "tracking.json"
"""In a run's folder: what of it has been sent where."""
UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` shows a store unless it is told otherwise."""
FOR_SERVERS = "give them to MLflow in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
FOR_DATABASES = "give the password to the database's client, for PostgreSQL in PGPASSWORD or ~/.pgpass"


def refuse_secrets(uri: str) -> None:
    """Raises ValueError, which does not show it, for a URI with a password in it."""
    clean = without_secrets(uri)
    if clean != uri:
        remedy = FOR_SERVERS if clean.startswith("http") else FOR_DATABASES
        raise ValueError(
            f"a user or a password was given in it, not shown here, which would be kept in the run's files. "
            f"Write {clean}, and {remedy}"
        )


def run_page(experiment_id: str, run_id: str) -> str:
    """The path of a run's page on any server."""
    return f"/#/experiments/{experiment_id}/runs/{run_id}"


def how_to_open(uri: str, experiment_id: str, run_id: str, mlflow: str = "mlflow") -> list[str]:
    """For a reader: the address of the run's page; of a local store, before it, the command that serves that page.

    mlflow: how the program is called from here.
    """
    page = run_page(experiment_id, run_id)
    if uri.startswith(("http://", "https://")):
        return [uri.rstrip("/") + page]
    return [how_to_serve(uri, mlflow), UI + page]


def how_to_open_saved(run_folder: Path, mlflow: str = "mlflow") -> list[str]:
    """As `how_to_open`, of the run in a folder; empty as long as MLflow has not got it, or nothing was tracked."""
    path = run_folder / STATE
    state = json.loads(path.read_text()) if path.is_file() else {}
    if not state.get("run_id") or not state.get("experiment_id"):  # which runs begun before have not written
        return []
    return how_to_open(without_secrets(state["uri"]), state["experiment_id"], state["run_id"], mlflow)


def how_to_serve(uri: str, mlflow: str = "mlflow") -> str:
    """The command that shows a local store or a database to a browser."""
    store = store_file(uri)
    location = uri if store is None else f"sqlite:///{store.absolute()}"
    return f"{mlflow} ui --backend-store-uri {shlex.quote(location)}"
