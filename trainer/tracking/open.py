"""Opens a run's tracker as its configuration says."""

from collections.abc import Callable, Sequence
from pathlib import Path

from controlbooth.trainer.config.run import RunConfig, tracking_uri
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run.attempt import Attempt
from controlbooth.trainer.run.process import say
from controlbooth.trainer.tracking.tracker import Status, Tracker

IN_MLFLOW: dict[str, Status] = {"failed": "FAILED", "stopped": "KILLED", "finished": "FINISHED"}


def report_page(world: World, ways: Sequence[str]) -> None:
    say(world, f"MLflow: {', then '.join(ways)}")


def open_tracker(
    folder: Path,
    config: RunConfig,
    tags: dict[str, str],
    attempt: Attempt | None = None,
    tell: Callable[[Sequence[str]], None] | None = None,
) -> Tracker:
    """Opens the tracker of a run as its configuration says.

    attempt: the one that has taken the run; without one, lines are added to the files of a training that may be
    running.
    tell: as for Tracker.
    """
    return Tracker(
        folder,
        tracking_uri(config),
        config.tracking.experiment,
        config.name,
        params=config.model_dump(mode="json"),
        tags=tags,
        system_metrics_seconds=config.tracking.system_metrics_seconds,
        made_in=attempt.folder if attempt else None,
        tell=tell,
    )
