"""Looking at a data set before training on it: what it holds, what it looks like, in which order it will be seen."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from controlbooth.data.arguments import file_to_write, finite_number, visible, whole_number
from controlbooth.data.draws import prompt_dropped
from controlbooth.data.explain import add_run_numbers, open_sources, order_of_run, run_numbers
from controlbooth.data.loader import HeldOutSample, held_out
from controlbooth.data.manifest import Dataset, open_dataset, shard_names
from controlbooth.data.plan import plan_order
from controlbooth.data.shards import ShardReader
from controlbooth.data.sources import encode_png

_LINE_HEIGHT = 14
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def info_main(argv: Sequence[str] | None = None) -> int:
    """`controlbooth data info`: counts, sizes, conditions and the fingerprint of a data set."""
    parser = argparse.ArgumentParser(
        prog="controlbooth data info",
        description="Say what a data set holds, and how a run would sort it into shapes.",
        epilog="examples:\n  controlbooth data info shards/train\n"
        "  controlbooth data info shards/train --max-aspect-ratio 2 --resolution 512",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    plan = parser.add_argument_group("shapes, as the fields of data in a run")
    plan.add_argument(
        "--max-aspect-ratio", type=finite_number(1, 8), help="show the shapes that a run with this ratio trains on"
    )
    plan.add_argument("--resolution", type=whole_number(8), default=512, help="(default: 512)")
    plan.add_argument("--aspect-step", type=whole_number(), default=64, help="(default: 64)")
    plan.add_argument(
        "--lanes", type=whole_number(), default=256, help="of the run, its global batch size (default: 256)"
    )
    plan.add_argument("--condition", help="kind that the run trains on (default: none)")
    arguments = parser.parse_args(argv)
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
        arguments.condition,
        seed=0,
        lanes=arguments.lanes,
        shards_per_block=1,
        global_batch_size=arguments.lanes,
        resolution=arguments.resolution,
        max_aspect_ratio=arguments.max_aspect_ratio,
        bucket_multiple=arguments.aspect_step,
    )
    print(f"{'shape':13} {'aspect':>6}  {'samples':>12}  share of steps")
    for (height, width), (stream, *_) in zip(order.shapes, order.orders, strict=True):
        count = stream.samples if stream else 0
        print(f"{width:5d} x {height:<5d} {width / height:6.2f}  {count:12d}  {count / order.samples:6.1%}")


def show_main(argv: Sequence[str] | None = None) -> int:
    """`controlbooth data show`: a contact sheet of target, conditions and caption."""
    parser = argparse.ArgumentParser(
        prog="controlbooth data show",
        description="Draw a contact sheet: each sample's image, its conditions and its caption.",
        epilog="example:\n  controlbooth data show shards/photos --condition canny --condition computed:scribble",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    parser.add_argument("-o", "--out", type=file_to_write, default=Path("sheet.png"), help="(default: sheet.png)")
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="KIND",
        help="kind to show, also computed:KIND; may be repeated (default: all that the shards hold)",
    )
    parser.add_argument(
        "--count", type=whole_number(), default=16, help="samples, from all folders and captions (default: 16)"
    )
    parser.add_argument("--columns", type=whole_number(), default=4, help="samples side by side (default: 4)")
    parser.add_argument("--resolution", type=whole_number(), default=192, help="side of each picture (default: 192)")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".png":
        raise ValueError(f"the sheet is a PNG image, so {arguments.out} must end in .png")
    dataset = open_dataset(arguments.shards)
    kinds = arguments.condition or sorted({kind for row in dataset.rows for kind in row.conditions})
    samples, *others = [
        list(
            held_out(
                dataset,
                min(arguments.count, int(dataset.samples_per_shard(kind).sum())),
                condition_kind=kind,
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
    """Image | conditions over the caption, for each sample, below the kinds' names: (H, W, 3) RGB uint8.

    conditions: of each sample those of `kinds`, (3, h, w) uint8 or None where it has none.
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
    """Cells of text beside each other, each of some lines: (H, cells * width, 3) uint8."""
    picture = np.full((_LINE_HEIGHT * lines + 6, width * len(cells), 3), 255, np.uint8)
    for number, cell in enumerate(cells):
        for line, words in enumerate(cell):
            place = (4 + number * width, 13 + _LINE_HEIGHT * line)
            cv2.putText(picture, words, place, _FONT, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def _wrap(caption: str, width: int) -> list[str]:
    """Lines that fit. OpenCV's font has ASCII alone, so other letters are shown as question marks."""
    lines = [""]
    for word in caption.encode("ascii", "replace").decode().split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and cv2.getTextSize(longer, _FONT, 0.38, 1)[0][0] > width - 8:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def order_main(argv: Sequence[str] | None = None) -> int:
    """`controlbooth data order`: the samples of one step, as a run with these numbers sees them."""
    parser = argparse.ArgumentParser(
        prog="controlbooth data order",
        description="List the samples of a step: where they lie, their keys, and whose prompt is dropped.",
        epilog="examples:\n  controlbooth data order --run runs/photos --step 1200 --world-size 8 --rank 3\n"
        "  controlbooth data order shards/train --global-batch-size 256 --step 1200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="?", help="a manifest, a folder, a tar, a glob or a {000..009} range")
    parser.add_argument("--step", type=whole_number(0), default=0, help="(default: 0)")
    parser.add_argument("--world-size", type=whole_number(), default=1, help="(default: 1)")
    parser.add_argument("--rank", type=whole_number(0), default=0, help="(default: 0)")
    add_run_numbers(parser)
    arguments = parser.parse_args(argv)
    numbers = run_numbers(arguments, steps=arguments.step + 1)
    dataset = open_sources(numbers)
    order, buckets = order_of_run(dataset, numbers)
    slots = order.rank_slots(arguments.step, numbers.global_batch_size, arguments.rank, arguments.world_size)
    reader, names = ShardReader(dataset, numbers.condition, buckets=buckets), shard_names(dataset)
    print(f"{'position':>10} {'epoch':>5}  {'shard':30} {'ordinal':>7}  {'prompt':7}  key")
    try:
        for position in slots.tolist():
            place = order.locate(position)
            sample = reader.read(place.shard, place.ordinal, place.bucket)
            dropped = prompt_dropped(numbers.seed, np.array([position]), numbers.prompt_dropout)[0]
            name = names[place.shard]
            prompt = "dropped" if dropped else "kept"
            print(f"{position:10d} {place.epoch:5d}  {name:30} {place.ordinal:7d}  {prompt:7}  {visible(sample.key)}")
    finally:
        reader.close()
    return 0
