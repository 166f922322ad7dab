"""The embedded world: captioned scenes with exact condition images, each a function of (seed, index).

A scene holds one or two objects of eight classes in named colours and two sizes, on a plain or a two-tone background.
`scene(seed, index)` draws what is in it, `render(scene, size)` draws its picture and its edges, segmentation, depth,
normals and key points. Nothing is stored, so a million pairs cost nothing until they are asked for, and a held-out set
is another seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from controlbooth.data.errors import UserError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 40, 36),
    "orange": (244, 140, 24),
    "yellow": (248, 224, 56),
    "green": (48, 160, 64),
    "teal": (28, 168, 172),
    "blue": (40, 80, 208),
    "purple": (128, 56, 176),
    "pink": (248, 148, 188),
    "brown": (124, 76, 40),
    "white": (244, 244, 244),
    "gray": (132, 136, 140),
    "black": (28, 28, 32),
}
SIZES = ("small", "large")
SUPERSAMPLING = 3
HELD_OUT_SEED = 1_000_003
"""Training scenes use any other seed, so the scenes of this one were never seen by a model of this project."""


@dataclass(frozen=True)
class Part:
    """One outline of an object in its own frame: polygon (P, 2) in [-1, 1], y downwards, and a factor on its colour."""

    polygon: np.ndarray
    shade: float = 1.0


@dataclass(frozen=True)
class SceneObject:
    class_name: str
    colour: str
    size: str
    x: float
    """Centre, as a share of the picture's width from the left."""
    y: float
    """Centre, as a share of the picture's height from the top."""
    radius: float
    """Half of the object's extent, as a share of the picture's side."""
    angle: float
    """Rotation in degrees, clockwise."""
    tint: tuple[int, int, int]
    """A small offset on the named colour, in levels of 255."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Objects stand from left to right, in the order in which the caption names them."""

    objects: tuple[SceneObject, ...]
    background: tuple[str, ...]
    """One colour, or the upper and the lower one."""
    horizon: float
    """Height of the line between two background colours, as a share from the top."""
    slope: float
    """Rise of that line over the picture's width, as a share of the side."""

    @property
    def caption(self) -> str:
        named = [f"a {thing.size} {thing.colour} {thing.class_name}" for thing in self.objects]
        return f"{' and '.join(named)} on a {' and '.join(self.background)} background"


@dataclass(frozen=True)
class Rendering:
    """A scene in pixels; every array is (H, W) or (H, W, 3) uint8."""

    image: np.ndarray
    """(H, W, 3) RGB."""
    edges: np.ndarray
    """(H, W), 255 where a part, an object or a background colour begins, else 0: one pixel wide, without noise."""
    segmentation: np.ndarray
    """(H, W), 0 for background, else 1 + the index of the object's class in CLASSES."""
    instances: np.ndarray
    """(H, W), 0 for background, else 1 + the object's place in the caption."""
    depth: np.ndarray
    """(H, W), inverse depth as monocular estimators give it: 255 is nearest."""
    normals: np.ndarray
    """(H, W, 3), the unit normal (right, up, towards the viewer) as (n + 1) / 2 * 255."""
    keypoints: np.ndarray
    """(H, W, 3) RGB, each object's landmarks as coloured dots joined to its centre by lines, on black."""
    landmarks: tuple[np.ndarray, ...]
    """For each object (5, 2) float32 x, y in pixels: its centre, then its top, right, bottom and left in its own
    frame."""


def _regular(count: int, radius: float = 1.0, start: float = -90.0) -> np.ndarray:
    angles = np.radians(start + 360.0 * np.arange(count) / count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius


def _ellipse(x: float, y: float, width: float, height: float, count: int = 40) -> np.ndarray:
    return _regular(count) * (width, height) + (x, y)


def _ball() -> list[Part]:
    return [Part(_regular(48, 0.95))]


def _box() -> list[Part]:
    square = np.array([[-0.82, -0.82], [0.82, -0.82], [0.82, 0.82], [-0.82, 0.82]])
    return [Part(square)]


def _star() -> list[Part]:
    tips, notches = _regular(5, 1.05), _regular(5, 0.45, start=-54.0)
    return [Part(np.stack([tips, notches], axis=1).reshape(-1, 2))]


def _heart() -> list[Part]:
    t = np.linspace(0.0, 2.0 * math.pi, 60, endpoint=False)
    x = 16.0 * np.sin(t) ** 3
    y = 13.0 * np.cos(t) - 5.0 * np.cos(2 * t) - 2.0 * np.cos(3 * t) - np.cos(4 * t)
    return [Part(np.stack([x / 16.5, -(y + 2.5) / 15.5], axis=1))]


def _moon() -> list[Part]:
    outer = np.radians(np.linspace(52.0, 308.0, 40))
    inner = np.radians(np.linspace(283.0, 77.0, 30))
    rim = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    bite = np.stack([0.52 + 0.72 * np.cos(inner), 0.84 * np.sin(inner)], axis=1)
    return [Part(np.concatenate([rim, bite]) + (0.15, 0.0))]


def _fish() -> list[Part]:
    tail = np.array([[0.30, 0.0], [1.0, -0.55], [0.86, 0.0], [1.0, 0.55]])
    return [
        Part(tail, 0.85),
        Part(_ellipse(-0.25, 0.0, 0.75, 0.52)),
        Part(_ellipse(-0.62, -0.12, 0.09, 0.09, 12), 0.25),
    ]


def _house() -> list[Part]:
    body = np.array([[-0.68, -0.12], [0.68, -0.12], [0.68, 0.92], [-0.68, 0.92]])
    roof = np.array([[-0.98, -0.12], [0.0, -0.98], [0.98, -0.12]])
    door = np.array([[-0.2, 0.34], [0.2, 0.34], [0.2, 0.92], [-0.2, 0.92]])
    return [Part(body), Part(roof, 0.7), Part(door, 0.45)]


def _mug() -> list[Part]:
    outer = _ellipse(0.42, 0.02, 0.56, 0.52)
    inner = _ellipse(0.42, 0.02, 0.32, 0.29)
    handle = np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])  # a ring, as one outline with a seam
    body = np.array([[-0.86, -0.85], [0.46, -0.85], [0.40, 0.85], [-0.80, 0.85]])
    return [Part(handle, 0.85), Part(body)]


CLASSES: dict[str, Callable[[], list[Part]]] = {
    "ball": _ball,
    "box": _box,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "fish": _fish,
    "house": _house,
    "mug": _mug,
}
_PARTS = {name: build() for name, build in CLASSES.items()}
_LANDMARKS = np.array([[0.0, 0.0], [0.0, -0.9], [0.9, 0.0], [0.0, 0.9], [-0.9, 0.0]])
LANDMARK_COLOURS = ((255, 255, 255), (255, 64, 64), (64, 255, 64), (64, 128, 255), (255, 224, 32))
_LIGHT = np.array([-0.45, 0.55, 0.70], dtype=np.float32)


def _generator(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, index]))


def scene(seed: int, index: int, two_objects_rate: float = 0.4, two_tone_rate: float = 0.4) -> Scene:
    """Draws at random what is in the scene at a place of the endless sequence that `seed` names.

    seed: any integer. index: >= 0, else ValueError. The two rates are probabilities in [0, 1]. Equal arguments give
    equal scenes on every machine.
    """
    if index < 0:
        raise UserError(f"scene index {index} is negative; scenes are numbered from 0")
    draw = _generator(seed, index)
    names = list(COLOURS)
    two_tone = draw.random() < two_tone_rate
    colours = [names[i] for i in draw.permutation(len(names))]
    background = tuple(colours.pop() for _ in range(2 if two_tone else 1))
    count = 2 if draw.random() < two_objects_rate else 1
    objects = []
    for place in range(count):
        size = SIZES[int(draw.integers(2))]
        large = size == "large"
        if count == 1:
            radius = draw.uniform(0.32, 0.38) if large else draw.uniform(0.21, 0.26)
            x, y = (draw.uniform(radius + 0.04, 0.96 - radius) for _ in range(2))
        else:
            radius = draw.uniform(0.19, 0.22) if large else draw.uniform(0.135, 0.165)
            x = draw.uniform(radius + 0.03, 0.49 - radius) + 0.49 * place
            y = draw.uniform(radius + 0.04, 0.96 - radius)
        red, green, blue = draw.integers(-6, 7, size=3).tolist()
        tint = (red, green, blue)
        class_name = list(CLASSES)[int(draw.integers(len(CLASSES)))]
        colour = colours.pop()
        objects.append(SceneObject(class_name, colour, size, x, y, radius, draw.uniform(-20.0, 20.0), tint))
    return Scene(tuple(objects), background, horizon=draw.uniform(0.4, 0.7), slope=draw.uniform(-0.12, 0.12))


def _place(points: np.ndarray, thing: SceneObject, side: int) -> np.ndarray:
    """Maps points (P, 2) in the object's frame to (P, 2) pixels of a picture with this side."""
    angle = math.radians(thing.angle)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return (points @ rotation.T * thing.radius + (thing.x, thing.y)) * side


def _fill(pixels: np.ndarray, polygon: np.ndarray, value: int) -> None:
    cv2.fillPoly(pixels, [np.round(polygon * 16).astype(np.int32)], value, shift=4)


def _colour(name: str, shade: float = 1.0, tint: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    return np.clip((np.array(COLOURS[name], np.float32) + tint) * shade, 0, 255)


def render(what: Scene, size: int = 64) -> Rendering:
    """Draws a scene as a square picture of `size` pixels and its condition images, all exactly aligned."""
    side = size * SUPERSAMPLING
    shape = (side, side)
    parts = np.zeros(shape, np.uint8)  # a number for every region whose border is an edge
    owner = [0, 0]  # for each part: 0 for background, else 1 + the object's place
    colours = [_colour(what.background[0]), _colour(what.background[-1])]
    light = np.ones(shape, np.float32)
    depth = np.full(shape, 40.0, np.float32)
    normals = np.zeros((side, side, 3), np.float32)
    normals[..., 2] = 1.0
    if len(what.background) == 2:
        across = np.linspace(-0.5, 0.5, side)[None, :]
        rows = np.arange(side)[:, None] / side
        line = what.horizon + what.slope * across
        floor = rows > line
        parts[floor] = 1
        depth[floor] = (40.0 + 80.0 * (rows - line) / (1.0 - line))[floor]  # the floor comes nearer downwards
        cv2.copyTo(np.full_like(normals, (0.0, 0.894, 0.447)), parts, normals)

    names = list(CLASSES)
    for place, thing in enumerate(what.objects):
        outline = np.zeros(shape, np.uint8)
        for part in _PARTS[thing.class_name]:
            polygon = _place(part.polygon, thing, side)
            _fill(parts, polygon, len(owner))
            _fill(outline, polygon, 1)
            owner.append(place + 1)
            colours.append(_colour(thing.colour, part.shade, thing.tint))
        box = _bounding_box(outline)
        inside = outline[box]
        height, tilt = _inflate(inside, thing.radius * side)
        cv2.copyTo(150.0 + 90.0 * height, inside, depth[box])
        cv2.copyTo(tilt, inside, normals[box])
        cv2.copyTo(0.80 + 0.28 * np.clip(tilt @ _LIGHT, 0.0, 1.0), inside, light[box])
    image = np.take(np.array(colours, np.float32), parts, axis=0)
    image *= light[..., None]

    small = (size, size)
    ids = _majority(parts, len(owner), size)
    instances = np.array(owner, np.uint8)[ids]  # of one map, so that edges, instances and classes never disagree
    classes = np.array([0, *(names.index(thing.class_name) + 1 for thing in what.objects)], np.uint8)
    return Rendering(
        image=np.clip(cv2.resize(image, small, interpolation=cv2.INTER_AREA), 0, 255).round().astype(np.uint8),
        edges=boundaries(ids),
        segmentation=classes[instances],
        instances=instances,
        depth=cv2.resize(depth, small, interpolation=cv2.INTER_AREA).round().astype(np.uint8),
        normals=_encode_normals(cv2.resize(normals, small, interpolation=cv2.INTER_AREA)),
        keypoints=_draw_keypoints(what, size),
        landmarks=tuple(_place(_LANDMARKS, thing, size).astype(np.float32) for thing in what.objects),
    )


def _bounding_box(mask: np.ndarray, margin: int = 2) -> tuple[slice, slice]:
    """Returns the rows and columns of a mask that hold something, with a margin in pixels around them."""
    left, top, width, height = cv2.boundingRect(mask)
    return (
        slice(max(0, top - margin), top + height + margin),
        slice(max(0, left - margin), left + width + margin),
    )


def _inflate(outline: np.ndarray, radius_pixels: float) -> tuple[np.ndarray, np.ndarray]:
    """Makes a pillow over a silhouette: heights (H, W) in [0, 1] and unit normals (H, W, 3)."""
    distance = cv2.distanceTransform(outline, cv2.DIST_L2, 3) / (0.6 * radius_pixels)
    height = np.sqrt(1.0 - (1.0 - np.clip(distance, 0.0, 1.0)) ** 2)
    height = cv2.GaussianBlur(height, (0, 0), radius_pixels * 0.08)
    slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3) / 8.0 * 0.6 * radius_pixels
    slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3) / 8.0 * 0.6 * radius_pixels
    normals = np.stack([-slope_x, slope_y, np.ones_like(height)], axis=2)
    return height, normals / np.sqrt(slope_x**2 + slope_y**2 + 1.0)[..., None]


def _majority(labels: np.ndarray, count: int, size: int) -> np.ndarray:
    """Finds the most frequent label, 0 .. count - 1, in each cell of the supersampled picture: (size, size) uint8.

    labels: (size * SUPERSAMPLING, size * SUPERSAMPLING) uint8.
    """
    masks = (cv2.inRange(labels, label, label) for label in range(count))
    shares = [cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA) for mask in masks]
    return np.argmax(np.stack(shares), axis=0).astype(np.uint8)


def boundaries(labels: np.ndarray) -> np.ndarray:
    """Marks the boundaries of labels, (H, W) integers, in (H, W) uint8.

    A pixel is 255 where its label differs from the one to the left or above, else 0.
    """
    edges = np.zeros(labels.shape, np.uint8)
    edges[:, 1:][labels[:, 1:] != labels[:, :-1]] = 255
    edges[1:, :][labels[1:, :] != labels[:-1, :]] = 255
    return edges


def _encode_normals(normals: np.ndarray) -> np.ndarray:
    unit = normals / np.linalg.norm(normals, axis=2, keepdims=True)
    return ((unit + 1.0) * 127.5).round().astype(np.uint8)


def _draw_keypoints(what: Scene, size: int) -> np.ndarray:
    canvas = np.zeros((size, size, 3), np.uint8)
    for thing in what.objects:
        points = np.round(_place(_LANDMARKS, thing, size)).astype(int)
        for point in points[1:]:
            cv2.line(canvas, points[0].tolist(), point.tolist(), (110, 110, 110), max(1, size // 96))
        _draw_dots(canvas, [point[None] for point in points])
    return canvas


def draw_landmarks(points: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Draws the dots of `Rendering.keypoints` without the lines: (size, size, 3) uint8.

    points: for each kind of landmark (n, 2) x, y in pixels.
    """
    canvas = np.zeros((size, size, 3), np.uint8)
    _draw_dots(canvas, [np.round(one).astype(int) for one in points])
    return canvas


def _draw_dots(canvas: np.ndarray, points: Sequence[np.ndarray]) -> None:
    for own, colour in zip(points, LANDMARK_COLOURS, strict=True):
        for point in own:
            cv2.circle(canvas, point.tolist(), max(1, len(canvas) // 42), colour, -1)
