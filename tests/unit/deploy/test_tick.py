"""What a tick says and leaves behind where it starts nothing; ticks that train are in tests/distributed."""

import os
import socket
import time

import psutil
import pytest
from policies import World, pack_scenes

from controlbooth.deploy.retrain import audit
from controlbooth.deploy.retrain import tick as ticks
from controlbooth.deploy.retrain.lease import holder, take
from controlbooth.deploy.retrain.policy import state_folder
from controlbooth.deploy.retrain.rounds import Round, is_alive, read_state, with_round, write_state
from controlbooth.launch import cli

AWAY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_scenes(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def world(packed, tmp_path):
    return World(packed, tmp_path)


def tick(world, *options):
    return cli.main(["retrain", "tick", str(world.path), *options])


def test_a_registry_that_is_away_is_status_3_and_changes_nothing(world, capsys):
    world.write(changes=[f"tracking.uri={AWAY}"])
    assert tick(world) == 3
    assert f"the MLflow registry at {AWAY} does not answer as it should" in capsys.readouterr().err
    folder = state_folder(world.policy)
    assert read_state(folder, 0.0).rounds == () and audit.read(folder) == []
    last = holder(folder)
    assert last is not None and last.expires == 0.0  # and the lease was given back


def test_what_a_person_must_correct_is_status_2_and_in_the_audit_log_once(world, packed, capsys):
    world.write(evaluation=dict(data=str(packed / "a"), samples=4))
    assert tick(world) == 2 and tick(world) == 2
    assert "overlaps the training data" in capsys.readouterr().err
    (entry,) = audit.read(state_folder(world.policy))
    assert entry["decision"] == "stopped" and "overlaps the training data" in entry["reason"]


def test_a_tick_beside_another_one_does_nothing(world, capsys):
    lease = take(state_folder(world.policy), 60.0)
    assert lease is not None
    assert tick(world) == 0
    assert f"another tick is at it: process {lease.process}" in capsys.readouterr().out
    assert tick(world, "--dry-run") == 0
    assert "is at it" in capsys.readouterr().out
    assert not (state_folder(world.policy) / "state.json").exists()


def test_a_run_that_preflight_refuses_is_not_started(world, capsys):
    world.write(changes=["global_batch_size=3"])
    assert tick(world) == 2
    assert "round 1 cannot be started" in capsys.readouterr().err
    assert read_state(state_folder(world.policy), 0.0).rounds == ()


def test_a_tick_that_has_lost_its_lease_while_it_thought_writes_nothing_of_a_round(world, monkeypatch, capsys):
    folder, think = state_folder(world.policy), ticks.check_start

    def while_another_one_takes_over(*arguments):
        assert take(folder, 60.0, now=time.time() + 2 * world.policy.lease_seconds) is not None
        think(*arguments)

    monkeypatch.setattr(ticks, "check_start", while_another_one_takes_over)
    assert tick(world) == 3
    assert "another one has taken over" in capsys.readouterr().err
    assert not (folder / "rounds").exists() and read_state(folder, 0.0).rounds == ()


def test_history_and_status_of_a_policy_that_never_ticked(world, capsys):
    assert cli.main(["retrain", "history", str(world.path)]) == 0
    assert "nothing was decided yet" in capsys.readouterr().out
    assert cli.main(["retrain", "status", str(world.path)]) == 0
    shown = capsys.readouterr().out
    assert "champion    none" in shown and "would start round 1" in shown
    assert cli.main(["retrain", "rollback", str(world.path)]) == 2
    assert "has no champion" in capsys.readouterr().err


def a_round(**changes):
    facts = dict(
        number=1, state="training", run="none", trigger="", started=0.0, identity="", dataset_fingerprint="",
        samples=12, start="scratch", working_directory="/",
    )  # fmt: skip
    return Round(**facts | changes)


def test_a_round_of_another_machine_is_not_judged_from_here():
    with pytest.raises(ValueError, match="round 1 trains on elsewhere, and this is .*Tick there"):
        is_alive(a_round(host="elsewhere"))
    assert not is_alive(a_round())


def test_a_process_number_that_was_given_to_another_program_is_not_the_round():

    began = psutil.Process().create_time()
    mine = dict(host=socket.gethostname(), process=os.getpid())
    assert is_alive(a_round(**mine, process_started=began))
    assert not is_alive(a_round(**mine, process_started=began - 100.0))


def test_state_comes_back_as_it_was_and_a_torn_one_says_what_to_do(tmp_path):
    state = with_round(read_state(tmp_path, 5.0), a_round(number=2))
    state = with_round(with_round(state, a_round(number=1)), a_round(number=2, state="refused"))
    write_state(tmp_path, state)
    assert read_state(tmp_path, 9.0) == state and state.created == 5.0
    assert [(one.number, one.closed) for one in state.rounds] == [(1, False), (2, True)]
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="state.json cannot be read .*the champion stays in the registry"):
        read_state(tmp_path, 9.0)
