"""evaluation.json and samples.jsonl, as `controlbooth evaluate` writes them: what all who read them may rely on."""

from pathlib import Path
from typing import Any

from controlbooth.data.files.records import (
    Fields,
    each,
    having,
    is_figure,
    is_mapping,
    is_text,
    is_whole,
    maybe,
    read_json,
    read_json_lines,
)

RESULT, SAMPLES = "evaluation.json", "samples.jsonl"
USUAL_SAMPLES = 64
"""Held-out conditions that are drawn where nobody says how many, and the shards hold as many."""


def _figure(value: Any) -> bool:
    """Tells whether a value has a mean, and such a chance and share where it has any."""
    if not (is_mapping(value) and is_figure(value.get("mean"))):
        return False
    return all(maybe(_figure)(value.get(beside)) for beside in ("chance", "share"))


def _ways(value: Any) -> bool:
    """Tells whether a value maps each variant of the pictures to its figures by name."""
    return is_mapping(value) and all(is_mapping(own) and all(map(_figure, own.values())) for own in value.values())


def _sets(value: Any) -> bool:
    """Tells whether a value maps the name of each figure of whole sets to its values by variant, and perhaps a note."""
    return is_mapping(value) and all(
        having({"values": is_mapping, "note": maybe(is_text)})(one) and all(map(is_figure, one["values"].values()))
        for one in value.values()
    )


EVALUATION: Fields = {
    "step": is_whole,
    "digest": is_text,
    "data_fingerprint": is_text,
    "samples": is_whole,
    "resolution": is_whole,
    "figures": _ways,
    "sets": _sets,
    "sampler": having({"scheduler": is_text, "steps": is_whole, "guidance": is_figure}),
    "encoders": lambda value: is_mapping(value) and all(map(is_text, value.values())),
    "told": maybe(is_text),
}
"""Fields of evaluation.json, some of which earlier versions did not write."""
SAMPLE: Fields = {
    "way": is_text,
    "place": maybe(each(is_whole)),
    "chance": maybe(lambda value: is_mapping(value) and all(map(is_figure, value.values()))),
}
"""Fields of a line of samples.jsonl; figures stand beside them."""


def read_result(folder: Path, *needed: str) -> dict[str, Any] | None:
    """Reads evaluation.json; returns None where there is none.

    needed: names of EVALUATION that the reader cannot do without. Raises Damaged.
    """
    return read_json(folder / RESULT, remedy(folder), {name: EVALUATION[name] for name in needed}, missing=None)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Reads samples.jsonl: what was measured of each picture. Raises Damaged."""
    return list(read_json_lines(folder / SAMPLES, remedy(folder), SAMPLE))


def remedy(folder: Path) -> str:
    return f"Delete {folder}, and measure again by `controlbooth evaluate`; ticks of `retrain` do so by themselves"


WITHOUT, WITH, NO_PROMPT = "without control", "with control", "with control, no prompt"


DISCS, NOISE, REAL = "discs at the true places", "random noise", "real pictures"
