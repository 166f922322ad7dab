"""Building the sidecar of a shard: one pass over the tar that notes where everything lies and what is wrong with it.

Any webdataset tar is read, ours or others'. A sample's key is webdataset's: the path up to the first dot of the base
name. Hidden files, files without a dot, folders, links and `__meta__` entries are no samples.
A fault is a `Problem` that names shard, byte and key. Faults of a sample are flagged in the index, which leaves the
sample out of the order; a shard whose structure is damaged gets no index, so that nobody trains on a part of it.
"""

import multiprocessing
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from controlbooth.data.arguments import visible
from controlbooth.data.condition_names import IMAGE_EXTENSIONS
from controlbooth.data.order.draws import hash64
from controlbooth.data.pictures.headers import image_size
from controlbooth.data.pictures.images import MAX_PIXELS, BadSample, too_large
from controlbooth.data.processes.parent import end_with_parent
from controlbooth.data.shards import sidecar, storage
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.sidecar import CAPTION_EXTENSIONS, PART, SAMPLE, ShardIndex
from controlbooth.data.shards.storage import RemoteShard, Shard, StorageError
from controlbooth.data.shards.tar import Member, TarDamage, members

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset.tariterators.base_plus_ext
_META = re.compile(r"__[^/]*__($|/)")
MOST_EXTENSIONS = 64
"""Of a shard, as long as those that stand in few samples are taken for parts of samples at all."""
STRUCTURAL = ("header", "truncated", "end", "trailing", "unsupported")
"""Kinds of problem that make a whole shard unusable."""


@dataclass(frozen=True)
class Problem:
    """kind: one of STRUCTURAL, or names, duplicate, adjacent, missing, image, pixels, caption."""

    shard: str
    byte: int
    key: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.shard}: byte {self.byte}, key {self.key!r}: {visible(self.message)}"


@dataclass
class _Group:
    """The neighbouring members of one key while they are read."""

    key: str
    offset: int
    end: int = 0
    parts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """extension -> payload offset from `offset`, size, crc"""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """width and height of each target image"""
    captions: dict[str, str] = field(default_factory=dict)
    """extension -> why the caption there cannot be read"""
    flags: int = 0
    left_out: int = 0
    """Parts that `_check_names` took out"""


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a member's name into key and lower-case extension; returns None where webdataset would see no sample."""
    match = _KEY.fullmatch(name)
    if match is None or match.group(1).endswith("/") or _META.match(name):
        return None
    return match.group(1), match.group(2).lower()


def index_shard(path: Shard) -> tuple[ShardIndex, list[Problem]]:
    """Reads a whole shard. After structural damage the index covers what came before it, and must not be kept.

    One in a store is read through without being kept, so its size is not limited by a disk.
    """
    remote = isinstance(path, RemoteShard)
    file_bytes = path.bytes if remote else path.stat().st_size
    groups: list[_Group] = []
    problems: list[Problem] = []

    def report(byte: int, key: str, kind: str, message: str) -> None:
        problems.append(Problem(str(path), byte, key, kind, message))

    with storage.open_sequential(path) if remote else open(path, "rb", buffering=1 << 20) as file:
        try:
            for member in members(file, file_bytes):
                split = split_name(member.name)
                if split is not None:
                    file.seek(member.payload)
                    _add(groups, member, *split, file.read(member.size))
        except TarDamage as damage:
            key = groups[-1].key if groups else ""
            after = f" (the last sample before it is {len(groups) - 1})" if groups else ""
            report(damage.byte, key, damage.kind, damage.message + after)
    if remote:
        storage.check_version(path)
    _check_names(groups, report)
    _check_keys(groups, report)
    _check_parts(groups, report)
    return _tables(groups, file_bytes), problems


def _add(groups: list[_Group], member: Member, key: str, extension: str, payload: bytes) -> None:
    if not groups or groups[-1].key != key or extension in groups[-1].parts:
        groups.append(_Group(key, member.start))
    group = groups[-1]
    if member.payload + member.size - group.offset >= 2**32:
        raise TarDamage("unsupported", member.start, f"sample {key!r} is larger than 4 GiB; store smaller parts")
    group.parts[extension] = (member.payload - group.offset, member.size, zlib.crc32(payload))
    group.end = member.payload + member.size
    if extension in IMAGE_EXTENSIONS:
        group.sizes[extension] = image_size(payload)
    if extension in CAPTION_EXTENSIONS:
        try:
            read_captions(payload, extension, key)
        except BadSample as bad:
            group.captions[extension] = bad.reason


def _check_names(groups: list[_Group], report) -> None:
    """Leaves out parts whose names differ from sample to sample, which would make the index grow quadratically.

    That is what becomes of names with dots: of 000018.2444.jpg the key is 000018, and the part is called 2444.jpg.
    """
    counts = Counter(extension for group in groups for extension in group.parts)
    if len(counts) <= MOST_EXTENSIONS:
        return
    known = (*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS)
    rare = {
        name
        for name, count in counts.items()
        if name not in known and not name.startswith("cond.") and count <= 0.02 * len(groups)
    }
    if not rare:
        return
    first = next(group for group in groups if not rare.isdisjoint(group.parts))
    name = f"{first.key}.{next(extension for extension in first.parts if extension in rare)}"
    for group in groups:
        group.left_out = len(rare.intersection(group.parts))
        group.parts = {extension: part for extension, part in group.parts.items() if extension not in rare}
    count = sum(group.left_out > 0 for group in groups)
    message = (
        f"{count} samples have parts of {len(rare)} different names, as {name}: a key ends at the first dot, so this "
        f"is a part of {first.key!r}, and no picture or caption of a sample of its own. Rename the files so that the "
        f"only dot is that of the ending, as {_undotted(name)}"
    )
    report(first.offset, first.key, "names", message)


def _undotted(name: str) -> str:
    """Replaces each dot of a name but that of its ending: 000018.2444.jpg becomes 000018_2444.jpg."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.rpartition(".")
    return f"{folder}{slash}{stem.replace('.', '_')}.{ending}"


def _check_keys(groups: list[_Group], report) -> None:
    """Flags each later group of a key that was there before; the first keeps what it has."""
    first: dict[str, _Group] = {}
    for group in groups:
        before = first.setdefault(group.key, group)
        if before is group:
            continue
        group.flags |= sidecar.DUPLICATE
        if common := sorted(before.parts.keys() & group.parts.keys()):
            message = f"duplicate key: {common[0]!r} was at byte {before.offset} too; give every sample its own key"
            report(group.offset, group.key, "duplicate", message)
        else:
            message = f"its members are not adjacent (the first lie at byte {before.offset}); write them side by side"
            report(group.offset, group.key, "adjacent", message)


def _check_parts(groups: list[_Group], report) -> None:
    """Flags samples without a target image, a caption, or a condition that others of the shard have."""
    kinds = {kind for group in groups for kind in map(sidecar.condition_kind, group.parts) if kind}
    for group in groups:
        if group.flags & sidecar.DUPLICATE:
            continue
        missing = []
        if not group.sizes:
            group.flags |= sidecar.MISSING_IMAGE
            missing.append(f"target image ({', '.join(IMAGE_EXTENSIONS)})")
        if not any(extension in group.parts for extension in CAPTION_EXTENSIONS):
            group.flags |= sidecar.MISSING_CAPTION
            missing.append(f"caption ({', '.join(CAPTION_EXTENSIONS)})")
        if lacking := sorted(kinds - {sidecar.condition_kind(extension) for extension in group.parts}):
            group.flags |= sidecar.MISSING_CONDITION
            missing.append(f"condition {_some(lacking)}")
        if missing and not group.left_out:
            message = f"has {_some(group.parts)} but no {' and no '.join(missing)}"
            report(group.offset, group.key, "missing", message + _hint(group))
        if group.sizes and _target_size(group) == (0, 0):
            group.flags |= sidecar.BAD_IMAGE
            report(group.offset, group.key, "image", "its target image has no header that can be read")
        width, height = _target_size(group)
        if width * height > MAX_PIXELS:
            report(group.offset, group.key, "pixels", too_large(width, height, MAX_PIXELS))
        caption = next((extension for extension in CAPTION_EXTENSIONS if extension in group.parts), "")
        if caption in group.captions:
            report(group.offset, group.key, "caption", f"part {caption!r}: {group.captions[caption]}")


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _hint(group: _Group) -> str:
    """Suggests a new name for a sample without a caption whose name seems to have held a dot; returns "" otherwise."""
    for extension in group.parts:
        ending = extension.rpartition(".")[2]
        if group.flags & sidecar.MISSING_CAPTION and extension != ending and ending in CAPTION_EXTENSIONS:
            name = f"{group.key}.{extension}"
            return f". A key ends at the first dot: rename {name} to {_undotted(name)}, and others likewise"
    return ""


def _target_size(group: _Group) -> tuple[int, int]:
    return next((group.sizes[extension] for extension in IMAGE_EXTENSIONS if extension in group.sizes), (0, 0))


def _tables(groups: list[_Group], shard_bytes: int) -> ShardIndex:
    extensions = tuple(sorted({extension for group in groups for extension in group.parts}))
    column = {extension: i for i, extension in enumerate(extensions)}
    samples = np.zeros(len(groups), SAMPLE)
    parts = np.zeros((len(groups), len(extensions)), PART)
    for i, group in enumerate(groups):
        size = group.end - group.offset
        samples[i] = (group.offset, size, hash64(group.key), *_target_size(group), group.flags)
        for extension, part in group.parts.items():
            parts[i, column[extension]] = part
    return sidecar.make_index(shard_bytes, extensions, samples, parts)


def ensure_index(path: Shard) -> list[Problem]:
    """Indexes one shard if its sidecar is missing, unreadable or of another size; -> what is wrong with the shard.

    A shard that is structurally damaged loses an old sidecar and gets no new one. Of a shard whose sidecar is kept
    nothing is reported, though the sidecar may flag samples.
    """
    where = sidecar.index_path(path)
    if _fits(where, path):
        return []
    where.parent.mkdir(parents=True, exist_ok=True)
    index, problems = index_shard(path)
    if any(problem.kind in STRUCTURAL for problem in problems):
        where.unlink(missing_ok=True)
    else:
        sidecar.write_index(index, where)
    return problems


def _fits(where: Path, shard: Shard) -> bool:
    try:
        size = shard.bytes if isinstance(shard, RemoteShard) else shard.stat().st_size
        return sidecar.load_index(where).shard_bytes == size
    except FileNotFoundError:
        if isinstance(shard, Path) and not shard.exists():
            raise
        return False
    except ValueError:  # damaged or of another version: it is about to be replaced
        return False


def ensure_indexes(paths: Sequence[Shard], workers: int = 1) -> list[Problem]:
    """Calls `ensure_index` for many shards, in `workers` processes; shows a progress bar, and returns all problems."""
    found: list[Problem] = []
    results = _each(paths, workers)
    for problems in tqdm(results, total=len(paths), unit="shard", desc="index", disable=len(paths) < 2):
        found += problems
    return found


def _each(paths: Sequence[Shard], workers: int) -> Iterator[list[Problem]]:
    if min(workers, len(paths)) <= 1:
        yield from (ensure_index(path) for path in paths)
        return
    # spawn: a forked child would inherit threads and locks of whoever calls
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(paths)), context, end_with_parent) as pool:
        try:
            yield from pool.map(ensure_index, paths, chunksize=1)
        except StorageError as error:  # of a process: raised anew, so that it is a message here as it was there
            pool.shutdown(cancel_futures=True)
            raise StorageError(f"{error} (indexes that are written are kept)") from error
