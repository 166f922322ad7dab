"""What an attempt has come to, for the script that started it.

    python -m controlbooth.launch.job.outcome RUN_FOLDER ...

Exit codes of torchrun cannot tell a run that was stopped, and goes on, from one that has failed, and does not. The
ranks write it down: status.json, and failed-RANK.json for each one that ended with an error. Standard library only.
One that is damaged is told and says nothing: then the run is started again, and writes it anew.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.files.records import Fields, is_moment, is_text, is_whole, maybe, read_json_lines, read_note

EXIT_CODES = {"finished": 0, "failed": 1, "again": 75}
"""75 is EX_TEMPFAIL of sysexits.h."""
ANEW = "The next start writes it anew"
STATUS: Fields = {"state": maybe(is_text), "step": maybe(is_whole), "error": maybe(is_text), "time": maybe(is_moment)}
FAILURE: Fields = {"rank": is_whole, "error": is_text, "time": is_moment}
LOST_PEER = (
    "RankLost",
    "RankHung",
    "RuntimeError",
    "DistError",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
)
"""What ranks note, and PyTorch raises on those that are left, when another one, its node or the network has gone. An
error of another type has a cause that the next attempt would meet again: a wrong field, a full disk, too little memory.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m controlbooth.launch.job.outcome", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--since", type=float, required=True, help="when the attempt began, in seconds since 1970")
    parser.add_argument("--subjects", type=Path, help="of an array: its manifest, job/subjects.jsonl")
    parser.add_argument("--rows", help="of an array: FIRST:END, what this task trains")
    options = parser.parse_args(arguments)
    first, end = map(int, options.rows.split(":")) if options.subjects else (0, 0)
    folder = options.run / "rows" / f"{first}-{end}" if options.subjects else options.run
    newest = read_note(folder / "attempt.json", "Delete it", {"given": maybe(is_whole)}).get("given")
    if newest is not None and newest > int(os.environ.get("CONTROLBOOTH_ATTEMPT", str(newest))):
        verdict, reasons = "failed", [f"start {newest} has taken {folder} over; this one must not be started again"]
    elif options.subjects:
        rows = read_json_lines(options.subjects, "Submit the job again, which writes it anew", {"name": is_text})
        names = [row["name"] for row in rows]
        verdict, reasons = of_subjects(options.run, names[first:end])
        own = failure_reasons(folder, options.since)
        if own:  # of the whole task, such as a base that cannot be read
            verdict, reasons = "failed", own
    else:
        verdict, reasons = of_run(options.run, options.since)
    for reason in reasons:
        print(f"controlbooth launch: {reason}", file=sys.stderr)
    print(verdict)
    return EXIT_CODES[verdict]


def of_run(folder: Path, since: float) -> tuple[str, list[str]]:
    """Tells what the attempt that began at `since` (seconds since 1970) came to: finished, failed or again; and why."""
    if reasons := failure_reasons(folder, since):
        return "failed", reasons
    status = read_note(folder / "status.json", ANEW, STATUS)
    if status.get("state") == "finished" and (status.get("time") or 0.0) >= since:
        return "finished", []
    return "again", []


def failure_reasons(folder: Path, since: float) -> list[str]:
    """Returns what ranks have said of failures of their own, not of lost ranks. since: in seconds since 1970."""
    new = failure_notes(folder, since)
    return [f"rank {note['rank']}: {note['error']}" for note in new if note["error"].partition(":")[0] not in LOST_PEER]


def failure_notes(folder: Path, since: float) -> list[dict]:
    """Reads failed-RANK.json of all ranks that have failed since a time in seconds since 1970."""
    notes = [read_note(path, ANEW, FAILURE) for path in sorted(folder.glob("failed-*.json"))]
    return [note for note in notes if note and note["time"] >= since]


def of_subjects(folder: Path, names: Sequence[str]) -> tuple[str, list[str]]:
    """Tells the same as `of_run` of some subjects. A failed one is not tried again by itself, and stops no other."""
    statuses = {name: read_note(folder / "subjects" / name / "status.json", ANEW, STATUS) for name in names}
    if any(status.get("state") not in ("finished", "failed") for status in statuses.values()):
        return "again", []
    reasons = [f"{name}: {status.get('error')}" for name, status in statuses.items() if status["state"] == "failed"]
    return ("failed" if reasons else "finished"), reasons


if __name__ == "__main__":
    sys.exit(main())
