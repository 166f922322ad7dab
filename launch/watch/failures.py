"""What went wrong in a run, in a sentence, and what to do about it."""

import re
from dataclasses import dataclass
from typing import Any

from controlbooth.data.files.records import parse_json
from controlbooth.data.secrets import shown
from controlbooth.launch.job.outcome import ANEW, FAILURE, LOST_PEER
from controlbooth.launch.watch.files import Files

NOTE = re.compile(r"failed-\d+\.json")
OWN_KIND = re.compile(r"(?:[A-Z]\w*(?:Error|Failed|Lost|Hung|Stopped|Damaged|File)|Damaged): ")
"""How texts of errors begin whose message is a sentence for people."""
PLAIN = re.compile(r"(?:KeyError|TypeError|AttributeError|IndexError|AssertionError|RuntimeError|ValueError): ")
"""Kinds of errors that say nothing without their name."""
SENTENCE_END = re.compile(r"\.\s+(?=[A-Z`])")
LONGEST = 300
"""Characters of each of the two sentences."""
WITHOUT_REMEDY = "The end of its log tells more; started again, the run goes on from its latest checkpoint"


@dataclass(frozen=True)
class Failure:
    """One failure."""

    who: str
    """Such as `rank 3`; empty for the run as a whole."""
    what: str
    remedy: str
    when: float | None
    """In seconds since 1970."""
    is_cause: bool = True
    """Whether it is no consequence of another rank's failure."""


def sentences(error: str, without: str = WITHOUT_REMEDY) -> tuple[str, str]:
    """Splits the text of an error into what went wrong and what to do.

    Our messages say first the one and then the other, in sentences. without: the remedy where an error says nothing to
    do. Each is shortened to LONGEST characters.
    """
    text = " ".join(shown(error).split())
    if not PLAIN.match(text):
        text = OWN_KIND.sub("", text, count=1)
    end = SENTENCE_END.search(text)
    what, rest = (text[: end.start()], text[end.end() :]) if end else (text, "")
    return _shortened(what), _shortened(rest) or without


def _shortened(text: str) -> str:
    text = text.rstrip(".")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def failure(who: str, error: str, when: float | None) -> Failure:
    what, remedy = sentences(error)
    return Failure(who, what, remedy, when, error.partition(":")[0] not in LOST_PEER)


def rank_failures(files: Files, folder: str = "") -> list[Failure]:
    """Reads failed-RANK.json of a run's folder or of a task's below it, the causes first, and of these the first."""
    found = []
    for name in files.names(folder):
        if NOTE.fullmatch(name):
            note: dict[str, Any] | None = files.read(f"{folder}/{name}" if folder else name, _note)
            if note:
                found.append(failure(f"rank {note['rank']}", note["error"], note["time"]))
    return sorted(found, key=lambda one: (not one.is_cause, one.when or 0.0))


def _note(content: bytes, where: str) -> dict[str, Any]:
    return parse_json(content, where, ANEW, FAILURE)
