import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.order.order import Order, Place, rank_unit


def epoch_of(order, number):
    start = number * order.samples_per_epoch
    return [order.locate(position) for position in range(start, start + order.samples_per_epoch)]


def test_the_order_is_pinned():
    order = Order([5, 0, 7, 3, 4], seed=42, lanes=4, shards_per_block=2)
    assert order.samples_per_epoch == 16
    assert [tuple(place[1:]) for place in epoch_of(order, 0)] == [
        (3, 0),
        (0, 1),
        (2, 2),
        (2, 6),
        (3, 2),
        (0, 2),
        (2, 1),
        (2, 5),
        (3, 1),
        (0, 3),
        (0, 4),
        (2, 4),
        (4, 3),
        (0, 0),
        (2, 0),
        (2, 3),
    ]
    assert order.locate(1000) == (62, 2, 0)
    assert [order.substitute(5, attempt)[1:] for attempt in (1, 2, 3)] == [(0, 2), (0, 3), (0, 1)]


def test_few_tables_are_kept_and_numpy_positions_find_those_of_plain_ones():
    order = Order([5, 0, 7, 3, 4], seed=42, lanes=4, shards_per_block=2)
    for number in range(100):
        epoch_of(order, number)
    tables = (order._epoch, order._lane, order._block_permutation)
    built = [table.cache_info().misses for table in tables]
    assert [table.cache_info().currsize for table in tables] == [3, 2 * 4 + 64, 4 + 64]
    last = 99 * order.samples_per_epoch
    assert order.locate(np.int64(last)) == order.locate(last)
    assert [table.cache_info().misses for table in tables] == built


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    st.integers(0, 2**62),
    st.integers(1, 16),
    st.integers(1, 4),
    st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_each_sample_comes_at_most_once_an_epoch_and_all_but_the_left_over_come(counts, seed, lanes, block, epoch):
    lanes = min(lanes, sum(counts))
    order = Order(counts, seed, lanes, block)
    places = epoch_of(order, epoch)
    assert len({(place.shard, place.ordinal) for place in places}) == len(places) == sum(counts) // lanes * lanes
    assert all(place.epoch == epoch and 0 <= place.ordinal < counts[place.shard] for place in places)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    st.integers(0, 2**62),
    st.integers(1, 16),
    st.integers(1, 4),
    st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_a_sample_is_found_at_the_one_position_of_an_epoch_that_reads_it(counts, seed, lanes, block, epoch):
    order = Order(counts, seed, min(lanes, sum(counts)), block)
    start = epoch * order.samples_per_epoch
    read = {place[1:]: start + i for i, place in enumerate(epoch_of(order, epoch))}
    for shard, count in enumerate(counts):
        for ordinal in range(count):
            assert order.position_of(epoch, shard, ordinal) == read.get((shard, ordinal))
        with pytest.raises(ValueError, match=f"shard {shard} has {count} samples, so none numbered {count}"):
            order.position_of(epoch, shard, count)


@pytest.mark.parametrize("samples", [n for k in (6, 9, 12) for n in (2**k - 1, 2**k, 2**k + 1)])
def test_an_epoch_is_a_bijection_around_powers_of_two(samples):
    order = Order([samples], seed=1, lanes=1)
    assert sorted(place.ordinal for place in epoch_of(order, 0)) == list(range(samples))


@pytest.mark.parametrize("counts", [[50], [7, 0, 9, 1, 12], [3] * 15])
def test_what_is_left_out_rotates_until_every_sample_was_left_out(counts):
    order = Order(counts, seed=0, lanes=8)
    left = sum(counts) - order.samples_per_epoch
    everything = {(shard, ordinal) for shard, count in enumerate(counts) for ordinal in range(count)}
    epochs = -(-sum(counts) // left)
    times = dict.fromkeys(everything, 0)
    for epoch in range(epochs):
        for sample in everything - {place[1:] for place in epoch_of(order, epoch)}:
            times[sample] += 1
    assert min(times.values()) == 1 and max(times.values()) <= 2


@pytest.mark.parametrize(("lanes", "batch"), [(8, 8), (4, 8), (16, 8), (8, 24)])
def test_every_world_size_sees_the_same_global_batches(lanes, batch):
    order = Order([20, 30, 25], seed=3, lanes=lanes)
    for step in (0, 5, 8, 9, 100):
        expected = list(range(step * batch, (step + 1) * batch))
        for world_size in (1, 2, 4):
            slots = [order.rank_slots(step, batch, rank, world_size) for rank in range(world_size)]
            assert all(len(part) == batch // world_size and np.all(np.diff(part) > 0) for part in slots)
            assert sorted(np.concatenate(slots).tolist()) == expected


@pytest.mark.parametrize(("lanes", "batch"), [(8, 8), (4, 8), (16, 8)])
def test_a_rank_keeps_its_lanes(lanes, batch):
    order = Order([100], seed=3, lanes=lanes)
    owned: list[set[int]] = [set() for _ in range(4)]
    for rank, mine in enumerate(owned):
        for step in range(40):
            mine.update((order.rank_slots(step, batch, rank, 4) % lanes).tolist())
    assert all(len(mine) == lanes // 4 for mine in owned)
    assert set.union(*owned) == set(range(lanes))


def test_batches_cross_the_end_of_an_epoch_without_a_gap():
    order = Order([10, 11], seed=0, lanes=4)  # 20 of 21 samples an epoch
    seen = [order.locate(position) for step in range(5) for position in order.rank_slots(step, 8, 0, 1).tolist()]
    assert [place.epoch for place in seen] == [0] * 20 + [1] * 20
    assert len({place[1:] for place in seen[:20]}) == len({place[1:] for place in seen[20:]}) == 20


def test_epochs_and_seeds_have_orders_of_their_own():
    def sequence(seed, epoch):
        return [place[1:] for place in epoch_of(Order([40] * 5, seed, lanes=4), epoch)]

    orders = [sequence(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]  # seed 0, epoch 1 against seed 1, epoch 0
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean([a == b for a, b in zip(one, other, strict=True)]) < 0.1


def test_a_lane_reads_each_shard_in_one_go_and_a_batch_many_shards():
    order = Order([50] * 64, seed=0, lanes=16, shards_per_block=2)
    batches = [[order.locate(p) for p in order.rank_slots(step, 16, 0, 1).tolist()] for step in range(200)]
    assert np.mean([len({place.shard for place in batch}) for batch in batches]) > 15
    for lane in range(16):
        visits = [batch[lane].shard for batch in batches]
        live = [len(set(visits[at : at + 40])) for at in range(0, 160, 40)]
        assert max(live) <= 4  # a block of two shards, and on its way into the next
        assert len(set(visits)) == 4


def test_equal_shards_are_changed_at_different_steps():
    order = Order([100] * 64, seed=0, lanes=32, shards_per_block=1)
    changes = np.zeros(199)
    for lane in range(32):
        shards = [order.locate(step * 32 + lane).shard for step in range(200)]
        changes += np.array(shards[1:]) != np.array(shards[:-1])
    assert changes.sum() >= 48 and changes.max() <= 3


def test_fewer_shards_than_lanes_still_cover_everything():
    order = Order([37], seed=0, lanes=16)
    assert len({place.ordinal for place in epoch_of(order, 3)}) == 32


def test_a_substitute_comes_from_the_block_of_the_bad_sample():
    order = Order([10] * 8, seed=0, lanes=4, shards_per_block=1)
    for position in range(80):
        bad = order.locate(position)
        stand_ins = [order.substitute(position, attempt) for attempt in range(1, 5)]
        assert all(place.shard == bad.shard and place.epoch == bad.epoch for place in stand_ins)
        assert stand_ins == [Order([10] * 8, 0, 4, 1).substitute(position, attempt) for attempt in range(1, 5)]


def test_positions_can_be_asked_for_in_any_order():
    order, other = Order([30, 40, 50], seed=9, lanes=8), Order([30, 40, 50], seed=9, lanes=8)
    positions = np.random.default_rng(0).permutation(3000).tolist()
    shuffled = {position: order.locate(position) for position in positions}
    assert [shuffled[position] for position in range(3000)] == [other.locate(position) for position in range(3000)]


def test_a_million_shards_are_opened_without_a_step_of_python_for_each():
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        place = Order(np.full(1_000_000, 5000), seed=0, lanes=256).locate(123_456_789)
    finally:
        sys.setprofile(None)
    assert isinstance(place, Place) and calls < 10_000


def test_too_few_samples_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="7 usable samples for lanes=8.*at most 7"):
        Order([3, 4], seed=0, lanes=8)


@pytest.mark.parametrize(
    ("lanes", "batch", "world_size", "message"),
    [
        (6, 8, 1, "lanes=6 and global_batch_size=8: one must be a multiple of the other. Set lanes to 8"),
        (8, 8, 3, "do not divide among world_size=3 ranks. Start on a number of ranks that divides 8"),
        (4, 8, 8, "4 lanes .* do not divide among world_size=8"),
    ],
)
def test_numbers_that_do_not_divide_are_refused_with_a_remedy(lanes, batch, world_size, message):
    with pytest.raises(ValueError, match=message):
        rank_unit(lanes, batch, world_size)


def test_negative_positions_and_foreign_ranks_are_refused():
    order = Order([10], seed=0, lanes=2)
    with pytest.raises(ValueError, match="position -1"):
        order.locate(-1)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        order.rank_slots(0, 2, 2, 2)
