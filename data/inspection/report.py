"""One HTML file with pictures of what lint found, to be looked at anywhere: thumbnails are inside it as data URIs."""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from tqdm import tqdm

from controlbooth.data.files.whole import write_whole
from controlbooth.data.inspection.findings import MEANINGS, Finding
from controlbooth.data.inspection.scan import read_sample, sample_names
from controlbooth.data.pictures.images import BadSample, decode_image, to_rgb
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.manifest import Dataset

THUMBNAIL = 160
"""Longer side in pixels."""
MOST_SHOWN = 24
"""Findings of a kind that are shown with pictures."""
MOST_OF_GROUP = 6

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
h2 { margin: 2.5rem 0 .2rem } p { margin: .2rem 0 1rem; color: #555 }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
.findings { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; padding: .6rem; border: 1px solid #ddd; border-radius: 6px; max-width: 70rem }
figure div { display: flex; flex-wrap: wrap; gap: .5rem } figcaption { font-size: 13px; overflow-wrap: anywhere }
.sample { width: min-content } .sample small { display: block; overflow-wrap: anywhere; color: #555 }
.sample span { display: flex; gap: 2px } img { background: #eee }
.missing { width: 160px; height: 90px; background: #fdd }
"""


def write_report(path: Path, dataset: Dataset, findings: Sequence[Finding]) -> None:
    """Writes the page, whole or not at all: counts, and below them the first findings of each kind with pictures."""
    by_kind = {kind: [finding for finding in findings if finding.kind == kind] for kind in MEANINGS}
    by_kind = {kind: own for kind, own in by_kind.items() if own}
    shown = [finding for own in by_kind.values() for finding in own[:MOST_SHOWN]]
    name = sample_names(dataset)
    figures = {
        finding: _figure(dataset, name, finding) for finding in tqdm(shown, unit="finding", desc="report", leave=False)
    }
    usable = sum(row.usable for row in dataset.rows)
    body = [
        f"<h1>{html.escape(dataset.location)}</h1>",
        f"<p>{usable} usable samples in {len(dataset.rows)} shards, fingerprint {dataset.fingerprint}</p><table>",
    ]
    for kind, own in by_kind.items():
        body.append(f'<tr><td><a href="#{_anchor(kind)}">{kind}</a><td>{len(own)}<td>{html.escape(MEANINGS[kind])}')
    body.append("</table>" if by_kind else "</table><p>Nothing was found.</p>")
    for kind, own in by_kind.items():
        first = f", of which the first {MOST_SHOWN} are shown" if len(own) > MOST_SHOWN else ""
        meaning = html.escape(MEANINGS[kind])
        body.append(f'<h2 id="{_anchor(kind)}">{kind}</h2><p>{meaning}: {len(own)}{first}</p><div class="findings">')
        body += [*(figures[finding] for finding in own[:MOST_SHOWN]), "</div>"]
    page = f"<title>{html.escape(dataset.location)}: lint</title><style>{_STYLE}</style>{''.join(body)}"
    write_whole(path, f'<!doctype html><html lang="en"><meta charset="utf-8">{page}</html>\n'.encode())


def _anchor(kind: str) -> str:
    return kind.replace(" ", "-")


def _figure(dataset: Dataset, name: Callable[[int], str], finding: Finding) -> str:
    shown = finding.samples[:MOST_OF_GROUP]
    samples = "".join(_sample(dataset, name(number), number, finding.condition) for number in shown)
    more = f" ({len(finding.samples) - len(shown)} more are not shown)" if len(finding.samples) > len(shown) else ""
    return f"<figure><div>{samples}</div><figcaption>{html.escape(finding.message)}{more}</figcaption></figure>"


def _sample(dataset: Dataset, name: str, number: int, kind: str | None) -> str:
    """Target, condition where the finding is about one, name and caption; what cannot be decoded is a red field."""
    try:
        sample = read_sample(dataset, number, kind)
    except BadSample:
        return f'<div class="sample"><div class="missing"></div><small>{html.escape(name)}</small></div>'
    pictures = _thumbnail(sample.image, 255)
    if sample.condition is not None:
        pictures += _thumbnail(sample.condition, 0)
    try:
        caption = read_captions(sample.caption, sample.caption_extension, sample.key)[0]
    except BadSample as bad:
        caption = bad.reason
    text = f"<b>{html.escape(name)}</b> {html.escape(caption)}"
    return f'<div class="sample"><span>{pictures}</span><small>{text}</small></div>'


def _thumbnail(data: bytes, background: int) -> str:
    try:
        pixels = decode_image(data, "", "", background)
    except BadSample:
        return '<div class="missing"></div>'
    scale = THUMBNAIL / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    colour = np.ascontiguousarray(to_rgb(small))
    encoded = base64.b64encode(simplejpeg.encode_jpeg(colour, quality=80)).decode()
    return f'<img width="{size[0]}" height="{size[1]}" alt="" src="data:image/jpeg;base64,{encoded}">'
