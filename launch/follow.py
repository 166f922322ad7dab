"""`controlbooth launch status|logs|cancel|resume RUN_FOLDER`, alike for every engine."""

import argparse
import contextlib
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from controlbooth.data.arguments import verb_parser
from controlbooth.data.errors import UserError
from controlbooth.data.files.records import is_text, is_whole, maybe, read_json_lines
from controlbooth.launch.engines import background, kubernetes, slurm
from controlbooth.launch.job.cluster import load_cluster
from controlbooth.launch.job.job import Job, JobState, job_logs, task_rows
from controlbooth.launch.job.outcome import failure_reasons
from controlbooth.launch.preflight.cluster import engine_problems, job_problems
from controlbooth.launch.progress import at_step, details, folder_lines, read, subjects_lines
from controlbooth.launch.ranks import child_process
from controlbooth.launch.submit import (
    AT_WORK,
    at_work,
    check_ended,
    last_record,
    last_submission,
    launch,
    replace_nodes,
    states,
)
from controlbooth.trainer.config.loading import dump, load_config
from controlbooth.trainer.config.run import RunConfig

NOTE = "== "
"""How lines of a job's script begin in its log."""
OWN_WORDS = re.compile(r"(rank \d+|controlbooth [a-z ]+): ")


STATUS_EXAMPLES = """examples:
  controlbooth launch status runs/first          a ControlNet run: step, speed, time left, losses, its page in MLflow
  controlbooth launch status runs/dreambooth     subjects: each with its state, step and loss
  watch -n 10 controlbooth launch status runs/first"""


def _parser(verb: str, description: str, whose: str = "that `controlbooth launch` started") -> argparse.ArgumentParser:
    parser = verb_parser(
        f"launch {verb}",
        description,
        STATUS_EXAMPLES if verb == "status" else f"example:\n  controlbooth launch {verb} runs/first",
    )
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help=f"of a run {whose}")
    return parser


def status_main(arguments: Sequence[str] | None = None) -> int:
    options = _parser(
        "status",
        "Tells how a run is doing: of a job, of `controlbooth train`, or of `controlbooth dreambooth run`. Ends with "
        "status 1 where it, or one of its subjects, has failed.",
        "of any kind, however it was started",
    ).parse_args(arguments)
    if last_record(options.folder) is None:
        lines, failed = folder_lines(options.folder)
        print("\n".join(lines))
        return 1 if failed else 0
    job, record = last_submission(options.folder)
    asked = states(record, job.cluster)
    code = record["code"]
    print(f"job         {record['engine']} {record['id']}, submission {record['submission']}: {describe_states(asked)}")
    print(f"code        {code['version']} {(code['commit'] or '')[:12]}{', changed since' if code['dirty'] else ''}")
    if job.subjects:
        lines, failed = subject_lines(job, asked, record["submitted"])
    else:
        lines, failed = run_lines(job, asked)
    print("\n".join(lines))
    return 1 if failed else 0


def describe_states(asked: Sequence[JobState]) -> str:
    """Describes what the engine says of a job, or counts the states of the tasks of an array."""
    if len(asked) == 1:
        (one,) = asked
        where = f" on {one.nodes}" if one.nodes else ""
        return one.said + where + (f", restarted {one.restarts} times" if one.restarts else "")
    counts = Counter(one.state for one in asked)
    return ", ".join(f"{count} tasks {state}" for state, count in counts.items())


def run_lines(job: Job, asked: Sequence[JobState]) -> tuple[list[str], bool]:
    """Returns lines about what the run itself has written, and whether it has failed."""
    status = read(job.here / "status.json")
    state = status.get("state", "not begun")
    going = any(one.state in AT_WORK for one in asked)
    lines = [f"run         {job.name}: {state}{at_step(job.here)}", *details(job.here, status)]
    lines += [f"error       {status['error']}"] if state == "failed" else []
    if state not in ("finished", "failed") and not going:
        resume = shlex.join(["controlbooth", "launch", "resume", str(job.here)])
        lines.append(f"            nothing is at work on it now; `{resume}` goes on")
    ended_badly = state == "failed" or any(one.state == "failed" for one in asked)
    return lines, ended_badly and not going and state != "finished"


def subject_lines(job: Job, asked: Sequence[JobState], submitted: float) -> tuple[list[str], bool]:
    """Returns lines with counts of subjects by state, a table of them, and why tasks have failed; and whether any has.

    submitted: when the job was, in seconds since 1970.
    """
    statuses = {name: read(job.here / "subjects" / name / "status.json") for name in subject_names(job)}
    lines, any_failed = subjects_lines(job.here, manifest_rows(job))
    open_ones = {name for name, status in statuses.items() if status.get("state") not in ("finished", "failed")}
    failed = failed_tasks(job, asked, submitted, open_ones)
    lines += [f"            task {task}: {why}" for task, why in failed.items()]
    return lines, any_failed or bool(failed)


def failed_tasks(job: Job, asked: Sequence[JobState], submitted: float, left: Collection[str]) -> dict[int, str]:
    """Returns task -> why it has failed, for each failed task that has left subjects neither finished nor failed.

    left: the names of these subjects. The reason is what its ranks have noted, the last words of its log, or else what
    the engine says. submitted: in seconds since 1970.
    """
    names = subject_names(job)
    said_failed = {one.task: one.said for one in asked if one.state == "failed"}
    told = {}
    for task, log in enumerate(job_logs(job.here, job.tasks)):
        rows = task_rows(task, job.subjects_per_task, job.subjects)
        if not any(names[row] in left for row in rows):
            continue
        reasons = failure_reasons(job.here / "rows" / f"{rows.start}-{rows.stop}", submitted)
        judged = log.is_file() and log.stat().st_mtime >= submitted and verdict(log) == "failed"
        if reasons or judged or task in said_failed:
            told[task] = "; ".join(reasons) or log_words(log) or said_failed.get(task, "it has printed nothing")
    return told


def verdict(log: Path) -> str | None:
    """Returns what the job's script wrote last: `failed`, `again`, `attempt 1000`, ...; None where it wrote nothing."""
    notes = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(NOTE)]
    return notes[-1].removeprefix(NOTE).partition(",")[0] if notes else None


def log_words(log: Path) -> str | None:
    """Returns what our programs say went wrong in the last attempt, or else its last line; None where there is none.

    Progress bars, notes of the job's own script, and lines of torchrun's report without a word are skipped.
    """
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n") if log.is_file() else []
    begins = [number for number, line in enumerate(lines) if line.startswith(f"{NOTE}attempt")]
    lines = lines[begins[-1] :] if begins else lines
    lines = [line for line in lines if re.search(r"\w", line) and "%|" not in line and not line.startswith(NOTE)]
    own = [line for line in lines if begins and OWN_WORDS.match(line)]
    return (own or lines)[-1].strip()[:300] if lines else None


def subject_names(job: Job) -> list[str]:
    return [row["name"] for row in manifest_rows(job)]


def manifest_rows(job: Job) -> list[dict[str, Any]]:
    manifest = job.here / "job" / "subjects.jsonl"
    fields = {"name": is_text, "steps": maybe(is_whole)}
    return list(read_json_lines(manifest, "Submit the job again, which writes it anew", fields))


def logs_main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser("logs", "Prints what all attempts of a job have said.")
    parser.add_argument("--follow", action="store_true", help="go on until the job has ended")
    parser.add_argument("--subject", help="of an array: only the task that trains this subject")
    options = parser.parse_args(arguments)
    job, record = last_submission(options.folder)
    task = None
    if options.subject:
        names = subject_names(job) if job.subjects else []
        if options.subject not in names:
            known = ", ".join(names) or "none"
            raise UserError(f"{options.subject!r} is no subject of {job.here}. There are: {known}")
        task = names.index(options.subject) // job.subjects_per_task
    if record["engine"] == "kubernetes":
        command = kubernetes.logs_command(record["id"], job.cluster.kubernetes.namespace, options.follow, task)
        return child_process.call(command, os.environ)
    files = job_logs(job.here, job.tasks if job.subjects else None)
    chosen = {f"task {number}: ": path for number, path in enumerate(files) if task in (None, number)}
    if len(chosen) == 1:
        chosen = dict.fromkeys([""], *chosen.values())
    for line in follow(chosen, lambda: options.follow and still_at_work(record, job)):
        print(line, flush=True)
    return 0


def still_at_work(record: dict[str, Any], job: Job) -> bool:
    time.sleep(1.0)
    return bool(at_work(record, job.cluster))


def follow(files: dict[str, Path], more) -> Iterator[str]:
    """Yields lines of files as they are written, with their file's prefix, until more() is false and all was read."""
    read = dict.fromkeys(files, 0)
    rest = dict.fromkeys(files, b"")
    going = True
    while going:
        going = more()  # asked before reading, so that what came last is read
        for prefix, path in files.items():
            if not path.is_file():
                continue
            with path.open("rb") as file:
                file.seek(read[prefix])
                data = rest[prefix] + file.read()
                read[prefix] = file.tell()
            *lines, rest[prefix] = data.split(b"\n")
            yield from (prefix + line.decode(errors="replace") for line in lines)
    yield from (prefix + line.decode(errors="replace") for prefix, line in rest.items() if line)


def cancel_main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser(
        "cancel", "Ends a job: its ranks save a checkpoint after their step, and it is not started again by itself."
    )
    parser.add_argument("--now", action="store_true", help="without a checkpoint")
    options = parser.parse_args(arguments)
    job, record = last_submission(options.folder)
    if not at_work(record, job.cluster):
        print(f"nothing is at work on {job.here}")
        return 0
    (job.here / "job" / "cancelled").touch()  # first: the script looks for it when its ranks have stopped
    if record["engine"] == "kubernetes":
        kubernetes.cancel(record["id"], job.cluster.kubernetes.namespace, options.now)
    else:
        (slurm if record["engine"] == "slurm" else background).cancel(record["id"], options.now)
    how = "at once" if options.now else "after this step, with a checkpoint"
    resume = shlex.join(["controlbooth", "launch", "resume", str(job.here)])
    print(f"{record['engine']} job {record['id']} ends {how}; `{resume}` goes on")
    return 0


def resume_main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser("resume", "Submits a job again that has ended or was cancelled; its run goes on where it was.")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, changed")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="changed settings, such as other nodes")
    options = parser.parse_intermixed_args(arguments)
    job, files, problems = next_submission(options.folder, options.overrides, options.cluster)
    for problem in problems:
        print(f"controlbooth launch resume: {problem}", file=sys.stderr)
    return 2 if problems else launch(job, files)


def next_submission(
    folder: Path, overrides: Sequence[str] = (), cluster_file: Path | None = None
) -> tuple[Job, dict[str, str], list[str]]:
    """Returns the job that has ended, to be submitted again, the files of its folder, and what is wrong with it.

    cluster_file: changed settings; None keeps them. Raises ValueError where the job is at work, and for overrides of an
    array; ConfigError where there is no job or its files cannot be read.
    """
    job, record = last_submission(folder)
    job = replace(job, submission=record["submission"] + 1, submitted=time.time())
    if cluster_file:
        cluster = load_cluster(cluster_file, record["engine"])
        job = replace(job, cluster=replace_nodes(cluster) if job.subjects else cluster)
    check_ended(job)  # first: what else is wrong follows from its being at work
    submitted = job.here / "job"
    if job.subjects:
        if overrides:
            raise UserError("the subjects of an array go on as they began: leave the overrides out")
        files = {name: (submitted / name).read_text() for name in ("run.yaml", "subjects.jsonl")}
        return job, files, engine_problems(job.cluster)
    config = load_config(submitted / "run.yaml", overrides)
    return job, {"run.yaml": dump(config)}, problems_there(config, job)


def problems_there(config: RunConfig, job: Job) -> list[str]:
    """Returns the problems of a run, whose relative paths start where its job does, not where it is resumed."""
    if not job.working_directory.is_dir():
        return [
            f"paths of the run start from {job.working_directory}, which this machine does not see. Resume it where it "
            "was launched, or put the folder back"
        ]
    with contextlib.chdir(job.working_directory):
        return job_problems(config, job.cluster)
