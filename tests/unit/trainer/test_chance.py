"""What obeying nothing scores, and the share of what is possible."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.data.conditions.functions import CONDITIONS
from controlbooth.data.scenes.render import HELD_OUT_SEED, render, scene
from controlbooth.trainer.controlnet.validation import describe_figures, fidelity_figures
from controlbooth.trainer.evaluation.ablations import describe_table, means
from controlbooth.trainer.evaluation.chance import NEGATIVES, negatives
from controlbooth.trainer.evaluation.drawing import noise_pictures
from controlbooth.trainer.evaluation.extract import fidelity
from controlbooth.trainer.evaluation.held_out import HeldOutSet
from controlbooth.trainer.evaluation.kinds import AGREEMENT
from controlbooth.trainer.evaluation.statistics import mean_and_interval, share_difference, share_of_possible


def scenes_held_out(count: int, size: int = 64) -> HeldOutSet:
    whats = [scene(HELD_OUT_SEED, number) for number in range(count)]
    real = [render(what, size) for what in whats]
    edges = np.stack([one.edges for one in real])
    return HeldOutSet(
        kind="edges",
        keys=[f"scene-{HELD_OUT_SEED}-{number:08d}" for number in range(count)],
        places=[(0, number) for number in range(count)],
        captions=[what.caption for what in whats],
        targets=np.stack([one.image for one in real]),
        conditions=np.repeat(edges[..., None], 3, axis=3),
        edges=edges,
        segmentation=np.stack([one.segmentation for one in real]),
    )


@given(st.integers(0, 200))
def test_a_negative_is_never_of_the_sample_itself_and_every_sample_is_one_equally_often(count):
    others = negatives(count)
    assert others.shape == (count, max(0, min(NEGATIVES, count - 1)))
    assert not (others == np.arange(count)[:, None]).any()
    assert all(len(set(row)) == len(row) for row in others.tolist())
    assert all(sorted(column) == list(range(count)) for column in others.T.tolist())
    assert np.array_equal(others, negatives(count))


def test_chance_does_not_depend_on_how_ranks_share_the_pictures():
    held = scenes_held_out(12)
    pictures = held.targets[::-1]
    whole = fidelity(pictures, held, range(12), None)
    for ranks in (2, 3, 5):
        for rank in range(ranks):
            rows = list(range(rank, 12, ranks))
            part = fidelity(pictures[rows], held, rows, None)
            for name in ("edge_f1", "mask_iou"):
                assert np.array_equal(part.values[name], whole.values[name][rows])
                assert np.array_equal(part.chances[name], whole.chances[name][rows])


@pytest.mark.parametrize("kind", ["edges", "canny", "lines", "lineart", "scribble"])
def test_noise_scores_at_chance_and_real_pictures_far_above_it(kind):
    held = scenes_held_out(16)
    extract = CONDITIONS.get(kind) if kind in AGREEMENT else None
    if kind != "edges":
        drawn = np.stack([CONDITIONS[kind](target) for target in held.targets])
        held = replace(held, kind=kind, conditions=np.repeat(drawn[..., None], 3, axis=3))
        held = replace(held, edges=drawn) if kind == "canny" else held
    name = "line_f1" if extract else "edge_f1"
    real, noise = (
        fidelity(pictures, held, range(16), extract) for pictures in (held.targets, noise_pictures(range(16), (64, 64)))
    )
    assert abs(noise.values[name].mean() - noise.chances[name].mean()) < 0.03
    assert noise.values[name].mean() < 0.1
    assert real.chances[name].mean() < real.values[name].mean() / 3
    assert real.values[name].mean() > (0.7 if kind == "canny" else 0.95)


def test_of_a_single_sample_there_is_no_chance_and_so_no_share():
    held = scenes_held_out(1)
    assert fidelity(held.targets, held, [0], None).chances == {}
    figures = fidelity_figures(held.targets, held.targets, held.targets, held, None)
    ends = ("", "_real", "_empty_prompt", "_without_control")
    assert figures.keys() == {f"{name}{end}" for name in ("edge_f1", "mask_iou") for end in ends}


def test_a_validation_has_chance_and_share_with_its_interval_beside_each_figure():
    held = scenes_held_out(8)
    strange = held.targets[negatives(8)[:, 0]]
    figures = fidelity_figures(held.targets, strange, strange, held, None)
    for name in ("edge_f1", "mask_iou"):
        assert figures[name] == figures[f"{name}_real"] > figures[f"{name}_chance"]
        assert figures[f"{name}_share"] == figures[f"{name}_share_low"] == figures[f"{name}_share_high"] == 1.0
        for way in ("empty_prompt", "without_control"):
            assert figures[f"{name}_{way}"] < figures[name]
            assert figures[f"{name}_{way}_share"] < 0.05
    shown = describe_figures(figures | {"fixed_noise_loss": 0.25})
    assert shown.startswith(f"edge_f1 {figures['edge_f1']:.3f} (chance {figures['edge_f1_chance']:.3f}, 100% of what")
    assert shown.endswith("fixed_noise_loss 0.250") and "share" not in shown and "real" not in shown


def test_an_ablation_shows_chance_and_share_in_blocks_of_their_own():
    held = scenes_held_out(8)
    real = fidelity(held.targets, held, range(8), None)
    rows = [
        dict(variant=variant, seed=None, prompt="none") | means(images, held, None, real)
        for variant, images in (("noise", noise_pictures(range(8), (64, 64))), ("real pictures", held.targets))
    ]
    assert rows[1]["edge_f1_share"] == rows[1]["mask_iou_share"] == 1.0
    assert rows[0]["edge_f1"] == pytest.approx(rows[0]["edge_f1_chance"], abs=0.03)
    shown = describe_table(rows).splitlines()
    assert [line.split("  ")[0] for line in shown[::3]] == [
        f"{name}{end}" for name in ("edge f1", "mask iou") for end in ("", " chance", " share")
    ]


def test_a_share_is_0_at_chance_1_for_real_pictures_and_negative_below_chance():
    draw = np.random.default_rng(0)
    chances = draw.uniform(0.1, 0.3, 32)
    reals = chances + draw.uniform(0.5, 0.7, 32)
    assert share_of_possible(chances, chances, reals) == dict(mean=0.0, low=0.0, high=0.0)
    assert share_of_possible(reals, chances, reals) == dict(mean=1.0, low=1.0, high=1.0)
    assert share_of_possible(chances - 0.1, chances, reals)["high"] < 0
    half = share_of_possible((chances + reals) / 2, chances, reals)
    assert all(value == pytest.approx(0.5) for value in half.values())


def test_a_share_is_the_same_for_an_error_as_for_what_it_leaves():
    draw = np.random.default_rng(0)
    chances, values, reals = (draw.uniform(low, low + 0.2, 32) for low in (0.1, 0.4, 0.7))
    errors = share_of_possible(1 - values, 1 - chances, 1 - reals, lower_is_better=True)
    assert errors == pytest.approx(share_of_possible(values, chances, reals))
    assert 0.3 < errors["low"] < errors["mean"] < errors["high"] < 0.7


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_a_figure_by_which_real_pictures_are_no_better_than_chance_tells_nothing(lower_is_better):
    draw = np.random.default_rng(0)
    chances, reals = draw.normal(0.5, 0.1, 16), draw.normal(0.5, 0.1, 16)
    share = share_of_possible(reals, chances, reals, lower_is_better=lower_is_better)
    assert all(np.isnan(value) for value in share.values())


def test_the_interval_of_a_share_covers_it_about_as_often_as_it_says():
    draw = np.random.default_rng(3)
    inside = 0
    for _ in range(60):
        hard = draw.normal(0, 0.1, 40)  # for all three
        chances, reals = 0.2 + hard, 0.9 + hard + draw.normal(0, 0.05, 40)
        found = share_of_possible(0.55 + hard + draw.normal(0, 0.1, 40), chances, reals)
        inside += found["low"] <= 0.5 <= found["high"]
        assert found["high"] - found["low"] < 0.15  # what is hard for all is no spread
    assert 52 <= inside <= 60


def test_what_one_has_more_of_what_is_possible_than_another_is_paired():
    draw = np.random.default_rng(1)
    hard = draw.random(40)
    chances, reals = 0.1 * hard, 0.5 + 0.5 * hard
    a, b = 0.4 * hard, 0.4 * hard + 0.1
    more = share_difference((a, chances), (b, chances), reals)
    shares = [share_of_possible(one, chances, reals)["mean"] for one in (a, b)]
    assert more["mean"] == pytest.approx(shares[1] - shares[0])
    assert 0 < more["low"] <= more["mean"] <= more["high"]
    wide = mean_and_interval(b)["high"] - mean_and_interval(b)["low"]
    assert more["high"] - more["low"] < wide / 2
