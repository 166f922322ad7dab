"""Names of conditions. Imports nothing heavy, so that a configuration can be checked at once."""

import re
from typing import Literal

from controlbooth.data.errors import UserError

COMPUTED = "computed:"
"""Before the kind of a condition that no shard holds: it is made of the target at each visit of a sample."""
COMPUTABLE = ("canny", "canny_random", "soft_edges", "scribble", "lineart", "lines", "gray", "blur")
"""Kinds that `data.conditions.functions` makes of a picture without a network."""
SIDED = ("pose", "keypoint", "skeleton")
"""Words in the names of kinds that tell left from right by colour: OpenPose's limbs, the landmarks of our scenes."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "bmp", "tif", "tiff", "gif", "avif", "heic", "heif")
"""How pictures are named that can be read, and the order of choice where a sample has several."""

MAX_PIXELS = 200_000_000
"""Of a picture that is decoded, unless a run says otherwise: what the largest sensors of telephones have, 600 MB."""

Values = Literal["binary", "labels", "levels"]
"""What the values of a kind of condition are, which decides how it is resized: see `data.pictures.resize`."""
_NAMED_VALUES: dict[Values, tuple[str, ...]] = {
    "binary": ("canny", "scribble", "mlsd"),
    "labels": ("seg", "segmentation", "segmentations", "semantic", "semantics", "panoptic", "instance", "instances")
    + ("label", "labels", "parsing", "ade20k", "cityscapes", "stuff", "keypoint", "keypoints", "pose", "openpose")
    + ("dwpose", "skeleton"),
    "levels": ("depth", "midas", "normal", "normals", "normalbae", "hed", "pidinet", "soft", "softedge", "blur", "gray")
    + ("grey", "tile", "image"),
}
"""Words in the names of kinds whose values are known, whatever single pictures look like."""


def named_values(kind: str | None) -> Values | None:
    """Returns what the values of a kind are by its name, as "ade20k_seg"; None where the name does not tell."""
    words = re.split(r"[^a-z0-9]+", (kind or "").lower())
    return next((values for values, known in _NAMED_VALUES.items() if any(word in known for word in words)), None)


def tells_sides(kind: str) -> bool:
    """Tells whether a mirrored condition of this kind would say left where it shows right."""
    return any(word in kind.lower() for word in SIDED)


def stored_kind(kind: str | None) -> str | None:
    """Returns the kind that shards must hold for a run on this kind of condition; None for a computed one."""
    return None if kind is not None and kind.startswith(COMPUTED) else kind


def computed_kind(kind: str | None) -> str | None:
    """Returns the kind that "computed:canny" names; None for a kind that shards hold.

    Raises ValueError for one that cannot be computed.
    """
    if kind is None or not kind.startswith(COMPUTED):
        return None
    name = kind.removeprefix(COMPUTED)
    if name not in COMPUTABLE:
        raise UserError(
            f"condition {kind!r}: {name!r} cannot be computed at loading time; these can: {', '.join(COMPUTABLE)}. "
            "Conditions that networks make are written into shards by `controlbooth data annotate`"
        )
    return name


SCENE_KINDS = ("edges", "segmentation", "depth", "normals", "keypoints")
