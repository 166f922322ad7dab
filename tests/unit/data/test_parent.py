"""Processes that end with the one that has started them, whatever has ended that."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from controlbooth.data.processes.parent import LAUNCHER, end_with_agent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no way to ask for it")
POOL = """
import multiprocessing, pathlib, sys, time
from concurrent.futures import ProcessPoolExecutor
from controlbooth.data.processes.parent import end_with_parent
def work(number):
    import os
    pathlib.Path(f"worker.{number}").write_text(str(os.getpid()))
    time.sleep(60)
if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context(sys.argv[1]), end_with_parent) as pool:
        list(pool.map(work, range(2)))
"""


def wait_until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def started(folder: Path, pattern: str, count: int) -> list[psutil.Process]:
    """The processes that have written their numbers into files."""
    wait_until(lambda: len([path for path in folder.glob(pattern) if path.read_text()]) == count)
    return [psutil.Process(int(path.read_text())) for path in folder.glob(pattern)]


def all_end(processes: list[psutil.Process]) -> bool:
    return psutil.wait_procs(processes, timeout=30)[1] == []


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers_of_a_pool_end_with_a_command_that_is_killed(tmp_path, method):
    (tmp_path / "pool.py").write_text(POOL)
    command = subprocess.Popen([sys.executable, "pool.py", method], cwd=tmp_path, stderr=subprocess.DEVNULL)
    workers = started(tmp_path, "worker.*", 2)
    everybody = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.wait()
    assert all_end([*workers, *everybody])


@pytest.mark.parametrize("module", ["processes/pool", "shards/index", "inspection/scan"])
def test_every_pool_of_the_data_commands_asks_for_it(module):
    text = (Path(__file__).parents[3] / "data" / f"{module}.py").read_text()
    assert text.count("ProcessPoolExecutor(") == 1 and "end_with_parent" in text


def test_what_a_script_has_started_ends_with_it(tmp_path):
    sleeper = "import os, pathlib, time; pathlib.Path('sleeper').write_text(str(os.getpid())); time.sleep(60)"
    (tmp_path / "sleeper.py").write_text(sleeper)
    script = f'"{sys.executable}" -m controlbooth.launch.ranks.child_process "$$" "{sys.executable}" sleeper.py & wait'
    shell = subprocess.Popen(["bash", "-c", script], cwd=tmp_path)
    sleepers = started(tmp_path, "sleeper", 1)
    shell.kill()
    shell.wait()
    assert all_end(sleepers)


def test_a_program_whose_parent_has_ended_already_does_not_begin(tmp_path):
    command = [sys.executable, "-m", "controlbooth.launch.ranks.child_process", "1", "touch", str(tmp_path / "begun")]
    assert subprocess.run(command).returncode == -15 and not (tmp_path / "begun").exists()


def test_a_rank_whose_agent_has_ended_before_it_could_ask_does_not_begin(monkeypatch):
    end_with_agent()  # without an agent there is nothing to ask
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    with pytest.raises(ProcessLookupError, match="the torchrun agent of rank 0 ended before the rank began"):
        end_with_agent()
