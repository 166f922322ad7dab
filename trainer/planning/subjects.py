"""What a stack of DreamBooth subjects takes on one card: memory and time by the number of subjects trained together.

As of a ControlNet, the run's own step runs on fake tensors: adapters of K subjects beside one frozen base, forward,
backward and the update. A step of one subject and one of two are followed, and others are on the line through both,
since every subject brings the same rows, adapters and moments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.base import Base
from controlbooth.models.blocks import repeated_blocks
from controlbooth.models.lora import StackedAdamW
from controlbooth.models.recomputing import recompute
from controlbooth.models.text import encode_prompts
from controlbooth.trainer.config.run import FrozenConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.adapted import attach
from controlbooth.trainer.dreambooth.batches import together
from controlbooth.trainer.dreambooth.step import SubjectBatch, dreambooth_step, predict
from controlbooth.trainer.encoding import encode_posterior
from controlbooth.trainer.planning.accelerators import Accelerator
from controlbooth.trainer.planning.choices import ALIKE
from controlbooth.trainer.planning.footprint import (
    OTHER_PRECISIONS,
    WITHOUT_SCORES,
    Footprint,
    LiveStorages,
    base_shapes,
    held_as,
    tensors_of,
    without_memory,
    worst_moments,
)
from controlbooth.trainer.planning.frozen_bytes import held_bytes
from controlbooth.trainer.planning.frozen_memory import frozen_memory
from controlbooth.trainer.planning.rank_memory import CATEGORIES, RUNTIME_BYTES, RankMemory, needed
from controlbooth.trainer.planning.speed import Speed, micro_batch_seconds

TOGETHER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Subjects on one card that are tried."""
SMALLER = (
    FrozenConfig(precision="int8"),
    FrozenConfig(precision="nf4"),
    FrozenConfig(precision="nf4", stream="cpu"),
)
"""How a base is held where it is too large, from what changes results and time least."""
MASTER_AND_MOMENTS = 12
"""Bytes of each weight of an adapter: itself and AdamW's two moments, in fp32."""


@dataclass(frozen=True)
class StackChoice:
    """So many subjects together on one card."""

    subjects: int
    gradient_checkpointing: bool | float
    memory: RankMemory
    needed_bytes: float
    fits: bool
    seconds: float
    """Of a step of all of them."""
    frozen: FrozenConfig = FrozenConfig()
    """How the base is held. What bringing it back or streaming it costs is not in `seconds`."""

    @property
    def subject_steps_per_second(self) -> float:
        return self.subjects / self.seconds


def rows_of(config: SubjectRunConfig) -> int:
    """Counts the rows of a subject in each step: its own pictures and those of its class."""
    return config.instance_batch_size * (2 if config.prior.weight else 1)


def stack_footprint(
    config: SubjectRunConfig, precision: str, subjects: int, attention: str, shapes: str | None = None
) -> Footprint:
    """Runs one step of so many subjects, with its update, on fake tensors.

    The profile has the gradients of adapters in fp32; what a subject's pictures take while they are encoded is a moment
    of it. attention: a kernel, or auto. shapes: of PUBLISHED, in place of model.base. Raises as
    `footprint.base_shapes`, and ConfigError for method=full, whose engine shares one subject.
    """
    if config.method != "lora":
        raise ConfigError("a plan of subjects is of method=lora; with method=full the ranks train one subject together")
    base = base_shapes(config, precision, shapes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[int, Tensor] = {}
        for module in (base.vae, base.denoiser, *base.text_encoders):
            without_memory(module, made)
        apply_attention(
            base.denoiser, AttentionChoice("flash" if attention in WITHOUT_SCORES else attention, "planned")
        )
        recompute(base.denoiser, config.model.gradient_checkpointing)
        if config.model.gradient_checkpointing:
            base.denoiser.train()
        return followed(config, base, subjects)


def followed(config: SubjectRunConfig, base: Base, subjects: int) -> Footprint:
    """Follows a step of so many new subjects on a base, which gets their adapters."""
    frozen = [tensor for module in (base.vae, base.denoiser, *base.text_encoders) for tensor in tensors_of(module)]
    whole = sum({one._cdata: one.nbytes() for one in map(Tensor.untyped_storage, frozen)}.values())
    encoder_blocks = [block for encoder in base.text_encoders for block in repeated_blocks(encoder)]
    held = {  # before adapters are in the blocks
        name: held_bytes(base, whole, repeated_blocks(base.denoiser), encoder_blocks, name)
        for name in dict.fromkeys((*OTHER_PRECISIONS, config.model.frozen.precision))
    }
    _, adapters = attach(config, base, subjects, config.adapter.rank)
    optimizer = StackedAdamW(adapters, weight_decay=config.weight_decay)
    trained = optimizer.parameters
    live, encoding = LiveStorages(), LiveStorages()
    live.ignore([*frozen, *trained, *optimizer.first, *optimizer.second])
    encoding.ignore(frozen)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: live.is_gradient(p.grad))
    side = config.resolution
    with torch.no_grad(), encoding:
        encode_posterior(base, torch.zeros(1, 3, side, side, device=base.device))
    with live:
        batch = batch_of(config, base, subjects)
        size = live.live
        dreambooth_step(
            base,
            lambda noisy, times, text: predict(base, side, noisy, times, text),
            Tensor.backward,
            batch,
            subjects,
            config.prior.weight,
            config.min_snr_gamma,
        )
        ones = torch.ones(subjects, device=base.device)
        optimizer.step(ones, [0] * subjects, ones)
    alone = max((activations for activations, _ in encoding.moments), default=0)
    return Footprint(
        micro_batch_size=subjects * rows_of(config),
        **vars(held[config.model.frozen.precision]),
        otherwise=tuple((name, held[name]) for name in OTHER_PRECISIONS),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        largest_parameter=max(parameter.numel() for parameter in trained),
        trained_modules=len(adapters),
        profile=worst_moments([*live.moments, (alone, 0)]),
        encoder_flops=0,
        training_flops=live.flops,
        traffic_bytes=live.traffic,
        operations=live.operations,
        batch_bytes=size,
        cached_bytes=0,
    )


def batch_of(config: SubjectRunConfig, base: Base, subjects: int) -> SubjectBatch:
    """Makes a batch as `batches.make_batch` does, of zeros."""
    rows, side = subjects * rows_of(config), config.resolution // base.family.vae_factor
    shape = (rows, base.latent_channels, side, side)
    prompts = ["a word"] * rows
    text = prompts
    if not config.train_text_encoder:
        with torch.no_grad():
            one = encode_prompts(base, prompts[:1], picture_size=(config.resolution, config.resolution))
        text = together([one] * rows)
    return SubjectBatch(
        latents=torch.zeros(shape, device=base.device),
        text=text,
        levels=torch.zeros(rows, dtype=torch.int64, device=base.device),
        noise=torch.zeros(shape, device=base.device),
        instance_rows=config.instance_batch_size,
    )


def peak_bytes(one: Footprint) -> int:
    """Returns the most that activations and gradients take together."""
    return max(activations + gradients for activations, gradients in one.profile)


def with_subjects(one: Footprint, two: Footprint, subjects: int) -> Footprint:
    """Returns the footprint of a step of so many subjects, on the line through those of one and of two."""

    def at(first: int, second: int) -> int:
        return first + (subjects - 1) * (second - first)

    names = ("trained_parameters", "largest_parameter", "training_flops", "traffic_bytes", "operations", "batch_bytes")
    return replace(
        one,
        micro_batch_size=subjects * one.micro_batch_size,
        profile=((at(peak_bytes(one), peak_bytes(two)), 0),),
        **{name: at(getattr(one, name), getattr(two, name)) for name in names},
    )


def stack_memory(one: Footprint, kind: str, frozen: FrozenConfig) -> RankMemory:
    """Computes the memory of one rank at its peak. kind: cuda or cpu. frozen: how the base is held, in the precision of
    the footprint."""
    base = frozen_memory(one, frozen, 1)
    device = dict.fromkeys(CATEGORIES, 0) | {
        "frozen weights": base.device + base.passing + (base.host if kind == "cpu" else 0),
        "trained weights": 4 * one.trained_parameters,
        "optimizer": (MASTER_AND_MOMENTS - 4) * one.trained_parameters,
        "activations": peak_bytes(one),
        "runtime": RUNTIME_BYTES[kind],
    }
    return RankMemory(device, {"frozen weights": base.host} if base.host and kind != "cpu" else {}, "backward")


def stack_choices(
    config: SubjectRunConfig,
    card: Accelerator,
    precision: str,
    speed: Speed,
    shapes: str | None = None,
    most: int = TOGETHER[-1],
    follow: Callable[..., Footprint] = stack_footprint,
) -> list[StackChoice]:
    """Makes the choices of TOGETHER up to `most` subjects, without and with gradient checkpointing.

    Where not one subject fits and the run says nothing of its frozen base, it is held in fewer bits as well, and then
    streamed, each only where what comes before it is not enough. follow: `stack_footprint`, or what has its results
    from before.
    """
    choices: list[StackChoice] = []
    ways = []
    own = config.model.gradient_checkpointing
    for again in (False if own is True else own, True):
        model = config.model.model_copy(update={"gradient_checkpointing": again})
        way = config.model_copy(update={"model": model})
        ways.append((again, [follow(way, precision, count, way.model.attention, shapes) for count in (1, 2)]))
    held = config.model.frozen
    for frozen in (held, *(SMALLER if held == FrozenConfig() else ())):
        for again, both in ways:
            one, two = (step if frozen == held else held_as(step, frozen.precision) for step in both)
            for subjects in (count for count in TOGETHER if count <= most):
                step = with_subjects(one, two, subjects)
                memory = stack_memory(step, card.kind, frozen)
                bytes_needed = needed(memory, card.kind)
                seconds = micro_batch_seconds(step, card, precision, speed)
                fits = bytes_needed <= card.memory_bytes
                choices.append(StackChoice(subjects, again, memory, bytes_needed, fits, seconds, frozen))
        if any(choice.fits for choice in choices):
            break
    return choices


def best_stack(choices: Sequence[StackChoice]) -> StackChoice | None:
    """Chooses, of what fits and is within ALIKE of the fastest, what needs the least memory; None where none fits."""
    fitting = [choice for choice in choices if choice.fits]
    top = max((choice.subject_steps_per_second for choice in fitting), default=0.0)
    close = [choice for choice in fitting if choice.subject_steps_per_second >= (1 - ALIKE) * top]
    return min(close, key=lambda choice: choice.needed_bytes, default=None)
