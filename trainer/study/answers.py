"""Answers of raters, each kept twice: in answers.sqlite, which decides, and as a line of answers.jsonl.

An answer is kept when both have it on the disk, and only then is a rater's page told so. Its id is made by the page, so
that a page which has not heard may send it again: it is stored once. A trial counts once for each rater, whatever else
is sent: what a rater answers anew must name the answer that it takes the place of, and both are kept; the last counts.
If one of the two files is lost or cut, the next start makes it whole from the other.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controlbooth.data.errors import UserError
from controlbooth.data.files.locks import open_lock, take_lock
from controlbooth.data.files.records import Damaged, each, is_count, is_number, is_text, parse_json

DATABASE, LINES, LOCK = "answers.sqlite", "answers.jsonl", ".serving"
STORED, AGAIN, KEPT = "stored", "again", "kept"
"""What became of an answer: it is new; it was here already; another one is here in its place, and stays."""
REMEDY = "Move it away: the next `study serve` or `study result` makes it anew from the other file of answers"

_TABLES = """
CREATE TABLE IF NOT EXISTS study (digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    rater TEXT NOT NULL,
    trial TEXT NOT NULL,
    revision INTEGER NOT NULL,
    replaces TEXT NOT NULL,
    pictures TEXT NOT NULL,
    ranks TEXT NOT NULL,
    seconds REAL NOT NULL,
    time REAL NOT NULL,
    UNIQUE (rater, trial, revision)
);
"""
_COLUMNS = ("id", "rater", "trial", "revision", "replaces", "pictures", "ranks", "seconds", "time")


@dataclass(frozen=True)
class Answer:
    """One answer of one rater to one trial."""

    id: str
    rater: str
    trial: str
    pictures: tuple[str, ...]
    """Opaque names, from left to right."""
    ranks: tuple[int, ...]
    """Of these pictures: 1 is the best, and equal numbers are ties."""
    seconds: float
    """Between the pictures' appearance and the answer, as the page has measured it."""
    replaces: str = ""
    """The id of the rater's answer to the trial that this one takes the place of; "" for the first."""
    revision: int = 1
    time: float = 0.0
    """In seconds since 1970, when it was stored."""


@dataclass(frozen=True)
class Outcome:
    """What became of an answer, and which one counts now."""

    what: str
    counts: Answer | None


class Answers:
    """The answers of a study, for one process that writes at a time. Its methods may be called from any thread."""

    def __init__(self, folder: Path, digest: str):
        """Opens the answers of a folder, made if there are none, and makes them whole.

        digest: of the plan. Raises UserError where the answers are of another plan, or somebody else has them open for
        writing, and Damaged where neither file can be used.
        """
        self._lock = threading.Lock()
        self._folder = folder
        self._held = open_lock(folder / LOCK)
        if not take_lock(self._held, "serve a study from one process only"):
            self._held.close()
            raise UserError(f"{folder} is served already: a second server would need answers of its own")
        try:
            self._database = _open(folder / DATABASE, digest)
            self._lines = open(folder / LINES, "a+b")
            self._restore()
        except BaseException:
            self._held.close()
            raise

    def add(self, answers: Sequence[Answer]) -> list[Outcome]:
        """Stores answers in one transaction, and returns when both files have them on the disk.

        -> what became of each. Raises OSError and sqlite3.Error, after which nothing is certain but what was certain
        before: the same answers may be given again.
        """
        with self._lock:
            with self._database:
                outcomes = [self._add(one) for one in answers]
            self._write_lines()
        return outcomes

    def _add(self, answer: Answer) -> Outcome:
        newest = self._newest(answer.rater, answer.trial)
        known = _one(self._database.execute("SELECT * FROM answers WHERE id = ?", (answer.id,)))
        if known is not None:
            same = (known.rater, known.trial, known.ranks) == (answer.rater, answer.trial, answer.ranks)
            return Outcome(AGAIN if same else KEPT, newest)
        if answer.replaces != (newest.id if newest else ""):
            return Outcome(KEPT, newest)
        revision = newest.revision + 1 if newest else 1
        stored = Answer(**asdict(answer) | {"revision": revision, "time": time.time()})
        self._insert(stored)
        return Outcome(STORED, stored)

    def _newest(self, rater: str, trial: str) -> Answer | None:
        question = "SELECT * FROM answers WHERE rater = ? AND trial = ? ORDER BY revision DESC LIMIT 1"
        return _one(self._database.execute(question, (rater, trial)))

    def _insert(self, answer: Answer) -> None:
        values = [json.dumps(value) if isinstance(value, tuple) else value for value in _values(answer)]
        holes = ", ".join("?" * len(_COLUMNS))
        self._database.execute(f"INSERT INTO answers ({', '.join(_COLUMNS)}) VALUES ({holes})", values)

    def of_rater(self, rater: str) -> dict[str, Answer]:
        """Returns what counts of a rater's answers, by trial."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM answers WHERE rater = ? ORDER BY revision", (rater,))
            return {answer.trial: answer for answer in map(_answer, rows)}

    def close(self) -> None:
        with self._lock:
            self._database.close()
            self._lines.close()
            self._held.close()

    def _restore(self) -> None:
        """Gives each file what only the other one has, and cuts off a last line that was not written to its end."""
        path = self._folder / LINES
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._lines.truncate(whole)
        ids = {row["id"] for row in self._database.execute("SELECT id FROM answers")}
        self._written = 0
        try:
            with self._database:
                for answer in _read_lines(path, content[:whole]):
                    self._written += 1
                    if answer.id not in ids:
                        self._insert(answer)
                        ids.add(answer.id)
        except sqlite3.IntegrityError as error:
            reason = f"line {self._written} answers what another answer of {DATABASE} answers"
            raise Damaged(path, reason, "Both are of one study's past: keep the file that you trust") from error
        if len(ids) != self._written:  # lines are missing: all are written anew, in the order of the database
            self._lines.truncate(0)
            self._written = 0
        self._size = os.fstat(self._lines.fileno()).st_size
        self._write_lines()

    def _write_lines(self) -> None:
        """Appends a line for each answer that has none yet; what a failure left of a line goes first."""
        self._lines.truncate(self._size)
        rows = self._database.execute("SELECT * FROM answers ORDER BY number LIMIT -1 OFFSET ?", (self._written,))
        lines = [json.dumps(asdict(_answer(row))).encode() + b"\n" for row in rows]
        if lines:
            self._lines.write(b"".join(lines))
            self._lines.flush()
            os.fsync(self._lines.fileno())
            self._written += len(lines)
            self._size += sum(map(len, lines))


def read_answers(folder: Path, digest: str) -> list[Answer]:
    """Reads all answers in the order in which they were stored, also while the study is served.

    digest: of the plan. Returns none where there are none yet. Raises UserError where they are of another plan.
    """
    path = folder / DATABASE
    if not path.exists():
        lines = folder / LINES
        content = lines.read_bytes() if lines.exists() else b""
        return list(_read_lines(lines, content[: content.rfind(b"\n") + 1]))
    database = _open(path, digest)
    try:
        return [_answer(row) for row in database.execute("SELECT * FROM answers ORDER BY number")]
    finally:
        database.close()


def counted(answers: Iterable[Answer]) -> list[Answer]:
    """Returns the answers that count: of each rater and trial the last revision."""
    last: dict[tuple[str, str], Answer] = {}
    for answer in sorted(answers, key=lambda one: one.revision):
        last[answer.rater, answer.trial] = answer
    return list(last.values())


def _open(path: Path, digest: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30.0, check_same_thread=False)
    try:
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA journal_mode = WAL")  # `study result` reads while answers come
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(_TABLES)
        with database:
            database.execute("INSERT INTO study SELECT ? WHERE NOT EXISTS (SELECT * FROM study)", (digest,))
        (of,) = database.execute("SELECT digest FROM study").fetchone()
    except sqlite3.DatabaseError as error:
        database.close()
        if isinstance(error, sqlite3.OperationalError):  # of the disk or of another process
            raise OSError(None, str(error), str(path)) from error
        raise Damaged(path, str(error), REMEDY) from error
    if of != digest:
        database.close()
        raise UserError(f"{path} holds answers to another plan: {of:.12}, and the plan beside it is {digest:.12}")
    return database


def _values(answer: Answer) -> list[Any]:
    return [getattr(answer, name) for name in _COLUMNS]


def _answer(row: sqlite3.Row) -> Answer:
    known: dict[str, Any] = {name: row[name] for name in _COLUMNS}
    for name in ("pictures", "ranks"):
        known[name] = tuple(json.loads(row[name]))
    return Answer(**known)


def _one(rows: sqlite3.Cursor) -> Answer | None:
    row = rows.fetchone()
    return None if row is None else _answer(row)


def _read_lines(path: Path, content: bytes) -> Iterable[Answer]:
    for place, line in enumerate(content.splitlines(), 1):
        tree = parse_json(line, f"{path}, line {place},", REMEDY, _LINE)
        known: dict[str, Any] = {name: tree[name] for name in _COLUMNS}
        known["pictures"], known["ranks"] = tuple(tree["pictures"]), tuple(tree["ranks"])
        yield Answer(**known)


_LINE = {
    **dict.fromkeys(("id", "rater", "trial"), is_text),
    "replaces": is_text,
    "pictures": each(is_text),
    "ranks": each(is_count),
    "revision": is_count,
    "seconds": is_number,
    "time": is_number,
}
