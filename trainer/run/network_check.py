"""Tells a fault of a run's networks as a problem, before anything is written."""

from collections.abc import Callable, Iterator

from controlbooth.trainer.config.run import FrozenConfig


def package_problems(frozen: FrozenConfig) -> Iterator[str]:
    """Yields what a base lacks to be held in the precision that is asked for: the package that does it."""
    from controlbooth.models.quantized import check_installed  # seconds, of torch

    yield from problem("", lambda: check_installed(frozen.precision))


def problem(named: str, check: Callable[[], object]) -> Iterator[str]:
    """Yields the error that a check raises, behind the name of what is checked; nothing where it raises nothing."""
    try:
        check()
    except (ValueError, OSError) as error:
        yield f"{named}: {error}" if named else str(error)
