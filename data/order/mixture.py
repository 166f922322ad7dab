"""Position -> (source, bucket, sample): several data sets and picture shapes in one order, in closed form.

A run draws from streams, one for each source and each shape of its aspect-ratio buckets; each is an `Order` with the
run's lanes and its own epochs. Two questions turn a position into a stream and a place in it, and both are answered by
`split`, which deals turns out by weights:

    step = p // G       -> bucket b, and how many steps b had before: all ranks take the same shape in one step
    q = turns * G + p mod G, the position within the bucket;  lane = q mod C, i = q // C
    (lane, i)           -> source k, and how many rows the lane gave it before; r = rows * C + lane: its place

A lane belongs to the same rank in all streams, so a rank reads each of its shards once here too. Weights may change
in the course of a run: a history of (position, weights) is part of the checkpoint, and counts add up over its spans.
One source and one bucket make both questions trivial; then position p is place p of its order.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from controlbooth.data.errors import UserError
from controlbooth.data.order.draws import hash64
from controlbooth.data.order.order import Order

History = Sequence[tuple[int, Sequence[int]]]
"""(first position, weight of each source), the first one from position 0; positions are multiples of the batch."""

_ROOTS = [math.isqrt(n << 128) % 2**64 for n in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)]
"""Fractions of square roots of primes, in units of 2**-64: their multiples fill a cube evenly (Kronecker, Weyl)."""


class Place(NamedTuple):
    """Where a sample lies: `ordinal` counts the usable samples of shard number `shard` that are in this bucket."""

    epoch: int
    """Of its stream."""
    shard: int
    ordinal: int
    bucket: int


class Mixture:
    """The order of a run over all its sources and buckets: a function of sample counts, seed, lanes and weights."""

    def __init__(
        self,
        counts: Sequence[Sequence[np.ndarray]],
        history: History,
        *,
        seed: int,
        lanes: int,
        shards_per_block: int,
        global_batch_size: int,
        names: Sequence[str],
        shapes: Sequence[tuple[int, int]],
    ):
        """Makes the streams of each source and bucket, and checks that samples and weights suffice for them.

        counts[bucket][source]: (shards of the source,) int64, its usable samples of that bucket. names: of the sources,
        for messages. shapes: (height, width) of each bucket's pictures in pixels. Raises ValueError where a stream has
        fewer samples than lanes, or where `history` does not fit the sources or the batches.
        """
        self.seed, self.lanes, self.shards_per_block = seed, lanes, shards_per_block
        self.global_batch_size, self.shapes = global_batch_size, tuple(shapes)
        self.history = [(position, tuple(weights)) for position, weights in history]
        self.buckets, self.sources = len(counts), len(counts[0])
        self._first_shard = np.concatenate([[0], np.cumsum([len(shards) for shards in counts[0]])])
        self.orders: list[list[Order | None]] = [
            [self._order(bucket, source, shards, names[source]) for source, shards in enumerate(row)]
            for bucket, row in enumerate(counts)
        ]
        self.samples = sum(order.samples for order in self._all_orders())
        self.streams = sum(1 for _ in self._all_orders())
        samples = [[int(shards.sum()) for shards in row] for row in counts]
        self._check_history(names)
        shares = [_shares(samples, weights) for _, weights in self.history]
        self._steps = _Turns(
            [[sum(row) for row in share] for share in shares],
            [position // global_batch_size for position, _ in self.history],
        )
        self._source_shares = [[share[bucket] for share in shares] for bucket in range(self.buckets)]
        # In each bucket, the positions of it that had gone when each weighting began.
        self._source_starts = [
            [self._steps.before(step)[bucket] * global_batch_size for step in self._steps.starts]
            for bucket in range(self.buckets)
        ]
        self._rows: dict[tuple[int, int], _Turns] = {}

    def _order(self, bucket: int, source: int, shards: np.ndarray, name: str) -> Order | None:
        if self.buckets > 1 and not shards.any():
            return None  # the plan of the buckets left it to others
        seed = hash64(self.seed, "stream", source, bucket) if source or bucket else self.seed
        try:
            return Order(shards, seed, self.lanes, self.shards_per_block)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    def _check_history(self, names: Sequence[str]) -> None:
        for position, weights in self.history:
            if len(weights) != self.sources or min(weights) < 0 or not any(weights):
                raise UserError(
                    f"weights {list(weights)} from position {position} on must be one for each of the {self.sources} "
                    f"sources ({', '.join(names)}), none negative and one positive"
                )
            if position % self.global_batch_size:
                raise UserError(
                    f"weights change at position {position}, in the middle of a batch of {self.global_batch_size}; "
                    "let them change at a multiple of it"
                )

    def _all_orders(self) -> Iterator[Order]:
        return (order for row in self.orders for order in row if order is not None)

    def shape(self, step: int) -> tuple[int, int]:
        """Returns (height, width) in pixels of all pictures of a global batch."""
        return self.shapes[self._steps.pick(step)[0]]

    def locate(self, position: int) -> Place:
        """Returns the sample at a position >= 0 of the endless sequence."""
        bucket, source, order, at = self._stream(position)
        return self._place(bucket, source, order.locate(at))

    def substitute(self, position: int, attempt: int) -> Place:
        """Chooses by a hash a sample of the same source and shape, from a shard that is open anyway.

        attempt: 1, 2, ...
        """
        bucket, source, order, at = self._stream(position)
        return self._place(bucket, source, order.substitute(at, attempt))

    def position_of(self, epoch: int, shard: int, ordinal: int, bucket: int = 0) -> int | None:
        """Returns the position at which an epoch of its stream reads this sample; inverts `locate`.

        Returns None where the epoch leaves the sample out, or where its source or bucket gets no more turns.
        """
        source, order = self._order_of(shard, bucket)
        at = order.position_of(epoch, shard - int(self._first_shard[source]), ordinal)
        if at is None:
            return None
        row, lane = divmod(at, self.lanes)
        i = self._lane_rows(bucket, lane).turn_of(source, row)
        if i is None:
            return None
        turn, slot = divmod(i * self.lanes + lane, self.global_batch_size)
        step = self._steps.turn_of(bucket, turn)
        return None if step is None else step * self.global_batch_size + slot

    def epochs_begun(self, positions: int, shard: int, bucket: int = 0) -> int:
        """Counts the epochs of this shard's stream that the first `positions` positions, whole batches, have begun."""
        source, order = self._order_of(shard, bucket)
        gone = self._steps.before(positions // self.global_batch_size)[bucket] * self.global_batch_size
        rows = [
            self._lane_rows(bucket, lane).before(_rows_of_lane(gone, lane, self.lanes))[source]
            for lane in range(self.lanes)
        ]
        return -(-max(rows) // order.samples_per_lane)

    def rank_slots(self, step: int, global_batch_size: int, rank: int, world_size: int) -> np.ndarray:
        """Returns what `Order.rank_slots` does: in all streams the lanes are shared out to the ranks alike."""
        return next(self._all_orders()).rank_slots(step, global_batch_size, rank, world_size)

    def upcoming_blocks(self, step: int, slots: np.ndarray) -> list[tuple[int, list[int]]]:
        """Lists (when, shards) of the blocks that a rank's lanes read at a step, and of the block after each of them.

        slots: the rank's slots of one batch, within 0 .. G - 1. when: in how many rows of the lane, 0 for what is read
        now; it is an estimate for later blocks where weights decide how soon they come.
        """
        found = []
        rounds = max(1, self.lanes // self.global_batch_size)  # batches that together touch every lane of the rank
        share_of_bucket = self._steps.shares_at(step)
        for bucket, gone in enumerate(self._steps.before(step)):
            if not share_of_bucket[bucket]:
                continue
            at = np.concatenate([slots + (gone + i) * self.global_batch_size for i in range(rounds)])
            for q in at[np.unique(at % self.lanes, return_index=True)[1]].tolist():
                i, lane = divmod(q, self.lanes)
                turns = self._lane_rows(bucket, lane)
                shares = turns.shares_at(i)
                for source, rows in enumerate(turns.before(i)):
                    order = self.orders[bucket][source]
                    if order is None or not shares[source]:
                        continue
                    now, following = order.block_shards(rows * self.lanes + lane)
                    left = (following // self.lanes - rows) * sum(shares) * sum(share_of_bucket)
                    when = left // (shares[source] * share_of_bucket[bucket])
                    found.append((0, self._shifted(source, now)))
                    found.append((when, self._shifted(source, order.block_shards(following)[0])))
        return found

    def _stream(self, position: int) -> tuple[int, int, Order, int]:
        """Returns bucket, source, its order, and the place in that order. Raises ValueError for a negative position."""
        if position < 0:
            raise UserError(f"position {position} is negative; positions count samples from 0")
        step, slot = divmod(position, self.global_batch_size)
        bucket, turn = self._steps.pick(step)
        i, lane = divmod(turn * self.global_batch_size + slot, self.lanes)
        source, row = self._lane_rows(bucket, lane).pick(i)
        order = self.orders[bucket][source]
        assert order is not None
        return bucket, source, order, row * self.lanes + lane

    def _place(self, bucket: int, source: int, place: tuple[int, int, int]) -> Place:
        epoch, shard, ordinal = place
        return Place(epoch, shard + int(self._first_shard[source]), ordinal, bucket)

    def _order_of(self, shard: int, bucket: int) -> tuple[int, Order]:
        source = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        order = self.orders[bucket][source]
        if order is None:
            raise UserError(f"shard {shard} has no samples in bucket {bucket}")
        return source, order

    def _shifted(self, source: int, shards: list[int]) -> list[int]:
        return [shard + int(self._first_shard[source]) for shard in shards]

    def _lane_rows(self, bucket: int, lane: int) -> "_Turns":
        """Returns how the rows of a lane are shared out among the sources.

        It is built once for each lane; threads may build it twice, which does no harm.
        """
        if (bucket, lane) not in self._rows:
            starts = [_rows_of_lane(gone, lane, self.lanes) for gone in self._source_starts[bucket]]
            self._rows[bucket, lane] = _Turns(self._source_shares[bucket], starts, lane)
        return self._rows[bucket, lane]


class _Turns:
    """Endless turns 0, 1, 2, ... dealt out by shares that may change at some turns, with counts at any of them."""

    def __init__(self, shares: Sequence[Sequence[int]], starts: Sequence[int], lane: int = 0):
        """Counts the turns that each receiver has had when each span of shares begins.

        shares[span]: an integer for each receiver, not all zero unless the span is empty. starts: the first turn of
        each span. lane: see `split`.
        """
        self.shares = [tuple(span) for span in shares]
        self.starts = list(starts)
        self.lane = lane
        self._bases = [[0] * len(self.shares[0])]
        for span in range(len(starts) - 1):
            gone = counts_before(self.starts[span + 1] - self.starts[span], self.shares[span], lane)
            self._bases.append([base + more for base, more in zip(self._bases[-1], gone, strict=True)])

    def pick(self, turn: int) -> tuple[int, int]:
        """Returns who has this turn, and how many turns it had before."""
        span = self._span(turn)
        receiver, count = split(turn - self.starts[span], self.shares[span], self.lane)
        return receiver, self._bases[span][receiver] + count

    def before(self, turn: int) -> list[int]:
        """Counts for each receiver how many of the turns before this one it had."""
        span = self._span(turn)
        counts = counts_before(turn - self.starts[span], self.shares[span], self.lane)
        return [base + more for base, more in zip(self._bases[span], counts, strict=True)]

    def turn_of(self, receiver: int, count: int) -> int | None:
        """Returns the turn that a receiver gets after `count` earlier ones; None where it gets no more."""
        for span in reversed(range(len(self.starts))):
            if self._bases[span][receiver] <= count:
                if not self.shares[span][receiver]:
                    return None
                inside = turn_of(receiver, count - self._bases[span][receiver], self.shares[span], self.lane)
                return self.starts[span] + inside
        raise AssertionError("the first span begins with no turns gone")

    def shares_at(self, turn: int) -> tuple[int, ...]:
        return self.shares[self._span(turn)]

    def _span(self, turn: int) -> int:
        """Returns the last span that begins at or before a turn, which is never an empty one."""
        return int(np.searchsorted(self.starts, turn, side="right")) - 1


def split(turn: int, shares: Sequence[int], lane: int) -> tuple[int, int]:
    """Returns who has this turn, and how many turns it had before; integer shares decide, and no chance.

    The first receiver has floor(t * share / all + phase) of the first t turns, so it is always within one turn of its
    share; the turns that are left are shared out among the others in the same way. Another lane has other phases, so
    that at any turn the lanes together are close to the shares too: within 4 of 256 lanes for 3 sources, 7 for 5.
    """
    left = sum(shares)
    for receiver, share in enumerate(shares):
        count, more = ((turn + i) * share + _phase(lane, receiver, left) for i in (0, 1))
        if more // left > count // left:
            return receiver, count // left
        turn -= count // left
        left -= share
    raise AssertionError("the last receiver with a share has every turn that is left")


def counts_before(turn: int, shares: Sequence[int], lane: int) -> list[int]:
    """Counts how many of the first `turn` turns each receiver has, as `split` shares them out."""
    left, counts = sum(shares), []
    for receiver, share in enumerate(shares):
        counts.append((turn * share + _phase(lane, receiver, left)) // left if share else 0)
        turn -= counts[-1]
        left -= share
    return counts


def turn_of(receiver: int, count: int, shares: Sequence[int], lane: int) -> int:
    """Returns the turn that `split` gives to a receiver after `count` earlier ones; inverts `split`.

    The receiver's share must not be 0.
    """
    left = [sum(shares[number:]) for number in range(receiver + 1)]
    # floor((t + 1) * share / left + phase) reaches count + 1 at this t
    turn = -(-((count + 1) * left[-1] - _phase(lane, receiver, left[-1])) // shares[receiver]) - 1
    for number in reversed(range(receiver)):  # from a turn among those that are left to the turn among all
        rest = left[number] - shares[number]
        turn = (turn * left[number] + _phase(lane, number, left[number])) // rest
    return turn


def _phase(lane: int, receiver: int, left: int) -> int:
    """Returns a phase in 0 .. left - 1, spread evenly over the lanes, and over all combinations of receivers too."""
    return (((lane + 1) * _ROOTS[receiver % len(_ROOTS)] % 2**64) * left) >> 64


def _rows_of_lane(positions: int, lane: int, lanes: int) -> int:
    """Counts how many of the first `positions` positions belong to a lane."""
    return (positions - lane + lanes - 1) // lanes


def _shares(samples: Sequence[Sequence[int]], weights: Sequence[int]) -> list[list[int]]:
    """Computes shares[bucket][source] from samples[bucket][source], in integers.

    A share is in proportion to the source's weight times the part of its samples that are in the bucket.
    """
    totals = [sum(row[source] for row in samples) for source in range(len(weights))]
    common = int(np.lcm.reduce(np.array(totals, dtype=object)))
    return [
        [weight * count * (common // total) for weight, count, total in zip(weights, row, totals, strict=True)]
        for row in samples
    ]
