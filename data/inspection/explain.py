"""Where one sample lies, and every step of a run that sees it: its prompt, flip, crop and timestep there.

A key may be of several samples, in other shards: all of them are told, or the one that SHARD:KEY names. All of it is
arithmetic on positions, so steps that are still to come are told as surely as those that were.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from controlbooth.data.arguments import visible
from controlbooth.data.errors import UserError
from controlbooth.data.files.records import (
    Damaged,
    check_fields,
    is_count,
    is_flag,
    is_mapping,
    is_number,
    is_text,
    is_whole,
    maybe,
    open_file,
    parse_json,
    read_json,
)
from controlbooth.data.inspection.ledger import read_ledgers
from controlbooth.data.inspection.quarantine import read_run, source_trees
from controlbooth.data.loading.plan import check_version, plan_order, source_weights
from controlbooth.data.order import draws
from controlbooth.data.order.buckets import Buckets
from controlbooth.data.order.mixture import History, Mixture
from controlbooth.data.order.settings import DrawSettings, OrderSettings
from controlbooth.data.pictures.images import BadSample, crop_slack
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.manifest import Dataset, join_datasets, open_dataset, shard_names
from controlbooth.data.shards.reader import ShardReader
from controlbooth.data.shards.sidecar import FLAG_NAMES, ShardIndex, index_path, load_index

ANEW = "Start the run again, which writes it anew"
RUN = {"seed": is_whole, "global_batch_size": is_count, "max_steps": is_count}
DATA = {
    **{"condition": is_text, "lanes": maybe(is_count), "random_flip": is_flag, "random_crop": is_flag},
    **dict.fromkeys(("shards_per_block", "resolution", "aspect_step"), is_count),
    **dict.fromkeys(("prompt_dropout", "max_aspect_ratio"), is_number),
}
"""Fields of a run's config.yaml, and of its section `data`."""
MOST_TOLD = 10
"""Samples of one key; of more only the places are listed."""
TRAIN_TIMESTEPS = 1000
"""Of every base model that there is a family for."""


@dataclass(frozen=True)
class RunNumbers:
    """What decides when a sample is seen, and how."""

    sources: list[dict[str, Any]]
    """shards, weight and repeat of each, as in a run's data.sources."""
    history: History | None
    """The weights that the sources had so far; None for those that follow from `sources`."""
    steps: int
    order: OrderSettings
    drawn: DrawSettings


@dataclass(frozen=True)
class Found:
    """A sample that was asked for."""

    key: str
    shard: int
    row: int
    ordinal: int | None
    """Among the samples that the run uses, None where it is not one of them."""
    byte: int
    size: tuple[int, int]
    """Width and height of the target image."""
    flags: int
    bucket: int


@dataclass(frozen=True)
class Visit:
    """One time at which a run sees a sample."""

    position: int
    step: int
    epoch: int
    dropped: bool
    flipped: bool
    crop: tuple[int, int] | None
    """Top and left of the part that is trained on, in the resized picture."""
    timestep: int
    caption: int
    """Which of its captions is the prompt, where it is not dropped."""


def numbers_of_run(folder: Path, steps: int | None = None) -> RunNumbers:
    """Reads the numbers of a run from its config.yaml. steps: used instead of its max_steps. Raises ValueError where
    the file is missing or damaged."""
    tree = read_run(folder)
    data = tree["data"]
    check_fields(tree, RUN, str(folder / "config.yaml"), ANEW)
    check_fields(data, DATA, f"data of {folder / 'config.yaml'}", ANEW)
    return RunNumbers(
        sources=source_trees(tree),
        history=_history_of_run(folder),
        steps=steps or tree["max_steps"],
        order=OrderSettings(
            seed=tree["seed"],
            global_batch_size=tree["global_batch_size"],
            lanes=data["lanes"] or tree["global_batch_size"],
            shards_per_block=data["shards_per_block"],
            condition=data["condition"],
            resolution=data["resolution"],
            max_aspect_ratio=data["max_aspect_ratio"],
            aspect_step=data["aspect_step"],
        ),
        drawn=DrawSettings(data["prompt_dropout"], data["random_flip"], data["random_crop"], TRAIN_TIMESTEPS),
    )


def _history_of_run(folder: Path) -> History | None:
    """Reads the sources' weights from the newest checkpoint, which records every change; None before there is one."""
    states = sorted(folder.glob("checkpoints/step-*/state.json"))
    states = [path for path in states if path.parent.name.removeprefix("step-").isdecimal()]  # and not copies
    if not states:
        return None
    order = read_json(states[-1], "Name an older state of the run by --step, or start it again", {"order": is_mapping})
    order = order["order"]
    check_version(order, str(states[-1].parent))
    return order["weights"]


def open_sources(numbers: RunNumbers) -> Dataset:
    return join_datasets([open_dataset(source["shards"]) for source in numbers.sources])


def order_of_run(dataset: Dataset, numbers: RunNumbers) -> tuple[Mixture, Buckets]:
    weights = source_weights(
        dataset,
        numbers.order.condition,
        [source["weight"] for source in numbers.sources],
        [source["repeat"] for source in numbers.sources],
    )
    return plan_order(dataset, numbers.order, numbers.history or [(0, weights)])


def find_samples(dataset: Dataset, name: str, condition: str | None, buckets: Buckets) -> list[Found]:
    """Finds all samples that KEY or SHARD:KEY names, in the order of the shards.

    Reads the indexes of the shards in question. SHARD is the name of a shard's file, with as much of the path before it
    as tells it from others.
    """
    ends = np.cumsum([len(source.rows) for source in dataset.sources])
    shards, key = _shards_and_key(dataset, name)
    wanted, found = np.uint64(draws.hash64(key)), []
    for shard in tqdm(shards, unit="shard", desc="search", disable=len(shards) < 1000):
        index = load_index(index_path(dataset.paths[shard]))
        rows = np.flatnonzero(index.samples["key_hash"] == wanted).tolist()
        if rows:
            source = int(np.searchsorted(ends, shard, side="right")) if len(ends) else 0
            numbers = buckets.bucket_of(source, index.aspect_bins(condition))
            found += [_found(key, index, shard, row, index.usable(condition), numbers) for row in rows]
    return found


def _shards_and_key(dataset: Dataset, name: str) -> tuple[Sequence[int], str]:
    """Returns the numbers of the shards to look in, and the key. The text before a colon names the shards; where it
    names none, it is part of the key and all shards are looked in."""
    paths = [f"/{path}" for path in dataset.paths]
    for colon in (at for at, character in enumerate(name) if character == ":"):
        if shards := [shard for shard, path in enumerate(paths) if path.endswith(f"/{name[:colon].lstrip('/')}")]:
            return shards, name[colon + 1 :]
    return range(len(paths)), name


def _found(key: str, index: ShardIndex, shard: int, row: int, usable: np.ndarray, numbers: np.ndarray) -> Found:
    """Describes the sample of one row of a shard. usable: rows that the run uses. numbers: their buckets."""
    record = index.samples[row]
    size = (int(record["width"]), int(record["height"]))
    place = Found(key, shard, row, None, int(record["offset"]), size, int(record["flags"]), 0)
    if row not in usable:
        return place
    bucket = int(numbers[usable == row][0])
    return replace(place, bucket=bucket, ordinal=int(np.flatnonzero(usable[numbers == bucket] == row)[0]))


def visits(order: Mixture, numbers: RunNumbers, found: Found, captions: int) -> Iterator[Visit | int]:
    """Yields each time that a run of these numbers sees the sample, in order.

    For an epoch that leaves it out it yields the epoch's number. found must have an ordinal. captions: how many the
    sample has.
    """
    assert found.ordinal is not None
    positions = numbers.steps * numbers.order.global_batch_size
    for epoch in range(order.epochs_begun(positions, found.shard, found.bucket)):
        position = order.position_of(epoch, found.shard, found.ordinal, found.bucket)
        if position is None:
            yield epoch
        elif position < positions:
            at = np.array([position])
            crop = None
            if numbers.drawn.random_crop:
                slack = crop_slack(found.size[1], found.size[0], order.shapes[found.bucket])
                top, left = draws.crops(numbers.order.seed, at, np.array([slack]))[0].tolist()
                crop = (top, left)
            yield Visit(
                position=position,
                step=position // numbers.order.global_batch_size,
                epoch=epoch,
                dropped=bool(draws.prompt_dropped(numbers.order.seed, at, numbers.drawn.prompt_dropout)[0]),
                flipped=numbers.drawn.random_flip and bool(draws.flips(numbers.order.seed, at)[0]),
                crop=crop,
                timestep=int(draws.noise_levels(numbers.order.seed, at, numbers.drawn)[0]),
                caption=int(draws.caption_choice(numbers.order.seed, at, np.array([captions]))[0]),
            )


def steps_done(run: Path) -> int:
    """Returns how many steps a run has finished by its metrics.jsonl, 0 without it. The last line may be incomplete."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with open_file(path, "Move it away") as file:
        lines = file.read().splitlines(keepends=True)
    for line in reversed(lines):
        if line.endswith(b"\n") and b'"step":' in line:
            with suppress(Damaged):
                return parse_json(line, str(path), "", {"step": is_whole})["step"]
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data explain`; returns 0 where the sample is found, 1 where it is not."""
    numbers = run_numbers(arguments, arguments.steps)
    dataset = open_sources(numbers)
    order, buckets = order_of_run(dataset, numbers)
    found = find_samples(dataset, arguments.sample, numbers.order.condition, buckets)
    if not found:
        print(f"no sample of {dataset.location} has the key {arguments.sample!r}")
        return 1
    if len(found) > 1:
        print(f"{len(found)} samples have the key {found[0].key!r}; {_name(dataset, found[0])} names the first alone")
    if len(found) > MOST_TOLD:
        for one in found:
            print(f"  {_name(dataset, one)}, byte {one.byte}")
        return 0
    done = steps_done(arguments.run) if arguments.run else None
    reader = ShardReader(dataset, numbers.order.condition, buckets=buckets)
    try:
        for one in found:
            captions = _print_sample(dataset, reader, one)
            if one.ordinal is not None:
                _print_visits(order, numbers, one, captions, done)
            if arguments.run:
                _print_substitutions(arguments.run, dataset, one)
    finally:
        reader.close()
    return 0


def run_numbers(arguments: argparse.Namespace, steps: int | None) -> RunNumbers:
    """Returns the numbers of the run, or those given instead, by the options of `add_run_numbers`. Raises ValueError
    where neither says which run is meant."""
    if arguments.run:
        return numbers_of_run(arguments.run, steps)
    if not (arguments.shards and arguments.global_batch_size and steps):
        raise UserError("give --run, or the shards with --global-batch-size and steps, to say which run is meant")
    return RunNumbers(
        sources=[{"shards": arguments.shards, "weight": None, "repeat": 1}],
        history=None,
        steps=steps,
        order=OrderSettings(
            seed=arguments.seed,
            global_batch_size=arguments.global_batch_size,
            lanes=arguments.lanes or arguments.global_batch_size,
            shards_per_block=arguments.shards_per_block,
            condition=arguments.condition,
            resolution=512,
        ),
        drawn=DrawSettings(arguments.prompt_dropout, arguments.random_flip, False, TRAIN_TIMESTEPS),
    )


def _name(dataset: Dataset, found: Found) -> str:
    """Returns SHARD:KEY, by which a sample can be asked for."""
    return f"{shard_names(dataset)[found.shard]}:{found.key}"


def _print_sample(dataset: Dataset, reader: ShardReader, found: Found) -> int:
    """Prints where a sample lies and what it is; returns how many captions it has, at least 1."""
    print(f"{visible(found.key)}: {dataset.paths[found.shard]}, sample {found.row}, byte {found.byte}")
    if found.ordinal is None:
        faults = [name for flag, name in FLAG_NAMES.items() if found.flags & flag] or ["it lacks the condition"]
        print(f"  not trained on: {', '.join(faults)}")
        return 1
    try:
        sample = reader.read(found.shard, found.ordinal, found.bucket)
        captions = read_captions(sample.caption, sample.caption_extension, sample.key)
    except BadSample as bad:
        print(f"  bad: {visible(bad.part)}: {visible(bad.reason)}; another sample stands in for it")
        return 1
    parts = f"{sample.image_extension}{f', {sample.condition_extension}' if sample.condition_extension else ''}"
    print(f"  {found.size[0]} x {found.size[1]} pixels; {visible(parts)}, {sample.caption_extension}")
    for number, caption in enumerate(captions):
        print(f"  caption {number}: {visible(caption)}")
    return len(captions)


def _print_visits(order: Mixture, numbers: RunNumbers, found: Found, captions: int, done: int | None) -> None:
    left_out = []
    print(f"  {'step':>10} {'epoch':>6} {'position':>12}  {'prompt':9}  {'flip':4}  {'crop':>9}  {'timestep':>8}")
    for item in visits(order, numbers, found, captions):
        if isinstance(item, int):
            left_out.append(item)
            continue
        prompt = "dropped" if item.dropped else f"caption {item.caption}"
        crop = "middle" if item.crop is None else f"{item.crop[0]},{item.crop[1]}"
        when = "" if done is None else "  seen" if item.step < done else "  to come"
        print(
            f"  {item.step:10d} {item.epoch:6d} {item.position:12d}  {prompt:9}  {'yes' if item.flipped else 'no':4}  "
            f"{crop:>9}  {item.timestep:8d}{when}"
        )
    if left_out:
        print(f"  left out of epochs {', '.join(map(str, left_out))}, whose samples do not fill a row of lanes")


def _print_substitutions(run: Path, dataset: Dataset, found: Found) -> None:
    """Prints what the run's ledgers of bad samples say of the sample, which is recognised by its shard and byte."""
    place = (str(dataset.paths[found.shard]), found.byte)
    for entry in read_ledgers(run):
        if (entry["shard"], entry["byte"]) == place:
            stand_in = f"{entry['substitute_shard']}:{entry['substitute']}"
            stand_in = stand_in if entry["substitute"] is not None else "nothing, with weight 0"
            print(f"  position {entry['position']}: it was bad ({entry['error']}), and replaced by {stand_in}")
        elif (entry["substitute_shard"], entry["substitute_byte"]) == place:
            print(f"  position {entry['position']}: it stood in for {entry['shard']}:{entry['key']}")
