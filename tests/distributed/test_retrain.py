"""Ticks from the first champion to a rollback, with real trainings, a real registry, a kill and two ticks at once."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from retrainings import Retraining

from controlbooth.deploy.retrain.policy import state_folder
from controlbooth.deploy.retrain.registry import CHALLENGER, CHAMPION, PREVIOUS
from controlbooth.deploy.retrain.rounds import is_alive, read_state, round_folder, with_round, write_state
from controlbooth.trainer.run.checkpoint import complete_checkpoints


@pytest.fixture(scope="module", autouse=True)
def like_torchrun():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


def kill_in_mid_run(retraining):
    one = retraining.rounds[-1]
    end = time.monotonic() + 300
    while not (complete_checkpoints(one_folder := retraining.folder / "runs" / f"{retraining.name}-{one.number:04d}")):
        assert time.monotonic() < end and is_alive(one), "the training never came to a checkpoint"
        time.sleep(0.02)
    kill(one)
    return one_folder


def kill(one):
    process = psutil.Process(one.process)
    for victim in [*process.children(recursive=True), process]:
        victim.kill()
    while is_alive(one):
        time.sleep(0.05)


def test_rounds_from_the_first_champion_to_a_rollback(world_folder, tmp_path, capsys):
    here = Retraining(world_folder, tmp_path, "story")
    here.add_shard(0)
    here.add_shard(1)

    assert here.call("tick", "--dry-run") == 0
    assert "would start round 1" in capsys.readouterr().out
    assert not (tmp_path / "state").exists() and not (tmp_path / "runs").exists()  # and nothing was made

    assert here.call("tick") == 0
    assert here.call("tick") == 0
    assert "round 1 trains" in capsys.readouterr().out
    here.add_shard(2)  # while it trains, and so the next round's
    here.wait()
    assert here.call("status") == 0
    assert "would measure round 1" in capsys.readouterr().out
    assert here.call("tick") == 0
    assert here.decisions == [(1, "started"), (1, "promoted")]
    assert here.aliases() == {CHAMPION: 1, CHALLENGER: 1}
    assert here.rounds[0].samples == 24

    # A round is started by what came meanwhile, dies, is reaped, goes on where it was, and is refused.
    here.write(gate=dict(here.tree["gate"], margin=1.0))
    assert here.call("tick") == 0
    assert here.rounds[1].start != "scratch" and here.rounds[1].samples == 36
    run = kill_in_mid_run(here)
    assert here.call("tick") == 0
    here.wait()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert "going on from" in (state_folder(here.policy) / "rounds" / "0002" / "output.txt").read_text()
    assert here.call("tick") == 0
    assert here.decisions[2:] == [(2, "started"), (2, "reaped"), (2, "resumed"), (2, "refused")]
    assert here.aliases() == {CHAMPION: 1, CHALLENGER: 2}
    assert here.call("tick") == 0 and here.call("tick") == 0
    assert here.decisions[6:] == [(None, "nothing")]  # said once

    # As if it had been promoted, by a tick that died before it moved the alias: the next one does. And the way back.
    folder = state_folder(here.policy)
    decided = replace(here.rounds[1], state="promoting", champion=1)
    write_state(folder, with_round(read_state(folder, 0.0), decided))
    (round_folder(folder, 2) / "verdict.json").write_text("{}")
    assert here.call("tick") == 0
    assert here.decisions[7:] == [(2, "promoted")]
    assert here.aliases() == {CHAMPION: 2, CHALLENGER: 2, PREVIOUS: 1}
    assert here.call("rollback", "--dry-run") == 0 and here.aliases()[CHAMPION] == 2
    assert here.call("rollback", "--reason", "because") == 0
    assert here.aliases() == {CHAMPION: 1, CHALLENGER: 2}
    assert here.call("rollback") == 2  # the first one has no predecessor

    here.write(resumes=0)
    assert here.call("tick", "--now") == 0
    kill(here.rounds[-1])
    assert here.call("tick") == 4
    assert here.decisions[-2:] == [(3, "reaped"), (3, "failed")]
    capsys.readouterr()
    assert here.call("history") == 0
    shown = capsys.readouterr().out
    for text in ("round 2   refused", "rolled back", "version 2 leaves, version 1 returns: because", "edge_f1"):
        assert text in shown


def test_two_ticks_at_the_same_instant_start_one_run(world_folder, tmp_path):
    here = Retraining(world_folder, tmp_path, "twice")
    here.add_shard(0)
    command = [sys.executable, "-m", "controlbooth.launch.cli", "retrain", "tick", str(here.path)]
    ticks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate()[0] for one in ticks]
    assert [one.returncode for one in ticks] == [0, 0]
    assert len(here.rounds) == 1 and here.rounds[0].submissions == 1
    assert sum("round 1 started" in text for text in said) == 1
    kill(here.rounds[0])
