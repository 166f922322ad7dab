"""What a start would do with what lies in its run's folder already, seen without torch."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlbooth.data.errors import UserError
from controlbooth.data.files.records import is_moment, is_text, is_whole, maybe, read_json, read_yaml
from controlbooth.trainer.config.loading import changes, dump, load_config
from controlbooth.trainer.config.run import ModelConfig, RunConfig, run_folder
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.run.integrity import CONFIG, records_damage, step_of, what_is_missing

HOW = (
    "tracking.",
    "checkpoint.",
    "micro_batch_size",
    *(f"model.{name}" for name in ("gradient_checkpointing", "frozen.shards", "frozen.stream")),
    *(f"data.{name}" for name in ("threads", "prefetch_steps", "cache", "max_bad_rate")),
    *(f"engine.{name}" for name in ("offload", "activations", "hang_timeout_seconds")),
)
"""How the names of settings begin that say how a run is trained and kept, and not what becomes of it."""
SHAPING = {
    *("hint_channels", "hint_network", "trainable_copy", "only_mid_control"),
    *("copied_blocks", "condition_entry", "t5", "text_tokens", "method", "rank"),
}
"""Fields of `model` that say which weights there are and which of them learn: the same from start to end."""


def shaping(config: RunConfig) -> dict[str, Any]:
    """Returns the settings of the network that a run keeps from start to end, as `check_same_run` takes them: those of
    SHAPING, and in which precision the base is held."""
    model = config.model
    return model.model_dump(mode="json", include=SHAPING) | {"frozen.precision": model.frozen.precision}


RECORD = "attempt.json"
"""In a run's folder: which attempt has taken it last; attempt.py."""
ATTEMPT = {
    **{"number": is_whole, "identity": maybe(is_text), "given": maybe(is_whole)},
    **{"host": maybe(is_text), "process": maybe(is_whole), "time": maybe(is_moment)},
}


class CheckpointError(UserError):
    """A checkpoint that does not belong to this run; the message says what differs and what to do."""


class AllDamaged(CheckpointError):
    """There are checkpoints, and none that can be gone on from."""


@dataclass(frozen=True)
class Before:
    """The latest whole checkpoint of a run."""

    step: int
    changed: list[str]
    """`section.key: old -> new` of each field that is asked for now and was set otherwise when it was saved; not the
    folder that holds the run, which may have been moved."""


def read_record(run: Path) -> dict[str, Any]:
    """Reads attempt.json: `number`, `identity`, `given` by the engine or null, `host`, `process`, `time`. Returns an
    empty dict where there is none yet.

    Raises Damaged where it cannot be read.
    """
    return read_json(run / RECORD, f"Delete it if no other training is in {run}", ATTEMPT, missing={})


def holder_of(record: Mapping[str, Any]) -> str:
    """Formats who holds a run, as ` (process 7 on a host, since a time)`; empty where there is no such record."""
    if record.get("time") is None:
        return ""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["time"]))
    return f" (process {record.get('process')} on {record.get('host')}, since {since})"


def found_before(config: RunConfig) -> Before | None:
    """Returns the latest checkpoint compared with this configuration; None where the run's folder holds none that can
    be gone on from, as far as its small files tell."""
    latest = latest_readable(run_folder(config))[0]
    try:
        return compared_with(latest, config) if latest else None
    except ConfigError:
        return None  # the start refuses it, and says so


def latest_readable(run: Path) -> tuple[Path | None, list[str]]:
    """Finds the latest checkpoint whose files are there in their sizes and whose small files are whole. Returns it, or
    None, and what is wrong with later ones.

    The start compares all bytes of it too, and passes it over where one has changed.
    """
    damages: list[str] = []
    for checkpoint in reversed(checkpoint_folders(run)):
        damage = what_is_missing(checkpoint) or records_damage(checkpoint)
        if damage is None:
            return checkpoint, damages
        damages.append(damaged(checkpoint, damage))
    return None, damages


def damaged(checkpoint: Path, damage: str) -> str:
    return f"{checkpoint} is damaged, in {damage}"


def all_damaged(damages: Sequence[str]) -> str:
    return f"{'; '.join(damages)}. There is no other: delete them to begin anew"


def compared_with(checkpoint: Path, config: RunConfig) -> Before:
    """Compares a checkpoint's configuration with the one that is asked for.

    checkpoint: a whole one of the run of this configuration. Raises ConfigError where its own cannot be read.
    """
    saved = load_config(checkpoint / CONFIG).model_copy(update={"output": config.output})
    return Before(step_of(checkpoint), changes(dump(saved), dump(config)))


def checkpoint_folders(run: Path) -> list[Path]:
    """Lists the folders with the names that checkpoints get, whole or not, oldest first. A copy that a person has made
    beside them under another name is no checkpoint: it is neither read nor deleted."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if re.fullmatch(r"step-(\d{8}|[1-9]\d{8,})", path.name)), key=step_of)


def is_finished(before: Before, config: RunConfig) -> bool:
    return before.step >= config.max_steps


def asks_for_another(before: Before) -> bool:
    """Tells whether a finished run is asked for with settings that it does not have: fewer steps, or what shapes the
    result."""
    return any(not change.startswith(HOW) for change in before.changed)


def describe_finished(before: Before, config: RunConfig) -> str:
    """Says why nothing is trained, what to do, and which of the settings asked for the run does not have."""
    more = f"max_steps={config.max_steps}" + (f" above {before.step}" if before.step > config.max_steps else "")
    told = f"{run_folder(config)} is finished at step {before.step}. Raise {more} to go on, or change the name"
    if before.changed:
        told += f". It was trained with other settings, and is not trained with these: {'; '.join(before.changed)}"
    return told


def describe_start(config: RunConfig) -> list[str]:
    """Describes a start for people, in lines: whether it begins, goes on or does nothing, and with which changes."""
    before = found_before(config)
    if before is None:
        return [f"{config.name} in {run_folder(config)}, which is new"]
    if is_finished(before, config):
        return [describe_finished(before, config)]
    lines = [f"{config.name} in {run_folder(config)}, which goes on from step {before.step}"]
    return lines + ([f"changed since step {before.step}: {'; '.join(before.changed)}"] if before.changed else [])


def check_same_run(state: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses a checkpoint whose optimizer states cannot be carried over, with what to set back.

    now: what is known of the run as it is asked for, as `state` has it, and `model`, of `shaping`, which is compared
    with what is in config.yaml. Raises CheckpointError.
    """
    fields = {
        "zero_stage": "engine.zero_stage",
        "precision": "engine.precision",
        "base_digest": "model.base, of digest",
        "condition": "data.condition",
        "optimizer": "optimizer.name",
    }
    state = {"optimizer": "adamw"} | dict(state)  # which older versions had alone
    pairs = [(field, state.get(key), now[key]) for key, field in fields.items() if key in now]
    saved = read_yaml(checkpoint / CONFIG, "Delete the checkpoint to use an older one")["model"]
    # A field that an older version did not have says what that version did by its default.
    held = ModelConfig(base="").model_dump(mode="json") | saved
    held["frozen.precision"] = held["frozen"]["precision"]
    pairs += [(f"model.{name}", held[name], value) for name, value in now["model"].items() if name in held]
    for field, before, asked in pairs:
        if before != asked:
            raise CheckpointError(
                f"{checkpoint} was saved with {field} {before!r}, and this run has {asked!r}. "
                "Set it back, or give the run another name to start anew "
                f"(model.controlnet={checkpoint}/controlnet starts from its weights)"
            )


def check_unlocked(saved: Mapping[str, Any], config: RunConfig, checkpoint: Path) -> bool:
    """Tells whether a checkpoint's decoder has learned. Raises CheckpointError where that began at another step than
    the run's configuration says.

    saved: the checkpoint's state.
    """
    at, unlocked = config.model.unlock_decoder_at, bool(saved.get("unlocked"))
    if unlocked and at != saved["unlocked_at"]:
        raise CheckpointError(
            f"{checkpoint} has a decoder that learns since step {saved['unlocked_at']}, and model.unlock_decoder_at is "
            f"{'not set' if at is None else at}. Set it back, or give the run another name to start anew"
        )
    return unlocked


def check_position(position: int, step: int, config: RunConfig) -> None:
    """Raises ConfigError where the samples that a checkpoint has consumed are not those of its steps."""
    if position != step * config.global_batch_size:
        raise ConfigError(
            f"the checkpoint of step {step} has consumed {position} samples, which is not {step} times "
            f"global_batch_size={config.global_batch_size}. Set it back to {position // max(1, step)}, or start "
            "another run from its weights with model.controlnet"
        )
