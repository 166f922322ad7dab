"""What finds a condition of some kind in a generated picture, and how well it agrees with what was given."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from controlbooth.data.conditions.functions import CONDITIONS
from controlbooth.data.conditions.networks import NETWORKS, open_network
from controlbooth.data.packing.sources import SEGMENTATION_STEP
from controlbooth.trainer.evaluation.chance import negatives
from controlbooth.trainer.evaluation.control import edge_f1, edge_map, line_map, mask_iou, object_mask
from controlbooth.trainer.evaluation.held_out import HeldOutSet, scenes_of
from controlbooth.trainer.evaluation.kinds import AGREEMENT
from controlbooth.trainer.evaluation.scenes import reader
from controlbooth.trainer.run.best import FIGURES

Extract = Callable[[np.ndarray], np.ndarray]
"""(H, W, 3) uint8 -> a condition picture of the given kind, (H, W) or (H, W, 3) uint8."""


def extractor(held: HeldOutSet, networks: Mapping[str, str], device: str) -> Extract | None:
    """Chooses what finds conditions of the held-out set's kind in pictures; None where nothing can.

    It is a network that was named, else the function that makes such conditions, else, for scenes, the reader.
    networks: kind -> folder, as `controlbooth data annotate` takes them. Raises ValueError for a network that cannot be
    opened.
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
        # Shards hold the classes of scenes so many levels apart that they can be told by eye.
        step = SEGMENTATION_STEP if kind == "segmentation" else 1
        return lambda image: reader.read(network, kind, image[None])[0] * np.uint8(step)
    return None


class Fidelity(NamedTuple):
    """Every figure of N pictures, by name."""

    values: dict[str, np.ndarray]
    """(N,) float64: each picture against the condition that it was made under."""
    chances: dict[str, np.ndarray]
    """(N,) float64: each picture against the conditions of its negatives, in the mean. Empty where the set holds one
    sample: of that there is no chance."""


class Comparison(NamedTuple):
    """What is found in a picture, and what it is compared with."""

    find: Callable[[np.ndarray], Any]
    """(H, W, 3) uint8 -> what `agree` takes."""
    given: np.ndarray
    """(N, ...) uint8, of all samples of the set."""
    prepare: Callable[[np.ndarray], Any]
    """One of them -> what `agree` takes."""
    agree: Callable[[Any, Any], dict[str, float]]
    """What was found, and what was given -> figures by name."""


def comparisons(held: HeldOutSet, extract: Extract | None) -> list[Comparison]:
    """Lists all comparisons that pictures of these conditions allow: edges, masks, and the trained kind's own."""
    found = []
    if held.edges is not None:
        found.append(Comparison(edge_map, held.edges, line_map, lambda own, given: {"edge_f1": edge_f1(own, given)}))
    if held.segmentation is not None:
        masks = held.segmentation > 0
        found.append(Comparison(object_mask, masks, np.asarray, lambda own, given: {"mask_iou": mask_iou(own, given)}))
    if extract is not None:
        prepare, agree = AGREEMENT[held.kind]
        found.append(Comparison(lambda image: prepare(extract(image)), held.conditions, prepare, agree))
    return found


def fidelity(images: np.ndarray, held: HeldOutSet, rows: Sequence[int], extract: Extract | None) -> Fidelity:
    """Computes every figure of pictures that were made under these rows of the set, with what each scores by chance.

    images: (N, H, W, 3) uint8. extract: finds the trained kind of condition; without it there are only the figures of
    edges and masks. Chance is taken over all samples of the set, whichever rows are asked for, so that ranks that share
    the pictures find the same.
    """
    others = negatives(len(held.keys))
    values: dict[str, list[float]] = {}
    chances: dict[str, list[float]] = {}
    for find, given, prepare, agree in comparisons(held, extract):
        asked = {row: prepare(given[row]) for row in {*rows, *others[list(rows)].ravel().tolist()}}
        for image, row in zip(images, rows, strict=True):
            seen = find(np.ascontiguousarray(image))
            for name, value in agree(seen, asked[row]).items():
                values.setdefault(name, []).append(value)
            by_chance = [agree(seen, asked[other]) for other in others[row].tolist()]
            for name in by_chance[0] if by_chance else ():
                chances.setdefault(name, []).append(float(np.mean([one[name] for one in by_chance])))
    return Fidelity(*({name: np.array(one) for name, one in part.items()} for part in (values, chances)))


def measures_control(held: HeldOutSet, extract: Extract | None) -> bool:
    """Tells whether pictures of this set have a figure by which control is judged (FIGURES)."""
    return any(name in FIGURES for name in fidelity(held.targets[:1], held, [0], extract).values)


def what_is_missing(kind: str) -> str:
    """Explains to people why a kind has no figure of its own, and what to give for one."""
    if kind in NETWORKS:
        folders = ",".join(NETWORKS[kind][1])
        return f"nothing finds {kind} in pictures: give --network {kind}={folders} for its fidelity"
    return (
        f"nothing measures the kind {kind}; edges are measured where the shards hold them, and masks where they hold "
        "scenes with a segmentation"
    )
