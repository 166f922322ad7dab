"""Where a training step's time goes: by part of the step, and kernel by kernel beside the step we started from.

    .venv/bin/python tests/benchmarks/profile_step.py RUN.yaml [section.key=value ...] [--steps 10]

One process on the run's own data and base. `predict` is the forward pass of ControlNet and U-Net, `backward` both ways'
backward pass with the reduction of gradients; what is left is Python, logging and the loop.

`before` is the step as diffusers' example program makes it, on the same batches: the locked U-Net with autograd, every
prompt encoded, the ControlNet in fp32 under autocast, PyTorch's default attention and AdamW. `after` is ours. Both are
compared with the arithmetic's floor: the step's floating-point operations, counted on the modules, at the rate at which
this machine multiplies large matrices in the run's dtype. Profiling itself costs time, so the floor's ratio is taken of
steps without it, in turns.
"""

import argparse
import os
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from diffusers import ControlNetModel
from gpu_step import gemm_flops_per_second
from plain import plain_loss
from record import write
from torch.profiler import ProfilerActivity, profile, record_function

from controlbooth.models.pretrained import load_base
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig, base_path
from controlbooth.trainer.controlnet import build, session
from controlbooth.trainer.controlnet.step import controlnet_step, to_device
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.distributed import World, join, leave
from controlbooth.trainer.planning.footprint import footprint
from controlbooth.trainer.run.attempt import only_run
from controlbooth.trainer.run.watchdog import watching

PARTS = ("wait for data", "encode picture", "encode prompt", "predict", "backward", "optimizer")
KERNELS = 14
"""Rows of the table; the others are summed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_intermixed_args()
    world = join()
    with (
        tempfile.TemporaryDirectory() as scratch,
        only_run(Path(scratch), world) as attempt,
        watching(attempt, world, 3600.0) as watchdog,
    ):
        overrides = [*options.overrides, f"output={scratch}", "data.held_out=null"]
        config = load_config(options.run, overrides)
        run = build.build(config, world, attempt, watchdog, None)
        steps = {"after": partial(our_step, run)}
        if config.data.latent_cache is None and config.global_batch_size == config.micro_batch_size:
            steps = {"before": plain_step(config, run.precision, run.loader, world)} | steps
        for step in steps.values():
            for _ in range(3):
                step()
        wall: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.steps):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                wall[name].append(time.perf_counter() - began)
        seconds = {name: median(found) for name, found in wall.items()}
        profiles = {name: profiled(step, options.steps) for name, step in steps.items()}
        rate = gemm_flops_per_second(world.device, run.precision)
        report(config, options.steps, seconds, profiles, rate, run.precision, run.attention)
        run.loader.close()
        if run.tracker is not None:
            run.tracker.close(5.0)
    leave()


def our_step(run: session.Run) -> None:
    config = run.config
    with record_function("wait for data"):
        batch = next(run.loader)
    backward = partial(engines.accumulate, run.engine)
    controlnet_step(run.base, run.engine, backward, batch.micro_batches, None, run.world.device)
    with record_function("optimizer"):
        engines.apply_gradients(run.engine, config.optimizer.learning_rate)


def plain_step(config: RunConfig, precision: str, loader, world: World) -> Callable[[], None]:
    """On modules of its own, as diffusers makes them."""
    dtype = engines.DTYPES[precision]
    base = load_base(base_path(config), config.model.family, dtype, world.device)
    controlnet = ControlNetModel.from_unet(base.denoiser, conditioning_channels=3).float().train()
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        controlnet.parameters(), settings.learning_rate, settings.betas, settings.epsilon, settings.weight_decay
    )

    def step() -> None:
        batch = to_device(next(loader).micro_batches[0], world.device)
        plain_loss(base, controlnet, batch, autocast=precision != "fp32").backward()
        torch.nn.utils.clip_grad_norm_(controlnet.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def profiled(step: Callable[[], None], steps: int) -> profile:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    return profiler


def report(
    config: RunConfig,
    steps: int,
    seconds: dict[str, float],
    profiles: dict[str, profile],
    rate: float,
    precision: str,
    attention: str,
) -> None:
    """steps: in each profile. seconds: of a step that is not profiled. rate: of large products, FLOP/s."""
    size = config.global_batch_size
    averages = {name: one.key_averages() for name, one in profiles.items()}
    whole = seconds["after"]
    print(f"{config.name}, {precision}: {whole:.3f} s a step of {size} samples, {size / whole:.1f} samples/s")
    parts = {row.key: row.cpu_time_total / 1e6 / steps for row in averages["after"]}
    for part in PARTS:
        print(f"  {part:<18}{parts.get(part, 0.0):8.3f} s {100 * parts.get(part, 0.0) / whole:6.1f} %")

    kernels = {
        name: {row.key: row.self_cpu_time_total / 1e6 / steps for row in rows if row.key not in PARTS}
        for name, rows in averages.items()
    }
    largest = sorted(set().union(*kernels.values()), key=lambda k: -max(one.get(k, 0.0) for one in kernels.values()))
    rows: list[dict] = [
        {"kernel": kernel, **{f"{name}, ms": 1000 * own.get(kernel, 0.0) for name, own in kernels.items()}}
        for kernel in largest[:KERNELS]
    ]
    others = {f"{name}, ms": 1000 * sum(own.get(k, 0.0) for k in largest[KERNELS:]) for name, own in kernels.items()}
    rows.append({"kernel": "all others", **others})
    rows.append({"kernel": "a step, profiled", **{f"{n}, ms": 1000 * sum(own.values()) for n, own in kernels.items()}})
    rows.append({"kernel": "a step, not profiled", **{f"{name}, ms": 1000 * own for name, own in seconds.items()}})
    one = footprint(config, precision, config.micro_batch_size, attention)
    flops = (one.training_flops + one.encoder_flops) * size // config.micro_batch_size
    floor = flops / rate
    rows.append({"kernel": "floor", **{f"{name}, ms": 1000 * floor for name in seconds}})
    rows.append({"kernel": "step / floor", **{f"{name}, ms": own / floor for name, own in seconds.items()}})
    write("profile_step", rows)
    print(
        f"floor: {flops / 1e9:.1f} GFLOP a step, of it VAE and text encoder {one.encoder_flops / 1e9:.1f}, all prompts "
        f"kept, at {rate / 1e9:.0f} GFLOP/s: 2048 x 2048 products, {precision}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
