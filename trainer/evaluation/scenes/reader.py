"""A small network that finds the depth, normals, classes and key points of scenes in pictures of 64 pixels.

It is trained on real scenes with exact conditions (`trainer/miniature/recipe.py`, stage `reader`) and measures how well
generated pictures follow such conditions. How well it reads real held-out scenes bounds what it can say; the base's
model card has the figures.
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.data.scenes.render import CLASSES, LANDMARK_COLOURS, draw_landmarks
from controlbooth.models.architectures import MINIATURE

WEIGHTS = MINIATURE / "reader.safetensors"
KINDS = ("depth", "normals", "segmentation", "keypoints")
SIDE = 64
LEAST_HEAT = 0.3
"""Of a key point, where 1 is the middle of a real one."""
WIDTHS = (16, 32, 64, 96)


class Reading(NamedTuple):
    """What the network finds in (B, 3, H, W) pictures in [-1, 1]."""

    depth: Tensor
    """(B, H, W), in units of 255."""
    normals: Tensor
    """(B, 3, H, W), not yet of unit length."""
    classes: Tensor
    """(B, 1 + classes, H, W) logits, the background first."""
    heat: Tensor
    """(B, 5, H, W), near 1 at key points and 0 elsewhere."""


class Reader(nn.Module):
    """Down to an 8th of the picture and up again, with skips between levels of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_block(inner, outer) for inner, outer in zip((3, *WIDTHS), WIDTHS, strict=False))
        self.up = nn.ModuleList(
            _block(deep + skip, skip) for deep, skip in zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(WIDTHS[0], 1 + 3 + 1 + len(CLASSES) + len(LANDMARK_COLOURS), 1)

    def forward(self, pixel_values: Tensor) -> Reading:
        skips, hidden = [], pixel_values
        for number, block in enumerate(self.down):
            hidden = block(F.max_pool2d(hidden, 2) if number else hidden)
            skips.append(hidden)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            hidden = block(torch.cat([F.interpolate(hidden, scale_factor=2.0), skip], dim=1))
        depth, normals, classes, heat = self.head(hidden).split([1, 3, 1 + len(CLASSES), len(LANDMARK_COLOURS)], dim=1)
        return Reading(depth[:, 0], normals, classes, heat)


def _block(inner: int, outer: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inner, outer):
        layers += [nn.Conv2d(width, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers)


def load_reader(path: Path = WEIGHTS) -> Reader:
    network = Reader()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def read(network: Reader, kind: str, images: np.ndarray) -> np.ndarray:
    """Finds the condition pictures of a kind in pictures, in the format of `data.scenes.Rendering`.

    images: (B, 64, 64, 3) uint8 -> (B, 64, 64), and (B, 64, 64, 3) for normals and keypoints, uint8. Raises UserError
    for pictures of another shape.
    """
    if images.shape[1:] != (SIDE, SIDE, 3):
        raise UserError(f"the reader reads pictures of {SIDE} x {SIDE} x 3, and these are {images.shape[1:]}")
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    reading = network(pixels)
    if kind == "depth":
        return (reading.depth * 255.0).round().clamp(0, 255).byte().numpy()
    if kind == "normals":
        unit = F.normalize(reading.normals, dim=1)
        return ((unit + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    if kind == "segmentation":
        return reading.classes.argmax(dim=1).byte().numpy()
    return np.stack([draw_landmarks(peaks(one), SIDE) for one in reading.heat.numpy()])


def peaks(heat: np.ndarray) -> list[np.ndarray]:
    """Finds key points in maps of heat, (5, H, W): for each kind (n, 2) float32 x, y of its local maxima.

    n is at most 2, one for each of two objects; maxima below LEAST_HEAT do not count.
    """
    found = []
    for one in heat:
        summit = (one == cv2.dilate(one, np.ones((7, 7), np.uint8))) & (one >= LEAST_HEAT)
        rows, columns = np.nonzero(summit)
        strongest = np.argsort(-one[rows, columns])[:2]
        found.append(np.column_stack([columns, rows])[strongest].astype(np.float32))
    return found
