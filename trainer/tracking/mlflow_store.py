"""A local MLflow store, one SQLite file, made whole or not at all. Stores on a server are not concerned.

MLflow makes the tables of a new store in dozens of steps, each committed. One that is killed between two of them leaves
a file that MLflow can neither use nor repair, and every later run that logs there would fail. So a store is made under
another name beside its place, and takes its name when it is whole.
"""

import contextlib
import glob
import logging
import sqlite3
import time
import uuid
from pathlib import Path
from urllib.parse import quote

from controlbooth.data.files.locks import open_lock, take_lock, take_name

logger = logging.getLogger(__name__)

STILL_SECONDS = 10.0
"""A half-made store that has not changed for so long was left by a process that is gone; a step takes less than one."""


def store_file(uri: str) -> Path | None:
    """Returns the file of a SQLite store, or None for a server or a store in memory."""
    name = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(name) if uri.startswith("sqlite:///") and name not in ("", ":memory:") else None


def make_store(uri: str) -> None:
    """Makes a local store unless it is there. To be called by whoever is about to open one; a server is left alone.

    Of several that do so at once, in any processes of one machine or of a shared disk, one makes it and the others wait
    for it. A store that was left half made, by an earlier version or by MLflow's own programs, holds nothing: it is put
    aside under another name. Raises OSError where the folder cannot be written, and what MLflow raises.
    """
    path = store_file(uri)
    if path is None or _is_made(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path.with_name(f".{path.name}.lock")) as lock:
        take_lock(lock, "let no two runs begin the MLflow store there at once", wait=True)
        while not _is_made(path):
            if path.exists() and abs(time.time() - path.stat().st_mtime) < STILL_SECONDS:
                time.sleep(0.5)  # MLflow's own programs, which know nothing of our lock, may be making it right now
                continue
            _make(path)


def _make(path: Path) -> None:
    """Makes the store, and puts one that is half made aside. To be called with the lock.

    Nothing is overwritten: a store that another program has made there meanwhile, without the lock, stays.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    beginning = f".{path.name}.making-"
    for left in path.parent.glob(f"{glob.escape(beginning)}*"):  # by one that was killed, with its journal
        left.unlink()
    # A new name for each try: SQLAlchemy keeps a connection to the file of one that has failed.
    made = path.with_name(f"{beginning}{uuid.uuid4().hex}")
    store = SqlAlchemyStore(f"sqlite:///{made}", (path.absolute().parent / "mlartifacts").as_uri())
    store.engine.dispose()
    if path.exists() and not _is_made(path):
        aside = path.with_name(f"{path.name}.half-made-{uuid.uuid4().hex[:8]}")
        path.rename(aside)
        logger.warning("%s was left half made, with nothing in it: it is now %s, and made anew", path, aside.name)
        journal = path.with_name(f"{path.name}-journal")
        if journal.exists():  # SQLite would apply it to the new one
            journal.rename(aside.with_name(f"{aside.name}-journal"))
    take_name(made, path)
    made.unlink()


FILLED_BY_MAKING = {"alembic_version", "workspaces"}
"""Tables in which a store that is half made can have rows."""


def _is_made(path: Path) -> bool:
    """Tells whether a store is complete and so holds something: MLflow ends the making with a first experiment.

    This is also true of a file in which any other table holds something, as that of another program, and of a file that
    SQLite cannot read: what is wrong with it is for MLflow to say.
    """
    if not path.exists():
        return False
    try:
        # Open for writing, so that what a killed writer left is rolled back, as at any opening.
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=20.0)) as store:
            tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            held = {name for name in tables - FILLED_BY_MAKING if not name.startswith("sqlite_")}
            return any(store.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in held)
    except sqlite3.DatabaseError:
        return True
