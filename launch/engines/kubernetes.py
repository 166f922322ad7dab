"""Kubernetes: renders the manifests, which is pure, and submits, asks for, and deletes what they make, by kubectl.

A run is a TrainJob of Kubeflow Trainer v2 with a runtime of its own, whose torch policy gives pods PET_MASTER_ADDR,
PET_MASTER_PORT and PET_NODE_RANK. When a pod is lost the whole set of pods starts again, from the latest checkpoint;
when a run has failed with a reason of its own, which exit codes 1 and 2 say, nothing does. A batch of DreamBooth
subjects is an Indexed Job: retries are counted for each index, and one that has failed stops no other.
"""

import hashlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml

from controlbooth.data.errors import UserError
from controlbooth.launch.engines.script import checking, judging, preamble, rows, shell, training
from controlbooth.launch.job.cluster import Cluster
from controlbooth.launch.job.job import Job, JobState

MOUNTED = Path("/job")
"""Where pods see the job's files."""
OWN_FAILURE = [1, 2]
"""Exit codes of the script after which another attempt would fail alike; 75 and those of signals are tried again."""
PATIENCE_SECONDS = 900
"""Of a pod for the others, whose nodes may have to pull the image first."""
CONTAINER = "node"
"""Kubeflow Trainer fills in the container of this name."""
TRAINER_STEP = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
RESTARTS = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
INDEX_FAILURES = "metadata.annotations['batch.kubernetes.io/job-index-failure-count']"


def render(job: Job, files: dict[str, str]) -> str:
    """Returns all manifests as one YAML text. files: those of the job's folder, which pods see below /job."""
    documents = [_config_map(job, files | {"script.sh": render_script(job)})]
    documents += [_indexed_job(job)] if job.subjects else [_runtime(job), _train_job(job)]
    return "---\n".join(yaml.dump(one, Dumper=_Readable, sort_keys=False, width=120) for one in documents)


def render_script(job: Job) -> str:
    """Returns the script that each pod runs."""
    lines = ["#!/bin/bash", f"# {job.name}, trained by controlbooth; written by `controlbooth launch kubernetes`."]
    lines += [*preamble(job), *rows(job, "JOB_COMPLETION_INDEX")]
    lines += [f"export CONTROLBOOTH_ATTEMPT=$(({job.first_attempt} + ${{RESTARTS:-0}}))", "STARTED=$(date +%s)"]
    lines += ['echo "== attempt $CONTROLBOOTH_ATTEMPT on $HOSTNAME, $(date +%FT%T%z)"', "", WAITING, ""]
    endpoint, is_host = "127.0.0.1:0", "1"
    if not job.subjects:
        words = checking(job, "$PET_MASTER_ADDR", "$PET_MASTER_PORT", "$PET_NODE_RANK", MOUNTED)
        check = shell([*words, f"--patience={PATIENCE_SECONDS}"])
        lines += ["# Every pod looks at what it needs, and all of them at each other, before the ranks start."]
        lines += [f"until_it_ends {check} || exit $?", ""]
    if job.cluster.nodes > 1:
        endpoint, is_host = "$PET_MASTER_ADDR:$PET_MASTER_PORT", "$((PET_NODE_RANK == 0))"
    lines += [f"until_it_ends {shell(training(job, endpoint, is_host, MOUNTED))}"]
    if job.cluster.nodes > 1 and not job.subjects:
        # The first pod's ranks write down what has become of the run, and maybe after these have ended
        lines += ['if [ $? = 0 ] && [ "$PET_NODE_RANK" != 0 ]; then exit 0; fi']
    lines += [""]
    return "\n".join([*lines, f"exec {shell(judging(job, MOUNTED))}"]) + "\n"


WAITING = """\
# Kubernetes tells the first process of a container that it will end; the ranks then save a checkpoint.
STOPPING=
CHILD=
trap 'STOPPING=1; [ -z "$CHILD" ] || kill -TERM "$CHILD"' TERM

until_it_ends() {
  "$@" &
  CHILD=$!
  [ -z "$STOPPING" ] || kill -TERM "$CHILD"
  local status=0
  while true; do  # a signal ends `wait`, and not what it waits for
    wait "$CHILD"
    status=$?
    kill -0 "$CHILD" 2>/dev/null || return $status
  done
}"""


def object_name(job: Job) -> str:
    """Returns the name of all objects of a submission.

    Kubernetes takes 63 small letters, digits and hyphens, and adds some to them. Folder and time tell runs of one name
    apart, and a run from another one that began in the same folder.
    """
    words = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"
    digest = hashlib.sha256(f"{job.folder}\n{job.submitted!r}".encode()).hexdigest()
    return f"{words[:27].rstrip('-')}-{digest[:8]}-{job.submission}"


def _metadata(job: Job) -> dict[str, Any]:
    return {
        "name": object_name(job),
        "namespace": job.cluster.kubernetes.namespace,
        "labels": {"app.kubernetes.io/name": "controlbooth", "app.kubernetes.io/instance": object_name(job)},
    }


def _queued(job: Job) -> dict[str, Any]:
    """Returns the metadata of what Kueue admits."""
    metadata, queue = _metadata(job), job.cluster.kubernetes.queue
    return metadata | {"labels": metadata["labels"] | ({"kueue.x-k8s.io/queue-name": queue} if queue else {})}


def _config_map(job: Job, files: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job), "data": files}


def _train_job(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _queued(job),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": object_name(job),
            },
            "trainer": {"numNodes": job.cluster.nodes, "numProcPerNode": job.cluster.processes_per_node},
        },
    }


def _runtime(job: Job) -> dict[str, Any]:
    one_node = {
        "name": CONTAINER,
        "template": {
            "metadata": {"labels": TRAINER_STEP},
            "spec": {
                "backoffLimit": 0,  # no pod starts again alone: the set does, so that all ranks read one checkpoint
                **_deadline(job.cluster),
                "podFailurePolicy": {"rules": [_own_failure("FailJob")]},
                "template": {"spec": _pod(job, RESTARTS)},
            },
        },
    }
    stop = {"name": "ownfailure", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _metadata(job),
        "spec": {
            "mlPolicy": {"numNodes": job.cluster.nodes, "torch": {}},
            "template": {
                "spec": {
                    "failurePolicy": {"maxRestarts": job.cluster.restarts, "rules": [stop]},
                    "replicatedJobs": [one_node],
                }
            },
        },
    }


def _indexed_job(job: Job) -> dict[str, Any]:
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _queued(job),
        "spec": {
            "completionMode": "Indexed",
            "completions": job.tasks,
            "parallelism": min(job.tasks, job.cluster.nodes),
            "backoffLimitPerIndex": job.cluster.restarts,
            "maxFailedIndexes": job.tasks,
            "podReplacementPolicy": "Failed",  # never two pods of one index
            "podFailurePolicy": {"rules": [_own_failure("FailIndex"), disrupted]},
            # In the pod, where it is of one attempt; in the job it would end all indexes together
            "template": {"spec": _deadline(job.cluster) | _pod(job, INDEX_FAILURES)},
        },
    }


def _own_failure(action: str) -> dict[str, Any]:
    codes = {"containerName": CONTAINER, "operator": "In", "values": OWN_FAILURE}
    return {"action": action, "onExitCodes": codes}


def _deadline(cluster: Cluster) -> dict[str, int]:
    return {"activeDeadlineSeconds": cluster.time_limit_minutes * 60} if cluster.time_limit_minutes else {}


def _pod(job: Job, restarts: str) -> dict[str, Any]:
    """Returns the specification of a pod. restarts: the field that tells a pod how often it has been tried before."""
    cluster, kubernetes = job.cluster, job.cluster.kubernetes
    asked: dict[str, Any] = {"cpu": str(cluster.cores_per_node or cluster.processes_per_node)}
    if cluster.memory_gib_per_node:
        asked["memory"] = f"{cluster.memory_gib_per_node * 1024:.0f}Mi"
    if cluster.gpus_per_node:
        asked["nvidia.com/gpu"] = str(cluster.gpus_per_node)
    shared = {"medium": "Memory", "sizeLimit": f"{kubernetes.shared_memory_gib * 1024:.0f}Mi"}
    claims = [
        {"name": f"storage-{number}", "persistentVolumeClaim": {"claimName": one.claim, "readOnly": one.read_only}}
        for number, one in enumerate(kubernetes.storage)
    ]
    mounts = [
        {"name": f"storage-{number}", "mountPath": one.path, "readOnly": one.read_only}
        for number, one in enumerate(kubernetes.storage)
    ]
    container = {
        "name": CONTAINER,
        "image": kubernetes.image,
        "command": ["bash", str(MOUNTED / "script.sh")],
        "env": [{"name": "RESTARTS", "valueFrom": {"fieldRef": {"fieldPath": restarts}}}],
        "envFrom": [{"secretRef": {"name": name}} for name in kubernetes.secrets],
        "resources": {"requests": asked, "limits": asked},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "job", "mountPath": str(MOUNTED), "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            *mounts,
        ],
    }
    return {
        "restartPolicy": "Never",
        "serviceAccountName": kubernetes.service_account,
        "terminationGracePeriodSeconds": cluster.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "job", "configMap": {"name": object_name(job)}},
            {"name": "shared-memory", "emptyDir": shared},
            *claims,
        ],
    }


class _Readable(yaml.SafeDumper):
    """Texts of several lines as blocks, and lists that are used twice written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _text)


def submit(manifests: Path, job: Job) -> str:
    """Creates the objects and returns kind/name, which kubectl takes. Raises ValueError with what the API server says.

    The server refuses objects that exist, where `apply` would change those of another run.
    """
    kubectl("create", "--validate=strict", "-f", str(manifests))
    return id_of(job)


def id_of(job: Job) -> str:
    return f"{'job' if job.subjects else 'trainjob'}/{object_name(job)}"


def find(job: Job) -> str | None:
    """Returns what `submit` returned for this submission, or would have, where the API server has it; otherwise None.

    Raises ValueError where the server does not answer.
    """
    job_id = id_of(job)
    try:
        (one,) = states(job_id, job.cluster.kubernetes.namespace)
    except ValueError as error:
        if "doesn't have a resource type" in str(error):  # a cluster without Kubeflow Trainer
            return None
        raise
    return None if one.state == "unknown" else job_id


def states(job_id: str, namespace: str) -> list[JobState]:
    answer = kubectl("get", job_id, "--namespace", namespace, "--ignore-not-found", "-o", "json")
    if not answer:
        return [JobState("unknown", "the cluster has no such object any more")]
    status = json.loads(answer).get("status", {})
    true = {one["type"]: one for one in status.get("conditions", []) if one["status"] == "True"}
    jobs = status.get("jobsStatus") or [status]
    active = sum(one.get("active") or 0 for one in jobs)
    counts = ", ".join(f"{sum(one.get(key) or 0 for one in jobs)} {key}" for key in ("active", "succeeded", "failed"))
    if failed := true.get("Failed"):
        return [JobState("failed", f"{failed.get('reason', '')}: {failed.get('message', '')}")]
    if "Complete" in true or "SuccessCriteriaMet" in true:
        return [JobState("ended", counts)]
    suspended = "Suspended" in true
    return [JobState("running" if active else "waiting", f"{counts}{', waits in its queue' if suspended else ''}")]


def cancel(job_id: str, namespace: str, now: bool) -> None:
    """Deletes it; its pods end with a checkpoint in their grace period, or at once."""
    kubectl("delete", job_id, "--namespace", namespace, "--ignore-not-found", "--wait=false")
    if now:
        kubectl("delete", "pods", "--namespace", namespace, *selector(job_id), "--grace-period=0", "--force")


def selector(job_id: str) -> list[str]:
    kind, _, name = job_id.partition("/")
    label = "batch.kubernetes.io/job-name" if kind == "job" else "jobset.sigs.k8s.io/jobset-name"
    return ["--selector", f"{label}={name}"]


def logs_command(job_id: str, namespace: str, follow: bool, task: int | None) -> list[str]:
    """Returns the command that prints what the pods say. task: the index in an Indexed Job; None for all pods."""
    chosen = selector(job_id)
    if task is not None:
        chosen[-1] += f",batch.kubernetes.io/job-completion-index={task}"
    command = ["kubectl", "logs", "--namespace", namespace, *chosen, "--prefix", "--tail=-1", "--max-log-requests=512"]
    return [*command, *(["--follow"] if follow else [])]


def kubectl(*arguments: str) -> str:
    """Runs kubectl and returns what it prints. Raises ValueError with its message."""
    command = ["kubectl", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("there is no kubectl on the PATH: install it, and give it access to the cluster") from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip()
