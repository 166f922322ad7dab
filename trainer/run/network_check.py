"""Tells a fault of a run's networks as a problem, before anything is written."""

from collections.abc import Callable, Iterator


def problem(named: str, check: Callable[[], object]) -> Iterator[str]:
    """Yields the error that a check raises, behind the name of what is checked; nothing where it raises nothing."""
    try:
        check()
    except (ValueError, OSError) as error:
        yield f"{named}: {error}" if named else str(error)
