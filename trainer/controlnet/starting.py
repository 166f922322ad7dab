"""What keeps a run from being worth anything, found before anything is written or taken, and without torch.

The dry run and a submission ask it (launch/preflight/run.py), and so does the start itself, on its first rank: so they
refuse the same, in the same words. What a loaded base or a read sample tells besides, only the start can know.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from controlbooth.data.files.records import is_mapping, is_whole, read_json
from controlbooth.trainer.config.run import RunConfig, order_settings, run_folder, sources
from controlbooth.trainer.run.continuing import (
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
    shaping,
)
from controlbooth.trainer.run.integrity import STATE
from controlbooth.trainer.run.starting import folder_problems
from controlbooth.trainer.tracking.mlflow_address import tracking_problems
from controlbooth.trainer.tracking.spool import check_files


def refusals(config: RunConfig) -> list[str]:
    """Returns why the run cannot start, each with its value and remedy; an empty list where nothing is known."""
    folder = run_folder(config)
    problems = [*tracking_problems(config), *folder_problems(folder)]
    problems += [] if problems else [*record_problems(folder), *resume_problems(config)]
    return problems


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
    from controlbooth.data.loading.plan import (
        check_version,
        resume_position,  # numpy, which a new run does without
    )

    check_version(state["order"], str(latest))
    now = {
        "zero_stage": config.engine.zero_stage,
        "condition": config.data.condition,
        "optimizer": config.optimizer.name,
        "model": shaping(config),
    }
    if config.engine.precision != "auto":
        now["precision"] = config.engine.precision
    check_same_run(state, now, latest)
    check_unlocked(state, config, latest)
    if (order := planned_order(config, state["order"])) is not None:
        check_position(resume_position(state["order"], *order), state["step"], config)


def planned_order(config: RunConfig, saved: dict[str, Any]) -> tuple[Any, str] | None:
    """Returns the order in which the run goes on and its data's fingerprint; None where the data are missing or not
    indexed, which is reported elsewhere.

    saved: the checkpoint's order. Raises ValueError where no order can be planned.
    """
    from controlbooth.data.loading.plan import continued_history, plan_order, source_weights
    from controlbooth.data.shards.manifest import join_datasets, open_dataset

    mixed, data = sources(config), config.data
    try:
        dataset = join_datasets([open_dataset(source.shards) for source in mixed])
    except (OSError, ValueError):
        return None
    weights = source_weights(dataset, data.condition, [one.weight for one in mixed], [one.repeat for one in mixed])
    history = continued_history(saved, weights)
    order, _ = plan_order(dataset, order_settings(config), history)
    return order, dataset.fingerprint
