"""What ZeRO, gradient checkpointing, the attention kernel and the micro-batch save, measured on SD1.5's shapes.

    .venv/bin/python tests/benchmarks/sd15_memory.py [--resolution 256] [--ranks 2] [--only NAME]

Each row is a run of sd15_step.py in bf16: `gib` is the most that a rank's process has held, `planned` what the plan
says of the same, `seconds` the step's, which on two cores says little. Offloading has no row: on a CPU what is
offloaded stays where it is.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from record import write

from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.planning.footprint import footprint
from controlbooth.trainer.planning.rank_memory import rank_memory

CASES: dict[str, dict[str, Any]] = {
    "ZeRO-0": dict(stage=0),
    "ZeRO-1": dict(stage=1),
    "ZeRO-2": dict(stage=2),
    "ZeRO-3": dict(stage=3),
    "ZeRO-2, checkpointing": dict(stage=2, checkpointing=True),
    "ZeRO-2, math attention": dict(stage=2, attention="math"),
    "ZeRO-2, micro-batch 4": dict(stage=2, batch=4),
    "ZeRO-2, micro-batch 4, checkpointing": dict(stage=2, batch=4, checkpointing=True),
    "ZeRO-2, micro-batch 4, math attention": dict(stage=2, batch=4, attention="math"),
}


def measured(case: dict[str, Any], resolution: int, ranks: int) -> tuple[float, float]:
    """-> GiB of the largest rank, and seconds of the step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(Path(__file__).with_name("sd15_step.py")), "--precision", "bf16", "--resolution", str(resolution)]
    command += ["--zero-stage", str(case["stage"]), "--micro-batch-size", str(case.get("batch", 1))]
    command += ["--attention", case.get("attention", "flash")]
    command += ["--gradient-checkpointing"] * case.get("checkpointing", False)
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "2000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    peaks = re.search(r"peak memory by rank, GiB: (.*)", done.stdout)
    seconds = re.search(r"tensors moved; (\d+) s", done.stdout)
    assert peaks and seconds, done.stdout
    return max(map(float, peaks[1].split())), float(seconds[1])


def planned(case: dict[str, Any], resolution: int, ranks: int) -> float:
    batch = case.get("batch", 1)
    tree = dict(
        name="sd15", max_steps=1, global_batch_size=batch * ranks, micro_batch_size=batch,
        model=dict(base="sd15", gradient_checkpointing=case.get("checkpointing", False)),
        data=dict(shards="none", condition="edges", resolution=resolution), engine=dict(zero_stage=case["stage"]),
    )  # fmt: skip
    config = build_config(tree)
    one = footprint(config, "bf16", batch, case.get("attention", "flash"), "sd15")
    return rank_memory(one, config.engine, "bf16", ranks, "cpu").peak / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    rows = []
    for name, case in CASES.items():
        if options.only not in name:
            continue
        gib, seconds = measured(case, options.resolution, options.ranks)
        plan = planned(case, options.resolution, options.ranks)
        rows.append(
            dict(setting=name, pixels=options.resolution, ranks=options.ranks, gib=gib, planned=plan, seconds=seconds)
        )
        rows[-1] |= dict(off_percent=100 * (plan / gib - 1))
        print(rows[-1], file=sys.stderr, flush=True)
    write("sd15_memory", rows)


if __name__ == "__main__":
    main()
