"""Prints how many 512 px samples of JPEG, gray PNG and text a core reads: our loader and plain webdataset, in turns.

    .venv/bin/python tests/benchmarks/decode_speed.py [--photos FOLDER] [--seconds 10] [--rounds 3]
    .venv/bin/python tests/benchmarks/decode_speed.py --memory-minutes 20

Both read the same shards from the page cache with the same decoders, simplejpeg and OpenCV. webdataset decodes in its
own process, or in workers of torch's DataLoader, its way to use several cores; what it gives is a batch of (B, H, W, 3)
pictures, (B, H, W) conditions and captions. Ours gives a training step: checked against the index, mirrored or not,
planes of both pictures, prompts dropped or kept, timesteps and noise.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from tqdm import tqdm

from controlbooth.data.conditions.functions import canny
from controlbooth.data.inspection.bench import open_loader
from controlbooth.data.packing.sources import IMAGE_SUFFIXES
from controlbooth.data.pictures.images import encode_png
from controlbooth.data.scenes import render
from controlbooth.data.shards.index import ensure_indexes
from controlbooth.data.shards.manifest import open_dataset

SIZE, SHARDS, PER_SHARD, BATCH, QUALITY = 512, 8, 48, 32, 90


def drawn_picture(number: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """An enlarged scene with texture at all scales and grain, so that its JPEG is as large as a photograph's."""
    noise = np.random.default_rng(number)

    def enlarged(pixels: np.ndarray) -> np.ndarray:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)

    levels = enlarged(render.render(render.scene(0, number), 128).image).astype(np.float32)
    for side in (16, 32, 64, 128, 256):
        levels += enlarged(noise.normal(0.0, 7.0, (side, side, 3)).astype(np.float32))
    levels += noise.normal(0.0, 7.0, (height, width, 1)).astype(np.float32)
    return np.clip(levels, 0, 255).astype(np.uint8)


def photograph(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert picture is not None, f"{path} cannot be read"
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return cv2.resize(picture[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def drawn_edges(picture: np.ndarray) -> np.ndarray:
    return canny(picture, low=60, high=120)


def photographs(folder: Path, count: int) -> Iterator[np.ndarray]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < count:
        raise SystemExit(f"{folder} has {len(paths)} pictures, the benchmark takes {count}")
    return map(photograph, paths[:: len(paths) // count])


def write_shards(
    folder: Path, pictures: Iterator[np.ndarray], edges: Callable[[np.ndarray], np.ndarray], shards: int, per_shard: int
) -> None:
    """Writes and indexes shards of JPEGs, their edges as PNG and captions."""
    sizes = []
    pictures = iter(tqdm(pictures, total=shards * per_shard, desc="pictures", leave=False))
    for number in range(shards):
        with webdataset.TarWriter(str(folder / f"{number:03d}.tar"), encoder=False, mtime=0) as writer:
            for i, picture in enumerate(itertools.islice(pictures, per_shard), number * per_shard):
                jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=QUALITY, colorsubsampling="420")
                png = encode_png(edges(picture))
                sizes.append((picture.shape[0], picture.shape[1], len(jpeg), len(png)))
                parts = {"jpg": jpeg, "cond.canny.png": png, "txt": f"number {i}".encode()}
                writer.write({"__key__": f"k{i:05d}", **parts})
    assert ensure_indexes(sorted(folder.glob("*.tar"))) == []
    height, width, jpeg, png = np.mean(sizes, axis=0)
    print(
        f"{len(sizes)} samples of {width:.0f} x {height:.0f} pixels: JPEG of {jpeg / 1000:.0f} KB, quality {QUALITY}, "
        f"and gray PNG of {png / 1000:.1f} KB, in the mean"
    )


def decode(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, str]:
    image = simplejpeg.decode_jpeg(sample["jpg"], colorspace="RGB")
    condition = cv2.imdecode(np.frombuffer(sample["cond.canny.png"], np.uint8), cv2.IMREAD_UNCHANGED)
    assert condition is not None
    return image, condition, sample["txt"].decode()


def stack(samples: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    images, conditions, captions = zip(*samples, strict=True)
    return np.stack(images), np.stack(conditions), list(captions)


@contextmanager
def by_webdataset(folder: Path, workers: int) -> Iterator[Iterator[Any]]:
    """workers: 0 decodes in this process."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=SHARDS).repeat().map(decode)
    batches = torch.utils.data.DataLoader(samples.batched(BATCH, collation_fn=stack), None, num_workers=workers)
    iterator = iter(batches)
    yield iterator
    del iterator, batches  # ends the workers


@contextmanager
def by_controlbooth(folder: Path, threads: int) -> Iterator[Iterator[Any]]:
    dataset = open_dataset(folder)
    with open_loader(dataset, threads, condition="canny", resolution=SIZE, batch_size=BATCH) as loader:
        yield loader


@contextmanager
def by_decoders(folder: Path) -> Iterator[Iterator[Any]]:
    """Nothing but the two decoders, on bytes in memory: what no loader on one core can be faster than."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = itertools.cycle(list(webdataset.WebDataset(shards, shardshuffle=False)))
    yield ([decode(sample) for sample in itertools.islice(samples, BATCH)] for _ in itertools.count())


@dataclass(frozen=True)
class Speed:
    samples_per_second: float
    cpu_seconds: float
    """Of this process and its workers, for a sample."""


def cpu_seconds() -> float:
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def measure(batches: Iterator[Any], seconds: float) -> Speed:
    next(batches)
    count, began, cpu_began = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - began < seconds:
        next(batches)
        count += BATCH
    return Speed(count / (time.perf_counter() - began), (cpu_seconds() - cpu_began) / count)


def compare(folder: Path, seconds: float, rounds: int) -> None:
    rows: dict[str, tuple[int, Callable]] = {
        "the decoders alone": (1, partial(by_decoders, folder)),
        "webdataset in its process": (1, partial(by_webdataset, folder, 0)),
        "webdataset, 1 worker": (1, partial(by_webdataset, folder, 1)),
        "controlbooth, 1 thread": (1, partial(by_controlbooth, folder, 1)),
        "webdataset, 2 workers": (2, partial(by_webdataset, folder, 2)),
        "controlbooth, 2 threads": (2, partial(by_controlbooth, folder, 2)),
    }
    found: dict[str, list[Speed]] = {name: [] for name in rows}
    with tqdm(total=rounds * len(rows), desc="turns", leave=False) as bar:
        for _ in range(rounds):
            for name, (_, make) in rows.items():
                with make() as batches:
                    found[name].append(measure(batches, seconds))
                bar.update()
    print(f"medians of {rounds} turns of {seconds:g} s, batches of {BATCH}")
    print(f"{'':28} {'samples/s':>9} {'per core':>9} {'CPU ms/sample':>14} {'samples per CPU second':>23}")
    for name, (cores, _) in rows.items():
        speed = statistics.median(one.samples_per_second for one in found[name])
        cpu = statistics.median(one.cpu_seconds for one in found[name])
        print(f"{name:28} {speed:9.0f} {speed / cores:9.0f} {1000 * cpu:14.3f} {1 / cpu:23.0f}")


def watch_memory(folder: Path, minutes: int) -> None:
    """Resident memory of a process that does nothing but read, on two threads."""
    me = psutil.Process()
    peak, samples = 0, 0
    print(f"reading for {minutes} minutes on 2 threads; before: {me.memory_info().rss / 2**20:.0f} MiB resident")
    print("minute    samples  resident MiB  peak MiB")
    with by_controlbooth(folder, 2) as batches:
        for minute in range(1, minutes + 1):
            until = time.perf_counter() + 60
            while time.perf_counter() < until:
                next(batches)
                samples += BATCH
                peak = max(peak, me.memory_info().rss)
            print(f"{minute:6d} {samples:10,d} {me.memory_info().rss / 2**20:13.0f} {peak / 2**20:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="take real photographs from this folder (default: drawn pictures)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each reader (default: 3)")
    parser.add_argument("--memory-minutes", type=int, help="instead of comparing, watch the memory for so long")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="decode-speed-") as folder:
        count = SHARDS * PER_SHARD
        pictures = photographs(options.photos, count) if options.photos else map(drawn_picture, range(count))
        edges = canny if options.photos else drawn_edges
        write_shards(Path(folder), pictures, edges, SHARDS, PER_SHARD)
        if options.memory_minutes:
            watch_memory(Path(folder), options.memory_minutes)
        else:
            compare(Path(folder), options.seconds, options.rounds)


if __name__ == "__main__":
    main()
