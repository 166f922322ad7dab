"""The rule by which control is announced, its file, and what people are told of it."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.evaluation.verdict import (
    BEFORE_CHANCE,
    CONTROL,
    IN_A_ROW,
    LEAST_SAMPLES,
    LEAST_SHARE,
    USUAL_STEPS,
    Validation,
    Verdict,
    as_tree,
    cannot_announce,
    describe,
    describe_run,
    from_tree,
    judge,
    judge_run,
    read_verdict,
    stretch,
)

SCENES = [0.02, 0.05, 0.41, 0.70, 0.78, 0.83, 0.82, 0.84, 0.83, 0.84]
"""Shares of what is possible over a run that learns to obey."""
PHOTOGRAPHS = [0.01, 0.12, 0.09]
UNLEARNT = [*SCENES[:6], 0.1, 0.05, 0.08, 0.1]


def validations(shares, every=50, spread=0.05):
    return [Validation(n * every, one, one, one - spread, one + spread) for n, one in enumerate(shares)]


def told(shares, samples=16, **how):
    return judge(validations(shares, **how), samples)


def metrics(folder, rows):
    """rows: of (step, metrics)."""
    lines = [json.dumps({"step": step, "time": 0.0, "metrics": figures}) + "\n" for step, figures in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def measured(name, one):
    ends = {"": one.share, "_low": one.low, "_high": one.high}
    shares = {f"validation/{name}_share{end}": value for end, value in ends.items()}
    return {f"validation/{name}": one.value, f"validation/{name}_chance": 0.0, **shares}


def run_of(folder, shares, name="edge_f1"):
    return metrics(folder, [(one.step, measured(name, one)) for one in validations(shares)])


def test_the_named_step_is_where_the_curve_jumps():
    (found,) = told(SCENES)
    assert (found.kind, found.after, found.step, found.told_at) == ("announced", 50, 100, 150)
    assert found.rise == pytest.approx(0.36) and found.share == 0.70


@pytest.mark.parametrize(
    "shares",
    [
        [0.0] * 10,
        PHOTOGRAPHS,
        [0.2, 0.28, 0.2, 0.28, 0.2, 0.28],  # at the bound, within the interval
        [0.0, 0.0, 0.6, 0.0, 0.0, 0.0],  # one lucky validation
        [0.0, 0.0, 0.6],  # it may be a lucky one yet
        [0.0, 0.0, 0.3, 0.9],  # where it jumps to is not seen yet
        [0.0, math.nan, math.nan],  # real pictures at chance
        [],
    ],
)
def test_other_curves_announce_nothing(shares):
    assert told(shares) == ()


def test_a_wide_interval_announces_nothing_however_high_the_curve_is():
    assert told(SCENES, spread=0.6) == ()
    assert told(SCENES, samples=LEAST_SAMPLES - 1) == () and len(told(SCENES, samples=LEAST_SAMPLES)) == 1


def test_the_jump_is_that_of_the_curve_that_people_look_at():
    """Chance moves a little from one validation to the next, and shares with it."""
    seen = ((0.13, 0.03), (0.30, 0.21), (0.45, 0.40), (0.60, 0.57), (0.62, 0.60))
    (found,) = judge([Validation(25 * n, value, s, s - 0.05, s + 0.05) for n, (value, s) in enumerate(seen)], 16)
    assert found.step == 25 and found.rise == pytest.approx(0.18)


def test_what_captions_reach_without_control_is_no_control():
    """A segmentation of scenes has a quarter of what is possible by its captions alone."""
    drifting = [Validation(n * 50, 0.3, 0.34 + 0.01 * (n % 3), 0.31, 0.40, without=0.24) for n in range(20)]
    assert len(judge([replace(one, without=0.0) for one in drifting], 16)) == 1
    assert judge(drifting, 16) == ()
    obeying = [Validation(n * 50, share, share, share - 0.05, share + 0.05, 0.24) for n, share in enumerate(SCENES)]
    assert [one.step for one in judge(obeying, 16)] == [100]


def test_an_interval_of_few_samples_is_stretched_by_students_t():
    for samples, quantile in ((8, 4.785), (16, 3.733), (64, 3.225)):  # of .999, from a table
        assert stretch(samples) == pytest.approx(math.sqrt(samples / (samples - 1)) * quantile / 1.96, rel=0.01)
    doubtful = [0.0, 0.45, 0.45, 0.45]
    assert told(doubtful, samples=64, spread=0.1) != () and told(doubtful, samples=8, spread=0.1) == ()


def test_weights_that_obey_from_the_start_are_announced_for_the_first_validation():
    (found,) = told([0.8, 0.81, 0.8])
    assert (found.step, found.after, found.told_at) == (0, None, 50)
    assert "it came at the first validation" in describe(Verdict("edge_f1", 16, 3, 0, validations([0.8])[0], (found,)))


def test_control_that_comes_gradually_is_named_where_it_is_clear():
    (found,) = told([0.0, 0.08, 0.16, 0.24, 0.32, 0.40, 0.48])
    assert (found.step, found.told_at) == (250, 300)  # .40 is the first to lie above with certainty
    assert "gradually" in describe(Verdict("edge_f1", 16, 7, 0, validations([0.4])[0], (found,)))


def test_control_that_goes_is_withdrawn_by_a_correction_that_has_both_steps():
    first, second = told(UNLEARNT)
    assert (first.kind, first.step) == ("announced", 100)
    assert (second.kind, second.step, second.told_at) == ("withdrawn", 300, 350)
    text = describe(Verdict("edge_f1", 16, 10, 0, validations([0.1])[0], (first, second)))
    assert text.startswith("correction: ") and "step 100" in text and "step 300" in text


def test_control_that_comes_again_is_a_correction_too():
    events = told([*UNLEARNT, 0.6, 0.7, 0.7])
    assert [one.kind for one in events] == ["announced", "withdrawn", "announced"] and events[-1].step == 500
    text = describe(Verdict("edge_f1", 16, 13, 0, validations([0.7])[0], events))
    assert text.startswith("correction: ") and "step 100" in text and "450 and 500" in text


def test_one_bad_validation_withdraws_nothing():
    assert len(told([*SCENES, 0.1, 0.8, 0.1, 0.8])) == 1


SHARES = st.lists(st.floats(-0.5, 1.2) | st.just(math.nan), max_size=30)


@given(SHARES, st.floats(0.0, 0.3), st.integers(0, 30))
def test_later_validations_never_change_what_was_told(shares, spread, first):
    whole, part = told(shares, spread=spread), told(shares[:first], spread=spread)
    assert part == tuple(one for one in whole if one.told_at < first * 50)


@given(SHARES, st.floats(0.0, 0.3))
def test_what_is_announced_was_seen_in_several_validations_in_a_row(shares, spread):
    rows = validations(shares, spread=spread)
    events = told(shares, spread=spread)
    for number, one in enumerate(events):
        assert one.kind == ("announced", "withdrawn")[number % 2] and one.step < one.told_at
        row = [seen for seen in rows if seen.step <= one.told_at][-IN_A_ROW:]
        if one.kind == "announced":
            assert all(seen.low > LEAST_SHARE for seen in row)  # without control it is at chance
        else:
            assert all(seen.share < LEAST_SHARE for seen in row)


@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.floats(0.5, 0.9), st.sampled_from([0.0, 0.01, 0.03]))
def test_a_jump_is_named_at_its_step_under_noise(place, seed, height, noise):
    places = np.arange(16)
    clean = height * (places >= place) * (1 - 0.2 * np.exp(-np.maximum(places - place, 0) / 2))
    found = told((clean + noise * np.random.default_rng(seed).standard_normal(16)).tolist(), spread=0.1)
    assert all(one.step == 50 * place for one in found) and len(found) <= 1
    # Where few validations follow a jump, noise may leave it without the certainty that is asked for.
    assert found or place > 8 and noise


def test_a_run_is_judged_by_the_figure_of_its_kind_and_the_verdict_is_written_and_read(tmp_path):
    rows = [
        (v.step, measured("depth_delta", v) | measured("edge_f1", Validation(0, 0, 0, 0, 0)))
        for v in validations(SCENES)
    ]
    verdict = judge_run(metrics(tmp_path, rows), 16)
    assert verdict.figure == "depth_delta" and verdict.announced and verdict.announced.step == 100
    (tmp_path / CONTROL).write_text(json.dumps(as_tree(verdict), allow_nan=False))
    assert read_verdict(tmp_path) == verdict
    assert describe_run(tmp_path) == json.loads((tmp_path / CONTROL).read_text())["told"]


def test_a_verdict_with_numbers_that_are_not_finite_is_written_as_json():
    last = Validation(50, 0.5, 0.5, -math.inf, math.inf)
    verdict = Verdict("edge_f1", 16, 2, 0, last, told([0.0, 0.5, 0.5], spread=0.1))
    assert from_tree(json.loads(json.dumps(as_tree(verdict), allow_nan=False))) == verdict


def test_a_verdict_that_cannot_be_read_is_refused_by_its_path(tmp_path):
    (tmp_path / CONTROL).write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path}/control.json cannot be read .*Delete it"):
        read_verdict(tmp_path)


def test_figures_without_chance_announce_nothing_at_any_moment(tmp_path):
    curve = [0.268, 0.303, 0.563, 0.774, 0.829, 0.862, 0.858, 0.873, 0.862]
    for known in (6, 9):
        rows = [(50 * n, {"validation/edge_f1": value}) for n, value in enumerate(curve[:known])]
        verdict = judge_run(metrics(tmp_path, rows), 16)
        assert verdict.without_chance == known and verdict.events == ()
        assert describe(verdict) == describe_run(tmp_path) == BEFORE_CHANCE


def test_a_run_that_goes_on_from_before_chance_was_measured_is_judged_from_there(tmp_path):
    old = [(step, {"validation/edge_f1": 0.8}) for step in (0, 50)]
    new = [(100 + v.step, measured("edge_f1", v)) for v in validations([0.7, 0.72, 0.71])]
    verdict = judge_run(metrics(tmp_path, old + new), 16)
    assert (verdict.without_chance, verdict.judged) == (2, 3)
    assert verdict.announced and verdict.announced.step == 100


def test_real_pictures_at_chance_are_told_and_nothing_is_announced(tmp_path):
    rows = [(step, {"validation/edge_f1": 0.8, "validation/edge_f1_chance": 0.8}) for step in (0, 50, 100)]
    verdict = judge_run(metrics(tmp_path, rows), 16)
    assert verdict.events == () and "the real pictures of data.held_out are at chance themselves" in describe(verdict)


def test_where_no_figure_tells_control_that_is_said_and_not_that_it_has_not_come(tmp_path):
    verdict = judge_run(metrics(tmp_path, [(0, {"validation/fixed_noise_loss": 0.1})]), 16)
    assert "no validation has a figure that tells control of this kind" in describe(verdict)


def test_a_run_past_the_usual_range_is_told_what_to_look_at():
    def late(step):
        return describe(Verdict("edge_f1", 16, 1, 0, Validation(step, 0.1, 0.1, 0.0, 0.2), ()))

    assert "usually" not in late(50)
    assert "usually comes by step 10,000" in late(USUAL_STEPS + 1000)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"samples": 4}, "validation.samples=4.*Set validation.samples=8"),
        ({"every_steps": 100}, "by 1 validation.*it takes 2 in a row. Set validation.every_steps=25"),
        ({"every_steps": 99}, None),
    ],
)
def test_settings_that_can_never_announce_are_told(changes, why):
    tree = dict(name="a", max_steps=100, global_batch_size=1, micro_batch_size=1, model=dict(base="miniature"))
    data = dict(shards="s", held_out="h", condition="edges", resolution=64)
    config = build_config(tree | dict(data=data, validation=dict(every_steps=50, samples=8, grid=1) | changes))
    found = cannot_announce(config)
    assert found is None if why is None else re.search(why, found)
