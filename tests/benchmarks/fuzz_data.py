"""Reads files that nobody meant until the minutes are over, and prints how many of each kind, and what was found.

    .venv/bin/python tests/benchmarks/fuzz_data.py --minutes 5 [KIND ...] [--seed 0]

Kinds: pictures, tars, spoiled tars, captions, tables, indexes, manifests. A finding is a file that is neither used as
its format says nor refused by name; it is printed once for each place in the code, the smallest file that shows it, and
the exit status is then 1. The files and the checks are those of tests/support/hostile.py.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from hostile import FUZZES, Fuzz

AT_ONCE = 200


def place_of(error: BaseException) -> str:
    """Where an error comes from: the innermost line of this project or of its checks."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "hypothesis" not in frame.filename]
    frame = next(
        (one for one in reversed(frames) if "controlbooth" in one.filename or "hostile" in one.filename), frames[-1]
    )
    return f"{Path(frame.filename).name}:{frame.lineno}"


def run(fuzz: Fuzz, number: int, found: dict[str, str]) -> int:
    """Checks AT_ONCE files of a kind; -> how many were checked. Adds what it finds by its place."""
    count, smallest = 0, None

    @seed(number)
    @settings(
        max_examples=AT_ONCE, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False,
        phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
    )  # fmt: skip
    @given(fuzz.files)
    def check(file):
        nonlocal count, smallest
        count += 1
        try:
            fuzz.check(file)
        except BaseException:
            smallest = file
            raise

    try:
        check()
    except Exception as error:  # whatever it is, it is what was looked for
        place = f"{fuzz.name}, {place_of(error)}, {type(error).__name__}"
        found.setdefault(place, f"{str(error)[:200]}\n    seed {number}: {smallest!r:.300}")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="(default: all, in turns)")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fuzzes = [fuzz for fuzz in FUZZES if not options.kinds or fuzz.name in options.kinds]
    counts, seconds = {fuzz.name: 0 for fuzz in fuzzes}, {fuzz.name: 0.0 for fuzz in fuzzes}
    found: dict[str, str] = {}
    began, number = time.monotonic(), options.seed
    with tqdm(total=round(60 * options.minutes), unit="s", desc="fuzz") as bar:
        while time.monotonic() - began < 60 * options.minutes:
            fuzz = min(fuzzes, key=lambda fuzz: seconds[fuzz.name])
            start = time.monotonic()
            counts[fuzz.name] += run(fuzz, number, found)
            seconds[fuzz.name] += time.monotonic() - start
            number += 1
            bar.n = min(bar.total, round(time.monotonic() - began))
            bar.refresh()
    for name in counts:
        print(f"{name:14} {counts[name]:8d} files in {seconds[name]:6.0f} s")
    print(f"{sum(counts.values())} files in {(time.monotonic() - began) / 60:.1f} minutes, {len(found)} findings")
    for place, what in sorted(found.items()):
        print(f"  {place}: {what}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
