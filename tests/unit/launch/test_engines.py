"""What is asked of Slurm and Kubernetes, and how their answers are read. Programs stand in for their clients."""

import fcntl
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from controlbooth.launch.cli import main as controlbooth
from controlbooth.launch.engines import background, kubernetes, slurm
from controlbooth.launch.follow import describe_states, follow, log_words
from controlbooth.launch.job.cluster import Cluster, dump_cluster
from controlbooth.launch.job.job import Job, JobState, record_of, write_job, write_record


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Puts a program on the PATH that notes its arguments and answers with a text."""

    def install(name: str, answer: str = "", status: int = 0) -> Path:
        calls = tmp_path / f"{name}.calls"
        (tmp_path / f"{name}.answer").write_text(answer)
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho "$*" >> {calls}\n[ {status} = 0 ] || exec /bin/cat {tmp_path}/{name}.answer >&2\n'
            f"/bin/cat {tmp_path}/{name}.answer\n"
        )
        if status:
            program.write_text(f"#!/bin/sh\n/bin/cat {tmp_path}/{name}.answer >&2\nexit {status}\n")
        program.chmod(0o755)
        return calls

    monkeypatch.setenv("PATH", str(tmp_path))
    return install


def test_slurm_gives_an_id_or_its_own_words(client, tmp_path):
    client("sbatch", "42;cluster\n")
    assert slurm.submit(tmp_path / "script.sh") == "42"
    client("sbatch", "sbatch: error: Batch job submission failed: Invalid account", status=1)
    with pytest.raises(ValueError, match="sbatch --parsable .* failed: sbatch: error: .*Invalid account"):
        slurm.submit(tmp_path / "script.sh")


def test_a_machine_without_slurm_says_where_to_start(client, tmp_path):
    with pytest.raises(ValueError, match="there is no sbatch on the PATH: start this on a login node"):
        slurm.submit(tmp_path / "script.sh")
    with pytest.raises(ValueError, match="there is no scontrol on the PATH: start this on a login node"):
        slurm.states("42")


def test_the_tasks_of_an_array_have_a_state_each(client):
    lines = [
        "JobId=44 ArrayJobId=43 ArrayTaskId=0 JobName=a JobState=RUNNING Reason=None Restarts=2 NodeList=n1",
        "JobId=45 ArrayJobId=43 ArrayTaskId=1 JobName=a JobState=TIMEOUT Reason=TimeLimit Restarts=0 NodeList=n2",
        "JobId=43 ArrayJobId=43 ArrayTaskId=2-9 JobName=a JobState=PENDING Reason=Resources Restarts=0 NodeList=(null)",
    ]
    client("scontrol", "\n".join(lines) + "\n")
    states = slurm.states("43")
    assert states == [
        JobState("running", "RUNNING", "n1", 2, 0),
        JobState("failed", "TIMEOUT (TimeLimit)", "n2", 0, 1),
        JobState("waiting", "PENDING (Resources)", "", 0, None),
    ]
    assert describe_states(states) == "1 tasks running, 1 tasks failed, 1 tasks waiting"
    assert describe_states(states[:1]) == "RUNNING on n1, restarted 2 times"


def test_a_job_that_slurm_has_forgotten_is_unknown_and_a_dead_controller_is_an_error(client):
    client("scontrol", "slurm_load_jobs error: Invalid job id specified", status=1)
    assert slurm.states("43")[0].state == "unknown"
    client("scontrol", "Unable to contact slurm controller (connect failure)", status=1)
    with pytest.raises(ValueError, match="Unable to contact slurm controller.*Is slurmctld up?"):
        slurm.states("43")


def test_a_job_is_found_by_its_script_among_others_of_its_name(client, tmp_path):
    script = tmp_path / "a run" / "job" / "script.sh"
    lines = [f"41 {script}", f"43 {script}", "44 /other/job/script.sh", "45 (null)"]
    calls = client("squeue", "\n".join(lines) + "\n")
    assert slurm.find(script, "first") == "43"
    assert calls.read_text() == "--noheader --name=first --format=%F %o\n"
    assert slurm.find(tmp_path / "script.sh", "first") is None


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, "waiting"),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, "waiting"),
        ({"jobsStatus": [{"name": "node", "active": 1, "failed": 0}]}, "running"),
        ({"conditions": [{"type": "Complete", "status": "True"}], "jobsStatus": [{"active": 0}]}, "ended"),
        ({"conditions": [{"type": "Failed", "status": "True", "reason": "x", "message": "y"}]}, "failed"),
        ({"active": 2, "succeeded": 3, "failed": 1}, "running"),  # of an Indexed Job
    ],
)
def test_kubernetes_is_asked_for_a_jobs_conditions(client, status, expected):
    calls = client("kubectl", json.dumps({"kind": "TrainJob", "status": status}))
    assert kubernetes.states("trainjob/first-1", "vision")[0].state == expected
    assert calls.read_text() == "get trainjob/first-1 --namespace vision --ignore-not-found -o json\n"


def test_a_deleted_job_is_unknown_to_kubernetes(client):
    client("kubectl", "")
    assert kubernetes.states("trainjob/first-1", "vision")[0].state == "unknown"


def test_deleting_leaves_pods_their_grace_unless_it_must_be_now(client):
    calls = client("kubectl", "deleted")
    kubernetes.cancel("trainjob/first-1", "vision", now=False)
    kubernetes.cancel("job/pets-1", "vision", now=True)
    assert calls.read_text().splitlines() == [
        "delete trainjob/first-1 --namespace vision --ignore-not-found --wait=false",
        "delete job/pets-1 --namespace vision --ignore-not-found --wait=false",
        "delete pods --namespace vision --selector batch.kubernetes.io/job-name=pets-1 --grace-period=0 --force",
    ]


def test_logs_of_one_task_are_those_of_its_index():
    command = kubernetes.logs_command("job/pets-1", "vision", follow=True, task=3)
    assert "batch.kubernetes.io/job-name=pets-1,batch.kubernetes.io/job-completion-index=3" in command
    assert command[-1] == "--follow"


def test_a_job_in_the_background_of_another_machine_is_not_judged_from_here(tmp_path, monkeypatch):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "script.sh").write_text("sleep 60\n")
    job_id = background.submit(tmp_path / "job" / "script.sh")
    try:
        assert job_id.endswith(f"@{socket.gethostname()}") and background.states(job_id)[0].state == "running"
        with monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "elsewhere")
            for ask in (background.states, lambda one: background.cancel(one, now=True)):
                with pytest.raises(ValueError, match=f"{job_id} was started on .*, and this is elsewhere.*Go there"):
                    ask(job_id)
        assert background.states(job_id)[0].state == "running"
    finally:
        background.cancel(job_id, now=True)
    assert background.states(job_id)[0].state == "unknown"


def test_a_run_that_another_machine_trains_in_its_background_is_not_resumed_here(tmp_path, capsys):
    job = Job(
        name="first", folder=tmp_path, here=tmp_path, working_directory=tmp_path, cluster=Cluster(), submitted=1.0
    )
    write_job(job, {"cluster.yaml": dump_cluster(job.cluster)})
    write_record(tmp_path, record_of(job) | {"id": f"{os.getpid()}@1.00@elsewhere"})
    for verb in ("status", "resume", "cancel"):
        assert controlbooth(["launch", verb, str(tmp_path)]) == 2
        assert "was started on elsewhere, and this is" in capsys.readouterr().err


def test_following_prints_whole_lines_of_all_files_and_the_rest_at_the_end(tmp_path):
    first, second = tmp_path / "0", tmp_path / "1"
    first.write_bytes(b"a\nb")
    answers = iter([True, True, False])

    def more() -> bool:
        if second.exists():
            first.write_bytes(b"a\nbc\nd")
        second.write_bytes(b"x\n")
        return next(answers)

    assert list(follow({"0: ": first, "1: ": second}, more)) == ["0: a", "1: x", "0: bc", "0: d"]


def test_the_last_words_are_those_of_the_last_attempt(tmp_path):
    log = tmp_path / "log.txt"
    assert log_words(log) is None
    first = "rank 0: OSError: old\n== attempt 1001, job 5\nstarting\n 5%|#\rsubjects: 9%|##\n===\n== again, 2026\n"
    log.write_text(first)
    assert log_words(log) == "starting"
    log.write_text(first + "== attempt 1002, job 5\nrank 0: OSError: new\nRoot Cause:\n  see https://\n=====\n")
    assert log_words(log) == "rank 0: OSError: new"


def test_status_of_an_array_tells_of_a_task_that_failed_before_its_first_subject(client, tmp_path, capsys):
    names = [f"s{number}" for number in range(8)]
    cluster = Cluster(engine="slurm")
    job = Job(name="pets", folder=tmp_path / "pets", here=tmp_path / "pets", working_directory=tmp_path,
              cluster=cluster, submitted=100.0, subjects=8, subjects_per_task=2)  # fmt: skip
    rows = "".join(json.dumps({"name": name}) + "\n" for name in names)
    write_job(job, {"subjects.jsonl": rows, "cluster.yaml": dump_cluster(cluster)})
    write_record(job.here, record_of(job) | {"id": "43"})

    def note(path, **fields):
        (job.here / path).parent.mkdir(parents=True, exist_ok=True)
        (job.here / path).write_text(json.dumps(fields))

    for name in names[:2]:
        note(f"subjects/{name}/status.json", state="finished")
    note("subjects/s3/status.json", state="failed", error="no pictures")
    note("subjects/s4/status.json", state="stopped", step=10)
    note("rows/2-4/failed-0.json", rank=0, error="OSError: no space left", time=101.0)  # before s2
    note("rows/6-8/failed-0.json", rank=0, error="OSError: long ago", time=99.0)  # of an earlier submission
    log = "== attempt 1000, job 43_2\nrank 0: ConfigError: unknown key 'step'\n=====\n== failed, 2026\n"
    (job.here / "job" / "log-2.txt").write_text(log)
    client("scontrol", "slurm_load_jobs error: Invalid job id specified", status=1)  # it has forgotten
    assert controlbooth(["launch", "status", str(job.here)]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "subjects    8: 2 finished, 0 training, 4 waiting, 1 failed, 1 stopped",
        "            name  state     step  loss",
        "            s0    finished  0",
        "            s1    finished  0",
        "            s2    waiting   0",
        "            s3    failed    0           no pictures",
        "            s4    stopped   10",
        "            s5    waiting   0",
        "            s6    waiting   0",
        "            s7    waiting   0",
        "            task 1: rank 0: OSError: no space left",
        "            task 2: rank 0: ConfigError: unknown key 'step'",
    ]
    client("scontrol", "JobId=46 ArrayJobId=43 ArrayTaskId=3 JobState=TIMEOUT Reason=TimeLimit Restarts=0 NodeList=n2")
    assert controlbooth(["launch", "status", str(job.here)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "            task 3: TIMEOUT (TimeLimit)"


# Whole verbs


@pytest.fixture
def run(tmp_path) -> Path:
    """A run file without a fault, whose paths lie below /data on pods, and here in a temporary folder."""
    for name in ("train/a.tar", "held/b.tar"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(bytes(1024))  # an empty tar
    tree = dict(
        name="first",
        output=str(tmp_path / "data" / "runs"),
        max_steps=10,
        global_batch_size=8,
        micro_batch_size=2,
        model=dict(base="miniature"),
        data=dict(
            shards=str(tmp_path / "data" / "train"),
            held_out=str(tmp_path / "data" / "held"),
            condition="edges",
            resolution=64,
        ),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


PARTITIONS = "PartitionName=low Default=YES GraceTime=0 MaxTime=UNLIMITED PreemptMode=OFF State=UP TotalNodes=2\n"


def test_a_dry_run_prints_the_script_and_all_problems_and_writes_nothing(client, run, tmp_path, capsys):
    client("sbatch")
    client("scontrol", PARTITIONS)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("engine: slurm\nnodes: 2\nprocesses_per_node: 2\n")
    words = ["launch", "slurm", str(run), "--cluster", str(cluster), "--dry-run"]
    assert controlbooth(words) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("#!/bin/bash\n#SBATCH --job-name=first\n") and shown.err == ""
    cluster.write_text("engine: slurm\nnodes: 3\ngrace_seconds: 60\nshutdown_seconds: 60\nslurm: {partition: gpu}\n")
    assert controlbooth([*words, "data.shards=/nowhere"]) == 2
    problems = capsys.readouterr().err
    for part in ("global_batch_size=8", "'/nowhere'", "shutdown_seconds is 60", "does not exist. There are: low"):
        assert part in problems
    assert not (tmp_path / "data" / "runs").exists()


def test_a_job_in_the_background_takes_the_gpus_of_this_machine(client, run, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    client("nvidia-smi", "GPU 0: NVIDIA H100\nGPU 1: NVIDIA H100\n")
    assert controlbooth(["launch", "local", str(run), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "--nproc-per-node=2" in shown and "DS_ACCELERATOR" not in shown
    assert controlbooth(["launch", "local", "--help"]) == 0
    assert "default: all GPUs and cores of this machine" in " ".join(capsys.readouterr().out.split())


def test_the_cache_on_a_nodes_own_disk_is_not_looked_for_where_the_job_is_submitted(client, run, tmp_path, capsys):
    client("sbatch")
    client("scontrol", PARTITIONS)
    (tmp_path / "scratch").touch()  # a folder on the nodes, and none here
    words = ["launch", "slurm", str(run), "--dry-run", f"data.cache={tmp_path / 'scratch' / 'cache'}"]
    assert controlbooth(words) == 0
    assert controlbooth([*words[:1], "check", str(run), words[-1]]) == 2  # on a node
    assert "is no folder that can be written to. Change data.cache" in capsys.readouterr().err


def test_a_refused_job_leaves_no_record_of_one(client, run, tmp_path, capsys):
    client("sbatch", "sbatch: error: Invalid account", status=1)
    client("scontrol", PARTITIONS)
    assert controlbooth(["launch", "slurm", str(run)]) == 2
    assert "sbatch: error: Invalid account" in capsys.readouterr().err
    assert not (tmp_path / "data/runs/first/job/job.json").exists()


def test_paths_of_a_resumed_run_start_from_where_it_was_launched(client, run, tmp_path, monkeypatch, capsys):
    client("sbatch", "42\n")
    client("scontrol")
    failed = "JobId=42 JobState=FAILED Reason=None Restarts=0 NodeList=n1"
    answers = f"case $2 in job) echo {failed} ;; *) echo {PARTITIONS.strip()} ;; esac"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{answers}\n")
    project = tmp_path / "data"
    monkeypatch.chdir(project)
    assert controlbooth(["launch", "slurm", str(run), "data.shards=train", "output=runs"]) == 0
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    assert controlbooth(["launch", "resume", "../runs/first"]) == 0
    assert Path.cwd() == project / "elsewhere" and list(Path.cwd().iterdir()) == []
    assert f"cd {project} || exit 1" in (project / "runs/first/job/script.sh").read_text()
    record = json.loads((project / "runs/first/job/job.json").read_text())
    write_record(project / "runs/first", record | {"working_directory": "/gone"})
    assert controlbooth(["launch", "resume", "../runs/first"]) == 2
    assert "start from /gone, which this machine does not see" in capsys.readouterr().err


@pytest.fixture
def pods(tmp_path) -> list[str]:
    """The option that names a file of pods that see /data as this machine does."""
    tree = dict(image="x:1", namespace="vision", storage=[dict(claim="data", path=str(tmp_path / "data"))])
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump(dict(engine="kubernetes", nodes=2, kubernetes=tree)))
    return ["--cluster", str(cluster)]


def recorded_id(folder: Path) -> str:
    return json.loads((folder / "job" / "job.json").read_text())["id"]


def test_a_run_goes_to_kubernetes_and_is_followed_ended_and_resumed(client, run, pods, tmp_path, capsys):
    calls = client("kubectl", json.dumps({"status": {"jobsStatus": [{"active": 2}]}}))
    folder = tmp_path / "data" / "runs" / "first"
    assert controlbooth(["launch", "kubernetes", str(run), *pods]) == 0
    manifests = folder / "job" / "manifests.yaml"
    assert calls.read_text() == f"version --request-timeout=10s\ncreate --validate=strict -f {manifests}\n"
    assert [one["kind"] for one in yaml.safe_load_all(manifests.read_text())] == [
        "ConfigMap",
        "TrainingRuntime",
        "TrainJob",
    ]
    first = recorded_id(folder)
    assert re.fullmatch(r"trainjob/first-[0-9a-f]{8}-1", first)
    assert {one["metadata"]["name"] for one in yaml.safe_load_all(manifests.read_text())} == {first.split("/")[1]}
    assert controlbooth(["launch", "status", str(folder)]) == 0
    assert f"kubernetes {first}, submission 1: 2 active" in capsys.readouterr().out
    assert f"get {first} --namespace vision" in calls.read_text()
    assert controlbooth(["launch", "resume", str(folder)]) == 2
    assert f"is being trained by kubernetes job {first}" in capsys.readouterr().err
    assert controlbooth(["launch", "cancel", str(folder)]) == 0
    assert f"delete {first} --namespace vision" in calls.read_text()
    client("kubectl", "")
    assert controlbooth(["launch", "resume", str(folder), "max_steps=20"]) == 0
    assert re.fullmatch(r"trainjob/first-[0-9a-f]{8}-2", recorded_id(folder)) and recorded_id(folder)[:-2] != first[:-2]
    assert "max_steps: 20" in (folder / "job" / "run.yaml").read_text()
    assert not (folder / "job" / "cancelled").exists()


def test_runs_of_one_name_share_no_objects_in_other_folders_nor_after_their_folder_was_deleted(client, run, pods):
    client("kubectl", "")
    folders = [run.parent / "data" / place / "first" for place in ("runs", "other", "runs")]
    names = set()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        assert controlbooth(["launch", "kubernetes", str(run), *pods, f"output={folder.parent}"]) == 0
        names.add(recorded_id(folder))
    assert len(names) == 3 and all(name.endswith("-1") for name in names)


REFUSING = """#!/bin/sh
case $1 in
  version) echo v1.33 ;;
  create) echo 'Error from server (AlreadyExists): configmaps "first" already exists' >&2; exit 1 ;;
  get) %s ;;
esac
"""


def test_a_job_that_the_server_refuses_leaves_nothing_and_not_what_it_had_overwritten(client, run, pods, capsys):
    client("kubectl")
    kubectl, folder = run.parent / "kubectl", run.parent / "data/runs/first"
    kubectl.write_text(REFUSING % ":")
    assert controlbooth(["launch", "kubernetes", str(run), *pods]) == 2
    assert "kubectl create" in (message := capsys.readouterr().err) and "AlreadyExists" in message
    assert not folder.exists()
    kubectl.write_text(
        REFUSING % """echo "error: the server doesn't have a resource type \\"trainjob\\"" >&2; exit 1"""
    )
    assert controlbooth(["launch", "kubernetes", str(run), *pods]) == 2 and not folder.exists()
    kubectl.write_text("#!/bin/sh\n")
    assert controlbooth(["launch", "kubernetes", str(run), *pods]) == 0
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    kubectl.write_text(REFUSING % ":")
    assert controlbooth(["launch", "kubernetes", str(run), *pods, "max_steps=99"]) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept


def test_a_job_that_may_have_been_taken_is_not_called_started_and_is_asked_for(client, run, pods, capsys):
    client("kubectl")
    kubectl, folder = run.parent / "kubectl", run.parent / "data/runs/first"
    kubectl.write_text(REFUSING % "echo 'Unable to connect' >&2; exit 1")
    assert controlbooth(["launch", "kubernetes", str(run), *pods]) == 2
    capsys.readouterr()
    assert controlbooth(["launch", "status", str(folder)]) == 2
    message = capsys.readouterr().err
    assert f"whether kubernetes has taken the job of {folder}" in message and "cannot be told now" in message
    kubectl.write_text("#!/bin/sh\n")
    assert controlbooth(["launch", "status", str(folder)]) == 2
    assert "no job was submitted for it" in capsys.readouterr().err


def test_a_dry_run_for_kubernetes_tells_of_a_run_that_is_at_work(client, run, pods, capsys):
    client("kubectl", json.dumps({"status": {"jobsStatus": [{"active": 2}]}}))
    folder = run.parent / "data/runs/first"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert controlbooth(["launch", "kubernetes", str(run), *pods, "--dry-run"]) == 2
        assert f"{folder} is in use by another training" in capsys.readouterr().err
    assert controlbooth(["launch", "kubernetes", str(run), *pods]) == 0
    capsys.readouterr()
    assert controlbooth(["launch", "kubernetes", str(run), *pods, "--dry-run"]) == 2
    assert f"{folder} is being trained by kubernetes job trainjob/first-" in capsys.readouterr().err
