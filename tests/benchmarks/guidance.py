"""Prints the numbers of each control schedule, and draws pictures with all of them, with and without a prompt.

    .venv/bin/python tests/benchmarks/guidance.py RUN [--samples 4] [--guidance 2] [-o guidance.png]

RUN: a run that was trained, such as runs/quickstart. Columns are schedules, for control of both branches of guidance
and of the conditional one alone; each condition has two rows, with its prompt and with none.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from controlbooth.data.shards.manifest import open_dataset
from controlbooth.models.control_schedules import SCHEDULES, weights_of
from controlbooth.models.pretrained import load_base, load_controlnet
from controlbooth.models.sampling import Control, sample
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import base_path
from controlbooth.trainer.evaluation.control import control_fidelity
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.evaluation.held_out import load_held_out
from controlbooth.trainer.run.checkpoint import complete_checkpoints

SD15 = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 4
FORMULAS = {
    "uniform": lambda i, h: 1.0,
    "resolution": lambda i, h: 64 / h,
    "resolution/8": lambda i, h: 64 / h / 8,
    "0.825": lambda i, h: 0.825 ** (12 - i),
    "logspace": lambda i, h: float(np.logspace(-1, 0, 13)[i]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("-o", "--out", type=Path, default=Path("guidance.png"))
    options = parser.parse_args()
    print("Stable Diffusion 1.5 at 512 px, 13 residuals from shallow to deep")
    for name in SCHEDULES:
        ours = weights_of(name, SD15)
        off = max(abs(mine - FORMULAS[name](i, h)) for i, (mine, h) in enumerate(zip(ours, SD15, strict=True)))
        print(f"  {name:13}", *(f"{weight:.3f}" for weight in ours), f" off the formula by at most {off:.0e}")

    checkpoint = complete_checkpoints(options.run)[-1]
    config = load_config(checkpoint / "config.yaml")
    held = load_held_out(
        open_dataset(str(config.data.held_out)), options.samples, config.data.condition, config.data.resolution
    )
    base = load_base(base_path(config), config.model.family)
    network: Any = load_controlnet(checkpoint / "controlnet", base.denoiser).eval()
    conditioning = torch.from_numpy(held.conditions).permute(0, 3, 1, 2).float() / 255.0
    columns: dict[str, np.ndarray] = {"condition": np.repeat(held.conditions, 2, axis=0)}
    print(f"\n{options.samples} held-out samples, guidance {options.guidance:g}: edge F1 with the prompt, without")
    ways = [(name, branches) for branches in ("both", "conditional") for name in SCHEDULES]
    for name, branches in tqdm(ways, desc="sample", unit="schedule"):
        made = []
        for prompts in (held.captions, [""] * options.samples):
            control = Control(network, conditioning, schedule=name, branches=branches)  # type: ignore[arg-type]
            pictures = sample(
                base,
                prompts,
                [control],
                seeds=range(options.samples),
                steps=options.steps,
                guidance_scale=options.guidance,
            )
            made.append(pictures.numpy())
        scores = [control_fidelity(pictures, held.edges, None).get("edge_f1", np.zeros(1)).mean() for pictures in made]
        tqdm.write(f"  {name:13} {branches:12} {scores[0]:.3f}  {scores[1]:.3f}")
        label = name if branches == "both" else f"{name}, cond"
        columns[label] = np.stack(made, axis=1).reshape(-1, *made[0].shape[1:])
    captions = [text for caption in held.captions for text in (caption, "no prompt")]
    draw_grid(options.out, columns, captions)
    print(f"pictures: {options.out}")


if __name__ == "__main__":
    main()
