import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.data.scenes.render import HELD_OUT_SEED, render, scene
from controlbooth.trainer.evaluation.control import control_fidelity, edge_f1, edge_map, line_map, mask_iou, object_mask
from controlbooth.trainer.evaluation.drawing import disc_baseline
from controlbooth.trainer.evaluation.grids import draw_grid


def held_out(count):
    scenes = [scene(HELD_OUT_SEED, i) for i in range(count)]
    return scenes, [render(what) for what in scenes]


def test_real_pictures_reach_the_top_and_discs_stay_below_on_outlines():
    scenes, real = held_out(64)
    edges = np.stack([r.edges for r in real])
    segmentation = np.stack([r.segmentation for r in real])
    figures = control_fidelity(np.stack([r.image for r in real]), edges, segmentation)
    assert figures["mask_iou"].mean() > 0.97
    assert figures["edge_f1"].mean() > 0.93
    round_ones = control_fidelity(
        np.stack([render(disc_baseline(what, 64)).image for what in scenes]), edges, segmentation
    )
    assert 0.7 < round_ones["mask_iou"].mean() < 0.86
    assert round_ones["edge_f1"].mean() < figures["edge_f1"].mean() - 0.15


def test_pictures_of_other_scenes_score_low():
    _, real = held_out(40)
    images = np.stack([r.image for r in real])
    shifted = control_fidelity(
        np.roll(images, 1, axis=0), np.stack([r.edges for r in real]), np.stack([r.segmentation for r in real])
    )
    assert shifted["mask_iou"].mean() < 0.35
    assert shifted["edge_f1"].mean() < 0.15


def test_edge_f1_by_hand():
    given = np.zeros((8, 8), bool)
    given[4, :] = True
    moved, far = np.roll(given, 1, axis=0), np.roll(given, 3, axis=0)
    assert edge_f1(given, given) == edge_f1(moved, given) == 1.0  # one pixel of tolerance
    assert edge_f1(far, given) == 0.0
    half = given.copy()
    half[4, 4:] = False  # all found edges are true; 5 of 8 given ones have a found one within a pixel
    by_chance = 15 / 64  # what lies within a pixel of the found ones
    recall = (5 / 8 - by_chance) / (1 - by_chance)
    assert np.isclose(edge_f1(half, given), 2 * recall / (1 + recall))
    nothing, everything = np.zeros_like(given), np.ones_like(given)
    for one in (nothing, everything):  # which agree with whatever is given, or with nothing
        assert edge_f1(one, one) == edge_f1(one, given) == edge_f1(given, one) == 0.0


@given(st.integers(0, 2**32 - 1))
def test_without_a_tolerance_edge_f1_is_cohens_kappa(seed):
    draw = np.random.default_rng(seed)
    found, given = (draw.random((16, 16)) < share for share in draw.uniform(0.1, 0.9, 2))
    given |= found & (draw.random((16, 16)) < 0.5)
    agree, a, b = (found == given).mean(), found.mean(), given.mean()
    by_chance = a * b + (1 - a) * (1 - b)
    assert edge_f1(found, given, tolerance=0) == pytest.approx(max(0.0, (agree - by_chance) / (1 - by_chance)))


@pytest.mark.parametrize("dense", [0.02, 0.1, 0.2, 0.3])
def test_scattered_edges_score_near_nothing_however_dense_they_are(dense):
    _, real = held_out(16)
    draw = np.random.default_rng(0)
    scores = [edge_f1(draw.random((64, 64)) < dense, line_map(one.edges)) for one in real]
    assert np.mean(scores) < 0.03


def test_more_obedient_pictures_score_higher():
    scenes, real = held_out(24)
    lines = [line_map(one.edges) for one in real]

    def score(pictures):
        return np.mean([edge_f1(edge_map(one), given) for one, given in zip(pictures, lines, strict=True)])

    images = np.stack([one.image for one in real])
    moved = [score(np.roll(images, (shift, shift), axis=(1, 2))) for shift in (0, 2, 3, 5)]
    assert moved == sorted(moved, reverse=True) and moved[0] > 0.9 and moved[-1] < 0.3
    mixed = [np.concatenate([images[:, :, :column], images[::-1, :, column:]], axis=2) for column in (64, 40, 24, 0)]
    assert sorted((score(one) for one in mixed), reverse=True) == [score(one) for one in mixed]


def test_lines_are_compared_one_pixel_wide_however_thick_or_dim_they_are_drawn():
    _, real = held_out(8)
    for one in real:
        thin = line_map(one.edges)
        assert np.array_equal(line_map((thin * 90).astype(np.uint8)), thin)
        thick = line_map(cv2.dilate(thin.astype(np.uint8) * 255, np.ones((3, 3), np.uint8)))
        assert thick.mean() < 1.6 * thin.mean() and edge_f1(thick, thin) > 0.9
    assert not line_map(np.zeros((8, 8), np.uint8)).any()


def test_edges_between_colours_of_equal_brightness_are_seen():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = (120, 0, 0)
    image[:, 8:] = (0, 61, 0)  # the same gray value
    assert edge_map(image)[4:12, 7:9].any(axis=1).all()


def test_masks_of_nothing_score_nothing_and_a_plain_picture_has_none():
    assert mask_iou(np.zeros((4, 4), bool), np.zeros((4, 4), bool)) == 0.0
    assert not object_mask(np.full((64, 64, 3), 90, np.uint8)).any()


def test_grid_is_written_whole_with_a_tile_for_each_picture(tmp_path):
    from PIL import Image

    _, real = held_out(2)
    pictures = np.stack([r.image for r in real])
    draw_grid(tmp_path / "grid.png", {"condition": pictures, "target": pictures}, ["a caption", "another " * 30])
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 2 * 160 and image.height > 2 * 160
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
