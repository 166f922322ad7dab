"""Packs, indexes, lints and reads a million pairs, and prints what each costs; at 10,000 and 100,000 pairs first.

    .venv/bin/python tests/benchmarks/million.py [--samples 1000000] [--folder DIR]

The pairs are scenes of 64 px with their edges. Each stage is the command that a user gives, in a process tree of its
own whose memory is watched; reading goes through the trainer's loader, one epoch, with every key counted. About half an
hour and 6 GB of disk on 2 cores.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from cost import run
from tqdm import tqdm

BATCH = 250
"""Divides the numbers of samples, so that an epoch leaves none out."""


def stages(folder: Path, samples: int) -> None:
    cli = [sys.executable, "-m", "controlbooth.launch.cli", "data"]
    shards = str(folder)
    commands = {
        "pack": ([*cli, "pack", "--scenes", str(samples), "--condition", "edges", "-o", shards], (0,)),
        "index": ([*cli, "index", "--rebuild", shards], (0,)),
        "lint --decode": ([*cli, "lint", shards, "--decode"], (0, 1)),  # scenes hold near copies
        "read": ([sys.executable, __file__, "--read", shards], (0,)),
    }
    lines = []
    for name, (command, statuses) in commands.items():
        cost = run(command, statuses)
        print(
            f"{samples:9,d}  {name:13} {cost.seconds:8.1f}  {1000 * cost.seconds / samples:9.3f}  "
            f"{1000 * cost.cpu_seconds / samples:13.3f}  {cost.peak_bytes / 2**20:8.0f}",
            flush=True,
        )
        lines.append(_said(name, cost.output))
    sizes = [sum(path.stat().st_size for path in folder.glob(pattern)) for pattern in ("*.tar", "*.idx", "*.jsonl")]
    print(f"{'':11}{sizes[0]:,} bytes of shards, {sizes[1]:,} of indexes, {sizes[2]:,} of manifest and journal")
    print(f"{'':11}{'; '.join(line for line in lines if line)}")


def _said(name: str, output: str) -> str:
    """The line of a stage's output that tells what it found."""
    if name.startswith("lint"):
        found = [line.partition("  (")[0] for line in output.splitlines() if "  (" in line and not line.startswith(" ")]
        return f"lint found {', '.join(found) or 'nothing'}"
    return output.strip().splitlines()[-1] if name == "read" else ""


def read(folder: Path) -> None:
    """One epoch through the loader, in the order of a run."""
    from controlbooth.data.inspection.bench import open_loader
    from controlbooth.data.processes.cpus import usable_cpus
    from controlbooth.data.shards.manifest import open_dataset

    dataset = open_dataset(folder)
    samples = sum(row.usable for row in dataset.rows)
    times_seen = bytearray(samples)
    with open_loader(dataset, usable_cpus(), condition="edges", resolution=64, batch_size=BATCH) as loader:
        for _ in tqdm(range(samples // BATCH), unit="step", desc="read"):
            for micro_batch in next(loader).micro_batches:
                for key in micro_batch.keys:
                    times_seen[int(key.rpartition("-")[2])] += 1
    print(f"read {sum(times_seen):,} samples, {times_seen.count(1):,} of {samples:,} exactly once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the largest data set (default: 1000000)")
    parser.add_argument("--folder", type=Path, help="for the shards, which are deleted at the end (default: temporary)")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        return read(options.read)
    if options.samples < BATCH or options.samples % BATCH:
        raise SystemExit(f"--samples {options.samples} is not a multiple of {BATCH}")
    print("  samples  stage          seconds  ms/sample  CPU ms/sample  peak MiB")
    for samples in [count for count in (10_000, 100_000) if count < options.samples] + [options.samples]:
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="million-", dir=options.folder) as name:
            stages(Path(name) / "shards", samples)
    if options.folder and not any(options.folder.iterdir()):
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
