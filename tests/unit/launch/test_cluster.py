"""cluster.yaml, what is found before a job is submitted, and what an attempt has come to."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.data.processes.cpus import usable_cpus
from controlbooth.launch.job import job as jobs
from controlbooth.launch.job.cluster import Cluster, Storage, dump_cluster, load_cluster, one_node, shutdown_seconds
from controlbooth.launch.job.job import code_version, settled_manifest
from controlbooth.launch.job.outcome import main as outcome
from controlbooth.launch.job.outcome import of_run, of_subjects
from controlbooth.launch.preflight.cluster import (
    engine_problems,
    kubernetes_problems,
    parse_minutes,
    parse_partition,
    partition_problems,
    path_here,
    paths,
    record_problems,
    server_problems,
    time_problems,
)
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import load_run
from controlbooth.trainer.dreambooth.manifest import load_subjects, settle
from controlbooth.trainer.run.failures import RankHung, RankLost

ROOT = Path(__file__).parents[3]
PARTITION = (
    "PartitionName=low AllowGroups=ALL Default=YES QoS=N/A DefaultTime=NONE GraceTime=40 MaxNodes=UNLIMITED "
    "MaxTime=1-12:30:00 MinNodes=0 Nodes=n[1-2] PreemptMode=REQUEUE State=UP TotalCPUs=8 TotalNodes=2"
)


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


# The file


def test_a_file_fills_the_fields_and_the_rest_has_defaults(tmp_path):
    cluster = load_cluster(write(tmp_path, "nodes: 4\nslurm: {partition: gpu}\nenvironment: {NCCL_DEBUG: 1}"), "slurm")
    assert (cluster.nodes, cluster.slurm.partition, cluster.engine) == (4, "gpu", "slurm")
    assert cluster.environment == {"NCCL_DEBUG": "1"} and shutdown_seconds(cluster) == 240
    assert one_node(cluster).nodes == 4 and load_cluster(None, "slurm") == Cluster(engine="slurm")


def test_the_engine_local_takes_this_machine_where_the_file_says_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nfor number in 0 1 2 3; do echo GPU $number: NVIDIA H100; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    cores = usable_cpus()

    def taken(text: str) -> tuple[int, int, int | None]:
        cluster = load_cluster(write(tmp_path, text), "local")
        assert load_cluster(write(tmp_path, dump_cluster(cluster)), "local") == cluster  # as a job's record is read
        return cluster.processes_per_node, cluster.gpus_per_node, cluster.cores_per_node

    assert taken("") == taken("grace_seconds: 60") == (3, 3, cores) and load_cluster(None, "local").gpus_per_node == 3
    assert taken("gpus_per_node: 2\ncores_per_node: 7") == (2, 2, 7)
    assert taken("processes_per_node: 1") == (1, 3, cores)
    assert taken("gpus_per_node: 0") == (1, 0, cores)  # on the CPU although there are GPUs
    (tmp_path / "nvidia-smi").unlink()
    assert taken("") == (1, 0, cores)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node: 2", "unknown key 'node'; did you mean 'nodes'?"),
        ("slurm: {partitions: gpu}", "unknown key 'slurm.partitions'; did you mean 'slurm.partition'?"),
        ("kubernetes: {storage: [{claims: a, path: /a}]}", "did you mean 'kubernetes.storage.0.claim'?"),
        ("kubernetes: {storage: [{claim: a, path: a}]}", "'kubernetes.storage.0.path' is 'a'"),
        ("nodes: 0", "'nodes' is 0"),
        ("nodes: yes", "yes and no are not taken here"),
        ("environment: {DEBUG: yes}", "'environment.DEBUG' is True"),
        ("engine: kubernetes", "is of engine kubernetes, and this is for slurm. Use `controlbooth launch kubernetes`"),
        ("- nodes", "holds list, but it is a mapping"),
        ("a: b: c", "is not readable as YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_remedy(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_cluster(write(tmp_path, text), "slurm")


def test_a_missing_file_names_those_to_start_from(tmp_path):
    with pytest.raises(ConfigError, match="does not exist. launch/configs/clusters/ has some"):
        load_cluster(tmp_path / "none.yaml", "slurm")


@pytest.mark.parametrize("path", sorted(ROOT.glob("launch/configs/clusters/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_valid(path):
    engine = yaml.safe_load(path.read_text())["engine"]
    assert list(time_problems(load_cluster(path, engine), None)) == []


# Times: a checkpoint < torchrun's wait < the grace < an attempt


@given(
    grace=st.integers(1, 2000),
    wait=st.none() | st.integers(1, 2000),
    checkpoint=st.floats(1, 2000),
    minutes=st.none() | st.integers(1, 60),
)
def test_times_have_no_problem_exactly_when_they_are_in_order(grace, wait, checkpoint, minutes):
    cluster = Cluster(
        grace_seconds=grace, shutdown_seconds=wait, checkpoint_seconds=checkpoint, time_limit_minutes=minutes
    )
    in_order = checkpoint < shutdown_seconds(cluster) < grace and (minutes is None or minutes * 60 > grace + 120)
    assert (list(time_problems(cluster, None)) == []) == in_order


def test_the_checkpoint_is_timed_by_its_size_and_the_storage():
    (problem,) = time_problems(Cluster(grace_seconds=60), checkpoint=20 * 2**30)
    assert problem.startswith(
        "two checkpoints of 20.0 GiB at 200 MB/s take 215 s, and torchrun kills the ranks 48 s after"
    )
    assert "Set grace_seconds to 352 or more" in problem
    assert list(time_problems(Cluster(grace_seconds=352), checkpoint=20 * 2**30)) == []


# Partitions


def test_a_partition_is_read_as_slurm_prints_it():
    one = parse_partition(PARTITION)
    assert (one.name, one.default, one.nodes, one.grace_seconds, one.preempted, one.up) == (
        "low",
        True,
        2,
        40,
        True,
        True,
    )
    assert one.limit_minutes == 36.5 * 60
    assert parse_minutes("UNLIMITED") == float("inf") and parse_minutes("00:30:30") == 30.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(slurm={"partition": "gpu"}), "slurm.partition is 'gpu', which does not exist. There are: low"),
        (dict(nodes=3), "nodes is 3, and partition low has 2"),
        (dict(time_limit_minutes=3000), "time_limit_minutes is 3000, and partition low allows 2190"),
        (dict(grace_seconds=300), "preempted after GraceTime=40 s, and torchrun waits shutdown_seconds=240"),
    ],
)
def test_what_a_partition_does_not_allow_is_told(fields, message):
    cluster = Cluster.model_validate(dict(engine="slurm", grace_seconds=40) | fields)
    (problem,) = partition_problems(cluster, [parse_partition(PARTITION)])
    assert message in problem
    fine = Cluster.model_validate(dict(engine="slurm", grace_seconds=40, nodes=2))
    assert list(partition_problems(fine, [parse_partition(PARTITION)])) == []


def test_a_partition_that_is_down_and_a_missing_default_are_told():
    down = parse_partition(PARTITION.replace("State=UP", "State=DOWN").replace("Default=YES", "Default=NO"))
    cluster = Cluster(engine="slurm", grace_seconds=40)
    (problem,) = partition_problems(cluster, [down])
    assert problem == "slurm.partition is not set, and a default one does not exist. There are: low"
    named = Cluster.model_validate(dict(engine="slurm", grace_seconds=40, slurm={"partition": "low"}))
    (problem,) = partition_problems(named, [down])
    assert "partition low does not start jobs now" in problem


# What pods see

PODS = Cluster.model_validate(
    dict(
        engine="kubernetes",
        kubernetes=dict(
            image="x:1",
            storage=[
                dict(claim="data", path="/data", here="/mnt/nfs"),
                dict(claim="frozen", path="/data/frozen", read_only=True),
            ],
        ),
    )
)


def test_paths_that_pods_do_not_see_are_told():
    good = {"output": Path("/data/runs/a"), "data.sources.0.shards": Path("/data/frozen/train")}
    assert list(kubernetes_problems(PODS, good)) == []
    bad = {"output": Path("/data/frozen/runs"), "data.sources.0.shards": Path("shards/train")}
    first, second = kubernetes_problems(PODS, bad)
    assert (
        first
        == "output is /data/frozen/runs, and the storage frozen at /data/frozen is read_only. Write to another one"
    )
    assert (
        "data.sources.0.shards is shards/train, which pods do not see" in second and "(/data, /data/frozen)" in second
    )


def test_paths_are_named_by_the_field_that_the_run_file_has():
    tree = dict(name="a", max_steps=1, global_batch_size=1, micro_batch_size=1, model=dict(base="miniature"))
    one = build_config(tree | {"data": dict(shards="s", condition="edges")})
    several = build_config(tree | {"data": dict(sources=[dict(shards="s"), dict(shards="t")], condition="edges")})
    assert paths(one).keys() == {"output", "data.shards"}
    assert paths(several).keys() == {"output", "data.sources.0.shards", "data.sources.1.shards"}


def test_all_that_is_wrong_with_a_kubernetes_cluster_is_told(tmp_path, monkeypatch):
    kubectl = tmp_path / "kubectl"
    monkeypatch.setenv("PATH", str(tmp_path))
    image, place, missing = server_problems(PODS.model_copy(update={"kubernetes": _with(PODS.kubernetes, image=None)}))
    assert image.startswith("kubernetes.image is not set: build deploy/Dockerfile")
    assert place.startswith("kubernetes.storage data has here=/mnt/nfs, which is no folder of this machine: mount")
    assert missing.startswith("there is no kubectl on the PATH")
    kubectl.write_text("#!/bin/sh\necho E memcache.go >&2\necho 'The connection to n1:6443 was refused' >&2\nexit 1\n")
    kubectl.chmod(0o755)
    storage = [one.model_copy(update={"here": tmp_path}) for one in PODS.kubernetes.storage]
    there = PODS.model_copy(update={"kubernetes": _with(PODS.kubernetes, storage=storage)})
    (silent,) = server_problems(there)
    assert silent.startswith("Kubernetes does not answer (The connection to n1:6443 was refused). Look which cluster")
    kubectl.write_text("#!/bin/sh\n")
    assert engine_problems(there) == []


def _with(kubernetes, **changes):
    return kubernetes.model_copy(update=changes)


def test_a_place_where_the_jobs_files_cannot_lie_is_told(tmp_path):
    (tmp_path / "file").touch()
    assert list(record_problems(tmp_path / "runs" / "a", None)) == []
    (problem,) = record_problems(tmp_path / "file" / "runs" / "a", None)
    assert "which this machine cannot write: set `here` of that storage" in problem
    (problem,) = record_problems(tmp_path / "gone" / "runs", Storage(claim="a", path=str(tmp_path / "gone")))
    assert f"and this machine has no {tmp_path / 'gone'}: set `here` of that storage" in problem


def test_a_folder_of_pods_is_found_on_this_machine():
    assert path_here(Path("/data/runs/a"), PODS.kubernetes.storage) == Path("/mnt/nfs/runs/a")
    assert path_here(Path("/data/frozen/a"), PODS.kubernetes.storage) == Path("/data/frozen/a")


# What an attempt has come to


def note(folder: Path, name: str, **fields) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(fields))


def test_a_stopped_a_killed_and_a_finished_attempt_are_told_apart(tmp_path):
    assert of_run(tmp_path, 100.0) == ("again", [])  # killed before it wrote anything
    for state, verdict in (("running", "again"), ("stopped", "again"), ("finished", "finished")):
        note(tmp_path, "status.json", state=state, step=3, time=101.0)
        assert of_run(tmp_path, 100.0) == (verdict, [])
    assert of_run(tmp_path, 102.0) == ("again", [])  # it had finished before, and max_steps was raised since


def test_a_rank_that_lost_its_peers_is_tried_again_and_one_with_a_reason_of_its_own_is_not(tmp_path):
    note(tmp_path, "status.json", state="failed", rank=0, error="RuntimeError: Connection closed by peer", time=101.0)
    note(tmp_path, "failed-0.json", rank=0, error="RuntimeError: Connection closed by peer [10.0.0.2]", time=101.0)
    assert of_run(tmp_path, 100.0) == ("again", [])
    for kind in (RankLost, RankHung):
        note(tmp_path, "failed-0.json", rank=0, error=f"{kind.__name__}: rank 0 waits for another", time=101.0)
        assert of_run(tmp_path, 100.0) == ("again", [])
    note(tmp_path, "failed-1.json", rank=1, error="OSError: a checkpoint takes 5 GiB", time=101.0)
    assert of_run(tmp_path, 100.0) == ("failed", ["rank 1: OSError: a checkpoint takes 5 GiB"])
    assert of_run(tmp_path, 102.0) == ("again", [])  # of an earlier attempt


def test_a_task_has_failed_when_all_its_subjects_have_ended_and_one_has_failed(tmp_path):
    def subject(name, **fields):
        note(tmp_path / "subjects" / name, "status.json", **fields)

    subject("a", state="finished")
    assert of_subjects(tmp_path, ["a"]) == ("finished", [])
    subject("b", state="failed", error="no pictures")
    assert of_subjects(tmp_path, ["a", "b"]) == ("failed", ["b: no pictures"])
    assert of_subjects(tmp_path, ["a", "b", "c"])[0] == "again"


def test_the_program_ends_with_a_status_that_engines_understand(tmp_path, capsys):
    assert outcome([str(tmp_path), "--since=0"]) == 75 and capsys.readouterr().out == "again\n"
    note(tmp_path, "status.json", state="finished", step=3, time=1.0)
    assert outcome([str(tmp_path), "--since=0"]) == 0
    note(tmp_path, "failed-0.json", rank=0, error="ConfigError: no", time=1.0)
    assert outcome([str(tmp_path), "--since=0"]) == 1
    assert capsys.readouterr().err == "controlbooth launch: rank 0: ConfigError: no\n"
    (tmp_path / "subjects.jsonl").write_text('{"name": "a"}\n{"name": "b"}\n')
    note(tmp_path / "subjects" / "b", "status.json", state="finished")
    rows = [str(tmp_path), "--since=0", f"--subjects={tmp_path / 'subjects.jsonl'}"]
    assert outcome([*rows, "--rows=1:2"]) == 0 and outcome([*rows, "--rows=0:2"]) == 75
    note(tmp_path / "rows" / "0-2", "failed-0.json", rank=0, error="ConfigError: no base", time=1.0)
    assert outcome([*rows, "--rows=0:2"]) == 1


# The settled manifest


def test_any_slice_of_the_settled_manifest_gives_the_subjects_what_the_whole_would(tmp_path):
    rows = [dict(name=f"s{number}", images=f"pictures/s{number}", class_noun="mug") for number in range(3)]
    rows[1]["instance_prompt"] = "{identifier}, a {{braced}} {class_noun}"
    for row in rows:
        (tmp_path / row["images"]).mkdir(parents=True)
        (tmp_path / row["images"] / "0.png").touch()
    (tmp_path / "subjects.yaml").write_text(yaml.safe_dump(rows))
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(dict(name="a", model=dict(base="miniature"), identifiers=["olis", "sks", "zwx"]))
    )
    config = load_run(tmp_path / "run.yaml")
    whole, _ = settle(load_subjects(tmp_path / "subjects.yaml")[0], config)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "subjects.jsonl").write_text(settled_manifest(whole))
    again, faults = settle(load_subjects(tmp_path / "elsewhere" / "subjects.jsonl")[0][1:], config)
    assert faults == {} and again == whole[1:]


def test_a_start_that_a_newer_one_has_replaced_is_not_started_again(tmp_path, monkeypatch, capsys):
    note(tmp_path, "attempt.json", number=1002, given=1002)
    monkeypatch.setenv("CONTROLBOOTH_ATTEMPT", "1001")
    assert outcome([str(tmp_path), "--since=0"]) == 1 and "has taken" in capsys.readouterr().err
    monkeypatch.setenv("CONTROLBOOTH_ATTEMPT", "1002")
    assert outcome([str(tmp_path), "--since=0"]) == 75


def test_code_is_changed_where_tracked_files_are(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "__file__", str(tmp_path / "job.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "job.py").write_text("one")
    assert code_version()["commit"] is None
    for words in (["init", "-q"], ["add", "job.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "mlflow.db").touch()
    assert code_version()["dirty"] is False and len(code_version()["commit"]) == 40
    (tmp_path / "job.py").write_text("two")
    assert code_version()["dirty"] is True
