"""One HTML file with pictures of what lint found, to be looked at anywhere: thumbnails are inside it as data URIs.

report.html is the template of the page; here is gathered what it shows.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from tqdm import tqdm

from controlbooth.data.files.whole import write_whole
from controlbooth.data.inspection.findings import MEANINGS, Finding
from controlbooth.data.inspection.scan import read_sample, sample_names
from controlbooth.data.pages.rendering import render_page
from controlbooth.data.pictures.images import BadSample, decode_image, to_rgb
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.manifest import Dataset

TEMPLATE = Path(__file__).with_name("report.html")
THUMBNAIL = 160
"""Longer side in pixels."""
MOST_SHOWN = 24
"""Findings of a kind that are shown with pictures."""
MOST_OF_GROUP = 6


def write_report(path: Path, dataset: Dataset, findings: Sequence[Finding]) -> None:
    """Writes the page, whole or not at all: counts, and below them the first findings of each kind with pictures."""
    by_kind = {kind: [finding for finding in findings if finding.kind == kind] for kind in MEANINGS}
    by_kind = {kind: own for kind, own in by_kind.items() if own}
    shown = [finding for own in by_kind.values() for finding in own[:MOST_SHOWN]]
    name = sample_names(dataset)
    figures = {
        finding: _figure(dataset, name, finding) for finding in tqdm(shown, unit="finding", desc="report", leave=False)
    }
    kinds = [
        dict(
            name=kind,
            anchor=kind.replace(" ", "-"),
            meaning=MEANINGS[kind],
            count=len(own),
            figures=[figures[finding] for finding in own[:MOST_SHOWN]],
        )
        for kind, own in by_kind.items()
    ]
    usable = sum(row.usable for row in dataset.rows)
    write_whole(path, render_page(TEMPLATE, dataset=dataset, usable=usable, kinds=kinds).encode())


def _figure(dataset: Dataset, name: Callable[[int], str], finding: Finding) -> dict[str, Any]:
    shown = finding.samples[:MOST_OF_GROUP]
    samples = [_sample(dataset, name(number), number, finding.condition) for number in shown]
    return dict(samples=samples, message=finding.message, more=len(finding.samples) - len(shown))


def _sample(dataset: Dataset, name: str, number: int, kind: str | None) -> dict[str, Any]:
    """Returns target, condition where the finding is about one, name and caption; or that it cannot be read."""
    try:
        sample = read_sample(dataset, number, kind)
    except BadSample:
        return dict(name=name, broken=True)
    pictures = [_thumbnail(sample.image, 255)]
    if sample.condition is not None:
        pictures.append(_thumbnail(sample.condition, 0))
    try:
        caption = read_captions(sample.caption, sample.caption_extension, sample.key)[0]
    except BadSample as bad:
        caption = bad.reason
    return dict(name=name, broken=False, pictures=pictures, caption=caption)


def _thumbnail(data: bytes, background: int) -> dict[str, Any] | None:
    """Returns None for what cannot be decoded, which the page shows as a red field."""
    try:
        pixels = decode_image(data, "", "", background)
    except BadSample:
        return None
    scale = THUMBNAIL / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    colour = np.ascontiguousarray(to_rgb(small))
    encoded = base64.b64encode(simplejpeg.encode_jpeg(colour, quality=80)).decode()
    return dict(width=size[0], height=size[1], jpeg=encoded)
