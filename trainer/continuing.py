"""What a start would do with what lies in its run's folder already, seen without torch."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from controlbooth.trainer.config import ConfigError, RunConfig, changes, dump, load_config, run_folder


@dataclass(frozen=True)
class Before:
    """The latest whole checkpoint of a run."""

    step: int
    changed: list[str]
    """`section.key: old -> new` of each field that is asked for now and was set otherwise when it was saved; not the
    folder that holds the run, which may have been moved."""


def found_before(config: RunConfig) -> Before | None:
    """None where the run's folder holds no whole checkpoint. One whose settings cannot be read is damaged, and passed
    over here as the start passes it over, which names it."""
    for checkpoint in reversed(checkpoint_folders(run_folder(config))):
        if (checkpoint / "COMPLETE").is_file():
            with contextlib.suppress(ConfigError):
                return compared_with(checkpoint, config)
    return None


def compared_with(checkpoint: Path, config: RunConfig) -> Before:
    """checkpoint: a whole one of the run of this configuration. Raises ConfigError where its own cannot be read."""
    saved = load_config(checkpoint / "config.yaml").model_copy(update={"output": config.output})
    return Before(step_of(checkpoint), changes(dump(saved), dump(config)))


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders with the names that checkpoints get, whole or not, oldest first. A copy that a person has made beside
    them under another name is no checkpoint: it is neither read nor deleted."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if re.fullmatch(r"step-(\d{8}|[1-9]\d{8,})", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells: 400 for step-00000400."""
    return int(checkpoint.name.removeprefix("step-"))


def is_finished(before: Before, config: RunConfig) -> bool:
    return before.step >= config.max_steps


def describe_finished(before: Before, config: RunConfig) -> str:
    """Why nothing is trained, what to do, and which of the settings asked for the run does not have."""
    more = f"max_steps={config.max_steps}" + (f" above {before.step}" if before.step > config.max_steps else "")
    told = f"{run_folder(config)} is finished at step {before.step}. Raise {more} to go on, or change the name"
    if before.changed:
        told += f". It was trained with other settings, and is not trained with these: {'; '.join(before.changed)}"
    return told


def describe_start(config: RunConfig) -> list[str]:
    """For people, in lines: whether a start begins, goes on or does nothing, and with which changes."""
    before = found_before(config)
    if before is None:
        return [f"{config.name} in {run_folder(config)}, which is new"]
    if is_finished(before, config):
        return [describe_finished(before, config)]
    lines = [f"{config.name} in {run_folder(config)}, which goes on from step {before.step}"]
    return lines + ([f"changed since step {before.step}: {'; '.join(before.changed)}"] if before.changed else [])
