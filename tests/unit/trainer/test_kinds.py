import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.data.scenes.render import LANDMARK_COLOURS, draw_landmarks, render, scene
from controlbooth.trainer.evaluation.kinds import (
    AGREEMENT,
    LOWER_IS_BETTER,
    agreement,
    depth_agreement,
    normals_angle,
    points_of,
)


def miou(found, given):
    return agreement("segmentation", found, given)["segmentation_miou"]


def poses(found, given):
    return tuple(agreement("keypoints", found, given).values())


SCENES = [render(scene(5, number)) for number in range(6)]


def test_a_condition_that_asks_for_nothing_is_not_obeyed_by_doing_nothing():
    for kind in AGREEMENT:
        nothing = np.zeros((32, 32, 3) if kind in ("normals", "keypoints", "pose") else (32, 32), np.uint8)
        for name, value in agreement(kind, nothing, nothing).items():
            assert name in LOWER_IS_BETTER or value == 0.0


@pytest.mark.parametrize("kind", ["segmentation", "depth", "normals", "keypoints"])
def test_a_condition_agrees_with_itself_more_than_with_that_of_another_scene(kind):
    for one, other in zip(SCENES, SCENES[1:], strict=False):
        same = agreement(kind, getattr(one, kind), getattr(one, kind))
        different = agreement(kind, getattr(other, kind), getattr(one, kind))
        for name, value in same.items():
            best = 0.0 if name in LOWER_IS_BETTER else 1.0
            assert value == pytest.approx(best, abs=1e-3)
            assert abs(different[name] - best) > abs(value - best) + 0.01


def test_mean_iou_is_over_classes_and_not_over_pixels():
    given = np.zeros((10, 10), np.uint8)
    given[:, 9] = 3  # a tenth of the picture
    found = np.zeros((10, 10), np.uint8)
    assert miou(found, given) == 0.0  # the background's .9 is what chance gives
    found[:5, 9] = 3
    background, by_chance = 90 / 95, 0.95 * 0.9 / (0.95 + 0.9 - 0.95 * 0.9)
    small, its_chance = 5 / 10, 0.05 * 0.1 / (0.05 + 0.1 - 0.05 * 0.1)
    expected = (background - by_chance) / (1 - by_chance), (small - its_chance) / (1 - its_chance)
    assert miou(found, given) == pytest.approx(np.mean(expected))
    coloured = np.zeros((10, 10, 3), np.uint8)
    coloured[:, 9] = (0, 128, 0)
    assert miou(coloured, coloured) == 1.0
    assert miou(given, np.repeat(given[..., None], 3, axis=2)) == 1.0  # levels, and the grays that they are drawn as


@given(st.floats(0.3, 2.0), st.floats(-20.0, 20.0))
def test_depth_is_compared_up_to_scale_and_shift(scale, shift):
    given = np.linspace(60, 120, 64).reshape(8, 8)
    found = np.clip(given * scale + shift, 0, 255)
    error, share = depth_agreement(found.astype(np.uint8), given.astype(np.uint8))
    assert error < 0.01 and share == 1.0


def test_depth_the_wrong_way_round_is_no_better_than_a_plane():
    given = np.linspace(60, 240, 64).reshape(8, 8).astype(np.uint8)
    plane = depth_agreement(np.full((8, 8), 7, np.uint8), given)
    assert depth_agreement(255 - given, given) == plane == (pytest.approx(given.std() / 255), 0.0)


def test_an_estimate_without_any_relation_has_the_error_of_a_constant():
    given = np.tile(np.array([50, 200], np.uint8), (8, 4))
    error, _ = depth_agreement(np.full((8, 8), 7, np.uint8), given)
    assert error == pytest.approx(75 / 255, abs=1e-6)


def test_normals_are_compared_in_degrees():
    forward = np.full((4, 4, 3), (127.5, 127.5, 255), np.float64).round().astype(np.uint8)
    right = np.full((4, 4, 3), (255, 127.5, 127.5), np.float64).round().astype(np.uint8)
    assert normals_angle(forward, forward) == pytest.approx(0.0, abs=1e-3)
    assert normals_angle(right, forward) == pytest.approx(90.0, abs=1.0)


def test_key_points_are_found_in_a_drawing_at_their_places():
    points = [np.array([[10.0 + 8 * number, 20.0]]) for number in range(len(LANDMARK_COLOURS))]
    found = points_of(draw_landmarks(points, 64))
    assert sorted(found) == list(range(5))
    assert all(np.allclose(found[number], points[number], atol=0.6) for number in found)


def test_a_key_point_counts_by_its_own_kind_and_its_distance():
    truth = [np.array([[10.0 + 10 * number, 30.0]]) for number in range(5)]
    given = draw_landmarks(truth, 64)
    swapped = draw_landmarks([truth[1], truth[0], *truth[2:]], 64)
    share, similarity = poses(swapped, given)
    assert share == pytest.approx(0.6) and similarity < 0.7
    near = draw_landmarks([point + np.array([2.0, 0.0]) for point in truth], 64)
    far = draw_landmarks([point + np.array([0.0, 5.0]) for point in truth], 64)
    assert poses(near, given)[0] == 1.0 and poses(far, given)[0] == 0.0
    assert poses(np.zeros_like(given), given) == (0.0, 0.0)
    assert poses(np.zeros_like(given), np.zeros_like(given)) == (0.0, 0.0)  # which asks for nothing
