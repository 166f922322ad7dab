import contextlib
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run import watchdog as watchdogs
from controlbooth.trainer.run.attempt import Attempt
from controlbooth.trainer.run.watchdog import LONGER, SLOWER, Watchdog, describe, waits_in, watching

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def attempt(tmp_path):
    made = Attempt(tmp_path, 1, "id")
    made.folder.mkdir()
    return made


def test_what_is_no_plain_step_may_take_longer_and_slow_kinds_get_more_time(attempt):
    watchdog = Watchdog(attempt, ALONE, 100.0)
    watchdog.close()
    assert watchdog.limit("the step") == 100.0
    assert all(watchdog.limit(kind) == 100.0 * LONGER for kind in ("the start", "the first step", "the validation"))
    watchdog.begin("the validation", 1)
    watchdog._spent = 300.0
    watchdog.begin("the step", 2)
    watchdog._spent = 96.0
    watchdog.begin("the step", 3)
    assert watchdog.limit("the validation") == 300.0 * SLOWER and watchdog.limit("the step") == 96.0 * SLOWER


def test_a_run_that_goes_on_is_left_alone(attempt, monkeypatch):
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, *what: ended.append(what))
    with watching(attempt, ALONE, 0.5) as watchdog:
        for step in range(10):
            watchdog.begin("the step", step)
            time.sleep(0.1)
    time.sleep(0.7)
    assert not ended


def test_time_in_which_the_process_was_stopped_does_not_count(attempt, monkeypatch):
    ended, clock = [], [0.0]
    monkeypatch.setattr(Watchdog, "_end", lambda self, *what: ended.append(what))
    monkeypatch.setattr(watchdogs.time, "monotonic", lambda: clock[0])
    with watching(attempt, ALONE, 5.0) as watchdog:
        watchdog.begin("the step", 1)
        clock[0] += 1000.0  # as after SIGCONT
        time.sleep(1.2)
        assert not ended and 0 < watchdog._spent <= 1.0


def test_the_message_names_every_rank_and_those_that_do_not_answer(tmp_path):
    message = describe({1: "rank 1 on b: the step of step 9, for 60 s: all_sum"}, 4, tmp_path)
    assert "\n  rank 1 on b: the step of step 9" in message and "no answer from rank 0, 2, 3" in message
    assert str(tmp_path / "stacks-*.txt").replace("\\", "/") in message


def test_where_a_thread_waits_is_told_by_the_functions_of_this_project():
    frames = []
    with describe_calls(frames):
        describe({}, 1, Path("run"))
    assert re.match(r"describe \(watchdog.py:\d+\)", waits_in(frames[0]))
    assert waits_in(None) == "code that is not this project's"


@contextlib.contextmanager
def describe_calls(frames):
    """Appends the frames of calls of `describe`."""
    sys.setprofile(lambda frame, event, _: frames.append(frame) if frame.f_code is describe.__code__ else None)
    try:
        yield
    finally:
        sys.setprofile(None)
