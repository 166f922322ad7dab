"""The exported folder in diffusers' own pipeline, against our sampling: the largest difference of a pixel.

.venv/bin/python tests/benchmarks/same_picture.py RUN EXPORT [--samples 4]
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline

from controlbooth.data.shards.manifest import open_dataset
from controlbooth.models.pretrained import load_base, load_controlnet
from controlbooth.models.sampling import Control, initial_noise, sample
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import base_path
from controlbooth.trainer.evaluation.held_out import load_held_out
from controlbooth.trainer.run.checkpoint import complete_checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    checkpoint = complete_checkpoints(options.run)[-1]
    config = load_config(checkpoint / "config.yaml")
    held = load_held_out(
        open_dataset(str(config.data.held_out)), options.samples, config.data.condition, config.data.resolution
    )
    base = load_base(base_path(config), config.model.family, torch.float32, "cpu")
    ours_from = load_controlnet(checkpoint / "controlnet", base.denoiser).eval()
    conditioning = torch.from_numpy(held.conditions).permute(0, 3, 1, 2).float() / 255.0
    seeds = range(options.samples)
    arguments = dict(guidance_scale=3.0)
    ours = sample(base, held.captions, [Control(ours_from, conditioning)], seeds=seeds, steps=20, **arguments).numpy()

    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        base_path(config),
        controlnet=ControlNetModel.from_pretrained(options.export, torch_dtype=torch.float32),
        torch_dtype=torch.float32,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        held.captions,
        image=conditioning,
        latents=initial_noise(base, seeds, *base.picture_size),
        num_inference_steps=20,
        output_type="np",
        **arguments,
    ).images
    theirs = (theirs * 255).round().astype(np.uint8)
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    print(
        f"{options.samples} pictures, ours against StableDiffusionControlNetPipeline: largest difference of a pixel "
        f"{difference.max()} of 255, {(difference == 0).mean():.2%} of values equal"
    )


if __name__ == "__main__":
    main()
