"""Writes the latent cache of a run.

    torchrun ... -m controlbooth.trainer.controlnet.precompute run.yaml [section.key=value ...]

Each rank takes every world_size-th shard that is not in the cache yet, and no rank waits for another. A shard of
the cache gets its name when it is whole, so a killed command loses the shards in work and is started again, on any
number of ranks.
Latents are computed in batches of exactly micro_batch_size and in the precision of the run: see trainer/encoding.py.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; nothing here may reach a hub
os.environ.setdefault("DS_LOG_LEVEL", "error")

import cv2
import numpy as np
import torch
from tqdm import tqdm

from controlbooth.data.files.locks import open_lock, take_lock
from controlbooth.data.files.whole import write_whole
from controlbooth.data.order.buckets import Buckets
from controlbooth.data.pictures.images import (
    BadSample,
    decode_image,
    keep_freed_memory,
    memory_named,
    prepare_condition,
    prepare_target,
    write_planes,
)
from controlbooth.data.secrets import error_text
from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.latent_cache import (
    CONDITION,
    REPAIR,
    Add,
    LatentCache,
    check_stated,
    condition_parts,
    damaged,
    latents_parts,
    missing,
    plan_latent_cache,
    read_stated,
    state,
    stored_bytes,
    text_parts,
    written_cache_shard,
)
from controlbooth.data.shards.manifest import Dataset
from controlbooth.data.shards.reader import ShardReader
from controlbooth.data.shards.sidecar import ShardIndex, index_path, load_index
from controlbooth.models.base import Base
from controlbooth.models.denoisers.transformer_copy import condition_mean
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet.build import cached_values
from controlbooth.trainer.controlnet.data import open_data, run_buckets
from controlbooth.trainer.encoding import (
    as_array,
    computed_here,
    encode_batch,
    encode_captions,
    encode_posterior,
    latent_cache_identities,
    to_conditioning,
    to_pixel_values,
)
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.distributed import (
    DistError,
    World,
    from_first_rank,
    gather_objects,
    join,
    leave,
    patient_group,
)
from controlbooth.trainer.run.base import once_a_machine, open_base
from controlbooth.trainer.run.frozen import hold_base, loading_device, quantize_encoders
from controlbooth.trainer.run.process import say

LOCK = ".lock"
Shape = tuple[int, int]
"""(height, width) of a picture in pixels."""


@dataclass(frozen=True)
class Work:
    """What all shards of a rank are computed with."""

    batch: int
    """Pictures in one pass of the VAE, neither more nor fewer."""
    base: Base
    dataset: Dataset
    buckets: Buckets
    latent_cache: LatentCache
    reader: ShardReader
    conditions: ShardReader
    """Of the samples with the run's condition."""
    pool: ThreadPoolExecutor
    max_pixels: int


@dataclass(frozen=True)
class Sample:
    """What is read of one sample; None where it cannot be."""

    row: int
    """Of the shard's index."""
    key: str
    picture: np.ndarray | None
    """(3, H, W) uint8; None too where the run has no shape for it."""
    captions: list[str] | None
    conditions: list[np.ndarray] | None
    """(3, H, W) uint8 as it is, and mirrored where the run mirrors; None too where the cache holds no conditions."""
    bad: bool


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m controlbooth.trainer.controlnet.precompute",
        description="One rank of a precomputation. Start it with torchrun, or `controlbooth data precompute`.",
    )
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    options = parser.parse_intermixed_args(argv)
    rank, folder = int(os.environ.get("RANK", "0")), None
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # unfinished shards are deleted on the way out
    try:
        config = load_config(options.run, options.overrides)
        folder = config.data.latent_cache
        return precompute(config, join(config.engine.deterministic, config.engine.tf32), options.dry_run)
    except (ValueError, OSError, DistError) as error:
        if folder is not None and (folder / LOCK).exists():  # the command that started the ranks repeats it at the end
            with contextlib.suppress(OSError):  # a full disk may be what failed; the message on the terminal remains
                note = dict(rank=rank, error=error_text(error), time=time.time())
                write_whole(folder / f"failed-{rank}.json", json.dumps(note).encode())
        print(f"rank {rank}: {error_text(error)}", file=sys.stderr, flush=True)
        os._exit(2)  # the other ranks may be inside a collective; torchrun ends them when this one is gone
    finally:
        leave()


def precompute(config: RunConfig, world: World, dry_run: bool = False) -> int:
    """Computes what is missing in data.latent_cache. Raises ConfigError, ValueError and OSError."""
    folder = config.data.latent_cache
    if folder is None:
        raise ConfigError(
            "data.latent_cache is not set: name the folder to write to, e.g. data.latent_cache=shards/latents"
        )
    precision = engines.resolve_precision(config.engine.precision, world.device, config.engine.zero_stage)
    base = open_base(config, engines.DTYPES[precision], loading_device(config, world.device), once_a_machine(world))
    quantize_encoders(config, base)
    without_held_out = config.model_copy(update={"data": config.data.model_copy(update={"held_out": None})})
    dataset, _ = open_data(without_held_out, world)
    check_apart(folder, dataset)
    buckets = run_buckets(config, dataset)
    identities = latent_cache_identities(config, base, buckets.shapes, cached_values(config, base, dataset))
    latent_cache = plan_latent_cache(folder, dataset, buckets, identities)
    with only_writer(folder, world, dry_run):
        jobs: dict[int, list[str]] = {}
        spoiled = all_damaged(latent_cache, world)
        if world.rank == 0:  # by one alone: who asks later sees what others have finished meanwhile
            check_stated(folder, identities)
            jobs = lacking_kinds(latent_cache, spoiled)
            check_room(folder, report(base, dataset, latent_cache, jobs))
            if not dry_run and (jobs or read_stated(folder) is None):
                state(folder, identities, computed_here(config, world.device))
        jobs = from_first_rank(jobs)
        if dry_run:
            return 0
        hold_base(config, base, world)
        bad = compute(config, world, base, dataset, buckets, latent_cache, jobs)
    if bad:
        print(f"rank {world.rank}: {bad} samples cannot be read, and are not in the latent cache", file=sys.stderr)
    say(world, f"wrote {folder}" + ("" if world.world_size == 1 else " (rank 0; torchrun waits for the others)"))
    return 0


@contextlib.contextmanager
def only_writer(folder: Path, world: World, dry_run: bool) -> Iterator[None]:
    """Makes the folder and holds its lock: two commands would take each other's unfinished shards for leftovers."""
    lock, free = None, True
    if world.rank == 0 and not dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_lock(folder / LOCK)
        free = take_lock(lock, "start no second command that computes a latent cache there")
    try:
        if not from_first_rank(free):
            raise ConfigError(f"another command computes the latent cache in {folder}. Wait for it, or stop it")
        yield
        (folder / f"failed-{world.rank}.json").unlink(missing_ok=True)  # of an earlier attempt
    finally:
        if lock is not None:
            lock.close()


def check_apart(folder: Path, dataset: Dataset) -> None:
    """Raises ConfigError where the latent cache would lie among shards, and be taken for some."""
    among = {path.resolve().parent for path in dataset.paths if isinstance(path, Path)}
    if folder.resolve() in among:
        raise ConfigError(
            f"data.latent_cache={folder} holds shards of the data, and a latent cache beside them would be taken for "
            f"shards: name a folder of its own, e.g. data.latent_cache={folder / 'latents'}"
        )


def all_damaged(latent_cache: LatentCache, world: World) -> list[tuple[str, int]]:
    """Returns (kind, shard) of each cache shard that is there and damaged, on every rank. Each rank checks its share of
    them and prints what it finds."""
    group = patient_group() if world.world_size > 1 else None  # a share may be terabytes
    mine = damaged(latent_cache, world.rank, world.world_size)
    for fault in mine.values():
        print(f"to be computed again: {fault.removesuffix(f': {REPAIR}')}", file=sys.stderr, flush=True)
    return [one for part in gather_objects(list(mine), world, group) for one in part]


def lacking_kinds(latent_cache: LatentCache, spoiled: Sequence[tuple[str, int]] = ()) -> dict[int, list[str]]:
    """Returns, by shard, the kinds of cache shards that it lacks or has damaged. Equal shards of two sources have the
    same cache shards, which are listed once."""
    jobs = {latent_cache.paths[kind][shard]: (kind, shard) for kind, shard in (*missing(latent_cache), *spoiled)}
    kinds: dict[int, list[str]] = {}
    for kind, shard in jobs.values():
        kinds.setdefault(shard, []).append(kind)
    return kinds


def report(base: Base, dataset: Dataset, latent_cache: LatentCache, jobs: dict[int, list[str]]) -> int:
    """Says what is there and what is to be written; -> bytes of that. One caption a sample is reckoned with."""
    needed = 0
    width = max(map(len, latent_cache.paths))
    for kind, size in sample_bytes(base, latent_cache).items():
        lacking = [shard for shard, kinds in jobs.items() if kind in kinds]
        counts = dataset.samples_per_shard(latent_cache.condition if kind.startswith(CONDITION) else None)
        samples = int(sum(counts[shard] for shard in lacking))
        needed += samples * size
        print(
            f"{kind:{width}} {len(lacking)} of {len(dataset.rows)} shards to compute: {samples} samples of "
            f"{size:,} bytes, {samples * size / 2**30:.3f} GiB",
            flush=True,
        )
    if any("json" in row.extensions for row in dataset.rows):
        print("samples with several captions take as many text embeddings, which are not reckoned with", flush=True)
    return needed


def sample_bytes(base: Base, latent_cache: LatentCache) -> dict[str, int]:
    """Returns the bytes of a sample in each kind of cache shard, for the largest picture shape and one caption."""
    height, width = max(latent_cache.identities["latents"]["shapes"], key=lambda shape: shape[0] * shape[1])
    posterior = encode_posterior(base, torch.zeros(1, 3, height, width, device=base.device))
    text = [tensor for tensor in encode_captions(base, [""]) if tensor is not None]
    mean, std = (as_array(tensor[0]) for tensor in posterior)
    sizes = {
        "latents": stored_bytes([mean, std] * (1 + latent_cache.flips)),
        "text": stored_bytes([as_array(tensor[0]) for tensor in text]),
    }
    if latent_cache.condition is not None:
        sizes[f"{CONDITION}{latent_cache.condition}"] = stored_bytes([mean] * (1 + latent_cache.flips))
    return sizes


def check_room(folder: Path, needed: int) -> None:
    """Raises ConfigError where the disk has less than what is to be written."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"the latent cache needs {needed / 2**30:.3f} GiB, and the disk of {existing} has {free / 2**30:.3f} GiB "
            "free. Free some, or name another folder in data.latent_cache"
        )


def compute(
    config: RunConfig,
    world: World,
    base: Base,
    dataset: Dataset,
    buckets: Buckets,
    latent_cache: LatentCache,
    jobs: dict[int, list[str]],
) -> int:
    """Computes this rank's share of the shards. Returns how many of their samples cannot be read, or not in full."""
    data = config.data
    mine = sorted(jobs)[world.rank :: world.world_size]
    cv2.setNumThreads(1)
    keep_freed_memory()
    cache = Cache(data.cache, int(data.cache_gib * 2**30)) if data.cache else None
    name = "precompute" if world.world_size == 1 else f"precompute, rank 0 of {world.world_size}"
    total, bad = sum(dataset.rows[shard].usable for shard in mine), 0
    with (
        contextlib.closing(ShardReader(dataset, None, most_open=2, cache=cache)) as reader,
        contextlib.closing(
            ShardReader(dataset, latent_cache.condition, most_open=2, cache=cache, pictures=False)
        ) as conditions,
        ThreadPoolExecutor(data.threads) as pool,
        tqdm(total=total, unit="sample", desc=name, disable=world.rank != 0) as bar,
    ):
        work = Work(
            config.micro_batch_size, base, dataset, buckets, latent_cache, reader, conditions, pool, data.max_pixels
        )
        for shard in mine:
            bad += compute_shard(work, shard, jobs[shard], bar)
    return bad


def compute_shard(work: Work, shard: int, kinds: Sequence[str], bar: tqdm) -> int:
    """Commits the cache shards of these kinds of one shard; -> how many of its samples cannot be read."""
    path, bad = work.dataset.paths[shard], 0
    index = load_index(index_path(path))
    waiting: dict[tuple[str, tuple[int, ...]], list[Sample]] = {}
    with contextlib.ExitStack() as stack:
        adds: dict[str, Add] = {}
        for kind in kinds:
            stated = {"shard": path.name, "index": index.digest, **work.latent_cache.identities[kind]}
            adds[kind] = stack.enter_context(written_cache_shard(work.latent_cache.paths[kind][shard], index, stated))
        for sample in read_shard(work, shard, index, kinds):
            bad += sample.bad
            for kind in kinds:
                shape = batch_shape(kind, sample)
                if shape is None:
                    continue
                group = waiting.setdefault((kind, shape), [])
                group.append(sample)
                if len(group) == work.batch:
                    ENCODERS.get(kind, add_conditions)(adds[kind], work, group)
                    group.clear()
            bar.update(1)
        for (kind, _), group in waiting.items():
            if group:
                ENCODERS.get(kind, add_conditions)(adds[kind], work, group)
    return bad


def batch_shape(kind: str, sample: Sample) -> tuple[int, ...] | None:
    """Returns what the samples of a batch have alike, the shape of their pictures; None for a sample that has nothing
    of this kind."""
    if kind == "text":
        return None if sample.captions is None else ()
    pictures = [sample.picture] if kind == "latents" else sample.conditions or [None]
    return None if pictures[0] is None else pictures[0].shape


def read_shard(work: Work, shard: int, index: ShardIndex, kinds: Sequence[str]) -> Iterator[Sample]:
    """Yields the usable samples of a shard in order, decoded in threads up to two batches ahead of the consumer."""
    shapes = row_shapes(work, shard, index.aspect_bins())
    rows = index.usable().tolist()
    name = work.latent_cache.condition
    conditioned = index.usable(name).tolist() if f"{CONDITION}{name}" in kinds else []
    ordinals = {row: ordinal for ordinal, row in enumerate(conditioned)}
    ahead: deque[Future[Sample]] = deque()
    for ordinal, (row, shape) in enumerate(zip(rows, shapes, strict=True)):
        ahead.append(work.pool.submit(read_sample, work, shard, ordinal, row, shape, kinds, ordinals.get(row)))
        if len(ahead) > 2 * work.batch:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def row_shapes(work: Work, shard: int, bins: np.ndarray) -> list[Shape | None]:
    """Returns the shape of each usable sample; None where no sample with the run's condition is in that bin of aspect
    ratios, so that the run has no shape for it."""
    shapes = work.buckets.shapes
    if len(shapes) == 1:
        return [shapes[0]] * len(bins)
    sources = work.dataset.sources or (work.dataset,)
    first = np.cumsum([len(source.rows) for source in sources])
    table = work.buckets.assigned[int(np.searchsorted(first, shard, side="right"))]
    return [shapes[table[bin]] if bin in table else None for bin in bins.tolist()]


def read_sample(
    work: Work, shard: int, ordinal: int, row: int, shape: Shape | None, kinds: Sequence[str], conditioned: int | None
) -> Sample:
    """Reads and decodes what these kinds are made of in one sample, in a thread.

    Pictures are cut as the loader cuts them without random crops. conditioned: the sample's ordinal among those with
    the run's condition; None where it has none, or its latents are there.
    """
    try:
        sample = work.reader.read(shard, ordinal)
    except BadSample as error:
        return Sample(row, error.key, None, None, None, bad=True)
    picture = captions = conditions = None
    with contextlib.suppress(BadSample):  # the run itself will meet it, and take a substitute
        captions = read_captions(sample.caption, sample.caption_extension, sample.key)
    if shape is None:
        return Sample(row, sample.key, None, captions, None, bad=captions is None)
    with contextlib.suppress(BadSample), memory_named(sample.key, sample.image_extension, sample.size[::-1]):
        if "latents" in kinds:
            image = decode_image(sample.image, sample.key, sample.image_extension, max_pixels=work.max_pixels)
            picture = write_planes(prepare_target(image, shape), np.empty((3, *shape), np.uint8))
    with contextlib.suppress(BadSample):
        if conditioned is not None:
            conditions = read_conditions(work, shard, conditioned, shape)
    lacks = (captions is None, picture is None and "latents" in kinds, conditions is None and conditioned is not None)
    return Sample(row, sample.key, picture, captions, conditions, bad=any(lacks))


def read_conditions(work: Work, shard: int, ordinal: int, shape: Shape) -> list[np.ndarray]:
    """Reads a condition, cut as the loader cuts it, and where the run mirrors also mirrored: (3, H, W) uint8 each.

    Raises BadSample where it cannot be decoded, or shows another frame than the picture.
    """
    sample = work.conditions.read(shard, ordinal)
    name, extension = work.latent_cache.condition, sample.condition_extension
    values = work.latent_cache.identities[f"{CONDITION}{name}"]["values"]
    assert sample.condition is not None
    with memory_named(sample.key, extension, sample.size[::-1]):
        condition = decode_image(sample.condition, sample.key, extension, 0, work.max_pixels)
        try:
            prepared = [
                prepare_condition(condition, sample.size, name, shape, flip=flip, values=values)
                for flip in (False, True)[: 1 + work.latent_cache.flips]
            ]
        except ValueError as error:
            raise BadSample(sample.key, extension, str(error)) from error
        return [write_planes(one, np.empty((3, *shape), np.uint8)) for one in prepared]


def add_latents(add: Add, work: Work, samples: list[Sample]) -> None:
    """Encodes up to a batch of pictures of one shape; a batch that is not full is filled with its last picture."""
    pictures = [sample.picture for sample in samples if sample.picture is not None]
    pictures += pictures[-1:] * (work.batch - len(pictures))
    pixels = torch.from_numpy(np.stack(pictures)).to(work.base.device)
    dtype = work.latent_cache.identities["latents"]["dtype"]
    arrays: list[dict[str, np.ndarray]] = [{} for _ in samples]
    for flipped in (False, True)[: 1 + work.latent_cache.flips]:
        posterior = encode_posterior(work.base, to_pixel_values(pixels.flip(3) if flipped else pixels))
        for name, tensor in zip(latents_parts(dtype, flipped), posterior, strict=True):
            for array, sample in zip(as_array(tensor), arrays, strict=False):
                sample[name] = array
    for sample, parts in zip(samples, arrays, strict=True):
        add(sample.row, sample.key, parts)


def add_conditions(add: Add, work: Work, samples: list[Sample]) -> None:
    """Encodes up to a batch of conditions of one shape; see `add_latents`."""
    dtype = work.latent_cache.identities[f"{CONDITION}{work.latent_cache.condition}"]["dtype"]
    arrays: list[dict[str, np.ndarray]] = [{} for _ in samples]
    for flipped in (False, True)[: 1 + work.latent_cache.flips]:
        pictures = [sample.conditions[flipped] for sample in samples if sample.conditions is not None]
        pictures += pictures[-1:] * (work.batch - len(pictures))
        conditioning = to_conditioning(torch.from_numpy(np.stack(pictures)).to(work.base.device))
        (name,) = condition_parts(dtype, flipped)
        for array, sample in zip(as_array(condition_mean(work.base, conditioning)), arrays, strict=False):
            sample[name] = array
    for sample, parts in zip(samples, arrays, strict=True):
        add(sample.row, sample.key, parts)


def add_text(add: Add, work: Work, samples: list[Sample]) -> None:
    """Encodes the captions of these samples that are not empty: the empty prompt is kept with the base."""
    identity = work.latent_cache.identities["text"]
    captions = [
        (at, number, caption)
        for at, sample in enumerate(samples)
        for number, caption in enumerate(sample.captions or [])
        if caption
    ]
    arrays: list[dict[str, np.ndarray]] = [{} for _ in samples]
    for first in range(0, len(captions), work.batch):
        part = captions[first : first + work.batch]
        hidden_states, pooled = encode_batch(work.base, [caption for _, _, caption in part], work.batch)
        encoded = [hidden_states] if pooled is None else [hidden_states, pooled]
        for row, (at, number, _) in enumerate(part):
            names = text_parts(identity["dtype"], number, identity["pooled"])
            arrays[at] |= {name: as_array(tensor[row]) for name, tensor in zip(names, encoded, strict=True)}
    for sample, parts in zip(samples, arrays, strict=True):
        add(sample.row, sample.key, parts)


ENCODERS = {"latents": add_latents, "text": add_text}
"""Kind of cache shard -> what encodes up to a batch of samples for it, beside `add_conditions`."""


if __name__ == "__main__":
    sys.exit(main())
