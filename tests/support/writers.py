"""Many runs that write at once, in threads of one process: `python writers.py URI FOLDER FIRST COUNT STEPS SECONDS`.

Each logs STEPS steps of three metrics within SECONDS, and a data set; every FILES_EVERYth a picture, a table and a
checkpoint too. Prints how many lines were left at the end.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from controlbooth.trainer.tracking import tracker as tracking
from controlbooth.trainer.tracking.tracker import Input, Tracker, table_json

METRICS = ("loss", "grad_norm", "step_seconds")
FILES_EVERY = 5
CLOSE_SECONDS = 300.0


def run_name(number: int) -> str:
    return f"writer-{number:03d}"


def write(uri: str, folder: Path, number: int, steps: int, seconds: float) -> int:
    run = folder / run_name(number)
    tracker = Tracker(run, uri, "writers", run.name, {"number": number}, {}, system_metrics_seconds=3600.0)
    tracker.log_inputs([Input("scenes", f"{number % 7:032x}", "/data/scenes", 60, "training")])
    for step in range(1, steps + 1):
        tracker.log(step, {name: (place + 1) / step for place, name in enumerate(METRICS)})
        time.sleep(seconds / steps)
    if number % FILES_EVERY == 0:
        Image.new("RGB", (16, 16), (number % 256, 0, 0)).save(run / "grid.png")
        (run / "table.json").write_text(table_json(["figure", "mean"], [["edge_f1", 0.5]]))
        tracker.log_image(run / "grid.png", "samples", steps)
        tracker.log_table(run / "table.json")
        tracker.log_checkpoint(
            steps, f"digest-{number}", f"file://{run}/step", {"loss": 1 / steps}, tracker.times(steps)
        )
    tracker.finish("FINISHED")
    return tracker.close(CLOSE_SECONDS)


def main() -> None:
    uri, folder, first, count, steps, seconds = sys.argv[1:]
    tracking.LAST_RETRY_SECONDS = 15.0  # a minute would be longer than the test; each at once would be a storm
    numbers = range(int(first), int(first) + int(count))
    with ThreadPoolExecutor(len(numbers)) as pool:
        left = pool.map(lambda number: write(uri, Path(folder), number, int(steps), float(seconds)), numbers)
        print(sum(left))


if __name__ == "__main__":
    main()
