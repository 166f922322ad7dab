"""Drawing pictures under control: our sampling against diffusers' StableDiffusionControlNetPipeline, in turns.

    .venv/bin/python tests/benchmarks/sampling.py [--size 128] [--batches 1,8] [--steps 20] [--rounds 5]

Both in one process, with the same weights (the base of equal_work.py and a ControlNet whose zero convolutions have been
moved), prompts, conditions, first noise, DDIM steps and guidance, and PyTorch's default attention. `apart` is the
largest difference of a pixel, of 255, and `equal` the share of values that are the same. `ratio` is the median of the
rounds' ratios.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
from equal_work import write_base
from record import write

from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.pretrained import load_base
from controlbooth.models.sampling import Control, initial_noise, sample

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "red circle with blue background"


def moved_controlnet(unet: Any, dtype: torch.dtype) -> Any:
    """Whose control changes the picture."""
    torch.manual_seed(0)
    controlnet: Any = build_controlnet(unet)
    with torch.no_grad():
        for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            block.weight.normal_(std=0.02)
    return controlnet.to(dtype).eval()


def measure(folder: Path, precision: str, size: int, batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    dtype = PRECISIONS[precision]
    base, plain = (load_base(folder, "auto", dtype, "cpu") for _ in range(2))
    ours_controls, theirs_controls = (moved_controlnet(one.unet, dtype) for one in (base, plain))
    conditions = torch.rand((batch, 3, size, size), generator=torch.Generator().manual_seed(1))
    prompts, seeds, options = [PROMPT] * batch, list(range(batch)), dict(guidance_scale=3.0)

    def ours() -> np.ndarray:
        return sample(base, prompts, [Control(ours_controls, conditions)], seeds=seeds, steps=steps, **options).numpy()

    pipeline = StableDiffusionControlNetPipeline(
        vae=plain.vae, text_encoder=plain.text_encoders[0], tokenizer=plain.tokenizers[0], unet=plain.unet,
        controlnet=theirs_controls, scheduler=DDIMScheduler.from_config(plain.process.scheduler.config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> np.ndarray:
        latents = initial_noise(plain, seeds, size, size)
        made = pipeline(
            prompts, image=conditions, latents=latents.to(dtype), num_inference_steps=steps, output_type="np", **options
        ).images
        return (made * 255).round().astype(np.uint8)

    first = {"ours": ours(), "diffusers": theirs()}  # which also warms both up
    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for _ in range(rounds):
        for name, draw in (("ours", ours), ("diffusers", theirs)):
            seconds[name].append(timed(draw))
    ratio = median(theirs / ours for ours, theirs in zip(seconds["ours"], seconds["diffusers"], strict=True))
    apart = np.abs(first["ours"].astype(int) - first["diffusers"].astype(int))
    common = dict(precision=precision, pixels=size, batch=batch, steps=steps)
    return [
        {
            **common,
            "program": name,
            "pictures_per_second": batch / median(took),
            "ratio": ratio if name == "ours" else 1.0,
            "apart": int(apart.max()),
            "equal": float((apart == 0).mean()),
        }
        for name, took in seconds.items()
    ]


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", default="fp32,bf16")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="sampling-") as temporary:
        base = write_base(Path(temporary) / "base")
        for precision in options.precisions.split(","):
            for batch in map(int, options.batches.split(",")):
                rows += measure(base, precision, options.size, batch, options.steps, options.rounds)
    write("sampling", rows)


if __name__ == "__main__":
    main()
