"""Trains the networks that read scenes: the judge of attributes and the reader of conditions."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from controlbooth.data.processes.parent import end_with_parent
from controlbooth.data.scenes.render import HELD_OUT_SEED, LANDMARK_COLOURS, render, scene
from controlbooth.models.files.weights import save_weights
from controlbooth.trainer.evaluation.kinds import agreement
from controlbooth.trainer.evaluation.scenes.judge import Judge, facts, prompt_accuracy, read, split
from controlbooth.trainer.evaluation.scenes.reader import KINDS, Reader, Reading, load_reader
from controlbooth.trainer.evaluation.scenes.reader import read as read_condition
from controlbooth.trainer.miniature.pictures import SIZE, pictures, to_tensor
from controlbooth.trainer.miniature.training import Clock, mixed_precision, set_learning_rate


def train_judge(work: Path, minutes: float) -> None:
    torch.manual_seed(0)
    images = pictures(work)
    truth = torch.tensor([facts(scene(0, i)) for i in range(len(images))])
    judge: Any = Judge()
    judge.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    draw = np.random.default_rng(0)
    clock, step = Clock(minutes), 0
    while clock.share < 1.0:
        rows = draw.choice(len(images) - 1024, 128, replace=False)
        x = spoil(to_tensor(images[rows]))
        set_learning_rate(optimizer, 2e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2.0 * (1.0 - clock.share) + 0.01))
        with mixed_precision():
            logits = split(judge(x).float())
        loss = torch.stack([F.cross_entropy(one, truth[rows, i]) for i, one in enumerate(logits)]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if clock.due():
            print(f"judge step {step} loss {loss.item():.4f}", flush=True)
    judge.eval()
    held_out = [scene(HELD_OUT_SEED, i) for i in range(1024)]
    seen = read(judge, np.stack([render(what).image for what in held_out]))
    print("real held-out scenes:", {k: round(v, 4) for k, v in prompt_accuracy(seen, held_out).items()})
    save_weights({k: v.half() for k, v in judge.state_dict().items()}, work / "judge.safetensors")


def train_reader(work: Path, minutes: float) -> None:
    """Trains the reader on scenes of another seed than the judge's, drawn anew here together with their conditions.

    It takes a GPU where there is one: it needs some 20,000 steps, half an hour on two cores.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, batch = 16_384, 32
    with ProcessPoolExecutor(initializer=end_with_parent) as processes:
        drawn = list(tqdm(processes.map(_conditions, range(count), chunksize=64), total=count, unit="scene"))
    truth = {name: torch.from_numpy(np.stack([one[name] for one in drawn])).to(device) for name in drawn[0]}
    network: Any = Reader()
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    draw = np.random.default_rng(0)
    clock, step = Clock(minutes), 0
    while clock.share < 1.0:
        rows = torch.from_numpy(draw.choice(count, batch, replace=False)).to(device)
        own = {name: values[rows] for name, values in truth.items()}
        set_learning_rate(optimizer, 2e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2.0 * (1.0 - clock.share) + 0.01))
        pixels = own["image"].permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with mixed_precision(device):
            reading = Reading(*(one.float() for one in network(spoil(pixels))))
        normals = own["normals"].permute(0, 3, 1, 2).float() / 127.5 - 1.0
        heat = own["heat"].float() / 255.0
        loss = (
            F.l1_loss(reading.depth, own["depth"].float() / 255.0)
            + (reading.normals - normals).square().mean()
            + 0.2 * F.cross_entropy(reading.classes, own["segmentation"].long())
            # key points are two in a thousand pixels: unweighted, to find none is nearly right
            + 20.0 * ((1.0 + 10.0 * heat) * (reading.heat - heat).square()).mean()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if clock.due():
            print(f"reader step {step} loss {loss.item():.4f}", flush=True)
    print(f"reader: {step} steps of {batch} scenes")
    network.eval()
    save_weights({k: v.half() for k, v in network.state_dict().items()}, work / "reader.safetensors")
    for name, value in reading_real(load_reader(work / "reader.safetensors")).items():
        print(f"  {name:<32}{value:.3f}")


def _conditions(index: int) -> dict[str, np.ndarray]:
    """Draws a scene's picture and what the reader is to find in it. The heat of each key point is 255 at the point and
    falls off around it as a Gaussian of 1.5 pixels."""
    drawn = render(scene(1, index), SIZE)
    heat = np.zeros((len(LANDMARK_COLOURS), SIZE, SIZE), np.float32)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for points in drawn.landmarks:
        for own, (x, y) in zip(heat, points, strict=True):
            np.maximum(own, np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 4.5), out=own)
    names = ("image", "depth", "normals", "segmentation")
    return {name: getattr(drawn, name) for name in names} | {"heat": np.round(heat * 255).astype(np.uint8)}


def reading_real(reader: Reader, count: int = 256) -> dict[str, float]:
    """Measures how well the reader reads real held-out scenes, which bounds the figures for generated ones."""
    drawn = [render(scene(HELD_OUT_SEED, i), SIZE) for i in range(count)]
    images = np.stack([one.image for one in drawn])
    figures: dict[str, list[float]] = {}
    for kind in KINDS:
        for found, one in zip(read_condition(reader, kind, images), drawn, strict=True):
            for name, value in agreement(kind, found, getattr(one, kind)).items():
                figures.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in figures.items()}


def spoil(x: Tensor) -> Tensor:
    """Adds blur and noise of random strength, so that the judge is not confused by the flaws of generated pictures."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(x.shape[0], 1, 1, 1, device=x.device)
    noise = torch.randn_like(x) * torch.rand(x.shape[0], 1, 1, 1, device=x.device) * 0.12
    return (x + share * (blurred - x) + noise).contiguous(memory_format=torch.channels_last)
