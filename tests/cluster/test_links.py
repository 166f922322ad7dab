"""Two hosts and the cable between them, and a host that is lost and comes back.

Each test prints what `tests/benchmarks/failures.py` prints, which is what is quoted.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import failures
import hosts
import tiny

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory) -> Path:
    """A folder with base/, train/ and held/, where hosts can be made."""
    if missing := hosts.why_not():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("links")
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    return folder


def test_a_cable_that_is_cut_for_3_s_or_slow_or_gone_loses_no_step(two_hosts, capsys):
    failures.links(two_hosts)
    told = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{told}")
    assert "host 0 | controlbooth: the ranks hang" in told and "host 1 | controlbooth: the ranks hang" in told
    assert "weights bitwise equal; losses of" in told and "NOT once" not in told


def test_a_host_that_is_lost_and_comes_back_leaves_the_global_batch_as_it_is(two_hosts, capsys):
    failures.nodes(two_hosts)
    told = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{told}")
    assert "samples consumed at every checkpoint: 8 a step" in told and "NOT once" not in told
