"""Rounds that train as jobs of Slurm or Kubernetes. Programs stand in for their clients, and nothing is trained."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from policies import World, pack_scenes

from controlbooth.deploy.retrain import audit
from controlbooth.deploy.retrain.lease import give_back, holder
from controlbooth.deploy.retrain.policy import state_folder
from controlbooth.deploy.retrain.rounds import read_state
from controlbooth.launch import cli

PARTITIONS = "PartitionName=low Default=YES GraceTime=0 MaxTime=UNLIMITED PreemptMode=OFF State=UP TotalNodes=2"
SBATCH = """\
echo "$2" >> sbatch.calls
id=$((41 + $(wc -l < sbatch.calls)))
echo "$id $2" > queue
echo "JobId=$id JobState=RUNNING Reason=None Restarts=0 NodeList=n1" > job
if [ -e die ]; then rm die; kill -9 $PPID; fi
echo $id
"""
SCONTROL = """\
if [ -e silent ]; then echo "Unable to contact slurm controller (connect failure)" >&2; exit 1; fi
case $2 in partition) cat partitions ;; *) cat job ;; esac
"""
KUBECTL = """\
echo "$1 $2" >> kubectl.calls
case $1 in
  create)
    echo '{"status": {"jobsStatus": [{"active": 2}]}}' > object
    if [ -e die ]; then rm die; kill -9 $PPID; fi ;;
  get) cat object ;;
esac
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_scenes(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def mlflow_store(tmp_path_factory):
    """One for all policies here, which have names of their own: to make one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


class Clustered(World):
    """A policy whose rounds are jobs, and its scheduler: files in which the programs look up what they answer."""

    def __init__(self, packed, folder, name, engine, store):
        self.scheduler = folder / "scheduler"
        self.scheduler.mkdir()
        self.name, self.engine, self.store = name, engine, store
        super().__init__(packed, folder)
        for program, text in (
            ("sbatch", SBATCH), ("scontrol", SCONTROL), ("squeue", "cat queue\n"), ("kubectl", KUBECTL),
        ):  # fmt: skip
            path = self.scheduler / program
            path.write_text(f"#!/bin/sh\ncd {self.scheduler}\n{text}")
            path.chmod(0o755)
        for name, text in (("partitions", PARTITIONS), ("queue", ""), ("job", ""), ("object", "")):
            (self.scheduler / name).write_text(f"{text}\n" if text else "")

    def write(self, **changes):
        fields = dict(name=self.name, engine=self.engine, changes=[f"tracking.uri={self.store}"], resumes=1)
        super().write(**fields | changes)

    def cluster(self, **fields):
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(dict(engine=self.engine) | fields))

    def tick(self, *options):
        return cli.main(["retrain", "tick", str(self.path), *options])

    def killed_while_submitting(self):
        """A tick that dies when the engine has the job, and before it could write that down."""
        (self.scheduler / "die").touch()
        command = [sys.executable, "-m", "controlbooth.launch.cli", "retrain", "tick", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        lease = holder(state_folder(self.policy))
        assert lease is not None
        give_back(state_folder(self.policy), lease)  # the next one would wait until it has expired

    def ends(self, state):
        """What Slurm says of a job from now on."""
        (self.scheduler / "queue").write_text("")
        (self.scheduler / "job").write_text(f"JobId=42 JobState={state} Reason=None Restarts=0 NodeList=n1\n")

    def calls(self, program):
        path = self.scheduler / f"{program}.calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def run(self):
        return self.folder / "runs" / f"{self.name}-0001"

    @property
    def record(self):
        return json.loads((self.run / "job" / "job.json").read_text())

    @property
    def decisions(self):
        return [(one["decision"], one["reason"]) for one in audit.read(state_folder(self.policy))]


@pytest.fixture
def clustered(packed, tmp_path, mlflow_store, monkeypatch):
    def make(name, engine="slurm"):
        world = Clustered(packed, tmp_path, name, engine, mlflow_store)
        monkeypatch.setenv("PATH", f"{world.scheduler}:/usr/bin:/bin")
        return world

    return make


def note(folder: Path, name: str, **fields):
    (folder / name).write_text(json.dumps(fields))


@pytest.mark.slow
def test_a_round_is_submitted_told_reaped_resumed_and_given_up_with_its_last_words(clustered, monkeypatch, capsys):
    world = clustered("story")
    world.cluster(nodes=2)
    assert world.tick("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "would start round 1" in shown and "#SBATCH --job-name=story-0001\n#SBATCH --nodes=2\n" in shown
    assert world.calls("sbatch") == [] and not world.run.exists() and not (world.folder / "state").exists()

    assert world.tick() == 0
    assert world.calls("sbatch") == [str(world.run / "job" / "script.sh")]
    assert world.record["id"] == "42" and world.record["submission"] == 1
    assert cli.main(["launch", "status", str(world.run)]) == 0
    assert "slurm 42, submission 1: RUNNING on n1" in capsys.readouterr().out

    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert world.tick() == 0
    assert "round 1 trains: step 0" in (shown := capsys.readouterr().out) and "slurm job 42: RUNNING on n1" in shown

    # It dies: of another submission, of other settings, goes on.
    note(world.run, "status.json", state="running", step=2, time=1.0)
    (world.run / "job" / "log.txt").write_text("slurmstepd: error: Detected 1 oom_kill event\n== failed, 2026\n")
    world.ends("OUT_OF_MEMORY")
    world.cluster(nodes=1)
    assert world.tick("--dry-run") == 0
    assert "would start round 1 again" in (shown := capsys.readouterr().out) and "#SBATCH --nodes=1\n" in shown
    assert world.tick() == 0
    (_, reaped), (_, resumed) = world.decisions[1:]
    assert "slurm job 42: OUT_OF_MEMORY on n1; slurmstepd: error: Detected 1 oom_kill event" in reaped
    assert "start 2" in resumed and (world.record["id"], world.record["submission"]) == ("43", 2)
    assert json.loads((world.run / "status.json").read_text())["state"] == "failed"
    assert "CONTROLBOOTH_ATTEMPT=$((2000 +" in (world.run / "job" / "script.sh").read_text()

    note(world.run, "failed-1.json", rank=1, error="ConfigError: no such base", time=world.record["submitted"] + 1)
    world.ends("FAILED")
    assert world.tick() == 4
    decision, reason = world.decisions[-1]
    assert decision == "failed" and "it died 2 times, and resumes=1" in reason
    assert "FAILED on n1; rank 1: ConfigError: no such base" in reason and f"launch logs {world.run}" in reason
    assert len(world.calls("sbatch")) == 2


@pytest.mark.slow
def test_a_tick_that_is_killed_between_submitting_and_writing_it_down_is_not_repeated(clustered, capsys):
    world = clustered("killed")
    world.cluster()
    world.killed_while_submitting()
    assert read_state(state_folder(world.policy), 0.0).rounds[0].submissions == 0
    assert not (world.run / "job" / "job.json").exists()

    assert world.tick("--dry-run") == 0 and cli.main(["launch", "status", str(world.run)]) == 0
    shown = capsys.readouterr().out
    assert "round 1 trains" in shown and "started 1 time" in shown and "slurm 42, submission 1" in shown
    assert not (world.run / "job" / "job.json").exists()  # looking changes nothing
    assert world.tick() == 0
    assert (world.record["id"], world.record["submission"]) == ("42", 1)
    assert not (world.run / "job" / "submitting.json").exists()

    # The same while it submits a dead round again, whose record is of the job before.
    world.ends("NODE_FAIL")
    world.killed_while_submitting()
    assert world.record["id"] == "42"
    assert world.tick() == 0
    assert (world.record["id"], world.record["submission"]) == ("43", 2)
    assert len(world.calls("sbatch")) == 2
    assert cli.main(["launch", "resume", str(world.run)]) == 2
    assert "is being trained by slurm job 43" in capsys.readouterr().err


def test_a_job_that_a_person_has_cancelled_is_not_started_again(clustered, capsys):
    world = clustered("cancelled")
    world.cluster()
    assert world.tick() == 0
    (world.run / "job" / "cancelled").touch()
    assert world.tick() == 0  # its ranks are still saving
    assert "round 1 trains" in capsys.readouterr().out
    world.ends("COMPLETED")
    assert world.tick("--dry-run") == 0
    assert "would give up round 1, whose job was cancelled" in capsys.readouterr().out
    assert world.tick() == 4
    assert world.decisions[-1][1].startswith("its job was cancelled. slurm job 42: COMPLETED on n1")
    assert len(world.calls("sbatch")) == 1


def test_what_cannot_be_submitted_is_said_at_start_up_with_the_remedy(clustered, monkeypatch, capsys):
    world = clustered("refused")
    assert world.tick() == 2
    assert "cluster.yaml does not exist. launch/configs/clusters/ has some to start from" in capsys.readouterr().err
    world.cluster(slurm=dict(partition="gpu"))
    for options in ((), ("--dry-run",)):
        assert world.tick(*options) == 2
        assert "slurm.partition is 'gpu', which does not exist. There are: low" in capsys.readouterr().err
    world.cluster()
    (world.scheduler / "silent").touch()
    assert world.tick() == 2
    assert "Slurm does not answer: Unable to contact slurm controller" in capsys.readouterr().err
    (world.scheduler / "silent").unlink()
    assert world.calls("sbatch") == [] and read_state(state_folder(world.policy), 0.0).rounds == ()

    assert world.tick() == 0
    (world.scheduler / "silent").touch()
    assert world.tick() == 2  # whether the job lives is not known, so nothing is done
    assert "Is slurmctld up?" in capsys.readouterr().err
    (world.scheduler / "silent").unlink()
    world.ends("FAILED")
    world.write(engine="local")
    assert world.tick() == 2
    assert "round 1 was begun with engine=slurm, and the policy says local" in capsys.readouterr().err
    assert len(world.calls("sbatch")) == 1


@pytest.mark.slow
def test_a_round_on_kubernetes_is_created_once_although_its_tick_was_killed(clustered, capsys):
    world = clustered("pods", engine="kubernetes")
    world.cluster(kubernetes=dict(image="x:1"))
    assert world.tick() == 2
    assert "which pods do not see: it must be an absolute path below one of" in capsys.readouterr().err
    storage = [dict(claim="data", path=str(place)) for place in (world.folder, world.packed)]
    world.cluster(nodes=2, kubernetes=dict(image="x:1", storage=storage))
    assert world.tick("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "kind: TrainJob" in shown and "rounds/0001/manifest.jsonl" in shown
    world.killed_while_submitting()
    assert world.tick() == 0
    first = world.record["id"]
    assert re.fullmatch(r"trainjob/pods-0001-[0-9a-f]{8}-1", first)
    assert f"name: {first.split('/')[1]}\n" in (world.run / "job" / "manifests.yaml").read_text()
    assert f"kubernetes job {first}: 2 active" in capsys.readouterr().out
    assert [call.split()[0] for call in world.calls("kubectl")].count("create") == 1

    (world.scheduler / "object").write_text("")  # somebody has deleted it
    assert world.tick() == 0
    assert "the cluster has no such object any more" in world.decisions[-2][1]
    assert re.fullmatch(r"trainjob/pods-0001-[0-9a-f]{8}-2", world.record["id"])
