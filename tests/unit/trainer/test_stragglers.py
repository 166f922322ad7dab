import time

import pytest
import torch

from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run.stragglers import FACTOR, MOSTLY, WINDOW, Pace, slowest


@pytest.fixture
def pace():
    one = Pace(World(0, 1, 0, torch.device("cpu")))
    one.world, one.hosts = World(0, 3, 0, torch.device("cpu")), ["a", "b", "c"]
    return one


def test_the_slowest_rank_is_compared_with_the_median_of_the_others():
    assert slowest([1.0, 3.0]) == (1, 3.0)
    assert slowest([4.0, 1.0, 1.0, 100.0]) == (3, 100.0)
    assert slowest([0.0, 0.0]) == (0, 1.0)


def test_a_persistently_slow_rank_is_named_once_and_once_more_when_it_keeps_up(pace):
    said = [pace.note([1.0, 1.0, 2.0], 4.0) for _ in range(30)]
    assert [line for line in said if line] == [said[MOSTLY - 1]]
    assert said[MOSTLY - 1].startswith(f"rank 2 on c holds the others up in {MOSTLY} of {WINDOW} steps: 2.00 s before")
    said = [line for line in (pace.note([1.0, 1.0, 1.0], 4.0) for _ in range(30)) if line]
    assert said == ["rank 2 on c keeps up again"]


def test_a_rank_that_is_seldom_slow_or_by_little_or_by_what_does_not_matter_is_not_named(pace):
    assert not any(pace.note([1.0, 1.0, 5.0 if step % 2 else 1.0], 4.0) for step in range(100))
    assert not any(pace.note([1.0, 1.0, FACTOR - 0.1], 4.0) for _ in range(100))
    assert not any(pace.note([0.001, 0.001, 0.002], 4.0) for _ in range(100))
    assert not any(pace.note([5.0 if step % 3 == rank else 1.0 for rank in range(3)], 9.0) for step in range(100))


def test_a_ranks_own_work_ends_at_its_first_backward_pass(pace):
    calls = []
    backward = pace.before(calls.append)
    pace.begin()
    backward(torch.tensor(1.0))
    first = pace.seconds()
    time.sleep(0.05)
    backward(torch.tensor(2.0))
    assert len(calls) == 2 and pace.seconds() == first and 0.0 < first < 0.05


class Event:
    """Keeps the rules of torch.cuda.Event: one that was never recorded counts as past, and has no time."""

    at: float | None = None

    def record(self):
        self.at = time.perf_counter()

    def query(self):
        return True

    def elapsed_time(self, other):
        if self.at is None or other.at is None:
            raise ValueError("both events must be recorded before their time is asked")
        return 1000.0 * (other.at - self.at)


def test_a_gpus_own_time_is_told_a_step_later_and_asked_of_events_that_were_recorded(pace):
    pace._new_event = Event
    backward = pace.before(lambda loss: None)
    told = []
    for _ in range(3):
        pace.begin()
        time.sleep(0.02)
        backward(torch.tensor(1.0))
        pace._seconds = 0.0  # as where the host only launches
        told.append(pace.seconds())
    assert told[0] == 0.0 and all(0.02 <= seconds < 0.2 for seconds in told[1:])
