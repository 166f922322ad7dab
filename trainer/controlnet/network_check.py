"""What a run's base and ControlNet lack, told before anything is written, from their files' headers.

The networks are made without memory and every tensor that their files name is compared with them, so it takes seconds
where reading gigabytes takes minutes. What values there are is seen when they are read. Importing this file is cheap;
calling it imports torch.
"""

from collections.abc import Iterator
from typing import Any

from controlbooth.data.files.records import read_json
from controlbooth.trainer.config.run import RunConfig, run_folder
from controlbooth.trainer.run.continuing import latest_readable, step_of
from controlbooth.trainer.run.integrity import STATE
from controlbooth.trainer.run.network_check import package_problems, problem


def network_problems(config: RunConfig) -> Iterator[str]:
    """Yields why a ControlNet run cannot work with its base and its ControlNet as they are now."""
    yield from package_problems(config.model.frozen)
    found: list[Any] = []
    yield from problem(f"model.base is {config.model.base!r}", lambda: found.append(_base(config)))
    if not found:
        return
    base = found[0]
    yield from problem(f"model.controlnet is {config.model.controlnet!r}", lambda: _controlnet(config, base))
    yield from problem("", lambda: _check_latest(config, base))
    yield from _prompt_problems(base, config.validation.prompts)


def _base(config: RunConfig) -> Any:
    import torch

    from controlbooth.trainer.engine.deepspeed import DTYPES
    from controlbooth.trainer.run.base import open_base

    return open_base(config, DTYPES.get(config.engine.precision, torch.float32), "meta")


def _controlnet(config: RunConfig, base: Any) -> None:
    from controlbooth.trainer.controlnet.build import continued_controlnet, new_controlnet

    model = config.model
    if model.controlnet != "unet":
        continued_controlnet(base.denoiser, model)
        return
    new_controlnet(base.denoiser, model, device="meta")


def _check_latest(config: RunConfig, base: Any) -> None:
    """Raises ConfigError where the base has changed since the latest checkpoint, of which weights are not compared."""
    from controlbooth.trainer.run.same_base import back_or_anew, check_same_base

    latest, _ = latest_readable(run_folder(config))
    if latest is not None and step_of(latest) < config.max_steps:
        saved = read_json(latest / STATE, "Delete the checkpoint")
        check_same_base(saved, base, f"at step {step_of(latest)}", back_or_anew(latest))


def _prompt_problems(base: Any, prompts: tuple[str, ...]) -> Iterator[str]:
    from controlbooth.data.loading.tokens import equal_prompts, shortened

    for one, other in equal_prompts(base.tokenizers, prompts):
        yield (
            f"validation.prompts: {shortened(one)!r} and {shortened(other)!r} are one prompt to the base, whose "
            f"tokenizer keeps {min(t.model_max_length for t in base.tokenizers)} tokens. Shorten them, or leave one out"
        )
