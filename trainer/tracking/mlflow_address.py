"""Addresses of MLflow: that none has a password in it, and where a reader opens a run.

A password in a URI would end up wherever the URI does: in config.yaml of the run and of its checkpoints, in job
scripts, in MLflow's own params, on consoles. So it is refused there, and comes to MLflow's client by the environment.
"""

import importlib.metadata
import os
import re
import shlex
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit

from controlbooth.data.files.records import is_text, maybe, read_note
from controlbooth.data.secrets import without_secrets
from controlbooth.trainer.config.run import Tracked, tracking_uri
from controlbooth.trainer.tracking.mlflow_store import store_file

STATE = "tracking.json"
"""In a run's folder: what of it has been sent where."""
DATABASES = ("postgresql", "mysql", "mssql")
SQLITE = b"SQLite format 3\0"
"""How such a file begins."""
UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` shows a store unless it is told otherwise."""


def unusable(uri: str) -> str | None:
    """Returns why MLflow can never keep anything at this address, and what may have been meant, or None where it can.

    Whether a server is up is not asked: what is logged waits for it in the run's folder.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator and uri not in ("databricks", "uc"):
        if re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d+(/.*)?", uri):
            return f"it has no http:// in front: write http://{uri}"
        if re.match(r"[a-z][\w+.-]*:(?!/)", uri) and not uri.startswith("sqlite"):
            return f"MLflow knows no {uri.partition(':')[0]}: here. Write http://HOST:5000 or sqlite:///FILE"
        return f"MLflow keeps nothing in folders any more: write sqlite:///{uri.strip('/') or 'mlruns'}/mlflow.db"
    dialect = scheme.partition("+")[0]
    if scheme in ("http", "https"):
        return _no_server(uri)
    if dialect == "sqlite":
        return _no_store_file(uri, rest)
    if scheme == "file":
        return f"MLflow keeps nothing in folders any more: write sqlite:///{rest}/mlflow.db"
    if dialect in DATABASES:
        return _no_database(uri)
    if uri.startswith("databricks") or scheme in _plugins():
        return None
    known = ["http", "https", "sqlite", *DATABASES, "databricks"]
    close = get_close_matches(dialect, known, n=1) or ["http"]
    meant = f"{close[0]}:///{rest.lstrip('/')}" if close[0] == "sqlite" else f"{close[0]}://{rest}"
    return f"MLflow knows no {scheme}://. Did you mean {meant}? It takes {', '.join(known)}"


def _no_server(uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"{error}: write http://HOST:5000"
    if not host or re.search(r"[\s\x00-\x1f]", uri):
        return "it names no host: write http://HOST:5000"
    return None


def _no_store_file(uri: str, rest: str) -> str | None:
    path = store_file(uri)
    if rest.partition("?")[0] in ("", "/", "/:memory:"):
        return "a store in memory is gone when the run ends: write sqlite:///FILE"
    if path is None:
        return f"SQLite has no host: write sqlite:///{rest} for a file from here, sqlite:////{rest} from the root"
    if path.is_dir():
        return f"{path} is a folder: write sqlite:///{path}/mlflow.db"
    existing = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if existing == path.absolute():
        if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
            return f"{path} is no file that can be written to. Name another one"
        with path.open("rb") as file:
            if file.read(len(SQLITE)) not in (b"", SQLITE):
                return f"{path} is no SQLite database. Name another file, which is made"
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is a file, and the store's folder would lie in it. Name another one"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable, and SQLite writes beside its file too. Name a file elsewhere"
    return None


def _no_database(uri: str) -> str | None:
    from sqlalchemy.engine import make_url  # seldom, and it takes a while
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        return f"{str(error).splitlines()[0]}: write {uri.partition('://')[0].partition('+')[0]}://USER@HOST/DATABASE"
    except ImportError as error:
        return f"{error}: install its driver here, or name an MLflow server, http://HOST:5000"
    return None


def _plugins() -> set[str]:
    """Returns the URI schemes that installed packages add to those of MLflow."""
    return {one.name for one in importlib.metadata.entry_points(group="mlflow.tracking_store")}


def run_page(experiment_id: str, run_id: str) -> str:
    """Returns the path of a run's page, which is the same on any server."""
    return f"/#/experiments/{experiment_id}/runs/{run_id}"


def how_to_open(uri: str, experiment_id: str, run_id: str, mlflow: str = "mlflow") -> list[str]:
    """Returns, for a reader, the address of a run's page; for a local store, first the command that serves that page.

    mlflow: how the program is called from here.
    """
    page = run_page(experiment_id, run_id)
    if uri.startswith(("http://", "https://")):
        return [uri.rstrip("/") + page]
    return [how_to_serve(uri, mlflow), UI + page]


def how_to_open_saved(run_folder: Path, mlflow: str = "mlflow") -> list[str]:
    """Returns, like `how_to_open`, how a reader opens the run of a folder.

    The list is empty as long as MLflow has not got the run, or where nothing was tracked.
    """
    fields = {"uri": is_text, "experiment_id": maybe(is_text), "run_id": maybe(is_text)}
    state = read_note(run_folder / STATE, "Delete it to send all of metrics.jsonl again, into a new MLflow run", fields)
    if not state.get("run_id") or not state.get("experiment_id"):  # which runs begun before have not written
        return []
    return how_to_open(without_secrets(state["uri"]), state["experiment_id"], state["run_id"], mlflow)


def how_to_serve(uri: str, mlflow: str = "mlflow") -> str:
    """Returns the command that shows a local store or a database in a browser."""
    store = store_file(uri)
    location = uri if store is None else f"sqlite:///{store.absolute()}"
    return f"{mlflow} ui --backend-store-uri {shlex.quote(location)}"


def tracking_problems(config: Tracked) -> Iterator[str]:
    """Yields why MLflow could never keep anything at the run's address; a server that is down now is waited for."""
    uri = tracking_uri(config)
    if config.tracking.uri is not None and (why := unusable(uri)):
        yield f"tracking.uri is {uri!r}, where MLflow can keep nothing: {why}"
