"""Trains the built-in base's VAE."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from controlbooth.trainer.miniature.pictures import SIZE, pictures, to_tensor
from controlbooth.trainer.miniature.training import Clock, mixed_precision, save_atomically, set_learning_rate

VAE: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=12,
    layers_per_block=1,
    block_out_channels=(16, 32, 64, 96),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=1,  # with 2 channels a group, a flat colour is normalised away
    sample_size=SIZE,
)


def start_linear(module: nn.Module) -> None:
    """Sets variance-preserving weights, and residual branches that begin at zero: the network starts as a linear one.

    With PyTorch's default weights each of the 20 layers shrinks its input to 0.58, and a small autoencoder spends its
    first thousand steps on growing out of that.
    """
    for name, inner in module.named_modules():
        if isinstance(inner, nn.Conv2d | nn.Linear):
            nn.init.normal_(inner.weight, std=inner.weight[0].numel() ** -0.5)
            if inner.bias is not None:
                nn.init.zeros_(inner.bias)
            if name.endswith(("conv2", "to_out.0", "proj_out", "ff.net.2")):
                nn.init.zeros_(inner.weight)


def train_vae(work: Path, minutes: float) -> None:
    torch.manual_seed(0)
    images = pictures(work)
    vae: Any = AutoencoderKL(**VAE)
    start_linear(vae)
    with torch.no_grad():  # quiet latents at first
        vae.quant_conv.weight[12:].zero_()
        vae.quant_conv.bias[12:].fill_(-4.0)
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    step, path = 0, work / "vae.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        vae.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    draw = np.random.default_rng(step)
    clock, losses = Clock(minutes), []
    while clock.share < 1.0:
        whole = clock.share > 0.75
        batch = 8 if whole else 16
        rows = np.sort(draw.choice(len(images) - 256, batch, replace=False))
        x = to_tensor(images[rows])
        if not whole:
            corners = draw.integers(0, SIZE - 32 + 1, size=(batch, 2))
            x = torch.stack([x[i, :, top : top + 32, left : left + 32] for i, (top, left) in enumerate(corners)])
        x = x.contiguous(memory_format=torch.channels_last)
        warmup = min(1.0, (step + 1) / 100)
        set_learning_rate(optimizer, 1.5e-3 * warmup * min(1.0, 4.0 * (1.0 - clock.share) + 0.02))
        with mixed_precision():
            posterior = vae.encode(x).latent_dist
            restored = vae.decode(posterior.sample()).sample
        error = restored.float() - x
        loss = error.square().mean() + 0.1 * error.abs().mean() + 2e-5 * posterior.kl().float().mean() / 64
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(error.detach().square().mean().item())
        if clock.due():
            save_atomically(dict(model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step), path)
            psnr = 10 * math.log10(4.0 / np.mean(losses[-50:]))
            kl = posterior.kl().mean().item() / (x.shape[2] * x.shape[3] / 64)
            print(f"vae step {step} whole {whole} psnr {psnr:.2f} dB kl/position {kl:.1f} nats", flush=True)
    save_atomically(dict(model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step), path)
    vae.eval()
    with torch.no_grad():
        x = to_tensor(images[-256:])
        latents = vae.encode(x).latent_dist.mode()
        error = (vae.decode(latents).sample - x).square().mean(dim=(1, 2, 3))
    print(
        f"held out: {(10 * torch.log10(4.0 / error)).mean():.2f} dB; latents {latents.std():.3f}",
        latents.std(dim=(0, 2, 3)),
    )


def load_vae(work: Path) -> Any:
    vae: Any = AutoencoderKL(**VAE, scaling_factor=1.0)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["model"])
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
