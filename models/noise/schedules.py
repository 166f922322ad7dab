"""The noise that a base was trained on, read from whatever scheduler its folder names; and samplers on that schedule.

A scheduler's configuration mixes two things: betas, timesteps and what is predicted, which are the base's, and how a
sampler steps (`algorithm_type`, `use_karras_sigmas`, clipping, ...), which is the sampler's own. Only the first are
taken, so a sampler by its name here draws the same pictures whatever scheduler the folder was saved with.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from controlbooth.data.errors import UserError
from controlbooth.models.files.weight_files import read_json
from controlbooth.models.noise.checks import check_scheduler

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
"""All deterministic: DDIM with eta 0, DPM++ 2M and Euler without noise. A picture then depends on its own first noise
alone."""
_OWN: dict[str, dict[str, Any]] = {
    "ddim": dict(clip_sample=False, thresholding=False),
    "unipc": dict(thresholding=False),
    "dpm++": dict(algorithm_type="dpmsolver++", thresholding=False),
    "euler": {},
}
"""What must not be left to a class's default: latents are not clipped to [-1, 1], as pixels would be."""
FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
)
"""The base's part of a scheduler's configuration. The last is DDIM's: how much noise is left after the last step."""


def read_noise_scheduler(path: Path) -> DDPMScheduler:
    """Reads a scheduler_config.json, of whatever scheduler, as the DDPMScheduler that the base is trained with.

    Raises FileNotFoundError, and ValueError, naming the file.
    """
    config = read_json(path)
    check_scheduler(config, str(path))
    return make_noise_scheduler(config, str(path))


def make_noise_scheduler(config: Mapping[str, Any], where: str) -> DDPMScheduler:
    """Makes DDPM's scheduler with the base's part of `config` (FIELDS); what is not given has DDPM's defaults.

    `set_alpha_to_one`, which DDPM does not have, is kept in its configuration for samplers. Raises ValueError, naming
    `where`.
    """
    given = {name: config[name] for name in FIELDS if name in config}
    others = {name: given.pop(name) for name in ("set_alpha_to_one",) if name in given}
    try:
        scheduler = DDPMScheduler(**given, clip_sample=False, thresholding=False)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{where} describes no noise schedule: {error}. Fetch it again") from error
    scheduler.register_to_config(**others)
    return scheduler


def given_fields(noise_scheduler: DDPMScheduler) -> dict[str, Any]:
    """Returns the base's part of its configuration (FIELDS), as far as its file states it.

    What the file leaves out is left out here, since samplers have defaults of their own for it, as in diffusers'
    pipelines.
    """
    config = noise_scheduler.config
    defaults = config.get("_use_default_values", ())
    return {name: config[name] for name in FIELDS if name in config and name not in defaults}


def make_sampler(name: str, noise_scheduler: DDPMScheduler) -> Any:
    """Makes the sampler of this name, of SCHEDULERS, on a base's schedule. Raises ValueError if they do not fit."""
    takes = inspect.signature(SCHEDULERS[name].__init__).parameters
    accepted = {field: value for field, value in given_fields(noise_scheduler).items() if field in takes}
    try:
        return SCHEDULERS[name](**accepted, **_OWN[name])
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"scheduler {name} cannot take the base's noise schedule: {error}. Use ddim") from error
