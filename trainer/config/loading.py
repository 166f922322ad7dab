"""Reads a run from YAML, sets fields from the command line, and explains what is wrong in terms of the file."""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from controlbooth.data.files.records import Damaged, parse_yaml, read_yaml
from controlbooth.data.secrets import without_secrets
from controlbooth.trainer.config.file_kinds import RUN, kind_of, mistaken_for
from controlbooth.trainer.config.other_names import FIELDS_OF
from controlbooth.trainer.config.renamed import rename_keys, renamed, with_new_names
from controlbooth.trainer.config.run import (
    RESOLVED,
    EngineConfig,
    FlowConfig,
    FrozenConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from controlbooth.trainer.config.section import ConfigError


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and applies `section.key=value` overrides, the last one winning.

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type, or numbers that contradict.
    """
    return build_config(read_tree(path, overrides), source=str(path))


def read_tree(path: str | os.PathLike[str], overrides: Sequence[str] = (), kind: str = RUN) -> dict[str, Any]:
    """Reads a run file and applies its overrides, without checking any key or value against the fields of a run.

    Raises ConfigError where the file does not exist, is not YAML, is no mapping or is plainly of another kind than
    `kind`, where it has a key under both its old and its new name, and for an override that cannot be applied.
    """
    path = Path(path)
    try:
        tree = read_yaml(path, "Correct it, or put a whole copy back")
    except FileNotFoundError:
        configs = sorted((Path(__file__).parents[2] / "launch/configs").glob("*.yaml"))
        shipped = ", ".join(one.name for one in configs if kind_of(yaml.safe_load(one.read_text())) == kind)
        raise ConfigError(f"run file {path} does not exist. Runs to start from, in launch/configs: {shipped}") from None
    except Damaged as error:
        raise ConfigError(f"run file {path} is not readable as YAML: {error.reason}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"run file {path} holds {type(tree).__name__}, but a run is a mapping of keys to values")
    refuse_other_kind(tree, path, kind)
    if path.name == RESOLVED:
        _forget_secrets(tree)
    if kind == RUN:  # before the overrides, which may have either name too, and win over both
        rename_keys(tree, f"run file {path}")
    for override in overrides:
        _override(tree, override, kind)
    return tree


def _forget_secrets(tree: dict[str, Any]) -> None:
    """Removes secrets from the tracking URI of a config that an earlier version of a run saved, in place.

    The file itself cannot be mended, since a checkpoint records the sizes of its files.
    """
    tracking = tree.get("tracking")
    if isinstance(tracking, dict) and isinstance(tracking.get("uri"), str):
        tracking["uri"] = without_secrets(tracking["uri"])


def refuse_other_kind(tree: Any, path: Path, kind: str) -> None:
    """Raises ConfigError, with the verb to use, for a file that is plainly of another kind of `file_kinds`."""
    if message := mistaken_for(tree, kind, str(path)):
        raise ConfigError(message)


def build_config(tree: dict[str, Any], source: str = "the run config") -> RunConfig:
    """Builds a RunConfig from a nested dict. Raises one ConfigError that names every error of the tree."""
    rename_keys(tree, source)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain_errors(error, RunConfig)}") from None


def explain_errors(error: ValidationError, model: type[BaseModel]) -> str:
    """Explains everything that is wrong with a tree, with the values and what to do.

    model: the class that refused it.
    """
    told: list[str] = []
    strange: dict[tuple[Any, ...], list[Any]] = {}
    for one in error.errors():
        if one["type"] == "extra_forbidden" and _nearest_key(one["loc"], model) is None:
            strange.setdefault(one["loc"][:-1], []).append(one["loc"])
        else:
            told.append(_explain(one, model))
    for locations in strange.values():  # the known keys of a section are listed once
        names = ", ".join(f"'{_dotted(location)}'" for location in locations)
        known = ", ".join(_keys_beside(locations[0], model))
        told.append(f"unknown key{'s' if len(locations) > 1 else ''} {names}; known keys: {known}")
    return "; ".join(told)


def _override(tree: dict[str, Any], override: str, kind: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not section.key=value, e.g. optimizer.learning_rate=1e-5")
    *parents, leaf = (renamed(key) if kind == RUN else key).split(".")
    node = tree
    for depth, parent in enumerate(parents):
        if node.get(parent) is None:  # not in the file, or a section without a key
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        node[leaf] = parse_yaml(value, repr(value), "Give a YAML value")
    except Damaged as error:
        raise ConfigError(f"override {override!r}: {value!r} is not a YAML value: {error.reason}") from error


def _explain(error: Any, model: type[BaseModel]) -> str:
    where = _dotted(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key '{where}'; did you mean '{_nearest_key(error['loc'], model)}'?"
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):
        return f"'{where.rpartition('.')[0]}' has {error['loc'][-1]} values, and needs more"
    if error["type"] == "missing":
        return f"'{where}' is missing; set it in the file, or give {where}=VALUE on the command line"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    given = without_secrets(given) if isinstance(given, str) else given
    hidden = "environment" in error["loc"] and not isinstance(given, bool | int | float | None)
    if isinstance(given, dict) or hidden:  # values that may be secrets; the message has the key
        return f"'{where}': {message}" if where else message
    return f"'{where}' is {given!r}: {message}" if where else message


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(map(str, location))


def _nearest_key(location: tuple[Any, ...], model: type[BaseModel]) -> str | None:
    """Returns the known key that an unknown one stands for, as section.key, or None where there is none.

    It is the key of that name in another section, else the one that other trainers call so, else the one in the same
    section that is spelled most alike, else such a one elsewhere.
    """
    *parents, leaf = map(str, location)
    keys = dict.fromkeys(key for key, _ in fields_of(model))
    in_a_list = any(isinstance(part, int) for part in location)  # whose elements have no keys elsewhere
    if not in_a_list:
        elsewhere = [key for key in keys if key.rpartition(".")[2] == leaf]
        if len(elsewhere) == 1:
            return elsewhere[0]
        if called_so := [key for key in FIELDS_OF.get(leaf, ()) if key in keys]:
            return called_so[0]
    close = difflib.get_close_matches(leaf, _keys_beside(location, model), n=1, cutoff=0.7)
    if close:
        return _dotted((*parents, close[0]))
    leaves = {key.rpartition(".")[2]: key for key in keys}
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)
    return leaves[close[0]] if close and not in_a_list else None


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each field of a file's class that is no section itself, as section.key, with what pydantic knows of it."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _keys_beside(location: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    section: Any = model
    for part in location[:-1]:
        if isinstance(part, int):
            continue  # an element of a list, whose type is in the list's
        section = section.model_fields[part].annotation
        section = next(iter(get_args(section)), section)
    return list(section.model_fields)


def dump(config: RunConfig) -> str:
    """Returns the resolved tree as YAML, in the order of the fields."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


LATER = (
    "model.condition_entry",
    "model.copied_blocks",
    "model.t5",
    "model.text_tokens",
    "model.method",
    "model.rank",
    *(f"model.frozen.{name}" for name in FrozenConfig.model_fields),
    "engine.deterministic",
    "engine.tf32",
    "engine.compile",
    "engine.activations",
    "optimizer.name",
    "optimizer.lora_learning_rate",
    *(f"flow.{name}" for name in FlowConfig.model_fields),
)
"""Fields that versions before 2026-11-30 did not have: at their defaults they say what those did."""


def without_later_fields(tree: dict[str, Any]) -> dict[str, Any]:
    """Removes from a run's tree, in place, what earlier versions did not have, so that saved digests stay the same.

    Only fields at their defaults are removed: each of `model`, `engine` and `optimizer` by itself, and the sections
    `flow` and `model.frozen` where all of them is at its default. Where validation.guidance_scale is not set it becomes
    7.5, as it was in those versions.
    """
    later = RunConfig.model_fields["flow"].default
    if tree.get("flow") == later.model_dump(mode="json"):
        del tree["flow"]
    if tree["model"].get("frozen") == FrozenConfig().model_dump(mode="json"):
        del tree["model"]["frozen"]
    sections = {"model": ModelConfig, "engine": EngineConfig, "optimizer": OptimizerConfig}
    for section, fields in ((name, kind.model_fields) for name, kind in sections.items()):
        for name in (one.partition(".")[2] for one in LATER if one.startswith(f"{section}.")):
            if name in fields and tree[section].get(name) == fields[name].default:
                tree[section].pop(name, None)
    if tree["validation"].get("guidance_scale") is None:
        tree["validation"]["guidance_scale"] = 7.5
    return tree


FOLLOWS_BASE = {"validation.guidance_scale"}
"""Fields that a run may leave to its base's family; what was saved has the number."""


def changes(before: str, now: str) -> list[str]:
    """Lists the fields that differ between two dumps, each as `section.key: old -> new`.

    Fields that the older dump's version did not have are not listed, nor those that are now left to the base's family.
    """
    old, new = (with_new_names(dict(_leaves(yaml.safe_load(text)))) for text in (before, now))
    names = [*new, *(name for name in old if name not in new)]
    changed = [name for name in names if old.get(name) != new.get(name)]
    left = {name for name in FOLLOWS_BASE if new.get(name) is None} | {name for name in LATER if name not in old}
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in changed if name not in left]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield prefix, without_secrets(tree) if isinstance(tree, str) else tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
