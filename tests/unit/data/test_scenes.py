import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.scenes.render import CLASSES, COLOURS, HELD_OUT_SEED, boundaries, render, scene


def digest(array):
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def test_a_scene_is_a_function_of_seed_and_index_and_pinned():
    assert scene(0, 7) == scene(0, 7)
    assert scene(0, 7) != scene(0, 8) != scene(1, 8)
    assert [scene(0, i).caption for i in (0, 1, 11)] == [
        "a large blue star and a small gray star on a yellow and white background",
        "a small black fish on a blue background",
        "a large yellow star on a green and red background",
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**40))
def test_conditions_are_exact_about_the_same_picture(seed, index):
    what = scene(seed, index)
    rendering = render(what)
    assert rendering.image.shape == rendering.normals.shape == rendering.keypoints.shape == (64, 64, 3)
    shown = {int(v) for v in np.unique(rendering.segmentation)} - {0}
    assert shown == {list(CLASSES).index(thing.class_name) + 1 for thing in what.objects}
    assert set(np.unique(rendering.edges)) <= {0, 255}
    outline = boundaries(rendering.instances) > 0
    assert (rendering.edges[outline] == 255).all()  # every object's outline is an edge
    there = rendering.instances > 0
    assert rendering.depth[there].min() > rendering.depth[~there].max() - 60
    normals = rendering.normals.astype(float) / 127.5 - 1.0
    np.testing.assert_allclose(np.linalg.norm(normals, axis=2), 1.0, atol=0.02)
    for place, points in enumerate(rendering.landmarks):
        assert ((points > 0) & (points < 64)).all()
        assert what.objects[place].x * 64 == pytest.approx(points[0, 0], abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**40))
def test_captions_name_objects_from_left_to_right_and_no_colour_is_used_twice(seed, index):
    what = scene(seed, index)
    assert [thing.x for thing in what.objects] == sorted(thing.x for thing in what.objects)
    colours = [*what.background, *(thing.colour for thing in what.objects)]
    assert len(set(colours)) == len(colours) and set(colours) <= set(COLOURS)
    words = what.caption.split()
    assert [word for word in words if word in CLASSES] == [thing.class_name for thing in what.objects]
    assert all(colour in words for colour in colours)


def test_objects_stay_off_the_border_so_that_it_shows_the_background_alone():
    for index in range(200):
        instances = render(scene(HELD_OUT_SEED, index)).instances
        assert not instances[[0, -1]].any() and not instances[:, [0, -1]].any()


def test_a_scene_can_be_drawn_larger_with_the_same_content():
    small, large = render(scene(0, 3), 64), render(scene(0, 3), 256)
    assert large.image.shape == (256, 256, 3)
    assert abs((small.instances > 0).mean() - (large.instances > 0).mean()) < 0.01


def test_negative_index_is_refused():
    with pytest.raises(ValueError, match="index -1 is negative"):
        scene(0, -1)
