"""Packs the built-in base, measures it and writes its README."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from controlbooth.data.scenes.render import CLASSES, COLOURS, HELD_OUT_SEED, Scene, render, scene
from controlbooth.models.base import Base
from controlbooth.models.pretrained import load_base
from controlbooth.models.sampling import sample, to_uint8
from controlbooth.trainer.evaluation.control import control_fidelity
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.evaluation.kinds import NEAR
from controlbooth.trainer.evaluation.scenes.judge import load_judge, prompt_accuracy, read
from controlbooth.trainer.evaluation.scenes.reader import load_reader
from controlbooth.trainer.miniature.pictures import to_tensor
from controlbooth.trainer.miniature.readers import reading_real
from controlbooth.trainer.miniature.training import save_atomically
from controlbooth.trainer.miniature.unet import BATCH, SCHEDULER, build_unet, read_latents
from controlbooth.trainer.miniature.vae import VAE

GUIDANCE = 3.0


SAMPLING_STEPS = 25


def export(work: Path, out: Path) -> None:
    """Writes the diffusers folder in fp16: averaged U-Net, VAE with unit-variance latents, text encoder, tokenizer."""
    _, vae = read_latents(work)
    unet: Any = build_unet()
    saved = torch.load(work / "unet.pt", weights_only=True)
    unet.load_state_dict(saved["average"])
    text_encoder: Any = CLIPTextModel.from_pretrained(work / "text_encoder")
    build_pipeline: Any = StableDiffusionPipeline
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline = build_pipeline(
        vae=vae.to(memory_format=torch.contiguous_format).half(),
        text_encoder=text_encoder.half(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=unet.half(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(temporary)
    config = temporary / "text_encoder" / "config.json"  # else transformers loads it in fp16, beside a U-Net in fp32
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for network in ("judge", "reader"):
        shutil.copy(work / f"{network}.safetensors", temporary)
    (temporary / "training.json").write_text(json.dumps({"unet_steps": saved["step"], "batch": 2 * BATCH}))
    for kept in ("README.md", "samples.png"):
        if (out / kept).exists():
            shutil.copy(out / kept, temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB, after {saved['step']} steps")


def unpack(work: Path, out: Path) -> None:
    """Fills a work folder from the exported one. The optimizer's moments are not shipped: they warm up again."""
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(out / name, work / name, dirs_exist_ok=True)
    for network in ("judge", "reader"):
        shutil.copy(out / f"{network}.safetensors", work)
    vae: Any = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32)
    save_atomically(dict(model=vae.state_dict(), optimizer=None, step=0), work / "vae.pt")
    unet: Any = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
    average = {name: p.detach().clone() for name, p in unet.named_parameters()}
    steps = json.loads((out / "training.json").read_text())["unet_steps"]
    save_atomically(dict(model=unet.state_dict(), optimizer=None, average=average, step=steps), work / "unet.pt")


def score(out: Path, count: int = 128) -> dict[str, float]:
    """Measures the exported base: draws pictures for held-out captions and has the judge read them. Writes some of them
    to samples.png, and the figures to README.md. Returns the figures, by name."""
    base = load_base(out)
    judge = load_judge(out / "judge.safetensors")
    scenes = [scene(HELD_OUT_SEED, i) for i in range(count)]
    captions = [what.caption for what in scenes]
    batches = [range(first, min(first + 32, count)) for first in range(0, count, 32)]
    pictures = sampled(base, captions)
    real = np.stack([render(what).image for what in scenes])
    restored = to_uint8(
        torch.cat([base.decode_latents(base.encode_latents(to_tensor(real[list(rows)]))) for rows in batches])
    ).numpy()
    error = np.square(restored.astype(float) - real).mean(axis=(1, 2, 3))
    figures = {f"samples_{k}": v for k, v in prompt_accuracy(read(judge, pictures), scenes).items()}
    figures |= {f"real_{k}": v for k, v in prompt_accuracy(read(judge, real), scenes).items()}
    figures |= {f"restored_{k}": v for k, v in prompt_accuracy(read(judge, restored), scenes).items()}
    figures |= {f"reader_{k}": v for k, v in reading_real(load_reader(out / "reader.safetensors")).items()}
    figures["vae_psnr"] = float((10 * np.log10(255.0**2 / error)).mean())
    figures |= {f"restored_{k}": float(v.mean()) for k, v in _control_of(restored, scenes).items()}
    columns = {"sample": pictures[:12], "real": real[:12], "through the VAE": restored[:12]}
    draw_grid(out / "samples.png", columns, captions[:12])
    for name, value in figures.items():
        print(f"  {name:<32}{value:.3f}")
    (out / "README.md").write_text(card(out, figures, count))
    return figures


def sampled(base: Base, captions: list[str]) -> np.ndarray:
    """Draws a picture for each caption, (N, 64, 64, 3) uint8; its number is its seed."""
    batches = [range(first, min(first + 32, len(captions))) for first in range(0, len(captions), 32)]
    drawn = [
        sample(base, [captions[i] for i in rows], seeds=rows, steps=SAMPLING_STEPS, guidance_scale=GUIDANCE).numpy()
        for rows in batches
    ]
    return np.concatenate(drawn)


def card(out: Path, figures: dict[str, float], count: int) -> str:
    """Returns the text of the model card: what it is, how it was made, what it can do."""
    asked = ("background", "object_colour", "object_class", "object_size", "count")
    rows = [
        f"| {name.replace('_', ' ')} | "
        + " | ".join(f"{100 * figures[f'{what}_{name}']:.1f} %" for what in ("samples", "restored", "real"))
        + " |"
        for name in asked
    ]
    parts = {
        "U-Net": build_unet(),
        "VAE": AutoencoderKL(**VAE),
    }
    steps = json.loads((out / "training.json").read_text())["unet_steps"]
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [controlbooth, latent-diffusion, text-to-image]
---
# The miniature: a latent diffusion model for CPUs

64 x 64 pictures of one or two objects ({", ".join(CLASSES)}) in {len(COLOURS)} colours
on plain or two-tone backgrounds, from captions such as "a large red mug and a small yellow star on a teal background".
It is what controlbooth's main job, tests and figures run on; it draws nothing else. Parameters: {sizes};
factor 8, 12 latent channels, v-prediction.

```python
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("models/miniature")
pipeline("a large red mug on a teal background", guidance_scale={GUIDANCE}).images[0].save("mug.png")
```

## Figures

{count} held-out captions, {SAMPLING_STEPS} DDIM steps, guidance {GUIDANCE}; read by the judge, whose own errors are in
the last column. `python -m controlbooth.trainer.miniature.recipe score --work FOLDER` prints them and writes this page.

| | samples | real pictures through the VAE | real pictures |
| --- | --- | --- | --- |
{chr(10).join(rows)}

The VAE restores real pictures at {figures["vae_psnr"]:.1f} dB (edge F1 {figures["restored_edge_f1"]:.3f}, mask IoU
{figures["restored_mask_iou"]:.3f}), which bounds what control can score on this base.

Conditions are found again in pictures by the reader; in real held-out ones it finds depth (ratio below 1.25 in
{100 * figures["reader_depth_delta"]:.1f} % of pixels), normals ({figures["reader_normals_angle"]:.1f} degrees off),
segmentation (mean IoU {figures["reader_segmentation_miou"]:.3f}) and key points
({100 * figures["reader_pose_pck"]:.1f} % within {NEAR:.0%} of the side).

![samples beside real pictures](samples.png)

## Recipe

Trained by `trainer/miniature/recipe.py` from random weights on scenes of `data/scenes/render.py` (seed 0),
and on nothing else:

```
python -m controlbooth.trainer.miniature.recipe scenes --work FOLDER
python -m controlbooth.trainer.miniature.recipe vae    --work FOLDER --minutes 22
python -m controlbooth.trainer.miniature.recipe judge  --work FOLDER --minutes 7
python -m controlbooth.trainer.miniature.recipe reader --work FOLDER --minutes 30
python -m controlbooth.trainer.miniature.recipe text   --work FOLDER --minutes 4
torchrun --standalone --nproc-per-node 2 -m controlbooth.trainer.miniature.recipe unet \\
  --work FOLDER --minutes 170 --final
python -m controlbooth.trainer.miniature.recipe export --work FOLDER
python -m controlbooth.trainer.miniature.recipe score  --work FOLDER
```

The U-Net has seen {2 * BATCH * steps:,} samples. To train it on: stages `unpack` and `scenes` into an empty folder,
then `unet`.
"""


def _control_of(pictures: np.ndarray, scenes: list[Scene]) -> dict[str, np.ndarray]:
    rendered = [render(what) for what in scenes]
    return control_fidelity(
        pictures, np.stack([r.edges for r in rendered]), np.stack([r.segmentation for r in rendered])
    )
