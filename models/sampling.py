"""From prompts and condition pictures to pictures; the same arithmetic as diffusers' StableDiffusionControlNetPipeline.

What one step predicts is a function of its own, `guided_prediction`; what ControlNets add is a value,
`denoisers.residuals.Residuals`. Scales, schedules and branches act on it in `residuals_of`, nowhere else.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.base import Base, for_convolutions
from controlbooth.models.control_schedules import BY_HEIGHT, SCHEDULES, weights_of
from controlbooth.models.denoisers.registry import (
    control_residuals,
    denoise,
    encode_condition,
    predict,
    predicts_alone,
)
from controlbooth.models.denoisers.residuals import Residuals
from controlbooth.models.identity import identity_digest, libraries
from controlbooth.models.text import TextEncoding, encode_with_dropout

VERSION = 1
"""Of the arithmetic below: another one draws other pictures of the same weights, prompts and seeds."""


def drawn_by(base: Base) -> dict[str, Any]:
    """Returns what pictures depend on besides prompts, seeds, steps and guidance; kept pictures are named by it."""
    versions = libraries()
    return {
        "base": identity_digest(base.identity),
        "sampling": VERSION,
        "libraries": {name: versions[name] for name in ("diffusers", "transformers")},
        **({"text_tokens": base.text_tokens} if base.text_tokens else {}),
    }


def branches(base: Base, guidance_scale: float) -> int:
    """Returns how many predictions a step of sampling makes of each picture: 2 with guidance that is not embedded."""
    return 2 if guidance_scale > 1.0 and not base.family.embeds_guidance else 1


@dataclass(frozen=True)
class Control:
    """A ControlNet in use. Several are added up."""

    network: nn.Module
    conditioning: Tensor
    """(B, 3, H, W), RGB in [0, 1]; H and W are those of the pictures."""
    scale: float = 1.0
    """Multiplies all of its residuals."""
    schedule: str = "uniform"
    """How much each residual counts, of `control_schedules.SCHEDULES`."""
    branches: Literal["both", "conditional"] = "both"
    """Where guidance makes two predictions: control both, or only the one with the prompt, as resolution weighting and
    guess mode do."""
    start: float = 0.0
    """Shares of the sampling steps between which it acts."""
    end: float = 1.0


@torch.no_grad()  # not inference_mode: it would leave ZeRO-3's gathered parameters unusable for training
def sample(
    base: Base,
    prompts: Sequence[str],
    controls: Sequence[Control] = (),
    *,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    scheduler: str | None = None,
    negative_prompt: str | None = None,
    picture_size: tuple[int, int] | None = None,
) -> Tensor:
    """Draws one picture for each prompt, and returns them as (B, H, W, 3) uint8 on the CPU.

    picture_size: (H, W) in pixels, multiples of the VAE's factor. None: that of the conditions, or without controls the
    one that the U-Net was made for; with controls it can only be that of the conditions. seeds: B integers; picture i
    depends on seeds[i], not on the batch. guidance_scale: classifier-free guidance (arXiv 2207.12598) away from
    negative_prompt; 1 or less does without. negative_prompt None: the empty prompt, or SDXL's zeros, as in the
    pipelines. Modules are in eval mode meanwhile and then as they were. Under ZeRO-3 every rank calls this. Raises
    ValueError for numbers that do not match, and for an unknown scheduler or schedule.
    """
    scheduler = scheduler or base.process.samplers[0]
    _check(base, prompts, seeds, steps, controls, scheduler)
    height, width = _picture_size(base, controls, picture_size)
    guided = branches(base, guidance_scale) == 2
    text = _text_of_both_branches(base, prompts, negative_prompt, (height, width), guided, guidance_scale)
    latents = initial_noise(base, seeds, height, width)
    sampler = base.process.sampler(scheduler, steps, latents.shape, base.device)
    latents = latents * getattr(sampler, "init_noise_sigma", 1.0)
    controls = [_with_rows_for(_encoded(control, base), text, len(prompts)) for control in controls]
    with ExitStack() as modes:
        for network in {id(control.network): control.network for control in controls}.values():
            modes.enter_context(_eval_mode(network))
            modes.enter_context(_hints_kept(network))
        for number, timestep in enumerate(sampler.timesteps):
            scale = getattr(sampler, "scale_model_input", None)
            model_input = latents if scale is None else scale(latents, timestep)
            acting = [control for control in controls if _acts(control, number, len(sampler.timesteps))]
            prediction = guided_prediction(base, acting, model_input, timestep, text, guidance_scale)
            latents = sampler.step(prediction, timestep, latents, return_dict=False)[0]
    return to_uint8(base.decode_latents(latents))


def guided_prediction(
    base: Base,
    controls: Sequence[Control],
    model_input: Tensor,
    timestep: Tensor,
    text: TextEncoding,
    guidance_scale: float,
) -> Tensor:
    """Predicts (B, C, h, w): uncond + guidance_scale * (cond - uncond), in one pass over both branches, or cond alone.

    text holds B rows, or 2 B: first the unconditional branch, then the conditional one.
    """
    branches = len(text.encoder_hidden_states) // len(model_input)
    doubled = torch.cat([model_input] * branches)
    if controls and predicts_alone(controls[0].network):
        (control,) = controls
        prediction = predict(
            base.denoiser, control.network, doubled, timestep, text, control.conditioning, control.scale
        )
    else:
        added = [residuals_of(control, model_input, timestep, text) for control in controls]
        prediction = denoise(base.denoiser, doubled, timestep, text, _sum(added) if added else None)
    if branches == 1:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def residuals_of(control: Control, model_input: Tensor, timestep: Tensor, text: TextEncoding) -> Residuals:
    """Computes the weighted residuals that a ControlNet adds to each row of `text`: zeros in an uncontrolled branch."""
    rows = len(model_input)
    branches = len(text.encoder_hidden_states) // rows
    conditioning = control.conditioning.to(model_input.device)
    alone = control.branches == "conditional" and branches == 2
    if alone:
        text = TextEncoding(
            text.encoder_hidden_states[rows:], {key: value[rows:] for key, value in text.added_cond_kwargs.items()}
        )
        branches = 1
    if len(conditioning) < branches * rows:
        conditioning = torch.cat([conditioning] * branches)
    made = control_residuals(
        control.network,
        torch.cat([model_input] * branches),
        timestep,
        text,
        conditioning,
        control.scale,
    )
    residuals = made.each()
    if control.schedule != "uniform":
        weights = weights_of(control.schedule, [residual.shape[-2] for residual in residuals])
        residuals = [weight * residual for weight, residual in zip(weights, residuals, strict=True)]
    if alone:
        residuals = [torch.cat([torch.zeros_like(residual), residual]) for residual in residuals]
    return made.with_each(residuals)


def _encoded(control: Control, base: Base) -> Control:
    """Returns the control with its condition as its network reads it, which is the same in all steps."""
    return replace(control, conditioning=encode_condition(base, control.network, control.conditioning))


def _with_rows_for(control: Control, text: TextEncoding, pictures: int) -> Control:
    """Returns the control with one condition for each row that the ControlNet sees in a step.

    They have the dtype and device that `control_residuals` needs, so that it takes them unchanged.
    """
    branches = 1 if control.branches == "conditional" else len(text.encoder_hidden_states) // pictures
    dtype = next(control.network.parameters()).dtype
    conditioning = torch.cat([control.conditioning] * branches).to(text.encoder_hidden_states.device, dtype)
    return replace(control, conditioning=for_convolutions(conditioning) if conditioning.ndim == 4 else conditioning)


@contextmanager
def _hints_kept(network: nn.Module) -> Iterator[None]:
    """Opens a context in which a ControlNet's hint network runs once for a condition, not again in each step."""
    module = getattr(network, "module", network)
    hint: Any = getattr(module, "controlnet_cond_embedding", getattr(module, "input_hint_block", None))
    if hint is None:  # conditions are latents, and encoded already
        yield
        return
    forward = hint.forward
    made: dict[tuple, tuple[Tensor, Tensor]] = {}  # with the condition, so that no other one gets its memory

    def remembered(conditioning: Tensor) -> Tensor:
        place = conditioning.data_ptr(), conditioning.shape  # ZeRO-3's hooks hand on another tensor of the same memory
        if place not in made:
            made[place] = conditioning, forward(conditioning)
        return made[place][1]

    hint.forward = remembered  # on the instance, in front of its class's method
    try:
        yield
    finally:
        del hint.forward


def _sum(several: Sequence[Residuals]) -> Residuals:
    """Adds up the residuals of ControlNets that were trained apart (arXiv 2302.05543, section 3.4)."""
    total, *others = several
    for other in others:
        if ([*map(len, total.groups)], total.repeated) != ([*map(len, other.groups)], other.repeated):
            counts = " and ".join(str([*map(len, one.groups)]) for one in (total, other))
            raise UserError(
                f"ControlNets whose residuals go to other blocks of the base cannot be added up: they have {counts}. "
                "Use them one at a time"
            )
        total = total.with_each(one + two for one, two in zip(total.each(), other.each(), strict=True))
    return total


def _picture_size(base: Base, controls: Sequence[Control], asked: tuple[int, int] | None) -> tuple[int, int]:
    if controls:
        height, width = controls[0].conditioning.shape[-2:]
        if asked not in (None, (height, width)):
            raise UserError(f"pictures of {asked} pixels cannot be controlled by conditions of {(height, width)}")
        return height, width
    height, width = asked or base.picture_size
    factor = base.pixel_multiple if base.family.is_transformer else base.family.vae_factor
    if height % factor or width % factor:
        raise UserError(f"pictures of {(height, width)} pixels: {base.family.title} makes multiples of {factor}")
    return height, width


def _acts(control: Control, number: int, steps: int) -> bool:
    """Tells whether the control acts in this step, as diffusers counts: the whole step lies between start and end."""
    return number / steps >= control.start and (number + 1) / steps <= control.end


def initial_noise(base: Base, seeds: Sequence[int], height: int, width: int) -> Tensor:
    """Draws standard normal noise (B, C, height/8, width/8) in the base's dtype; row i comes from seeds[i] alone.

    It is drawn in float32 on the CPU, so that a seed is the same noise on every machine and in every precision.
    """
    factor = base.family.vae_factor
    shape = (base.latent_channels, height // factor, width // factor)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(base.device, base.dtype)


def to_uint8(pixel_values: Tensor) -> Tensor:
    """Converts pixels (B, 3, H, W) about [-1, 1] to (B, H, W, 3) uint8 on the CPU, rounded as diffusers rounds."""
    pictures = (pixel_values.float() * 0.5 + 0.5).clamp(0.0, 1.0)
    return (pictures * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def _text_of_both_branches(
    base: Base,
    prompts: Sequence[str],
    negative_prompt: str | None,
    picture_size: tuple[int, int],
    guided: bool,
    guidance_scale: float,
) -> TextEncoding:
    """Encodes the prompts as B rows, or with guidance as 2 B: the negative prompt's, then the prompts'."""
    text = encode_with_dropout(base, prompts, picture_size=picture_size, guidance=guidance_scale)
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


def _check(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    controls: Sequence[Control],
    scheduler: str,
) -> None:
    if len(seeds) != len(prompts):
        raise UserError(f"{len(prompts)} prompts need {len(prompts)} seeds, and there are {len(seeds)}")
    if steps < 1:
        raise UserError(f"steps is {steps}; at least one is needed")
    if scheduler not in base.process.samplers:
        raise UserError(f"scheduler {scheduler!r} is not known. Use {', '.join(base.process.samplers)}.")
    for control in controls:
        conditioning, first = control.conditioning, controls[0].conditioning
        if conditioning.ndim != 4 or conditioning.shape[1] != 3:
            raise UserError(
                f"a condition is RGB, (B, 3, H, W), and there is one of shape {tuple(conditioning.shape)}: repeat the "
                "channel of a gray picture three times"
            )
        if len(conditioning) != len(prompts):
            raise UserError(f"{len(prompts)} prompts need {len(prompts)} conditions, and there are {len(conditioning)}")
        if conditioning.shape != first.shape:
            sizes = f"{tuple(first.shape[-2:])} and {tuple(conditioning.shape[-2:])}"
            raise UserError(f"conditions of one picture have one size, and there are {sizes}")
        if not 0.0 <= control.start < control.end <= 1.0:
            raise UserError(
                f"a control acts from a start to a later end in [0, 1], not {control.start} to {control.end}"
            )
        weights_of(control.schedule, [1])
        if predicts_alone(control.network):
            _check_alone(control, controls)
        if base.family.is_transformer and control.schedule in BY_HEIGHT:
            raise UserError(
                f"control schedule {control.schedule!r} weighs by the residuals' heights, which are all equal in a "
                f"transformer. Use {', '.join(name for name in SCHEDULES if name not in BY_HEIGHT)}"
            )


def _check_alone(control: Control, controls: Sequence[Control]) -> None:
    """Raises ValueError for what has no meaning with a network that predicts by itself under control."""
    name = "a control-LoRA of FLUX.1 changes the base's own layers, and has no residuals"
    if len(controls) > 1:
        raise UserError(f"{name} that could be added up with others: use one control at a time")
    if control.schedule != "uniform":
        raise UserError(
            f"{name} that control schedule {control.schedule!r} could weigh by depth: leave it out, and set the scale"
        )
    if control.branches != "both":
        raise UserError(f"{name}: its control cannot be left out of one branch of guidance")


@contextmanager
def _eval_mode(module: nn.Module):
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
