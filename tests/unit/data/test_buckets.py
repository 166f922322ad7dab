import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.data.order.buckets import aspect_bins, bucket_shapes, plan_buckets


def test_bins_are_sixteenths_of_an_octave_and_end_at_sixteen_to_one():
    widths = np.array([512, 1024, 512, 640, 10_000, 1])
    heights = np.array([512, 512, 1024, 480, 10, 999])
    assert aspect_bins(widths, heights).tolist() == [0, 16, -16, 7, 64, -64]


def test_turning_a_picture_negates_its_bin():
    widths, heights = np.random.default_rng(0).integers(1, 5000, (2, 10_000))
    bins, turned = aspect_bins(widths, heights), aspect_bins(heights, widths)
    half = np.isclose(np.abs(np.log2(widths / heights) * 16) % 1, 0.5, atol=1e-5)
    assert np.array_equal(bins[~half], -turned[~half])


def test_shapes_are_those_that_stable_diffusion_trainers_use():
    assert bucket_shapes(512, 2.0, 64) == ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))


@given(st.integers(1, 20), st.floats(1.01, 6.0), st.sampled_from([8, 16, 64]))
def test_shapes_fill_the_area_within_the_ratio(sides, ratio, multiple):
    resolution = sides * multiple
    shapes = bucket_shapes(resolution, ratio, multiple)
    assert (resolution, resolution) in shapes and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % multiple == width % multiple == 0 and (width, height) in shapes
        short, long = sorted((height, width))
        assert long <= ratio * short and short * long <= resolution**2 < short * (long + multiple)


def test_a_ratio_of_one_is_the_square_of_any_size():
    assert bucket_shapes(200, 1.0, 64) == ((200, 200),)


def test_a_resolution_off_the_step_is_refused_with_those_beside_it():
    with pytest.raises(ValueError, match=r"data.resolution=200 is not a multiple of 64.*Use 192 or 256"):
        bucket_shapes(200, 2.0, 64)


histograms = st.lists(
    st.dictionaries(st.integers(-64, 64), st.integers(1, 300), min_size=1, max_size=20), min_size=1, max_size=3
)


@given(histograms, st.integers(1, 200))
def test_every_sample_has_a_bucket_and_every_stream_fills_the_lanes_if_it_can(histograms, lanes):
    shapes = bucket_shapes(512, 2.0, 64)
    buckets, samples = plan_buckets(shapes, histograms, lanes)
    assert set(buckets.shapes) <= set(shapes) and all(any(row) for row in samples)
    for source, histogram in enumerate(histograms):
        column = [row[source] for row in samples]
        assert sum(column) == sum(histogram.values())
        assert min(size for size in column if size) >= lanes or sum(size > 0 for size in column) == 1
        bins = np.array([bin for bin, count in histogram.items() for _ in range(count)])
        numbers = buckets.bucket_of(source, bins) if len(buckets.shapes) > 1 else np.zeros(len(bins), int)
        assert np.bincount(numbers, minlength=len(column)).tolist() == column


def test_pictures_go_to_the_nearest_shape():
    shapes = bucket_shapes(512, 2.0, 64)
    buckets, samples = plan_buckets(shapes, [{0: 50, 9: 40, -9: 30, 40: 20}], lanes=10)
    nearest = {bin: min(shapes, key=lambda s: abs(math.log2(s[1] / s[0]) - bin / 16)) for bin in (0, 9, -9, 40)}
    assert {bin: buckets.shapes[number] for bin, number in buckets.assigned[0].items()} == nearest
    assert [row[0] for row in samples] == [30, 50, 40 + 20] or len(samples) == 4


def test_a_shape_with_few_pictures_gives_them_to_its_neighbour():
    shapes = bucket_shapes(512, 2.0, 64)
    buckets, samples = plan_buckets(shapes, [{0: 50, 6: 40, 12: 3}], lanes=10)
    assert buckets.shapes == ((512, 512), (448, 576)) and samples == [[50], [43]]
