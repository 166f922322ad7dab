"""Keys of a run that had another name once. Files, overrides and run folders with the old ones go on working."""

from collections.abc import Mapping
from typing import Any, TypeVar

from controlbooth.trainer.config.section import ConfigError

RENAMED = {"data.columns": "data.latent_cache"}
"""Old name -> the name since, both as section.key."""

Value = TypeVar("Value")


def renamed(key: str) -> str:
    """Returns the present name of a key, as section.key; most keys never had another."""
    return RENAMED.get(key, key)


def with_new_names(flat: Mapping[str, Value]) -> dict[str, Value]:
    """Returns a mapping whose keys, as section.key, have their present names."""
    return {renamed(key): value for key, value in flat.items()}


def rename_keys(tree: Any, source: str) -> None:
    """Gives the keys in a run's tree their present names, in place.

    source: the file, for the message. Raises ConfigError where the tree has a key under both of its names: one of the
    two values would be lost silently.
    """
    for old, new in RENAMED.items():
        (section, was), (_, name) = old.split("."), new.split(".")
        fields = tree.get(section) if isinstance(tree, dict) else None
        if not isinstance(fields, dict) or was not in fields:
            continue
        if name in fields:
            raise ConfigError(f"{source} has {old} and {new}, which is its name since: leave {old} out")
        fields[name] = fields.pop(was)


def with_old_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Gives the keys in a run's tree their first names again, in place, so that saved digests stay the same."""
    for old, new in RENAMED.items():
        (section, was), (_, name) = old.split("."), new.split(".")
        if name in tree.get(section, {}):
            tree[section][was] = tree[section].pop(name)
    return tree
