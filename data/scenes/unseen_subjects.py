"""Subjects that the built-in base has never seen: objects of its classes with a pattern in two colours.

A subject is a class, a pattern and two colours, a function of (seed, index); its pictures show it on other backgrounds,
at other places and turned otherwise. The base knows objects of one colour alone, so a picture that shows the pattern
was learned, and one of the class that shows it has drifted.

    controlbooth dreambooth subjects -o SUBJECTS
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import yaml

from controlbooth.data.files.whole import write_whole
from controlbooth.data.order.draws import hash64
from controlbooth.data.pictures.images import encode_png
from controlbooth.data.scenes.render import CLASSES, COLOURS, SUPERSAMPLING, Scene, SceneObject, render

PATTERNS = ("stripes", "checks", "dots", "halves", "rings")


@dataclass(frozen=True)
class PatternedSubject:
    class_name: str
    pattern: str
    colours: tuple[str, str]
    turn: float
    """Of the pattern against the object, in degrees."""

    @property
    def name(self) -> str:
        return f"{self.pattern}-{self.class_name}-{'-'.join(self.colours)}"


def patterned_subject(seed: int, index: int) -> PatternedSubject:
    """Draws the subject at a place of the endless sequence that `seed` names.

    Each block of len(CLASSES) subjects has every class once.
    """
    draw = np.random.Generator(np.random.Philox(key=[hash64(seed, "subject", index // len(CLASSES)), 0]))
    names = draw.permutation(list(CLASSES)).tolist()
    draw = np.random.Generator(np.random.Philox(key=[hash64(seed, "subject"), index]))
    first, second = draw.permutation(list(COLOURS))[:2].tolist()
    pattern = PATTERNS[int(draw.integers(len(PATTERNS)))]
    return PatternedSubject(names[index % len(CLASSES)], pattern, (first, second), float(draw.choice([0, 45, 90])))


def subject_picture(subject: PatternedSubject, seed: int, number: int, size: int = 64) -> np.ndarray:
    """Draws one picture of a subject, (size, size, 3) RGB uint8.

    The subject is alone and large, on one or two colours that it does not have itself.
    """
    draw = np.random.Generator(np.random.Philox(key=[hash64(seed, "picture", subject.name), number]))
    others = [name for name in draw.permutation(list(COLOURS)).tolist() if name not in subject.colours]
    background = tuple(others[: 2 if draw.random() < 0.4 else 1])
    radius = draw.uniform(0.30, 0.38)
    x, y = (draw.uniform(radius + 0.04, 0.96 - radius) for _ in range(2))
    thing = SceneObject(
        subject.class_name, subject.colours[0], "large", x, y, radius, draw.uniform(-20.0, 20.0), (0, 0, 0)
    )
    what = Scene((thing,), background, horizon=draw.uniform(0.4, 0.7), slope=draw.uniform(-0.12, 0.12))
    return _render(subject, what, size)


def _render(subject: PatternedSubject, what: Scene, size: int) -> np.ndarray:
    """Renders the scene in each of the two colours, and combines them by the pattern in the object's own frame.

    Returns (size, size, 3) RGB uint8.
    """
    side = size * SUPERSAMPLING
    thing = what.objects[0]
    first, second = (
        render(replace(what, objects=(replace(thing, colour=colour),)), side).image for colour in subject.colours
    )
    rows, columns = (np.indices((side, side)) + 0.5) / side
    angle = np.radians(thing.angle)
    across, down = (columns - thing.x) / thing.radius, (rows - thing.y) / thing.radius
    u, v = across * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - across * np.sin(angle)
    whole = np.where(_pattern(subject, u, v)[..., None], first, second)
    return cv2.resize(whole, (size, size), interpolation=cv2.INTER_AREA)


def _pattern(subject: PatternedSubject, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Tells where the first colour is, as bool. u, v: coordinates in the object's frame, which fills [-1, 1]."""
    turn = np.radians(subject.turn)
    a, b = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    if subject.pattern == "stripes":
        return np.floor(a / 0.4) % 2 == 0
    if subject.pattern == "checks":
        return (np.floor(a / 0.55) + np.floor(b / 0.55)) % 2 == 0
    if subject.pattern == "dots":
        return np.hypot((a + 0.3) % 0.6 - 0.3, (b + 0.3) % 0.6 - 0.3) > 0.2
    if subject.pattern == "halves":
        return a > 0
    return np.floor(np.hypot(a, b) / 0.33) % 2 == 0


def write_subjects(folder: Path, count: int, images: int, seed: int, size: int = 64) -> Path:
    """Writes folders of pictures and the manifest that `controlbooth dreambooth run` reads; returns its path."""
    rows = []
    for index in range(count):
        subject = patterned_subject(seed, index)
        where = folder / f"{index:02d}-{subject.name}"
        where.mkdir(parents=True, exist_ok=True)
        for number in range(images):
            write_whole(where / f"{number}.png", encode_png(subject_picture(subject, seed, number, size)))
        rows.append(dict(name=where.name, images=where.name, class_noun=subject.class_name))
    path = folder / "subjects.yaml"
    write_whole(path, yaml.safe_dump(rows, sort_keys=False).encode())
    return path


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth dreambooth subjects` is asked, and returns its exit status."""
    path = write_subjects(options.out, options.count, options.images, options.seed)
    print(f"{path}: {options.count} subjects with {options.images} pictures each")
    return 0
