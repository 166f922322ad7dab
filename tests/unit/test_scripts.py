"""What bash makes of the scripts that engines are given. Programs stand in for Slurm's, and for the ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from controlbooth.launch import slurm
from controlbooth.launch.cluster import Cluster
from controlbooth.launch.job import Job

SRUN = """\
case "$*" in *"launch check"*) echo check >> calls; exit $(cat checked) ;; esac
echo train >> calls
"""
SCONTROL = """\
case $1 in show) echo n1 ;; *) echo "$1 $2" >> calls ;; esac
"""
SQUEUE = """\
echo RUNNING None
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
        self.says("checked", "0")
        for name, text in dict(srun=SRUN, scontrol=SCONTROL, squeue=SQUEUE).items():
            program = folder / name
            program.write_text(f"#!/bin/sh\ncd {folder}\n{text}")
            program.chmod(0o755)

    def says(self, what: str, text: str) -> None:
        (self.folder / what).write_text(text)

    def run(self) -> subprocess.CompletedProcess:
        variables = dict(
            PATH=f"{self.folder}:{os.environ['PATH']}", SLURM_JOB_ID="42", SLURM_JOB_NODELIST="n[1-2]", SLURM_NODEID="0"
        )
        script = slurm.render(self.job)
        return subprocess.run(["bash", "-c", script], env=os.environ | variables, capture_output=True, text=True)

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def test_a_job_goes_on_by_itself_where_its_check_has_lost_a_node_and_ends_where_something_is_wrong(node):
    node.says("checked", "75")
    assert node.run().returncode == 0
    assert node.calls == ["check", "requeue 42"]
    (node.folder / "calls").unlink()
    node.says("checked", "2")
    assert node.run().returncode == 2
    assert node.calls == ["check"]
