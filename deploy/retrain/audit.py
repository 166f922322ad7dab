"""Everything that a policy decided, and why: one JSON line each in audit.jsonl, only ever appended.

{"time": ..., "lease": 12, "round": 3, "decision": "refused", "reason": "...", ...}     time in seconds since 1970
"""

import contextlib
import datetime
import json
import os
import textwrap
import time
from pathlib import Path
from typing import Any

from controlbooth.data.files.records import Damaged, Fields, is_moment, is_text, is_whole, maybe, open_file, parse_json

NAME = "audit.jsonl"
WIDTH = 100
ENTRY: Fields = {"time": is_moment, "round": maybe(is_whole), "decision": is_text, "reason": is_text}


def append(folder: Path, lease: int, number: int | None, decision: str, reason: str, **facts: Any) -> None:
    """Appends a decision to the audit log, in one system call; it is on the disk on return.

    A decision with the round, name and reason of the log's last line is not written again, so that ticks that find
    nothing to do add one line in all and not one each.
    """
    entry = dict(time=time.time(), lease=lease, round=number, decision=decision, reason=reason) | facts
    before = read(folder)
    if before and all(before[-1].get(key) == entry[key] for key in ("round", "decision", "reason")):
        return
    file = os.open(folder / NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, (torn * "\n" + json.dumps(entry) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(folder: Path) -> list[dict[str, Any]]:
    """Reads all entries, oldest first. A line that a full disk cut off, or that is damaged, is left out."""
    try:
        with open_file(folder / NAME, "Move it away: the log then begins anew") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(Damaged):  # it is not decided before it is written, so nothing that holds is lost
            entries.append(parse_json(line, NAME, "", ENTRY))
    return entries


def describe(entries: list[dict[str, Any]]) -> str:
    """Formats entries for people: one paragraph for each decision, with times in the time zone of this machine."""
    lines = []
    for entry in entries:
        when = datetime.datetime.fromtimestamp(entry["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        which = "" if entry.get("round") is None else f"round {entry['round']}"
        lines.append(f"{when}  {which:<9} {entry['decision']}")
        lines += textwrap.wrap(entry["reason"], WIDTH, initial_indent="    ", subsequent_indent="    ")
        facts = [f"{name.replace('_', ' ')} {entry[name]}" for name in _SHOWN if entry.get(name) is not None]
        if facts:
            lines += textwrap.wrap(", ".join(facts), WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


_SHOWN = ("dataset_fingerprint", "samples", "evaluation_fingerprint", "run", "step", "version", "previous_version")
