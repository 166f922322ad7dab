"""Pictures of pictures: labelled grids for a person to look at."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from controlbooth.data.files.whole import replaced

TILE = 160
MARGIN = 8


def draw_grid(path: Path, columns: dict[str, np.ndarray], captions: Sequence[str]) -> None:
    """Writes a PNG with one row a sample and one column a kind of picture, its name above, the prompt beside.

    columns: name -> (N, H, W, 3) uint8, all of one length; captions: N texts. Small pictures are enlarged without
    smoothing, so that their pixels can be judged. The file appears whole or not at all.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    text_width, head = 190, 30
    rows = len(captions)
    width = MARGIN + len(columns) * (TILE + MARGIN) + text_width
    canvas = Image.new("RGB", (width, head + rows * (TILE + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (name, images) in enumerate(columns.items()):
        left = MARGIN + place * (TILE + MARGIN)
        draw.text((left + TILE / 2, head / 2), name, fill="black", font=font, anchor="mm")
        for row, image in enumerate(images):
            smooth = max(image.shape[:2]) > TILE
            tile = Image.fromarray(image).resize(
                (TILE, TILE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
            )
            canvas.paste(tile, (left, head + row * (TILE + MARGIN)))
    left = MARGIN + len(columns) * (TILE + MARGIN)
    for row, caption in enumerate(captions):
        lines = textwrap.wrap(caption, 26)[:8]
        draw.multiline_text(
            (left, head + row * (TILE + MARGIN) + 6), "\n".join(lines), fill="black", font=small, spacing=4
        )
    with replaced(path) as temporary:
        canvas.save(temporary, format="PNG")
