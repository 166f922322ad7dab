"""A micro-batch of noise in the shapes that a run trains, taken at its start: to choose attention kernels by their
time, and to compare compiled gradients with plain ones."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from controlbooth.models.attention import AttentionShape, attention_shapes
from controlbooth.models.base import Base
from controlbooth.models.denoisers.registry import denoise, denoiser_of, encode_condition, predict
from controlbooth.models.noise.process import Noised
from controlbooth.models.text import TextEncoding, encode_with_dropout
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.engine import compiling
from controlbooth.trainer.engine.distributed import World, gather_objects
from controlbooth.trainer.run.process import say


@torch.no_grad()
def trial_inputs(config: RunConfig, base: Base) -> tuple[Noised, TextEncoding]:
    """Returns noised latents at half of the levels, always the same, and the text of empty prompts."""
    count, resolution = config.micro_batch_size, config.data.resolution
    size = resolution // base.family.vae_factor
    text = encode_with_dropout(base, [""] * count, picture_size=(resolution, resolution))
    latents, noise = noise_of(2, count, base.latent_channels, size, size).to(base.device)
    levels = torch.full((count,), base.process.levels // 2, dtype=torch.int64, device=base.device)
    return base.process.noised(latents, noise, levels), text


def noise_of(*shape: int) -> Tensor:
    """Draws float32 noise of a shape on the CPU, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def base_attention_shapes(config: RunConfig, base: Base) -> tuple[AttentionShape, ...]:
    """Returns the attention shapes of the base's forward pass for one micro-batch, for choosing the kernel by timing
    it."""
    noisy, text = trial_inputs(config, base)
    return attention_shapes(base.denoiser, lambda: denoise(base.denoiser, noisy.latents, noisy.times, text))


def trial_loss(config: RunConfig, base: Base, controlnet: Any) -> Tensor:
    """Returns the loss of a micro-batch of noise under control, always the same, in the shapes that the run trains."""
    noisy, text = trial_inputs(config, base)
    pixels = noise_of(config.micro_batch_size, 3, config.data.resolution, config.data.resolution).sigmoid()
    condition = encode_condition(base, controlnet, pixels.to(base.device))
    prediction = predict(base.denoiser, controlnet, noisy.latents, noisy.times, text, condition)
    return (prediction.float() - noisy.target.float()).square().mean()


def compile_where_right(
    config: RunConfig, world: World, base: Base, controlnet: Any, dtype: torch.dtype, backend: Any = "inductor"
) -> None:
    """Compiles the repeated blocks of the ControlNet, and of the base where gradients through it stay what they are.

    Every rank calls this, and all of them do the same. backend: of torch.compile.
    """
    loss_of = partial(trial_loss, config, base)
    zero_parts = denoiser_of(controlnet).file.ZERO
    for frozen, what in (([base.denoiser], "the ControlNet and the base"), ([], "the ControlNet alone")):
        proof = compiling.prove(loss_of, controlnet.to(world.device), frozen, dtype, zero_parts, backend)
        proofs = gather_objects(proof, world)
        worst = max(proofs, key=lambda one: one.worst)
        if not worst.wrong:
            count = compiling.compile_blocks(controlnet, backend)
            count += sum(len(compiling.repeated_blocks(network)) for network in frozen)
            apart = f"gradients of {worst.compared} parameters are within {worst.worst:.1e} of those without"
            say(world, f"engine.compile: {count} blocks of {what}; {apart}")
            return
        for network in frozen:
            compiling.run_plainly(network)
        many = f" and {len(worst.wrong) - 3} more" if len(worst.wrong) > 3 else ""
        say(
            world,
            f"warning: engine.compile does not compile {what}: gradients are up to {worst.worst:.1e} of their size off "
            f"({', '.join(worst.wrong[:3])}{many})",
        )
