import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.trainer.evaluate.convergence import USUAL_STEPS, describe, find_convergence


def curve(values, every=50):
    return {number * every: value for number, value in enumerate(values)}


def test_the_step_of_sudden_convergence_is_the_first_one_at_the_new_level():
    found = find_convergence(curve([0.31, 0.32, 0.64, 0.76, 0.80, 0.82, 0.83]))
    assert found is not None and (found.after, found.step) == (50, 100)
    assert found.confidence > 0.9 and found.rise > 0.25


@pytest.mark.parametrize(
    "values",
    [
        [0.3] * 10,
        [0.3, 0.4, 0.5, 0.6, 0.7, 0.8],  # learns, and not suddenly
        [0.3, 0.3, 0.6, 0.3, 0.3, 0.3],  # one lucky validation
        [0.8, 0.8, 0.8, 0.3, 0.3, 0.3],  # what was lost
        [0.30, 0.30, 0.31, 0.38, 0.39, 0.39],  # a step, and too low a one
        [0.31, 0.32, 0.64],  # it may be a lucky one yet
        [],
    ],
)
def test_other_curves_have_no_such_step(values):
    assert find_convergence(curve(values)) is None


@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.floats(0.2, 0.6), st.sampled_from([0.0, 0.01, 0.02]))
def test_a_jump_is_found_at_its_step_under_noise(place, seed, height, noise):
    places = np.arange(16)
    clean = 0.25 + height * (places >= place) * (1 - 0.2 * np.exp(-np.maximum(places - place, 0) / 2))
    values = clean + noise * np.random.default_rng(seed).standard_normal(16)
    found = find_convergence(curve(values.tolist()))
    assert found is not None and abs(found.step - 50 * place) <= 50


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 0.02, 0.03]), st.integers(3, 60))
def test_noise_is_never_taken_for_convergence(seed, noise, count):
    values = 0.3 + noise * np.random.default_rng(seed).standard_normal(count)
    assert find_convergence(curve(values.tolist())) is None


@given(st.lists(st.floats(0.0, 1.0), max_size=30), st.integers(1, 1000))
def test_any_curve_is_taken_and_the_step_is_one_of_its_own(values, every):
    found = find_convergence(curve(values, every))
    if found:
        assert found.step in curve(values, every) and found.step - found.after == every
        assert 0.5 <= found.confidence <= 1.0 + 1e-9 and found.rise >= 0.15


def test_where_no_figure_tells_control_that_is_said_and_not_that_it_has_not_come():
    told = describe(None, [])
    assert "no validation has a figure that tells control of this kind" in told and "step" not in told


def test_a_run_past_the_usual_range_is_told_what_to_look_at():
    assert "usually" not in describe(None, [0, 50])
    assert "usually has by step 10,000" in describe(None, [USUAL_STEPS + 1000])
