import numpy as np
import pytest

from controlbooth.data.conditions import CONDITIONS, canny, canny_random
from controlbooth.data.scenes import render, scene

PICTURE = render(scene(0, 3), 96).image


@pytest.mark.parametrize("kind", CONDITIONS)
def test_every_condition_has_the_size_of_its_image_and_is_repeatable(kind):
    condition = CONDITIONS[kind](PICTURE)
    assert condition.dtype == np.uint8 and condition.shape[:2] == (96, 96) and condition.std() > 0
    assert condition.ndim == 2 or condition.shape[2] == 3
    assert np.array_equal(condition, CONDITIONS[kind](PICTURE.copy()))


def test_canny_finds_the_edges_of_the_scene_and_nothing_on_a_plain_image():
    edges = canny(PICTURE)
    assert set(np.unique(edges)) == {0, 255}
    exact = render(scene(0, 3), 96).edges > 0
    near = np.pad(exact, 2)
    near = np.any([np.roll(near, (dy, dx), (0, 1)) for dy in (-2, -1, 0, 1, 2) for dx in (-2, -1, 0, 1, 2)], axis=0)
    assert (near[2:-2, 2:-2] & (edges > 0)).sum() > 0.8 * (edges > 0).sum() > 50
    assert not canny(np.full((20, 20, 3), 77, np.uint8)).any()


def test_random_thresholds_are_those_of_the_sample():
    noisy = np.clip(PICTURE + np.random.default_rng(0).normal(0, 30, PICTURE.shape), 0, 255).astype(np.uint8)
    counts = [int((canny_random(noisy, sample_hash) > 0).sum()) for sample_hash in range(20)]
    assert counts == [int((canny_random(noisy, sample_hash) > 0).sum()) for sample_hash in range(20)]
    assert len(set(counts)) > 15 and max(counts) > 1.5 * min(counts)
