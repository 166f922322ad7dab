"""Looking at a data set before training on it: what it holds, what it looks like, in which order it will be seen."""

import argparse
from collections import Counter
from collections.abc import Sequence

import cv2
import numpy as np

from controlbooth.data.arguments import visible
from controlbooth.data.errors import UserError
from controlbooth.data.inspection.explain import open_sources, order_of_run, run_numbers
from controlbooth.data.loading.held_out import HeldOutSample, held_out
from controlbooth.data.loading.plan import plan_order
from controlbooth.data.order.draws import prompt_dropped
from controlbooth.data.order.settings import OrderSettings
from controlbooth.data.pictures.images import encode_png
from controlbooth.data.shards.manifest import Dataset, open_dataset, shard_names
from controlbooth.data.shards.reader import ShardReader

_LINE_HEIGHT = 14
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def run_info(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data info`: prints counts, sizes, conditions and the fingerprint of a data set."""
    dataset = open_dataset(arguments.shards)
    samples = sum(row.samples for row in dataset.rows)
    usable = sum(row.usable for row in dataset.rows)
    conditions: Counter[str] = Counter()
    extensions: Counter[str] = Counter()
    for row in dataset.rows:
        conditions.update(row.conditions)
        extensions.update(row.extensions)
    counts = [row.samples for row in dataset.rows]
    print(f"data set      {dataset.location}")
    print(f"fingerprint   {dataset.fingerprint}")
    print(f"shards        {len(counts)}, of {min(counts)} to {max(counts)} samples")
    print(f"samples       {samples}, usable {usable}")
    print(f"size          {sum(row.bytes for row in dataset.rows) / 1e6:.1f} MB")
    kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(conditions.items())) or "none"
    parts = ", ".join(f"{name} (in {count} shards)" for name, count in sorted(extensions.items()))
    print(f"conditions    {visible(kinds)}\nparts         {visible(parts)}")
    if arguments.max_aspect_ratio is not None:
        _print_shapes(dataset, arguments)
    return 0


def _print_shapes(dataset: Dataset, arguments: argparse.Namespace) -> None:
    order, _ = plan_order(
        dataset,
        OrderSettings(
            seed=0,
            lanes=arguments.lanes,
            shards_per_block=1,
            global_batch_size=arguments.lanes,
            condition=arguments.condition,
            resolution=arguments.resolution,
            max_aspect_ratio=arguments.max_aspect_ratio,
            aspect_step=arguments.aspect_step,
        ),
    )
    print(f"{'shape':13} {'aspect':>6}  {'samples':>12}  share of steps")
    for (height, width), (stream, *_) in zip(order.shapes, order.orders, strict=True):
        count = stream.samples if stream else 0
        print(f"{width:5d} x {height:<5d} {width / height:6.2f}  {count:12d}  {count / order.samples:6.1%}")


def run_show(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data show`: writes a contact sheet of target, conditions and caption as PNG. Raises ValueError
    for a file name that does not end in .png."""
    if arguments.out.suffix != ".png":
        raise UserError(f"the sheet is a PNG image, so {arguments.out} must end in .png")
    dataset = open_dataset(arguments.shards)
    kinds = arguments.condition or sorted({kind for row in dataset.rows for kind in row.conditions})
    samples, *others = [
        list(
            held_out(
                dataset,
                min(arguments.count, int(dataset.samples_per_shard(kind).sum())),
                condition=kind,
                resolution=arguments.resolution,
            )
        )
        for kind in kinds or [None]
    ]
    more = [{sample.place: sample.conditioning for sample in other} for other in others]
    shown = [[sample.conditioning, *(one.get(sample.place) for one in more)] for sample in samples]
    sheet = contact_sheet(samples, [row[: len(kinds)] for row in shown], kinds, arguments.columns)
    arguments.out.write_bytes(encode_png(sheet))
    print(f"{arguments.out}: {len(samples)} samples, conditions {', '.join(kinds) or 'none'}")
    return 0


def contact_sheet(
    samples: Sequence[HeldOutSample],
    conditions: Sequence[Sequence[np.ndarray | None]],
    kinds: Sequence[str],
    columns: int,
) -> np.ndarray:
    """Draws image | conditions over the caption, for each sample, below the kinds' names: (H, W, 3) RGB uint8.

    conditions: those of `kinds` for each sample, (3, h, w) uint8 or None where it has none.
    """
    tiles = [_tile(sample, row) for sample, row in zip(samples, conditions, strict=True)]
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    side = samples[0].pixel_values.shape[2]
    names = _text([[name] for name in ("", *kinds)], side, 1)
    header = cv2.copyMakeBorder(names, 0, 0, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return np.concatenate([np.concatenate([header] * min(columns, len(tiles)), axis=1), *rows])


def _tile(sample: HeldOutSample, conditions: Sequence[np.ndarray | None]) -> np.ndarray:
    lacking = np.full_like(sample.pixel_values, 230)
    pictures = [sample.pixel_values, *(lacking if one is None else one for one in conditions)]
    picture = np.concatenate([pixels.transpose(1, 2, 0) for pixels in pictures], axis=1)
    text = _text([_wrap(sample.caption, picture.shape[1])[:2]], picture.shape[1], 2)
    tile = np.concatenate([picture, text])
    return cv2.copyMakeBorder(tile, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def _text(cells: Sequence[Sequence[str]], width: int, lines: int) -> np.ndarray:
    """Draws cells of text beside each other, each of some lines: (H, cells * width, 3) uint8."""
    picture = np.full((_LINE_HEIGHT * lines + 6, width * len(cells), 3), 255, np.uint8)
    for number, cell in enumerate(cells):
        for line, words in enumerate(cell):
            place = (4 + number * width, 13 + _LINE_HEIGHT * line)
            cv2.putText(picture, words, place, _FONT, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def _wrap(caption: str, width: int) -> list[str]:
    """Breaks a caption into lines that fit into `width` pixels. OpenCV's font has ASCII alone, so other letters are
    shown as question marks."""
    lines = [""]
    for word in caption.encode("ascii", "replace").decode().split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and cv2.getTextSize(longer, _FONT, 0.38, 1)[0][0] > width - 8:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def run_order(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data order`: prints the samples of one step, as a run with these numbers sees them."""
    numbers = run_numbers(arguments, steps=arguments.step + 1)
    dataset = open_sources(numbers)
    order, buckets = order_of_run(dataset, numbers)
    slots = order.rank_slots(arguments.step, numbers.order.global_batch_size, arguments.rank, arguments.world_size)
    reader, names = ShardReader(dataset, numbers.order.condition, buckets=buckets), shard_names(dataset)
    print(f"{'position':>10} {'epoch':>5}  {'shard':30} {'ordinal':>7}  {'prompt':7}  key")
    try:
        for position in slots.tolist():
            place = order.locate(position)
            sample = reader.read(place.shard, place.ordinal, place.bucket)
            dropped = prompt_dropped(numbers.order.seed, np.array([position]), numbers.drawn.prompt_dropout)[0]
            name = names[place.shard]
            prompt = "dropped" if dropped else "kept"
            print(f"{position:10d} {place.epoch:5d}  {name:30} {place.ordinal:7d}  {prompt:7}  {visible(sample.key)}")
    finally:
        reader.close()
    return 0
