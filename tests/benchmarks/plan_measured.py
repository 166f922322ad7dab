"""The plan against steps that were measured on GPUs: samples/s of a micro-batch predicted from the others, and memory.

    .venv/bin/python tests/benchmarks/plan_measured.py [--calibration ROWS.jsonl]

The rows are those of trainer/planning/measured.yaml, by which `controlbooth plan` reckons, or those of --calibration.
`from the others`: the speed is fitted to the other micro-batches of the same step; `from all` is what the plan says.
Memory is planned for the engine of now: the shipped rows were measured when DeepSpeed's bucket held what
SingleRankGradients hold now, so that of them only the growth from one micro-batch to the next can be compared. Seconds
on one core.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from controlbooth.trainer.config.run import EngineConfig
from controlbooth.trainer.planning.accelerators import ACCELERATORS, Accelerator, Layout, is_card
from controlbooth.trainer.planning.calibration import SHIPPED, Measured, nearest, read_rows
from controlbooth.trainer.planning.choices import known_footprint, measured_speed
from controlbooth.trainer.planning.footprint import Footprint, scaled
from controlbooth.trainer.planning.rank_memory import rank_memory
from controlbooth.trainer.planning.scaling import step_time
from controlbooth.trainer.planning.speed import UNMEASURED

GIB = 2**30


def predicted(one: Footprint, measured: Measured, rows: Sequence[Mapping[str, Any]], size: int) -> float:
    """Samples/s at this micro-batch by these rows."""
    card, precision = measured.measured_card, rows[0]["precision"]
    speed = measured_speed(one, replace(measured, rows=rows), UNMEASURED["cuda"])
    return step_time(scaled(one, size), Layout(card, 1, 1), EngineConfig(), precision, size, speed).samples_per_second


def show(measured: Measured) -> None:
    """A line for each micro-batch of a step."""
    one = known_footprint(measured)
    before = None
    for row in measured.rows:
        size, rate = row["micro_batch_size"], row["samples_per_second"]
        others = [other for other in measured.rows if other is not row]
        rates = [predicted(one, measured, rows, size) for rows in (others, measured.rows) if rows]
        peak = rank_memory(scaled(one, size), EngineConfig(), row["precision"], 1, "cuda").peak / GIB
        held = row.get("peak_memory_gib") or float("nan")
        grown = "" if before is None else f"{held - before[0]:+10.2f}{peak - before[1]:+9.2f}"
        before = held, peak
        name = f"{row['device']}, {row['family']}, {row['resolution']} px, {row['precision']}, micro-batch {size}"
        print(
            f"{name:<50}{rate:10.1f}"
            + "".join(f"{one:10.1f} {100 * (one / rate - 1):+6.1f} %" for one in rates)
            + f"{held:8.2f}{peak:9.2f}{grown}",
            flush=True,
        )


def card_of(row: Mapping[str, Any]) -> Accelerator:
    return next(card for card in ACCELERATORS.values() if is_card(card, row["device"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, default=SHIPPED, help="rows of tests/benchmarks/gpu.py")
    options = parser.parse_args()
    rows = read_rows(options.calibration)
    heads = f"{'from the others':>19}{'from all':>19}{'GiB':>8}{'planned':>9}{'growth':>10}{'planned':>9}"
    print(f"{'':<50}{'samples/s':>10}{heads}")
    steps = [nearest(rows, row, card_of(row)) for row in rows]
    for number, measured in enumerate(steps):
        if measured.rows not in [other.rows for other in steps[:number]] and len(measured.rows) > 1:
            show(measured)


if __name__ == "__main__":
    main()
