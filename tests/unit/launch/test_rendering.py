"""What engines are given, as whole texts in rendered/, and every manifest checked as strictly as offline can be.

A text that is to change: delete its file, run this test, which writes it anew and fails once, and read the difference.
"""

import copy
import subprocess
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from croniter import croniter

from controlbooth.launch.engines import background, kubernetes, slurm
from controlbooth.launch.job.cluster import Cluster
from controlbooth.launch.job.job import Job, task_rows

HERE = Path(__file__).parent
DEPLOY = HERE.parents[2] / "deploy"
KUBERNETES = "1.31"
FIELDS = dict(
    local=dict(processes_per_node=2, restarts=3),
    slurm=dict(
        nodes=2,
        processes_per_node=8,
        gpus_per_node=8,
        cores_per_node=96,
        memory_gib_per_node=512,
        time_limit_minutes=1440,
        setup=["module load cuda"],
        environment={"NCCL_DEBUG": "WARN", "TITLE": "it's 5 $"},
        slurm=dict(partition="gpu", account="vision"),
    ),
    kubernetes=dict(
        nodes=2,
        processes_per_node=8,
        gpus_per_node=8,
        cores_per_node=96,
        memory_gib_per_node=512,
        time_limit_minutes=1440,
        kubernetes=dict(
            image="registry.example/controlbooth:0.1.0",
            queue="training",
            storage=[dict(claim="data", path="/data"), dict(claim="bases", path="/bases", read_only=True)],
            secrets=["store"],
        ),
    ),
)
RENDER = dict(
    local=background.render,
    slurm=slurm.render,
    kubernetes=lambda job: kubernetes.render(job, {"run.yaml": "name: First_Run\nmax_steps: 10\n"}),
)
ENUMS = {  # field -> what Kubernetes, JobSet and Kubeflow Trainer take, where their schemas name a string only
    "accessModes": {"ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"},
    "action": {"FailJob", "FailIndex", "Ignore", "Count"}  # of Jobs, then of JobSets
    | {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "completionMode": {"Indexed", "NonIndexed"},
    "concurrencyPolicy": {"Allow", "Forbid", "Replace"},
    "medium": {"", "Memory"},
    "onJobFailureReasons": {
        "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy",
    },
    "operator": {"In", "NotIn"},
    "podReplacementPolicy": {"Failed", "TerminatingOrFailed"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
}  # fmt: skip


def job(engine: str, subjects: int = 0) -> Job:
    cluster = Cluster.model_validate(dict(engine=engine, python="/venv/bin/python") | FIELDS[engine])
    if engine == "slurm" and subjects:
        cluster = cluster.model_copy(update={"nodes": 1})
    return Job(
        name="First_Run",
        folder=Path("/data/runs/First_Run"),
        here=Path("/data/runs/First_Run"),
        working_directory=Path("/" if engine == "kubernetes" else "/data/my project"),
        cluster=cluster,
        submitted=1e9,
        submission=2,
        subjects=subjects,
        subjects_per_task=8 if subjects else 0,
    )


@pytest.mark.parametrize("subjects", [0, 20], ids=["run", "subjects"])
@pytest.mark.parametrize("engine", FIELDS)
def test_what_is_rendered_is_what_was_read_and_approved(engine, subjects):
    text = RENDER[engine](job(engine, subjects))
    approved = (
        HERE / "rendered" / f"{engine}-{'subjects' if subjects else 'run'}.{'yaml' if engine == 'kubernetes' else 'sh'}"
    )
    if not approved.exists():
        approved.write_text(text)
        pytest.fail(f"{approved} was written: read it, and run this again")
    assert text == approved.read_text()


@pytest.mark.parametrize("subjects", [0, 20], ids=["run", "subjects"])
@pytest.mark.parametrize("engine", FIELDS)
def test_bash_reads_every_script(engine, subjects):
    one = job(engine, subjects)
    script = kubernetes.render_script(one) if engine == "kubernetes" else RENDER[engine](one)
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_words_of_users_reach_the_ranks_as_they_were_written():
    script = "\n".join(line for line in slurm.render(job("slurm")).splitlines() if line.startswith("export TITLE"))
    done = subprocess.run(["bash", "-c", f'{script}; printf %s "$TITLE"'], capture_output=True, text=True)
    assert done.stdout == "it's 5 $"


def test_tasks_of_an_array_share_out_all_rows_and_the_script_counts_alike():
    shares = [task_rows(task, 8, 20) for task in range(job("slurm", 20).tasks)]
    assert [row for share in shares for row in share] == list(range(20))
    lines = [
        line
        for line in slurm.render(job("slurm", 20)).splitlines()
        if line.startswith(("FIRST=", "END=", "export ROWS"))
    ]
    for task, share in enumerate(shares):
        program = "\n".join([f"SLURM_ARRAY_TASK_ID={task}", *lines, 'printf %s "$ROWS"'])
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
        assert done.stdout == f"{share.start}:{share.stop}"


def test_attempts_of_a_later_submission_have_higher_numbers():
    assert job("slurm").first_attempt == 2000 > 1000 + job("slurm").cluster.restarts


@pytest.mark.parametrize(
    ("name", "expected"),
    [("First_Run", "first-run"), ("7.shapes", "run-7-shapes"), ("x" * 80, "x" * 27), ("a--", "a"), ("__", "run")],
)
def test_objects_have_names_that_kubernetes_takes(name, expected):
    words, digest, submission = kubernetes.object_name(replace(job("kubernetes"), name=name)).rsplit("-", 2)
    assert (words, submission) == (expected, "2") and len(digest) == 8


def test_names_of_objects_differ_between_folders_and_times():
    one = job("kubernetes")
    others = (one, replace(one, folder=Path("/data/others/First_Run")), replace(one, submitted=one.submitted + 1e-6))
    assert len({kubernetes.object_name(other) for other in others}) == 3


# Manifests


def test_the_time_limit_is_of_one_attempt_and_not_of_a_whole_batch_of_subjects():
    (batch,) = (one["spec"] for one in yaml.safe_load_all(RENDER["kubernetes"](job("kubernetes", 20))) if "spec" in one)
    assert "activeDeadlineSeconds" not in batch
    assert batch["template"]["spec"]["activeDeadlineSeconds"] == 1440 * 60
    (_, runtime, _) = yaml.safe_load_all(RENDER["kubernetes"](job("kubernetes")))
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]  # which starts anew in each attempt
    assert node["template"]["spec"]["activeDeadlineSeconds"] == 1440 * 60


def check_manifest(document: dict[str, Any]) -> None:
    """Raises where an API server would refuse it, as far as that can be known without one."""
    import kubernetes_validate
    from kubeflow_trainer_api import models  # seconds, which only the process that checks manifests has to take

    kind = document["kind"]
    if document["apiVersion"].startswith("trainer.kubeflow.org/"):
        model = getattr(models, f"TrainerV1alpha1{kind}")
        understood = model.from_dict(document).to_dict()
        assert understood == document, f"{kind}: Kubeflow Trainer does not know all fields of it"
    elif document["apiVersion"].startswith(("kueue.x-k8s.io/", "kustomize.config.k8s.io/")):
        pass  # no schema of theirs is in any package; their fields are in the enum table or checked by kustomize
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for key, value in fields_of(document):
        for one in value if isinstance(value, list) else [value]:
            assert key not in ENUMS or not isinstance(one, str) or one in ENUMS[key], f"{kind}: {key} is {one!r}"
    if kind == "CronJob":
        spec = document["spec"]
        assert croniter.is_valid(spec["schedule"]), f"schedule is {spec['schedule']!r}"
        croniter(spec["schedule"], datetime.now(ZoneInfo(spec["timeZone"]))).get_next()


def fields_of(tree: Any) -> list[tuple[str, Any]]:
    """Every key of a document with its value, but for what users name themselves."""
    if isinstance(tree, list):
        return [pair for item in tree for pair in fields_of(item)]
    if not isinstance(tree, dict):
        return []
    return [pair for key, value in tree.items() if key != "data" for pair in [(key, value), *fields_of(value)]]


def documents() -> dict[str, dict[str, Any]]:
    texts = {
        f"run {kind}": RENDER["kubernetes"](job("kubernetes", count)) for kind, count in (("", 0), ("of subjects", 20))
    }
    texts |= {str(path.relative_to(DEPLOY)): path.read_text() for path in sorted(DEPLOY.glob("kubernetes/*.yaml"))}
    found = {}
    for name, text in texts.items():
        for number, document in enumerate(yaml.safe_load_all(text)):
            found[f"{name} {number} {document['kind']}"] = document
    return found


DOCUMENTS = documents()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_manifest_is_valid(name):
    check_manifest(DOCUMENTS[name])


def broken(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Variants with one slip each, of which every document has at least one."""
    variants = []

    def variant(what: str) -> dict[str, Any]:
        variants.append((what, copy.deepcopy(document)))
        return variants[-1][1]

    if not document["apiVersion"].startswith(("kueue", "kustomize")):
        variant("unknown key")["specc"] = {}
        variant("number for a name")["metadata"]["name"] = 7
    for key, value in fields_of(document):
        if key in ENUMS and isinstance(value, str):
            replace_value(variant(f"{key}"), key, value.lower() or "x")
    if document["kind"] == "CronJob":
        variant("schedule")["spec"]["schedule"] = "61 * * * *"
        variant("time zone")["spec"]["timeZone"] = "Europe/Atlantis"
    return variants


def replace_value(tree: Any, key: str, value: Any) -> None:
    for node in tree if isinstance(tree, list) else tree.values() if isinstance(tree, dict) else ():
        replace_value(node, key, value)
    if isinstance(tree, dict) and isinstance(tree.get(key), str):
        tree[key] = value


BROKEN = {f"{name}: {what}": variant for name, document in DOCUMENTS.items() for what, variant in broken(document)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_variant_of_each_is_refused(name):
    with pytest.raises(Exception):  # noqa: B017, each library has its own
        check_manifest(BROKEN[name])
