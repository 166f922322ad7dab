"""What a run of subjects lacks of its base, told before anything is written, from its files' headers."""

from collections.abc import Iterator

from controlbooth.models.families import refuse_for_subjects
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.run.network_check import base_or_problem, problem


def subjects_network_problems(config: SubjectRunConfig) -> Iterator[str]:
    """Yields the reasons why a run of subjects cannot work with its base as it is now."""
    from controlbooth.trainer.run.same_base import check_same_base, read_base_facts

    base = yield from base_or_problem(config.model.base, config.model.family)
    if base is not None:
        yield from problem("", lambda: refuse_for_subjects(base.family, f"model.base {config.model.base!r}"))
        folder = config.output / config.name
        remedy = f"Put it back as it was, or give the run another name: {folder} holds subjects that were trained on it"
        saved = read_base_facts(folder) or {}
        yield from problem("", lambda: check_same_base(saved, base, "when this run began", remedy))
