"""`controlbooth launch local`: a job in the background of this machine, from submitting to resuming."""

import json
import re
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tiny import run_tree

from controlbooth.launch.cli import main as controlbooth

STEPS = 400
"""More than are taken before it is cancelled."""


@pytest.fixture(scope="module")
def folder(world_folder) -> Path:
    """Of a run that was submitted."""
    tree = run_tree(world_folder, "in-background") | dict(max_steps=STEPS, checkpoint=dict(every_steps=50, keep=2))
    tree["data"]["held_out"] = None
    (world_folder / "in-background.yaml").write_text(yaml.safe_dump(tree))
    (world_folder / "local.yaml").write_text("engine: local\ngrace_seconds: 60\n")
    words = ["launch", "local", str(world_folder / "in-background.yaml"), "--cluster", str(world_folder / "local.yaml")]
    assert controlbooth([*words, "--dry-run"]) == 0 and not (world_folder / "runs" / "in-background").exists()
    assert controlbooth(words) == 0
    yield world_folder / "runs" / "in-background"
    controlbooth(["launch", "cancel", str(world_folder / "runs" / "in-background"), "--now"])


def told(capsys, *words) -> str:
    """What a verb prints, whatever its status."""
    capsys.readouterr()
    controlbooth(["launch", *map(str, words)])
    captured = capsys.readouterr()
    return captured.out + captured.err


def wait_until(true, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def rank_of(folder: Path) -> psutil.Process | None:
    """The process that trains, when it has begun to."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "controlbooth.trainer.controlnet.train" in words and "torch.distributed.run" not in words:
            if any(str(folder) in word for word in words):
                return process
    return None


def test_a_job_is_followed_killed_cancelled_and_resumed(folder, capsys):
    def step() -> int:
        found = re.search(r"at step (\d+)", told(capsys, "status", folder))
        return int(found[1]) if found else 0

    wait_until(lambda: step() > 2)
    assert "is being trained by local job" in told(capsys, "resume", folder)
    killed = time.time()
    rank_of(folder).kill()  # as the system does where memory runs out
    wait_until(lambda: json.loads((folder / "status.json").read_text())["time"] > killed)
    assert "== attempt 1001" in (folder / "job" / "log.txt").read_text()
    wait_until(lambda: step() > 2)
    assert "ends after this step, with a checkpoint" in told(capsys, "cancel", folder)
    wait_until(lambda: "nothing is at work on it now" in told(capsys, "status", folder))
    stopped = json.loads((folder / "status.json").read_text())
    assert stopped["state"] == "stopped" and (folder / "checkpoints" / f"step-{stopped['step']:08d}").is_dir()
    log = (folder / "job" / "log.txt").read_text().partition("== attempt 1001")[2]
    assert "Traceback" not in log and log.splitlines()[-1].startswith("== cancelled, and not started again, ")
    assert "nothing is at work" in told(capsys, "cancel", folder)
    assert "local job" in told(capsys, "resume", folder, f"max_steps={stopped['step'] + 2}")
    log = told(capsys, "logs", folder, "--follow")
    assert "== attempt 2000" in log and "== finished" in log
    status = told(capsys, "status", folder)
    assert f"in-background: finished at step {stopped['step'] + 2}" in status and "submission 2" in status


def test_the_job_folder_says_what_was_run_and_by_which_code(folder):
    record = json.loads((folder / "job" / "job.json").read_text())
    assert record["engine"] == "local" and record["code"].keys() == {"version", "commit", "dirty"}
    assert yaml.safe_load((folder / "job" / "run.yaml").read_text())["name"] == "in-background"
    assert yaml.safe_load((folder / "job" / "cluster.yaml").read_text())["grace_seconds"] == 60
    assert "torch.distributed.run" in (folder / "job" / "script.sh").read_text()


def test_a_folder_without_a_job_is_told(tmp_path, capsys):
    for verb in ("logs", "cancel", "resume"):
        assert "has no job/job.json, so no job was submitted for it" in told(capsys, verb, tmp_path)
    assert "and no job was submitted for it: give the folder of a run" in told(capsys, "status", tmp_path)
