import json
import resource
import subprocess
import sys

import pytest
import torch
import yaml

from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.run.attempt import Attempt
from controlbooth.trainer.run.failures import explain, note_failure, remedies

TREE = dict(
    name="run",
    max_steps=10,
    global_batch_size=8,
    micro_batch_size=4,
    model=dict(base="miniature"),
    data=dict(shards="train", condition="edges"),
)


def test_out_of_memory_names_the_rank_its_machine_and_what_to_lower():
    config = build_config(TREE)
    for error, where in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "no GPU memory left"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "no memory of the machine left"),
        (MemoryError(), "no memory of the machine left"),
        (OSError(12, "Cannot allocate memory"), "no memory of the machine left"),
    ):
        message = str(explain(error, config, 3))
        assert message.startswith("rank 3 on ") and where in message and "\n" not in message
        for field in ("micro_batch_size=4", "model.gradient_checkpointing=true", "engine.zero_stage=2"):
            assert field in message


@pytest.mark.parametrize("damaged", ["{}", "[]", "{", "null", '{"state": "running"}'])
def test_a_failure_is_noted_over_a_status_that_says_nothing(tmp_path, damaged):
    (tmp_path / "status.json").write_text(damaged)
    attempt = Attempt(tmp_path, 1, "id")
    attempt.folder.mkdir()
    note_failure(attempt, 0, ValueError("another seed"))
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and status["error"] == "ValueError: another seed"


def test_a_restart_that_was_refused_does_not_change_the_status_of_a_run_that_had_ended(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    attempt = Attempt(tmp_path, 1, "id")
    attempt.folder.mkdir()
    note_failure(attempt, 0, ValueError("another seed"))
    assert (tmp_path / "status.json").read_text() == '{"state": "finished"}'


def test_only_what_is_left_to_lower_is_named():
    tree = TREE | dict(micro_batch_size=1, engine=dict(zero_stage=3, offload_optimizer=True))
    tree["model"] = dict(base="miniature", gradient_checkpointing=True)
    assert remedies(build_config(tree)).startswith("Start on more ranks or fewer")


def test_a_lost_peer_is_told_in_words_and_a_defect_stays_a_defect():
    config = build_config(TREE)
    lost = explain(RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.2]:4711"), config, 0)
    assert "has lost another rank" in str(lost) and "10.0.0.2" in str(lost)
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), config, 0) is None
    assert explain(ValueError("out of range"), config, 0) is None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on memory here")
def test_a_process_without_memory_says_so_in_one_line(tmp_path):
    """A real allocation that fails."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TREE | {"output": str(tmp_path)}))
    program = """
import resource, sys, torch
from pathlib import Path
from controlbooth.trainer.run.attempt import only_run
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.engine.distributed import join
from controlbooth.trainer.run.failures import RankFailed, failure_noted
config, world = load_config(sys.argv[1]), join()
try:
    with only_run(Path(sys.argv[2]), world) as attempt, failure_noted(attempt, config, world):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        torch.zeros(2**30)
except RankFailed as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "run.yaml"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("rank 0 on ") and "no memory of the machine left" in done.stdout, done.stderr
    assert '"state": "failed"' in (tmp_path / "run" / "status.json").read_text()
