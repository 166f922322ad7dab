"""Conditions at another size: lines stay one pixel wide and whole, regions stay filled, labels are never blended."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.condition_names import named_values
from controlbooth.data.conditions.functions import CONDITIONS
from controlbooth.data.pictures.images import prepare
from controlbooth.data.pictures.resize import resize, resize_binary, thin, values_of
from controlbooth.data.scenes.render import render, scene

SIDE = 300
POINTS = st.tuples(st.integers(5, SIDE - 6), st.integers(5, SIDE - 6))
SIZES = st.integers(40, 420)
NEAR = np.ones((3, 3), np.uint8)


def squares(ink):
    """How many blocks of 2 x 2 pixels are all set."""
    return int((ink[1:, 1:] & ink[:-1, 1:] & ink[1:, :-1] & ink[:-1, :-1]).sum())


def pieces(ink, connectivity):
    return cv2.connectedComponents(ink, connectivity=connectivity)[0] - 1


def drawing(seed, count=4, thickness=1):
    rng = np.random.default_rng(seed)
    ink = np.zeros((SIDE, SIDE), np.uint8)
    for _ in range(count):
        centre, axes = rng.integers(60, 240, 2).tolist(), rng.integers(20, 60, 2).tolist()
        cv2.ellipse(ink, centre, axes, int(rng.integers(0, 180)), 0, 360, 1, thickness)
    return ink


@settings(max_examples=60, deadline=None)
@given(POINTS, POINTS, SIZES)
def test_a_straight_line_stays_whole_and_one_pixel_wide_at_every_size(start, end, side):
    ink = cv2.line(np.zeros((SIDE, SIDE), np.uint8), start, end, 1)
    if max(abs(a - b) for a, b in zip(start, end, strict=True)) * side < 2 * SIDE:
        return  # shorter than two pixels of the result
    found = resize_binary(ink, side, side)
    assert squares(found) == 0 and pieces(found, 8) == 1
    ends = [[int((2 * value + 1) * side / (2 * SIDE)) for value in point] for point in (start, end)]
    exact = cv2.line(np.zeros((side, side), np.uint8), *ends, 1)
    assert (cv2.dilate(exact, NEAR)[found > 0] == 1).all()  # no pixel away from it
    assert cv2.dilate(found, np.ones((5, 5), np.uint8))[exact > 0].mean() == 1.0  # and all of it is there


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.6))
def test_thinning_joins_and_parts_nothing(seed, density):
    noise = np.random.default_rng(seed).random((40, 50))
    ink = (cv2.GaussianBlur(noise, (0, 0), 1.5) < np.quantile(cv2.GaussianBlur(noise, (0, 0), 1.5), density)).astype(
        "u1"
    )
    thinned = thin(ink)
    assert not (thinned & ~ink).any()
    around = [cv2.copyMakeBorder(1 - one, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1) for one in (ink, thinned)]
    assert pieces(thinned, 8) == pieces(ink, 8)
    assert pieces(around[1], 4) == pieces(around[0], 4)  # as many holes
    assert (thin(thinned) == thinned).all()


def thinned_by_turns(ink):
    """Takes pixels off the whole picture, side by side, as the definition has it."""
    padded = np.pad(ink.astype(np.int64), 1)
    clockwise = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
    before = None
    while before is None or (before != padded).any():
        before = padded.copy()
        for side in (0, 4, 6, 2):  # north, south, west, east
            ring = [np.roll(padded, (-down, -right), (0, 1)) for down, right in clockwise]
            pieces = sum((1 - ring[k]) * (1 - (1 - ring[k + 1]) * (1 - ring[(k + 2) % 8])) for k in (0, 2, 4, 6))
            padded[(padded == 1) & (ring[side] == 0) & (pieces == 1) & (sum(ring) >= 2)] = 0
    return padded[1:-1, 1:-1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 1.0), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_thinning_takes_the_pixels_that_turns_over_the_whole_picture_take(seed, density, width, height, length):
    dots = (np.random.default_rng(seed).random((height, length)) < density).astype(np.uint8)
    ink = cv2.dilate(dots, np.ones((width, width), np.uint8))
    assert np.array_equal(thin(ink), thinned_by_turns(ink))


@pytest.mark.parametrize("side", [64, 128, 256])
def test_drawn_outlines_are_those_of_the_drawing_at_that_size(side):
    found, truth = [], []
    for seed in range(8):
        found.append(resize_binary(drawing(seed), side, side))
        filled = drawing(seed, thickness=1)
        truth.append(
            (cv2.resize(filled.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA) > 0).astype("u1")
        )
    for one, other in zip(found, truth, strict=True):
        assert cv2.dilate(other, NEAR)[one > 0].all()
        assert cv2.dilate(one, NEAR)[other > 0].mean() > 0.97
        assert one.mean() < 0.75 * other.mean()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), SIZES)
def test_a_filled_region_stays_filled_with_its_outline_in_place(seed, side):
    mask = drawing(seed, count=2, thickness=-1)
    found = resize_binary(mask, side, side)
    inner, outer = (
        cv2.resize(one.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
        for one in (cv2.erode(mask, NEAR), cv2.dilate(mask, NEAR))
    )
    assert found[inner == 1.0].all() and not found[outer == 0.0].any()
    assert abs(float(found.mean()) - float(mask.mean())) < 0.06 * float(mask.mean()) + 0.002


def test_a_line_that_leaves_a_region_stays_joined_to_it():
    ink = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(ink, (100, 150), 50, 1, -1)
    cv2.line(ink, (100, 150), (290, 133), 1)
    for side in (37, 64, 128, 200, 299, 400):
        found = resize_binary(ink, side, side)
        assert pieces(found, 8) == 1
        beyond = found[:, side * 160 // SIDE : side * 280 // SIDE]
        assert (beyond.sum(axis=0) <= 2).all() and beyond.any(axis=0).all() and squares(beyond) == 0


@pytest.mark.parametrize("width", [3, 5, 9])
def test_a_stroke_is_as_wide_as_it_is_to_scale_and_one_pixel_at_least(width):
    ink = np.zeros((SIDE, SIDE), np.uint8)
    ink[150 - width // 2 : 151 + width // 2, 20:280] = 1
    for side in (50, 75, 150, 250):
        column = resize_binary(ink, side, side)[:, side // 2]
        assert abs(column.sum() - max(1, width * side / SIDE)) < 1


def test_dark_lines_on_white_are_lines_too():
    ink = drawing(3)
    black, white = resize(ink * 255, 64, 64, "binary"), resize((1 - ink) * 255, 64, 64, "binary")
    assert np.array_equal(255 - black, white)


def test_two_colours_stay_those_two():
    colours = np.array([(20, 40, 200), (250, 250, 240)], np.uint8)
    picture = colours[drawing(1)]
    for side in (64, 400):
        found = resize(picture, side, side, "binary")
        assert np.array_equal(np.unique(found.reshape(-1, 3), axis=0), colours)
        assert np.array_equal(found[..., 0] == 250, resize_binary(drawing(1), side, side) > 0)
    blank = np.full((SIDE, SIDE, 3), 7, np.uint8)
    assert (resize(blank, 64, 80, "binary") == 7).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=3, max_size=40, unique=True), st.integers(0, 2**32 - 1), SIZES)
def test_labels_are_told_and_never_become_a_third_one(labels, seed, side):
    rng = np.random.default_rng(seed)
    picture = np.full((SIDE, SIDE), labels[0], np.uint8)
    for label in labels:
        cv2.circle(picture, rng.integers(0, SIDE, 2).tolist(), int(rng.integers(20, 60)), label, -1)
    if len(np.unique(picture)) > 2 and (len(labels) <= 32 or np.ptp(labels) > 100):
        assert values_of(picture) == "labels"
    for kind in ("seg", "semantic", "ade20k", "my_segmentation"):
        _, found = prepare(np.zeros((SIDE, SIDE, 3), np.uint8), picture, kind, (side, side))
        assert set(np.unique(found)) <= set(np.unique(picture))


def test_pictures_are_told_by_what_they_are():
    rendered = [render(scene(0, number), 128) for number in range(12)]
    assert {values_of(one.edges) for one in rendered} == {"binary"}
    assert {values_of(one.segmentation) for one in rendered} == {"binary", "labels"}  # of one object, or of two
    for kind in ("depth", "normals", "image"):
        assert {values_of(getattr(one, kind)) for one in rendered} == {"levels"}
    made = {kind: {values_of(function(one.image)) for one in rendered} for kind, function in CONDITIONS.items()}
    assert all(made[kind] == {"binary"} for kind in ("canny", "canny_random", "scribble", "lines"))
    assert all(made[kind] == {"levels"} for kind in ("soft_edges", "lineart", "gray", "blur"))


def test_smoothed_borders_and_gentle_slopes_are_levels():
    disc = cv2.circle(np.zeros((256, 256), np.uint8), (120, 130), 70, 255, -1, cv2.LINE_AA)
    slope = np.broadcast_to(np.arange(256)[:, None] // 2, (256, 256)).astype(np.uint8)
    assert values_of(disc) == values_of(slope) == "levels"
    assert values_of(np.full((8, 8), 3, np.uint8)) == "binary"


@pytest.mark.parametrize(
    ("kind", "values"),
    [("canny", "binary"), ("cond_canny", "binary"), ("ade20k", "labels"), ("oneformer-seg", "labels")]
    + [("depth", "levels"), ("zoe_depth", "levels"), ("softedge", "levels"), ("lineart", None), ("edges", None)],
)
def test_names_tell_where_they_are_known(kind, values):
    assert named_values(kind) == values


def test_a_mirrored_drawing_is_the_mirror_of_the_drawing_and_a_crop_a_part_of_it():
    image, lines = np.zeros((SIDE, 400, 3), np.uint8), np.zeros((SIDE, 400), np.uint8)
    lines[:, 50:350] = drawing(5)[:, :300] * 255
    _, whole = prepare(image, lines, "canny", (60, 80))
    _, left = prepare(image, lines, "canny", (60, 60), (0, 0))
    _, mirrored = prepare(image, lines, "canny", (60, 60), (0, 0), flip=True)
    assert np.array_equal(left, whole[:, :60]) and np.array_equal(mirrored, left[:, ::-1])


def test_lines_whose_levels_were_spoiled_by_jpeg_are_lines_again():
    lines = drawing(2) * 255
    spoiled = cv2.imdecode(cv2.imencode(".jpg", lines, [cv2.IMWRITE_JPEG_QUALITY, 80])[1], cv2.IMREAD_GRAYSCALE)
    assert len(np.unique(spoiled)) > 20
    _, found = prepare(np.zeros((SIDE, SIDE, 3), np.uint8), spoiled, "canny", (64, 64))
    exact = resize_binary(drawing(2), 64, 64)
    assert len(np.unique(found)) == 2 and ((found > 127) != exact).mean() < 0.02
