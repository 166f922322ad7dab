"""Readers of data meet files that nobody meant: each is used as its format says, or refused by name."""

import pytest
from hostile import FUZZES, Fuzz
from hypothesis import HealthCheck, given, seed, settings


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", FUZZES, ids=lambda fuzz: fuzz.name)
def test_a_file_that_nobody_meant_is_read_rightly_or_refused_by_name(fuzz: Fuzz):
    @seed(15)
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(fuzz.files)
    def check(file):
        fuzz.check(file)

    check()
