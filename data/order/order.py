"""Position -> (epoch, shard, ordinal): the whole sample order as arithmetic, read in lanes.

Each epoch permutes the shards, lays their samples end to end and cuts that sequence into C equal ranges, the lanes.
A lane walks through its range block by block; a block is the next B shard pieces, whose samples are permuted together.
Position p reads lane p mod C, so a global batch of C samples takes one sample from each of C distant places, while
each lane keeps only B shards open and visits each once an epoch (its first block twice, at both ends of its range).

    N = samples, C lanes, L = N // C samples of a lane, N' = C * L positions of an epoch
    epoch = p // N', lane = p mod C, i = (p mod N') // C

The N - N' samples that do not fill a row of lanes are left out of an epoch; another window of samples is left out in
each epoch, so that all are seen. Nothing here depends on the number of ranks, and nothing is stored but caches.

With few shards the mixing is bounded by the data: a shard that is cut between lanes is permuted inside each piece, not
across pieces. Have at least as many shards as lanes where the order within a shard means something.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from controlbooth.data.errors import UserError
from controlbooth.data.order.draws import hash64, permutation


class Place(NamedTuple):
    """Where a sample lies: `ordinal` counts the usable samples of shard number `shard`."""

    epoch: int
    shard: int
    ordinal: int


@dataclass(frozen=True)
class Epoch:
    """One epoch's sequence: shard `shards[j]` holds the places [starts[j], starts[j + 1])."""

    number: int
    shards: np.ndarray
    """(S,) int64, the permutation of the shards."""
    starts: np.ndarray
    """(S + 1,) int64, running counts of the samples that this epoch keeps."""
    hole_start: np.ndarray
    """(S,) int64 per shard (not permuted): the ordinal at which its left-out samples begin."""
    hole_length: np.ndarray
    """(S,) int64 per shard: how many of its samples are left out."""


@dataclass(frozen=True)
class Lane:
    """One lane's range of an epoch as shard pieces, and the blocks that they form."""

    shards: np.ndarray
    """(P,) int64, the shard of each piece."""
    firsts: np.ndarray
    """(P,) int64, the kept place inside its shard at which each piece begins."""
    starts: np.ndarray
    """(P + 1,) int64, running counts of the pieces' samples from the lane's start."""
    block_starts: np.ndarray
    """(blocks + 1,) int64, the same running counts at every B-th piece."""
    rotation: int
    """The place of the lane at which its reading begins."""


class Order:
    """The order of one source in one shape of pictures; `Mixture` makes a run's of several.

    A function of the shards' sample counts, the seed, C lanes and B shards per block.
    """

    def __init__(self, samples_per_shard: Sequence[int] | np.ndarray, seed: int, lanes: int, shards_per_block: int = 2):
        """Checks the arguments; epochs, lanes and blocks are computed when they are asked for.

        samples_per_shard: usable samples of each shard, in the data set's order; zeros are allowed. Raises ValueError
        where there are fewer samples than lanes, or where an argument is out of its range.
        """
        self.samples_per_shard = np.asarray(samples_per_shard, np.int64)
        self.seed, self.lanes, self.shards_per_block = seed, lanes, shards_per_block
        self.samples = int(self.samples_per_shard.sum())
        if self.samples_per_shard.ndim != 1 or (self.samples_per_shard < 0).any():
            raise UserError("samples_per_shard must be a list of sample counts, none of them negative")
        if lanes < 1 or shards_per_block < 1:
            raise UserError(f"lanes={lanes} and shards_per_block={shards_per_block} must both be at least 1")
        if self.samples < lanes:
            raise UserError(
                f"the data set has {self.samples} usable samples for lanes={lanes}, and every lane needs at least one. "
                f"Use lanes (and global_batch_size) of at most {self.samples}, or add data."
            )
        self.samples_per_lane = self.samples // lanes
        self.samples_per_epoch = lanes * self.samples_per_lane
        # Positions of one step lie in at most two epochs; a lane needs its current block and its table. Threads may
        # build the same one twice, which is equal and harmless.
        self._epoch = lru_cache(3)(self._build_epoch)
        self._lane = lru_cache(2 * lanes + 64)(self._build_lane)
        self._block_permutation = lru_cache(lanes + 64)(self._permute_block)

    def locate(self, position: int) -> Place:
        """Returns the sample at a position >= 0 of the endless sequence."""
        epoch, lane, block, at = self._block_at(position)
        within = self._block_permutation(epoch.number, lane, block)[at]
        return self._place(epoch, self._lane(epoch.number, lane), block, int(within))

    def position_of(self, epoch: int, shard: int, ordinal: int) -> int | None:
        """Returns the position at which an epoch reads this sample, or None where it leaves it out; inverts `locate`.

        Raises ValueError where the shard has no sample of this number.
        """
        table = self._epoch(epoch)
        hole, length = int(table.hole_start[shard]), int(table.hole_length[shard])
        if not 0 <= ordinal < self.samples_per_shard[shard]:
            raise UserError(f"shard {shard} has {self.samples_per_shard[shard]} samples, so none numbered {ordinal}")
        if hole <= ordinal < hole + length:
            return None
        kept = ordinal - length if ordinal >= hole else ordinal
        number, at = divmod(int(table.starts[np.flatnonzero(table.shards == shard)[0]]) + kept, self.samples_per_lane)
        lane = self._lane(epoch, number)
        block = int(np.searchsorted(lane.block_starts, at, side="right")) - 1
        within = at - int(lane.block_starts[block])
        read_at = int(np.flatnonzero(self._block_permutation(epoch, number, block) == within)[0])
        i = (int(lane.block_starts[block]) + read_at - lane.rotation) % self.samples_per_lane
        return epoch * self.samples_per_epoch + i * self.lanes + number

    def block_shards(self, position: int) -> tuple[list[int], int]:
        """Returns the shards of a position's block, and the position at which its lane enters the next block."""
        epoch, lane, block, at = self._block_at(position)
        table = self._lane(epoch.number, lane)
        first, last = np.searchsorted(table.starts, table.block_starts[block : block + 2]).tolist()
        i = position % self.samples_per_epoch // self.lanes
        size = int(table.block_starts[block + 1] - table.block_starts[block])
        left = min(size - at, self.samples_per_lane - i)  # an epoch ends inside the block with which it began
        return table.shards[first:last].tolist(), position + left * self.lanes

    def substitute(self, position: int, attempt: int) -> Place:
        """Chooses by a hash a sample of the position's block, to stand in for a bad one. attempt: 1, 2, ...

        It comes from a shard that is open anyway, and is the same on every rank and in every run.
        """
        epoch, lane, block, _ = self._block_at(position)
        table = self._lane(epoch.number, lane)
        size = int(table.block_starts[block + 1] - table.block_starts[block])
        return self._place(epoch, table, block, hash64(self.seed, "substitute", position, attempt) % size)

    def rank_slots(self, step: int, global_batch_size: int, rank: int, world_size: int) -> np.ndarray:
        """Returns the positions of a rank in global batch `step`, ascending: (global_batch_size / world_size,) int64.

        Global batch k is [k * G, (k + 1) * G). A rank owns the same contiguous range of lanes (of slots, where the
        lanes are a multiple of the batch) in every step, so that it reads each of its shards once. Raises ValueError
        where lanes, batch and ranks do not divide each other.
        """
        unit = rank_unit(self.lanes, global_batch_size, world_size)
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not in a world of {world_size} ranks; use 0 to {world_size - 1}")
        share = unit // world_size
        rows = np.arange(0, global_batch_size, unit, dtype=np.int64) + step * global_batch_size
        return (rows[:, None] + np.arange(rank * share, (rank + 1) * share)).reshape(-1)

    def _block_at(self, position: int) -> tuple[Epoch, int, int, int]:
        """Returns the epoch's table, the lane, the number of its block, and the place inside the block."""
        if position < 0:
            raise UserError(f"position {position} is negative; positions count samples from 0")
        number, rest = divmod(int(position), self.samples_per_epoch)  # lru_cache tells an int from a NumPy one
        i, lane = divmod(rest, self.lanes)
        table = self._lane(number, lane)
        i = (i + table.rotation) % self.samples_per_lane
        block = int(np.searchsorted(table.block_starts, i, side="right")) - 1
        return self._epoch(number), lane, block, i - int(table.block_starts[block])

    def _place(self, epoch: Epoch, lane: Lane, block: int, within: int) -> Place:
        at = int(lane.block_starts[block]) + within
        piece = int(np.searchsorted(lane.starts, at, side="right")) - 1
        shard = int(lane.shards[piece])
        ordinal = int(lane.firsts[piece]) + at - int(lane.starts[piece])
        if ordinal >= epoch.hole_start[shard]:
            ordinal += int(epoch.hole_length[shard])
        return Place(epoch.number, shard, ordinal)

    def _build_epoch(self, number: int) -> Epoch:
        counts = self.samples_per_shard
        ends = np.cumsum(counts)
        first, last = self._left_out(number)
        # The window [first, last) lies in the unpermuted sequence of all samples; this is its part in each shard.
        hole_start = np.clip(first - (ends - counts), 0, counts)
        hole_length = np.clip(last - (ends - counts), 0, counts) - hole_start
        shards = permutation(hash64(self.seed, number, "shards"), len(counts))
        starts = np.concatenate([[0], np.cumsum((counts - hole_length)[shards])])
        return Epoch(number, shards, starts, hole_start, hole_length)

    def _left_out(self, number: int) -> tuple[int, int]:
        """Returns the window [first, last) of the unpermuted sample sequence that an epoch leaves out.

        All windows come round in turn.
        """
        size = self.samples - self.samples_per_epoch
        if size == 0:
            return 0, 0
        windows = -(-self.samples // size)
        turn = (number + hash64(self.seed, "left out")) % windows
        first = min(turn * size, self.samples - size)
        return first, first + size

    def _build_lane(self, number: int, lane: int) -> Lane:
        epoch = self._epoch(number)
        begin, end = lane * self.samples_per_lane, (lane + 1) * self.samples_per_lane
        low = int(np.searchsorted(epoch.starts, begin, side="right")) - 1
        high = int(np.searchsorted(epoch.starts, end, side="left"))
        edges = np.clip(epoch.starts[low : high + 1], begin, end)
        filled = np.flatnonzero(np.diff(edges))  # shards without a kept sample have no piece
        starts = np.concatenate([edges[filled], [end]]) - begin
        blocks = np.concatenate([starts[:-1][:: self.shards_per_block], starts[-1:]])
        # Equal shards would make all lanes change shards in the same step, and so fetch at once. Golden-ratio
        # fractions spread the starts over the length of a block, evenly within every contiguous range of lanes.
        fraction = (lane * 0x9E3779B97F4A7C15 & (2**64 - 1)) >> 32
        return Lane(
            shards=epoch.shards[low:high][filled],
            firsts=edges[filled] - epoch.starts[low:high][filled],
            starts=starts,
            block_starts=blocks,
            rotation=fraction * int(blocks[1]) >> 32,
        )

    def _permute_block(self, number: int, lane: int, block: int) -> np.ndarray:
        starts = self._lane(number, lane).block_starts
        size = int(starts[block + 1] - starts[block])
        return permutation(hash64(self.seed, number, lane, block), size).astype(np.uint32)


def rank_unit(lanes: int, global_batch_size: int, world_size: int) -> int:
    """Returns how many neighbouring slots are shared out among the ranks at a time: min(lanes, global_batch_size).

    Raises ValueError where neither of the two is a multiple of the other, or where world_size does not divide it.
    """
    unit = min(lanes, global_batch_size)
    if unit < 1 or max(lanes, global_batch_size) % unit:
        raise UserError(
            f"lanes={lanes} and global_batch_size={global_batch_size}: one must be a multiple of the other. "
            f"Set lanes to {global_batch_size}, the default, or to a multiple of it."
        )
    if world_size < 1 or unit % world_size:
        raise UserError(
            f"{unit} lanes (the smaller of lanes={lanes} and global_batch_size={global_batch_size}) do not divide "
            f"among world_size={world_size} ranks. Start on a number of ranks that divides {unit}."
        )
    return unit
