"""One real optimizer step of Stable Diffusion 1.5's shapes under ZeRO, with random weights, and what it takes.

    .venv/bin/torchrun --standalone --nproc-per-node 2 tests/benchmarks/sd15_step.py [--resolution 256]
        [--zero-stage 2] [--micro-batch-size 1] [--attention flash] [--gradient-checkpointing]

Nothing is loaded: the U-Net, VAE and text encoder have the real configurations and random weights, so that the step
does the real work. Prints parameter counts, the 13 residuals' shapes, the step-0 identity, seconds and peak memory.
"""

import argparse
import os
import resource
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from random_weights import random_module
from transformers import CLIPTextConfig, CLIPTextModel

from controlbooth.models.architectures import SD15
from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.denoisers.registry import control_residuals, denoise, parameter_report
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.text import TextEncoding
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.distributed import gather_objects, join, leave
from controlbooth.trainer.losses import weighted_mse


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--attention", choices=("flash", "math", "plain"), default="flash")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args()
    world = join()
    dtype = engines.DTYPES[options.precision]
    torch.manual_seed(0)
    unet = random_module(lambda: UNet2DConditionModel(**SD15.denoiser), dtype)
    vae = random_module(lambda: AutoencoderKL(**SD15.vae), dtype)
    text_encoder = random_module(lambda: CLIPTextModel(CLIPTextConfig(**SD15.text_encoders[0])), dtype)
    controlnet = build_controlnet(unet)
    for module in (unet, controlnet):
        apply_attention(module, AttentionChoice(options.attention, "asked for"))
        if options.gradient_checkpointing:
            module.enable_gradient_checkpointing()
            module.train()
    report = parameter_report(controlnet)
    say = print if world.rank == 0 else (lambda *_: None)
    say(f"U-Net {sum(p.numel() for p in unet.parameters()):,} parameters")
    say(f"ControlNet {report.total:,} = {report.copy:,} + {report.zero_convolutions:,} + {report.hint:,}")

    size = options.resolution // 8
    generator = torch.Generator().manual_seed(world.rank)
    batch = options.micro_batch_size
    pixels = torch.rand(batch, 3, options.resolution, options.resolution, generator=generator)
    noise = torch.randn(batch, 4, size, size, generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    with torch.no_grad():
        text = TextEncoding(text_encoder(torch.randint(0, 49406, (batch, 77), generator=generator)).last_hidden_state)
        residuals = control_residuals(controlnet.to(dtype), noise, timesteps, text, pixels)
        say("residuals", [tuple(r.shape) for r in residuals.each()])
        plain = denoise(unet, noise, timesteps, text)
        same = torch.equal(plain, denoise(unet, noise, timesteps, text, residuals))
        verdict = "equals" if same else "DIFFERS FROM"
        say(f"step 0: the prediction with the untrained ControlNet {verdict} the U-Net's own, bit for bit")

    tree = dict(
        name="sd15", max_steps=1, global_batch_size=batch * world.world_size, micro_batch_size=batch,
        model=dict(base="random"), data=dict(shards="none", condition="edges"),
        engine=dict(zero_stage=options.zero_stage),
    )  # fmt: skip
    config = build_config(tree)
    sizes = engines.batch_sizes(config, world.world_size)
    engine = engines.initialize(controlnet.float(), config.engine, config.optimizer, sizes, options.precision, False)
    before = {name: parameter.detach().float().sum().item() for name, parameter in engine.module.named_parameters()}
    started = time.perf_counter()
    with torch.no_grad():
        latents = vae.encode((pixels * 2 - 1).to(dtype)).latent_dist.mean.float() * 0.18215
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    encoded = time.perf_counter()
    prediction = denoise(unet, noisy, timesteps, text, control_residuals(engine, noisy, timesteps, text, pixels))
    loss = weighted_mse(prediction, noise, torch.ones(batch))
    forward = time.perf_counter()
    engines.accumulate(engine, loss)
    backward = time.perf_counter()
    taken = engines.apply_gradients(engine, 1e-5)
    norm, skipped = float(taken.norm), bool(taken.skipped)
    done = time.perf_counter()
    moved = sum(p.detach().float().sum().item() != before[name] for name, p in engine.module.named_parameters())
    peaks = gather_objects(peak_gib(), world)
    say(
        f"one step, {options.resolution} px, {options.precision}, ZeRO-{options.zero_stage}, {world.world_size} ranks: "
        f"loss {loss.item():.4f}, gradient norm {norm:.4f}, skipped {skipped}, {moved} tensors moved; "
        f"{done - started:.0f} s = encode {encoded - started:.0f} + forward {forward - encoded:.0f} "
        f"+ backward {backward - forward:.0f} + optimizer {done - backward:.0f}"
    )
    say("peak memory by rank, GiB:", *(f"{peak:.2f}" for peak in peaks))
    leave()


if __name__ == "__main__":
    main()
