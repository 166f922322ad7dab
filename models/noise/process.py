"""How a base was trained to denoise: how noise is added at a level, what is predicted, and how one samples.

Levels are integers that grow with the noise, 0 .. levels - 1, drawn by the data's order (data/order/draws.py). A base
of the U-Net families adds the noise of DDPM's betas (`Diffusion`); one of the transformer families mixes picture and
noise along straight lines (`FlowMatching`). What differs between them is here and in a family's call of its network
(denoisers/), so that there is one training step and one sampling loop for all.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from controlbooth.data.errors import UserError
from controlbooth.models.noise.schedules import FIELDS, SCHEDULERS, given_fields, make_sampler


class Noised(NamedTuple):
    """A noisy batch, and what the network should make of it."""

    latents: Tensor
    """(B, C, h, w) float32."""
    target: Tensor
    """(B, C, h, w) float32."""
    times: Tensor
    """(B,) what the network is told of the noise: int64 timesteps, or of flow matching 1000 sigma in float32."""


@dataclass(frozen=True)
class Diffusion:
    """The noise of DDPM's betas (arXiv 2006.11239), of which a network predicts the noise, or v (arXiv 2202.00512)."""

    scheduler: DDPMScheduler

    @property
    def levels(self) -> int:
        """Returns how many levels of noise there are."""
        return int(self.scheduler.config["num_train_timesteps"])

    @property
    def prediction_type(self) -> str:
        """Tells what the network predicts: epsilon or v_prediction."""
        return self.scheduler.config["prediction_type"]

    thresholds = None
    """Levels are drawn uniformly."""

    def noised(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Noised:
        """Adds noise (B, C, h, w) at levels (B,) int64 to latents of the same shape, all on one device."""
        noisy: Any = self.scheduler.add_noise(latents, noise, levels)  # type: ignore[arg-type]
        return Noised(noisy, self.target(latents, noise, levels), levels)

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Returns what the prediction is compared with, (B, C, h, w).

        epsilon: the noise (arXiv 2006.11239, eq. 14). v_prediction: sqrt(a) noise - sqrt(1 - a) latents, with a the
        cumulative product of alphas at each level (arXiv 2202.00512, appendix D).
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            alpha = self.scheduler.alphas_cumprod.to(latents)[levels][:, None, None, None]
            return alpha.sqrt() * noise - (1.0 - alpha).sqrt() * latents
        raise UserError(f"prediction_type {self.prediction_type!r} is not supported: epsilon or v_prediction")

    def loss_weights(self, levels: Tensor, shape: torch.Size, min_snr_gamma: float | None) -> Tensor | None:
        """Returns how much each sample counts, (B,) float32, or None where all count alike.

        Min-SNR (arXiv 2303.09556, section 3.4): in terms of the predicted clean latents the weight is min(SNR, gamma);
        predicting noise divides it by SNR, predicting v by SNR + 1.
        """
        if min_snr_gamma is None:
            return None
        alpha = self.scheduler.alphas_cumprod.to(levels.device)[levels].float()
        snr = alpha / (1.0 - alpha)
        divisor = snr if self.prediction_type == "epsilon" else snr + 1.0
        return snr.clamp(max=min_snr_gamma) / divisor

    def even_levels(self, ranks: np.ndarray, count: int) -> np.ndarray:
        """Returns levels that are spread evenly over all levels.

        ranks: int64, which of `count` samples the levels are for.
        """
        return (ranks * 2 + 1) * self.levels // (2 * count)

    samplers = tuple(SCHEDULERS)
    """Names of the samplers, the default first."""

    def sampler(self, name: str, steps: int, shape: torch.Size, device: torch.device) -> Any:
        """Returns a scheduler of diffusers with its timesteps set. shape: of the latents."""
        scheduler = make_sampler(name, self.scheduler)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    def facts(self) -> dict[str, Any]:
        """Returns the settings that results depend on: fields of the scheduler's configuration."""
        config = self.scheduler.config
        spacing = given_fields(self.scheduler).get("timestep_spacing", "the sampler's own")  # the classes' differ
        return {name: config[name] for name in FIELDS if name in config} | {"timestep_spacing": spacing}


Density = Literal["logit-normal", "mode", "uniform"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]


@dataclass(frozen=True)
class FlowSettings:
    """What a run decides about flow matching."""

    density: Density = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    """Of the logit-normal density."""
    mode_scale: float = 1.29
    """Of the mode density."""
    shift: Literal["base"] | float = "base"
    """How levels are moved towards noise: as the base's own scheduler does at each size, or by this factor."""
    weighting: Weighting = "none"
    embedded_guidance: float = 3.5
    """What a base that was distilled for guidance (FLUX.1-dev) is told in training."""


LEVELS = 1000
"""Of flow matching: sigma before the shift is (level + 1) / 1000."""


@dataclass(frozen=True)
class FlowMatching:
    """Straight lines between picture and noise (arXiv 2209.03003, 2403.03206): x_sigma = (1 - sigma) x + sigma e, of
    which the network predicts the velocity e - x.

    Sigma, the mixture and the target are float32 whatever the network's precision: of 1000 values of sigma bfloat16
    keeps 506.
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    settings: FlowSettings = FlowSettings()

    levels = LEVELS
    prediction_type = "flow"

    @property
    def thresholds(self) -> tuple[int, ...]:
        """Returns the cumulative share of each level but the last, times 2**64: see `level_thresholds`."""
        return level_thresholds(self.settings)

    def with_settings(self, settings: FlowSettings) -> "FlowMatching":
        """Returns the same process as a run trains it."""
        return replace(self, settings=settings)

    def shift(self, shape: torch.Size) -> float:
        """Returns the factor of the base's own scheduler for latents of this shape (..., h, w).

        A dynamic one grows with the picture's tokens: exp(mu), mu linear between two sizes.
        """
        config = self.scheduler.config
        if not config["use_dynamic_shifting"]:
            return float(config["shift"])
        return math.exp(self.mu(shape))

    def mu(self, shape: torch.Size) -> float:
        """Returns the exponent of a dynamic shift, as the pipelines of FLUX.1 compute it."""
        config = self.scheduler.config
        tokens = shape[-2] * shape[-1] / 4  # of squares of 2x2 positions
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (high - low) / (most - least)
        return tokens * slope + (low - slope * least)

    def sigmas(self, levels: Tensor, shape: torch.Size) -> Tensor:
        """Returns the noise's share (B,) float32 in (0, 1] at levels (B,) int64, of latents of this shape."""
        sigma = (levels.float() + 1.0) / LEVELS
        shift = self.shift(shape) if self.settings.shift == "base" else float(self.settings.shift)
        return shift * sigma / (1.0 + (shift - 1.0) * sigma)

    def noised(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Noised:
        """Mixes noise (B, C, h, w) float32 at levels (B,) int64 with latents of the same shape, all on one device."""
        latents, noise = latents.float(), noise.float()
        sigmas = self.sigmas(levels, latents.shape)
        share = sigmas[:, None, None, None]
        return Noised((1.0 - share) * latents + share * noise, noise - latents, LEVELS * sigmas)

    def loss_weights(self, levels: Tensor, shape: torch.Size, min_snr_gamma: float | None) -> Tensor | None:
        """Returns how much each sample counts, (B,) float32, or None where all count alike (arXiv 2403.03206, 3.1).

        Raises ValueError for min-SNR, which weighs by the betas that are not there.
        """
        if min_snr_gamma is not None:
            raise UserError(
                "optimizer.min_snr_gamma weighs DDPM's noise, and this base is of flow matching: leave it out"
            )
        if self.settings.weighting == "none":
            return None
        sigmas = self.sigmas(levels, shape)
        if self.settings.weighting == "sigma_sqrt":
            return sigmas**-2
        return 2.0 / (math.pi * (1.0 - 2.0 * sigmas + 2.0 * sigmas**2))

    def even_levels(self, ranks: np.ndarray, count: int) -> np.ndarray:
        """Returns levels at even quantiles of the density.

        ranks: int64, which of `count` samples the levels are for.
        """
        places = [(2 * int(rank) + 1) * 2**64 // (2 * count) for rank in ranks]
        return np.searchsorted(np.array(self.thresholds, np.uint64), np.array(places, np.uint64), side="right")

    samplers = ("euler", "heun", "dpm++", "unipc")
    """Names of the samplers, the default first."""

    def sampler(self, name: str, steps: int, shape: torch.Size, device: torch.device) -> Any:
        """Returns a scheduler of diffusers with its timesteps set, shifted as the base's own at latents of this shape.

        Raises ValueError for a sampler that is not one of flow matching.
        """
        if name not in self.samplers:
            raise UserError(f"scheduler {name!r} is none of flow matching. Use {', '.join(self.samplers)}")
        dynamic = self.scheduler.config["use_dynamic_shifting"]
        scheduler: Any
        if name == "euler":
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
            if dynamic:
                sigmas = np.linspace(1.0, 1 / steps, steps)
                scheduler.set_timesteps(steps, device=device, sigmas=sigmas, mu=self.mu(shape))
            else:
                scheduler.set_timesteps(steps, device=device)
            return scheduler
        if name == "heun":
            scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=LEVELS, shift=self.shift(shape))
        else:
            flow: dict[str, Any] = dict(
                use_flow_sigmas=True, flow_shift=self.shift(shape), prediction_type="flow_prediction"
            )
            kinds: dict[str, Callable[..., Any]] = {
                "dpm++": DPMSolverMultistepScheduler,
                "unipc": UniPCMultistepScheduler,
            }
            scheduler = kinds[name](num_train_timesteps=LEVELS, **flow)
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    def facts(self) -> dict[str, Any]:
        """Returns the settings that results depend on: fields of the scheduler's configuration."""
        return {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}


Process = Diffusion | FlowMatching

_ROUNDED = 2**40
"""Shares are rounded to 2**-40, far above what mathematical functions of two machines can differ by."""


@functools.cache
def level_thresholds(settings: FlowSettings) -> tuple[int, ...]:
    """Returns, for levels 0 .. 998, the share of draws at that level or below, times 2**64, as integers.

    A level is drawn by comparing 64 random bits with them, so that draws are integer arithmetic alone. The densities
    are those of arXiv 2403.03206, section 3.1, over u in [0, 1], where u near 0 is noise in the scripts of diffusers:
    level k stands for u in [(999 - k) / 1000, (1000 - k) / 1000).
    """
    below = [1.0 - _cumulative(settings, (LEVELS - 1 - level) / LEVELS) for level in range(LEVELS - 1)]
    return tuple(min(round(share * _ROUNDED), _ROUNDED - 1) << 24 for share in below)


def _cumulative(settings: FlowSettings, u: float) -> float:
    """Returns the share of draws below u in (0, 1)."""
    if settings.density == "uniform":
        return u
    if settings.density == "logit-normal":
        return NormalDist(settings.mean, settings.std).cdf(math.log(u / (1.0 - u)))
    low, high = 0.0, 1.0  # mode: u falls as the uniform number grows
    for _ in range(60):
        middle = (low + high) / 2
        value = 1.0 - middle - settings.mode_scale * (math.cos(math.pi * middle / 2) ** 2 - 1.0 + middle)
        low, high = (middle, high) if value > u else (low, middle)
    return 1.0 - (low + high) / 2
