"""RUN_FOLDER/job/: what was submitted, beside what it makes.

job/run.yaml        the resolved configuration, which the ranks read
    subjects.jsonl  of a DreamBooth array: its subjects, with everything settled
    cluster.yaml    where, and on how many machines
    script.sh, manifests.yaml    what the engine was given
    job.json        engine, the engine's name for the job, when, and the code's version
    submitting.json the same without that name, while the engine is asked; stays where that was cut off or refused
    log.txt         what all attempts have said; of an array log-TASK.txt
    cancelled       is there when a person has ended it: an attempt that stops is then not started again
"""

import importlib.metadata
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controlbooth.data.files.records import Damaged, Fields, is_moment, is_text, is_whole, read_json
from controlbooth.data.files.whole import write_whole
from controlbooth.launch.job.cluster import Cluster, interpreter, load_cluster
from controlbooth.trainer.dreambooth.manifest import Task

SUBMITTING = "submitting.json"
RECORD: Fields = {
    "engine": lambda value: value in ("local", "slurm", "kubernetes"),
    "name": is_text,
    "submission": is_whole,
    "submitted": is_moment,
    "folder": is_text,
    "working_directory": is_text,
    "subjects": is_whole,
    "subjects_per_task": is_whole,
}
"""Fields of job.json and submitting.json."""
IDS = {"local": r"\d+@\d+(\.\d+)?@\S+", "slurm": r"\d+", "kubernetes": r"[\w.-]+(/[\w.-]+)?"}
"""What engines call their jobs."""
ATTEMPTS_A_SUBMISSION = 1000
"""A run's attempts must be numbered upwards, and every engine begins to count at 0 when a job is submitted anew."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is rendered: a run, where, and which submission of it this is. Paths are absolute."""

    name: str
    folder: Path
    """Of the run, as its nodes see it."""
    here: Path
    """The same folder as this machine sees it."""
    working_directory: Path
    """That relative paths of the run start from."""
    cluster: Cluster
    submitted: float
    """When this submission was made ready, in seconds since 1970."""
    submission: int = 1
    subjects: int = 0
    """Of a DreamBooth array; 0 for a single run."""
    subjects_per_task: int = 0

    @property
    def job_folder(self) -> Path:
        """Returns the folder of the job's files, as the nodes see it."""
        return self.folder / "job"

    @property
    def tasks(self) -> int:
        return -(-self.subjects // self.subjects_per_task) if self.subjects else 1

    @property
    def first_attempt(self) -> int:
        return self.submission * ATTEMPTS_A_SUBMISSION

    @property
    def python(self) -> str:
        return interpreter(self.cluster)


@dataclass(frozen=True)
class JobState:
    """What an engine says of a job, or of one task of it."""

    state: str
    """waiting, running, ended, failed, cancelled, or unknown where the engine has forgotten it."""
    said: str
    """In the engine's own words."""
    nodes: str = ""
    restarts: int = 0
    task: int | None = None


def job_logs(folder: Path, tasks: int | None = None) -> list[Path]:
    """Returns the paths of the logs of a single run, or of the tasks of an array."""
    return [folder / "job" / ("log.txt" if tasks is None else f"log-{task}.txt") for task in range(tasks or 1)]


PRIVATE = ("cluster.yaml", "script.sh", "manifests.yaml")
"""Files that hold the environment of a job, which may have secrets in it."""


def is_private(cluster: Cluster) -> bool:
    """Tells whether what the job's files have of a cluster is for their owner alone."""
    return bool(cluster.environment or cluster.setup)


def write_job(job: Job, texts: dict[str, str]) -> None:
    """Writes the files of the job's folder, each whole or not at all, and takes away what an earlier cancel left.

    Those with an environment are readable by their owner alone.
    """
    folder = job.here / "job"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cancelled").unlink(missing_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, text.encode(), private=name in PRIVATE and is_private(job.cluster))


def job_texts(folder: Path) -> dict[str, tuple[str, bool]]:
    """Reads what lies in job/ of a run's folder but the logs: name -> text, and whether it is for its owner alone."""
    files = [path for path in (folder / "job").glob("*") if path.is_file() and not path.name.startswith("log")]
    return {path.name: (path.read_text(), not path.stat().st_mode & 0o077) for path in files}


def restore_job(folder: Path, texts: dict[str, tuple[str, bool]]) -> None:
    """Takes back what a submission has written that the engine has refused. texts: as `job_texts` was before."""
    for name in job_texts(folder).keys() - texts.keys():
        (folder / "job" / name).unlink()
    for name, (text, private) in texts.items():
        write_whole(folder / "job" / name, text.encode(), private)
    for made in (folder / "job", folder):
        if not list(made.iterdir()):
            made.rmdir()


def record_of(job: Job) -> dict[str, Any]:
    """Returns what job.json says, but for `id`, the engine's name for the job."""
    return dict(
        engine=job.cluster.engine,
        name=job.name,
        submission=job.submission,
        submitted=job.submitted,
        folder=str(job.folder),
        working_directory=str(job.working_directory),
        subjects=job.subjects,
        subjects_per_task=job.subjects_per_task,
        code=code_version(),
    )


def write_intent(folder: Path, record: dict[str, Any]) -> None:
    """Writes submitting.json before the engine is asked: with it the job is found where job.json is never written."""
    write_whole(folder / "job" / SUBMITTING, json.dumps(record, indent=1).encode())


def read_intent(folder: Path) -> dict[str, Any] | None:
    """Reads submitting.json of a run's folder; returns None where there is none. Raises Damaged."""
    remedy = "Delete it, and look in the queue of your engine whether it has the job"
    return read_json(folder / "job" / SUBMITTING, remedy, RECORD, missing=None)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes job.json after the engine has taken the job, and deletes submitting.json. record: with its `id`."""
    write_whole(folder / "job" / "job.json", json.dumps(record, indent=1).encode())
    (folder / "job" / SUBMITTING).unlink(missing_ok=True)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Reads job.json of a run's folder; returns None where there is none. Raises Damaged."""
    remedy = "Delete it, end the job by the commands of your engine where it has it, and submit the run again"
    record = read_json(folder / "job" / "job.json", remedy, {**RECORD, "id": is_text}, missing=None)
    if record is not None and not re.fullmatch(IDS[record["engine"]], record["id"]):
        raise Damaged(folder / "job" / "job.json", f"{record['id']!r} is no job of {record['engine']}", remedy)
    return record


def recorded_job(folder: Path, record: dict[str, Any]) -> Job:
    """Returns the job of a run's folder that a record is of. Raises ConfigError for an unreadable cluster.yaml."""
    return Job(
        name=record["name"],
        folder=Path(record["folder"]),
        here=folder.absolute(),
        working_directory=Path(record["working_directory"]),
        cluster=load_cluster(folder / "job" / "cluster.yaml", record["engine"]),
        submitted=record["submitted"],
        submission=record["submission"],
        subjects=record["subjects"],
        subjects_per_task=record["subjects_per_task"],
    )


def code_version() -> dict[str, Any]:
    """Returns version, git commit and whether tracked files differ from it; commit is None for an installed copy."""
    version: dict[str, Any] = {"version": importlib.metadata.version("controlbooth"), "commit": None, "dirty": None}
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return version
    return version | {"commit": commit, "dirty": bool(changed.strip())}


def settled_manifest(tasks: Sequence[Task]) -> str:
    """Returns the manifest of subjects as JSONL, with nothing left to the run or to a subject's place in the list, so
    that slices of it can be used by themselves."""
    rows = []
    for task in tasks:
        images = {str(path.parent.absolute()) for path in task.images}
        row = asdict(task) | {"images": images.pop()}
        del row["held_out"]  # of the run, which says how many
        row |= {key: row[key].replace("{", "{{").replace("}", "}}") for key in ("instance_prompt", "class_prompt")}
        rows.append(json.dumps(row))
    return "".join(f"{row}\n" for row in rows)


def task_rows(task: int, subjects_per_task: int, subjects: int) -> range:
    """Returns the rows of the settled manifest that one task of an array trains."""
    return range(task * subjects_per_task, min((task + 1) * subjects_per_task, subjects))
