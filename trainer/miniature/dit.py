"""Trains the embedded transformer: SD3's network, on the shipped miniature's VAE, tokenizer and text encoder."""

import json
import shutil
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn

from controlbooth.data.scenes.render import HELD_OUT_SEED, render, scene
from controlbooth.models.files.weights import save_pretrained
from controlbooth.models.noise.process import Diffusion, FlowMatching
from controlbooth.models.pretrained import MINIATURE, load_base
from controlbooth.models.text import TEXT_ENCODINGS
from controlbooth.trainer.engine.distributed import join
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.evaluation.scenes.judge import load_judge, prompt_accuracy, read
from controlbooth.trainer.miniature.card import sampled
from controlbooth.trainer.miniature.pictures import SIZE
from controlbooth.trainer.miniature.text import draw_captions
from controlbooth.trainer.miniature.training import Clock, mixed_precision, save_atomically, set_learning_rate
from controlbooth.trainer.miniature.unet import cache_latents, learning_rate, take_step
from controlbooth.trainer.miniature.vae import VAE

DIT: dict[str, Any] = dict(
    sample_size=SIZE // 8,
    patch_size=2,  # a token of 16 pixels, as at SD3's; at 1 a sample takes 2.2 times as long
    in_channels=VAE["latent_channels"],
    out_channels=VAE["latent_channels"],
    num_layers=6,
    attention_head_dim=64,
    num_attention_heads=4,
    joint_attention_dim=128,
    caption_projection_dim=256,
    pooled_projection_dim=128,
    pos_embed_max_size=16,
    qk_norm="rms_norm",
)
SHIFT = 1.0
"""An 8 x 8 grid is small: levels of noise need no move towards noise."""
BATCH = 32
RATE = 1e-3
"""Twice the U-Net's learning rate: targets of a teacher have no noise of their own."""
STATE = "dit.pt"


def build_dit() -> SD3Transformer2DModel:
    """Makes a new transformer whose blocks begin as the identity (adaLN-zero) and whose prediction begins at zero."""
    dit = SD3Transformer2DModel(**DIT)
    for name, inner in dit.named_modules():
        if name == "proj_out" or name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")):
            nn.init.zeros_(inner.weight)
            nn.init.zeros_(inner.bias)
    return dit


def flow_matching() -> FlowMatching:
    """Returns the process that it is trained and sampled by."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return FlowMatching(scheduler)


def stratified_levels(process: FlowMatching, count: int) -> Tensor:
    """Draws `count` levels int64 of the process's density, one from each of as many equally likely ranges."""
    places = (torch.rand(count, dtype=torch.float64) + torch.arange(count)) / count
    return torch.searchsorted(torch.tensor(process.thresholds, dtype=torch.float64) / 2.0**64, places)


@torch.no_grad()
def teacher_velocity(teacher: Any, schedule: Tensor, noisy: Tensor, sigmas: Tensor, hidden: Tensor) -> Tensor:
    """Returns the velocity noise - picture, (B, C, h, w), that a U-Net of v-prediction expects on the straight line.

    A point (1 - s) x + s e of the line, divided by r = sqrt((1 - s)^2 + s^2), is one of a diffusion whose alpha and
    sigma are (1 - s) / r and s / r (arXiv 2206.00364, section 2, has every such change of scale); from the predicted v
    follow e = sigma x_t + alpha v and x = alpha x_t - sigma v (arXiv 2202.00512, appendix D). Its expectation is what
    flow matching learns from samples, so the target has less variance than a sample's own.

    schedule: the cumulative products of alphas, (T,), which fall; sigmas: (B,), none above that of the last timestep.
    """
    s = sigmas[:, None, None, None]
    r = ((1.0 - s).square() + s.square()).sqrt()
    alpha, sigma = (1.0 - s) / r, s / r
    place = alpha.flatten().square().clamp(schedule[-1].item(), schedule[0].item())
    after = torch.searchsorted(-schedule, -place).clamp(1, len(schedule) - 1)
    share = (schedule[after - 1] - place) / (schedule[after - 1] - schedule[after])
    v = teacher(noisy / r, after - 1 + share, hidden).sample
    return (sigma * noisy / r + alpha * v) - (alpha * noisy / r - sigma * v)


def train_dit(work: Path, minutes: float, final: bool) -> None:
    """Trains by flow matching with logit-normal levels, from where the work folder's state ends.

    The target is what the shipped U-Net expects, and the sample's own above its last noise level. Takes a GPU where
    there is one. final: the learning rate falls at the end, as in `learning_rate`.
    """
    world = join()  # as many threads as OMP_NUM_THREADS says: torchrun gives each rank one
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, process, encode = load_base(MINIATURE), flow_matching(), TEXT_ENCODINGS["miniature-dit"]
    cache = work / "shipped-latents.pt"
    cache_latents(cache, work, lambda: base.vae, world)
    base.text_encoders[0].to(device)
    teacher: Any = base.denoiser.to(device)
    schedule = cast(Diffusion, base.process).scheduler.alphas_cumprod.to(device)
    last = (1.0 + (schedule[-1] / (1.0 - schedule[-1])).sqrt()).reciprocal()  # the sigma of its last timestep
    latents = torch.load(cache, weights_only=True)["raw"].to(device)
    torch.manual_seed(0)
    dit: Any = build_dit()
    dit.to(device)
    average = {name: p.detach().clone() for name, p in dit.named_parameters()}
    optimizer = torch.optim.AdamW(dit.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    step, path = 0, work / STATE
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=device)
        dit.load_state_dict(saved["model"])
        average, step = saved["average"], saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
    draw = np.random.default_rng([step, world.rank])
    torch.manual_seed(step * world.world_size + world.rank)
    clock, losses, share = Clock(minutes, every_seconds=120.0), [], 0.0

    def save() -> None:
        state = dict(model=dit.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step)
        save_atomically(state, path)

    started, first = time.monotonic(), step
    while share < 1.0:
        rows = draw.integers(0, len(latents) - 256, size=BATCH)
        with torch.no_grad():
            hidden, pooled = encode(base, draw_captions(rows, draw))
        x = latents[torch.from_numpy(rows).to(device)]
        noisy, target, times = process.noised(x, torch.randn_like(x), stratified_levels(process, BATCH).to(device))
        known = times / 1000.0 <= last
        if known.any():
            with mixed_precision(device):
                taught = teacher_velocity(teacher, schedule, noisy[known], times[known] / 1000.0, hidden[known])
            target[known] = taught.float()
        set_learning_rate(optimizer, learning_rate(step - first, share, final, RATE))
        with mixed_precision(device):  # the fused kernel of attention is as fast as the plain one for 88 tokens
            predicted = dit(noisy, hidden, pooled, times, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), target)
        step += 1
        share = take_step(dit, optimizer, average, loss, step, clock.share, world)
        losses.append(loss.item())
        if world.rank == 0 and (step - first) % 100 == 0:
            samples, seen = BATCH * world.world_size, step * BATCH * world.world_size
            speed = (step - first) * samples / (time.monotonic() - started)
            print(f"dit step {step} samples {seen} loss {np.mean(losses[-200:]):.4f} {speed:.1f} samples/s", flush=True)
        if clock.due() and world.rank == 0:
            save()
    if world.rank == 0:
        save()


def export_dit(work: Path, out: Path) -> int:
    """Writes the averaged weights in fp16 as a diffusers folder, with the other parts of the shipped miniature.

    Returns after how many steps. Pipelines of diffusers read it as an SD3 without its other text encoders: they are to
    be given prompt_embeds and pooled_prompt_embeds.
    """
    dit: Any = build_dit()
    saved = torch.load(work / STATE, weights_only=True, map_location="cpu")
    dit.load_state_dict(dit.state_dict() | saved["average"])
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(MINIATURE / part, temporary / part)
    save_pretrained(dit.half(), temporary / "transformer")
    scheduler: Any = flow_matching().scheduler
    scheduler.save_pretrained(temporary / "scheduler")
    parts = json.loads((MINIATURE / "model_index.json").read_text())
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}
    index |= {f"{name}_{number}": [None, None] for name in ("text_encoder", "tokenizer") for number in (2, 3)}
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2))
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return saved["step"]


def score_dit(work: Path, count: int = 128) -> dict[str, float]:
    """Exports to WORK/dit, samples held-out captions there, has the judge read the pictures, and draws some of them."""
    steps = export_dit(work, out := work / "dit")
    scenes = [scene(HELD_OUT_SEED, i) for i in range(count)]
    captions = [what.caption for what in scenes]
    pictures = sampled(load_base(out), captions)
    figures = prompt_accuracy(read(load_judge(), pictures), scenes)
    real = np.stack([render(what).image for what in scenes[:12]])
    draw_grid(out / "samples.png", {"sample": pictures[:12], "real": real}, captions[:12])
    print(f"{out}: after {steps} steps, {count} held-out captions")
    for name, value in figures.items():
        print(f"  {name:<32}{value:.3f}")
    return figures
