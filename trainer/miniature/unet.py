"""Trains the built-in base's U-Net."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from controlbooth.trainer.engine.distributed import World, barrier, gather_objects, join, sum_tensor
from controlbooth.trainer.miniature.pictures import SIZE, pictures, to_tensor
from controlbooth.trainer.miniature.text import draw_captions, tokens
from controlbooth.trainer.miniature.training import Clock, follow, mixed_precision, save_atomically, set_learning_rate
from controlbooth.trainer.miniature.vae import VAE, load_vae

UNET: dict[str, Any] = dict(
    sample_size=SIZE // 8,
    in_channels=12,
    out_channels=12,
    block_out_channels=(96, 160),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=128,
    attention_head_dim=5,  # which in a U-Net of this age is the number of heads
    norm_num_groups=16,
    resnet_time_scale_shift="scale_shift",
    addition_embed_type="text",  # prompts, pooled, join the timestep: classes are learned in a tenth of the time
)


SCHEDULER: dict[str, Any] = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.02,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    clip_sample=False,
    timestep_spacing="trailing",
    steps_offset=0,
)


BATCH = 32  # on each of two ranks


LEARNING_RATE = 5e-4


def cache_latents(path: Path, work: Path, load: Callable[[], Any], world: World) -> None:
    """Writes the latents of all pictures, (N, 12, 8, 8) float32, each rank encoding its share.

    load: gives the VAE, where they are not there yet.
    """
    if not all(gather_objects(path.exists(), world)):
        vae, images = load(), pictures(work)
        raw = torch.zeros(len(images), VAE["latent_channels"], SIZE // 8, SIZE // 8)
        mine = range(64 * world.rank, len(images), 64 * world.world_size)
        with torch.inference_mode(), mixed_precision():
            for i in tqdm(mine, desc="latents", disable=world.rank != 0):
                raw[i : i + 64] = vae.encode(to_tensor(images[i : i + 64])).latent_dist.mode().float()
        raw = sum_tensor(raw)
        if world.rank == 0:
            save_atomically(dict(raw=raw), path)
        barrier()


def read_latents(work: Path) -> tuple[Tensor, Any]:
    """Reads the cached latents and the VAE, both scaled to channels of mean 0 and variance 1.

    The scale goes into the 1x1 convolutions on both sides of the latents, so that `scaling_factor` is 1.
    """
    vae = load_vae(work)
    raw = torch.load(work / "latents.pt", weights_only=True)["raw"]
    mean, std = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
    print("latent std by channel:", [round(v, 2) for v in std.tolist()])
    with torch.no_grad():
        count = len(mean)
        vae.quant_conv.weight[:count] /= std[:, None, None, None]
        vae.quant_conv.bias[:count] = (vae.quant_conv.bias[:count] - mean) / std
        vae.quant_conv.bias[count:] -= 2.0 * std.log()
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]
    return ((raw - mean[:, None, None]) / std[:, None, None]), vae


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**UNET)
    for name, inner in unet.named_modules():  # residual branches begin at zero, as in ADM
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(inner.weight)
            nn.init.zeros_(inner.bias)
    return unet


def average_gradients(module: nn.Module, share: float, world: World) -> float:
    """Replaces gradients by their mean over ranks. Returns the mean of `share`, so that all ranks end together."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = sum_tensor(torch.cat([*(g.flatten() for g in gradients), torch.tensor([share])])) / world.world_size
    for gradient, mean in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return flat[-1].item()


def take_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    loss: Tensor,
    step: int,
    share: float,
    world: World,
) -> float:
    """Moves a network by a loss, on all ranks alike, and its average after it; step: counted from 1.

    Returns the mean over ranks of `share`, which each has of its time, so that all end together.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    share = average_gradients(module, share, world)
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    follow(average, module, step)
    return share


def learning_rate(taken: int, share: float, final: bool, peak: float = LEARNING_RATE) -> float:
    """Returns the learning rate after `taken` steps of this start and a share of its time.

    It warms up to `peak` over 200 steps. With `final` it falls in the last third of the time, to 2 % of what it was.
    """
    rate = peak * min(1.0, (taken + 1) / 200)
    return rate * (min(1.0, 3.0 * (1.0 - share) + 0.02) if final else 1.0)


def train_unet(work: Path, minutes: float, final: bool) -> None:
    """Trains the U-Net by v-prediction, with uniform timesteps and an exponential average that warms up.

    final: the learning rate falls at the end, as in `learning_rate`.
    """
    world = join()  # two ranks with a thread each: small operations do not gain from two threads
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.world_size))
    torch.manual_seed(0)
    cache_latents(work / "latents.pt", work, lambda: load_vae(work), world)
    latents, _ = read_latents(work)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder").eval().requires_grad_(False)
    unet: Any = build_unet()
    unet.to(memory_format=torch.channels_last)
    average = {name: p.detach().clone() for name, p in unet.named_parameters()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    noise_scheduler: Any = DDPMScheduler(**SCHEDULER)
    step, path = 0, work / "unet.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        unet.load_state_dict(saved["model"])
        average, step = saved["average"], saved["step"]
        if saved["optimizer"] is not None:  # none after `unpack`
            optimizer.load_state_dict(saved["optimizer"])
    draw = np.random.default_rng([step, world.rank])
    torch.manual_seed(step * world.world_size + world.rank)
    clock, losses, share = Clock(minutes, every_seconds=60.0), [], 0.0

    def save() -> None:
        state = dict(model=unet.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step)
        save_atomically(state, path)

    started, first = time.monotonic(), step
    while share < 1.0:
        rows = draw.integers(0, len(latents) - 256, size=BATCH)
        with torch.inference_mode():
            hidden = text_encoder(tokens(tokenizer, draw_captions(rows, draw))).last_hidden_state
        hidden = hidden.clone()
        x = latents[rows]
        noise = torch.randn_like(x)
        timesteps = (torch.rand(BATCH) + torch.arange(BATCH)) / BATCH  # stratified: one from each range
        timesteps = (timesteps * noise_scheduler.config.num_train_timesteps).long()
        noisy = noise_scheduler.add_noise(x, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = noise_scheduler.get_velocity(x, noise, timesteps)
        set_learning_rate(optimizer, learning_rate(step - first, share, final))
        with mixed_precision(), sdpa_kernel(SDPBackend.MATH):  # for so few tokens faster than the fused kernel
            predicted = unet(noisy, timesteps, hidden).sample
        loss = F.mse_loss(predicted.float(), target)
        step += 1
        share = take_step(unet, optimizer, average, loss, step, clock.share, world)
        losses.append(loss.item())
        if clock.due() and world.rank == 0:
            save()
            speed = (step - first) * BATCH * world.world_size / (time.monotonic() - started)
            print(
                f"unet step {step} loss {np.mean(losses[-200:]):.4f} {speed:.0f} samples/s",
                flush=True,
            )
    if world.rank == 0:
        save()
