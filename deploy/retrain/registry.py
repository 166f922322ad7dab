"""The MLflow registry: which checkpoint is the champion, how another one takes its place, and the way back.

    alias champion            the version in use          alias challenger    the one that was measured last
    alias previous_champion   what `rollback` returns to; each version's tag of that name remembers its own
    tags of a version         digest, step, uri (of the checkpoint), round, verdict, reason, fingerprints

Aliases have no compare-and-set: whoever moves them holds the policy's lease.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from controlbooth.data.errors import Explained
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.tracking.mlflow_run import quiet_environment
from controlbooth.trainer.tracking.mlflow_store import make_store, store_file

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous_champion"
STATE_TAG = "controlbooth.retrain"


class RegistryAway(Explained, ConnectionError):
    """MLflow does not answer, or not as it should. Nothing was changed, and the next tick tries again."""


@dataclass(frozen=True)
class Version:
    """A checkpoint in the registry."""

    number: int
    digest: str
    step: int
    checkpoint: Path
    tags: Mapping[str, str]

    @property
    def run(self) -> Path:
        return self.checkpoint.parents[1]


@dataclass(frozen=True)
class Registry:
    """Connected to when it is first asked, since MLflow takes seconds and most ticks need nothing of it."""

    uri: str
    model: str

    @functools.cached_property
    def client(self) -> Any:
        quiet_environment()
        import mlflow
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # progress of creating tables
            logging.getLogger(name).setLevel(logging.WARNING)
        make_store(self.uri)
        mlflow.set_tracking_uri(self.uri)  # the registry's SQL store looks up checkpoints there, and not at its own
        return MlflowClient(self.uri)


@contextlib.contextmanager
def _answering(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:  # the last of a local store
        raise RegistryAway(
            f"the MLflow registry at {uri} does not answer as it should ({type(error).__name__}: {str(error):.300}). "
            "Nothing was changed; start it, or correct tracking.uri of the run, and the next tick goes on"
        ) from error


def claim(registry: Registry, state: Path) -> None:
    """Makes the registered model unless it is there, and writes down which folder of state it belongs to.

    Raises RegistryAway, and ConfigError where another folder's ticks retrain this model.
    """
    with _answering(registry.uri):
        client, model = registry.client, registry.model
        found = _registered(registry)
        if found is None:
            client.create_registered_model(model, tags={STATE_TAG: str(state)})
            return
        owner = found.tags.get(STATE_TAG)
        if owner is None:
            client.set_registered_model_tag(model, STATE_TAG, str(state))
    if owner not in (None, str(state)):
        raise ConfigError(
            f"the registered model {model!r} is retrained with the state in {owner}, and this policy's is {state}. "
            "Start ticks in the same folder, or give the policy another name"
        )


def _registered(registry: Registry) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return registry.client.get_registered_model(registry.model)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def aliases(registry: Registry) -> dict[str, Version]:
    """Returns the version that each alias names, by alias. Raises RegistryAway."""
    if (store := store_file(registry.uri)) is not None and not store.is_file():
        return {}  # looking would make it
    with _answering(registry.uri):
        found = _registered(registry)
        named = dict(found.aliases) if found else {}
        return {alias: _version(registry, int(number)) for alias, number in named.items()}


def _version(registry: Registry, number: int) -> Version:
    tags = registry.client.get_model_version(registry.model, str(number)).tags
    if missing := {"digest", "step", "uri"} - tags.keys():
        raise ConfigError(
            f"version {number} of the registered model {registry.model!r} has no tag {min(missing)}: it was not "
            "registered by a tick. Take its aliases away, or give the policy another name"
        )
    return Version(number, tags["digest"], int(tags["step"]), Path(unquote(urlsplit(tags["uri"]).path)), tags)


def register(registry: Registry, run_id: str, digest: str, tags: Mapping[str, str]) -> Version | None:
    """Makes a checkpoint that the trainer has logged the challenger, and returns its version in the registry. The
    version is created unless it is there.

    Returns None where the checkpoint has not reached MLflow yet. digest: of its weights. tags: round and fingerprints.
    Raises RegistryAway.
    """
    with _answering(registry.uri):
        client, model = registry.client, registry.model
        for version in client.search_model_versions(f"name = '{model}'"):
            if version.tags.get("digest") == digest:
                number = int(version.version)
                break
        else:
            experiment = client.get_run(run_id).info.experiment_id
            found = client.search_logged_models(
                [experiment], f"source_run_id = '{run_id}' AND tags.digest = '{digest}'"
            )
            if not found:
                return None
            logged = found[0]
            facts = {name: logged.tags[name] for name in ("digest", "step", "uri")}
            source = f"models:/{logged.model_id}"
            made = client.create_model_version(
                model, source, run_id=run_id, tags={**tags, **facts}, model_id=logged.model_id
            )  # a server refuses the one without the other; a local store does not look
            number = int(made.version)
        client.set_registered_model_alias(model, CHALLENGER, str(number))
        return _version(registry, number)


def note_verdict(registry: Registry, version: int, verdict: str, reason: str) -> None:
    with _answering(registry.uri):
        for name, value in (("verdict", verdict), ("reason", reason[:5000])):
            registry.client.set_model_version_tag(registry.model, str(version), name, value)


def promote(registry: Registry, version: int, previous: int | None) -> None:
    """Moves the alias. Repeated after a crash, it ends the same: the old champion is written down first."""
    with _answering(registry.uri):
        client, model = registry.client, registry.model
        if previous is not None:
            client.set_model_version_tag(model, str(version), PREVIOUS, str(previous))
            client.set_registered_model_alias(model, PREVIOUS, str(previous))
        client.set_registered_model_alias(model, CHAMPION, str(version))


def way_back(registry: Registry) -> tuple[Version, Version]:
    """Returns the champion and the one before it. Raises ConfigError where either is missing, and RegistryAway."""
    champion = aliases(registry).get(CHAMPION)
    if champion is None:
        raise ConfigError(f"the registered model {registry.model!r} has no champion, so there is no way back")
    before = champion.tags.get(PREVIOUS)
    if before is None:
        raise ConfigError(
            f"version {champion.number} of {registry.model!r} is the first champion, so there is nothing to return to"
        )
    with _answering(registry.uri):
        return champion, _version(registry, int(before))


def rollback(registry: Registry) -> tuple[Version, Version]:
    """Gives the alias back; -> the champion that leaves and the one that returns. May be repeated, as far as there are
    former champions. Raises as `way_back`."""
    champion, returning = way_back(registry)
    with _answering(registry.uri):
        registry.client.set_registered_model_alias(registry.model, CHAMPION, str(returning.number))
        earlier = returning.tags.get(PREVIOUS)
        if earlier is None:
            registry.client.delete_registered_model_alias(registry.model, PREVIOUS)
        else:
            registry.client.set_registered_model_alias(registry.model, PREVIOUS, earlier)
    return champion, returning


def mark_dead(registry: Registry, run_id: str) -> bool:
    """Marks an MLflow run as killed if it is still RUNNING, as one whose processes are gone stays for ever. Returns
    whether it was RUNNING. Raises RegistryAway."""
    with _answering(registry.uri):
        if registry.client.get_run(run_id).info.status != "RUNNING":
            return False
        registry.client.set_terminated(run_id, "KILLED")
        registry.client.set_tag(run_id, "reaped", "its processes were gone")
        return True
