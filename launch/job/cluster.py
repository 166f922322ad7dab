"""Every field of `cluster.yaml`: where a run is started, on how many machines, and how long they wait for it to stop.

Free of torch. Reads the file, and with the engine local what this machine has; what is asked of Slurm or Kubernetes
itself is in `cluster_preflight`.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from controlbooth.data.errors import UserError
from controlbooth.data.processes.cpus import usable_cpus
from controlbooth.data.secrets import is_secret, shown_script
from controlbooth.launch.ranks.local import gpu_count
from controlbooth.launch.ranks.torchrun import Node
from controlbooth.trainer.config.file_kinds import CLUSTER
from controlbooth.trainer.config.loading import explain_errors, refuse_other_kind
from controlbooth.trainer.config.section import ConfigError, Section, control_character

Engine = Literal["local", "slurm", "kubernetes"]
CLUSTER_FILE = Path("cluster.yaml")
"""Where no other one is named."""


OBJECT = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
"""What Kubernetes takes as the name of a namespace, or of an object that others are named after."""
DOTTED = r"^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$"
"""And as that of other objects."""
WORD = r"^[A-Za-z0-9_][A-Za-z0-9_.,@+:=-]*$"
"""A name in Slurm, or several, as the lines of a batch script take it without quotes."""


class SlurmConfig(Section):
    partition: str | None = Field(default=None, pattern=WORD)
    """Default: Slurm's own."""
    account: str | None = Field(default=None, pattern=WORD)
    qos: str | None = Field(default=None, pattern=WORD)
    constraint: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_(\[][A-Za-z0-9_.,@+:=&|*()\[\]-]*$")
    """Features that the nodes must have."""


class Storage(Section):
    """A persistent volume claim, mounted alike in every pod."""

    claim: str = Field(pattern=DOTTED)
    path: str = Field(pattern="^/[^:]*$")
    """Where it is seen in the pods; the run's paths lie below it."""
    here: Path | None = None
    """Where this machine sees it, or any folder here for the records of jobs. Default: the same path."""
    read_only: bool = False


class KubernetesConfig(Section):
    image: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$")
    """With controlbooth in it; deploy/Dockerfile makes one."""
    namespace: str = Field(default="controlbooth", pattern=OBJECT)
    queue: str | None = Field(default=None, pattern=OBJECT)
    """A LocalQueue of Kueue, which admits all pods of a job together."""
    service_account: str = Field(default="default", pattern=DOTTED)
    storage: tuple[Storage, ...] = ()
    secrets: tuple[Annotated[str, Field(pattern=DOTTED)], ...] = ()
    """Secrets whose entries become environment variables, such as the credentials of a store."""
    shared_memory_gib: float = Field(default=8.0, gt=0.0)
    """/dev/shm of each pod, through which NCCL's ranks of one node talk."""


class Cluster(Section):
    engine: Engine = "local"
    nodes: int = Field(default=1, gt=0)
    processes_per_node: int = Field(default=1, gt=0)
    """Ranks on each node, one per GPU where there are GPUs. Default with the engine local: so many as this machine
    has GPUs, or 1."""
    gpus_per_node: int = Field(default=0, ge=0)
    """Default with the engine local: those of this machine that CUDA_VISIBLE_DEVICES leaves visible."""
    accelerator: str | None = None
    """What they are, e.g. h100; `controlbooth plan` has a table of them."""
    cores_per_node: int | None = Field(default=None, gt=0)
    """Asked for, and shared by the ranks. Default: one for each rank; with the engine local those of this machine."""
    memory_gib_per_node: float | None = Field(default=None, gt=0.0)
    time_limit_minutes: int | None = Field(default=None, gt=0)
    """Of one attempt; the run goes on in the next."""
    grace_seconds: int = Field(default=300, gt=0)
    """From the engine's warning until it kills: before a time limit, a preemption, the end of a pod."""
    shutdown_seconds: int | None = Field(default=None, gt=0)
    """From the ranks' SIGTERM until torchrun kills them. Default: four fifths of grace_seconds."""
    checkpoint_seconds: float | None = Field(default=None, gt=0.0)
    """What a step and a checkpoint take at most. Default: estimated from its size and write_mb_per_second."""
    write_mb_per_second: float = Field(default=200.0, gt=0.0)
    """Of the storage that holds the run's folder."""
    restarts: int = Field(default=20, ge=0)
    """Attempts after the first, whatever ended those before; a failure with a message of its own ends the job."""
    least_network_mbit: float = Field(default=100.0, ge=0.0)
    """Between two nodes, below which the job stops before it trains; 0 takes any."""
    python: str | None = None
    """The interpreter on the nodes. Default: this one; in a container `python`."""
    setup: tuple[str, ...] = ()
    """Lines of shell before anything else on a node, such as `module load cuda`."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    """Variables of all ranks. With any, the job's files are readable by their owner alone, and a dry run hides values
    that may be secrets; those of pods go into kubernetes.secrets."""
    slurm: SlurmConfig = SlurmConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        """Turns numbers into text: YAML reads NCCL_DEBUG: 1 as a number, and a variable is text. Raises ValueError for
        control characters."""
        if not isinstance(value, dict):
            return value
        for key, entry in value.items():
            if isinstance(entry, str) and (control := control_character(entry, allowed="\n\r\t")):
                raise UserError(f"the value of {key} has {control} in it, which no variable can hold")
        return {key: str(entry) if type(entry) in (int, float) else entry for key, entry in value.items()}


def refuse_secrets(cluster: Cluster, path: Path) -> None:
    """Raises ConfigError for what would be in the open in a ConfigMap, which all who see the namespace may read."""
    if cluster.engine != "kubernetes":
        return
    secret = [name for name, value in cluster.environment.items() if is_secret(name, value)]
    lines = [f"setup.{number}" for number, line in enumerate(cluster.setup) if shown_script(line) != line]
    if found := [*(f"environment.{name}" for name in secret), *lines]:
        raise ConfigError(
            f"{path}: {', '.join(found)} holds a secret, not shown here, and would be in a ConfigMap, which all who "
            "see the namespace may read. Make a Secret of it (kubectl create secret generic NAME "
            "--from-literal=VARIABLE=VALUE), and name that in kubernetes.secrets: its entries become variables of the "
            "environment"
        )


def load_cluster(path: Path | None, engine: Engine) -> Cluster:
    """Reads the file, or returns the defaults of an engine where there is none.

    Raises ConfigError with every mistake of the file, and with the engine local ValueError where nvidia-smi hangs.
    """
    cluster = Cluster(engine=engine) if path is None else _read_cluster(path, engine)
    return _filled_in_here(cluster) if engine == "local" else cluster


def _read_cluster(path: Path, engine: Engine) -> Cluster:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(
            f"cluster file {path} does not exist. launch/configs/clusters/ has some to start from"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"cluster file {path} is not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"cluster file {path} holds {type(tree).__name__}, but it is a mapping of keys to values")
    refuse_other_kind(tree, path, CLUSTER)
    try:
        cluster = Cluster.model_validate({"engine": engine} | tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain_errors(error, Cluster)}") from None
    refuse_secrets(cluster, path)
    if cluster.engine != engine:
        raise ConfigError(
            f"{path} is of engine {cluster.engine}, and this is for {engine}. Use `controlbooth launch "
            f"{cluster.engine}`, in a policy `engine: {cluster.engine}`, or take another cluster file"
        )
    return cluster


def _filled_in_here(cluster: Cluster) -> Cluster:
    """Returns the cluster with what its file leaves out taken from this machine, as `controlbooth train` takes it."""
    left_out = {"processes_per_node", "gpus_per_node", "cores_per_node"} - cluster.model_fields_set
    if not left_out:
        return cluster
    gpus = gpu_count() if "gpus_per_node" in left_out else cluster.gpus_per_node
    here = dict(processes_per_node=max(1, gpus), gpus_per_node=gpus, cores_per_node=usable_cpus())
    return cluster.model_copy(update={field: here[field] for field in left_out})


def dump_cluster(cluster: Cluster) -> str:
    return yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def one_node(cluster: Cluster) -> Node:
    """Returns the facts of a node of the cluster, which are the same for each of them."""
    return Node(
        processes=cluster.processes_per_node,
        cores=cluster.cores_per_node or cluster.processes_per_node,
        gpus=cluster.gpus_per_node,
        head_port=0,
        nodes=cluster.nodes,
        grace_seconds=shutdown_seconds(cluster),
    )


def shutdown_seconds(cluster: Cluster) -> int:
    return cluster.shutdown_seconds or max(1, cluster.grace_seconds * 4 // 5)


def interpreter(cluster: Cluster) -> str:
    return cluster.python or ("python" if cluster.engine == "kubernetes" else sys.executable)
