"""Prints what the sample order costs at a million shards, that it is exact, and how well it mixes.

    .venv/bin/python tests/benchmarks/order.py

The manifest of 1,000,000 shards of 5,000 samples is simulated; the order sees nothing of a shard but its sample count.
About three minutes on 2 cores and 3 GB of memory.
"""

import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import webdataset
from tqdm import tqdm

from controlbooth.data.loading.plan import order_state, resume_position
from controlbooth.data.order.mixture import Mixture
from controlbooth.data.order.order import Order
from controlbooth.data.shards.manifest import fingerprint, read_manifest

SHARDS, PER_SHARD, LANES, BATCH = 1_000_000, 5000, 256, 256
WORLD_SIZES = (1, 2, 4, 8, 16, 64, 256)


def memory_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


def first_sample() -> None:
    """From the counts alone to the place of a random position, as a resume has it; then a whole step of one rank."""
    counts = np.full(SHARDS, PER_SHARD)
    print(f"{SHARDS:,} shards x {PER_SHARD:,} samples, {LANES} lanes, blocks of 2 shards")
    print(f"  {'position':>17}  {'first sample':>12}  {'its step, 1 of 8 ranks':>22}  {'next 20 steps':>16}  memory")
    for position in [0, *random.Random(0).sample(range(3 * SHARDS * PER_SHARD), 4)]:
        before, began = memory_mib(), time.perf_counter()
        order = order_of_a_run(counts, seed=0)
        order.locate(position)
        first = time.perf_counter() - began
        step = position // BATCH
        locate_step(order, step, 3, 8)
        whole = time.perf_counter() - began
        began = time.perf_counter()
        for later in range(step + 1, step + 21):
            locate_step(order, later, 3, 8)
        each = (time.perf_counter() - began) / 20
        memory = f"+{memory_mib() - before:.0f} MiB"
        print(
            f"  {position:17,}  {1000 * first:9.0f} ms  {1000 * whole:19.0f} ms  {1000 * each:8.2f} ms each  {memory}"
        )
        del order
    order = order_of_a_run(counts, seed=0)
    state = json.dumps(order_state(order, "f" * 32, 123_456_789_012))
    began = time.perf_counter()
    position = resume_position(json.loads(state), order, "f" * 32)
    print(f"  the saved state: {len(state)} bytes, read in {1e6 * (time.perf_counter() - began):.0f} us: {position:,}")


def order_of_a_run(counts: np.ndarray, seed: int) -> Mixture:
    """What a run reads one data set with, in one shape."""
    return Mixture(
        [[counts]],
        [(0, (1,))],
        seed=seed,
        lanes=LANES,
        shards_per_block=2,
        global_batch_size=BATCH,
        names=["simulated"],
        shapes=[(512, 512)],
    )


def locate_step(order: Mixture, step: int, rank: int, world_size: int) -> list[tuple]:
    return [tuple(order.locate(int(slot))) for slot in order.rank_slots(step, BATCH, rank, world_size)]


def open_manifest() -> None:
    """Reading a manifest of a million rows and hashing its fingerprint, without looking at the shards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.jsonl"
        with open(path, "w") as file:
            for number in range(SHARDS):
                row = dict(uri=f"train-{number:07d}.tar", bytes=10**9, samples=PER_SHARD, usable=PER_SHARD)
                row |= dict(conditions={"canny": PER_SHARD}, index_hash=f"{number:032x}")
                file.write(json.dumps(row | dict(extensions=["cond.canny.png", "jpg", "txt"])) + "\n")
        before, began = memory_mib(), time.perf_counter()
        rows = read_manifest(path)
        fingerprint(rows)
        seconds, memory = time.perf_counter() - began, memory_mib() - before
        size = path.stat().st_size / 2**20
        print(
            f"  a manifest of {len(rows):,} rows, {size:.0f} MiB: read and hashed in {seconds:.1f} s, +{memory:.0f} MiB"
        )


def world_sizes() -> None:
    """Every world size's ranks together against one rank, each with an order of its own, at three kinds of steps."""
    counts = np.full(SHARDS, PER_SHARD) + np.arange(SHARDS) % 7 - 3  # so that 256 lanes do not divide them
    whole = order_of_a_run(counts, seed=1)
    epoch_steps = Order(counts, seed=1, lanes=LANES).samples_per_epoch // BATCH
    steps = {
        "first": 0,
        "middle of epoch 0": epoch_steps // 2,
        "end of epoch 0": epoch_steps,
    }
    print(f"global batches of {BATCH} of {whole.samples:,} samples, world sizes {', '.join(map(str, WORLD_SIZES))}")
    for name, step in steps.items():
        expected = locate_step(whole, step, 0, 1)
        same = []
        for world_size in WORLD_SIZES:
            order = order_of_a_run(counts, seed=1)
            got = [place for rank in range(world_size) for place in locate_step(order, step, rank, world_size)]
            same.append(got == expected)
        distinct = len({place[1] for place in expected})
        verdict = "identical" if all(same) else "DIFFERENT"
        print(f"  step {step:>12,} ({name}): {verdict}; its {BATCH} samples come from {distinct} shards")


def exactly_once() -> None:
    """Every position of two epochs of 1,000,000 samples, counted."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(1_000_000, rng.dirichlet(np.full(400, 3.0)))
    starts = np.concatenate([[0], np.cumsum(counts)])
    order = Order(counts, seed=2, lanes=LANES)
    for epoch in range(2):
        seen = np.zeros(order.samples, np.int64)
        first = epoch * order.samples_per_epoch
        for position in tqdm(range(first, first + order.samples_per_epoch), desc="once", unit="sample", leave=False):
            place = order.locate(position)
            seen[starts[place.shard] + place.ordinal] += 1
        once, more, never = ((seen == 1).sum(), (seen > 1).sum(), (seen == 0).sum())
        print(
            f"  epoch {epoch}: {order.samples:,} samples in {len(counts)} shards of {counts.min():,} to "
            f"{counts.max():,}: {once:,} once, {more} more than once, {never} left out "
            f"({order.samples % LANES} do not fill the lanes)"
        )


MIX_SHARDS, MIX_PER_SHARD, MIX_RANKS = 4096, 1000, 8


def shards_in_lanes(lanes: int, block: int) -> np.ndarray:
    """(steps, BATCH) the shard of each sample of an epoch: `locate` for whole lanes at once, held against `locate`."""
    order = Order(np.full(MIX_SHARDS, MIX_PER_SHARD), seed=3, lanes=lanes, shards_per_block=block)
    sequence = np.empty((order.samples_per_lane, lanes), np.int64)
    for number in range(lanes):
        lane = order._lane(0, number)
        within = [
            order._block_permutation(0, number, b) + lane.block_starts[b] for b in range(len(lane.block_starts) - 1)
        ]
        pieces = np.searchsorted(lane.starts, np.concatenate(within), side="right") - 1
        sequence[:, number] = np.roll(lane.shards[pieces], -lane.rotation)
    flat = sequence.reshape(-1)
    for position in random.Random(0).sample(range(len(flat)), 2000):
        assert order.locate(position).shard == flat[position]
    return flat[: len(flat) // BATCH * BATCH].reshape(-1, BATCH)


def shards_permuted() -> np.ndarray:
    flat = np.random.default_rng(0).permutation(MIX_SHARDS * MIX_PER_SHARD) // MIX_PER_SHARD
    return flat.reshape(-1, BATCH)


def shards_of_webdataset(buffer: int) -> np.ndarray:
    """Each rank shuffles its share of the shards and their samples through webdataset's own buffer."""

    def samples(rank: int) -> Iterator[int]:
        mine = list(range(rank, MIX_SHARDS, MIX_RANKS))  # split_by_node, before the shuffle
        random.Random(rank).shuffle(mine)
        for shard in mine:
            yield from [shard] * MIX_PER_SHARD

    shuffle = webdataset.filters._shuffle
    ranks = [
        np.fromiter(shuffle(samples(rank), bufsize=buffer, initial=buffer, seed=rank), np.int64)
        for rank in range(MIX_RANKS)
    ]
    share = BATCH // MIX_RANKS
    steps = min(len(one) for one in ranks) // share
    return np.concatenate([one[: steps * share].reshape(steps, share) for one in ranks], axis=1)


def mixing(sequence: np.ndarray) -> tuple[float, float, int]:
    """(steps, BATCH) shards -> mean distinct shards of a batch, reads of a shard, most shards that a rank has live.

    A rank reads a shard anew after it has not used it for a tenth of the epoch; between its first and its last use
    the shard is live.
    """
    steps = len(sequence)
    ordered = np.sort(sequence, axis=1)
    distinct = float(((ordered[:, 1:] != ordered[:, :-1]).sum(axis=1) + 1).mean())
    visits, live = 0, 0
    for rank in np.split(sequence, MIX_RANKS, axis=1):
        use = np.unique(
            rank.astype(np.int64) * steps + np.arange(steps)[:, None]
        )  # shard by shard, its steps ascending
        shard, step = np.divmod(use, steps)
        new = np.concatenate([[True], (np.diff(shard) > 0) | (np.diff(step) > steps / 10)])
        first, last = step[new], step[np.concatenate([new[1:], [True]])]
        visits += int(new.sum())
        change = np.bincount(first, minlength=steps + 1) - np.bincount(last + 1, minlength=steps + 1)[: steps + 1]
        live = max(live, int(np.cumsum(change).max()))
    return distinct, visits / len(np.unique(sequence)), live


def shuffle_quality() -> None:
    ideal = MIX_SHARDS * (1 - (1 - 1 / MIX_SHARDS) ** BATCH)
    print(
        f"one epoch of {MIX_SHARDS} shards x {MIX_PER_SHARD}, {MIX_RANKS} ranks, batch {BATCH}; random is {ideal:.0f}"
    )
    print(
        f"  {'order':<28} {'shards per batch':>16} {'reads per shard':>16} {'live shards a rank':>18}  held in memory"
    )
    rows = {f"lanes C={c}, B={b}": (shards_in_lanes, (c, b), 0) for c, b in [(32, 8), (256, 1), (256, 2), (256, 4)]}
    rows["global permutation"] = (shards_permuted, (), 0)
    for buffer in (1000, 5000):
        rows[f"webdataset, buffer {buffer}"] = (shards_of_webdataset, (buffer,), buffer)
    for name, (make, arguments, buffer) in rows.items():
        distinct, reads, live = mixing(make(*arguments))
        print(f"  {name:<28} {distinct:16.1f} {reads:16.2f} {live:18d}  {buffer * MIX_RANKS:,} samples")


def main() -> None:
    first_sample()
    open_manifest()
    world_sizes()
    print("each sample once an epoch, every position counted")
    exactly_once()
    shuffle_quality()


if __name__ == "__main__":
    main()
