"""One holder at a time: between processes that start together, after an expiry, and when a sleeper wakes."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from controlbooth.data.files.records import Damaged
from controlbooth.deploy.retrain import lease as leases
from controlbooth.deploy.retrain.lease import Holding, LeaseLost, give_back, held, holder, renew, take

TAKER = """
import sys, time
from pathlib import Path
from controlbooth.deploy.retrain.lease import take
folder = Path(sys.argv[1])
(folder / f"ready-{sys.argv[2]}").touch()
while not (folder / "go").exists():
    pass
print("taken" if take(folder / "lease", 60.0) else "not")
"""


def test_a_lease_is_exclusive_until_it_is_given_back(tmp_path):
    first = take(tmp_path, 60.0)
    assert first is not None and take(tmp_path, 60.0) is None
    give_back(tmp_path, first)
    second = take(tmp_path, 60.0)
    assert second is not None and second.generation == first.generation + 1 and second.owner != first.owner


def test_of_processes_that_start_together_one_gets_it(tmp_path):
    count = 6
    command = [sys.executable, "-c", TAKER, str(tmp_path)]
    takers = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(count)]
    while len(list(tmp_path.glob("ready-*"))) < count:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert sorted(one.communicate()[0].strip() for one in takers) == ["not"] * (count - 1) + ["taken"]


def test_an_expired_one_is_taken_over_and_its_sleeper_notices(tmp_path):
    sleeper = take(tmp_path, 60.0, now=time.time() - 100)
    assert sleeper is not None and held(tmp_path, sleeper)
    successor = take(tmp_path, 60.0)
    assert successor is not None and not held(tmp_path, sleeper)
    with pytest.raises(LeaseLost, match="another one has taken over"):
        renew(tmp_path, sleeper, 60.0)
    give_back(tmp_path, sleeper)  # gives nothing of the successor's away
    assert holder(tmp_path) == successor


def test_a_sleeper_that_wakes_before_anybody_came_goes_on(tmp_path):
    sleeper = take(tmp_path, 60.0, now=time.time() - 100)
    assert sleeper is not None
    renewed = renew(tmp_path, sleeper, 60.0)
    assert take(tmp_path, 60.0) is None and held(tmp_path, renewed)


def test_a_taker_withdraws_where_the_former_holder_renewed_at_the_last_moment(tmp_path, monkeypatch):
    sleeper = take(tmp_path, 60.0, now=time.time() - 100)
    assert sleeper is not None
    write = leases._write_beside

    def first_the_sleeper(folder, lease):
        monkeypatch.setattr(leases, "_write_beside", write)
        renew(folder, sleeper, 60.0)
        return write(folder, lease)

    monkeypatch.setattr(leases, "_write_beside", first_the_sleeper)
    assert take(tmp_path, 60.0) is None
    assert held(tmp_path, sleeper)


def test_old_files_are_tidied_away_and_no_number_is_given_twice(tmp_path):
    numbers = []
    for _ in range(8):
        one = take(tmp_path, 60.0)
        assert one is not None
        numbers.append(one.generation)
        give_back(tmp_path, one)
    assert numbers == list(range(1, 9))
    assert len(list(Path(tmp_path).iterdir())) == 3


def test_a_program_is_waited_for_with_a_lease_that_outlives_it(tmp_path):
    one = take(tmp_path / "lease", 0.4)
    assert one is not None
    holding = Holding(tmp_path / "lease", one, 0.4)
    code = "import time; time.sleep(1.2); print('done'); raise SystemExit(3)"
    assert holding.run([sys.executable, "-c", code], tmp_path / "output.txt") == 3
    assert (tmp_path / "output.txt").read_text() == "done\n"
    assert holding.lease.expires > one.expires
    assert json.loads((tmp_path / "lease" / "lease-00000001.json").read_text())["expires"] == holding.lease.expires


def test_a_program_is_ended_where_the_lease_was_lost(tmp_path):
    one = take(tmp_path / "lease", 0.4, now=time.time() - 100)
    assert one is not None
    holding = Holding(tmp_path / "lease", one, 0.4)
    assert take(tmp_path / "lease", 60.0) is not None
    with pytest.raises(LeaseLost):
        holding.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "output.txt")


def wait_until(true) -> None:
    end = time.monotonic() + 60.0
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_holder_that_thinks_for_long_keeps_its_lease_and_gives_it_back(tmp_path):
    one = take(tmp_path, 0.5)
    assert one is not None
    with Holding(tmp_path, one, 0.5):
        wait_until(lambda: time.time() > one.expires and held(tmp_path, one) and expires(tmp_path) > one.expires)
    assert expires(tmp_path) == 0.0


def expires(folder: Path) -> float:
    last = holder(folder)
    assert last is not None
    return last.expires


def test_a_holder_that_was_asleep_is_told_at_its_next_change_and_takes_nothing_from_its_successor(tmp_path):
    one = take(tmp_path, 0.5, now=time.time() - 100)
    assert one is not None
    successor = take(tmp_path, 60.0)
    with Holding(tmp_path, one, 0.5) as holding:
        wait_until(lambda: not any(thread.name == "lease" for thread in threading.enumerate()))
        with pytest.raises(LeaseLost, match="another one has taken over"):
            holding.renew()
    assert holder(tmp_path) == successor


def test_a_lease_that_outlasts_its_own_time_is_told_as_a_clock_that_was_set_back(tmp_path):
    taken = take(tmp_path, 60.0, now=1e9 + 1e6)
    assert taken is not None and taken.seconds == 60.0
    assert take(tmp_path, 60.0, now=1e9 + 1e6 - 30.0) is None  # clocks of two machines
    with pytest.raises(ValueError, match=r"lease-00000001.json was taken for 60 s .* a clock was set back. Correct it"):
        take(tmp_path, 60.0, now=1e9)


@pytest.mark.parametrize("content", ["{", "[]", '{"generation": 1}', '{"generation": 1, "expires": 1e400}', ""])
def test_a_damaged_lease_is_told_by_name(tmp_path, content):
    assert take(tmp_path, 60.0) is not None
    (tmp_path / "lease-00000001.json").write_text(content)
    with pytest.raises(Damaged, match="lease-00000001.json cannot be read .*Delete it if no tick is at work in"):
        take(tmp_path, 60.0)
