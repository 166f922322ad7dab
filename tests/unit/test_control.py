import numpy as np

from controlbooth.data.scenes import HELD_OUT_SEED, render, scene
from controlbooth.trainer.evaluate.control import control_fidelity, edge_f1, edge_map, mask_iou, object_mask
from controlbooth.trainer.evaluate.evaluate import discs
from controlbooth.trainer.evaluate.grids import draw_grid


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
    round_ones = control_fidelity(np.stack([render(discs(what, 64)).image for what in scenes]), edges, segmentation)
    assert 0.7 < round_ones["mask_iou"].mean() < 0.86
    assert round_ones["edge_f1"].mean() < figures["edge_f1"].mean() - 0.15


def test_pictures_of_other_scenes_score_low():
    _, real = held_out(40)
    images = np.stack([r.image for r in real])
    shifted = control_fidelity(
        np.roll(images, 1, axis=0), np.stack([r.edges for r in real]), np.stack([r.segmentation for r in real])
    )
    assert shifted["mask_iou"].mean() < 0.35
    assert shifted["edge_f1"].mean() < 0.45


def test_edge_f1_by_hand():
    given = np.zeros((8, 8), bool)
    given[4, :] = True
    moved, far = np.roll(given, 1, axis=0), np.roll(given, 3, axis=0)
    assert edge_f1(given, given) == edge_f1(moved, given) == 1.0  # one pixel of tolerance
    assert edge_f1(far, given) == 0.0
    half = given.copy()
    half[4, 4:] = False  # all found edges are true; 5 of 8 given ones have a found one within a pixel
    assert np.isclose(edge_f1(half, given), 2 * (5 / 8) / (1 + 5 / 8))
    nothing = np.zeros_like(given)
    assert edge_f1(nothing, nothing) == 1.0 and edge_f1(nothing, given) == 0.0


def test_edges_between_colours_of_equal_brightness_are_seen():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = (120, 0, 0)
    image[:, 8:] = (0, 61, 0)  # the same gray value
    assert edge_map(image)[4:12, 7:9].any(axis=1).all()


def test_masks_of_nothing_agree_and_a_plain_picture_has_none():
    assert mask_iou(np.zeros((4, 4), bool), np.zeros((4, 4), bool)) == 1.0
    assert not object_mask(np.full((64, 64, 3), 90, np.uint8)).any()


def test_grid_is_written_whole_with_a_tile_for_each_picture(tmp_path):
    from PIL import Image

    _, real = held_out(2)
    pictures = np.stack([r.image for r in real])
    draw_grid(tmp_path / "grid.png", {"condition": pictures, "target": pictures}, ["a caption", "another " * 30])
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 2 * 160 and image.height > 2 * 160
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
