"""What keeps a run from being worth anything, found before anything is written or taken, and without torch.

The dry run and a submission ask it (launch/preflight.py), and so does the start itself, on its first rank: so they
refuse the same, in the same words. What a loaded base or a read sample tells besides, only the start can know.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from controlbooth.data.locks import know_locks
from controlbooth.data.records import is_mapping, is_whole, read_json
from controlbooth.trainer.config import (
    ConfigError,
    RunConfig,
    Tracked,
    order_settings,
    run_folder,
    sources,
    tracking_uri,
)
from controlbooth.trainer.continuing import (
    SHAPING,
    all_damaged,
    asks_for_another,
    check_position,
    check_same_run,
    check_unlocked,
    compared_with,
    describe_finished,
    is_finished,
    latest_readable,
    read_record,
)
from controlbooth.trainer.integrity import STATE
from controlbooth.trainer.mlflow_address import unusable
from controlbooth.trainer.spool import check_files

WRITTEN = ("checkpoints", "samples", "job")
"""Folders of a run's folder that a start writes to."""


def refusals(config: RunConfig) -> list[str]:
    """Returns why the run cannot start, each with its value and remedy; an empty list where nothing is known."""
    folder = run_folder(config)
    problems = [*tracking_problems(config), *folder_problems(folder)]
    problems += [] if problems else [*record_problems(folder), *resume_problems(config)]
    return problems


def tracking_problems(config: Tracked) -> Iterator[str]:
    """Says where MLflow could never keep anything; a server that is down now is waited for."""
    uri = tracking_uri(config)
    if config.tracking.uri is not None and (why := unusable(uri)):
        yield f"tracking.uri is {uri!r}, where MLflow can keep nothing: {why}"


def folder_problems(folder: Path) -> Iterator[str]:
    """Says why a run's folder cannot be made or written to."""
    if why := unwritable(folder):
        yield f"the run's folder would be {folder}, but {why}. Change output or name"


def unwritable(folder: Path) -> str | None:
    """Returns why a folder cannot be made or written to; None where it can."""
    existing = nearest(folder)
    if not existing.is_dir():
        return f"{existing} is a file"
    for place in (existing, *(folder / name for name in WRITTEN)):
        if not place.exists():
            continue
        try:
            know_locks(place)
        except OSError as error:
            return f"{place} is not writable ({error.strerror})"
    return None


def nearest(path: Path) -> Path:
    """The path itself or the innermost of its parents, whichever exists: what decides whether it can be made."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def record_problems(folder: Path) -> Iterator[str]:
    """Says which of the run's own files is damaged without which it cannot go on."""
    for read in (read_record, check_files):
        try:
            read(folder)
        except (ValueError, OSError) as error:
            yield str(error)


def resume_problems(config: RunConfig) -> Iterator[str]:
    """Says why what lies in the run's folder cannot become the run that is asked for."""
    latest, damages = latest_readable(run_folder(config))
    if latest is None:
        if damages:
            yield all_damaged(damages)
        return
    try:
        before = compared_with(latest, config)
        if is_finished(before, config):
            if asks_for_another(before):
                yield describe_finished(before, config)
            return
        saved = {"step": is_whole, "order": is_mapping}
        check_continues(config, latest, read_json(latest / STATE, "Delete the checkpoint", saved))
    except (ValueError, OSError) as error:
        yield str(error)


def check_continues(config: RunConfig, latest: Path, state: dict[str, Any]) -> None:
    """Raises ValueError where the run cannot go on from a checkpoint: as far as its settings and indexed data tell."""
    from controlbooth.data.plan import check_version, resume_position  # numpy, which a new run does without

    check_version(state["order"], str(latest))
    now = {
        "zero_stage": config.engine.zero_stage,
        "condition": config.data.condition,
        "model": config.model.model_dump(mode="json", include=SHAPING),
    }
    if config.engine.precision != "auto":
        now["precision"] = config.engine.precision
    check_same_run(state, now, latest)
    check_unlocked(state, config, latest)
    if (order := planned_order(config, state["order"])) is not None:
        check_position(resume_position(state["order"], *order), state["step"], config)


def planned_order(config: RunConfig, saved: dict[str, Any]) -> tuple[Any, str] | None:
    """-> the order in which the run goes on, and its data's fingerprint; None where the data are not indexed, or not
    there, which is told elsewhere. saved: the checkpoint's order. Raises ValueError."""
    from controlbooth.data.manifest import join_datasets, open_dataset
    from controlbooth.data.plan import continued_history, plan_order, source_weights

    mixed, data = sources(config), config.data
    try:
        dataset = join_datasets([open_dataset(source.shards) for source in mixed])
    except (OSError, ValueError):
        return None
    weights = source_weights(dataset, data.condition, [one.weight for one in mixed], [one.repeat for one in mixed])
    history = continued_history(saved, weights)
    order, _ = plan_order(dataset, data.condition, history, **order_settings(config))
    return order, dataset.fingerprint


def refuse(problems: Sequence[str]) -> None:
    """Raises ConfigError with all of them, where there are any."""
    if problems:
        raise ConfigError("; ".join(problems))
