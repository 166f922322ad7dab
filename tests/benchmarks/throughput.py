"""ControlNet training on one GPU: samples a second and memory by family, resolution, micro-batch, attention and so on.

    .venv/bin/python tests/benchmarks/throughput.py [--seconds-budget 240] [--output rows.jsonl]
    .venv/bin/python tests/benchmarks/throughput.py --family miniature --largest 2     in small, on a CPU

Bases have their real shapes and random weights, made on the device. Each step is the product's own: controlnet_step and
a DeepSpeed engine under ZeRO-2, from uint8 pictures and captions to moved weights. The most telling rows come first;
what is not reached within the budget is not measured. A row that does not fit says so.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from sd15_step import random_module
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlbooth.data.loading.batches import MicroBatch
from controlbooth.data.order import draws
from controlbooth.data.shards.latent_cache import EncodedBatch
from controlbooth.models.attention import AttentionChoice, apply_attention, attention_shapes, choose_attention
from controlbooth.models.base import Base
from controlbooth.models.denoisers.registry import denoise
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.families import FAMILIES
from controlbooth.models.noise.process import Diffusion
from controlbooth.models.pretrained import load_base
from controlbooth.models.text import encode_with_dropout
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.controlnet.step import controlnet_step
from controlbooth.trainer.encoding import as_array, dtype_name, encode_kept, encode_posterior, to_pixel_values
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.distributed import World, end_process, join, leave
from controlbooth.trainer.miniature.text import build_tokenizer
from controlbooth.trainer.run.process import peak_memory_gib, quiet_libraries

WARM_UP, MOST_STEPS, MOST_SECONDS = 3, 10, 5.0
CAPTIONS = ("a large red star on a blue background", "")  # half of the prompts are dropped


@dataclass(frozen=True)
class Case:
    family: str
    resolution: int
    micro_batch_size: int
    attention: str = "auto"
    gradient_checkpointing: bool = False
    cached: bool = False
    """Latents and text from a latent cache instead of encoders in the step."""
    settings: str = "default"
    """A name of SETTINGS."""


@contextmanager
def default(base: Base, engine: Any) -> Iterator[None]:
    yield


@contextmanager
def free_order(base: Base, engine: Any) -> Iterator[None]:
    """Without the demand that the same work gives the same bits."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def cudnn_benchmark(base: Base, engine: Any) -> Iterator[None]:
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


@contextmanager
def channels_last(base: Base, engine: Any) -> Iterator[None]:
    """Frozen weights in this layout, and the ControlNet's input: its own weights lie in DeepSpeed's flat buffers."""
    modules = [base.denoiser, base.vae]
    for module in modules:
        module.to(memory_format=torch.channels_last)
    hook = engine.module.conv_in.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(memory_format=torch.channels_last),)
    )
    try:
        yield
    finally:
        hook.remove()
        for module in modules:
            module.to(memory_format=torch.contiguous_format)


@contextmanager
def all_of_these(base: Base, engine: Any) -> Iterator[None]:
    with channels_last(base, engine), free_order(base, engine), cudnn_benchmark(base, engine):
        yield


SETTINGS = {
    "default": default,
    "free order": free_order,
    "cudnn.benchmark": cudnn_benchmark,
    "channels_last": channels_last,
    "all of these": all_of_these,
}


def cases(families: list[str], largest: int) -> list[Case]:
    """Grouped by family, since an engine is made for each; within it the most telling first."""
    wanted: list[Case] = []
    for family in families:
        resolution, usual, sizes = {
            "sd15": (512, 8, (8, 32, 1, 4, 16, 64)),
            "sdxl": (1024, 4, (4, 8, 1, 2)),
            "miniature": (64, 2, (2, 1)),
        }[family]
        plain = Case(family, resolution, usual)
        wanted += [replace(plain, micro_batch_size=size) for size in sizes]
        wanted += [replace(plain, cached=True), replace(plain, gradient_checkpointing=True)]
        wanted += [
            replace(plain, micro_batch_size=size * usual, gradient_checkpointing=True, cached=True) for size in (2, 8)
        ]
        wanted += [replace(plain, settings=name) for name in SETTINGS if name != "default"]
        wanted += [replace(plain, attention=name) for name in ("flash", "cudnn", "efficient", "xformers", "math")]
        if family == "sdxl":
            wanted += [replace(plain, resolution=512, micro_batch_size=size) for size in (8, 16, 32)]
    return [case for case in wanted if case.micro_batch_size <= largest]


def random_base(name: str, device: torch.device, dtype: torch.dtype) -> Base:
    """The family's published configurations with random weights. Its tokenizer is the miniature's, which is shipped."""
    if name == "miniature":
        return load_base("miniature", dtype=dtype, device=device)
    architecture = FAMILIES[name].architecture
    assert architecture is not None
    make = partial(random_module, dtype=dtype, device=device)
    encoders = [CLIPTextModel, CLIPTextModelWithProjection][: len(architecture.text_encoders)]
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    return Base(
        family=FAMILIES[name],
        path=Path(name),
        vae=make(lambda: AutoencoderKL(**architecture.vae)),
        text_encoders=tuple(
            make(lambda kind=kind, config=config: kind(CLIPTextConfig(**config)))
            for kind, config in zip(encoders, architecture.text_encoders, strict=True)
        ),
        tokenizers=(tokenizer,) * len(architecture.text_encoders),
        denoiser=make(lambda: UNet2DConditionModel(**architecture.denoiser)),
        process=Diffusion(DDPMScheduler(**architecture.noise_scheduler)),
        digest="",
    )


def make_engine(base: Base, precision: str) -> Any:
    """A fresh ControlNet of the base under ZeRO-2, as the product's train.py makes it."""
    hint = (16, 32, 64, 96) if base.family.name == "miniature" else (16, 32, 96, 256)
    tree = dict(name="throughput", max_steps=1, global_batch_size=1, micro_batch_size=1)
    config = build_config(tree | dict(model=dict(base="random"), data=dict(shards="none", condition="edges")))
    sizes = engines.batch_sizes(config, 1)  # what DeepSpeed reckons with; its engine takes any batch
    torch.manual_seed(0)
    controlnet = build_controlnet(base.denoiser, hint).float()
    return engines.initialize(controlnet, config.engine, config.optimizer, sizes, precision, False)


def make_batch(case: Case, base: Base) -> MicroBatch:
    """What the loader would bring, on the CPU."""
    count, size = case.micro_batch_size, case.resolution // base.family.vae_factor
    positions = np.arange(count, dtype=np.int64)
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (2, count, 3, case.resolution, case.resolution), np.uint8)
    captions = [CAPTIONS[row % 2] for row in range(count)]
    encoded = None
    if case.cached:
        pixels = to_pixel_values(torch.from_numpy(pictures[0]).to(base.device))
        posterior = [encode_posterior(base, picture[None]) for picture in pixels]
        mean, std = (torch.cat(parts) for parts in zip(*posterior, strict=True))
        text = encode_kept(base, captions)
        encoded = EncodedBatch(
            mean=as_array(mean),
            std=as_array(std),
            latents_dtype=dtype_name(base.vae),
            hidden_states=None if text is None else as_array(text[0]),
            pooled=None if text is None or text[1] is None else as_array(text[1]),
            text_dtype=dtype_name(base.text_encoders[0]),
        )
    return MicroBatch(
        positions=positions,
        keys=[str(position) for position in positions],
        places=np.stack([positions * 0, positions], axis=1),
        pixel_values=None if case.cached else pictures[0],
        conditioning=pictures[1],
        encoded=encoded,
        captions=captions,
        dropped=np.array([not caption for caption in captions]),
        timesteps=draws.timesteps(0, positions, 1000),
        noise=draws.noise(0, positions, (base.latent_channels, size, size)),
        posterior_noise=draws.posterior_noise(0, positions, (base.latent_channels, size, size)),
        weights=np.ones(count, np.float32),
    )


def choose(case: Case, base: Base) -> AttentionChoice:
    """As a run of the product does. Raises ValueError where the kernel cannot run."""
    size, device = case.resolution // base.family.vae_factor, base.device
    latents = torch.zeros(case.micro_batch_size, base.latent_channels, size, size, device=device)
    text = encode_with_dropout(base, [""] * len(latents), picture_size=(case.resolution, case.resolution))
    timesteps = torch.zeros(len(latents), dtype=torch.int64, device=device)
    shapes = attention_shapes(base.denoiser, lambda: denoise(base.denoiser, latents, timesteps, text))
    return choose_attention(case.attention, device, base.dtype, shapes)


def prepare(base: Base, engine: Any, attention: AttentionChoice, gradient_checkpointing: bool) -> None:
    for module in (base.denoiser, engine.module):
        apply_attention(module, attention)
        if gradient_checkpointing:
            module.enable_gradient_checkpointing()
        else:
            module.disable_gradient_checkpointing()


def step(base: Base, engine: Any, batch: MicroBatch, world: World) -> bool:
    """One optimizer step; -> whether it was skipped."""
    backward = partial(engines.accumulate, engine)
    controlnet_step(base, engine, backward, [batch], None, world.device)
    return engines.apply_gradients(engine, 1e-5)[1]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_of_a_sample(case: Case, base: Base, engine: Any, world: World) -> int:
    """Multiplications and additions of matrix products and convolutions in a step, without any done twice."""
    prepare(base, engine, AttentionChoice("math", "whose products are counted"), gradient_checkpointing=False)
    batch = make_batch(replace(case, micro_batch_size=1), base)
    step(base, engine, batch, world)
    with FlopCounterMode(display=False) as counter:
        step(base, engine, batch, world)
    return counter.get_total_flops()


def measure(case: Case, base: Base, engine: Any, chosen: AttentionChoice, world: World) -> dict[str, Any]:
    """Seconds and memory of a step."""
    prepare(base, engine, chosen, case.gradient_checkpointing)
    batch = make_batch(case, base)
    with SETTINGS[case.settings](base, engine):
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(world.device)
        for _ in range(WARM_UP):
            step(base, engine, batch, world)
        seconds: list[float] = []
        skipped = 0
        while len(seconds) < 2 or (len(seconds) < MOST_STEPS and sum(seconds) < MOST_SECONDS):
            synchronize(world.device)
            began = time.perf_counter()
            skipped += step(base, engine, batch, world)
            synchronize(world.device)
            seconds.append(time.perf_counter() - began)
    return {
        "samples_per_second": case.micro_batch_size / median(seconds),
        "step_seconds": median(seconds),
        "steps": len(seconds),
        "skipped_steps": skipped,
        "peak_memory_gib": peak_memory_gib(world),
        "kernel": chosen.name,
        "by_shape": dict(chosen.by_shape),
        "reason": chosen.reason,
    }


def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of one large square product of random numbers: what the device reaches at best."""
    size, repeats = (8192, 20) if device.type == "cuda" else (2048, 9)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        left @ right
    synchronize(device)
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=("sd15", "sdxl", "miniature"), help="default: sd15, sdxl")
    parser.add_argument("--precision", choices=tuple(engines.DTYPES), default="bf16")
    parser.add_argument("--largest", type=int, default=64, help="the largest micro-batch")
    parser.add_argument("--seconds-budget", type=float, default=600.0)
    parser.add_argument("--output", type=Path, help="a file for the rows, one JSON object a line")
    options = parser.parse_args()
    ends = time.monotonic() + options.seconds_budget
    quiet_libraries()
    world = join()
    cuda = world.device.type == "cuda"
    dtype = engines.DTYPES[options.precision]
    device = torch.cuda.get_device_name(world.device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    best = gemm_flops_per_second(world.device, dtype)
    print(f"{device}: {best / 1e12:.1f} TFLOP/s in one {options.precision} product; PyTorch {torch.__version__}")
    print(HEADER, flush=True)
    families = options.family or ["sd15", "sdxl"]
    for number, family in enumerate(families):
        share = time.monotonic() + (ends - time.monotonic()) / (len(families) - number)
        for row in rows_of(cases([family], options.largest), dtype, options.precision, world, share, best):
            row = row | {"device": device, "gemm_tflops": best / 1e12}
            print(line(row), flush=True)
            if options.output:
                with open(options.output, "a") as file:
                    print(json.dumps(row), file=file)
    leave()


def rows_of(
    wanted: list[Case], dtype: torch.dtype, precision: str, world: World, ends: float, best: float
) -> Iterator[dict[str, Any]]:
    """The rows of one family, until `ends` of time.monotonic()."""
    base = random_base(wanted[0].family, world.device, dtype)
    engine: Any = make_engine(base, precision)
    flops: dict[tuple[int, bool], int] = {}
    chosen: dict[tuple[int, str], AttentionChoice] = {}
    too_large: list[Case] = []
    for case in wanted:
        if time.monotonic() > ends:
            return
        if any(
            replace(case, micro_batch_size=other.micro_batch_size) == other
            and case.micro_batch_size > other.micro_batch_size
            for other in too_large
        ):
            continue
        row = asdict(case) | {"precision": precision}
        kind, kernel = (case.resolution, case.cached), (case.resolution, case.attention)
        try:
            if kernel not in chosen:
                chosen[kernel] = choose(case, base)
            if kind not in flops:
                flops[kind] = flops_of_a_sample(case, base, engine, world)
            row |= measure(case, base, engine, chosen[kernel], world)
            row["flops_per_sample"] = flops[kind]
            row["share_of_gemm"] = flops[kind] * row["samples_per_second"] / best
        except (ValueError, RuntimeError) as error:
            full = isinstance(error, torch.OutOfMemoryError)
            row["error"] = "out of memory" if full else str(error).strip().splitlines()[0]
            broken = not isinstance(error, ValueError)
        else:
            broken = False
        if broken:
            too_large.append(case)
            engine.destroy()  # it may have stopped half-way through a backward pass
            del engine
            gc.collect()
            torch.cuda.empty_cache()
            engine = make_engine(base, precision)
        yield row
    engine.destroy()
    del engine, base
    gc.collect()


HEADER = (
    f"{'family':<10} {'pixels':>6} {'batch':>6}  {'attention':<22} {'again':<6} {'cached':<7} {'settings':<20} "
    f"{'samples/s':>10} {'step s':>8} {'GiB':>5} {'of GEMM':>8}"
)
"""again: gradient checkpointing, which computes activations twice."""


def line(row: dict[str, Any]) -> str:
    attention = row["attention"]
    if row.get("kernel", attention) != attention:
        attention += f" -> {row['kernel']}"
    if row.get("by_shape"):
        attention += f" +{len(row['by_shape'])}"
    start = (
        f"{row['family']:<10} {row['resolution']:>6} {row['micro_batch_size']:>6}  {attention:<22} "
        f"{'yes' if row['gradient_checkpointing'] else 'no':<6} {'yes' if row['cached'] else 'no':<7} "
        f"{row['settings']:<20}"
    )
    if "error" in row:
        return f"{start} {row['error']}"
    return (
        f"{start} {row['samples_per_second']:>10.2f} {row['step_seconds']:>8.4f} {row['peak_memory_gib']:>5.1f} "
        f"{100 * row['share_of_gemm']:>6.1f} %"
    )


if __name__ == "__main__":
    main()
    end_process(0)
