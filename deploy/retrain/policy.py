"""When to train again, on what, and what a challenger must show to take the champion's place: policy.yaml.

Read like a run's file: one frozen tree, unknown keys refused. Paths are relative to the folder in which ticks are
started, as in run files; `run` and `cluster` are looked for beside the policy.
"""

import datetime
import zoneinfo
from pathlib import Path
from typing import Any, Literal

from croniter import croniter
from pydantic import Field, ValidationError, field_validator, model_validator

from controlbooth.data.errors import UserError
from controlbooth.data.files.records import Damaged, read_yaml
from controlbooth.launch.job.cluster import CLUSTER_FILE, Cluster, Engine, load_cluster
from controlbooth.trainer.config.file_kinds import POLICY
from controlbooth.trainer.config.loading import build_config, explain_errors, read_tree, refuse_other_kind
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import ConfigError, Section


class Clock(Section):
    cron: str | None = None
    """Minute, hour, day of month, month, day of week: `0 3 * * *` is every night at three."""
    every_hours: float | None = Field(default=None, gt=0.0)
    """Instead: so long after the last round was started."""
    timezone: str = "UTC"
    """Of the cron line, such as Europe/Berlin."""

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            zoneinfo.ZoneInfo(value)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise UserError("no such time zone. Write UTC, or a name such as Europe/Berlin") from None
        return value

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, value: str | None) -> str | None:
        if value is not None and (len(value.split()) != 5 or not croniter.is_valid(value)):
            raise UserError("not a cron line of five fields, such as '0 3 * * *' for every night at three")
        return value

    @model_validator(mode="after")
    def _one(self) -> "Clock":
        if (self.cron is None) == (self.every_hours is None):
            raise UserError("give either cron or every_hours")
        return self


class Growth(Section):
    """Both must hold where both are given. What counts are shards that the last round did not have."""

    samples: int | None = Field(default=None, gt=0)
    """So many new samples with the run's condition."""
    share: float | None = Field(default=None, gt=0.0)
    """So many new samples for each one that the last round had: 0.1 is a tenth more."""

    @model_validator(mode="after")
    def _any(self) -> "Growth":
        if self.samples is None and self.share is None:
            raise UserError("give samples, share or both")
        return self


class Drift(Section):
    data: str
    """Labelled shards of what comes in now. They are looked at again whenever they have changed."""
    metric: str
    """A figure of `controlbooth evaluate`, with control, such as edge_f1; or edge_f1_share, as in the gate, which falls
    no more than control does where fresh conditions are denser or sparser."""
    margin: float = Field(ge=0.0)
    """The champion is worse here than on the frozen set by at least this, and certainly so at the gate's confidence."""
    samples: int = Field(default=64, gt=1)


class Triggers(Section):
    """Any of them starts a round."""

    clock: Clock | None = None
    growth: Growth | None = None
    drift: Drift | None = None

    @model_validator(mode="after")
    def _any(self) -> "Triggers":
        if not (self.clock or self.growth or self.drift):
            raise UserError("give at least one of clock, growth and drift")
        return self


class Evaluation(Section):
    data: str
    """The frozen set: shards that are never trained on, and that stay as they are. A round is refused where any of its
    pictures are in the training data; equal keys of other pictures are no matter."""
    fingerprint: str | None = None
    """Of these shards, as `controlbooth data info` prints it. Default: what the first tick finds."""
    samples: int = Field(default=64, gt=1)
    """Of the set, chosen by their contents; more of them make smaller gains certain."""
    sampling_steps: int | None = Field(default=None, gt=0)
    """Default: those of the run's validation."""
    guidance_scale: float | None = Field(default=None, ge=1.0)
    """Default: that of the run's validation."""


class Gate(Section):
    metric: str
    """A figure of `controlbooth evaluate`, with control, such as edge_f1. NAME_share is the share of what is possible
    by a figure of control, such as edge_f1_share: (value - chance) / (real pictures - chance), where chance is what the
    same pictures score under the conditions of other samples. A margin of 0.05 asks for 5 % more of it, whatever the
    figure; without a champion it is the share that the challenger has more than the base alone, which has about 0."""
    margin: float = 0.0
    """The challenger's gain must certainly be at least this: the lower end of the interval of the paired differences.
    A negative margin takes a challenger that is certainly not much worse."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Of the bootstrap intervals."""
    no_regression: dict[str, float] = {}
    """Other figures or shares, and how much of each may be lost: a larger loss must be ruled out by the interval's
    lower end."""

    @field_validator("no_regression")
    @classmethod
    def _tolerances(cls, value: dict[str, float]) -> dict[str, float]:
        if negative := {name: one for name, one in value.items() if one < 0}:
            raise UserError(f"tolerances are 0 or more, and there is {negative}. For a gain, use metric and margin")
        return value


class Policy(Section):
    name: str = Field(min_length=1, max_length=190, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Names the runs (NAME-0001, ...), the registered model, and the folder of the policy's state."""
    state: Path = Path("runs/retrain")
    """The folder below which NAME/ holds the lease, the audit log, the rounds and their evaluations."""
    run: Path
    """The run file that every round starts from, beside this file."""
    changes: tuple[str, ...] = ()
    """Of the run: section.key=value, as on the command line."""
    data: str
    """The data set that grows, in place of the run's data.shards: a manifest, a folder, a glob or a range."""
    start: Literal["champion", "scratch"] = "champion"
    """Where a round starts: from the champion's weights, if there is one, or from the base's."""
    engine: Engine = "local"
    """Where it trains. local: in processes of this machine, which outlive the tick and are ticked here alone. slurm,
    kubernetes: as the job that `controlbooth launch` makes of it, ticked from any machine that reaches the scheduler
    and sees the run's folders. Ticks measure where they are called, whatever trains."""
    cluster: Path | None = None
    """Nodes, ranks and limits of such a job, beside this file; launch/job/cluster.py has its fields. Default:
    cluster.yaml. What is changed in it holds from the next start of a round on."""
    processes: int | None = Field(default=None, gt=0)
    """Ranks with engine=local. Default: one per GPU, or 1 on a machine without."""
    resumes: int = Field(default=3, ge=0)
    """How often a round that died is started again; it goes on from its latest checkpoint. A job counts as dead when
    its engine does not start it again by itself any more, which `restarts` of the cluster file limits."""
    lease_seconds: float = Field(default=300.0, ge=5.0)
    """A tick that is silent for so long is taken for dead, and the next one goes on. Clocks of the machines that tick
    must agree much better than that."""
    triggers: Triggers
    evaluation: Evaluation
    gate: Gate

    @model_validator(mode="after")
    def _of_one_engine(self) -> "Policy":
        if self.engine == "local" and self.cluster is not None:
            raise UserError(
                f"cluster is {self.cluster}, and engine is local, which has none. Set engine to slurm or kubernetes, "
                "or leave cluster out"
            )
        if self.engine != "local" and self.processes is not None:
            raise UserError(
                f"processes is {self.processes}, and engine is {self.engine}, whose ranks are nodes x "
                "processes_per_node of the cluster file. Set those, and leave processes out"
            )
        return self


def load_policy(path: Path) -> Policy:
    """Reads policy.yaml. Raises ConfigError for what cannot be read, is unknown, or contradicts itself."""
    try:
        tree = read_yaml(path, "Correct it")
    except (OSError, Damaged) as error:
        raise ConfigError(f"policy {path} cannot be read: {error}. launch/configs/retrain.yaml is one") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"policy {path} holds {type(tree).__name__}, but a policy is a mapping of keys to values")
    refuse_other_kind(tree, path, POLICY)
    try:
        policy = Policy.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain_errors(error, Policy)}") from None
    beside = dict(run=path.parent / policy.run)
    if policy.engine != "local":
        beside["cluster"] = path.parent / (policy.cluster or CLUSTER_FILE)
    return policy.model_copy(update=beside)


def cluster_of(policy: Policy) -> Cluster | None:
    """Reads the cluster that rounds train on; returns None with engine=local. Raises ConfigError where the file cannot
    be used, or is missing."""
    if policy.engine == "local":
        return None
    cluster = load_cluster(policy.cluster, policy.engine)
    for one in cluster.kubernetes.storage if policy.engine == "kubernetes" else ():
        if one.here not in (None, Path(one.path)):
            raise ConfigError(
                f"{policy.cluster}: the storage {one.claim} is {one.path} in pods and {one.here} here, and a tick "
                f"reads by their names the files that pods have written. Mount it at {one.path} here too and leave "
                "`here` out, or tick in a pod, as deploy/kubernetes/retrain.yaml does"
            )
    return cluster


def state_folder(policy: Policy) -> Path:
    return (policy.state / policy.name).absolute()


def round_config(policy: Policy, name: str, shards: str, controlnet: str | None) -> RunConfig:
    """Builds the configuration of a round's run from the policy's run file.

    shards: of the data set. controlnet: the weights to start from; None starts as the run file does. Raises ConfigError
    where the run file cannot be used.
    """
    tree: dict[str, Any] = read_tree(policy.run, policy.changes)
    data = tree.get("data") if isinstance(tree.get("data"), dict) else {}
    for key, why in (
        ("sources", "the policy's `data` is the one data set; list all its shards in one manifest"),
        ("latent_cache", "a latent cache belongs to one state of a data set, and this one grows; leave it out"),
    ):
        if data and data.get(key):
            raise ConfigError(f"{policy.run} has data.{key}, which cannot be retrained: {why}")
    tree |= dict(name=name, data=(data or {}) | dict(shards=shards))
    if controlnet is not None:
        tree["model"] = (tree.get("model") or {}) | dict(controlnet=controlnet)
    return build_config(tree, source=str(policy.run))


def zone(clock: Clock | None) -> datetime.tzinfo:
    return zoneinfo.ZoneInfo(clock.timezone if clock else "UTC")
