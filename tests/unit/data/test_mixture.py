import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.loading.plan import continued_history, order_state, resume_position
from controlbooth.data.order.mixture import Mixture, Place, counts_before, split, turn_of
from controlbooth.data.order.order import Order

SHAPES = ((32, 32), (24, 40), (40, 24))


def make(counts, history, *, lanes=4, batch=4, seed=0, block=2):
    names = [f"source {number}" for number in range(len(counts[0]))]
    counts = [[np.asarray(shards, np.int64) for shards in row] for row in counts]
    return Mixture(
        counts, history, seed=seed, lanes=lanes, shards_per_block=block, global_batch_size=batch, names=names,
        shapes=SHAPES[: len(counts)],
    )  # fmt: skip


shares = st.lists(st.integers(0, 10**12) | st.integers(0, 5), min_size=1, max_size=5).filter(any)
lanes = st.integers(0, 10**6)


@given(shares, lanes)
def test_turns_are_dealt_in_closed_form_exactly_as_one_by_one(shares, lane):
    had = [0] * len(shares)
    for turn in range(100):
        assert counts_before(turn, shares, lane) == had
        receiver, count = split(turn, shares, lane)
        assert count == had[receiver] and turn_of(receiver, count, shares, lane) == turn
        had[receiver] += 1
    assert sum(had) == 100
    assert all(abs(count - 100 * share / sum(shares)) < len(shares) for count, share in zip(had, shares, strict=True))


@given(shares, lanes, st.integers(0, 10**15))
def test_turns_far_away_are_dealt_as_surely_as_the_first_ones(shares, lane, turn):
    receiver, count = split(turn, shares, lane)
    after = counts_before(turn, shares, lane)
    after[receiver] += 1
    assert counts_before(turn + 1, shares, lane) == after and count == after[receiver] - 1
    assert turn_of(receiver, count, shares, lane) == turn


def test_one_source_is_read_as_its_order_says():
    order, mixture = Order([5, 7, 9], 3, 4, 2), make([[[5, 7, 9]]], [(0, [21])], seed=3)
    for position in range(100):
        assert mixture.locate(position) == (*order.locate(position), 0)
        assert mixture.substitute(position, 2) == (*order.substitute(position, 2), 0)


def test_the_places_of_a_mixture_are_pinned():
    mixture = make([[[5, 6], [20]], [[0, 9], [30]]], [(0, [2, 1]), (40, [1, 1])], seed=11)
    assert [mixture.locate(p) for p in (0, 1, 2, 3, 40, 41, 1000)] == GOLDEN


GOLDEN = [
    Place(0, 1, 1, 1),
    Place(0, 1, 3, 1),
    Place(0, 2, 16, 1),
    Place(0, 1, 7, 1),
    Place(0, 2, 2, 1),
    Place(1, 1, 3, 1),
    Place(10, 2, 2, 1),
]

weightings = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=3)


@pytest.mark.slow
@given(weightings, st.sampled_from([(4, 4), (8, 4), (4, 8), (12, 4)]), st.integers(0, 2**32))
@settings(deadline=None)
def test_every_sample_is_found_at_the_positions_that_read_it_also_where_weights_change(weights, sizes, seed):
    lanes, batch = sizes
    history = [(batch * 13 * number, weight) for number, weight in enumerate(weights)]
    counts = [[[7, 6], [12, 3, 20], [14]], [[0, 15], [16, 0, 1], [13]]]
    mixture = make(counts, history, lanes=lanes, batch=batch, seed=seed)
    steps = 45
    read = {}
    for position in range(steps * batch):
        place = mixture.locate(position)
        read.setdefault(place, []).append(position)
    assert all(len(positions) == 1 for positions in read.values())  # once in each epoch of its stream
    for bucket in range(2):
        for source, shards in enumerate(counts[bucket]):
            first = [0, 2, 5][source]
            for shard, samples in enumerate(shards):
                begun = mixture.epochs_begun(steps * batch, first + shard, bucket)
                for epoch in range(begun + 1):
                    for ordinal in range(samples):
                        place = Place(epoch, first + shard, ordinal, bucket)
                        position = mixture.position_of(*place[:3], bucket)
                        known = position is not None and position < steps * batch
                        assert ([position] if known else []) == read.get(place, [])
                        assert not (epoch == begun and known)


def test_all_positions_of_a_step_have_one_shape_and_ranks_need_not_ask_each_other():
    mixture = make([[[40, 30]], [[25, 9]], [[8, 12]]], [(0, [1])], lanes=8, batch=4)
    for step in range(60):
        shapes = {
            mixture.shapes[mixture.locate(int(position)).bucket]
            for rank in range(4)
            for position in mixture.rank_slots(step, 4, rank, 4)
        }
        assert shapes == {mixture.shape(step)}


def test_shapes_and_sources_come_in_proportion_to_what_they_hold():
    mixture = make([[[600], [100]], [[200], [100]]], [(0, [800, 400])], lanes=16, batch=16)
    places = [mixture.locate(position) for position in range(1200)]
    # shard 0 has 600 + 200 samples and two thirds of the weight, shard 1 100 + 100 and the rest
    for shard, bucket, share in ((0, 0, 600), (0, 1, 200), (1, 0, 200), (1, 1, 200)):
        found = sum(place.shard == shard and place.bucket == bucket for place in places)
        assert abs(found - share) <= 32


def test_every_batch_is_close_to_the_weights_by_itself():
    mixture = make([[[1000], [1000], [1000]]], [(0, [5, 2, 1])], lanes=64, batch=64)
    for step in range(40):
        shards = [mixture.locate(step * 64 + slot).shard for slot in range(64)]
        assert all(abs(shards.count(shard) - 64 * weight / 8) <= 3 for shard, weight in enumerate((5, 2, 1)))


def test_a_change_of_weights_moves_nothing_before_it_and_resets_no_epoch():
    counts = [[[30, 30], [30, 30]]]
    before = make(counts, [(0, [3, 1])])
    after = make(counts, [(0, [3, 1]), (80, [0, 1])])
    assert [after.locate(p) for p in range(80)] == [before.locate(p) for p in range(80)]
    later = [after.locate(p) for p in range(80, 120)]
    assert {place.shard for place in later} <= {2, 3}
    assert set(later).isdisjoint(before.locate(p) for p in range(80))  # goes on in the epoch where it was


def test_a_rank_reads_lanes_that_are_its_own_in_every_stream():
    mixture = make([[[40] * 6, [40] * 6]], [(0, [1, 1])], lanes=8, batch=8, block=1)
    readers: dict[int, set] = {}
    for step in range(60):
        for rank in range(4):
            for position in mixture.rank_slots(step, 8, rank, 4).tolist():
                place = mixture.locate(position)
                if place.epoch == 0:
                    readers.setdefault(place.shard, set()).add(rank)
    assert all(len(ranks) <= 3 for ranks in readers.values())  # a shard of 40 may lie across 60 / 30 lanes and ranks


def test_what_is_read_next_is_among_the_blocks_to_come():
    mixture = make([[[10] * 6, [12] * 5], [[9] * 6, [7] * 5]], [(0, [2, 1])], lanes=8, batch=4, block=1)
    for step in (0, 17, 40):
        slots = mixture.rank_slots(0, 4, 1, 2)
        blocks = mixture.upcoming_blocks(step, slots)
        now = {shard for when, shards in blocks for shard in shards}
        for ahead in range(2):
            for position in mixture.rank_slots(step + ahead, 4, 1, 2).tolist():
                assert mixture.locate(position).shard in now
        assert all(when >= 0 for when, _ in blocks)


@pytest.mark.parametrize(
    ("counts", "history", "message"),
    [
        ([[[9], [3]]], [(0, [1, 1])], "source 1: the data set has 3 usable samples for lanes=4"),
        ([[[9], [9]]], [(0, [1])], r"weights \[1\] from position 0 on must be one for each of the 2 sources"),
        ([[[9], [9]]], [(0, [0, 0])], "one positive"),
        ([[[9], [9]]], [(0, [1, 1]), (6, [1, 2])], "position 6, in the middle of a batch of 4"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(counts, history, message):
    with pytest.raises(ValueError, match=message):
        make(counts, history)


def test_positions_below_zero_are_refused():
    with pytest.raises(ValueError, match="position -1"):
        make([[[10]]], [(0, [1])]).locate(-1)


def test_a_saved_order_goes_on_at_its_position():
    order = make([[[10, 20]]], [(0, [30])], seed=1)
    assert resume_position(order_state(order, "abc", 120), make([[[10, 20]]], [(0, [30])], seed=1), "abc") == 120


@pytest.mark.parametrize(
    ("changed", "fingerprint", "message"),
    [
        (dict(seed=2), "abc", "seed=1, this run has 2.*set the seed back"),
        (dict(seed=1, lanes=8), "abc", "lanes=4, this run has 8"),
        (dict(seed=1, block=3), "abc", "shards_per_block=2"),
        (dict(seed=1), "abd", "dataset_fingerprint='abc'.*start a new run from these weights"),
    ],
)
def test_a_changed_order_is_refused(changed, fingerprint, message):
    state = order_state(make([[[10, 20]]], [(0, [30])], seed=1), "abc", 120)
    with pytest.raises(ValueError, match=message):
        resume_position(state, make([[[10, 20]]], [(0, [30])], **changed), fingerprint)


def test_an_order_whose_prompts_were_dropped_by_names_is_refused_with_what_to_do():
    state = order_state(make([[[10, 20]]], [(0, [30])], seed=1), "abc", 120) | {"version": 2}
    with pytest.raises(ValueError, match="version 2, .* by version 3: .* by the names.*model.controlnet=CHECKPOINT"):
        resume_position(state, make([[[10, 20]]], [(0, [30])], seed=1), "abc")


def test_other_shapes_are_refused():
    state = order_state(make([[[10]], [[20]]], [(0, [30])]), "abc", 120)
    with pytest.raises(ValueError, match="set resolution and max_aspect_ratio back"):
        resume_position(state, make([[[30]]], [(0, [30])]), "abc")


def test_weights_that_change_between_two_starts_are_recorded_from_there_on():
    assert continued_history(None, [2, 1]) == [(0, [2, 1])]
    state = order_state(make([[[30], [30]]], [(0, [2, 1])]), "abc", 120)
    assert continued_history(state, [2, 1]) == [(0, [2, 1])]
    changed = continued_history(state, [1, 1])
    assert changed == [(0, [2, 1]), (120, [1, 1])]
    order = make([[[30], [30]]], changed)
    assert resume_position(state, order, "abc") == 120
    again = order_state(order, "abc", 120)  # started, and stopped before a step
    assert continued_history(again, [3, 1]) == [(0, [2, 1]), (120, [3, 1])]
    assert resume_position(again, make([[[30], [30]]], continued_history(again, [3, 1])), "abc") == 120


def test_an_order_that_forgets_earlier_weights_is_refused():
    state = order_state(make([[[30], [30]]], [(0, [2, 1]), (40, [1, 1])]), "abc", 120)
    with pytest.raises(ValueError, match="forgets the weights"):
        resume_position(state, make([[[30], [30]]], [(0, [1, 1])]), "abc")
