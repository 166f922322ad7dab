"""Prints how exact batched subjects are: together and alone, one subject changed, killed, and read by diffusers.

    .venv/bin/python tests/benchmarks/subjects_exactness.py [--subjects 12] [--steps 50] [--seed 0]

Subjects are scenes that the built-in base draws; all runs are those of `controlbooth dreambooth run`, in fp32. About
ten minutes on 2 cores.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline

sys.path += [str(Path(__file__).parents[1] / name) for name in ("support", "distributed")]

import test_dreambooth as runs

from controlbooth.data.scenes import render
from controlbooth.models.lora import ATTENTION, attach_adapters, load_subject
from controlbooth.models.pretrained import load_base
from controlbooth.models.sampling import initial_noise, sample
from controlbooth.trainer.config.run import base_folder

WORDS = [*render.COLOURS, "small", "large"]
"""Words of the built-in vocabulary, one for each subject."""
TOGETHER, RANK, LEARNING_RATE, KILLS = 6, 4, 1e-3, 2


def write_subjects(folder: Path, count: int) -> None:
    """Three scenes for each; `other-pictures.yaml` has another picture of the first subject."""
    rows = []
    for number in range(count):
        where = folder / "pictures" / f"subject-{number:02d}"
        where.mkdir(parents=True)
        for shot in range(3):
            write_scene(where / f"{shot}.png", number, shot)
        rows.append(dict(name=where.name, images=str(where), class_noun="star", identifier=WORDS[number]))
    (folder / "subjects.yaml").write_text(yaml.safe_dump(rows))
    other = folder / "pictures" / "other"
    other.mkdir()
    for shot in range(3):
        write_scene(other / f"{shot}.png", 99, shot)
    (folder / "other-pictures.yaml").write_text(yaml.safe_dump([rows[0] | {"images": str(other)}, *rows[1:]]))


def write_scene(path: Path, number: int, shot: int) -> None:
    cv2.imwrite(str(path), render.render(render.scene(70 + number, shot), 64).image[..., ::-1])


def run_file(folder: Path, name: str, steps: int, together: int) -> Path:
    tree = dict(
        name=name, output=str(folder / "runs"), model=dict(base="miniature", attention="math"), precision="fp32",
        resolution=64, subjects_per_batch=together, steps=steps, learning_rate=LEARNING_RATE, adapter=dict(rank=RANK),
        checkpoint_every_steps=10, prior=dict(images=4, sampling_steps=4),
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def largest(folder: Path, run: str, other: str, names: list[str]) -> float:
    return max(runs.difference(runs.weights(folder, run, name), runs.weights(folder, other, name)) for name in names)


def kill_at_random(folder: Path, path: Path, chosen: random.Random, seconds: float, subjects: int) -> None:
    """Kills a run some time after its state was written; `seconds` are those of an undisturbed one."""
    state = folder / "runs" / path.stem / "state" / "of-1" / "rank-0.safetensors"
    process = runs.start(folder, path)
    before = state.stat().st_mtime_ns if state.exists() else 0
    while not state.exists() or state.stat().st_mtime_ns == before:
        if process.poll() is not None:
            raise SystemExit(f"the run has ended by itself:\n{process.communicate()[0][-2000:]}")
        time.sleep(0.005)
    time.sleep(chosen.uniform(0.0, seconds / (KILLS + 2)))
    runs.kill(process)
    told = runs.states(folder, path.stem).values()
    done, begun = (sum(one["state"] == what for one in told) for what in ("finished", "training"))
    print(f"  SIGKILL with {done} of {subjects} subjects finished and {begun} in training")


def diffusers_difference(folder: Path, run: str, name: str, steps: int) -> int:
    """Largest difference of a value of 0 .. 255 between our picture of a subject and diffusers' own."""
    prompt, guidance = f"a {WORDS[0]} star", 3.0
    ours = load_base(base_folder("miniature"), "auto", torch.float32, torch.device("cpu"))
    saved = {k.removeprefix("unet."): torch.from_numpy(v) for k, v in runs.weights(folder, run, name).items()}
    plain = sample(ours, [prompt], seeds=[3], steps=steps, guidance_scale=guidance)
    load_subject(attach_adapters(ours.unet, ATTENTION, 1, RANK), 0, saved)
    made = sample(ours, [prompt], seeds=[3], steps=steps, guidance_scale=guidance)
    pipeline = StableDiffusionPipeline.from_pretrained(base_folder("miniature"), safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(folder / "runs" / run / "subjects" / name)
    theirs = pipeline(
        prompt, num_inference_steps=steps, guidance_scale=guidance, output_type="np",
        latents=initial_noise(ours, [3], 64, 64),
    ).images  # fmt: skip
    changed = np.abs(made.numpy().astype(int) - plain.numpy()).max()
    print(f"  the adapter changes the base's picture by up to {changed} of 255")
    return int(np.abs(np.round(theirs * 255) - made.numpy()).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=12, help=f"at most {len(WORDS)} (default: 12)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_subjects(folder, options.subjects)
        names = [f"subject-{number:02d}" for number in range(options.subjects)]
        print(f"{options.subjects} subjects, {options.steps} steps, rank {RANK}, learning rate {LEARNING_RATE:g}, fp32")
        began = time.monotonic()
        runs.finish(runs.start(folder, run_file(folder, "together", options.steps, TOGETHER)))
        seconds = time.monotonic() - began
        runs.finish(runs.start(folder, run_file(folder, "alone", options.steps, 1)))
        weights = runs.weights(folder, "alone", names[0])
        size = max(float(np.abs(value).max()) for key, value in weights.items() if "lora_B" in key)
        print(f"{TOGETHER} in a batch against one after another (weights of B reach {size:.1e})")
        print(f"  weights differ by at most {largest(folder, 'together', 'alone', names):.1e}")
        changed = run_file(folder, "changed", options.steps, TOGETHER)
        runs.finish(runs.start(folder, changed, subjects="other-pictures.yaml"))
        print(f"other pictures of {names[0]}")
        print(f"  its weights change by {largest(folder, 'changed', 'together', names[:1]):.1e}")
        print(f"  those of the other {len(names) - 1} by {largest(folder, 'changed', 'together', names[1:]):.1e}")
        print("killed and started again, against the undisturbed run")
        path, chosen = run_file(folder, "killed", options.steps, TOGETHER), random.Random(options.seed)
        for _ in range(KILLS):
            kill_at_random(folder, path, chosen, seconds, options.subjects)
        runs.finish(runs.start(folder, path))
        told = runs.states(folder, "killed")
        finished = sum(one["state"] == "finished" and one["step"] == options.steps for one in told.values())
        print(f"  {finished} of {len(names)} finished, each after {options.steps} steps")
        print(f"  weights differ by {largest(folder, 'killed', 'together', names):.1e}")
        print("a subject's file in diffusers' StableDiffusionPipeline.load_lora_weights, 20 steps of DDIM")
        levels = diffusers_difference(folder, "together", names[0], 20)
        print(f"  its picture differs from ours by at most {levels} of 255")


if __name__ == "__main__":
    main()
