"""A run and an array of subjects on a real Slurm of two nodes, disturbed in every way that a cluster has.

`make test-cluster` runs these and prints what each disturbance has cost. Where no Slurm can start they are skipped.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import psutil
import pytest
import studios
import yaml
from tiny import run_tree, weights

from controlbooth.data.scenes import render

pytestmark = pytest.mark.cluster
HERE = Path(__file__).parent
STEPS = 60
GLOBAL_BATCH_SIZE = 8
CHECKPOINT_EVERY = 10
GRACE_SECONDS = 40
CONTROLBOOTH = [str(Path(sys.executable).with_name("controlbooth"))]


@dataclass(frozen=True)
class Cost:
    """Of one disturbance."""

    what: str
    at_step: int
    resumed_at: int
    """Step from which the next attempt went on."""
    redone: int
    """Steps that were taken before, and were lost."""
    seconds: float
    """From the disturbance until a step was taken again."""


def write_run(world: Path, name: str, **data) -> Path:
    tree = run_tree(world, name)
    tree |= dict(max_steps=STEPS, checkpoint=dict(every_steps=CHECKPOINT_EVERY, keep=3))
    tree["data"] |= dict(held_out=None) | data
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_cluster(world: Path, name: str, engine: str, **fields) -> Path:
    (world / f"record-{name}").mkdir()
    environment = {
        "PYTHONPATH": str(HERE / "recording"),
        "RECORD": str(world / f"record-{name}"),
        "GLOBAL_BATCH_SIZE": str(GLOBAL_BATCH_SIZE),
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    path = world / f"{name}.cluster.yaml"
    path.write_text(yaml.safe_dump(dict(engine=engine, environment=environment) | fields))
    return path


def recorded(world: Path, name: str) -> dict[str, list[dict]]:
    """attempt-rank -> its steps: number, time, samples."""
    files = sorted((world / f"record-{name}").glob("*-*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def steps_of(world: Path, name: str, attempt: int) -> list[int]:
    """Steps that an attempt has begun on both ranks."""
    ranks = [recorded(world, name).get(f"{attempt}-{rank}", []) for rank in (0, 1)]
    return [one["step"] for one in min(ranks, key=len)]


def history(world: Path, name: str) -> dict[int, str]:
    """position -> sample key, of the whole run. Asserts that whoever took a position took the same sample."""
    keys: dict[int, str] = {}
    for steps in recorded(world, name).values():
        for position, key in (sample for step in steps for sample in step["samples"]):
            assert keys.setdefault(position, key) == key
    return keys


@pytest.fixture(scope="module")
def undisturbed(world) -> Path:
    """The folder of the same run, in the background of this machine, on two ranks."""
    run = write_run(world, "undisturbed")
    cluster = write_cluster(world, "undisturbed", "local", processes_per_node=2, cores_per_node=2)
    subprocess.run([*CONTROLBOOTH, "launch", "local", str(run), "--cluster", str(cluster)], check=True)
    folder = world / "runs" / "undisturbed"
    followed = subprocess.run(
        [*CONTROLBOOTH, "launch", "logs", str(folder), "--follow"], capture_output=True, text=True
    )
    assert "== finished" in followed.stdout, followed.stdout
    return folder


@pytest.fixture(scope="module")
def disturbed(world, slurm) -> tuple[Path, list[Cost]]:
    """The run's folder, and what each of the disturbances has cost."""
    run = write_run(world, "disturbed")
    cluster = write_cluster(
        world,
        "disturbed",
        "slurm",
        nodes=2,
        cores_per_node=1,  # as many for each rank as in the undisturbed run, since threads share out sums
        time_limit_minutes=30,
        grace_seconds=GRACE_SECONDS,
        shutdown_seconds=20,
        slurm={"partition": "low"},
    )
    folder, hold = world / "runs" / "disturbed", world / "record-disturbed" / "hold"
    costs = []

    def wait_at(step: int, attempt: int) -> None:
        slurm.wait_until(lambda: step in steps_of(world, "disturbed", attempt), 600, f"step {step} has begun")

    def is_pending(job: str) -> bool:
        return "PENDING" in slurm.run("squeue", "-h", "-j", job, "-o", "%T")

    def note(what: str, step: int, attempt: int, began: float, taken: int) -> None:
        """taken: steps that the disturbed attempt had taken: where it was asked to stop, that step and one more, since
        the ranks read what they tell each other of a step while the next one is under way."""
        after = attempt + (what != "controller restarted")

        def new() -> list[dict]:
            return [one for one in recorded(world, "disturbed").get(f"{after}-0", []) if one["time"] > began]

        slurm.wait_until(lambda: len(new()) > 1, 600, f"attempt {after} trains")
        start = new()[0]["step"]
        costs.append(Cost(what, step, start, taken - start, new()[1]["time"] - began))

    hold.write_text("13")
    slurm.run(*CONTROLBOOTH, "launch", "slurm", str(run), "--cluster", str(cluster))
    job = json.loads((folder / "job" / "job.json").read_text())["id"]

    wait_at(13, 1000)
    began = time.time()
    slurm.crash_node("n2")
    slurm.wait_until(lambda: "down" in slurm.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T"), 60, "n2 is down")
    hold.write_text("25")
    slurm.start_node("n2")
    note("node crashed", 13, 1000, began, taken=13)

    wait_at(25, 1001)
    began = time.time()
    urgent = ["--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--output=/dev/null"]
    slurm.run("sbatch", *urgent, "--wrap=sleep 1")
    slurm.wait_until(lambda: is_pending(job), 60, "it is requeued")
    hold.write_text("38")
    note("preempted", 25, 1001, began, taken=27)

    wait_at(38, 1002)
    elapsed = slurm.run("squeue", "-h", "-j", job, "-o", "%M").split(":")
    minutes = (int(elapsed[-2]) * 60 + int(elapsed[-1]) + GRACE_SECONDS + 5) // 60 + 1
    began = time.time()
    slurm.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    slurm.wait_until(lambda: is_pending(job), 150, "it is requeued")
    hold.write_text("50")
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=30")
    note("time limit", 38, 1002, began, taken=40)

    wait_at(50, 1003)
    began = time.time()
    slurm.kill_controller()
    time.sleep(3.0)
    slurm.start_controller()
    hold.unlink()
    note("controller restarted", 50, 1003, began, taken=51)
    slurm.wait_until(lambda: "COMPLETED" in slurm.run("scontrol", "show", "job", job), 600, "the run is finished")
    return folder, costs


def test_a_run_on_two_nodes_survives_crash_preemption_time_limit_and_controller(world, undisturbed, disturbed, capsys):
    folder, costs = disturbed
    with capsys.disabled():
        print(f"\n\n{'disturbance':<22}{'at step':>8}{'went on at':>12}{'steps redone':>14}{'seconds':>9}")
        for one in costs:
            row = f"{one.what:<22}{one.at_step:>8}{one.resumed_at:>12}{one.redone:>14}{one.seconds:>9.1f}"
            print(row)
    assert [one.redone for one in costs] == [3, 0, 0, 0]
    ours, theirs = history(world, "disturbed"), history(world, "undisturbed")
    assert ours == theirs and sorted(ours) == list(range(STEPS * GLOBAL_BATCH_SIZE))
    name = f"checkpoints/step-{STEPS:08d}"
    ours, theirs = weights(folder / name), weights(undisturbed / name)
    assert all((ours[key] == theirs[key]).all() for key in theirs) and ours.keys() == theirs.keys()


def test_status_and_logs_tell_of_all_attempts(slurm, disturbed):
    folder, _ = disturbed
    status = slurm.run(*CONTROLBOOTH, "launch", "status", str(folder))
    assert f"run         disturbed: finished at step {STEPS}" in status and "restarted 3 times" in status
    assert f"checkpoint  step-{STEPS:08d}" in status
    log = slurm.run(*CONTROLBOOTH, "launch", "logs", str(folder))
    assert [line.split(",")[0] for line in log.splitlines() if line.startswith("== attempt")] == [
        f"== attempt {number}" for number in range(1000, 1004)
    ]
    assert "node    1  n2: clock" in log and log.rstrip().splitlines()[-1].startswith("== finished")


def test_a_cancelled_job_ends_with_a_checkpoint_is_not_requeued_and_resumes(slurm, world, disturbed):
    folder = disturbed[0]
    hold = world / "record-disturbed" / "hold"
    hold.write_text("63")
    slurm.run(*CONTROLBOOTH, "launch", "resume", str(folder), "max_steps=70")
    slurm.wait_until(lambda: 63 in steps_of(world, "disturbed", 2000), 600, "step 63 has begun")
    again = subprocess.run(
        slurm.on("ctl", [*CONTROLBOOTH, "launch", "resume", str(folder)]),
        env=slurm.environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and "is being trained by slurm job" in again.stderr
    slurm.run(*CONTROLBOOTH, "launch", "cancel", str(folder))
    job = json.loads((folder / "job" / "job.json").read_text())["id"]
    slurm.wait_until(lambda: "COMPLETED" in slurm.run("scontrol", "show", "job", job), 60, "the job has ended")
    status = slurm.run(*CONTROLBOOTH, "launch", "status", str(folder))
    assert "stopped at step 65" in status and "launch resume" in status and "step-00000065" in status


def test_a_partition_that_does_not_exist_is_refused_with_those_that_do(slurm, world):
    cluster = write_cluster(world, "nowhere", "slurm", slurm={"partition": "gpu"})
    run = write_run(world, "nowhere")
    command = slurm.on("ctl", [*CONTROLBOOTH, "launch", "slurm", str(run), "--cluster", str(cluster)])
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True)
    assert done.returncode == 2 and not (world / "runs" / "nowhere").exists()
    assert "slurm.partition is 'gpu', which does not exist. There are: low, high" in done.stderr


def test_a_node_that_does_not_see_the_shards_ends_the_job_with_its_name(slurm, world):
    """The folder is empty on n2, as where a mount was forgotten."""
    shards = world / "forgotten"
    shutil.copytree(world / "train", shards)
    run = write_run(world, "forgotten", shards=str(shards))
    cluster = write_cluster(world, "forgotten", "slurm", nodes=2, slurm={"partition": "high"})
    daemon = (slurm.folder / "slurmd.n2.pid").read_text().strip()
    hide = ["nsenter", f"--mount=/proc/{daemon}/ns/mnt", "mount", "-t", "tmpfs", "none", str(shards)]
    subprocess.run(hide, check=True)
    folder = world / "runs" / "forgotten"
    slurm.run(*CONTROLBOOTH, "launch", "slurm", str(run), "--cluster", str(cluster))
    log = slurm.run(*CONTROLBOOTH, "launch", "logs", str(folder), "--follow")
    assert f"node 1 (n2): data.shards is {str(shards)!r}: there are no .tar shards" in log
    assert "node 0 (n1): data.shards" not in log and "torch.distributed" not in log
    assert "FAILED" in slurm.run(*CONTROLBOOTH, "launch", "status", str(folder), check=False)


# Subjects


def write_subjects(world: Path) -> Path:
    """Four, with three pictures each."""
    rows = []
    for number in range(4):
        folder = world / "pictures" / f"subject-{number}"
        folder.mkdir(parents=True)
        for shot in range(3):
            picture = render.render(render.scene(70 + number, shot), 64).image
            cv2.imwrite(str(folder / f"{shot}.png"), picture[..., ::-1])
        rows.append(dict(name=folder.name, images=str(folder), class_noun="star"))
    (world / "subjects.yaml").write_text(yaml.safe_dump(rows))
    return world / "subjects.yaml"


def kill_a_rank(words: set[str]) -> bool:
    """SIGKILL to the process that has all these in its command line; whether there is one that is no launcher."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if words <= set(line) and "torch.distributed.run" not in line and "srun" not in line[0]:
            process.kill()
            return True
    return False


def test_an_array_trains_every_subject_and_tries_the_task_that_lost_its_rank_again(slurm, world, capsys):
    subjects = write_subjects(world)
    whole, array = (studios.run_file(world, name, steps=40, subjects_per_batch=2) for name in ("whole", "array"))
    cluster = write_cluster(world, "array", "slurm", cores_per_node=2, slurm={"partition": "high"})
    command = ["launch", "slurm", str(array), "--cluster", str(cluster), "--subjects", str(subjects)]
    slurm.run(*CONTROLBOOTH, *command, "--subjects-per-task", "2")
    folder = world / "runs" / "array"
    state = folder / "rows" / "2-4" / "state" / "of-1" / "rank-0.safetensors"
    slurm.wait_until(
        lambda: state.exists() and state.stat().st_size > 10_000, 600, "the second task has saved its state"
    )
    assert kill_a_rank({"controlbooth.trainer.dreambooth.train", "--rows", "2:4"})
    status = slurm.run(*CONTROLBOOTH, "launch", "status", str(folder))
    assert re.search(r"subjects    4: \d finished, \d training, \d waiting, 0 failed", status)
    log = slurm.run(*CONTROLBOOTH, "launch", "logs", str(folder), "--follow")
    attempts = [line.split(",")[0] for line in log.splitlines() if "== attempt" in line]
    assert sorted(attempts) == ["task 0: == attempt 1000", "task 1: == attempt 1000", "task 1: == attempt 1001"]
    status = slurm.run(*CONTROLBOOTH, "launch", "status", str(folder))
    with capsys.disabled():
        print(f"\n{status}")
    assert "subjects    4: 4 finished, 0 training, 0 waiting, 0 failed" in status
    studios.finish(studios.start(world, whole))
    for number in range(4):
        name = f"subject-{number}"
        assert studios.difference(studios.weights(world, "array", name), studios.weights(world, "whole", name)) < 2e-5
    (one,) = {line.split(": ")[0] for line in slurm.run(
        *CONTROLBOOTH, "launch", "logs", str(folder), "--subject", "subject-3"
    ).splitlines() if line.startswith("== attempt 1001")}  # fmt: skip
    assert one.startswith("== attempt 1001")
