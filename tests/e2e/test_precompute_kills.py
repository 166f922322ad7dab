"""`controlbooth data precompute` as a user starts it: on two ranks, across a kill -9."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from controlbooth.data.packing.pack import pack
from controlbooth.data.packing.sources import open_scenes
from controlbooth.data.shards.sidecar import index_path

CONFIG = Path(__file__).parents[2] / "launch" / "configs" / "quickstart.yaml"
SHARDS = 24


def precompute(folder, *arguments):
    config = yaml.safe_load(CONFIG.read_text())
    config["data"] |= {"shards": str(folder / "shards"), "held_out": None, "latent_cache": str(folder / "latents")}
    (folder / "run.yaml").write_text(yaml.safe_dump(config | {"output": str(folder / "runs")}))
    command = [sys.executable, "-m", "controlbooth.launch.cli", "data", "precompute", str(folder / "run.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(folder):
    """Cache shards that have their index, and when each was written."""
    tars = (folder / "latents").glob("*.tar")
    return {path.name: path.stat().st_mtime_ns for path in tars if index_path(path).exists()}


def kill_all(process):
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)


def test_the_latent_cache_of_two_killed_ranks_is_completed_by_the_same_command(tmp_path):
    assert pack(open_scenes(16 * SHARDS, 0, 0, 64, ["edges"]), tmp_path / "shards", 16) == []
    dry = precompute(tmp_path, "--dry-run")
    said = dry.communicate(timeout=300)[0].decode()
    assert dry.returncode == 0 and f"{SHARDS} of {SHARDS} shards to compute" in said and "GiB" in said
    assert not (tmp_path / "latents").exists()

    killed = precompute(tmp_path, "--processes", "2")
    until = time.monotonic() + 300
    while len(finished(tmp_path)) < 3 and time.monotonic() < until and killed.poll() is None:
        time.sleep(0.01)
    kill_all(killed)
    before = finished(tmp_path)
    assert 3 <= len(before) < 2 * SHARDS

    again = precompute(tmp_path, "--processes", "2")
    said = again.communicate(timeout=300)[0].decode()
    assert again.returncode == 0, said
    after = finished(tmp_path)
    assert len(after) == 2 * SHARDS and {name: after[name] for name in before} == before
    assert not list((tmp_path / "latents").glob("*.tmp"))
