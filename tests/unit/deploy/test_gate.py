"""The gate: certainly better by the margin, and no listed figure certainly or possibly worse than it may be."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.deploy.retrain.gate import judge
from controlbooth.deploy.retrain.measure import values
from controlbooth.deploy.retrain.policy import Gate
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.statistics import share_of_possible


def figure(low, mean, high):
    return dict(a=0.5, b=0.5 + mean, difference_low=low, difference_mean=mean, difference_high=high)


GATE = Gate(metric="edge_f1", margin=0.01, no_regression={"colour": 0.05, "error": 0.1})


@pytest.mark.parametrize(
    ("edges", "colour", "error", "promote", "first"),
    [
        ((0.02, 0.05, 0.08), (-0.02, 0.0, 0.02), (-0.1, 0.0, 0.05), True, "edge_f1"),
        ((0.005, 0.05, 0.1), (-0.02, 0.0, 0.02), (-0.1, 0.0, 0.05), False, "edge_f1"),  # better, not surely enough
        ((0.02, 0.05, 0.08), (-0.06, 0.0, 0.06), (-0.1, 0.0, 0.05), False, "colour"),  # a loss cannot be ruled out
        ((0.02, 0.05, 0.08), (-0.02, 0.0, 0.02), (-0.2, 0.0, 0.11), False, "error"),  # lower is better
        ((0.02, 0.05, 0.08), (-0.02, 0.0, 0.02), (-0.2, -0.1, 0.09), True, "edge_f1"),
    ],
)
def test_the_gate_by_hand(edges, colour, error, promote, first):
    figures = dict(edge_f1=figure(*edges), colour=figure(*colour), error=figure(*error), other=figure(-1, -1, -1))
    verdict = judge(GATE, figures, ("error",))
    assert verdict.promote == promote
    assert verdict.reason.startswith(first)  # what broke it comes first
    assert ("misses" in verdict.reason) == (not promote)


bounds = st.tuples(*[st.floats(-1, 1)] * 3).map(sorted)


@given(bounds, bounds, st.floats(-1, 1), st.floats(0, 1))
def test_promotion_means_that_every_lower_end_clears_its_bound(edges, colour, margin, tolerance):
    gate = Gate(metric="e", margin=margin, no_regression={"c": tolerance})
    verdict = judge(gate, dict(e=figure(*edges), c=figure(*colour)), ())
    assert verdict.promote == (edges[0] >= margin and colour[0] >= -tolerance)


@given(bounds)
def test_a_figure_turned_over_is_judged_alike(one):
    turned = sorted(-value for value in one)
    gate = Gate(metric="m", margin=0.1)
    assert judge(gate, dict(m=figure(*one)), ()).promote == judge(gate, dict(m=figure(*turned)), ("m",)).promote


def test_a_share_of_what_is_possible_is_asked_for_by_its_name_and_chance_is_told():
    gate = Gate(metric="edge_f1_share", margin=0.05, no_regression={"edge_f1": 0.1})
    raw = figure(-0.05, 0.0, 0.05) | dict(chance_a=0.08, chance_b=0.1)
    assert not judge(gate, dict(edge_f1_share=figure(0.04, 0.1, 0.2), edge_f1=raw), ()).promote
    verdict = judge(gate, dict(edge_f1_share=figure(0.06, 0.1, 0.2), edge_f1=raw), ())
    assert verdict.promote and "edge_f1_share 0.500 -> 0.600" in verdict.reason
    assert "chance 0.080 -> 0.100" in verdict.reason


def test_a_metric_that_was_not_measured_names_those_that_were():
    with pytest.raises(ConfigError, match="asks for 'colour', which was not measured; there are: edge_f1"):
        judge(GATE, dict(edge_f1=figure(0.1, 0.1, 0.1)), ())


def test_drift_is_told_by_the_share_of_what_is_possible_too(tmp_path):
    draw = np.random.default_rng(0)
    told = [dict(edge_f1=float(v), chance=dict(edge_f1=float(c))) for v, c in draw.uniform(0.2, 0.4, (12, 2))]
    rows = [dict(way="with control", place=[0, n], **one) for n, one in enumerate(told)]
    rows += [dict(way="real pictures", place=[0, n], edge_f1=0.9, chance={}) for n in range(12)]
    (tmp_path / "evaluation.json").write_text("{}")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw, chances = (np.array(one) for one in zip(*((t["edge_f1"], t["chance"]["edge_f1"]) for t in told), strict=True))
    assert np.array_equal(values(tmp_path, "edge_f1"), raw)
    expected = share_of_possible(raw, chances, np.full(12, 0.9))["mean"]
    assert values(tmp_path, "edge_f1_share").mean() == pytest.approx(expected)
    with pytest.raises(ConfigError, match="asks for 'colour_share', .* there are: edge_f1, edge_f1_share"):
        values(tmp_path, "colour_share")
