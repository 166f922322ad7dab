import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlbooth.data.conditions.functions import canny
from controlbooth.data.inspection.hygiene import edge_map, judge_pairing, quantiles
from controlbooth.data.pictures.likeness import (
    NEAR_BITS,
    connected_groups,
    equal_groups,
    is_blank,
    near_pairs,
    perceptual_hash,
)
from controlbooth.data.scenes.render import render, scene

PICTURES = [render(scene(0, i), 96) for i in range(40)]


def bits_between(one, other):
    return int(np.bitwise_count(one ^ other).sum())


def flipped(hashes, row, bits):
    changed = hashes[row].copy()
    for bit in bits:
        changed[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: cv2.resize(pixels, (48, 48), interpolation=cv2.INTER_AREA),
        lambda pixels: cv2.add(pixels, np.full_like(pixels, 12)),
        lambda pixels: cv2.convertScaleAbs(pixels, alpha=0.9, beta=8),
    ],
    ids=["half the size", "brighter", "less contrast"],
)
def test_copies_of_a_picture_have_near_hashes(change):
    distances = [bits_between(perceptual_hash(p.image), perceptual_hash(change(p.image))) for p in PICTURES]
    assert np.mean(np.array(distances) <= NEAR_BITS) >= 0.9


def test_different_pictures_have_hashes_far_apart():
    hashes = [perceptual_hash(picture.image) for picture in PICTURES]
    distances = [bits_between(one, other) for i, one in enumerate(hashes) for other in hashes[:i]]
    assert min(distances) > 2 * NEAR_BITS


def test_the_hash_is_pinned():
    """Hashes of different machines are compared. A checkerboard of 8 pixels under a ramp, in whole numbers."""
    rows, columns = np.mgrid[:64, :64]
    pixels = ((rows // 8 + columns // 8) % 2 * 90 + rows + 2 * columns // 3).astype(np.uint8)
    assert [f"{word:016x}" for word in perceptual_hash(pixels).tolist()] == [
        "550000005500aa2a",
        "5500000055000000",
        "0055000000550000",
        "0055000000550000",
    ]


@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(0, 15))
@settings(max_examples=40, deadline=None)
def test_near_hashes_are_all_found_up_to_15_bits_and_each_pair_once(seed, count, bits):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
    copy = flipped(hashes, count // 2, rng.choice(256, bits, replace=False).tolist())
    pairs = near_pairs(np.concatenate([hashes, copy[None]]))
    assert pairs.tolist() == [[count // 2, count]]


def test_hashes_at_20_bits_are_nearly_all_found_and_those_beyond_none():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (500, 4), dtype=np.uint64)
    for bits, least, most in [(20, 480, 500), (21, 0, 0)]:
        copies = np.stack([flipped(hashes, row, rng.choice(256, bits, replace=False)) for row in range(500)])
        assert least <= len(near_pairs(np.concatenate([hashes, copies]))) <= most


def test_near_pairs_equal_those_of_comparing_all():
    rng = np.random.default_rng(1)
    centres = rng.integers(0, 2**64, (20, 4), dtype=np.uint64)
    hashes = np.stack([flipped(centres, i % 20, rng.choice(256, 6, replace=False).tolist()) for i in range(100)])
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    expected = [[i, j] for i in range(100) for j in range(i + 1, 100) if distances[i, j] <= NEAR_BITS]
    assert near_pairs(hashes).tolist() == expected and len(expected) == 20 * 10


def test_no_hashes_have_no_pairs():
    assert near_pairs(np.empty((0, 4), np.uint64)).shape == (0, 2)


def test_pairs_are_joined_into_groups():
    pairs = np.array([[1, 5], [5, 9], [2, 3], [9, 12], [20, 21]])
    assert [group.tolist() for group in connected_groups(pairs)] == [[1, 5, 9, 12], [2, 3], [20, 21]]
    assert connected_groups(np.empty((0, 2), np.int64)) == []


@given(st.lists(st.integers(0, 6), max_size=30))
def test_groups_are_the_places_of_every_repeated_value(values):
    groups = [group.tolist() for group in equal_groups(np.array(values, np.uint64))]
    expected = [[i for i, other in enumerate(values) if other == value] for value in dict.fromkeys(values)]
    assert groups == [group for group in expected if len(group) > 1]


def test_a_picture_of_one_colour_is_blank_and_one_line_is_not():
    blank = np.full((40, 40, 3), 200, np.uint8)
    blank[::3] += 3
    assert is_blank(blank)
    blank[5, 5:9] = 0
    assert not is_blank(blank)


@pytest.mark.parametrize("kind", ["edges", "segmentation", "depth", "normals", "canny"])
def test_a_condition_agrees_with_its_own_picture_and_with_no_other(kind):
    draw = {
        "edges": lambda p: p.edges,
        "segmentation": lambda p: p.segmentation * 31,
        "depth": lambda p: p.depth,
        "normals": lambda p: p.normals,
        "canny": lambda p: canny(p.image, low=20, high=60),
    }[kind]
    targets = np.stack([edge_map(picture.image) for picture in PICTURES])
    conditions = np.stack([edge_map(draw(picture)) for picture in PICTURES])
    agreement = conditions @ targets.T
    own, negatives = np.diag(agreement), agreement[~np.eye(len(PICTURES), dtype=bool)]
    assert np.median(own) > 0.6 and np.median(negatives) < 0.15
    assert np.mean(own > np.percentile(negatives, 95)) > 0.95


def test_edge_maps_do_not_depend_on_the_size_and_plain_pictures_have_none():
    picture = render(scene(0, 3), 256).image
    smaller = cv2.resize(picture, (128, 128), interpolation=cv2.INTER_AREA)
    assert edge_map(picture) @ edge_map(smaller) > 0.9
    assert not edge_map(np.full((30, 50, 3), 9, np.uint8)).any()


def test_conditions_of_other_pictures_are_judged_weak():
    rng = np.random.default_rng(0)
    negatives = rng.normal(0, 0.1, 2000)
    scores = rng.normal(0.8, 0.05, 500)
    scores[[3, 77]] = 0.0
    scores[100] = np.nan
    pairing = judge_pairing(scores, negatives)
    assert pairing is not None and pairing.weak.tolist() == [3, 77]
    assert pairing.standing_out == pytest.approx(497 / 499) and 0.1 < pairing.threshold < 0.25


def test_where_no_pair_stands_out_none_is_judged_alone():
    rng = np.random.default_rng(0)
    pairing = judge_pairing(rng.normal(0, 0.1, 500), rng.normal(0, 0.1, 2000))
    assert pairing is not None and len(pairing.weak) == 0 and pairing.standing_out < 0.1
    assert judge_pairing(np.full(5, np.nan), np.ones(3)) is None and judge_pairing(np.ones(3), np.empty(0)) is None


def test_quantiles_of_nothing_are_nothing():
    assert quantiles(np.empty(0)) == [] and quantiles(np.arange(101)) == [0, 5, 50, 95, 100]
