"""`controlbooth data pack --held-out`: one source -> samples to train on, and samples that are held out.

Contents decide, and no names or order: so near copies (`data.inspection.hygiene`) are on one side, and the same
pictures are held out wherever they lie. Folders, and captions in them, give shares in proportion. split.jsonl keeps
what was found in the pictures and on which side each is: a command that was stopped goes on there, and of a source that
has grown what was on one side stays on it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from controlbooth.data.errors import UserError
from controlbooth.data.files.whole import write_whole
from controlbooth.data.order.draws import content_hash, hash64, random_bits
from controlbooth.data.packing.sources import Source, SourceSample, stable_hash
from controlbooth.data.pictures.images import MAX_PIXELS, BadSample, decode_image, keep_freed_memory
from controlbooth.data.pictures.likeness import connected_groups, equal_groups, is_blank, near_pairs, perceptual_hash
from controlbooth.data.processes.pool import run_jobs

TRAIN, HELD_OUT = "train", "held-out"
"""Folders below the one that is named."""
NOTES = "split.jsonl"
AT_ONCE = 500
"""Samples that a process looks at before what it found is noted."""

Facts = list[Any]  # a list, as in JSON
"""Of a sample: content hash, perceptual hash as four numbers (zeros where there is none), folder, hash of captions."""


@dataclass(frozen=True)
class Part:
    """Some samples of a source, which is a source itself."""

    source: Source
    rows: tuple[int, ...] = field(repr=False)
    name: str

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def computed(self) -> tuple[str, ...]:
        return self.source.computed

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    def describe(self) -> str:
        return f"{self.source.describe()}, {self.name}"

    def identity(self, start: int, stop: int) -> str:
        return stable_hash([self.source.identity(row, row + 1) for row in self.rows[start:stop]])

    def read(self, start: int, stop: int) -> Iterator[SourceSample]:
        return self.source.read_rows(self.rows[start:stop])

    def read_rows(self, rows: Sequence[int]) -> Iterator[SourceSample]:
        return self.source.read_rows([self.rows[row] for row in rows])


def held_out_count(asked: str, count: int) -> int:
    """Returns how many of `count` samples to hold out. asked: such as "5%" or "200".

    Raises ValueError where that leaves none on a side.
    """
    number, percent, rest = asked.partition("%")
    try:
        share = float(number) / 100 if percent else None
        wanted = int(number) if share is None else max(1, round(share * count)) if 0 < share < 1 else 0
    except ValueError:
        wanted = 0
    if rest or not 0 < wanted < count:
        raise UserError(
            f"--held-out {asked} of {count} samples: give a share above 0% and below 100%, such as 5%, or a number "
            f"from 1 to {count - 1}"
        )
    return wanted


def split(
    source: Source, asked: str, notes: Path | None, workers: int, max_pixels: int = MAX_PIXELS
) -> tuple[Part, Part]:
    """Divides a source into the part to train on and the part that is held out.

    Looks at every picture, and shows its progress. asked: see `held_out_count`. notes: where to keep what was found,
    and to find what is there; None writes nothing. max_pixels: see `decode_image`.
    """
    wanted = held_out_count(asked, source.count)
    before = _read_notes(notes, asked)
    jobs = [(start, min(start + AT_ONCE, source.count)) for start in range(0, source.count, AT_ONCE)]
    identities = {job: source.identity(*job) for job in jobs}
    found = {job: line["samples"] for job in jobs if (line := before.get((*job, identities[job])))}
    if notes is not None:
        notes.parent.mkdir(parents=True, exist_ok=True)
    left = [job for job in jobs if job not in found]
    total = sum(stop - start for start, stop in jobs)
    with tqdm(total=total, initial=total - sum(b - a for a, b in left), unit="sample", desc="look") as progress:
        for job, facts in run_jobs(_look_at, left, workers, _start_worker, (source, max_pixels)):
            found[job] = facts
            if notes is not None:
                with open(notes, "a") as file:
                    file.write(_line(asked, job, identities[job], facts) + "\n")
            progress.update(job[1] - job[0])
    facts = [one for job in jobs for one in found[job]]
    divided = [line for line in before.values() if "out" in line]
    sides = {one[0]: bool(side) for line in divided for one, side in zip(line["samples"], line["out"], strict=True)}
    out = choose_rows(facts, wanted, sides)
    if notes is not None:
        lines = [_line(asked, job, identities[job], found[job], out[slice(*job)].astype(int).tolist()) for job in jobs]
        write_whole(notes, "".join(line + "\n" for line in lines).encode())
    rows = {side: tuple(np.flatnonzero(out == side).tolist()) for side in (False, True)}
    return Part(source, rows[False], f"all but {asked} held out"), Part(source, rows[True], f"{asked} held out")


def choose_rows(facts: Sequence[Facts], wanted: int, sides: Mapping[int, bool]) -> np.ndarray:
    """Chooses the samples that are held out, (n,) bool: `wanted` or a few less, as groups of near copies stay whole.

    sides: content hash -> whether it is held out, of those that were divided before.
    """
    contents = np.array([one[0] for one in facts], np.uint64)
    groups = _groups(contents, np.array([one[1] for one in facts], np.uint64).reshape(-1, 4))
    bits = random_bits(hash64("held out"), contents)
    # Of copies in several folders the first by name stands for them, so that the order of the samples decides nothing.
    representatives = [min(group.tolist(), key=lambda row: (bits[row], *facts[row][2:])) for group in groups]
    out, taken = np.zeros(len(facts), bool), 0
    open_groups = []
    for number, group in enumerate(groups):
        known = {sides[content] for content in contents[group].tolist() if content in sides}
        if True in known:
            out[group] = True
            taken += len(group)
        elif not known:
            open_groups.append(number)
    names = [(facts[row][2], facts[row][3]) for row in representatives]
    for number in _in_proportion(open_groups, names, bits[representatives]):
        if taken + len(groups[number]) <= wanted:
            out[groups[number]] = True
            taken += len(groups[number])
    return out


def _in_proportion(numbers: Sequence[int], names: Sequence[tuple[Any, Any]], bits: np.ndarray) -> list[int]:
    """Sorts the numbers so that every beginning has each folder, and each caption in it, in proportion.

    names, bits: folder and hash of captions, and random bits, by number.
    """
    order = sorted(numbers, key=lambda number: bits[number])
    for key in (lambda number: names[number], lambda number: names[number][0]):
        members: dict[Any, list[int]] = {}
        for number in order:
            members.setdefault(key(number), []).append(number)
        place = {number: (rank + 0.5) / len(own) for own in members.values() for rank, number in enumerate(own)}
        order = sorted(order, key=lambda number: (place[number], bits[number]))
    return order


def _groups(contents: np.ndarray, hashes: np.ndarray) -> list[np.ndarray]:
    """Groups the rows of equal and of nearly equal pictures; each other row is a group of its own."""
    _, first = np.unique(contents, return_index=True)
    seen = first[hashes[first].any(axis=1)]
    pairs = [seen[near_pairs(hashes[seen])]] if len(seen) else []
    pairs += [np.stack([group[:-1], group[1:]], axis=1) for group in equal_groups(contents)]
    groups = connected_groups(np.concatenate(pairs)) if pairs else []
    alone = np.ones(len(contents), bool)
    for group in groups:
        alone[group] = False
    return [*groups, *np.flatnonzero(alone)[:, None]]


def _line(
    asked: str, job: tuple[int, int], identity: str, facts: Sequence[Facts], out: Sequence[int] | None = None
) -> str:
    line = {"held_out": asked, "start": job[0], "stop": job[1], "identity": identity, "samples": facts}
    return json.dumps(line if out is None else line | {"out": out})


def _read_notes(notes: Path | None, asked: str) -> dict[tuple[int, int, str], dict[str, Any]]:
    """Reads the lines of the notes by start, stop and identity of their samples; without notes there are none.

    A line that a kill has cut short is left out, and its samples are looked at again. Raises ValueError where samples
    were divided otherwise than is asked.
    """
    lines = {}
    for text in notes.read_text().splitlines() if notes is not None and notes.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "out" in line and line["held_out"] != asked:
            raise UserError(
                f"{notes} divides its samples with --held-out {line['held_out']}, and this is {asked}: choose another "
                "folder, or delete that one"
            )
        lines[line["start"], line["stop"], line["identity"]] = line
    return lines


_work: tuple[Source, int]


def _start_worker(source: Source, max_pixels: int) -> None:
    global _work
    keep_freed_memory()
    _work = (source, max_pixels)


def _look_at(job: tuple[int, int]) -> list[Facts]:
    source, max_pixels = _work
    return [_facts_of(sample, max_pixels) for sample in source.read(*job)]


def _facts_of(sample: SourceSample, max_pixels: int) -> Facts:
    """Computes the `Facts` of a sample.

    A picture that is blank or cannot be decoded has no perceptual hash, so only equal bytes are a copy of it; packing
    tells what is wrong with one that cannot be decoded.
    """
    try:
        pixels = decode_image(sample.image, sample.key, "image", max_pixels=max_pixels)
        near = [0] * 4 if is_blank(pixels) else perceptual_hash(pixels).tolist()
    except BadSample:
        near = [0] * 4
    return [content_hash(sample.image), near, sample.key.rpartition("/")[0], hash64(*sample.captions)]
