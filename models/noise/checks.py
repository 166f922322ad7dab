"""Whether a scheduler's configuration is one by which a base of a family can have been trained. Free of torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlbooth.data.errors import MissingFile, UserError
from controlbooth.models.families import Family

SAMPLERS = ("ddim", "unipc", "dpm++", "euler", "heun")
"""Names of the samplers of schedules.py, for command lines, which do without diffusers."""
NOISE_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDPM", "DDPMParallel", "DDIM", "DDIMInverse", "DDIMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete",
        "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep",
        "SASolver", "LCM", "TCD",
    )
)  # fmt: skip
"""Classes of diffusers whose noise is that of DDPM (arXiv 2006.11239): betas, and a prediction of noise or of v."""
PREDICTIONS = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


def scheduler_file(folder: Path) -> Path:
    """Returns the path of scheduler_config.json in a base's folder. Raises FileNotFoundError where it is not there."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise MissingFile(
            f"{path} does not exist. It says how noise is added and what the U-Net predicts: copy it from the base's "
            "diffusers release."
        )
    return path


FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Classes of diffusers whose noise is that of flow matching."""


def check_flow_scheduler(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a scheduler's configuration by which a base of flow matching cannot have been trained."""
    name = str(config.get("_class_name", FLOW_SCHEDULERS[0]))
    if name not in FLOW_SCHEDULERS:
        raise UserError(
            f"{where}: the scheduler is a {name}, and this base is of flow matching, whose folder names a "
            f"{FLOW_SCHEDULERS[0]}. Put the base's own scheduler_config.json there"
        )
    if config.get("num_train_timesteps", 1000) != 1000:
        raise UserError(
            f"{where}: num_train_timesteps is {config['num_train_timesteps']!r}, and flow matching has 1000"
        )
    for field, least in (("shift", 0.0), ("base_shift", None), ("max_shift", None)):
        value = config.get(field, 1.0)
        if not _is_number(value) or (least is not None and value <= least):
            raise UserError(
                f"{where}: {field} is {value!r}, and a number{' above 0' if least == 0 else ''} belongs there"
            )
    if (terminal := config.get("shift_terminal")) is not None and not (_is_number(terminal) and 0.0 < terminal < 1.0):
        raise UserError(f"{where}: shift_terminal is {terminal!r}, and null or a number from 0 to 1 belongs there")
    if (kind := config.get("time_shift_type", "exponential")) not in ("exponential", "linear"):
        raise UserError(f"{where}: time_shift_type is {kind!r}, and exponential or linear belongs there")
    for field in ("base_image_seq_len", "max_image_seq_len"):
        if field in config and (type(config[field]) is not int or config[field] < 1):
            raise UserError(f"{where}: {field} is {config[field]!r}, and a number of tokens belongs there")
    for field in ("use_dynamic_shifting", *_OTHER_SIGMAS):
        value = config.get(field, False)
        if type(value) is not bool and not (value is None and field in _OTHER_SIGMAS):
            raise UserError(f"{where}: {field} is {value!r}, and true or false belong there")
        if value and field in _OTHER_SIGMAS:
            raise UserError(
                f"{where}: {field} is true, and the levels of noise of the supported families are spaced as flow "
                "matching spaces them. Put the base's own scheduler_config.json there"
            )


_OTHER_SIGMAS = (
    "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"
)  # fmt: skip
"""Of diffusers' scheduler: other levels than those that a base was trained at."""


def check_noise(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a scheduler's configuration by which no base of this family can have been trained."""
    (check_flow_scheduler if family.is_transformer else check_scheduler)(config, where)


def check_scheduler(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a scheduler's configuration by which a U-Net of these families cannot have been trained.

    Such a U-Net predicts the noise of DDPM's betas, or v; one of flow matching or of EDM's noise levels does not, and
    reading its numbers as DDPM's would train on noise that it has never seen.
    """
    name = str(config.get("_class_name", "DDPMScheduler"))
    if name not in NOISE_SCHEDULERS:
        flow = "flow matching" if "Flow" in name else "EDM's noise levels" if "EDM" in name else None
        raise UserError(
            f"{where}: the scheduler is a {name}{f', which says {flow}' if flow else ''}, and the U-Net of the "
            "supported families predicts the noise of DDPM's betas, or v. Put the base's own scheduler_config.json "
            "there, or give a base of a supported family"
        )
    if config.get("use_flow_sigmas"):
        raise UserError(
            f"{where}: use_flow_sigmas is {config['use_flow_sigmas']!r}, which says flow matching, and the U-Net of "
            "the supported families does not predict that. Give the base's own scheduler_config.json"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise UserError(
            f"{where}: timestep_type is {config['timestep_type']!r} (EDM's noise levels, as CosXL has them), and the "
            "U-Net of the supported families is told discrete steps. Give a base of a supported family"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f"{where}: prediction_type {prediction!r} is neither epsilon nor v_prediction")
    _check_betas(config, where)


def _check_betas(config: Mapping[str, Any], where: str) -> None:
    """Checks the noise schedule's numbers. Raises ValueError with field and value."""
    steps = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if type(steps) is not int or steps < 1:
        raise UserError(f"{where}: num_train_timesteps is {steps!r}, and a number of steps belongs there")
    for field, value in (("beta_start", start), ("beta_end", end)):
        if not _is_number(value) or not 0.0 < value < 1.0:
            raise UserError(f"{where}: {field} is {value!r}, and a variance between 0 and 1 belongs there")
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or not all(_is_number(beta) and 0.0 <= beta <= 1.0 for beta in trained):
            raise UserError(f"{where}: trained_betas is no list of variances between 0 and 1, or null")
        if len(trained) != steps:
            raise UserError(f"{where}: trained_betas has {len(trained)} values for num_train_timesteps={steps}")
    for field, known in (("beta_schedule", BETA_SCHEDULES), ("timestep_spacing", TIMESTEP_SPACINGS)):
        if config.get(field, known[0]) not in known:
            raise UserError(f"{where}: {field} is {config[field]!r}, which is none of {', '.join(known)}")
    offset = config.get("steps_offset", 0)
    if type(offset) is not int or not 0 <= offset < steps:
        raise UserError(f"{where}: steps_offset is {offset!r}, and a number of steps belongs there")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
