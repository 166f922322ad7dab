"""Processes that are killed, asleep, or away: ranks, their agent, an older start of the run, the MLflow server.

Each test prints what `tests/benchmarks/failures.py` prints, which is what is quoted. None needs root.
"""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import failures
import tiny

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with base/, train/ and held/."""
    folder = tmp_path_factory.mktemp("kills")
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    return folder


def told(capsys) -> str:
    """What was printed, which is shown too."""
    text = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{text}")
    return text


def test_twenty_random_kills_cost_repeated_steps_and_time_and_nothing_else(world, capsys):
    failures.kills(world, count=20, seed=7)
    text = told(capsys)
    assert "weights bitwise equal; losses of" in text and "NOT once" not in text
    redone = [int(row.split()[5]) for row in text.splitlines() if re.match(r"  (rank|agent) by ", row)]
    assert len(redone) == 20 and max(redone) <= 4
    # A checkpoint of step n is committed at n + 2: what the ranks tell of a step, they read with the next one. A kill
    # just before the commit goes on from n - 2.


def test_a_stale_writer_that_wakes_after_its_successor_is_refused(world, capsys):
    failures.stale(world)
    text = told(capsys)
    assert "it said, 1 time(s)" in text and "has taken" in text and "changed after it woke: none" in text


def test_an_mlflow_server_that_is_killed_for_a_minute_misses_no_point(world, capsys):
    failures.mlflow(world)
    assert re.search(r"points lost 0 of \d+, twice 0", told(capsys))
