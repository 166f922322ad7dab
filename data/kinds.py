"""Names of conditions. Imports nothing, so that a configuration can be checked at once."""

COMPUTED = "computed:"
"""Before the kind of a condition that no shard holds: it is made of the target at each presentation."""
COMPUTABLE = ("canny", "canny_random", "soft_edges", "scribble", "lineart", "lines", "gray", "blur")
"""Kinds that `data.conditions` makes of a picture without a network."""
SIDED = ("pose", "keypoint", "skeleton")
"""Words in the names of kinds that tell left from right by colour: OpenPose's limbs, the landmarks of our scenes."""


def tells_sides(kind: str) -> bool:
    """Whether a mirrored condition of this kind would say left where it shows right."""
    return any(word in kind.lower() for word in SIDED)


def stored_kind(kind: str | None) -> str | None:
    """The kind that shards must hold for a run on this kind of condition: none for a computed one."""
    return None if kind is not None and kind.startswith(COMPUTED) else kind


def computed_kind(kind: str | None) -> str | None:
    """The kind that "computed:canny" names; None of one that shards hold. Raises ValueError where none is made."""
    if kind is None or not kind.startswith(COMPUTED):
        return None
    name = kind.removeprefix(COMPUTED)
    if name not in COMPUTABLE:
        raise ValueError(
            f"condition {kind!r}: {name!r} cannot be computed at loading time; these can: {', '.join(COMPUTABLE)}. "
            "Conditions that networks make are written into shards by `controlbooth data annotate`"
        )
    return name
