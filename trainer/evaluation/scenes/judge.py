"""A small network that reads scenes: which classes, colours and sizes stand from left to right, on what background.

It is trained on real scenes (`trainer/miniature/recipe.py`, stage `judge`) and only ever used to say whether a
generated picture obeys its caption. Its accuracy on real held-out scenes bounds what it can say and is written into the
base's model card.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.data.scenes.render import CLASSES, COLOURS, SIZES, Scene
from controlbooth.models.architectures import MINIATURE

WEIGHTS = MINIATURE / "judge.safetensors"
NONE = "none"
_OBJECT = {"size": (*SIZES, NONE), "colour": (*COLOURS, NONE), "class": (*CLASSES, NONE)}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    **{f"{which}_{name}": values for which in ("left", "right") for name, values in _OBJECT.items()},
    "background": (*COLOURS, NONE),
    "lower_background": (*COLOURS, NONE),
}
"""What is read, and the values it can have. A single object is the left one; NONE is what is not there."""


def facts(scene: Scene) -> list[int]:
    """Lists the values of a scene: one index into ATTRIBUTES[name] for each name, in order."""
    values = []
    for place in range(2):
        thing = scene.objects[place] if place < len(scene.objects) else None
        values += [thing.size, thing.colour, thing.class_name] if thing else [NONE] * 3
    values += [scene.background[0], scene.background[1] if len(scene.background) == 2 else NONE]
    return [ATTRIBUTES[name].index(value) for name, value in zip(ATTRIBUTES, values, strict=True)]


class Judge(nn.Module):
    """(B, 3, 64, 64) float32 in [-1, 1] -> logits (B, sum of the attributes' value counts)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        blocks: list[nn.Module] = []
        for inner, outer in zip(widths, widths[1:], strict=False):
            blocks += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
            blocks += [nn.Conv2d(outer, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
        self.features = nn.Sequential(*blocks)  # (B, 128, 4, 4)
        self.head = nn.Sequential(
            nn.Linear(128 * 16, 256), nn.ReLU(), nn.Linear(256, sum(map(len, ATTRIBUTES.values())))
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.features(pixel_values).flatten(1))


def split(logits: Tensor) -> list[Tensor]:
    """Splits logits by attribute: (B, sum) -> for each attribute (B, number of its values)."""
    return list(logits.split([len(values) for values in ATTRIBUTES.values()], dim=1))


def load_judge(path: Path = WEIGHTS) -> Judge:
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.eval().requires_grad_(False)


@torch.inference_mode()
def read(judge: Judge, images: np.ndarray) -> np.ndarray:
    """Reads scenes in pictures: (B, 64, 64, 3) uint8 -> (B, 8) int64, an index into the values of each attribute.

    Raises UserError for pictures of another shape.
    """
    if images.shape[1:] != (64, 64, 3):
        raise UserError(f"the judge reads pictures of 64 x 64 x 3, and these are {images.shape[1:]}")
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return torch.stack([one.argmax(dim=1) for one in split(judge(pixels))], dim=1).numpy()


def prompt_accuracy(seen: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Computes which shares of what captions ask for the pictures show, by name. seen: (B, 8), as `read` returns it.

    object_class, object_colour and object_size are over all objects, the others over pictures.
    """
    objects = [len(scene.objects) for scene in scenes]
    return {
        name: float(np.average(shares, weights=objects if name.startswith("object_") else None))
        for name, shares in prompt_accuracy_by_picture(seen, scenes).items()
    }


def prompt_accuracy_by_picture(seen: np.ndarray, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Computes what each picture shows of its caption: name -> (B,) float64 in [0, 1].

    seen: (B, 8), as `read` returns it. object_class, object_colour and object_size are shares of the picture's objects;
    background asks for every colour of it; count is whether one or two objects are there.
    """
    truth = np.array([facts(scene) for scene in scenes])
    hit = seen == truth
    names = list(ATTRIBUTES)
    there = np.array([[True, len(scene.objects) == 2] for scene in scenes])
    result = {}
    for name in ("class", "colour", "size"):
        columns = [names.index(f"{which}_{name}") for which in ("left", "right")]
        result[f"object_{name}"] = (hit[:, columns] & there).sum(axis=1) / there.sum(axis=1)
    result["background"] = hit[:, [names.index("background"), names.index("lower_background")]].all(axis=1) * 1.0
    right = names.index("right_class")
    none = ATTRIBUTES["right_class"].index(NONE)
    result["count"] = ((seen[:, right] == none) == (truth[:, right] == none)) * 1.0
    return result
