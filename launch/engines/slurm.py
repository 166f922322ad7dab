"""Slurm: renders the batch script, which is pure, and submits, asks for, and cancels the job.

What the script is careful about, each of which was met on a real cluster:
- A job that ends by itself during the grace before a preemption is FAILED and not started again, so the script requeues
  itself, no more often than it is told to.
- The warning before the time limit goes to the script (B:): torchrun would die of a USR1. The script sends TERM on.
- torchrun kills its ranks 30 s after a TERM unless it is told to wait; the wait must end before Slurm kills.
- Exit codes do not tell a stopped run from a failed one; `outcome` reads what the ranks have written.
- The last task of an array has the id of the whole array as its SLURM_JOB_ID: a task is named ARRAY_TASK.
- Without --open-mode=append each attempt would delete the log of the one before.
- A controller that restarts answers nothing for a while: only an answer tells whether somebody has cancelled the job.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from controlbooth.data.errors import UserError
from controlbooth.launch.engines.script import checking, echoing, judging, preamble, rows, shell, training
from controlbooth.launch.job.cluster import shutdown_seconds
from controlbooth.launch.job.job import Job, JobState
from controlbooth.launch.job.outcome import EXIT_CODES

ENDED = {
    "BOOT_FAIL": "failed",
    "CANCELLED": "cancelled",
    "COMPLETED": "ended",
    "DEADLINE": "failed",
    "FAILED": "failed",
    "NODE_FAIL": "failed",
    "OUT_OF_MEMORY": "failed",
    "PREEMPTED": "failed",
    "TIMEOUT": "failed",
}
"""Slurm's states of a job that will not run again, in our words."""

AGAIN = EXIT_CODES["again"]
"""Of the check. srun gives the highest status of all nodes, so this one where they differ: the next attempt tells."""


def render(job: Job) -> str:
    """Returns the text of the batch script."""
    lines = ["#!/bin/bash", *(f"#SBATCH --{option}" for option in _options(job)), "#", *_header(job)]
    lines += preamble(job)
    lines += rows(job, "SLURM_ARRAY_TASK_ID")
    lines += [f'JOB="{"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.subjects else "$SLURM_JOB_ID"}"']
    lines += [
        f"export CONTROLBOOTH_ATTEMPT=$(({job.first_attempt} + ${{SLURM_RESTART_COUNT:-0}}))",
        'HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "PORT=$((29500 + SLURM_JOB_ID % 1000))",
        "export HEAD PORT",
        f"WAIT={shutdown_seconds(job.cluster)}",
        "STARTED=$(date +%s)",
        'echo "== attempt $CONTROLBOOTH_ATTEMPT, job $JOB on $SLURM_JOB_NODELIST, $(date +%FT%T%z)"',
        "",
        WAITING,
        "",
        ANSWERED,
    ]
    if not job.subjects:
        check = shell(checking(job, "$HEAD", "$PORT", "$SLURM_NODEID"))
        lines += ["", "# Every node looks at what it needs, and all of them at each other, before the ranks start."]
        lines += [f"on_every_node {shlex.quote(f'exec {check}')}", "CHECKED=$?"]
        lines += ["# It has said why. If a node was only late or lost, or the job is stopped, what follows decides."]
        lines += [f'if [ "$CHECKED" != {AGAIN} ] && [ "$CHECKED" -gt 0 ] && [ "$CHECKED" -lt 128 ]; then exit 2; fi']
    endpoint, is_host = ("$HEAD:$PORT", "$((SLURM_NODEID == 0))") if job.cluster.nodes > 1 else ("127.0.0.1:0", "1")
    train = f"on_every_node {shlex.quote(f'exec {shell(training(job, endpoint, is_host))}')}"
    # An attempt that is stopped while it checks must not start training
    lines += ["", train if job.subjects else f'[ "$CHECKED" != 0 ] || {train}', ""]
    lines += [f"OUTCOME=$({shell(judging(job))})", _requeueing(job)]
    return "\n".join(lines) + "\n"


WAITING = """\
# Slurm's warning before the time limit, handed on to the ranks: they save a checkpoint after their step, and end.
trap 'scancel --signal=TERM "$JOB"' USR1
# Before a preemption Slurm itself sends TERM to the ranks, and to this script.
trap : TERM

on_every_node() {
  # When one node has ended the others have time to write down why, and are then ended too.
  srun --kill-on-bad-exit=0 --wait="$WAIT" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c "$1" &
  local status=0
  while true; do  # a signal ends `wait`, and not what it waits for
    wait $!
    status=$?
    kill -0 $! 2>/dev/null || return $status
  done
}"""


ANSWER_SECONDS, ANSWER_TRIES = 10, 30
"""5 minutes together: a node that Slurm does not reach for longer loses its job to another one, by SlurmdTimeout."""
ANSWERED = f"""\
answered() {{
  # The controller may be restarting.
  local tries=1
  until "$@"; do
    if [ "$tries" -ge {ANSWER_TRIES} ]; then
      echo "controlbooth launch: Slurm does not answer to $*, so this job is not started again" >&2
      return 1
    fi
    tries=$((tries + 1))
    sleep {ANSWER_SECONDS}
  done
}}"""


def _header(job: Job) -> list[str]:
    what = f"{job.subjects} subjects, {job.subjects_per_task} a task" if job.subjects else "a run"
    return [
        f"# {job.name}: {what}, trained by controlbooth; written by `controlbooth launch slurm`.",
        f"# `{shlex.join(['controlbooth', 'launch', 'status', str(job.folder)])}` tells how it goes.",
    ]


def _options(job: Job) -> list[str]:
    cluster, slurm = job.cluster, job.cluster.slurm
    log = str(job.job_folder).replace("%", "%%") + ("/log-%a.txt" if job.subjects else "/log.txt")
    minutes = cluster.time_limit_minutes
    options = [
        f"job-name={job.name}",
        f"array=0-{job.tasks - 1}" if job.subjects else None,
        f"partition={slurm.partition}" if slurm.partition else None,
        f"account={slurm.account}" if slurm.account else None,
        f"qos={slurm.qos}" if slurm.qos else None,
        f"constraint={slurm.constraint}" if slurm.constraint else None,
        f"nodes={cluster.nodes}",
        "ntasks-per-node=1",
        f"cpus-per-task={cluster.cores_per_node or cluster.processes_per_node}",
        f"gpus-per-node={cluster.gpus_per_node}" if cluster.gpus_per_node else None,
        f"mem={cluster.memory_gib_per_node * 1024:.0f}M" if cluster.memory_gib_per_node else None,
        f"time={minutes}" if minutes else None,
        f"signal=B:USR1@{cluster.grace_seconds}",
        f"output={_sbatch_word(log)}",
        "open-mode=append",
        "requeue",
    ]
    return [option for option in options if option is not None]


def _sbatch_word(text: str) -> str:
    """Escapes one word of an #SBATCH line, where a backslash escapes any character, also inside of quotes."""
    return re.sub(r"([^A-Za-z0-9_@%+=:,./-])", r"\\\1", text)


def folder_problems(folder: Path) -> Iterator[str]:
    """Yields the problems of a run's folder, whose name stands in #SBATCH lines and in the name of its log."""
    if "\\" in str(folder):
        yield f"output is {folder}, and Slurm takes no backslash in the name of a log. Give another folder"
    elif found := re.search("hetjob|packjob", str(folder), re.IGNORECASE):
        yield f"{folder} has {found[0]} in it, which Slurm takes for one of its own words. Give another output or name"


def _requeueing(job: Job) -> str:
    restarts = job.cluster.restarts
    cancelled = shlex.quote(str(job.job_folder / "cancelled"))
    return f"""\
echo "== $OUTCOME, $(date +%FT%T%z)"
case "$OUTCOME" in
  finished) exit 0 ;;
  failed) exit 1 ;;
esac
if [ -e {cancelled} ]; then echo "== cancelled, and not started again"; exit 0; fi
STATE=$(answered squeue --noheader --jobs="$JOB" --format='%T %r') || exit 1
case "$STATE" in
  RUNNING* | *TimeLimit) ;;
  *) exit 1 ;;  # somebody has cancelled the job: it is COMPLETING while this script still runs
esac
if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {restarts} ]; then
  echo "== {restarts} restarts are used up. Look above for what ends the attempts; then:"
  {echoing("controlbooth", "launch", "resume", str(job.folder))}
  exit 1
fi
answered scontrol requeue "$JOB\""""


def submit(script: Path) -> str:
    """Submits the script and returns the job's id. Raises ValueError with what Slurm says where it refuses."""
    return client("sbatch", "--parsable", str(script)).partition(";")[0]


def find(script: Path, name: str) -> str | None:
    """Returns the id of the newest job of this batch script that has not ended; None where there is none.

    name: of the job. Raises ValueError where Slurm does not answer.
    """
    listed = client("squeue", "--noheader", f"--name={name}", "--format=%F %o").splitlines()
    ids = [int(job_id) for job_id, _, command in (line.partition(" ") for line in listed) if command == str(script)]
    return str(max(ids)) if ids else None


def states(job_id: str) -> list[JobState]:
    """Returns the state of the job, or of each task of an array; what has not begun is one entry for many tasks.

    Raises ValueError where Slurm does not answer.
    """
    check_on_path("scontrol")
    known = subprocess.run(["scontrol", "show", "job", "--oneliner", job_id], capture_output=True, text=True)
    if known.returncode:
        if "Invalid job id" in known.stderr:
            return [JobState("unknown", "Slurm has forgotten this job, as it does minutes after a job's end")]
        raise UserError(f"scontrol show job {job_id} failed: {known.stderr.strip()}. Is slurmctld up?")
    return [_state(line) for line in known.stdout.splitlines() if line.strip()]


def facts_of(line: str) -> dict[str, str]:
    """Parses what `scontrol show --oneliner` prints of one thing: Key=value, between spaces."""
    return {key: value for key, _, value in (word.partition("=") for word in line.split())}


def _state(line: str) -> JobState:
    facts = facts_of(line)
    said = facts["JobState"]
    state = ENDED.get(said, "running" if said in ("RUNNING", "COMPLETING") else "waiting")
    reason = facts.get("Reason", "None")
    task = facts.get("ArrayTaskId", "")
    return JobState(
        state,
        said if reason == "None" else f"{said} ({reason})",
        facts.get("NodeList", "").replace("(null)", ""),
        int(facts.get("Restarts", "0")),
        int(task) if task.isdecimal() else None,
    )


def cancel(job_id: str, now: bool) -> None:
    """Warns a running job as before a time limit, so that it ends with a checkpoint, or ends it at once.

    Slurm's own scancel kills after KillWait, 30 s where nobody has set it, which may be less than a checkpoint takes.
    """
    running = any(one.said.startswith("RUNNING") for one in states(job_id))
    if now or not running:
        client("scancel", job_id)
    else:
        client("scancel", "--batch", "--signal=USR1", job_id)
        client("scancel", "--state=PENDING", job_id)  # tasks of an array that have not begun


def client(*command: str) -> str:
    """Runs one of Slurm's commands. Raises ValueError with its message."""
    check_on_path(command[0])
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def check_on_path(program: str) -> None:
    """Raises ValueError where this machine has no such program."""
    if shutil.which(program) is None:
        raise UserError(f"there is no {program} on the PATH: start this on a login node of a Slurm cluster")
