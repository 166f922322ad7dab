"""Kills two loader processes at random moments, again and again, over an S3 store with cache and prefetch on.

    .venv/bin/python tests/benchmarks/storage_drills.py [--drills 20] [--seed 0]

The data set lies in moto's S3 server; two ranks read it through one cache that holds two thirds of it, so that shards
are fetched and deleted all the time. A rank notes the keys of each step that it has consumed. Both are ended with
SIGKILL, and started again at the last step that both have noted, as from a checkpoint. Each drill is compared with one
undisturbed rank that reads the same shards from a disk.

Then `controlbooth train` itself, on two ranks over the same store: killed, started again, and compared with a run over
local shards that nothing disturbed. About five minutes on 2 cores.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from loaders import make_loader

from controlbooth.data.pictures.images import encode_png
from controlbooth.data.scenes import render
from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.launch.commands.data_index import main as index_main

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from stores import MotoStore

SHARDS, PER_SHARD, SIZE, G, RANKS = 24, 60, 32, 8, 2
STEP_SECONDS = 0.01
"""What a consumer does with a batch here: nothing, for so long."""
PATIENCE_SECONDS = 300.0
LONGEST_SECONDS = 3.0
"""Reading goes on for up to so long after the first step, which is at most some epochs of the data."""
TRAINING_STEPS, KILLED_AFTER_STEP = 10, 5
THREADS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
RUNS = ("store", "local")


def write_shards(folder: Path) -> None:
    import webdataset  # imports torch, which a rank that only reads does not need

    for number in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{number:03d}.tar"), encoder=False, mtime=0) as writer:
            for i in range(number * PER_SHARD, (number + 1) * PER_SHARD):
                what = render.scene(5, i)
                drawn = render.render(what, SIZE)
                parts = {"png": encode_png(drawn.image), "cond.edges.png": encode_png(drawn.edges)}
                writer.write({"__key__": f"k{i:05d}", **parts, "txt": what.caption.encode()})


def loader_of(location: str, rank: int, world_size: int, start_step: int, cache: Cache | None) -> Any:
    return make_loader(
        open_dataset(location), seed=1, lanes=G, shards_per_block=1, global_batch_size=G,
        micro_batch_size=G // world_size, rank=rank, world_size=world_size, condition="edges", resolution=SIZE,
        prompt_dropout=0.5, random_flip=True, random_crop=False, num_train_timesteps=1000, latent_shape=(4, 4, 4),
        threads=2, prefetch_steps=2, start_step=start_step, cache=cache, ranks_per_node=world_size,
    )  # fmt: skip


def consume(manifest: str, folder: str, limit: str, rank: str, start_step: str, journal: str) -> None:
    """One rank: notes [step, keys] line by line until it is killed."""
    cache = Cache(Path(folder), int(limit))
    with open(journal, "a") as file, loader_of(manifest, int(rank), RANKS, int(start_step), cache) as batches:
        print("reads", flush=True)
        for step in batches:
            keys = [key for batch in step.micro_batches for key in batch.keys]
            time.sleep(STEP_SECONDS)
            file.write(json.dumps([step.step, keys]) + "\n")
            file.flush()


def read_journal(path: Path) -> dict[int, list[str]]:
    """Step -> keys, without a last line that the kill has torn."""
    lines = path.read_text().split("\n") if path.exists() else []
    return {step: keys for step, keys in (json.loads(line) for line in lines[:-1])}


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen], what: str) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if any(process.poll() is not None for process in processes):
            raise SystemExit(f"a process has ended by itself before {what}; its message is above")
        if time.monotonic() > until:
            raise SystemExit(f"{what} did not happen within {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.005)


def drill(command: list[str], journals: list[Path], start: int, seconds: float) -> None:
    """Starts both ranks at a step, and kills both some seconds after both have consumed their first one.

    Negative seconds kill them before that, so long after the second one has begun to read.
    """
    ranks = [
        subprocess.Popen([*command, str(rank), str(start), str(journal)], stdout=subprocess.PIPE)
        for rank, journal in enumerate(journals)
    ]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == b"reads\n"
    if seconds >= 0:
        wait_until(lambda: all(map(read_journal, journals)), ranks, "the first step of a drill")
    time.sleep(abs(seconds))
    if any(rank.poll() is not None for rank in ranks):
        raise SystemExit("a rank has stopped by itself; its message is above")
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


def drills(work: Path, manifest: Path, moments: list[float]) -> int:
    """-> how many samples were lost, repeated or out of order."""
    sizes = [row.bytes for row in open_dataset(manifest).rows]
    limit, cache = sum(sizes) * 2 // 3, work / "cache"
    print(f"\n{SHARDS} shards, {sum(sizes) / 1e6:.1f} MB; cache limit {limit / 1e6:.1f} MB; {RANKS} ranks\n")
    print("drill  killed, s after   resumed  consumed  consumed  lost  repeated  other  half shards  cache")
    print("       the first step    at step   to step   samples                  order         left     MB")
    command = [sys.executable, __file__, "consume", str(manifest), str(cache), str(limit)]
    step, wrong = 0, Counter[str]()
    began = time.monotonic()
    with loader_of(str(work / "disk"), 0, 1, 0, None) as undisturbed:
        for number, seconds in enumerate(moments, 1):
            journals = [work / f"{number}-{rank}.jsonl" for rank in range(RANKS)]
            drill(command, journals, step, seconds)
            noted = [read_journal(path) for path in journals]
            end = min(step + len(one) for one in noted)
            seen = [[key for one in noted for key in one[at]] for at in range(step, end)]
            whole = [[key for batch in next(undisturbed).micro_batches for key in batch.keys] for _ in seen]
            had, due = (Counter((at, key) for at, keys in enumerate(all_) for key in keys) for all_ in (seen, whole))
            found = Counter(lost=(due - had).total(), repeated=(had - due).total(), order=int(seen != whole))
            left = len(list(cache.glob("*.part")))
            taken = sum(path.stat().st_size for path in cache.iterdir())
            assert taken <= limit, f"the cache holds {taken} bytes, its limit is {limit}"
            when = f"{seconds:.2f}" if seconds >= 0 else "before it"
            print(
                f"{number:5d}  {when:>15}  {step:8d}  {end:8d}  {due.total():8d}  {found['lost']:4d}  "
                f"{found['repeated']:8d}  {found['order']:5d}  {left:11d}  {taken / 1e6:5.2f}",
                flush=True,
            )
            step, wrong = end, wrong + found
    print(
        f"total: {len(moments)} drills in {time.monotonic() - began:.0f} s, {step * G} samples consumed "
        f"({step * G / (SHARDS * PER_SHARD):.1f} epochs): lost {wrong['lost']}, repeated {wrong['repeated']}, "
        f"drills in another order {wrong['order']}"
    )
    return wrong.total()


def training(work: Path, store: MotoStore) -> bool:
    """Whether a run over the store that is killed has the losses and weights of one over local shards."""
    import tiny

    from controlbooth.trainer.tracking.spool import read_metrics

    tiny.write_base(work / "base")
    tiny.write_shards(work)
    uri, manifest = store.put_folder(work / "train", "bucket/tiny"), work / "tiny.jsonl"
    assert index_main([uri, "--manifest", str(manifest), "--workers", "1"]) == 0

    def start(name: str, **data: object) -> subprocess.Popen:
        tree = tiny.run_tree(work, name) | dict(max_steps=TRAINING_STEPS, global_batch_size=4)
        tree["data"] |= data
        (work / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        command = ["-m", "controlbooth.launch.cli", "train", str(work / f"{name}.yaml"), "--processes", str(RANKS)]
        with open(work / f"{name}.log", "a") as log:
            return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=os.environ | THREADS)

    def finish(name: str, process: subprocess.Popen) -> list[float]:
        if process.wait():
            raise SystemExit(f"the run {name} failed:\n{(work / f'{name}.log').read_text()[-3000:]}")
        return [metrics["loss"] for _, _, metrics in read_metrics(work / "runs" / name) if "loss" in metrics]

    def reached(name: str, step: int) -> bool:
        path = work / "runs" / name / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return any(json.loads(line).get("step", 0) >= step for line in lines)

    whole = finish("local", start("local"))
    remote = dict(shards=str(manifest), cache=str(work / "run-cache"), cache_gib=1.0)
    process = start("store", **remote)
    wait_until(lambda: reached("store", KILLED_AFTER_STEP), [process], f"step {KILLED_AFTER_STEP} of the training")
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.kill()
    process.wait()
    killed = finish("store", start("store", **remote))
    ours, theirs = (tiny.weights(work / "runs" / n / "checkpoints" / f"step-{TRAINING_STEPS:08d}") for n in RUNS)
    same = killed == whole and all((ours[name] == theirs[name]).all() for name in theirs)
    print(
        f"\ncontrolbooth train on {RANKS} ranks over S3 with a cache, killed -9 after step {KILLED_AFTER_STEP} and "
        f"started again: losses of {len(killed)} steps and the final weights "
        f"{'EQUAL' if same else 'DIFFER FROM'} those of a run over local shards"
    )
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    # Every tenth kill or so hits the start, while the first shards are fetched.
    seconds = [moments.uniform(-LONGEST_SECONDS / 9, LONGEST_SECONDS) for _ in range(options.drills)]
    store = MotoStore()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        try:
            (work / "disk").mkdir()
            write_shards(work / "disk")
            store.start()
            os.environ |= store.environment
            uri, manifest = store.put_folder(work / "disk", "bucket/train"), work / "train.jsonl"
            for arguments in ([str(work / "disk")], [uri, "--manifest", str(manifest)]):
                assert index_main([*arguments, "--workers", "1"]) == 0
            wrong = drills(work, manifest, seconds)
            return int(not training(work, store) or wrong > 0)
        finally:
            store.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["consume"]:
        consume(*sys.argv[2:])
    else:
        raise SystemExit(main())
