"""What is wrong with a job before anything is rented: times, sizes, the partition, what pods can see.

Each problem is a sentence with the value and the remedy; none is an empty list. What only a node can tell is found by
`launch.preflight.nodes`, the first step of the job.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from controlbooth.launch.engines.kubernetes import kubectl
from controlbooth.launch.engines.slurm import facts_of
from controlbooth.launch.job.cluster import Cluster, Storage, one_node, shutdown_seconds
from controlbooth.launch.preflight.run import check_ranks, checkpoint_bytes, free_problems, preflight
from controlbooth.trainer.config.run import BUILT_IN, RunConfig, run_folder, tracking_uri
from controlbooth.trainer.tracking.mlflow_address import tracking_problems

ANSWER_SECONDS = 10
"""For an API server."""
SETUP_MINUTES = 2
"""Of every attempt, for the check, the base and the data."""


def job_problems(config: RunConfig, cluster: Cluster) -> list[str]:
    """Returns the problems of a run on a cluster, as seen from where it is submitted."""
    problems: list[str] = []
    checkpoint: int | None = None
    if cluster.engine == "kubernetes":  # the pods see what this machine may not
        problems += free_problems(path_here(run_folder(config), cluster.kubernetes.storage))
        problems += check_ranks(config, one_node(cluster))
        if not tracking_uri(config).startswith("sqlite"):  # a file that pods see
            problems += tracking_problems(config)
        problems += kubernetes_problems(cluster, paths(config))
    else:
        problems += preflight(config, one_node(cluster), on_node=cluster.engine == "local")
    if not problems and (cluster.engine != "kubernetes" or config.model.base == BUILT_IN):
        checkpoint = checkpoint_bytes(config)
    return problems + engine_problems(cluster, checkpoint)


def engine_problems(cluster: Cluster, checkpoint: int | None = None) -> list[str]:
    """Returns the problems of where a job is to run, whatever is to be trained. checkpoint: size of one in bytes; None
    where it is not known."""
    problems = list(time_problems(cluster, checkpoint))
    if cluster.engine == "local" and cluster.nodes > 1:
        problems.append(f"nodes is {cluster.nodes}, and the engine local has this machine only. Set nodes to 1")
    if cluster.engine == "slurm":
        problems += slurm_problems(cluster)
    if cluster.engine == "kubernetes":
        problems += server_problems(cluster)
    return problems


def time_problems(cluster: Cluster, checkpoint: int | None) -> Iterator[str]:
    """Yields what breaks step and checkpoint < torchrun's wait < the engine's grace < an attempt's time."""
    waits, grace = shutdown_seconds(cluster), cluster.grace_seconds
    needed, said = cluster.checkpoint_seconds, "checkpoint_seconds is"
    if needed is None and checkpoint is not None:
        needed = 2 * checkpoint / (cluster.write_mb_per_second * 1e6)  # the one in work, and the one of the stop
        said = f"two checkpoints of {checkpoint / 2**30:.1f} GiB at {cluster.write_mb_per_second:g} MB/s take"
    if needed is not None and needed >= waits:
        yield (
            f"{said} {needed:.0f} s, and torchrun kills the ranks {waits} s after it has asked them to stop, so "
            f"their work is lost. Set grace_seconds to {int(needed * 1.5) + 30} or more, or write to faster storage"
        )
    if waits >= grace:
        yield (
            f"shutdown_seconds is {waits}, and the engine kills everything grace_seconds={grace} s after its warning. "
            f"Set shutdown_seconds below {grace}, or leave it out"
        )
    minutes = cluster.time_limit_minutes
    if minutes is not None and minutes * 60 <= grace + SETUP_MINUTES * 60:
        yield (
            f"time_limit_minutes is {minutes}, of which grace_seconds={grace} and about {SETUP_MINUTES} minutes of "
            "setting up leave nothing to train in. Raise it"
        )


@dataclass(frozen=True)
class Partition:
    name: str
    default: bool
    nodes: int
    limit_minutes: float
    """inf where there is none."""
    grace_seconds: int
    """Before a preemption."""
    preempted: bool
    up: bool


def slurm_problems(cluster: Cluster) -> Iterator[str]:
    if shutil.which("sbatch") is None:
        yield "there is no sbatch on the PATH: start this on a login node of a Slurm cluster"
        return
    done = subprocess.run(["scontrol", "show", "partition", "--oneliner"], capture_output=True, text=True)
    if done.returncode:
        yield f"Slurm does not answer: {done.stderr.strip()}. Look whether slurmctld is up: scontrol ping"
        return
    yield from partition_problems(cluster, [parse_partition(line) for line in done.stdout.splitlines() if line])


def parse_partition(line: str) -> Partition:
    """Parses a line of `scontrol show partition --oneliner`."""
    facts = facts_of(line)
    return Partition(
        name=facts["PartitionName"],
        default=facts["Default"] == "YES",
        nodes=int(facts["TotalNodes"]),
        limit_minutes=parse_minutes(facts["MaxTime"]),
        grace_seconds=int(facts["GraceTime"]),
        preempted=facts["PreemptMode"] not in ("OFF", "(null)"),
        up=facts["State"] == "UP",
    )


def parse_minutes(text: str) -> float:
    """Parses Slurm's [days-]hours:minutes:seconds, or UNLIMITED, which is inf; returns minutes."""
    if text == "UNLIMITED":
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    assert match, text
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def partition_problems(cluster: Cluster, partitions: list[Partition]) -> Iterator[str]:
    asked = cluster.slurm.partition
    chosen = [one for one in partitions if one.name == asked or (asked is None and one.default)]
    names = ", ".join(one.name for one in partitions) or "none"
    if not chosen:
        what = f"slurm.partition is {asked!r}, which" if asked else "slurm.partition is not set, and a default one"
        yield f"{what} does not exist. There are: {names}"
        return
    (one,) = chosen
    if not one.up:
        yield f"partition {one.name} does not start jobs now (`sinfo -p {one.name}`). There are: {names}"
    if cluster.nodes > one.nodes:
        yield f"nodes is {cluster.nodes}, and partition {one.name} has {one.nodes}. Lower it, or take another partition"
    if (cluster.time_limit_minutes or 0) > one.limit_minutes:
        yield (
            f"time_limit_minutes is {cluster.time_limit_minutes}, and partition {one.name} allows "
            f"{one.limit_minutes:.0f}. Lower it: the run goes on in the next attempt"
        )
    if one.preempted and one.grace_seconds <= shutdown_seconds(cluster):
        yield (
            f"jobs of partition {one.name} are preempted after GraceTime={one.grace_seconds} s, and torchrun waits "
            f"shutdown_seconds={shutdown_seconds(cluster)} for its ranks, so that their last checkpoint would be lost. "
            "Set grace_seconds or shutdown_seconds below it, or ask for a longer GraceTime"
        )


def paths(config: RunConfig) -> dict[str, Path]:
    """Returns the files and folders of a run that its nodes must see, by field."""
    named = {"output": str(run_folder(config)), "data.held_out": config.data.held_out, "data.latent_cache": None}
    if config.data.latent_cache:
        named["data.latent_cache"] = str(config.data.latent_cache)
    if config.model.base != BUILT_IN:
        named["model.base"] = config.model.base
    if config.model.controlnet != "unet":
        named["model.controlnet"] = config.model.controlnet
    if config.data.shards:
        named["data.shards"] = config.data.shards
    named |= {f"data.sources.{number}.shards": source.shards for number, source in enumerate(config.data.sources)}
    return {field: Path(path) for field, path in named.items() if path and "://" not in path}


def server_problems(cluster: Cluster) -> Iterator[str]:
    """Yields the problems of a Kubernetes cluster and the way to it, whatever its pods are to see."""
    kubernetes = cluster.kubernetes
    if kubernetes.image is None:
        yield "kubernetes.image is not set: build deploy/Dockerfile, push the image, and name it here"
    for one in kubernetes.storage:
        if one.here is not None and not one.here.is_dir():
            yield (
                f"kubernetes.storage {one.claim} has here={one.here}, which is no folder of this machine: mount the "
                "storage there, or make a folder for the records of jobs"
            )
    if shutil.which("kubectl") is None:
        yield "there is no kubectl on the PATH: install it, and give it access to the cluster"
        return
    try:
        kubectl("version", f"--request-timeout={ANSWER_SECONDS}s")
    except ValueError as error:
        yield (
            f"Kubernetes does not answer ({str(error).splitlines()[-1]}). Look which cluster is asked: kubectl config "
            "current-context"
        )


def kubernetes_problems(cluster: Cluster, named: dict[str, Path]) -> Iterator[str]:
    """Yields the paths that pods do not see, or cannot write to. named: paths that pods must see, by field; that of
    `output` is written to."""
    kubernetes = cluster.kubernetes
    for field, path in named.items():
        mount = mount_of(path, kubernetes.storage)
        if mount is None:
            seen = ", ".join(one.path for one in kubernetes.storage) or "none"
            yield (
                f"{field} is {path}, which pods do not see: it must be an absolute path below one of "
                f"kubernetes.storage ({seen})"
            )
        elif field == "output" and mount.read_only:
            yield f"output is {path}, and the storage {mount.claim} at {mount.path} is read_only. Write to another one"


def record_problems(here: Path, mount: Storage | None) -> Iterator[str]:
    """Yields why the job's own files cannot be written. here: the run's folder as this machine sees it, where they are
    to lie. mount: the storage it is in."""
    if mount is not None and mount.here is None and not Path(mount.path).is_dir():
        yield (
            f"the job's own files would go to {here}, and this machine has no {mount.path}: set `here` of that storage "
            "in the cluster file to where it sees it, or to any folder of yours"
        )
        return
    existing = next(path for path in (here, *here.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield (
            f"the job's own files would go to {here}, which this machine cannot write: set `here` of that storage in "
            "the cluster file to where it sees it, or to any folder of yours"
        )


def mount_of(path: Path, storage: tuple[Storage, ...]) -> Storage | None:
    """Returns the innermost mount that a path lies in; None where it lies in none."""
    holding = [one for one in storage if path.is_relative_to(one.path)]
    return max(holding, key=lambda one: len(one.path), default=None)


def path_here(path: Path, storage: tuple[Storage, ...]) -> Path:
    """Returns where this machine sees a path of the pods."""
    mount = mount_of(path, storage)
    return path if mount is None or mount.here is None else mount.here / path.relative_to(mount.path)
