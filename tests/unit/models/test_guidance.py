"""The published schedules, number by number."""

import numpy as np
import pytest

from controlbooth.models.control_schedules import SCHEDULES, weights_of

SD15 = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 4


def test_the_thirteen_numbers_of_stable_diffusion_are_the_published_ones():
    assert weights_of("uniform", SD15) == [1.0] * 13
    assert weights_of("resolution", SD15) == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8]
    assert weights_of("resolution/8", SD15) == [1 / 8] * 3 + [1 / 4] * 3 + [1 / 2] * 3 + [1.0] * 4
    np.testing.assert_allclose(weights_of("0.825", SD15), [0.825 ** (12 - i) for i in range(13)])
    np.testing.assert_allclose(weights_of("logspace", SD15), np.logspace(-1, 0, 13))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_do_not_fall_with_depth_at_any_size(schedule):
    for heights in (SD15, [2 * h for h in SD15], [8, 8, 4, 4, 2, 2], [8]):
        weights = weights_of(schedule, heights)
        assert len(weights) == len(heights) and weights == sorted(weights)


def test_an_unknown_schedule_names_those_there_are():
    with pytest.raises(ValueError, match="Use uniform, resolution, resolution/8, 0.825, logspace"):
        weights_of("cosine", SD15)
