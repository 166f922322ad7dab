"""What the report's page is made of: its style, pictures inside it, tables with what stands beside a figure."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from controlbooth.trainer.evaluation.verdict import title

TILE = 112
"""Pixels on the page of a picture of the evaluation."""

STYLE = """
:root { color-scheme: light; --ink: #1d2530; --soft: #5b6675; --line: #e3e7ec; --mark: #0f766e; --warn: #b45309 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: var(--ink); background: #f6f7f9 }
main { max-width: 74rem; margin: 2rem auto; padding: 0 1.2rem } main.beside { max-width: 110rem }
header h1 { margin: 0; font-size: 1.7rem } header p { color: var(--soft); margin: .2rem 0 1rem }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.3rem }
section { margin: 0 0 1.1rem; overflow-x: auto }
h2 { font-size: 1.1rem; margin: 0 0 .6rem } h3 { font-size: 1rem; margin: 1.1rem 0 .4rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 } td.figure, th.figure { text-align: right; white-space: nowrap }
small { color: var(--soft) }
tr.with td { background: #f0fdfa } tr.with td:first-child { font-weight: 600 }
.told { border-left: 6px solid var(--soft); padding: .5rem 1rem; margin: 0 0 .9rem; background: #f1f3f6 }
.told b { display: block; font-size: 1.35rem; line-height: 1.3 } .told p { margin: .1rem 0 0 }
.told.obeys { border-color: var(--mark); background: #f0fdfa } .told.obeys b { color: var(--mark) }
.told.withdrawn { border-color: var(--warn); background: #fffbeb } .told.withdrawn b { color: var(--warn) }
.runs { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 1.6rem }
.runs > div { min-width: 0; overflow-x: auto }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem }
.curves svg, .standing svg { width: 100%; height: auto } .standing { max-width: 56rem }
.grid { overflow-x: auto } .grid td, .grid th { padding: 2px 3px; border: 0; text-align: center; font-size: 12px }
.grid img, .ends img { width: 112px; height: 112px; image-rendering: pixelated; border-radius: 4px; display: block }
.grid img { width: 72px; height: 72px } .grid th.mark { color: var(--mark) }
.grid td.caption { text-align: left; width: 8.5rem; min-width: 8.5rem; color: var(--soft); vertical-align: middle }
main.beside .grid img { width: 56px; height: 56px } main.beside .grid td.caption { width: 6rem; min-width: 6rem }
.ends { display: flex; flex-wrap: wrap; gap: .9rem } figure { margin: 0 } figure div { display: flex; gap: 3px }
figcaption { font-size: 12px; max-width: 346px; color: var(--soft) } summary { cursor: pointer }
pre { font-size: 12.5px; overflow-x: auto }
"""


def page(name: str, head: str, sections: Sequence[str], wide: bool) -> str:
    """The whole of it. head, sections: HTML."""
    body = "".join(f"<section>{section}</section>" for section in sections)
    kind = ' class="beside"' if wide else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(name)}</title><style>{STYLE}</style><main{kind}>{head}{body}</main></html>\n"
    )


def side_by_side(parts: Sequence[str]) -> str:
    """One part a run, in columns; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    return '<div class="runs">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def picture(image: np.ndarray) -> str:
    """An <img> with the picture inside, at most twice as wide as it is shown."""
    made = Image.fromarray(image)
    made.thumbnail((2 * TILE, 2 * TILE))
    data = io.BytesIO()
    made.save(data, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def figures_table(figures: Mapping[str, Mapping[str, Any]], marked: str) -> str:
    """One row a way of making pictures, one column a figure, each with chance and share below where they are known.

    figures: as in evaluation.json. marked: the way that is asked about.
    """
    names = list(dict.fromkeys(name for own in figures.values() for name in own))
    heads = "".join(f'<th class="figure">{html.escape(title(name))}' for name in names)
    rows = []
    for way, own in figures.items():
        cells = "".join(f'<td class="figure">{cell(own.get(name))}' for name in names)
        row = '<tr class="with">' if way == marked else "<tr>"
        rows.append(f"{row}<td>{html.escape(way)}{cells}")
    return f"<table><tr><th>{heads}{''.join(rows)}</table>"


def cell(figure: Mapping[str, Any] | None) -> str:
    """A figure with its interval, chance and share of what is possible, each with its own."""
    if figure is None:
        return "–"
    lines = [f"<b>{figure['mean']:.3f}</b>" + (f" <small>{ends(figure)}</small>" if "low" in figure else "")]
    if "chance" in figure:
        lines.append(f"<small>chance {figure['chance']['mean']:.3f}</small>")
    if "share" in figure:
        share = figure["share"]
        lines.append(f"{share['mean']:.0%} <small>{share['low']:.0%} to {share['high']:.0%}</small>")
    return "<br>".join(lines)


def prose(text: str) -> str:
    """A sentence as HTML; what stands in backquotes is code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text[:1].upper() + text[1:]))


def ends(figure: Mapping[str, float]) -> str:
    return f"{figure['low']:.3f} – {figure['high']:.3f}"
