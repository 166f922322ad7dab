"""Kills two loader processes at random moments, again and again, over an S3 store with cache and prefetch on.

    python tests/benchmarks/storage_drills.py [--drills 20] [--seed 0]

The data set lies in moto's S3 server; two ranks read it through one cache that holds two thirds of it, so that shards
are fetched and deleted all the time. A rank notes the keys of each step that it has consumed. Both are ended with
SIGKILL, and started again at the last step that both have noted, as from a checkpoint. What was consumed in the end is
compared with one undisturbed rank that reads the same shards from a disk.
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
from pathlib import Path

import webdataset

from controlbooth.data import scenes
from controlbooth.data.cache import Cache
from controlbooth.data.index import main as index_main
from controlbooth.data.loader import Loader
from controlbooth.data.manifest import open_dataset
from controlbooth.data.sources import encode_png

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from stores import MotoStore

SHARDS, PER_SHARD, SIZE, G, RANKS = 24, 60, 32, 8, 2
STEP_SECONDS = 0.01
"""What a consumer does with a batch here: nothing, for so long."""


def write_shards(folder: Path) -> None:
    for number in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{number:03d}.tar"), encoder=False, mtime=0) as writer:
            for i in range(number * PER_SHARD, (number + 1) * PER_SHARD):
                what = scenes.scene(5, i)
                drawn = scenes.render(what, SIZE)
                parts = {"png": encode_png(drawn.image), "cond.edges.png": encode_png(drawn.edges)}
                writer.write({"__key__": f"k{i:05d}", **parts, "txt": what.caption.encode()})


def make_loader(location: str, rank: int, world_size: int, start_step: int, cache: Cache | None) -> Loader:
    return Loader(
        open_dataset(location), seed=1, lanes=G, shards_per_block=1, global_batch_size=G,
        micro_batch_size=G // world_size, rank=rank, world_size=world_size, condition_kind="edges", resolution=SIZE,
        prompt_dropout=0.5, random_flip=True, random_crop=False, num_train_timesteps=1000, latent_shape=(4, 4, 4),
        threads=2, prefetch_steps=2, start_step=start_step, cache=cache, ranks_per_node=world_size,
    )  # fmt: skip


def consume(manifest: str, folder: str, limit: str, rank: str, start_step: str, journal: str) -> None:
    """One rank: notes [step, keys] line by line until it is killed."""
    cache = Cache(Path(folder), int(limit))
    with open(journal, "a") as file, make_loader(manifest, int(rank), RANKS, int(start_step), cache) as batches:
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


def drill(command: list[str], environment: dict, journals: list[Path], start: int, seconds: float) -> None:
    """Starts both ranks at a step, and kills both some seconds after the second one has begun to read."""
    ranks = [
        subprocess.Popen([*command, str(rank), str(start), str(journal)], stdout=subprocess.PIPE, env=environment)
        for rank, journal in enumerate(journals)
    ]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == b"reads\n"
    time.sleep(seconds)
    if any(rank.poll() is not None for rank in ranks):
        raise SystemExit("a rank has stopped by itself; its message is above")
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    moments, store = random.Random(options.seed), MotoStore()
    with tempfile.TemporaryDirectory() as name:
        try:
            run(Path(name), store, [moments.uniform(0.0, 2.0) for _ in range(options.drills)])
        finally:
            store.kill()


def run(work: Path, store: MotoStore, moments: list[float]) -> None:
    (work / "disk").mkdir()
    write_shards(work / "disk")
    store.start()
    uri, manifest = store.put_folder(work / "disk", "bucket/train"), work / "train.jsonl"
    os.environ |= store.environment
    for arguments in ([str(work / "disk")], [uri, "--manifest", str(manifest)]):
        assert index_main([*arguments, "--workers", "1"]) == 0
    sizes = [row.bytes for row in open_dataset(manifest).rows]
    limit = sum(sizes) * 2 // 3
    print(f"\n{SHARDS} shards, {sum(sizes) / 1e6:.1f} MB; cache limit {limit / 1e6:.1f} MB; {RANKS} ranks\n")
    print("drill  killed after    steps      samples  half shards left  cache MB")

    command = [sys.executable, __file__, "consume", str(manifest), str(work / "cache"), str(limit)]
    consumed: dict[int, list[str]] = {}
    for number, seconds in enumerate(moments, 1):
        journals, start = [work / f"{number}-{rank}.jsonl" for rank in range(RANKS)], len(consumed)
        drill(command, dict(os.environ), journals, start, seconds)
        noted = [read_journal(path) for path in journals]
        end = min(start + len(one) for one in noted)
        for step in range(start, end):
            consumed[step] = [key for one in noted for key in one[step]]
        left = len(list((work / "cache").glob("*.part")))
        taken = sum(path.stat().st_size for path in (work / "cache").iterdir())
        assert taken <= limit, f"the cache holds {taken} bytes, its limit is {limit}"
        row = f"{number:5d}  {seconds:9.2f} s  {start:6d}..{end:<6d}  {(end - start) * G:7d}"
        print(f"{row}  {left:16d}  {taken / 1e6:8.2f}", flush=True)

    with make_loader(str(work / "disk"), 0, 1, 0, None) as batches:
        whole = [[key for batch in next(batches).micro_batches for key in batch.keys] for _ in consumed]
    expected = Counter((step, key) for step, keys in enumerate(whole) for key in keys)
    seen = Counter((step, key) for step, keys in consumed.items() for key in keys)
    lost, repeated = (expected - seen).total(), (seen - expected).total()
    places = sum(keys != other for keys, other in zip(whole, consumed.values(), strict=True))
    epochs = expected.total() / (SHARDS * PER_SHARD)
    print(
        f"\n{len(moments)} drills, {seen.total()} samples consumed ({epochs:.1f} epochs), against an undisturbed run:"
    )
    print(f"lost {lost}, repeated {repeated}, steps in another order {places}")
    if lost or repeated or places:
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["consume"]:
        consume(*sys.argv[2:])
    else:
        main()
