"""The micro-batches of each optimizer step: threads read and decode ahead of the step that is consumed.

What a step holds is a function of (data set, seed, step): threads, ranks and the prefetch only decide when it is
ready. So a resume needs the step alone, and `position` counts what was consumed, never what was prefetched.

A sample whose bytes are bad is replaced by a hash-chosen one of its block, and after SUBSTITUTE_ATTEMPTS bad ones by a
black image of weight 0; batch shapes and all other samples stay as they are. Failing reads are no bad samples: they
are raised, since a sample that is there on one attempt and not on the next would make two runs differ.
"""

import json
import resource
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from controlbooth.data.arguments import quoted
from controlbooth.data.conditions.functions import computed_function
from controlbooth.data.conditions.values import ConditionValues
from controlbooth.data.errors import UserError
from controlbooth.data.loading.batches import MicroBatch, StepBatch
from controlbooth.data.loading.buffers import Buffers
from controlbooth.data.loading.plan import plan_order
from controlbooth.data.order import draws
from controlbooth.data.order.mixture import History, Place
from controlbooth.data.order.settings import DrawSettings, OrderSettings
from controlbooth.data.pictures.images import (
    MAX_PIXELS,
    BadSample,
    crop_slack,
    decode_image,
    keep_freed_memory,
    memory_named,
    prepare_condition,
    prepare_target,
    to_rgb,
    write_planes,
)
from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.captions import prompt, read_captions
from controlbooth.data.shards.latent_cache import EncodedBatch, LatentCache, LatentCacheReader
from controlbooth.data.shards.manifest import Dataset
from controlbooth.data.shards.prefetch import Prefetcher, upcoming_shards
from controlbooth.data.shards.reader import SampleBytes, ShardReader
from controlbooth.data.shards.storage import RemoteShard

SUBSTITUTE_ATTEMPTS = 4
BAD_RATE_SAMPLES = 1000
"""The rate of bad samples is counted over at least so many, so that an early bad one does not stop a run."""


@dataclass
class _Step:
    """A step while threads fill its rows."""

    number: int
    positions: np.ndarray
    flips: np.ndarray
    shape: tuple[int, int]
    """(height, width) of the pictures."""
    pixel_values: np.ndarray | None
    latents: np.ndarray | None
    """(2, n, C, h, w): mean and standard deviation of the picture's posterior, from the latent cache; (3, n, C, h, w),
    with the mean of the condition's, where the cache has that."""
    conditioning: np.ndarray | None
    noise: np.ndarray
    posterior_noise: np.ndarray
    rows: list[Future] = field(default_factory=list)


@dataclass
class _Row:
    """What is known of one sample besides its pixels, which are in the step's arrays."""

    key: str
    place: tuple[int, int]
    """See `MicroBatch`."""
    captions: list[str]
    weight: float
    faults: list[dict]
    text: list[np.ndarray] | None = None
    """From the latent cache, of a prompt that is not empty: hidden states (L, D), and (P,) where there is a pooled
    embedding."""
    fetch_seconds: float = 0.0
    decode_seconds: float = 0.0
    bytes_read: int = 0
    cache_hit: bool = False


class Loader:
    """An endless iterator over the StepBatches of one rank, and a context manager that ends its threads."""

    def __init__(
        self,
        dataset: Dataset,
        order: OrderSettings,
        drawn: DrawSettings,
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        latent_shape: Sequence[int],
        threads: int = 4,
        prefetch_steps: int = 2,
        start_step: int = 0,
        positions: Sequence[int] | np.ndarray | None = None,
        max_bad_rate: float = 0.01,
        ledger_path: Path | None = None,
        cache: Cache | None = None,
        ranks_per_node: int = 1,
        history: History | None = None,
        latent_cache: LatentCache | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        """Starts prefetching at once, so make the loader before the model.

        start_step: the first step to give, which is all that a resume sets. positions: gives these instead of 0, 1, 2,
        ...: step k takes positions[k * G : (k + 1) * G], and the iterator ends with them (to look at or to repeat
        certain batches). max_bad_rate: the share of substituted samples above which the run stops. ledger_path: a JSONL
        file to which each bad sample is appended, one file for each rank; `ledger` has the same lines. cache: for the
        shards that lie in a store, shared by ranks_per_node ranks of this machine. history: see `plan_order`.
        latent_shape: (C, h, w) of a square picture. latent_cache: a complete one of this data set; with it, target
        pictures are neither read nor decoded, nor are conditions whose latents it has. max_pixels: a sample with a
        larger picture is bad.

        A "computed:" condition is made from each target after cropping and mirroring; what is random about it is drawn
        from (seed, position). Raises ValueError for arguments that do not fit each other or the data set.
        """
        self.order, buckets = plan_order(dataset, order, history)
        self.dataset, self.settings, self.drawn, self.seed = dataset, order, drawn, order.seed
        self.global_batch_size, self.micro_batch_size = order.global_batch_size, micro_batch_size
        self._compute, self._max_pixels = computed_function(order.condition), max_pixels
        self.latent_shape = tuple(latent_shape)
        self.prefetch_steps, self.max_bad_rate, self.ledger_path = prefetch_steps, max_bad_rate, ledger_path
        self.slots = self.order.rank_slots(0, order.global_batch_size, rank, world_size)
        self.positions = None if positions is None else np.asarray(positions, np.int64)
        self._check_arguments(world_size, threads)
        if latent_cache is not None and (drawn.random_crop or drawn.random_flip != latent_cache.flips):
            raise UserError(
                f"{latent_cache.folder} has latents of pictures cut at the centre, "
                f"{'and' if latent_cache.flips else 'not'} mirrored, and the loader has "
                f"random_crop={drawn.random_crop}, random_flip={drawn.random_flip}"
            )
        if latent_cache is not None and self._compute is not None:
            raise UserError(
                f"condition {order.condition!r} is made of target pictures, which are not read where a latent cache "
                "stands for them: leave out data.latent_cache, or write the condition into shards with "
                "`controlbooth data annotate`"
            )
        if latent_cache is not None and latent_cache.condition not in (None, order.condition):
            raise UserError(
                f"{latent_cache.folder} has latents of the condition {latent_cache.condition!r}, and the loader reads "
                f"{order.condition!r}"
            )
        live_shards = order.lanes // world_size * order.shards_per_block * self.order.streams
        self._check_cache(cache, live_shards, ranks_per_node)

        self.step = start_step
        """The next step to be consumed."""
        self.ledger: list[dict] = []
        self._samples_consumed = self._samples_bad = self._samples_unread = 0
        self._next_submitted = start_step
        self._queue: deque[_Step] = deque()
        self._buffers = Buffers()
        self._closed = False
        cv2.setNumThreads(1)  # the loader's threads share the cores; OpenCV's own would compete with them
        keep_freed_memory()
        kinds = 0 if latent_cache is None else len(latent_cache.paths)
        files = _affordable_files((2 + 2 * kinds) * live_shards + 64)
        self._latent_cache = (
            None if latent_cache is None else LatentCacheReader(latent_cache, files * kinds // (1 + kinds))
        )
        self._pictured = None if latent_cache is not None and latent_cache.condition else order.condition
        """The kind of condition that is given as a picture."""
        self._reader = ShardReader(
            dataset,
            order.condition,
            files // (1 + kinds),
            cache,
            buckets,
            pictures=latent_cache is None,
            conditions=self._pictured is not None,
        )
        self._values = ConditionValues(dataset, order.condition, self._reader.closing, max_pixels)
        self._prefetcher = None
        if cache is not None and positions is None:
            self._cache_share = cache.limit_bytes // ranks_per_node
            self._prefetcher = Prefetcher(dataset.paths, cache, self._shards_to_have, start_step)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._submit_ahead()

    @property
    def position(self) -> int:
        """Returns the first position that was not consumed, over all ranks, which a checkpoint saves."""
        return self.step * self.global_batch_size

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._closed:
            raise RuntimeError("the loader is closed; make a new one with start_step to go on")
        self._submit_ahead()
        if not self._queue:
            raise StopIteration
        step = self._queue.popleft()
        ready = sum(all(row.done() for row in later.rows) for later in self._queue)
        began = time.perf_counter()
        try:
            rows = [row.result() for row in step.rows]
            wait_seconds = time.perf_counter() - began
            self._account(rows)
        except BaseException:
            self.close()
            raise
        self.step = step.number + 1
        return StepBatch(
            step=step.number,
            micro_batches=self._micro_batches(step, rows),
            wait_seconds=wait_seconds,
            fetch_seconds=sum(row.fetch_seconds for row in rows),
            decode_seconds=sum(row.decode_seconds for row in rows),
            queue_depth=ready,
            bytes_read=sum(row.bytes_read for row in rows),
            cache_hits=sum(row.cache_hit for row in rows),
            substitutions=sum(bool(row.faults) for row in rows),
        )

    def close(self) -> None:
        """Drops what is queued, waits for the threads and closes all files. May be called again."""
        self._closed = True
        self._reader.closing.set()
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()
        self._reader.close()
        if self._latent_cache is not None:
            self._latent_cache.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_arguments(self, world_size: int, threads: int) -> None:
        if self.micro_batch_size < 1 or len(self.slots) % self.micro_batch_size:
            raise UserError(
                f"a rank's share of global_batch_size={self.global_batch_size} over world_size={world_size} is "
                f"{len(self.slots)} samples, which is not a multiple of micro_batch_size={self.micro_batch_size}. "
                f"Use a micro_batch_size that divides {len(self.slots)}."
            )
        if threads < 1 or self.prefetch_steps < 0:
            raise UserError(f"threads={threads} must be 1 or more, prefetch_steps={self.prefetch_steps} 0 or more")
        if self.positions is not None and len(self.positions) % self.global_batch_size:
            raise UserError(
                f"{len(self.positions)} positions do not fill whole batches of global_batch_size="
                f"{self.global_batch_size}; give a multiple of it"
            )

    def _check_cache(self, cache: Cache | None, live_shards: int, ranks_per_node: int) -> None:
        """Raises ValueError where remote shards have no cache, or one that the shards read at once do not fit in."""
        sizes = [shard.bytes for shard in self.dataset.paths if isinstance(shard, RemoteShard)]
        if not sizes:
            return
        if cache is None:
            raise UserError(
                f"{self.dataset.location} has {len(sizes)} shards in a store, which are read from a cache: "
                "give a folder on a local disk, data.cache of a run"
            )
        needed = ranks_per_node * min(live_shards * max(sizes), sum(sizes))
        if needed > cache.limit_bytes:
            raise UserError(
                f"data.cache_gib={cache.limit_bytes / 2**30:g} is less than what {ranks_per_node} ranks of this "
                f"machine read from at once, each up to {live_shards} shards of {max(sizes) / 2**30:.3g} GiB. Raise it "
                f"to {2 * needed / 2**30:.3g}, which leaves room to fetch ahead, or lower data.shards_per_block"
            )

    def _shards_to_have(self, step: int) -> list[int]:
        """Lists for the prefetcher what this rank's lanes read in this step and soon after, the most urgent first."""
        sizes = [row.bytes for row in self.dataset.rows]
        return upcoming_shards(self.order.upcoming_blocks(step, self.slots), sizes, self._cache_share)

    def _submit_ahead(self) -> None:
        """Keeps the next step and prefetch_steps after it in work; nothing is started beyond them."""
        while len(self._queue) <= self.prefetch_steps:
            slots = self.slots + self._next_submitted * self.global_batch_size
            if self.positions is not None:
                if slots[0] >= len(self.positions):
                    return
                slots = self.positions[slots]
            self._queue.append(self._start(self._next_submitted, slots))
            self._next_submitted += 1
        if self._prefetcher is not None:
            self._prefetcher.follow(self._queue[0].number)

    def _start(self, number: int, positions: np.ndarray) -> _Step:
        # Positions that were given may be of steps of several shapes; a batch has one, that of its first sample.
        height, width = self.order.shape(int(positions[0]) // self.global_batch_size)
        pixels = (len(positions), 3, height, width)
        channels, rows, columns = self.latent_shape
        latents = (
            len(positions),
            channels,
            rows * height // self.settings.resolution,
            columns * width // self.settings.resolution,
        )
        step = _Step(
            number,
            positions,
            flips=draws.flips(self.seed, positions) & self.drawn.random_flip,
            shape=(height, width),
            pixel_values=self._buffers.empty(pixels) if self._latent_cache is None else None,
            latents=None
            if self._latent_cache is None
            else np.zeros(
                (3 if self._latent_cache.cache.condition else 2, *latents), self._latent_cache.latents_stored
            ),
            conditioning=None if self._pictured is None else self._buffers.empty(pixels),
            noise=np.empty(latents, np.float32),
            posterior_noise=np.empty(latents, np.float32),
        )
        step.rows = [self._threads.submit(self._fill, step, row) for row in range(len(positions))]
        return step

    def _fill(self, step: _Step, at: int) -> _Row:
        """Fills one row of the step's arrays with its sample, or with a substitute where that is bad; runs in a thread.

        Where all substitutes are bad too, the row is black and has weight 0. Returns what is known of the sample
        besides its arrays. Raises OSError, with the shard and the position, where reading fails.
        """
        position = int(step.positions[at])
        own, shape = step.positions[at : at + 1], step.noise.shape[1:]
        step.noise[at] = draws.noise(self.seed, own, shape)[0]
        step.posterior_noise[at] = draws.posterior_noise(self.seed, own, shape)[0]
        place = self.order.locate(position)
        faults: list[dict] = []
        for attempt in range(SUBSTITUTE_ATTEMPTS + 1):
            if attempt:
                place = self.order.substitute(position, attempt)
            try:
                sample = self._reader.read(place.shard, place.ordinal, place.bucket)
                with memory_named(sample.key, sample.image_extension or sample.condition_extension, sample.size[::-1]):
                    row = self._decode(step, at, sample, place)
            except BadSample as bad:
                faults.append(self._fault(position, place, attempt, bad))
                continue
            except OSError as error:
                error.add_note(f"while reading {self.dataset.paths[place.shard]} for position {position}")
                raise
            if faults:
                byte, _ = self._reader.noted(place.shard, place.ordinal, place.bucket)
                stand_in = dict(substitute=row.key, substitute_shard=str(self.dataset.paths[place.shard]))
                for fault in faults:
                    fault |= stand_in | {"substitute_byte": byte}
            row.faults = faults
            return row
        for pictures in (step.pixel_values, step.conditioning):
            if pictures is not None:
                pictures[at] = 0
        return _Row(faults[0]["key"], (-1, -1), [""], 0.0, faults)

    def _decode(self, step: _Step, at: int, sample: SampleBytes, place: Place) -> _Row:
        began = time.perf_counter()
        image = condition = conditioning = crop = None
        if self._latent_cache is None:
            image = decode_image(sample.image, sample.key, sample.image_extension, max_pixels=self._max_pixels)
        size = sample.size if image is None else (image.shape[0], image.shape[1])
        if sample.condition is not None:
            condition = decode_image(sample.condition, sample.key, sample.condition_extension, 0, self._max_pixels)
        slack = crop_slack(*size, step.shape)
        if self.drawn.random_crop and any(slack):
            top, left = draws.crops(self.seed, step.positions[at : at + 1], np.array([slack]))[0].tolist()
            crop = (top, left)
        flip = bool(step.flips[at])
        try:
            if condition is not None:
                values = self._values.get()
                conditioning = prepare_condition(
                    condition, size, self.settings.condition, step.shape, crop, flip, values
                )
        except ValueError as error:
            raise BadSample(sample.key, sample.condition_extension, str(error)) from error
        row = _Row(
            key=sample.key,
            place=(place.shard, sample.row),
            captions=read_captions(sample.caption, sample.caption_extension, sample.key),
            weight=1.0,
            faults=[],
            fetch_seconds=sample.seconds,
            bytes_read=len(sample.image) + len(sample.condition or b"") + len(sample.caption),
            cache_hit=sample.cache_hit,
        )
        # From here on the step's arrays are written: a bad sample has been raised.
        seconds = (
            0.0
            if self._latent_cache is None
            else self._read_latent_cache(self._latent_cache, step, at, sample, place.shard, row)
        )
        if image is not None and step.pixel_values is not None:
            target = prepare_target(image, step.shape, crop, flip)
            write_planes(target, step.pixel_values[at])
            if self._compute is not None:
                bits = int(draws.conditions(self.seed, step.positions[at : at + 1])[0])
                conditioning = self._compute(to_rgb(target), bits)
        if step.conditioning is not None and conditioning is not None:
            write_planes(conditioning, step.conditioning[at])
        row.fetch_seconds += seconds
        row.decode_seconds = time.perf_counter() - began - seconds
        return row

    def _read_latent_cache(
        self, latent_cache: LatentCacheReader, step: _Step, at: int, sample: SampleBytes, shard: int, row: _Row
    ) -> float:
        """Reads the latents into the step, and the text into the row unless its prompt is empty.

        Returns the seconds that it took.
        """
        began = time.perf_counter()
        assert step.latents is not None
        where = (shard, sample.row, sample.key, sample.key_hash)
        latents = latent_cache.latents(*where, flipped=bool(step.flips[at]))
        if latent_cache.cache.condition is not None:
            latents.append(latent_cache.condition(*where, flipped=bool(step.flips[at])))
        dropped, choice = self._prompt_draws(step.positions[at : at + 1], [row])
        if prompt(row.captions, int(choice[0]), bool(dropped[0])):
            row.text = latent_cache.text(*where, caption=int(choice[0]))
        step.latents[:, at] = latents
        return time.perf_counter() - began

    def _prompt_draws(self, positions: np.ndarray, rows: list[_Row]) -> tuple[np.ndarray, np.ndarray]:
        """Draws whether the prompt of each row is dropped, (B,) bool, and which caption it is otherwise, (B,) int64."""
        counts = np.array([len(row.captions) for row in rows])
        dropped = draws.prompt_dropped(self.seed, positions, self.drawn.prompt_dropout)
        return dropped, draws.caption_choice(self.seed, positions, counts)

    def _fault(self, position: int, place: Place, attempt: int, bad: BadSample) -> dict:
        """Makes a line of the ledger for a bad sample.

        Shard and byte identify the sample; its key, which may repeat, is for people.
        """
        byte, contents = self._reader.noted(place.shard, place.ordinal, place.bucket)
        return {
            "position": position,
            "attempt": attempt,
            "shard": str(self.dataset.paths[place.shard]),
            "byte": byte,
            "contents": contents,
            "ordinal": place.ordinal,
            "key": bad.key,
            "part": bad.part,
            "error": bad.reason,
            "substitute": None,
            "substitute_shard": None,
            "substitute_byte": None,
        }

    def _account(self, rows: list[_Row]) -> None:
        """Writes the ledger, in the order of positions, and stops the run when too much is bad."""
        faults = [fault for row in rows for fault in row.faults]
        self.ledger += faults
        if faults and self.ledger_path is not None:
            with open(self.ledger_path, "a") as file:
                file.writelines(json.dumps(fault) + "\n" for fault in faults)
        self._samples_consumed += len(rows)
        self._samples_bad += sum(bool(row.faults) for row in rows)
        self._samples_unread += sum(row.weight == 0.0 for row in rows)
        if self._samples_unread == self._samples_consumed:
            first = self.ledger[0]
            raise UserError(
                f"no sample can be read: none of the {self._samples_consumed} first, nor any of those that were to "
                f"stand in for them. The first is {first['key']!r} in {first['shard']}: part {first['part']!r}, "
                f"{first['error']}. All are told by `controlbooth data lint {quoted(self.dataset.location)} --decode`"
            )
        if self._samples_bad > self.max_bad_rate * max(self._samples_consumed, BAD_RATE_SAMPLES):
            last = self.ledger[-1]
            raise UserError(
                f"{self._samples_bad} of {self._samples_consumed} samples were bad, more than max_bad_rate="
                f"{self.max_bad_rate} allows. The last was {last['key']!r} in {last['shard']}: part {last['part']!r}, "
                f"{last['error']}. Replace the shards in the ledger, or raise max_bad_rate to go on without them."
            )

    def _micro_batches(self, step: _Step, rows: list[_Row]) -> list[MicroBatch]:
        dropped, choices = self._prompt_draws(step.positions, rows)
        timesteps = draws.noise_levels(self.seed, step.positions, self.drawn)
        weights = np.array([row.weight for row in rows], np.float32)
        prompts = [
            prompt(row.captions, choice, drop)
            for row, choice, drop in zip(rows, choices.tolist(), dropped.tolist(), strict=True)
        ]
        batches = []
        for first in range(0, len(rows), self.micro_batch_size):
            part = slice(first, first + self.micro_batch_size)
            batches.append(
                MicroBatch(
                    positions=step.positions[part],
                    keys=[row.key for row in rows[part]],
                    places=np.array([row.place for row in rows[part]], np.int64),
                    pixel_values=None if step.pixel_values is None else step.pixel_values[part],
                    conditioning=None if step.conditioning is None else step.conditioning[part],
                    encoded=self._encoded(step, rows, part),
                    captions=prompts[part],
                    dropped=dropped[part],
                    timesteps=timesteps[part],
                    noise=step.noise[part],
                    posterior_noise=step.posterior_noise[part],
                    weights=weights[part],
                )
            )
        return batches

    def _encoded(self, step: _Step, rows: list[_Row], part: slice) -> EncodedBatch | None:
        if step.latents is None or self._latent_cache is None:
            return None
        text = [row.text for row in rows[part] if row.text is not None]
        identities = self._latent_cache.cache.identities
        return EncodedBatch(
            mean=step.latents[0, part],
            std=step.latents[1, part],
            condition=step.latents[2, part] if len(step.latents) > 2 else None,
            latents_dtype=identities["latents"]["dtype"],
            hidden_states=np.stack([one[0] for one in text]) if text else None,
            pooled=np.stack([one[1] for one in text]) if text and identities["text"]["pooled"] else None,
            text_dtype=identities["text"]["dtype"],
        )


def _affordable_files(wanted: int) -> int:
    """Returns how many files may be kept open: `wanted`, but at most half of what the process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if limit == resource.RLIM_INFINITY else min(wanted, limit // 2)
