"""Scenes as the recipe trains on them, rendered by several processes."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from controlbooth.data.files.whole import replaced
from controlbooth.data.processes.parent import end_with_parent
from controlbooth.data.scenes.render import render, scene

SIZE = 64


def _picture(index: int) -> np.ndarray:
    return render(scene(0, index), SIZE).image


def draw_scenes(work: Path, count: int) -> None:
    with replaced(work / "images.npy") as temporary, ProcessPoolExecutor(initializer=end_with_parent) as processes:
        images = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, SIZE, SIZE, 3))
        drawn = processes.map(_picture, range(count), chunksize=64)
        for i, image in enumerate(tqdm(drawn, total=count, unit="scene")):
            images[i] = image
        images.flush()


def pictures(work: Path) -> np.ndarray:
    return np.load(work / "images.npy")  # whole: random rows of a mapped file wait for the disk


def to_tensor(images: np.ndarray) -> Tensor:
    """Converts pictures: (B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
