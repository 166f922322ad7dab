"""What finds a condition of some kind in a generated picture."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from controlbooth.data.conditions import CONDITIONS
from controlbooth.data.networks import NETWORKS, open_network
from controlbooth.trainer.evaluate import reader
from controlbooth.trainer.evaluate.control import control_fidelity
from controlbooth.trainer.evaluate.convergence import FIGURES
from controlbooth.trainer.evaluate.held_out import HeldOutSet, scenes_of
from controlbooth.trainer.evaluate.kinds import AGREEMENT

Extract = Callable[[np.ndarray], np.ndarray]
"""(H, W, 3) uint8 -> a condition picture of the given kind, (H, W) or (H, W, 3) uint8."""


def extractor(held: HeldOutSet, networks: Mapping[str, str], device: str) -> Extract | None:
    """By a network that was named, else by the function that makes such conditions, else, for scenes, by the reader.

    networks: kind -> folder, as `controlbooth data annotate` takes them. None where nothing finds such a condition.
    Raises ValueError for a network that cannot be opened.
    """
    kind = held.kind
    if kind not in AGREEMENT:
        return None
    if kind in networks:
        return open_network(kind, networks[kind], device)
    if kind in CONDITIONS:
        return CONDITIONS[kind]
    if kind in reader.KINDS and held.targets.shape[1:3] == (reader.SIDE, reader.SIDE) and scenes_of(held):
        network = reader.load_reader()
        return lambda image: reader.read(network, kind, image[None])[0]
    return None


def fidelity(
    images: np.ndarray, held: HeldOutSet, rows: Sequence[int], extract: Extract | None
) -> dict[str, np.ndarray]:
    """Every figure of pictures that were made by these rows of the set: name -> (N,) float64.

    images: (N, H, W, 3) uint8. extract: finds the trained kind of condition; without it there is no figure of its own
    beside those of edges and masks.
    """
    rows = list(rows)
    figures = control_fidelity(
        images,
        None if held.edges is None else held.edges[rows],
        None if held.segmentation is None else held.segmentation[rows],
    )
    if extract is None or not rows:
        return figures
    own = []
    for image, given in zip(images, held.conditions[rows], strict=True):
        found = extract(np.ascontiguousarray(image))
        own.append(AGREEMENT[held.kind](found, given if found.ndim == 3 else given[..., 0]))
    return figures | {name: np.array([row[name] for row in own]) for name in own[0]}


def tells_control(held: HeldOutSet, extract: Extract | None) -> bool:
    """Whether these pictures have a figure by which sudden convergence is told."""
    return any(name in FIGURES for name in fidelity(held.targets[:1], held, [0], extract))


def what_is_missing(kind: str) -> str:
    """For people: why a kind has no figure of its own, and what to give."""
    if kind in NETWORKS:
        folders = ",".join(NETWORKS[kind][1])
        return f"nothing finds {kind} in pictures: give --network {kind}={folders} for its fidelity"
    return (
        f"nothing measures the kind {kind}; edges are measured where the shards hold them, and masks where they hold "
        "scenes with a segmentation"
    )
