"""Prints whether the samples of a step draw independently of each other, whatever they are called.

    .venv/bin/python tests/benchmarks/independence.py

Packs and indexes five data sets whose names repeat, or do not, and runs the real loader over STEPS steps of BATCH:
how many prompts of each step are dropped, by the loader and by the rule of data orders of version 2, which drew from
(epoch, key) and is computed here for comparison. Then every draw is held against chance over many more steps: how
alike the samples of a step draw, and how much one draw tells of another. Exits with 1 where something of today's rule
lies outside of the range that independent draws stay in 999 times of 1000. Half a minute on 2 cores.
"""

import csv
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import simplejpeg
import webdataset
from loaders import make_loader

from controlbooth.data.order import draws
from controlbooth.data.pictures.images import encode_png
from controlbooth.data.scenes import render
from controlbooth.data.shards.manifest import Dataset, join_datasets, open_dataset
from controlbooth.launch.commands.data_pack import main as pack

BATCH, STEPS, RATE, SEED = 32, 20, 0.5, 0
LEVEL = 0.999
LONG = 4000
"""Steps over which the draws are held against each other."""
KINDS = ("dropout", "flip", "timestep", "crop row", "crop column", "caption", "condition")


@dataclass(frozen=True)
class Steps:
    """What the loader gave, (STEPS, BATCH) each."""

    dropped: np.ndarray
    by_name: np.ndarray
    """Whether the old rule would have dropped the prompt: H(seed, epoch, key) < rate * 2**64."""
    keys: list[list[str]]
    """Of each step's samples."""


def picture(number: int) -> np.ndarray:
    return render.render(render.scene(SEED, number), 32).image


def two_tables(folder: Path) -> Dataset:
    """Two CSV tables, packed by `data pack` as a user would: sample names 00000000, 00000001, ... in both."""
    for table in range(2):
        root = folder / f"table-{table}"
        root.mkdir(parents=True)
        with open(root / "table.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "caption"])
            for row in range(40):
                (root / f"{row}.png").write_bytes(encode_png(picture(table * 40 + row)))
                rows.writerow([f"{row}.png", f"table {table}, row {row}"])
        packed = ["--samples-per-shard", "10", "--workers", "1", "-o", str(root / "shards")]
        if pack([str(root / "table.csv"), *packed]):
            raise SystemExit("the table could not be packed")
    return join_datasets([open_dataset(folder / f"table-{table}" / "shards") for table in range(2)])


def write_shards(
    folder: Path, shards: int, per_shard: int, name: Callable[[int, int], str], captions: str = "txt"
) -> Dataset:
    """Shards as another tool would leave them. name(shard, number) -> key."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False, mtime=0) as writer:
            for number in range(per_shard):
                key = name(shard, number)
                jpeg = simplejpeg.encode_jpeg(picture(shard * per_shard + number))
                parts = {"jpg": jpeg, "txt": f"picture {number} of {shard}".encode()}
                if captions == "json":
                    parts["json"] = json.dumps({"caption": "from the web", "key": key, "status": "success"}).encode()
                writer.write({"__key__": key, **parts})
    return open_dataset(folder, index_missing=True)


def equal_keys(folder: Path) -> Dataset:
    """64 shards with the keys 0000 to 0003 in each."""
    return write_shards(folder, 64, 4, lambda shard, number: f"{number:04d}")


def one_key(folder: Path) -> Dataset:
    """256 shards of one sample, image.jpg and image.txt in each."""
    return write_shards(folder, 256, 1, lambda shard, number: "image")


def img2dataset(folder: Path) -> Dataset:
    """Two downloads as img2dataset writes them: 00000.tar with 000000000.jpg, .txt and .json, and so on, in both."""
    parts = [
        write_shards(folder / str(part), 4, 10, lambda shard, number: f"{shard:05d}{number:04d}", "json")
        for part in range(2)
    ]
    return join_datasets(parts)


def unique_names(folder: Path) -> Dataset:
    return write_shards(folder, 16, 16, lambda shard, number: f"sample-{shard}-{number}")


DATA_SETS: dict[str, Callable[[Path], Dataset]] = {
    "two tables, packed": two_tables,
    "4 keys in each of 64 shards": equal_keys,
    "1 key in each of 256 shards": one_key,
    "img2dataset, two downloads": img2dataset,
    "unique names": unique_names,
}


def load(dataset: Dataset) -> Steps:
    """STEPS real batches of the loader."""
    dropped, by_name, keys = [], [], []
    with make_loader(
        dataset, seed=SEED, lanes=BATCH, shards_per_block=2, global_batch_size=BATCH, micro_batch_size=BATCH, rank=0,
        world_size=1, condition=None, resolution=16, prompt_dropout=RATE, random_flip=True, random_crop=True,
        num_train_timesteps=1000, latent_shape=(4, 2, 2),
    ) as loader:  # fmt: skip
        for _ in range(STEPS):
            [batch] = next(loader).micro_batches
            epochs = [loader.order.locate(position).epoch for position in batch.positions.tolist()]
            dropped.append(batch.dropped)
            by_name.append([dropped_by_name(epoch, key) for epoch, key in zip(epochs, batch.keys, strict=True)])
            keys.append(batch.keys)
    return Steps(np.array(dropped), np.array(by_name), keys)


def agreement(dropped: np.ndarray, keys: Sequence[Sequence[str]]) -> str:
    """Of all pairs of samples of a step with one key, how many lost their prompts together or kept them together."""
    alike = [
        one == other
        for row, names in zip(dropped.tolist(), keys, strict=True)
        for (one, name), (other, its) in itertools.combinations(zip(row, names, strict=True), 2)
        if name == its
    ]
    return f"{np.mean(alike):.2f} of {len(alike)}" if alike else "none"


def dropped_by_name(epoch: int, key: str) -> bool:
    """The rule up to order version 2, as data/order/draws.py had it."""
    bits = draws.random_bits(draws.hash64(SEED, "prompt_dropout", epoch), np.array([draws.hash64(key)], np.uint64))
    return bool(bits[0] < np.uint64(int(RATE * 2.0**64)))


def binomial_range(count: int) -> tuple[int, int]:
    """The central counts that count draws at RATE give with probability LEVEL, both tails cut alike."""
    weights = [math.comb(count, k) * RATE**k * (1 - RATE) ** (count - k) for k in range(count + 1)]
    below = np.cumsum(weights)
    tail = (1 - LEVEL) / 2
    return int(np.searchsorted(below, tail, side="right")), int(np.searchsorted(below, 1 - tail))


def chi_square_range(degrees: int) -> tuple[float, float]:
    """The central range of a chi-square of so many degrees with probability LEVEL, by Wilson and Hilferty (1931)."""
    spread = NormalDist().inv_cdf((1 + LEVEL) / 2) * (2 / (9 * degrees)) ** 0.5
    return tuple(degrees * (1 - 2 / (9 * degrees) + sign * spread) ** 3 for sign in (-1, 1))  # type: ignore[return-value]


def told(value: float, low: float, high: float) -> str:
    return "inside" if low <= value <= high else "OUTSIDE"


def show_dropout(folder: Path) -> bool:
    """Prompts dropped in each step of each data set; -> whether all of the loader's lie inside."""
    low, high = binomial_range(BATCH)
    total_low, total_high = binomial_range(BATCH * STEPS)
    print(f"prompts dropped in {STEPS} steps of {BATCH} at rate {RATE}, seed {SEED}")
    print(f"chance: {low} to {high} in a step, {total_low} to {total_high} in all, {LEVEL:.1%} of the time each")
    spread_low, spread_high = (bound / STEPS for bound in chi_square_range(STEPS))
    print(f"variance over steps, in that of independent draws: {spread_low:.2f} to {spread_high:.2f}")
    print("pairs of a step with one key that lost or kept their prompts together: 0.50 by chance")
    print(
        f"  {'':27} {'keys a step':>11}  {'rule':8} {'fewest':>6} {'most':>4} {'all':>4} {'mean':>5} {'variance':>8}  "
        f"{'pairs alike':>14}  steps outside"
    )
    fine = True
    for name, make in DATA_SETS.items():
        steps = load(make(folder / name.replace(" ", "-")))
        different = np.mean([len(set(names)) for names in steps.keys])
        for rule, dropped in (("today's", steps.dropped), ("by name", steps.by_name)):
            counts = dropped.sum(axis=1)
            outside = int(((counts < low) | (counts > high)).sum())
            spread = float(((counts - RATE * BATCH) ** 2).mean() / (RATE * (1 - RATE) * BATCH))
            verdicts = told(int(counts.sum()), total_low, total_high), told(spread, spread_low, spread_high)
            alike = agreement(dropped, steps.keys)
            print(
                f"  {name:27} {different:11.1f}  {rule:8} {counts.min():6d} {counts.max():4d} "
                f"{counts.sum():4d} {dropped.mean():5.3f} {spread:8.2f}  {alike:>14}  {outside} of {STEPS}; "
                f"in all {verdicts[0]}, variance {verdicts[1]}"
            )
            if rule == "today's":
                fine = fine and not outside and "OUTSIDE" not in verdicts
    return fine


def drawn(seed: int) -> dict[str, np.ndarray]:
    """Kind of draw -> (LONG, BATCH) values of mean 0 and variance 1."""
    positions = np.arange(LONG * BATCH)
    corners = draws.crops(seed, positions, np.full((len(positions), 2), 1000))
    values = {
        "dropout": 2.0 * draws.prompt_dropped(seed, positions, 0.5) - 1,
        "flip": 2.0 * draws.flips(seed, positions) - 1,
        "timestep": even(draws.timesteps(seed, positions, 1000), 1000),
        "crop row": even(corners[:, 0], 1001),
        "crop column": even(corners[:, 1], 1001),
        "caption": even(draws.caption_choice(seed, positions, np.full(len(positions), 5)), 5),
        "condition": even(draws.conditions(seed, positions) >> np.uint64(54), 1024),
    }
    return {name: values[name].reshape(LONG, BATCH) for name in KINDS}


def even(values: np.ndarray, count: int) -> np.ndarray:
    """Integers evenly from 0 .. count - 1 -> mean 0, variance 1."""
    return (values - (count - 1) / 2) / ((count**2 - 1) / 12) ** 0.5


def show_pairs(found: dict[str, np.ndarray]) -> bool:
    """How alike the samples of one step draw: the mean correlation of their pairs, and a chi-square of deciles."""
    print(f"\npairs of samples of one step, {LONG} steps of {BATCH}; draws that go by name would be at 1")
    pairs = BATCH * (BATCH - 1)
    fine = True
    bound = NormalDist().inv_cdf((1 + LEVEL) / 2) * (2 / (pairs * LONG)) ** 0.5
    print(f"  {'':12} {'correlation':>11}   chance {-bound:+.5f} to {bound:+.5f}   {'deciles':>8}   chance")
    for name, values in found.items():
        correlation = float((values.sum(axis=1) ** 2 - (values**2).sum(axis=1)).mean()) / pairs
        deciles, degrees = square_of_pairs(values)
        first, last = chi_square_range(degrees)
        verdicts = told(correlation, -bound, bound), told(deciles, first, last)
        fine = fine and "OUTSIDE" not in verdicts
        print(
            f"  {name:12} {correlation:+11.5f}   {verdicts[0]:28} {deciles:8.1f}   {first:.1f} to {last:.1f} "
            f"({degrees} degrees): {verdicts[1]}"
        )
    return fine


def square_of_pairs(values: np.ndarray) -> tuple[float, int]:
    """Chi-square of the table of (decile of one sample, decile of its neighbour), and its degrees of freedom."""
    levels = np.unique(values)
    edges = np.quantile(levels, np.arange(1, 10) / 10) if len(levels) > 10 else (levels[1:] + levels[:-1]) / 2
    numbers = np.searchsorted(edges, values)
    count = len(edges) + 1
    shares = np.bincount(np.searchsorted(edges, levels), minlength=count) / len(levels)
    table = np.bincount((numbers[:, ::2] * count + numbers[:, 1::2]).ravel(), minlength=count**2)
    expected = np.outer(shares, shares).ravel() * values.size / 2
    return float(((table - expected) ** 2 / expected).sum()), count**2 - 1


def show_purposes(found: dict[str, np.ndarray]) -> bool:
    """How much one draw of a sample tells of another."""
    bound = NormalDist().inv_cdf((1 + LEVEL) / 2) / (LONG * BATCH) ** 0.5
    print(f"\ncorrelation of two draws of one sample, {LONG * BATCH:,} samples; chance {-bound:+.5f} to {bound:+.5f}")
    print(f"  {'':12}" + "".join(f"{name:>13}" for name in KINDS[:-1]))
    fine = True
    for i, name in enumerate(KINDS[1:], 1):
        row = [float((found[name] * found[other]).mean()) for other in KINDS[:i]]
        fine = fine and all(abs(value) <= bound for value in row)
        print(
            f"  {name:12}" + "".join(f"{value:+13.5f}" if abs(value) <= bound else f"{value:+12.5f}!" for value in row)
        )
    return fine


def show_noise(steps: int = 40) -> bool:
    """Noise of one step: how alike that of two of its samples is, and the most that chance leaves."""
    pairs, size = steps * BATCH * (BATCH - 1) // 2, 4 * 16 * 16
    most = 0.0
    for step in range(steps):
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        rows = draws.noise(SEED, positions, (4, 16, 16)).reshape(BATCH, -1)
        most = max(most, float(np.abs(np.corrcoef(rows) - np.eye(BATCH)).max()))
    bound = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / pairs) / size**0.5
    print(f"\nnoise: the most alike of {pairs:,} pairs correlate by {most:.4f}; chance reaches {bound:.4f}")
    return most <= bound


def show_seeds(count: int = 1000) -> bool:
    """How often the dropped prompts of STEPS steps lie outside, over many seeds: as often as they should."""
    low, high = binomial_range(BATCH)
    weights = [math.comb(BATCH, k) * RATE**BATCH for k in range(BATCH + 1)]
    chance = 1 - sum(weights[low : high + 1])
    positions = np.arange(STEPS * BATCH)
    counts = [draws.prompt_dropped(seed, positions, RATE).reshape(STEPS, BATCH).sum(axis=1) for seed in range(count)]
    outside = int(((np.array(counts) < low) | (np.array(counts) > high)).sum())
    expected = count * STEPS * chance
    most = expected + NormalDist().inv_cdf((1 + LEVEL) / 2) * expected**0.5
    print(f"\n{count} seeds: {outside} of {count * STEPS:,} steps outside; expected {expected:.1f}, at most {most:.1f}")
    return outside <= most


def main(arguments: Sequence[str] | None = None) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        fine = [show_dropout(Path(scratch))]
    found = drawn(SEED)
    fine += [show_seeds(), show_pairs(found), show_purposes(found), show_noise()]
    print("\nall inside" if all(fine) else "\nSOMETHING LIES OUTSIDE")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
