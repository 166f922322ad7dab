"""What a run of subjects lacks of its base, told before anything is written, from its files' headers."""

from collections.abc import Iterator
from typing import Any

from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.run.network_check import package_problems, problem


def subjects_network_problems(config: SubjectRunConfig) -> Iterator[str]:
    """Yields the reasons why a run of subjects cannot work with its base as it is now."""
    from controlbooth.trainer.run.same_base import check_same_base, read_base_facts

    yield from package_problems(config.model.frozen)
    found: list[Any] = []
    yield from problem(f"model.base is {config.model.base!r}", lambda: found.append(_base(config)))
    if found:
        folder = config.output / config.name
        remedy = f"Put it back as it was, or give the run another name: {folder} holds subjects that were trained on it"
        saved = read_base_facts(folder) or {}
        yield from problem("", lambda: check_same_base(saved, found[0], "when this run began", remedy))


def _base(config: SubjectRunConfig) -> Any:
    """Reads the base without its weights, in the run's precision, which some text encoders do not bear."""
    import torch  # seconds, and the rest of this file none

    from controlbooth.trainer.engine.deepspeed import DTYPES
    from controlbooth.trainer.run.base import open_base

    return open_base(config, DTYPES.get(config.precision, torch.float32), "meta")
