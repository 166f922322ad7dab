"""When a round is due: by the clock, by growth, by drift; all of it without a clock, a disk or a model."""

import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlbooth.deploy.retrain import triggers
from controlbooth.deploy.retrain.growth import Changes
from controlbooth.deploy.retrain.policy import Clock, Drift, Growth


def at(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    ("last", "now", "due"),
    [
        ("2026-06-01T02:59:00+02:00", "2026-06-01T02:59:30+02:00", False),
        ("2026-06-01T02:59:00+02:00", "2026-06-01T03:00:00+02:00", True),
        ("2026-06-01T03:00:00+02:00", "2026-06-01T23:00:00+02:00", False),  # it has run today
        ("2026-06-01T03:00:00+02:00", "2026-06-04T12:00:00+02:00", True),  # late, and once for three days
        ("2026-10-24T12:00:00+02:00", "2026-10-25T01:59:00+00:00", False),  # three o'clock is an hour later in winter
        ("2026-10-24T12:00:00+02:00", "2026-10-25T02:00:00+00:00", True),
    ],
)
def test_cron_means_the_clock_on_the_wall_of_its_time_zone(last, now, due):
    found = triggers.clock(Clock(cron="0 3 * * *", timezone="Europe/Berlin"), at(last), at(now))
    assert found.due == due
    assert ("was due at" if due else "is due at") in found.reason


@given(st.floats(0, 1e6), st.floats(0.01, 1e4))
def test_an_interval_counts_from_the_start_of_the_last_round(seconds, hours):
    found = triggers.clock(Clock(every_hours=hours), 1e9, 1e9 + seconds)
    assert found.due == (1e9 + seconds >= 1e9 + 3600.0 * hours)


@pytest.mark.parametrize(
    ("policy", "new", "before", "due"),
    [
        (Growth(samples=10), 10, 1000, True),
        (Growth(samples=10), 9, 0, False),
        (Growth(share=0.1), 100, 1000, True),
        (Growth(share=0.1), 99, 1000, False),
        (Growth(samples=10, share=0.1), 10, 1000, False),  # both
        (Growth(samples=10, share=0.1), 100, 1000, True),
        (Growth(share=0.1), 0, 0, False),  # a tenth of nothing is no growth
    ],
)
def test_growth_counts_new_samples_and_their_share(policy, new, before, due):
    found = triggers.growth(policy, Changes(now=before + new, before=before, new=new))
    assert found.due == due and f"{new} new samples" in found.reason


@pytest.mark.parametrize(
    ("sign", "frozen", "fresh", "margin", "due"),
    [
        (1.0, 0.9, 0.7, 0.1, True),
        (1.0, 0.9, 0.85, 0.1, False),  # worse, and by less than the margin
        (1.0, 0.7, 0.9, 0.0, False),  # better
        (-1.0, 0.1, 0.3, 0.1, True),  # an error that grew
        (-1.0, 0.3, 0.1, 0.0, False),
    ],
)
def test_drift_is_a_fall_by_the_margin_in_the_direction_that_is_worse(sign, frozen, fresh, margin, due):
    spread = np.linspace(-0.02, 0.02, 64)
    policy = Drift(data="fresh", metric="m", margin=margin)
    assert triggers.drift(policy, 0.95, sign, frozen + spread, fresh + spread[:40]).due == due


def test_a_fall_that_chance_explains_is_no_drift():
    draw = np.random.default_rng(1)
    frozen, fresh = draw.normal(0.8, 0.5, 8), draw.normal(0.8, 0.5, 8)
    high, low = (frozen, fresh) if frozen.mean() > fresh.mean() else (fresh, frozen)
    assert not triggers.drift(Drift(data="x", metric="m", margin=0.0), 0.95, 1.0, high, low).due
