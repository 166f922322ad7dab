"""How fast a data set can be read on this machine: the trainer's own loader, without a model."""

import argparse
import resource
import time
from dataclasses import dataclass

from tqdm import tqdm

from controlbooth.data.loading.loader import Loader
from controlbooth.data.order.settings import DrawSettings, OrderSettings
from controlbooth.data.processes.cpus import usable_cpus
from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.manifest import Dataset, open_dataset

LATENT_CHANNELS, VAE_FACTOR = 4, 8
"""Of the noise that is drawn with each sample, as for Stable Diffusion."""


@dataclass(frozen=True)
class Speed:
    """Of one thread count. Seconds are per sample."""

    threads: int
    samples: int
    samples_per_second: float
    megabytes_per_second: float
    cpu_seconds: float
    """Of the whole process: reading, decoding, noise, Python."""
    fetch_seconds: float
    """Of opening and reading, waiting for the disk included."""
    decode_seconds: float
    substitutions: int


def open_loader(
    dataset: Dataset,
    threads: int,
    *,
    condition: str | None,
    resolution: int,
    batch_size: int,
    cache: Cache | None = None,
) -> Loader:
    """Opens the loader of a run on one rank, at its usual settings."""
    return Loader(
        dataset,
        OrderSettings(
            seed=0,
            lanes=batch_size,
            shards_per_block=2,
            global_batch_size=batch_size,
            condition=condition,
            resolution=resolution,
        ),
        DrawSettings(prompt_dropout=0.5, random_flip=True, random_crop=True, num_train_timesteps=1000),
        micro_batch_size=batch_size,
        rank=0,
        world_size=1,
        latent_shape=(LATENT_CHANNELS, resolution // VAE_FACTOR, resolution // VAE_FACTOR),
        threads=threads,
        prefetch_steps=1,
        max_bad_rate=1.0,
        cache=cache,
    )


def measure(
    dataset: Dataset,
    threads: int,
    *,
    condition: str | None,
    resolution: int,
    batch_size: int,
    seconds: float,
    cache: Cache | None = None,
) -> Speed:
    """Reads steps for about so many seconds, after one step that is not counted. Raises what the loader raises.

    cache: for shards in a store; what it does not hold is fetched within the time that is measured.
    """
    with open_loader(
        dataset,
        threads,
        condition=condition,
        resolution=resolution,
        batch_size=batch_size,
        cache=cache,
    ) as loader:
        next(loader)
        began, cpu_began = time.perf_counter(), _cpu_seconds()
        steps = []
        with tqdm(desc=f"{threads} threads", unit="sample", leave=False) as bar:
            while time.perf_counter() - began < seconds:
                steps.append(next(loader))
                bar.update(batch_size)
        elapsed, cpu = time.perf_counter() - began, _cpu_seconds() - cpu_began
    samples = len(steps) * batch_size
    return Speed(
        threads=threads,
        samples=samples,
        samples_per_second=samples / elapsed,
        megabytes_per_second=sum(step.bytes_read for step in steps) / elapsed / 1e6,
        cpu_seconds=cpu / samples,
        fetch_seconds=sum(step.fetch_seconds for step in steps) / samples,
        decode_seconds=sum(step.decode_seconds for step in steps) / samples,
        substitutions=sum(step.substitutions for step in steps),
    )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data bench`: prints a row for each number of threads."""
    dataset = open_dataset(arguments.shards)
    cache = Cache(arguments.cache, int(arguments.cache_gib * 2**30)) if arguments.cache else None
    kinds = sorted({kind for row in dataset.rows for kind in row.conditions})
    kind = arguments.condition or (kinds[0] if kinds else None)
    print(f"{dataset.location}: condition {kind}, {arguments.resolution} px, {usable_cpus()} CPUs")
    print("threads  samples/s  per thread     MB/s  CPU ms/sample  fetch ms/sample  decode ms/sample")
    for threads in dict.fromkeys(arguments.threads):
        speed = measure(
            dataset,
            threads,
            condition=kind,
            resolution=arguments.resolution,
            batch_size=arguments.batch_size,
            seconds=arguments.seconds,
            cache=cache,
        )
        print(
            f"{threads:7d}  {speed.samples_per_second:9.0f}  {speed.samples_per_second / threads:10.0f}  "
            f"{speed.megabytes_per_second:7.1f}  {1000 * speed.cpu_seconds:13.3f}  {1000 * speed.fetch_seconds:15.3f}  "
            f"{1000 * speed.decode_seconds:16.3f}"
        )
        if speed.substitutions:
            print(f"         {speed.substitutions} of {speed.samples} samples were bad and replaced")
    return 0
