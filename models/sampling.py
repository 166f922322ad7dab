"""From prompts and condition pictures to pictures; the same arithmetic as diffusers' StableDiffusionControlNetPipeline.

What one step predicts is a function of its own, `guided_prediction`; what a ControlNet adds is a value,
`controlnet.Residuals`. Guidance schedules and several ControlNets act on the residuals between the two, nowhere else.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from controlbooth.models.base import Base
from controlbooth.models.controlnet import predict
from controlbooth.models.families import TextEncoding, encode_with_dropout

SCHEDULERS = {"ddim": DDIMScheduler, "unipc": UniPCMultistepScheduler, "euler": EulerDiscreteScheduler}
"""All deterministic: DDIM with eta 0, Euler without churn. A picture then depends on its own first noise alone."""


@torch.no_grad()  # not inference_mode: it would leave ZeRO-3's gathered parameters unusable for training
def sample(
    base: Base,
    controlnet: nn.Module | None,
    prompts: Sequence[str],
    conditioning: Tensor | None,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    conditioning_scale: float = 1.0,
    scheduler: str = "ddim",
    negative_prompt: str | None = None,
) -> Tensor:
    """Samples one picture for each prompt. Returns (B, H, W, 3) uint8 on the CPU.

    conditioning: (B, 3, H, W), RGB in [0, 1], whose size is that of the pictures; None without a ControlNet, and then
    the size is the one the U-Net was made for. seeds: B integers; picture i depends on seeds[i], not on the batch.
    guidance_scale: classifier-free guidance (arXiv 2207.12598) away from negative_prompt; 1 or less does without. The
    condition goes into both branches. negative_prompt None: the empty prompt, or SDXL's zeros, as in the pipelines.
    Modules are in eval mode meanwhile and then as they were. Under ZeRO-3 every rank calls this.
    Raises ValueError for numbers that do not match and for an unknown scheduler.
    """
    _check(prompts, seeds, steps, controlnet, conditioning, scheduler)
    height, width = base.picture_size if conditioning is None else tuple(conditioning.shape[-2:])
    guided = guidance_scale > 1.0
    text = _text_of_both_branches(base, prompts, negative_prompt, (height, width), guided)
    noise_scheduler: Any = SCHEDULERS[scheduler].from_config(base.noise_scheduler.config)
    noise_scheduler.set_timesteps(steps, device=base.device)
    latents = initial_noise(base, seeds, height, width) * noise_scheduler.init_noise_sigma
    if conditioning is not None:
        conditioning = conditioning.to(base.device)
    with _eval_mode(controlnet):
        for timestep in noise_scheduler.timesteps:
            model_input = noise_scheduler.scale_model_input(latents, timestep)
            prediction = guided_prediction(
                base, controlnet, model_input, timestep, text, conditioning, guidance_scale, conditioning_scale
            )
            latents = noise_scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return to_uint8(base.decode_latents(latents))


def guided_prediction(
    base: Base,
    controlnet: nn.Module | None,
    model_input: Tensor,
    timestep: Tensor,
    text: TextEncoding,
    conditioning: Tensor | None,
    guidance_scale: float,
    conditioning_scale: float = 1.0,
) -> Tensor:
    """(B, C, h, w): uncond + guidance_scale * (cond - uncond), in one pass over both branches, or cond alone.

    text holds B rows, or 2 B: first the unconditional branch, then the conditional one.
    """
    branches = len(text.encoder_hidden_states) // len(model_input)
    doubled = torch.cat([model_input] * branches)
    if conditioning is not None:
        conditioning = torch.cat([conditioning] * branches)
    prediction = predict(base.unet, controlnet, doubled, timestep, text, conditioning, conditioning_scale)
    if branches == 1:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def initial_noise(base: Base, seeds: Sequence[int], height: int, width: int) -> Tensor:
    """(B, C, height/8, width/8) standard normal in the base's dtype; row i comes from seeds[i] alone.

    Drawn in float32 on the CPU, so that a seed is the same noise on every machine and in every precision.
    """
    factor = base.family.vae_factor
    shape = (base.unet.config["in_channels"], height // factor, width // factor)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(base.device, base.dtype)


def to_uint8(pixel_values: Tensor) -> Tensor:
    """(B, 3, H, W) about [-1, 1] -> (B, H, W, 3) uint8 on the CPU, rounded as diffusers' image processor rounds."""
    pictures = (pixel_values.float() * 0.5 + 0.5).clamp(0.0, 1.0)
    return (pictures * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def _text_of_both_branches(
    base: Base, prompts: Sequence[str], negative_prompt: str | None, picture_size: tuple[int, int], guided: bool
) -> TextEncoding:
    """B rows, or with guidance 2 B: the negative prompt's, then the prompts'."""
    text = encode_with_dropout(base, prompts, picture_size=picture_size)
    if not guided:
        return text
    negative = encode_with_dropout(base, [negative_prompt or ""] * len(prompts), picture_size=picture_size)
    states, added = negative.encoder_hidden_states, dict(negative.added_cond_kwargs)
    if negative_prompt is None and base.zero_empty_prompt:
        states = torch.zeros_like(states)
        added["text_embeds"] = torch.zeros_like(added["text_embeds"])
    return TextEncoding(
        torch.cat([states, text.encoder_hidden_states]),
        {key: torch.cat([added[key], value]) for key, value in text.added_cond_kwargs.items()},
    )


def _check(prompts, seeds, steps, controlnet, conditioning, scheduler) -> None:
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need {len(prompts)} seeds, and there are {len(seeds)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least one is needed")
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler {scheduler!r} is not known. Use {', '.join(SCHEDULERS)}.")
    if (controlnet is None) != (conditioning is None):
        missing = "a condition picture" if conditioning is None else "a ControlNet"
        raise ValueError(f"{missing} is missing: a ControlNet and its condition come together")
    if conditioning is not None and len(conditioning) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need {len(prompts)} conditions, and there are {len(conditioning)}")


@contextmanager
def _eval_mode(module: nn.Module | None):
    if module is None:
        yield
        return
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
