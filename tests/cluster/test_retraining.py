"""A round of retraining that trains as a job of a real Slurm."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from retrainings import Retraining

from controlbooth.deploy.retrain.lease import give_back, holder
from controlbooth.deploy.retrain.policy import state_folder
from controlbooth.deploy.retrain.registry import CHALLENGER, CHAMPION

pytestmark = pytest.mark.cluster
CONTROLBOOTH = str(Path(sys.executable).with_name("controlbooth"))


def test_a_round_is_trained_by_slurm_and_promoted_although_the_tick_that_submitted_it_was_killed(
    slurm, world, tmp_path, capsys
):
    here = Retraining(world, tmp_path, "clustered", engine="slurm", processes=None)
    here.add_shard(0)
    environment = {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "DS_ACCELERATOR": "cpu"}
    cluster = dict(engine="slurm", cores_per_node=2, environment=environment, slurm=dict(partition="high"))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\n{shutil.which("sbatch", path=slurm.environment["PATH"])} "$@"\nkill -9 $PPID\n')
    sbatch.chmod(0o755)

    def tick(host: str, path: str = "", *options: str) -> subprocess.CompletedProcess[str]:
        command = slurm.on(host, [CONTROLBOOTH, "retrain", "tick", str(here.path), *options])
        both = slurm.environment | {"PATH": f"{path}{slurm.environment['PATH']}"}
        done = subprocess.run(command, env=both, cwd=tmp_path, capture_output=True, text=True)
        with capsys.disabled():
            print(f"\n{host}: {done.stdout}{done.stderr}", end="")
        return done

    assert tick("ctl", f"{sbatch.parent}:").returncode == -9
    run = tmp_path / "runs" / "clustered-0001"
    assert not (run / "job" / "job.json").exists() and here.rounds[0].submissions == 0
    folder = state_folder(here.policy)
    lease = holder(folder)
    assert lease is not None
    give_back(folder, lease)  # the next tick would wait until it has expired

    other = tick("n1")
    assert other.returncode == 0 and "round 1 trains" in other.stdout and "slurm job" in other.stdout
    job = json.loads((run / "job" / "job.json").read_text())["id"]
    assert slurm.run("squeue", "--noheader", "--all", "--format=%i").split() == [job]
    slurm.wait_until(lambda: "COMPLETED" in slurm.run("scontrol", "show", "job", job), 300, "the round is trained")
    assert tick("ctl").returncode == 0
    assert here.decisions == [(1, "started"), (1, "promoted")]
    assert here.aliases() == {CHAMPION: 1, CHALLENGER: 1}
    assert (run / "job" / "log.txt").read_text().count("== attempt") == 1
