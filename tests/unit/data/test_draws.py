import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.order import draws

POSITIONS = np.array([0, 1, 2, 1000, 2**40])


def test_hash64_is_pinned():
    assert draws.hash64() == 0xB4B2797457A0A6E4  # blake2b-64 of nothing
    assert draws.hash64(0) == 0x8AE5DCCBD53130EE
    assert draws.hash64(0, 1, "shards") == 0x6D3E4C74A5FD0042
    assert draws.hash64("a key") == 0x2DDA7247AE6BF97E


PARTS = st.lists(st.integers(-3, 300) | st.sampled_from(["", "a", "aa", "1", "\0"]), max_size=3)


@given(PARTS, PARTS)
@settings(max_examples=100, deadline=None)
def test_hash64_tells_all_lists_of_parts_apart(parts, others):
    assert (draws.hash64(*parts) == draws.hash64(*others)) == (parts == others)


def test_hash64_separates_what_joins_to_the_same_text():
    assert draws.hash64("a", "bc") != draws.hash64("ab", "c")
    assert draws.hash64(1) != draws.hash64("1")
    assert draws.hash64(1, 2) != draws.hash64(2, 1)


def test_hash64_refuses_floats_rather_than_rounding_them():
    with pytest.raises(TypeError):
        draws.hash64(0.5)  # type: ignore[arg-type]


def test_splitmix64_matches_the_reference_stream():
    # first outputs of splitmix64.c (Vigna) seeded with 1234567: state advances by the golden gamma before each output
    state = (1234567 + 0x9E3779B97F4A7C15 * np.arange(4, dtype=object)) % 2**64
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert draws.splitmix64(state.astype(np.uint64)).tolist() == expected


@pytest.mark.parametrize("count", sorted({n for k in (0, 1, 2, 3, 8, 16) for n in (2**k - 1, 2**k, 2**k + 1)}))
def test_permutation_is_a_bijection_around_powers_of_two(count):
    assert np.array_equal(np.sort(draws.permutation(7, count)), np.arange(count))


def test_permutation_is_pinned():
    assert draws.permutation(draws.hash64(0, 0, "shards"), 10).tolist() == [2, 5, 7, 1, 9, 6, 3, 4, 0, 8]


def test_every_draw_is_pinned():
    slack = np.full((5, 2), [7, 100])
    assert draws.flips(0, POSITIONS).tolist() == [False, False, True, True, False]
    assert draws.crops(0, POSITIONS, slack).tolist() == [[7, 83], [1, 72], [7, 16], [5, 59], [7, 85]]
    assert draws.caption_choice(0, POSITIONS, np.array([1, 2, 3, 4, 5])).tolist() == [0, 1, 0, 0, 4]
    assert draws.timesteps(0, POSITIONS, 1000).tolist() == [625, 424, 971, 209, 326]
    assert draws.prompt_dropped(0, POSITIONS, 0.5).tolist() == [True, False, False, True, True]
    noise = draws.noise(0, POSITIONS, (4, 2, 2))
    first = np.array([0.6681903, -0.2814019, 0.8694102, 1.32407, -1.6178088])
    assert np.abs(noise[:, 0, 0, 0] - first).max() < 1e-6
    assert draws.noise_hash(noise) == "d7c033af8d43ecb5"


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=8), st.integers(0, 2**62))
@settings(max_examples=25, deadline=None)
def test_a_row_depends_on_its_own_position_only(positions, seed):
    together = draws.noise(seed, np.array(positions), (2, 3))
    timesteps = draws.timesteps(seed, np.array(positions), 1000)
    for row, position in enumerate(positions):
        alone = np.array([position])
        assert np.array_equal(together[row], draws.noise(seed, alone, (2, 3))[0])
        assert timesteps[row] == draws.timesteps(seed, alone, 1000)[0]


def test_noise_is_standard_normal_and_uncorrelated_between_positions():
    noise = draws.noise(3, np.arange(200), (4, 8, 8)).reshape(200, -1)
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    correlation = np.corrcoef(noise)
    assert np.abs(correlation - np.eye(200)).max() < 0.35  # 256 values: 5.5 standard deviations


def test_noise_differs_between_seeds_positions_and_epochs():
    rows = np.concatenate([draws.noise(seed, np.arange(50), (4,)) for seed in (0, 1, 2)])
    assert len(np.unique(rows[:, 0])) == 150


def test_timesteps_reach_both_ends_evenly():
    drawn = draws.timesteps(0, np.arange(100_000), 10)
    assert np.abs(np.bincount(drawn, minlength=10) / 10_000 - 1).max() < 0.05


def test_crops_reach_both_ends_and_stay_inside():
    drawn = draws.crops(0, np.arange(1000), np.tile([[3, 0]], (1000, 1)))
    assert set(drawn[:, 0].tolist()) == {0, 1, 2, 3} and set(drawn[:, 1].tolist()) == {0}


def test_purposes_do_not_share_their_bits():
    positions = np.arange(10_000)
    late = draws.timesteps(0, positions, 1000) >= 500
    agreement = (draws.flips(0, positions) == late).mean()
    assert abs(agreement - 0.5) < 0.025


MANY = np.arange(20_000)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_dropout_rate_is_within_the_binomial_bound(rate):
    for run in range(3):
        dropped = draws.prompt_dropped(11, MANY + run * len(MANY), rate).sum()
        bound = 4.5 * (len(MANY) * rate * (1 - rate)) ** 0.5
        assert abs(dropped - rate * len(MANY)) < bound


def test_dropout_rates_zero_and_one_are_exact():
    extreme = np.concatenate([MANY, [2**62]])
    assert not draws.prompt_dropped(0, extreme, 0.0).any()
    assert draws.prompt_dropped(0, extreme, 1.0).all()


def test_dropout_is_new_at_each_position_and_with_each_seed():
    patterns = [draws.prompt_dropped(seed, MANY + first, 0.5) for seed in (0, 1) for first in (0, len(MANY))]
    for i, one in enumerate(patterns):
        for other in patterns[:i]:
            assert abs((one == other).mean() - 0.5) < 0.02


def draws_of_steps(seed, batch, steps):
    """name -> (steps, batch) draws of all purposes, each with mean 0 and variance 1."""
    positions = np.arange(batch * steps)
    crops = draws.crops(seed, positions, np.full((len(positions), 2), 1000))
    found = {
        "dropout": 2.0 * draws.prompt_dropped(seed, positions, 0.5) - 1,
        "flip": 2.0 * draws.flips(seed, positions) - 1,
        "timestep": (draws.timesteps(seed, positions, 1000) - 499.5) / 1000 * 12**0.5,
        "row": (crops[:, 0] - 500) / 1001 * 12**0.5,
        "column": (crops[:, 1] - 500) / 1001 * 12**0.5,
        "caption": (draws.caption_choice(seed, positions, np.full(len(positions), 5)) - 2) / 2**0.5,
        "condition": (draws.conditions(seed, positions) / 2.0**64 - 0.5) * 12**0.5,
    }
    return {name: values.reshape(steps, batch) for name, values in found.items()}


@given(st.integers(0, 2**62), st.sampled_from([2, 16, 32, 256]))
@settings(max_examples=25, deadline=None)
def test_samples_of_a_step_draw_independently_of_each_other(seed, batch):
    """The sum over a step has the variance of independent draws: equal ones would have `batch` times that."""
    steps = 400
    for name, values in draws_of_steps(seed, batch, steps).items():
        spread = (values.sum(axis=1) ** 2).mean() / batch
        assert abs(spread - 1) < 6 * (2 / steps) ** 0.5, name


@given(st.integers(0, 2**62))
@settings(max_examples=25, deadline=None)
def test_what_is_drawn_for_one_purpose_tells_nothing_about_another(seed):
    found = [values.ravel() for values in draws_of_steps(seed, 32, 200).values()]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert abs((one * other).mean()) < 6 / len(one) ** 0.5


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match="use a number from 0 to 1"):
        draws.prompt_dropped(0, POSITIONS, rate)


def test_no_timesteps_are_refused():
    with pytest.raises(ValueError, match="num_train_timesteps is 0"):
        draws.timesteps(0, POSITIONS, 0)


def test_noise_hash_tells_values_and_shapes_apart():
    noise = draws.noise(0, POSITIONS, (4,))
    assert draws.noise_hash(noise) == draws.noise_hash(noise.copy())
    assert draws.noise_hash(noise) != draws.noise_hash(noise.reshape(4, 5))
    assert draws.noise_hash(noise) != draws.noise_hash(np.nextafter(noise, 9))
