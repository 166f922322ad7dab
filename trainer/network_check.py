"""What a run's base and ControlNet lack, told before anything is written, from their files' headers.

The networks are made without memory and every tensor that their files name is compared with them, so it takes seconds
where reading gigabytes takes minutes. What values there are is seen when they are read. Importing this file is cheap;
calling it imports torch.
"""

from collections.abc import Callable, Iterator
from typing import Any

from controlbooth.data.records import read_json
from controlbooth.trainer.config import RunConfig, base_folder, run_folder
from controlbooth.trainer.continuing import latest_readable, step_of
from controlbooth.trainer.integrity import STATE
from controlbooth.trainer.subjects import SubjectRunConfig


def network_problems(config: RunConfig) -> Iterator[str]:
    """Why a ControlNet run cannot work with its base and its ControlNet as they are now."""
    base = yield from _base_or_problem(config.model.base, config.model.family)
    if base is None:
        return
    yield from _problem(f"model.controlnet is {config.model.controlnet!r}", lambda: _controlnet(config, base))
    yield from _problem("", lambda: _check_latest(config, base))
    yield from _prompt_problems(base, config.validation.prompts)


def subjects_network_problems(config: SubjectRunConfig) -> Iterator[str]:
    """Why a run of subjects cannot work with its base as it is now."""
    from controlbooth.trainer.same_base import check_same_base, read_base_facts

    base = yield from _base_or_problem(config.model.base, config.model.family)
    if base is not None:
        folder = config.output / config.name
        remedy = f"Put it back as it was, or give the run another name: {folder} holds subjects that were trained on it"
        saved = read_base_facts(folder) or {}
        yield from _problem("", lambda: check_same_base(saved, base, "when this run began", remedy))


def _base_or_problem(name: str, family: str) -> Any:
    from controlbooth.models.pretrained import load_base  # seconds, and the rest of this file none

    found: list[Any] = []
    where = base_folder(name)
    yield from _problem(f"model.base is {name!r}", lambda: found.append(load_base(where, family, device="meta")))
    return found[0] if found else None


def _controlnet(config: RunConfig, base: Any) -> None:
    from controlbooth.models.controlnet import build_controlnet
    from controlbooth.models.pretrained import load_controlnet

    model = config.model
    if model.controlnet != "unet":
        load_controlnet(model.controlnet, base.unet)
        return
    build_controlnet(
        base.unet,
        model.hint_channels,
        device="meta",
        trainable_copy=model.trainable_copy,
        connections=model.connections,
        hint_network=model.hint_network,
    )


def _check_latest(config: RunConfig, base: Any) -> None:
    """Raises ConfigError where the base has changed since the latest checkpoint, of which weights are not compared."""
    from controlbooth.trainer.same_base import back_or_anew, check_same_base

    latest, _ = latest_readable(run_folder(config))
    if latest is not None and step_of(latest) < config.max_steps:
        saved = read_json(latest / STATE, "Delete the checkpoint")
        check_same_base(saved, base, f"at step {step_of(latest)}", back_or_anew(latest))


def _prompt_problems(base: Any, prompts: tuple[str, ...]) -> Iterator[str]:
    from controlbooth.data.tokens import equal_prompts, shortened

    for one, other in equal_prompts(base.tokenizers, prompts):
        yield (
            f"validation.prompts: {shortened(one)!r} and {shortened(other)!r} are one prompt to the base, whose "
            f"tokenizer keeps {min(t.model_max_length for t in base.tokenizers)} tokens. Shorten them, or leave one out"
        )


def _problem(named: str, check: Callable[[], object]) -> Iterator[str]:
    """What a check raises, with the name of what is checked; nothing where it raises nothing."""
    try:
        check()
    except (ValueError, OSError) as error:
        yield f"{named}: {error}" if named else str(error)
