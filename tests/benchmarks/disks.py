"""Prints what full and read-only disks, and a clock that was set back, do to runs, stores, caches and packs.

    .venv/bin/python tests/benchmarks/disks.py          about five minutes on 2 cores; as root, who may mount a tmpfs

Each case is a command on a small disk of memory that has no room, loses it while the command runs, or may only be read.
It must end in one sentence with the remedy and without a traceback, or go on; after room is made the same command must
come to the end, with weights that are equal in every bit to those of a run that nothing disturbed. Exits with 1 else.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

from controlbooth.launch.commands.data_index import main as index

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tiny
from stores import web_server

STEPS = 3
YEAR = 365 * 86400.0
WEIGHTS = f"checkpoints/step-{STEPS:08d}/controlnet/diffusion_pytorch_model.safetensors"


class Ran(NamedTuple):
    status: int
    said: list[str]
    """Lines."""

    @property
    def last(self) -> str:
        return self.said[-1] if self.said else ""

    @property
    def in_words(self) -> bool:
        """Whether no traceback was printed."""
        return not any(line.startswith("Traceback") for line in self.said)


def controlbooth(*words: object) -> Ran:
    program = str(Path(sys.executable).with_name("controlbooth"))
    known = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [program, *map(str, words)], env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Ran(done.returncode, [line for line in done.stdout.splitlines() if line.strip()])


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@contextmanager
def disk(folder: Path, mib: int) -> Iterator[Path]:
    """A disk of memory of so many MiB at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, mib: int) -> None:
    mount("-o", f"remount,size={mib}m", str(folder))


def fill(folder: Path) -> Path:
    """A file that takes all that is left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return path


def digest(run: Path) -> str:
    path = run / WEIGHTS
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "none"


def run_file(folder: Path, **changes: object) -> Path:
    tree = tiny.run_tree(folder, "tiny") | dict(max_steps=STEPS, checkpoint=dict(every_steps=1, keep=9), validation={})
    tree["data"] |= dict(held_out=None)
    for section, value in changes.items():
        tree[section] = tree.get(section, {}) | value if isinstance(value, dict) else value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def steps_in(store: Path) -> list[int]:
    if not store.is_file() or not store.stat().st_size:
        return []
    with closing(sqlite3.connect(store)) as opened:
        try:
            found = opened.execute("select distinct step from metrics where key = 'train/loss' order by step")
            return [step for (step,) in found]
        except sqlite3.DatabaseError:
            return []


class Table:
    """Rows as they come, and whether all were right."""

    def __init__(self) -> None:
        self.wrong = 0
        print("| case | ended | after room was made |\n| --- | --- | --- |", flush=True)

    def row(self, case: str, first: Ran, refused: bool, after: str, right: bool) -> None:
        """refused: whether the first command must have ended with 2."""
        right = right and first.in_words and (first.status == 2) == refused
        self.wrong += not right
        mark = "" if right else " **wrong**"
        print(f"| {case} | {first.status}: {first.last[:160]} | {after}{mark} |", flush=True)


def on_the_runs_disk(folder: Path, whole: str, table: Table) -> None:
    with disk(folder / "small", 200) as small:
        file = run_file(folder, output=str(small))
        train = functools.partial(controlbooth, "train", file)
        filler = fill(small)
        first = train()
        filler.unlink()
        mount("-o", "remount,ro", str(small))
        second = train()
        mount("-o", "remount,rw", str(small))
        last = train()
        equal = digest(small / "tiny") == whole
        table.row("run folder, full before the start", first, True, f"weights equal: {equal}", equal)
        table.row("run folder, read-only", second, True, f"{last.status}; weights equal: {equal}", equal)
        one = sum(path.stat().st_size for path in (small / "tiny/checkpoints/step-00000001").rglob("*")) // 2**20
    with disk(folder / "filling", 4 * one + 4) as small:  # room for what is checked before, and not for what is kept
        file = run_file(folder, output=str(small), checkpoint=dict(every_steps=1, keep=1, keep_best=0))
        sitter = small / "somebody-else"
        process = threading.Thread(target=sit_down, args=(small, sitter))
        process.start()
        first = controlbooth("train", file)
        process.join()
        there = sorted(path.name for path in (small / "tiny" / "checkpoints").glob("*"))
        sitter.unlink(missing_ok=True)
        resize(small, 200)
        last = controlbooth("train", file)
        equal = digest(small / "tiny") == whole
        after = f"there were {', '.join(there) or 'none'}; {last.status}; weights equal: {equal}"
        table.row("run folder, full in mid-run", first, True, after, equal and last.status == 0)


def sit_down(folder: Path, path: Path) -> None:
    """Takes the rest of the disk as soon as the first step was logged."""
    until = time.monotonic() + 300
    lines = folder / "tiny" / "metrics.jsonl"
    while time.monotonic() < until and not (lines.is_file() and b'"loss"' in lines.read_bytes()):
        time.sleep(0.01)
    fill(folder).rename(path)


def on_the_stores_disk(folder: Path, whole: str, table: Table) -> None:
    with disk(folder / "store", 8) as small:
        store = small / "mlflow.db"
        file = run_file(folder, output=str(folder / "stored"), tracking=dict(uri=f"sqlite:///{store}"))
        filler = fill(small)
        first = controlbooth("train", file)
        equal, before = digest(folder / "stored" / "tiny") == whole, steps_in(store)
        filler.unlink()
        last = controlbooth("train", file)
        after = f"steps in MLflow {before}, then {steps_in(store)}; weights equal: {equal}"
        right = equal and first.status == last.status == 0 and steps_in(store) == [*range(1, STEPS + 1)]
        table.row("MLflow store, full", first, False, after, right)
        mount("-o", "remount,ro", str(small))
        first = controlbooth("train", file, "name=other")
        table.row("MLflow store, read-only", first, True, "", not (folder / "stored" / "other").exists())


def on_the_caches_disk(folder: Path, whole: str, table: Table) -> None:
    shards = {f"/{path.name}": path.read_bytes() for path in (folder / "train").iterdir()}
    with web_server(shards) as address, disk(folder / "cache", 4) as small:
        names = sorted(path.name for path in (folder / "train").glob("*.tar"))
        index([*(f"{address}/{name}" for name in names), "--manifest", str(folder / "remote.jsonl")])
        data = dict(shards=str(folder / "remote.jsonl"), cache=str(small), cache_gib=0.003)
        file = run_file(folder, output=str(folder / "cached"), data=data)
        filler = fill(small)
        first = controlbooth("train", file)
        filler.unlink()
        mount("-o", "remount,ro", str(small))
        second = controlbooth("train", file)
        mount("-o", "remount,rw", str(small))
        last = controlbooth("train", file)
        losses = [loss(folder / name / "tiny") for name in ("cached", "plain")]
        equal = losses[0] == losses[1]
        after = f"{last.status}; losses equal to those of local shards: {equal}"
        table.row("cache of shards, full", first, True, after, equal and last.status == 0)
        table.row("cache of shards, read-only", second, True, after, equal)


def loss(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["metrics"]["loss"] for line in lines if "loss" in line.get("metrics", {})]


def on_the_packs_disk(folder: Path, table: Table) -> None:
    pack = ["data", "pack", "--scenes", "60", "--condition", "edges", "--samples-per-shard", "12", "--workers", "1"]
    controlbooth(*pack, "-o", folder / "packed")
    with disk(folder / "packing", 4) as small:
        filler = fill(small)
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - 300_000)  # room for a part of it
        first = controlbooth(*pack, "-o", small / "out")
        filler.unlink()
        last = controlbooth(*pack, "-o", small / "out")
        names = sorted(path.name for path in (folder / "packed").glob("*"))
        equal = all((small / "out" / name).read_bytes() == (folder / "packed" / name).read_bytes() for name in names)
        after = f"{last.status}; all {len(names)} files equal: {equal}"
        table.row("pack, full in between", first, True, after, equal and last.status == 0)


def under_another_clock(folder: Path, whole: str, table: Table) -> None:
    """All times of a run's folder, of files and in them, are a year ahead when it goes on."""
    run = folder / "ahead" / "tiny"
    shutil.copytree(folder / "plain", folder / "ahead")
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    for path in run.rglob("*"):
        if path.name in ("status.json", "attempt.json"):
            tree = json.loads(path.read_text())
            path.write_text(json.dumps(tree | {"state": "running", "time": tree["time"] + YEAR}))
        os.utime(path, (time.time() + YEAR, time.time() + YEAR))
    told = controlbooth("launch", "status", run)
    last = controlbooth("train", run_file(folder, output=str(folder / "ahead")))
    equal, state = digest(run) == whole, json.loads((run / "status.json").read_text())["state"]
    right = equal and last.status == 0 and state == "finished" and told.status == 0
    table.row("clock set back a year", last, False, f"status {told.status}, {state}; weights equal: {equal}", right)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if os.geteuid():
        sys.exit("mounting a disk of memory takes root")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write_base(folder / "base")
        tiny.write_shards(folder)
        plain = controlbooth("train", run_file(folder, output=str(folder / "plain")))
        whole = digest(folder / "plain" / "tiny")
        if plain.status:
            sys.exit("\n".join(plain.said))
        table = Table()
        on_the_runs_disk(folder, whole, table)
        on_the_stores_disk(folder, whole, table)
        on_the_caches_disk(folder, whole, table)
        on_the_packs_disk(folder, table)
        under_another_clock(folder, whole, table)
    print(f"\n{table.wrong} are wrong")
    sys.exit(table.wrong > 0)


if __name__ == "__main__":
    main()
