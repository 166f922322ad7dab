"""How many 512 px samples a core loads in a second, alone and beside a training step: so how many cores feed a GPU.

    .venv/bin/python tests/benchmarks/loader_rates.py [--seconds 5] [--threads 1 2] [--samples 320]

Pictures of 512 to 1,024 pixels are drawn and packed, with Canny edges of their own size and captions. Of them the
loader of a run at its defaults gives triples with the stored edges, triples whose edges are computed, and rows of a
latent cache of Stable Diffusion 1.5's shapes with the stored edges: each alone, and while the main thread takes steps
of a tiny network, whose many small operations hold the interpreter as a step does that launches kernels on a GPU, and
copies a micro-batch as a run does into pinned memory.

`CPU ms` is the time of the loader's own threads, which other work on the machine makes longer by its use of caches and
memory, and `cores at N` is what N samples/s take of it. `samples/s` is by the clock, so it needs cores that are free.
Where it is less than 1000 / CPU ms for a thread, threads wait for cores, for the disk or for the interpreter: `waits`
is that share of their time, by which a run needs more threads than cores. `step ms` is the main thread's step, alone in
the first row.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from decode_speed import drawn_edges, drawn_picture, write_shards
from record import write

from controlbooth.data.conditions.functions import canny
from controlbooth.data.loading.loader import Loader
from controlbooth.data.loading.plan import plan_order
from controlbooth.data.order import draws
from controlbooth.data.order.settings import DrawSettings, OrderSettings
from controlbooth.data.pictures.images import decode_image, prepare_condition, prepare_target, write_planes
from controlbooth.data.processes.cpus import usable_cpus
from controlbooth.data.shards.latent_cache import (
    LatentCache,
    LatentCacheReader,
    latents_parts,
    plan_latent_cache,
    state,
    text_parts,
    written_cache_shard,
)
from controlbooth.data.shards.manifest import Dataset, open_dataset
from controlbooth.data.shards.reader import ShardReader
from controlbooth.data.shards.sidecar import index_path, load_index
from controlbooth.trainer.config.run import DataConfig

SIZES = ((512, 512), (512, 768), (1024, 683), (768, 1024), (1024, 1024))
"""(height, width) of pictures, in turns."""
SIZE, BATCH, SHARDS = 512, 8, 8
LATENTS, TEXT = (4, 64, 64), (77, 768)
RATES = (48, 105, 122, 157)
"""Samples/s of a step of Stable Diffusion 1.5's shapes on one H200: measured with encoders in the step, and goals with
a latent cache."""
KINDS = {"stored edges": "canny", "computed edges": "computed:canny", "latent cache": "canny"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row (default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, 2, usable_cpus()}), help="of the loader")
    parser.add_argument("--samples", type=int, default=320, help="pictures that are drawn (default: 320)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="loader-rates-") as place:
        folder = Path(place)
        pictures = (drawn_picture(i, *SIZES[i % len(SIZES)]) for i in range(options.samples))
        write_shards(folder, pictures, drawn_edges, SHARDS, options.samples // SHARDS)
        dataset = open_dataset(folder)
        cache = write_latent_cache(folder / "latents", dataset)
        rows: list[dict[str, Any]] = [
            {"kind": "no loader", "threads": 0, "beside": "a step", "step ms": 1000 * step_alone(options.seconds)}
        ]
        for name, kind in KINDS.items():
            for threads in options.threads:
                for step in (None, small_step()):
                    chosen = cache if name == "latent cache" else None
                    with open_loader(dataset, kind, threads, chosen) as loader:
                        rows.append({"kind": name, "threads": threads} | measure(loader, options.seconds, step))
        write("loader_rates", rows)
        write("loader_parts", list(parts(dataset, cache, options.seconds)))


def order_settings(kind: str) -> OrderSettings:
    return OrderSettings(
        seed=0, lanes=BATCH, shards_per_block=2, global_batch_size=BATCH, condition=kind, resolution=SIZE
    )


def open_loader(dataset: Dataset, kind: str, threads: int, latent_cache: LatentCache | None) -> Loader:
    """Opens the loader as a run does that says nothing of its data but the shards and the condition."""
    usual = DataConfig(condition=kind)
    return Loader(
        dataset,
        order_settings(kind),
        DrawSettings(usual.prompt_dropout, usual.random_flip, usual.random_crop, num_train_timesteps=1000),
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
        latent_shape=LATENTS,
        threads=threads,
        prefetch_steps=usual.prefetch_steps,
        latent_cache=latent_cache,
    )


def write_latent_cache(folder: Path, dataset: Dataset) -> LatentCache:
    """Writes random moments and text in bfloat16, with the shapes of Stable Diffusion 1.5 at 512 px."""
    random = np.random.default_rng(0)
    identities = {
        "latents": {"dtype": "bfloat16", "flips": False},
        "text": {"dtype": "bfloat16", "pooled": False},
    }
    named = {
        "latents": dict.fromkeys(latents_parts("bfloat16", False), LATENTS),
        "text": dict.fromkeys(text_parts("bfloat16", 0, False), TEXT),
    }
    folder.mkdir()
    state(folder, identities, {})
    cache = plan_latent_cache(folder, dataset, plan_order(dataset, order_settings("canny"))[1], identities)
    for kind, shapes in named.items():
        for shard, path in enumerate(cache.paths[kind]):
            index, reader = load_index(index_path(dataset.paths[shard])), ShardReader(dataset, None, pictures=False)
            with written_cache_shard(path, index, {}) as add:
                for ordinal, row in enumerate(index.usable().tolist()):
                    key = reader.read(shard, ordinal).key
                    add(row, key, {name: random.integers(0, 2**16, of, np.uint16) for name, of in shapes.items()})
            reader.close()
    return cache


def small_step() -> Callable[[], None]:
    """Returns a training step of 40 small layers, which takes some milliseconds, nearly all of them on the host."""
    layers = [torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.SiLU()) for _ in range(40)]
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), foreach=False)
    inputs = torch.randn(1, 8, 8, 8)
    loaded = torch.zeros(2, BATCH, 3, SIZE, SIZE, dtype=torch.uint8)
    pinned = torch.empty_like(loaded)
    taken = 0

    def step() -> None:
        nonlocal taken
        part = taken % BATCH  # a sample for each of these steps: a real one is as many of them as it has samples
        pinned[:, part].copy_(loaded[:, part])
        taken += 1
        network(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_alone(seconds: float) -> float:
    """Returns the seconds of a step without a loader beside it."""
    step, steps, began = small_step(), 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        step()
        steps += 1
    return (time.perf_counter() - began) / steps


def measure(loader: Loader, seconds: float, step: Callable[[], None] | None) -> dict[str, Any]:
    """Takes all that the loader gives, in a thread, for so many seconds after the first batch; the main thread takes
    steps of its own meanwhile, or sleeps. Raises what the loader raises."""
    given: list[tuple[float, float]] = []
    ended = threading.Event()

    def take() -> None:
        while not ended.is_set():
            next(loader)
            given.append((time.perf_counter(), cpu_seconds()))

    steps, began = 0, time.perf_counter()
    with ThreadPoolExecutor(1, thread_name_prefix="loader-taker") as pool:
        taking = pool.submit(take)
        while not taking.done() and (len(given) < 2 or given[-1][0] - given[0][0] < seconds):
            if step is None:
                time.sleep(0.01)
            else:
                step()
                steps += 1
        step_seconds = (time.perf_counter() - began) / max(1, steps)
        ended.set()
        taking.result()
    (first, first_cpu), (last, last_cpu) = given[0], given[-1]
    count = BATCH * (len(given) - 1)
    rate, cpu = count / (last - first), (last_cpu - first_cpu) / count
    threads = sum(one.name.startswith("loader_") for one in threading.enumerate())
    return {
        "beside": "nothing" if step is None else "a step",
        "samples/s": rate,
        "CPU ms": 1000 * cpu,
        "samples a core-second": 1 / cpu,
        "waits": f"{max(0.0, 1 - rate * cpu / threads):.0%}",
        "step ms": "" if step is None else 1000 * step_seconds,
        **{f"cores at {at}": at * cpu for at in RATES},
    }


def cpu_seconds() -> float:
    """Of the loader's threads and of the one that takes what it gives."""
    mine = [one.ident for one in threading.enumerate() if one.name.startswith("loader")]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in mine if ident is not None)


def parts(dataset: Dataset, cache: LatentCache, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields the CPU time of each part of a sample, alone on one thread."""
    reader, latents = ShardReader(dataset, "canny"), LatentCacheReader(cache)
    samples = [(shard, reader.read(shard, ordinal)) for shard in range(len(dataset.paths)) for ordinal in range(10)]
    shape, planes = (SIZE, SIZE), np.empty((3, SIZE, SIZE), np.uint8)
    pictures = [decode_image(one.image, one.key, "jpg") for _, one in samples]
    edges = [decode_image(one.condition or b"", one.key, "png", 0) for _, one in samples]
    cut = [prepare_target(picture, shape) for picture in pictures]
    timed: dict[str, Callable[[int], Any]] = {
        "noise, and that of the posterior": lambda i: (
            draws.noise(0, np.array([i]), LATENTS),
            draws.posterior_noise(0, np.array([i]), LATENTS),
        ),
        "read picture, edges and caption": lambda i: reader.read(samples[i][0], i % 10),
        "decode the JPEG": lambda i: decode_image(samples[i][1].image, "", "jpg"),
        "resize and cut the picture": lambda i: prepare_target(pictures[i], shape),
        "its planes": lambda i: write_planes(cut[i], planes),
        "decode the PNG": lambda i: decode_image(samples[i][1].condition or b"", "", "png", 0),
        "resize and cut the edges": lambda i: prepare_condition(
            edges[i], pictures[i].shape[:2], "canny", shape, values="binary"
        ),
        "compute edges": lambda i: canny(cut[i]),
        "read latents": lambda i: latents.latents(*where(*samples[i]), flipped=False),
        "read text": lambda i: latents.text(*where(*samples[i]), caption=0),
    }
    for name, work in timed.items():
        yield {"part": name, "CPU ms a sample": 1000 * thread_seconds(work, len(samples), seconds / 5)}
    reader.close()
    latents.close()


def where(shard: int, sample: Any) -> tuple[int, int, str, int]:
    return shard, sample.row, sample.key, sample.key_hash


def thread_seconds(work: Callable[[int], Any], count: int, seconds: float) -> float:
    """Returns the CPU seconds of a call, over all of range(count) as often as fits into so many seconds."""
    rounds, began, cpu = 0, time.perf_counter(), time.thread_time()
    while not rounds or time.perf_counter() - began < seconds:
        for i in range(count):
            work(i)
        rounds += 1
    return (time.thread_time() - cpu) / (rounds * count)


if __name__ == "__main__":
    main()
