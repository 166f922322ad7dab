"""What bash makes of the scripts that engines are given. Programs stand in for Slurm's, and for the ranks."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from controlbooth.launch.engines import background, kubernetes, slurm
from controlbooth.launch.job.cluster import Cluster
from controlbooth.launch.job.job import Job

SRUN = """\
case "$*" in *"launch check"*) echo check >> calls; exit $(cat checked) ;; esac
echo train >> calls
"""
SILENT = """\
silent=$(cat silent)
if [ $silent -gt 0 ]; then
  echo $((silent - 1)) > silent
  echo "Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
"""
SCONTROL = f"""\
if [ $1 = show ]; then echo n1; exit; fi
echo "$1 $2" >> calls
{SILENT}"""
SQUEUE = f"""\
echo squeue >> calls
{SILENT}cat state
"""
SLEEP = """\
echo "sleep $1" >> calls
"""


class Node:
    """The first node of a job of Slurm that runs the job's script."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.job = Job(
            name="first",
            folder=folder / "first",
            here=folder / "first",
            working_directory=folder,
            cluster=Cluster(engine="slurm", nodes=2, python=sys.executable),
            submitted=0.0,
        )
        for name, text in dict(srun=SRUN, scontrol=SCONTROL, squeue=SQUEUE, sleep=SLEEP).items():
            program = folder / name
            program.write_text(f"#!/bin/sh\ncd {folder}\n{text}")
            program.chmod(0o755)

    def run(self, checked: int = 0, silent: int = 0, state: str = "RUNNING None\n") -> tuple[int, list[str], str]:
        """-> exit status, what was called, and the log.

        checked: status of the check. silent: so many questions to the controller, that it does not answer. state: what
        it says of the job.
        """
        for name, value in dict(checked=checked, silent=silent, state=state, calls="").items():
            (self.folder / name).write_text(str(value))
        variables = dict(
            PATH=f"{self.folder}:{os.environ['PATH']}", SLURM_JOB_ID="42", SLURM_JOB_NODELIST="n[1-2]", SLURM_NODEID="0"
        )
        done = subprocess.run(
            ["bash", "-c", slurm.render(self.job)], env=os.environ | variables, capture_output=True, text=True
        )
        return done.returncode, (self.folder / "calls").read_text().splitlines(), done.stdout + done.stderr


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def test_a_job_goes_on_by_itself_where_its_check_has_lost_a_node_and_ends_where_something_is_wrong(node):
    assert node.run(checked=75)[:2] == (0, ["check", "squeue", "requeue 42"])
    assert node.run(checked=2)[:2] == (2, ["check"])


def test_a_controller_that_restarts_is_asked_again_and_told_again(node):
    status, calls, _ = node.run(silent=2)
    assert status == 0
    assert calls == ["check", "train", "squeue", "sleep 10", "squeue", "sleep 10", "squeue", "requeue 42"]
    status, calls, log = node.run(silent=1000)
    assert status == 1 and calls.count("squeue") == 30 and "requeue 42" not in calls
    assert "controlbooth launch: Slurm does not answer to squeue --noheader --jobs=42" in log


def test_a_requeue_that_was_not_heard_is_repeated(node):
    (node.folder / "squeue").write_text((node.folder / "squeue").read_text() + "echo 1 > silent\n")  # from now on
    status, calls, _ = node.run()
    assert status == 0 and calls[2:] == ["squeue", "requeue 42", "sleep 10", "requeue 42"]


@pytest.mark.parametrize("state", ["COMPLETING None\n", ""])
def test_a_job_that_somebody_has_cancelled_is_not_started_again(node, state):
    status, calls, _ = node.run(state=state)
    assert status == 1 and calls == ["check", "train", "squeue"]


@pytest.mark.parametrize("render", [background.render, slurm.render, kubernetes.render_script])
def test_lines_of_users_may_read_variables_that_nobody_has_set_and_ours_may_not(node, render):
    cluster = node.job.cluster.model_copy(update=dict(setup=('[ -z "$NOBODY_HAS_SET_THIS" ] && echo prepared',)))
    lines = render(replace(node.job, cluster=cluster)).splitlines()
    begin = "\n".join([*lines[: lines.index(cluster.setup[0]) + 2], 'echo "$NOBODY_HAS_SET_THIS" on'])
    done = subprocess.run(["bash", "-c", begin], capture_output=True, text=True)
    assert done.stdout == "prepared\n" and "NOBODY_HAS_SET_THIS: unbound variable" in done.stderr
