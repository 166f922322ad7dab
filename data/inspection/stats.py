"""`controlbooth data stats`: what captions and pictures of a data set are like, as numbers."""

import argparse

import numpy as np

from controlbooth.data.inspection.hygiene import quantiles
from controlbooth.data.inspection.scan import Scan, read_sample, scan, text_hash
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.manifest import Dataset, open_dataset
from controlbooth.data.shards.sidecar import index_path, load_index

LONG_WORDS = 60
"""CLIP reads 77 tokens and cuts off the rest; English has about 1.3 of them a word."""


def caption_lines(dataset: Dataset, scanned: Scan, most: int) -> list[str]:
    """Returns lines of text about captions: their lengths, the empty and repeated ones, and the `most` frequent ones
    with their counts."""
    count = len(scanned.caption_hashes)
    hashes, first, times = np.unique(scanned.caption_hashes, return_index=True, return_counts=True)
    repeated = int(times[times > 1].sum())
    lines = [
        f"captions      {count} of {len(scanned.digests)} samples; {len(hashes)} different, "
        f"{_share(repeated, count)} come more than once",
        f"  empty       {_share(int((scanned.caption_characters == 0).sum()), count)}",
        f"  words       {_spread(scanned.caption_words)}",
        f"  characters  {_spread(scanned.caption_characters)}",
        f"  long        {_share(int((scanned.caption_words > LONG_WORDS).sum()), count)} have more than {LONG_WORDS} "
        f"words, of which CLIP may not see the end",
    ]
    for at in np.argsort(-times, kind="stable")[:most].tolist():
        if times[at] > 1:
            text = _caption(dataset, int(scanned.caption_owners[first[at]]), int(hashes[at]))
            lines.append(f"  {_share(int(times[at]), count):>20}  {text}")
    return lines


def picture_lines(scanned: Scan, most: int) -> list[str]:
    """Returns lines of text about targets: their sides and aspect ratios, and the `most` frequent sizes."""
    width, height = scanned.sizes.T
    sizes, times = np.unique(scanned.sizes, axis=0, return_counts=True)
    lines = [
        f"pictures      {len(scanned.sizes)}, of {len(sizes)} sizes",
        f"  short side  {_spread(scanned.sizes.min(axis=1))}",
        f"  width/height {_spread(width / height, '.2f')}",
    ]
    for at in np.argsort(-times, kind="stable")[:most].tolist():
        size = f"{sizes[at][0]} x {sizes[at][1]}"
        lines.append(f"  {_share(int(times[at]), len(scanned.sizes)):>20}  {size}")
    return lines


def part_lines(dataset: Dataset) -> list[str]:
    """Returns lines of text on how many samples have each part, and its mean size, from the indexes."""
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for path in dataset.paths:
        index = load_index(index_path(path))
        for extension, column in zip(index.extensions, index.parts.T, strict=True):
            counts[extension] = counts.get(extension, 0) + int((column["offset"] > 0).sum())
            sizes[extension] = sizes.get(extension, 0) + int(column["size"].sum(dtype=np.int64))
    lines = [f"parts         of {sum(row.samples for row in dataset.rows)} samples"]
    for extension in sorted(counts):
        mean = sizes[extension] / max(1, counts[extension])
        lines.append(f"  {extension:20} {counts[extension]:10d}  {mean:10.0f} bytes on average")
    return lines


def _caption(dataset: Dataset, number: int, wanted: int) -> str:
    sample = read_sample(dataset, number)
    captions = read_captions(sample.caption, sample.caption_extension, sample.key)
    return next(repr(text) for text in captions if text_hash(text) == wanted)


def _spread(values: np.ndarray, form: str = ".0f") -> str:
    names = ("least", "5 %", "median", "95 %", "most")
    return ", ".join(f"{name} {value:{form}}" for name, value in zip(names, quantiles(values), strict=False))


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / max(1, whole):.1%})"


def run(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data stats`: prints figures and changes nothing."""
    dataset = open_dataset(arguments.shards)
    scanned = scan(dataset, (), decode=False, workers=arguments.workers)
    lines = caption_lines(dataset, scanned, arguments.most) + picture_lines(scanned, arguments.most)
    print("\n".join([f"data set      {dataset.location}", *lines, *part_lines(dataset)]))
    broken = [message for _, kind, message, _ in scanned.faults if kind == "broken"]
    if broken:
        print(f"not counted   {len(broken)} samples that cannot be read, as {broken[0]}")
    return 0
