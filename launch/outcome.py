"""What an attempt has come to, for the script that started it: `python -m controlbooth.launch.outcome RUN_FOLDER ...`.

Exit codes of torchrun cannot tell a run that was stopped, and goes on, from one that has failed, and does not. The
ranks write it down: status.json, and failed-RANK.json for each one that ended with an error. Standard library only.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

EXIT_CODES = {"finished": 0, "failed": 1, "again": 75}
"""75 is EX_TEMPFAIL of sysexits.h."""
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
    parser = argparse.ArgumentParser(prog="python -m controlbooth.launch.outcome", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--since", type=float, required=True, help="when the attempt began, in seconds since 1970")
    parser.add_argument("--subjects", type=Path, help="of an array: its manifest, job/subjects.jsonl")
    parser.add_argument("--rows", help="of an array: FIRST:END, what this task trains")
    options = parser.parse_args(arguments)
    first, end = map(int, options.rows.split(":")) if options.subjects else (0, 0)
    folder = options.run / "rows" / f"{first}-{end}" if options.subjects else options.run
    newest = read(folder / "attempt.json").get("given")
    if newest is not None and newest > int(os.environ.get("CONTROLBOOTH_ATTEMPT", str(newest))):
        verdict, reasons = "failed", [f"start {newest} has taken {folder} over; this one must not be started again"]
    elif options.subjects:
        names = [json.loads(line)["name"] for line in options.subjects.read_text().splitlines()]
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
    """-> finished, failed or again, and why."""
    if reasons := failure_reasons(folder, since):
        return "failed", reasons
    status = read(folder / "status.json")
    if status.get("state") == "finished" and status["time"] >= since:
        return "finished", []
    return "again", []


def failure_reasons(folder: Path, since: float) -> list[str]:
    """What ranks have said of failures that were their own."""
    notes = [json.loads(path.read_text()) for path in sorted(folder.glob("failed-*.json"))]
    new = [note for note in notes if note["time"] >= since]
    return [f"rank {note['rank']}: {note['error']}" for note in new if note["error"].partition(":")[0] not in LOST_PEER]


def of_subjects(folder: Path, names: Sequence[str]) -> tuple[str, list[str]]:
    """The same of some subjects. One that has failed is not tried again by itself, and stops no other."""
    statuses = {name: read(folder / "subjects" / name / "status.json") for name in names}
    if any(status.get("state") not in ("finished", "failed") for status in statuses.values()):
        return "again", []
    reasons = [f"{name}: {status['error']}" for name, status in statuses.items() if status["state"] == "failed"]
    return ("failed" if reasons else "finished"), reasons


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
