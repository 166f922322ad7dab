"""What the counters of a step cost by the number of ranks: `all_rows`, beside the all_gather that it replaced.

    .venv/bin/python tests/benchmarks/side_channel.py [--ranks 2 4 8 16 32] [--rounds 50]

Ranks of gloo on this machine, each with nothing to do but this. Printed: the median milliseconds of `all_rows` with a
step's eleven counters, which takes log2 of the ranks one after another, and of gloo's all_gather of the same (as before
2026-11-30), a ring of all ranks, in turns; and the files that a rank has open after `all_rows`. More ranks than cores
wait for a core as well, so times are of use beside each other only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from record import write

from controlbooth.trainer.engine.distributed import all_rows, join, leave

COUNTERS = 11


def ring() -> None:
    rows = torch.empty(dist.get_world_size(), COUNTERS, dtype=torch.float64)
    dist.all_gather(list(rows.unbind()), torch.zeros(COUNTERS, dtype=torch.float64))
    rows.tolist()


def measure(rounds: int) -> None:
    """On a rank; rank 0 prints the figures as JSON."""
    world = join()
    took: dict[str, list[float]] = {"all_rows": [], "all_gather": []}
    all_rows([0.0] * COUNTERS)
    opened = len(os.listdir("/proc/self/fd"))
    for number in range(rounds + 3):
        for name, call in (("all_rows", lambda: all_rows([0.0] * COUNTERS)), ("all_gather", ring)):
            began = time.perf_counter()
            call()
            if number >= 3:
                took[name].append(1000 * (time.perf_counter() - began))
    if world.rank == 0:
        figures = {f"{name}, ms": statistics.median(values) for name, values in took.items()}
        print(json.dumps(figures | {"open files": opened}), flush=True)
    leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.rounds)
        return
    rows = []
    for ranks in options.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
        done = subprocess.run(
            [*command, "--measure", "--rounds", str(options.rounds)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        rows.append({"ranks": ranks, **json.loads(done.stdout.splitlines()[-1])})
    write("side_channel", rows)


if __name__ == "__main__":
    main()
