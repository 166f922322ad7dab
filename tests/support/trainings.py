"""Runs of the tiny base on ranks of torchrun: started, watched, killed, read."""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import forked
import psutil
import tiny
import yaml


def run_file(folder, name, **changes):
    tree = tiny.run_tree(folder, name)
    for section, value in changes.items():
        tree[section] = tree.get(section, {}) | value if isinstance(value, dict) else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(path, processes, **environment):
    return forked.start(
        processes, ["-m", "controlbooth.trainer.controlnet.train", path], forked.BEFORE_IMPORTS | environment
    )


def wait_for_step(run, step):
    """Until metrics.jsonl holds the step; the run must still be going."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        log = run / "metrics.jsonl"
        if log.exists() and any(json.loads(line).get("step", 0) >= step for line in log.read_text().splitlines()[:-1]):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]
    return output


def kill(process):
    """torchrun and, since it starts them in sessions of their own, its ranks."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(signal.SIGKILL)
    process.communicate()


def finish_after_two_kills(path, run, seed):
    """Trains on two ranks to the end, killed at two of the steps 2 to 6."""
    for step in sorted(random.Random(seed).sample(range(2, 7), 2)):
        process = start(path, 2)
        wait_for_step(run, step)
        kill(process)
    assert "going on from" in finish(start(path, 2))


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def path_with_python():
    """The deepspeed launcher looks for `python` on the PATH."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def logged(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [(line["step"], line["metrics"][name]) for line in lines if name in line.get("metrics", {})]
    assert len(dict(values)) == len(values), "a step was logged twice"
    return dict(values)
