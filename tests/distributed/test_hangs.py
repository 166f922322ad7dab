"""Ranks that hang, on torchrun and gloo."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

HANGING = Path(__file__).parent / "workers" / "hanging.py"


def start(folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HANGING)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(folder), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_ranks_that_hang_write_their_stacks_say_what_each_waits_in_and_end(tmp_path):
    process = start(tmp_path, "2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count("controlbooth: the ranks hang, and end") == 1, output
    assert (
        "of step 2, for" in output and "all_sum (distributed.py:" in output and "wait_for_ever (hanging.py:" in output
    )
    assert "raise engine.hang_timeout_seconds" in output
    for rank, function in enumerate(("all_sum", "wait_for_ever")):
        stacks = (tmp_path / f"stacks-{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank} on ") and function in stacks and "(most recent call first)" in stacks
        assert "RankHung: rank" in json.loads((tmp_path / f"failed-{rank}.json").read_text())["error"]


def test_a_rank_that_cannot_answer_is_named(tmp_path):
    process = start(tmp_path, "2", "frozen")
    assert process.stdout is not None
    output = ""
    for line in process.stdout:  # rank 0 says it, and ends
        output += line
        if "no answer" in line:
            break
    for one in psutil.Process(process.pid).children(recursive=True):
        one.send_signal(signal.SIGCONT)
    process.communicate(timeout=300)
    assert "no answer from rank 1: look at its machine and at the network to it first" in output, output
