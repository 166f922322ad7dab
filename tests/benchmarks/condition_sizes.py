"""Prints what becomes of lines and labels that are read at another size than they were packed at, before and now.

    .venv/bin/python tests/benchmarks/condition_sizes.py [PICTURES] [--count 48]

Lines: Canny edges of pictures whose shorter side has 300 or 512 pixels, read at 256, 128 and 64. "area" is the mean
over the pixels that fall together, as all conditions were resized before; "now" is `data.pictures.resize`. Told are the
share of pixels above 0 and their mean level, F1 (within one pixel, as it is and corrected for chance as in validations)
against Canny edges of the picture at the size at which it is read, as `computed:canny` finds them, the share of the
lines' length that has run into other lines, and the time. Labels: maps of 30 regions, read at the same sizes; told is
the share of pixels that have no label.

PICTURES: a folder of photographs; without it, only drawings are measured: scenes with texture and bricks.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import record

from controlbooth.data.conditions.functions import canny
from controlbooth.data.conditions.sizes import lines_at
from controlbooth.data.packing.sources import IMAGE_SUFFIXES
from controlbooth.data.pictures.images import scaled_size, to_rgb
from controlbooth.data.pictures.resize import resize, values_of
from controlbooth.data.scenes.render import render, scene
from controlbooth.trainer.evaluation.control import edge_f1

PACKED, READ = (512, 300), (256, 128, 64)
NEAR = np.ones((3, 3), np.uint8)


def drawing(number: int) -> np.ndarray:
    """(1024, 1024, 3) uint8: a scene, every second one before a wall of bricks."""
    picture = cv2.resize(render(scene(7, number), 256).image, (1024, 1024), interpolation=cv2.INTER_CUBIC)
    if number % 2:
        colours = np.random.default_rng(number).integers(90, 170, (43, 43, 3), np.uint8)
        bricks = cv2.resize(colours, (1024, 1024), interpolation=cv2.INTER_NEAREST)
        picture[:, :512] = bricks[:, :512]
    return picture


def label_map(number: int, side: int) -> np.ndarray:
    """(side, side) uint8: the nearest of 30 points for each pixel, in levels between which there are others."""
    rng = np.random.default_rng(number)
    points = rng.random((30, 2)) * side
    rows, columns = np.mgrid[:side, :side]
    away = (rows[..., None] - points[:, 0]) ** 2 + (columns[..., None] - points[:, 1]) ** 2
    return (8 * away.argmin(axis=2) + 4).astype(np.uint8)


def fitted(picture: np.ndarray, short: int) -> np.ndarray:
    """The whole picture, its shorter side as asked."""
    height, width = scaled_size(*picture.shape[:2], (short, short))
    smaller = height < picture.shape[0]
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def f1(found: np.ndarray, truth: np.ndarray) -> float:
    """Of pixels that are set, within one pixel."""
    precision = (cv2.dilate(truth.astype(np.uint8), NEAR) > 0)[found].mean() if found.any() else 0.0
    recall = (cv2.dilate(found.astype(np.uint8), NEAR) > 0)[truth].mean() if truth.any() else 0.0
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def milliseconds(work: Callable[[], Any], rounds: int = 3) -> float:
    """The fastest of some."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


def lines(name: str, pictures: Sequence[np.ndarray], packed: int, read: int) -> dict[str, Any]:
    columns: dict[str, list[float]] = {}
    stored = [canny(fitted(picture, packed)) for picture in pictures]
    for picture, drawn in zip(pictures, stored, strict=True):
        size = scaled_size(*drawn.shape, (read, read))
        truth = canny(fitted(picture, read)) > 0
        if truth.shape != size:  # sides are rounded twice
            truth = truth[: size[0], : size[1]]
            size = truth.shape
        for way, values in (("area", "levels"), ("now", "binary")):
            small = resize(drawn, *size, values)
            figures = {
                "share": (small > 0).mean(),
                "F1": f1(small > 0, truth),
                "corrected F1": edge_f1(small > 0, truth),
            }
            figures["ms"] = milliseconds(partial(resize, drawn, *size, values))
            if small.any():
                figures["level"] = small[small > 0].mean()
            for figure, value in figures.items():
                columns.setdefault(f"{figure} {way}", []).append(float(value))
        columns.setdefault("share computed", []).append(float(truth.mean()))
    told = lines_at(stored, "canny", read)
    means = {figure: float(np.mean(values)) for figure, values in sorted(columns.items())}
    return {"pictures": name, "packed": packed, "read": read, **means, "run together": told.lost if told else ""}


def labels(packed: int, read: int, count: int) -> dict[str, Any]:
    maps = [label_map(number, packed) for number in range(count)]
    assert {values_of(one) for one in maps} == {"labels"}
    row: dict[str, Any] = {"pictures": "label maps", "packed": packed, "read": read}
    for way, values in (("area", "levels"), ("now", "labels")):
        none = [~np.isin(resize(one, read, read, values), np.unique(one)) for one in maps]
        row[f"no label {way}"] = float(np.mean(none))
        row[f"ms {way}"] = float(np.mean([milliseconds(partial(resize, one, read, read, values)) for one in maps]))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="?", help="a folder of photographs")
    parser.add_argument("--count", type=int, default=48, help="pictures of each kind (default: 48)")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    sets = {"drawings": [drawing(number) for number in range(options.count)]}
    if options.pictures is not None:
        paths = sorted(path for path in options.pictures.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        chosen = [paths[number * len(paths) // options.count] for number in range(min(options.count, len(paths)))]
        sets["photographs"] = [to_rgb(cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)) for path in chosen]
    sizes = [(packed, read) for packed in PACKED for read in READ]
    record.write("condition_lines", [lines(name, own, *size) for name, own in sets.items() for size in sizes])
    record.write("condition_labels", [labels(*size, options.count) for size in sizes])


if __name__ == "__main__":
    main()
