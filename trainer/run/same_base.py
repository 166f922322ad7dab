"""Whether the base that a run goes on with is the one that it was begun with, in everything that decides on results.

Checkpoints of a ControlNet run note it in state.json, a run of subjects in base.json: `base`, models/identity.py's, and
the versions of `libraries`. What was written before they did goes on, and it is said that this was not compared.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlbooth.models.base import Base
from controlbooth.models.identity import describe_differences, differences, libraries
from controlbooth.trainer.config.section import ConfigError

BASE_FILE = "base.json"
"""In the folder of a run of subjects."""


def base_facts(base: Base) -> dict[str, Any]:
    """Returns what is noted of a base when something is made with it."""
    return {"base": base.identity, "libraries": libraries()}


def back_or_anew(checkpoint: Path) -> str:
    """Says what to do about a checkpoint of a ControlNet run that cannot be gone on from."""
    return (
        "Put it back as it was, or give the run another name to start anew "
        f"(model.controlnet={checkpoint}/controlnet starts from its weights)"
    )


def check_same_base(saved: Mapping[str, Any], base: Base, when: str, remedy: str) -> None:
    """Raises ConfigError where `base` differs from the one that was noted, naming what, with both values.

    saved: what `base_facts` made, or an older record, which has nothing to compare. when: such as "at step 2". Of a
    base on the device "meta" the weights are not compared.
    """
    found = differences(saved.get("base", {}), base.identity)
    if found:
        raise ConfigError(f"{base.path}: {describe_differences(found, when)}. {remedy}")


def describe_base_changes(saved: Mapping[str, Any], when: str) -> list[str]:
    """Lists, a line each, what a person should know of an accepted record: what it lacks, and other libraries."""
    if "base" not in saved:
        return [
            f"what was made {when} is of a version that noted nothing of the base but its weights: whether its "
            "scheduler, tokenizer and configurations are those of now was not compared. From here on it is"
        ]
    now = libraries()
    others = [
        f"{name} was {version} and is {now[name]}"
        for name, version in saved.get("libraries", {}).items()
        if name in now and now[name] != version
    ]
    return [f"other libraries than {when}, so last bits may differ: {', '.join(others)}"] if others else []


def read_base_facts(folder: Path) -> dict[str, Any] | None:
    """Reads what a run of subjects has noted of its base; returns None where it has noted nothing. Raises ConfigError
    where that is damaged."""
    path = folder / BASE_FILE
    try:
        saved = json.loads(path.read_text())
        return {"base": dict(saved["base"]), "libraries": dict(saved["libraries"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}). It notes the base that the run was begun with: "
            "where you know that it has not changed, delete this file, and the next start writes it anew"
        ) from None
