import cv2
import numpy as np
import pytest

from controlbooth.data.condition_names import COMPUTABLE
from controlbooth.data.conditions.functions import CONDITIONS, canny, canny_random, lineart, lines, scribble, soft_edges
from controlbooth.data.scenes.render import render, scene

PICTURE = render(scene(0, 3), 96).image


@pytest.mark.parametrize("kind", CONDITIONS)
def test_every_condition_has_the_size_of_its_image_and_is_repeatable(kind):
    condition = CONDITIONS[kind](PICTURE)
    assert condition.dtype == np.uint8 and condition.shape[:2] == (96, 96) and condition.std() > 0
    assert condition.ndim == 2 or condition.shape[2] == 3
    assert np.array_equal(condition, CONDITIONS[kind](PICTURE.copy()))


def test_the_kinds_that_a_configuration_may_name_are_those_that_are_made():
    assert tuple(CONDITIONS) == COMPUTABLE


def test_canny_finds_the_edges_of_the_scene_and_nothing_on_a_plain_image():
    edges = canny(PICTURE)
    assert set(np.unique(edges)) == {0, 255}
    exact = render(scene(0, 3), 96).edges > 0
    near = np.pad(exact, 2)
    near = np.any([np.roll(near, (dy, dx), (0, 1)) for dy in (-2, -1, 0, 1, 2) for dx in (-2, -1, 0, 1, 2)], axis=0)
    assert (near[2:-2, 2:-2] & (edges > 0)).sum() > 0.8 * (edges > 0).sum() > 50
    assert not canny(np.full((20, 20, 3), 77, np.uint8)).any()


def near(mask, radius):
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)) > 0


@pytest.mark.parametrize("kind", ["soft_edges", "scribble", "lineart", "lines"])
def test_drawings_lie_on_the_edges_of_the_scene_and_a_plain_image_has_none(kind):
    drawn = render(scene(0, 3), 256)
    strong = CONDITIONS[kind](drawn.image) > 127
    assert strong.sum() > 200 and (strong & near(drawn.edges > 0, 5)).sum() > 0.85 * strong.sum()
    assert not CONDITIONS[kind](np.full((64, 80, 3), 77, np.uint8)).any()


def test_soft_edges_are_weak_in_texture_and_strong_at_outlines():
    picture = np.full((200, 200, 3), 60, np.uint8)
    picture[:, 100:] = 180
    picture[20:60, 20:60] += np.random.default_rng(0).integers(0, 60, (40, 40, 3), dtype=np.uint8)
    edges = soft_edges(picture)
    assert edges[:, 98:102].max(axis=1).min() > 200
    assert edges[24:56, 24:56].mean() < 0.4 * edges[:, 99:101].mean()
    assert len(np.unique(edges)) > 50  # a strength, and not a mask


def test_scribbles_are_simpler_than_edges_and_vary_with_the_hash():
    picture = render(scene(0, 3), 256).image
    drawings = [scribble(picture, sample_hash) for sample_hash in range(12)]
    assert all(set(np.unique(drawing)) == {0, 255} for drawing in drawings)
    assert len({drawing.tobytes() for drawing in drawings}) == 12
    inked = [int((drawing > 0).sum()) for drawing in drawings]
    assert max(inked) > 1.4 * min(inked)
    assert np.array_equal(drawings[5], scribble(picture, 5))


def test_lines_find_a_straight_edge_and_pass_over_short_ones():
    picture = np.zeros((200, 200, 3), np.uint8)
    cv2.line(picture, (20, 30), (180, 130), (255, 255, 255), 5)
    long = lines(picture) > 0
    expected = np.zeros((200, 200), np.uint8)
    cv2.line(expected, (20, 30), (180, 130), 255, 5)
    assert (long & ~near(expected > 0, 3)).sum() == 0 and (near(long, 4) & (expected > 0)).sum() > 0.95 * (
        expected > 0
    ).sum()
    dots = np.zeros((200, 200, 3), np.uint8)
    dots[::20, ::20] = 255
    assert not lines(dots).any()


def test_lineart_draws_dark_strokes_on_light_and_light_paper_stays_empty():
    picture = np.full((200, 200, 3), 230, np.uint8)
    cv2.circle(picture, (100, 100), 60, (20, 20, 20), 2)
    drawing = lineart(picture)
    ring = np.zeros((200, 200), np.uint8)
    cv2.circle(ring, (100, 100), 60, 255, 2)
    assert drawing[ring > 0].mean() > 200 and not drawing[~near(ring > 0, 6)].any()


def test_random_thresholds_are_those_of_the_sample():
    noisy = np.clip(PICTURE + np.random.default_rng(0).normal(0, 30, PICTURE.shape), 0, 255).astype(np.uint8)
    counts = [int((canny_random(noisy, sample_hash) > 0).sum()) for sample_hash in range(20)]
    assert counts == [int((canny_random(noisy, sample_hash) > 0).sum()) for sample_hash in range(20)]
    assert len(set(counts)) > 15 and max(counts) > 1.5 * min(counts)
