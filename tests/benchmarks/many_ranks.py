"""What a start and a step cost a rank by the number of ranks: time, open files and system calls, on 10,000 shards.

    .venv/bin/python tests/benchmarks/many_ranks.py [--ranks 2 4 8 16 32] [--shards 10000]

Ranks of gloo on this machine run the real training program on a tiny base, from a process that has imported everything
(tests/support/forked.py), so that what is measured is our start and not Python's imports. The shards are hard links to
five tiny ones, each with its sidecar, so that each is a file of its own to whoever looks at it. Each number of ranks
begins a run anew, two steps, and then goes on from its checkpoint; both once for times, and once more with strace at
the last rank, which stands for all that are neither rank 0 nor the first of their machine, for system calls.

`start_s` is from the command to the first step, on rank 0. `side_ms` is a step's `all_rows`, of the rank that waits
least for others. `open_files` is what the last rank has open after its first step, and `peers` how many of them are
connections: the ranks that were forked before it have inherited some that they do not use. The calls are those of the
last rank up to its first step: `data`, `base` and `run` name a file in the folder of the shards, of the base and of the
run, `network` sends, receives or connects. More ranks than cores wait for a core as well, so times are of use beside
each other only. Needs strace; `x` is by how much a row is more than the one with half of its ranks, in `start_s`,
`side_ms`, `open_files` and `calls`.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import forked
import tiny
from record import write

MARK = "/first-step-begins"
"""A name that is asked for where the start ends: strace shows it."""
STEPS = 2
NETWORK = ("sendmsg", "sendto", "recvmsg", "recvfrom", "connect", "accept", "accept4", "socket")
OPENED = ("openat", "newfstatat", "stat", "statx", "getdents64", "read", "pread64")


def link_shards(folder: Path, count: int) -> None:
    """Fills folder/many with `count` shards that are hard links to those of folder/train, and their manifest."""
    from controlbooth.data.shards.manifest import ShardRow, describe_shard, find_shards, write_manifest

    rows: list[ShardRow] = []
    (folder / "many").mkdir()
    shards = [(path, describe_shard(path)) for path in find_shards(folder / "train")]
    for number in range(count):
        path, row = shards[number % len(shards)]
        link = folder / "many" / f"{number:06d}.tar"
        for ending in ("", ".idx"):
            os.link(f"{path}{ending}", f"{link}{ending}")
        rows.append(ShardRow(**{**vars(row), "uri": str(link)}))
    write_manifest(rows, folder / "many" / "manifest.jsonl")


def measure(folder: Path, out: Path, name: str, steps: int, traced: bool) -> None:
    """On a rank: trains up to `steps`, and writes what it has seen to out/RANK.json; traced has strace look on."""
    from controlbooth.trainer.config.loading import build_config
    from controlbooth.trainer.controlnet import meter
    from controlbooth.trainer.controlnet import train as training
    from controlbooth.trainer.engine.distributed import end_process, join, leave
    from controlbooth.trainer.run.process import StopRequest, quiet_libraries

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if traced and rank == ranks - 1:
        attach(out / "calls.txt")
    found: dict[str, Any] = {"side": [], "open": 0, "peers": 0}
    all_rows, loop = meter.all_rows, training.loop

    def timed(values):
        began = time.perf_counter()
        rows = all_rows(values)
        found["side"].append(time.perf_counter() - began)
        if not found["open"]:
            names = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
            found["open"], found["peers"] = len(names), sum(name.startswith("socket:") for name in names)
        return rows

    def marked(run, stop):
        found["began"] = time.time()
        with contextlib.suppress(FileNotFoundError):
            os.stat(MARK)
        loop(run, stop)

    meter.all_rows, training.loop = timed, marked
    quiet_libraries()
    tree = tiny.run_tree(folder, name) | dict(max_steps=steps, global_batch_size=32, micro_batch_size=1)
    tree["data"]["shards"] = str(folder / "many")
    tree["checkpoint"] = dict(every_steps=100)
    training.train(build_config(tree), join(), StopRequest())
    (out / f"{rank}.json").write_text(json.dumps(found))
    leave()
    end_process(0)


def attach(path: Path) -> None:
    """Has strace write every call of this process and its threads that is about files, descriptors or the network."""
    kinds = "trace=%file,%desc,%network"
    subprocess.Popen(["strace", "-f", "-y", "-qq", "-s", "0", "-e", kinds, "-o", path, "-p", str(os.getpid())])
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        time.sleep(0.01)


def calls_of(path: Path, folder: Path, name: str) -> dict[str, int]:
    """Counts the calls in strace's file up to MARK: all, by what they are about, and by name for those about files."""
    places = {"data": folder / "many", "base": folder / "base", "run": folder / "runs" / name, "held": folder / "held"}
    count: Counter[str] = Counter()
    with open(path) as lines:
        for line in lines:
            if MARK in line:
                break
            call = re.match(r"\d+ +(\w+)\(", line)
            if call is None:  # the second half of a call that was interrupted
                continue
            count["calls"] += 1
            count["network"] += call[1] in NETWORK or ("<socket:" in line or "<TCP" in line)
            for place, where in places.items():
                count[place] += f"{where}/" in line or f'"{where}"' in line or f"<{where}>" in line
            if call[1] in OPENED:
                count[call[1]] += 1
    return {key: count[key] for key in ("calls", *places, "network", *OPENED)}


def run(folder: Path, ranks: int, name: str, steps: int, traced: bool) -> dict[str, Any]:
    out = Path(tempfile.mkdtemp(dir=folder))
    began = time.time()
    words = [__file__, "--measure", folder, out, name, steps, int(traced)]
    done = forked.run(ranks, words, **forked.BEFORE_IMPORTS)
    if done.returncode:
        raise SystemExit(f"{ranks} ranks exited with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    if traced:
        return calls_of(out / "calls.txt", folder, name)
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {
        "start_s": found[0]["began"] - began,
        "side_ms": 1000 * median(min(one) for one in zip(*(own["side"] for own in found), strict=True)),
        "open_files": found[-1]["open"],
        "peers": found[-1]["peers"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, out, name, steps, traced = options.measure
        measure(Path(folder), Path(out), name, int(steps), bool(int(traced)))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="many-ranks-") as place:
        folder = Path(place)
        tiny.write_base(folder / "base")
        tiny.write_shards(folder)
        link_shards(folder, options.shards)
        forked.run(1, ["-m", "this"], **forked.BEFORE_IMPORTS)  # which waits for the imports
        for ranks in options.ranks:
            for number, start in enumerate(("anew", "resumed"), 1):
                row: dict[str, Any] = {"ranks": ranks, "start": start}
                for traced in (False, True):
                    row |= run(folder, ranks, f"{ranks}-{traced}", STEPS * number, traced)
                half = next((one for one in rows if one["start"] == start and 2 * one["ranks"] == ranks), None)
                for key in ("start_s", "side_ms", "open_files", "calls") if half else ():
                    row[f"{key} x"] = row[key] / half[key]
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    write("many_ranks", rows)


if __name__ == "__main__":
    main()
