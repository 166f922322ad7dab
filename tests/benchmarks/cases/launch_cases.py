"""Lists the cases about launched text, secrets, processes, code in data, and subjects that stop each other."""

import hashlib
import json
import re
import time
from pathlib import Path

from case import SCRIPT_SAID, Case, Outcome, last_line, run

PASSWORD = "not-for-everybody"
WEIGHTS = "checkpoints/step-00000003/controlnet/diffusion_pytorch_model.safetensors"


def lost_agent(place: Path) -> Outcome:
    """Looks whether ranks are at work ten seconds after their agent was killed and the launcher has ended."""
    said = (place / SCRIPT_SAID).read_text()
    ended = re.search(r"the launcher has ended with status (\d+)", said)
    left = re.search(r"ranks at work: \[(.*)\]", said)
    right = bool(ended and left) and ended[1] != "0" and left[1] == ""
    return Outcome(right, f"launcher {ended and ended[1]}, ranks at work: {left[1] or 'none' if left else '?'}")


def subjects(place: Path, manifest: str, faulty: tuple[str, ...], trained: tuple[str, ...], said: str) -> Outcome:
    """Checks and runs a manifest: the faulty subjects are refused in the check, the others are trained."""
    words = ("dreambooth", "run", f"{manifest}.yaml", "subjects-run.yaml", f"name={manifest}", "--processes", "1")
    check = run(place, "controlbooth", *words, "--dry-run")
    told = all(any(line.startswith(f"controlbooth dreambooth run: {name}: ") and said in line
                   for line in check.text.splitlines()) for name in faulty)  # fmt: skip
    if not told or not check.refused:
        return Outcome(False, f"dry run {last_line(check)}")
    done = run(place, "controlbooth", *words)
    statuses = (place / "runs" / manifest / "subjects").glob("*/status.json")
    states = {path.parent.name: json.loads(path.read_text())["state"] for path in statuses}
    finished = tuple(sorted(name for name, state in states.items() if state == "finished"))
    right = finished == trained and not done.traceback and done.status == (1 if trained else 2)
    return Outcome(right, f"{', '.join(faulty)} refused in the check; trained: {', '.join(finished) or 'none'}")


def long_name(place: Path) -> Outcome:
    return subjects(place, "long", ("row 1",), ("short",), "at most 200 characters")


def case_of_names(place: Path) -> Outcome:
    return subjects(place, "case", ("ok", "OK"), (), "which some disks take for one folder")


def dollar(place: Path) -> Outcome:
    """Submits the run in the background, waits for its end, and looks for files that its output's text has made."""
    ran = run(place, "controlbooth", "launch", "local", "dollar.yaml")
    folder = place / "x" / "$(touch made-by-the-output)" / "dollar"
    end = time.monotonic() + 300
    while ran.status == 0 and time.monotonic() < end:
        log = folder / "job" / "log.txt"
        if log.exists() and re.search("^== (finished|failed|stopped)", log.read_text(), re.MULTILINE):
            break
        time.sleep(0.5)
    made = list(place.rglob("made-by-*"))
    status = folder / "status.json"
    state = json.loads(status.read_text())["state"] if status.exists() else "not begun"
    return Outcome(ran.status == 0 and not made and state == "finished", f"files made: {len(made)}; the run is {state}")


def newline(place: Path) -> Outcome:
    ran = run(place, "controlbooth", "launch", "slurm", "newline.yaml", "--cluster", "slurm.yaml", "--dry-run")
    printed = [line for line in ran.text.splitlines() if line.strip() == "touch made-by-a-line"]
    return Outcome(ran.refused and not printed and "'output'" in ran.text, last_line(ran))


def credentials(place: Path) -> Outcome:
    """Looks for the password in all that was written and printed: by the run, the report and a background job."""
    printed = [
        run(place, "controlbooth", "train", "tracked.yaml"),
        run(place, "controlbooth", "report", "runs/tracked"),
    ]
    printed.append(run(place, "controlbooth", "launch", "local", "tracked.yaml", "name=tracked-job"))
    files = [path for path in place.rglob("*") if path.is_file() and path.name not in ("tracked.yaml", SCRIPT_SAID)]
    found = [path.name for path in files if PASSWORD.encode() in path.read_bytes()]
    consoles = sum(PASSWORD in one.text for one in printed)
    named = "MLFLOW_TRACKING_PASSWORD" in printed[0].text
    right = not found and not consoles and printed[0].refused and named
    return Outcome(right, f"in {len(found)} files and {consoles} consoles; {last_line(printed[0], 110)}")


def pickle(place: Path) -> Outcome:
    """Trains on: the checkpoint with a pickle is passed over or refused, and nothing of it runs."""
    ran = run(place, "controlbooth", "train", "run.yaml", "name=pickle")
    made = (place / "runs" / "made-by-a-checkpoint").exists()
    ours, whole = (place / "runs" / name / WEIGHTS for name in ("pickle", "base"))
    equal = ours.exists() and digest(ours) == digest(whole)
    right = not made and not ran.traceback and (equal or ran.status != 0)
    return Outcome(right, f"a file was made: {'yes' if made else 'no'}; "
                   f"{'weights of step 3 equal' if equal else last_line(ran)}")  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


CASES = (
    Case(
        "integrity", "the agent gets SIGKILL", "lost_agent.py",
        "the launcher says that both ranks were killed; both train on and hold the lock", lost_agent,
        first="tiny_run.py",
    ),
    Case(
        "integrity", "a subject's name of 300 letters", "many_subjects.py",
        "passes the check; `File name too long` ends all subjects", long_name,
    ),
    Case(
        "integrity", "subjects ok and OK", "many_subjects.py",
        "both accepted; one writes over the other on some disks", case_of_names,
    ),
    Case(
        "integrity", "output with $(touch FILE)", "launch_text.py", "the file is made", dollar, first="tiny_run.py"
    ),
    Case(
        "integrity", "output of several lines", "launch_text.py", "its second line is a command of the script", newline,
        first="tiny_run.py",
    ),
    Case(
        "integrity", "password in tracking.uri", "credentials.py",
        "in config.yaml, checkpoints, tracking.json, metrics.jsonl, report, job files, console", credentials,
        first="tiny_run.py",
    ),
    Case(
        "integrity", "a checkpoint with a pickle", "damage.py", "the file that it makes is there", pickle,
        ("OUT", "pickle"), first="tiny_run.py",
    ),
)  # fmt: skip
