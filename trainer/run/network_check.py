"""Loads a base without its weights, and says what is wrong with it, before anything is written."""

from collections.abc import Callable, Iterator
from typing import Any

from controlbooth.trainer.config.run import base_folder


def base_or_problem(name: str, family: str) -> Any:
    from controlbooth.models.pretrained import load_base  # seconds, and the rest of this file none

    found: list[Any] = []
    where = base_folder(name)
    yield from problem(f"model.base is {name!r}", lambda: found.append(load_base(where, family, device="meta")))
    return found[0] if found else None


def problem(named: str, check: Callable[[], object]) -> Iterator[str]:
    """Yields the error that a check raises, behind the name of what is checked; nothing where it raises nothing."""
    try:
        check()
    except (ValueError, OSError) as error:
        yield f"{named}: {error}" if named else str(error)
