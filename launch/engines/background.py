"""The engine `local`: a job is a script that runs on in the background of this machine, with its log in its folder.

It keeps the contract of the others: an attempt that is lost is started again, one that is stopped says so, a cancelled
one ends with a checkpoint.
"""

import shlex
import signal
import socket
import subprocess
from pathlib import Path

import psutil

from controlbooth.data.errors import UserError
from controlbooth.launch.engines.script import Expanded, echoing, indented, judging, preamble, rows, shell, training
from controlbooth.launch.job.job import Job, JobState
from controlbooth.launch.ranks import child_process


def render(job: Job) -> str:
    """Returns the text of the script; tasks of an array come one after another, each with its own log."""
    log, cancelled = (shlex.quote(str(job.job_folder / name)) for name in ("log-", "cancelled"))
    ends_with_script = [job.python, "-m", child_process.MODULE, Expanded("$$")]
    lines = ["#!/bin/bash", f"# {job.name}, trained by controlbooth; written by `controlbooth launch local`."]
    lines += [*preamble(job), "", WAITING, "", "one_task() {"]
    lines += [f"exec >>{log}$TASK.txt 2>&1", *rows(job, "TASK")] if job.subjects else []
    lines += [
        f"for RESTART in $(seq 0 {job.cluster.restarts}); do",
        f"export CONTROLBOOTH_ATTEMPT=$(({job.first_attempt} + RESTART))",
        "STARTED=$(date +%s)",
        'echo "== attempt $CONTROLBOOTH_ATTEMPT, $(date +%FT%T%z)"',
        f"until_it_ends {shell([*ends_with_script, *training(job, '127.0.0.1:0', '1')])}",
        f"OUTCOME=$({shell(judging(job))})",
        'if [ "$OUTCOME" = again ] && [ -n "$STOPPING" ]; then',
        f"if [ -e {cancelled} ]; then OUTCOME=cancelled; else OUTCOME=stopped; fi",
        'echo "== $OUTCOME, and not started again, $(date +%FT%T%z)"',
        "return 0",
        "fi",
        'echo "== $OUTCOME, $(date +%FT%T%z)"',
        'case "$OUTCOME" in',
        "finished) return 0 ;;",
        "failed) return 1 ;;",
        "esac",
        "done",
        f'echo "== {job.cluster.restarts} restarts are used up. Look above for what ends the attempts; then:"',
        echoing("controlbooth", "launch", "resume", str(job.folder)),
        "return 1",
        "}",
        "",
        "STATUS=0",
        f"for TASK in $(seq 0 {job.tasks - 1}); do",
        'if [ -z "$STOPPING" ]; then one_task || STATUS=1; fi',
        "done",
        "exit $STATUS",
    ]
    return indented(lines)


WAITING = """\
# Asked to stop: the ranks save a checkpoint after their step.
STOPPING=
CHILD=
trap 'STOPPING=1; [ -z "$CHILD" ] || stop_ranks' TERM INT HUP

stop_ranks() {
  # Not torchrun, which would end with a traceback though its ranks end well; but it where it has not started any yet.
  local ranks
  ranks=$(cat "/proc/$CHILD/task/"*/children 2>/dev/null)
  kill -TERM ${ranks:-$CHILD} 2>/dev/null
}

until_it_ends() {
  "$@" &
  CHILD=$!
  [ -z "$STOPPING" ] || stop_ranks
  while kill -0 "$CHILD" 2>/dev/null; do wait "$CHILD"; done  # a signal ends `wait`, and not what it waits for
  CHILD=
}"""


def submit(script: Path) -> str:
    """Starts it in a session of its own. -> PROCESS@BEGAN@HOST, which names it among all machines and times.

    BEGAN: seconds since 1970.
    """
    with (script.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(script)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return f"{process.pid}@{psutil.Process(process.pid).create_time():.2f}@{socket.gethostname()}"


def states(job_id: str) -> list[JobState]:
    """Tells whether the job's process is running. Raises ValueError on another machine than the job's."""
    process = _process(job_id)
    if process is None:
        return [JobState("unknown", "its process has ended")]
    return [JobState("running", f"process {process.pid}", nodes=socket.gethostname())]


def cancel(job_id: str, now: bool) -> None:
    """Sends SIGTERM to the script, so that the job ends with a checkpoint, or kills the script and its ranks.

    Raises ValueError on another machine than the one that it was started on.
    """
    process = _process(job_id)
    if process is None:
        return
    if not now:
        process.send_signal(signal.SIGTERM)
        return
    everything = [process, *process.children(recursive=True)]
    for one in everything:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue  # it ended by itself meanwhile
    psutil.wait_procs(everything, timeout=10)


def _process(job_id: str) -> psutil.Process | None:
    """Finds the process of this id, beginning and host; None where it has ended. Raises ValueError on another host."""
    pid, began, host = job_id.split("@")
    if host != socket.gethostname():
        raise UserError(
            f"local job {job_id} was started on {host}, and this is {socket.gethostname()}, which does not see its "
            f"processes. Go there; if {host} is gone for good, `controlbooth train RUN_FOLDER/job/run.yaml` goes on"
        )
    try:
        process = psutil.Process(int(pid))
        if process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - float(began)) > 1.0:
            return None
    except psutil.NoSuchProcess:
        return None
    return process
