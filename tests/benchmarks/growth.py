"""How a step grows with batch, ranks and picture, what a checkpoint stalls, and the time until the first step.

    .venv/bin/python tests/benchmarks/growth.py [--steps 12] [--precision fp32]

Each row is a run of `controlbooth train` on the base of equal_work.py, from its metrics.jsonl: medians over the steps
after the fourth. It saves once on the way, in the background, and once at its end. `stall_ms` is for how long training
stood still for the first of them, `slower_percent` by how much the step after it, beside which its files were written,
was slower than the others. `first_step_s` is from the command to the end of the first step, `resume_s` the same where a
checkpoint is loaded first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from equal_work import write_base, write_pairs
from record import write

CASES = [  # (samples a rank, ranks, pixels)
    (8, 1, 128),
    (4, 1, 128),
    (16, 1, 128),
    (4, 2, 128),
    (8, 2, 128),
    (8, 1, 64),
    (8, 1, 192),
]


def train(folder: Path, case: tuple[int, int, int], precision: str, steps: int) -> tuple[Path, float]:
    """-> the run's folder, and when it was started, in seconds since 1970."""
    batch, ranks, size = case
    name = f"{batch}-{ranks}-{size}"
    tree = dict(
        name=name, output=str(folder / "runs"), max_steps=steps, global_batch_size=batch * ranks,
        micro_batch_size=batch, model=dict(base=str(folder / "base")), engine=dict(precision=precision),
        data=dict(shards=str(folder / "shards"), condition="outline", resolution=size),
        checkpoint=dict(every_steps=max(1, steps // 2)),
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    began = time.time()
    controlbooth("train", str(path), "--processes", str(ranks))
    return folder / "runs" / name, began


def records(run: Path, began: float) -> list[dict[str, Any]]:
    """Of the steps since a time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line and "metrics" in line and line["time"] >= began]


def measure(folder: Path, case: tuple[int, int, int], precision: str, steps: int) -> dict[str, Any]:
    run, began = train(folder, case, precision, steps)
    found = records(run, began)
    seconds = {line["step"]: line["metrics"]["step_seconds"] for line in found if "step_seconds" in line["metrics"]}
    memory = max(line["metrics"]["peak_memory_gib"] for line in found if "peak_memory_gib" in line["metrics"])
    stalls = [
        line["metrics"]["checkpoint_stall_seconds"] for line in found if "checkpoint_stall_seconds" in line["metrics"]
    ]
    beside = steps // 2 + 1
    usual = median(took for step, took in seconds.items() if step > 4 and step != beside)
    resumed, again = train(folder, case, precision, steps + 1)
    batch, ranks, size = case
    return {
        "batch": batch, "ranks": ranks, "pixels": size, "precision": precision, "step_s": usual,
        "samples_per_second": batch * ranks / usual, "memory_gib": memory, "stall_ms": 1000 * stalls[0],
        "stall_in_steps": stalls[0] / usual, "slower_percent": 100 * (seconds[beside] / usual - 1),
        "first_step_s": found[0]["time"] - began, "resume_s": records(resumed, again)[0]["time"] - again,
    }  # fmt: skip


def controlbooth(*arguments: str) -> None:
    command = [sys.executable, "-m", "controlbooth.launch.cli", *arguments]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only so many rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="growth-") as temporary:
        folder = Path(temporary)
        write_base(folder / "base")
        pairs = write_pairs(folder / "pairs", 256) / "parquet" / "train.parquet"
        columns = "--condition outline=conditioning_image --caption-column text --samples-per-shard 32".split()
        controlbooth("data", "pack", str(pairs), "-o", str(folder / "shards"), *columns)
        rows = []
        for case in CASES[: options.cases]:
            rows.append(measure(folder, case, options.precision, options.steps))
            print(rows[-1], file=sys.stderr, flush=True)
    write("growth", rows)


if __name__ == "__main__":
    main()
