"""Reads what runs note of bad samples: bad-samples-RANK.jsonl. Free of numpy, for pages that only show it."""

from pathlib import Path

from controlbooth.data.errors import UserError
from controlbooth.data.files.records import Damaged, check_fields, is_text, is_whole, maybe, open_file, parse_json

LEDGER = "bad-samples-*.jsonl"
_FIELDS = {
    **dict.fromkeys(("position", "attempt", "byte"), is_whole),
    **dict.fromkeys(("shard", "key", "part", "error"), is_text),
    **{"contents": maybe(is_text), "substitute_shard": maybe(is_text), "substitute_byte": maybe(is_whole)},
}
_SINCE_CONTENTS = ("contents", "substitute_shard", "substitute_byte")
"""Fields that ledgers of earlier versions lack; they are read as None there."""


def read_ledgers(run: Path) -> list[dict]:
    """Reads the entries of a run's ledgers, each event once, by position.

    A run that goes on from a checkpoint meets the bad samples since then again, perhaps on another rank, and notes them
    again; and a process that is killed may leave an incomplete line, to which its next entry is then appended. Raises
    ValueError for a line that never was an entry.
    """
    events: dict[tuple[int, int], dict] = {}
    for path in sorted(run.glob(LEDGER)):
        with open_file(path, "Move it away") as file:
            lines = file.read().decode(errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            if (entry := parse_entry(line, f"{path}, line {number}")) is not None:
                events.setdefault((entry["position"], entry["attempt"]), entry)
    return [events[event] for event in sorted(events)]


def parse_entry(line: str, where: str) -> dict | None:
    """Reads one line of a ledger; returns None for the beginning of an entry that was never completed.

    where: what the message calls it. Raises ValueError for a line that never was an entry.
    """
    try:
        entry = parse_json(line[max(line.rfind('{"position"'), 0) :], where, "Remove it")
    except Damaged:
        if not line.startswith("{"):
            raise UserError(f"{where} is no ledger entry: {line[:80]!r}. Remove it") from None
        return None
    if missing := [name for name in _FIELDS if name not in (*entry, *_SINCE_CONTENTS)]:
        raise UserError(f"{where} is no ledger entry, as it has no {', '.join(missing)}. Remove it")
    check_fields(entry, _FIELDS, where, "Remove it")
    return dict.fromkeys(_SINCE_CONTENTS) | entry
