"""What people said of a run's pictures, as `controlbooth study result` leaves it in the run: RUN/studies/*.json."""

from pathlib import Path
from typing import Any

from controlbooth.data.files.records import (
    each,
    having,
    is_count,
    is_figure,
    is_mapping,
    is_text,
    is_whole,
    maybe,
    read_note,
    write_json,
)

FOLDER = "studies"
REMEDY = "`controlbooth study result` writes it anew"
_INTERVAL = having({name: maybe(is_figure) for name in ("mean", "low", "high")})
_AGAINST = {"method": is_text, "share": _INTERVAL, "answers": is_whole}
_QUESTION = having(
    {
        "rank": _INTERVAL,
        "points": _INTERVAL,
        "answers": is_whole,
        "raters": is_whole,
        "against": each(having(_AGAINST)),
    }
)
OPINION = {
    "study": is_text,
    "title": is_text,
    "digest": is_text,
    "method": is_text,
    "methods": is_count,
    "step": maybe(is_whole),
    "questions": lambda value: is_mapping(value) and all(map(_QUESTION, value.values())),
}
"""Fields of a file."""


def read_opinions(run: Path) -> list[dict[str, Any]]:
    """Reads what studies have said of a run, in the order of their files; a damaged one is told and left out."""
    found = (read_note(path, REMEDY, OPINION) for path in sorted((run / FOLDER).glob("*.json")))
    return [one for one in found if one]


def write_opinion(run: Path, opinion: dict[str, Any]) -> Path:
    """Writes what one study says of one of a run's methods, in the place of what it said before. Returns the file."""
    (run / FOLDER).mkdir(exist_ok=True)
    path = run / FOLDER / f"{opinion['digest'][:12]}-{opinion['method']}.json"
    write_json(path, opinion)
    return path


def between(ours: Path, theirs: Path) -> list[str]:
    """Says, a line for each question, which of two runs people preferred in the studies that compared both."""
    lines = []
    for one in read_opinions(ours):
        others = {other["method"] for other in read_opinions(theirs) if other["digest"] == one["digest"]}
        for question, figures in one["questions"].items():
            for against in figures["against"]:
                share = against["share"]
                if against["method"] in others - {one["method"]} and share["mean"] is not None:
                    lines.append(
                        f"people, {question}: {one['method']} preferred to {against['method']} in {share['mean']:.0%} "
                        f"({share['low']:.0%} to {share['high']:.0%}) of {against['answers']} answers, chance 50%"
                    )
    return lines
