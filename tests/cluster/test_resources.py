"""A disk that is full and a machine without memory: one message each, and the run goes on when there is room."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import tiny
import trainings

pytestmark = pytest.mark.cluster
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
"""Of cgroup version 1; version 2 gives no groups to a process that is not alone in its own."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk and to limit memory")
    folder = tmp_path_factory.mktemp("resources")
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    return folder


def train(path: Path, processes: int, group: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "controlbooth.launch.cli", "train", str(path), "--processes", str(processes)]
    if group is not None:
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_a_disk_that_fills_up_ends_a_run_with_one_message_and_the_run_goes_on_when_there_is_room(world, tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "none", str(tmp_path)], check=True)
    try:
        path = trainings.run_file(world, "full", max_steps=8, output=str(tmp_path), checkpoint=dict(every_steps=4))
        process = trainings.start(path, 2)
        trainings.wait_for_step(tmp_path / "full", 1)
        (tmp_path / "another program's").write_bytes(bytes(os.statvfs(tmp_path).f_bavail * 4096 - 2**20))
        output, _ = process.communicate(timeout=900)
        # before the checkpoint is begun, or while it is written, if it filled up then
        assert process.returncode == 1 and "a checkpoint takes up to" in output, output[-3000:]
        assert "Free some, lower checkpoint.keep" in output
        assert "Traceback" not in output.partition("a checkpoint takes up to")[0]
        (tmp_path / "another program's").unlink()
        trainings.finish(trainings.start(path, 2))
        assert set(trainings.logged(tmp_path / "full", "loss")) == set(range(1, 9))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_rank_that_the_kernel_kills_for_memory_is_told_with_what_to_lower(world):
    if not (MEMORY_GROUPS / "memory.limit_in_bytes").exists():
        pytest.skip(f"needs {MEMORY_GROUPS}, to limit the memory of a run")
    group = MEMORY_GROUPS / f"controlbooth-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(800 * 2**20))
        done = train(trainings.run_file(world, "starved", max_steps=2), 2, group)
        last = done.stderr.splitlines()[-1]
        assert done.returncode != 0 and "ended without a word, and the kernel has killed" in last, done.stderr[-3000:]
        assert "micro_batch_size=2" in last
    finally:
        group.rmdir()
