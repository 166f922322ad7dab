"""The latent cache: what the frozen encoders make of a shard's samples, in tars of their own, aligned by ordinal.

Of each shard x.tar the folder holds a cache shard of each kind, whole once its index stands beside it:

    columns.json                         what the cache is of, and where it was computed
    x.latents-<fingerprint>.tar          KEY.mean.DTYPE.npy, KEY.std.DTYPE.npy   of the VAE's posterior
    x.text-<fingerprint>.tar             KEY.hidden_states.I.DTYPE.npy (and .pooled.) of caption I; "" has none
    x.condition.NAME-<fingerprint>.tar   KEY.mean.DTYPE.npy of a condition, where ControlNets read its latents
    x.latents-<fingerprint>.tar.idx      row i is of row i of x.tar.idx, without parts where it could not be encoded

These are plain tars of npy arrays under the keys of the originals, so webdataset reads them beside those. numpy has no
bfloat16: its bits are kept as uint16. The fingerprint is a hash of what the values depend on: encoders, their dtype,
the shapes and flips of the pictures, how a condition is resized, and the index of x.tar. So a sample that was
quarantined since, or packed anew, asks for new cache shards of its shard and of no other.

The folder's columns.json and the name __columns__ in the tars stay as they were first written: what is on disk keeps
its names, whatever we call it.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tqdm import tqdm

from controlbooth.data.errors import UserError
from controlbooth.data.files.whole import temporary_path, write_whole
from controlbooth.data.order.buckets import Buckets
from controlbooth.data.pictures.images import BadSample
from controlbooth.data.shards.manifest import Dataset
from controlbooth.data.shards.sidecar import PART, SAMPLE, ShardIndex, index_path, load_index, make_index, write_index
from controlbooth.data.shards.tar import BLOCK

CONDITION = "condition."
"""What the kinds of cache shards with latents of conditions begin with: "condition.depth". The others are "latents" and
"text", which every cache has."""
STATED = "columns.json"
STORED = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
"""Name of a dtype -> what numpy keeps it in."""

Identity = Mapping[str, Any]
"""What the values of one kind depend on, as a JSON tree. `dtype` is one of STORED."""


@dataclass(frozen=True)
class LatentCache:
    """Where the latents and text embeddings of a data set lie, there or not."""

    folder: Path
    identities: Mapping[str, Identity]
    """Kind -> what its values depend on. The kinds are those that the run reads; the folder may hold more."""
    paths: Mapping[str, tuple[Path, ...]]
    """Kind -> the cache shard of each shard of the data set."""
    computed: Sequence[Mapping[str, Any]] = ()
    """Facts of the machines that computed what is there, none twice."""

    @property
    def flips(self) -> bool:
        """Tells whether there are latents of mirrored pictures too."""
        return bool(self.identities["latents"]["flips"])

    @property
    def condition(self) -> str | None:
        """Returns the name of the condition whose latents there are; None where conditions are read as pictures."""
        return next((kind.removeprefix(CONDITION) for kind in self.identities if kind.startswith(CONDITION)), None)


@dataclass(frozen=True)
class EncodedBatch:
    """What the cache has of B samples, K of which have a prompt that is not empty. bfloat16 as its bits, uint16."""

    mean: np.ndarray
    """(B, C, h, w) of the VAE's posterior; 0 where no sample could be read."""
    std: np.ndarray
    """(B, C, h, w)"""
    condition: np.ndarray | None
    """(B, C, h, w): the mean of the condition's posterior; None where the condition is given as a picture."""
    latents_dtype: str
    hidden_states: np.ndarray | None
    """(K, L, D) of the prompts that are not empty, in their order; None with K = 0."""
    pooled: np.ndarray | None
    """(K, P), None where the base has no pooled embedding."""
    text_dtype: str


def plan_latent_cache(
    folder: Path, dataset: Dataset, buckets: Buckets, identities: Mapping[str, Identity]
) -> LatentCache:
    """Computes the paths that follow from the data set and the identities; nothing on the disk is looked at.

    buckets: of the run's order; their shapes belong to the identity of the latents.
    """
    paths: dict[str, tuple[Path, ...]] = {}
    first = np.cumsum([len(source.rows) for source in dataset.sources or (dataset,)])
    for kind in identities:
        names = []
        for number, (shard, row) in enumerate(zip(dataset.paths, dataset.rows, strict=True)):
            source = int(np.searchsorted(first, number, side="right"))
            shapes = sorted(buckets.assigned[source].items()) if kind != "text" else []
            fingerprint = _fingerprint([kind, identities[kind], row.index_hash, shapes])
            names.append(folder / f"{shard.name.removesuffix('.tar')}.{kind}-{fingerprint}.tar")
        paths[kind] = tuple(names)
    return LatentCache(folder, identities, paths)


def open_latent_cache(
    folder: Path, dataset: Dataset, buckets: Buckets, identities: Mapping[str, Identity]
) -> LatentCache:
    """Opens a cache that is whole and is what it has to be. Raises ValueError that names what differs or lacks."""
    remedy = "run `controlbooth data precompute` with the arguments of this run, or leave data.latent_cache out"
    stated = read_stated(folder)
    if stated is None:
        raise UserError(f"{folder} holds no latent cache: {remedy}")
    if different := differences(stated, identities):
        raise UserError(
            f"the latent cache in {folder} is another than this run computes: {different}. "
            f"Set that back, or name another folder in data.latent_cache and {remedy}"
        )
    if absent := [kind.removeprefix(CONDITION) for kind in identities if kind not in stated["identities"]]:
        held = [repr(kind.removeprefix(CONDITION)) for kind in stated["identities"] if kind.startswith(CONDITION)]
        raise UserError(
            f"the latent cache in {folder} has no latents of the condition {absent[0]!r}, which the ControlNet of this "
            f"run reads (it has those of {', '.join(held) or 'pictures alone'}): run `controlbooth data precompute` "
            "with the arguments of this run, which adds them, or leave data.latent_cache out"
        )
    latent_cache = replace(plan_latent_cache(folder, dataset, buckets, identities), computed=tuple(stated["computed"]))
    if lacking := missing(latent_cache):
        kind, shard = lacking[0]
        raise UserError(
            f"{len(lacking)} of {sum(map(len, latent_cache.paths.values()))} shards of the latent cache are missing in "
            f"{folder}, first {latent_cache.paths[kind][shard].name} of {dataset.paths[shard]}: {remedy}"
        )
    return latent_cache


def missing(latent_cache: LatentCache) -> list[tuple[str, int]]:
    """Lists (kind, shard) of all cache shards that are not whole."""
    shards = range(len(latent_cache.paths["latents"]))
    wanted = [(kind, shard) for shard in shards for kind in latent_cache.paths]
    with ThreadPoolExecutor(16) as pool:  # a network disk answers one question in milliseconds, and many at once
        there = list(pool.map(lambda one: _is_whole(latent_cache.paths[one[0]][one[1]]), wanted))
    return [one for one, whole in zip(wanted, there, strict=True) if not whole]


def _is_whole(path: Path) -> bool:
    """Tells whether a cache shard is whole: its index, written last, is there, and so is the tar.

    What the index says is compared when the shard is opened.
    """
    return index_path(path).exists() and path.exists()


def damaged(latent_cache: LatentCache, rank: int = 0, world_size: int = 1) -> dict[tuple[str, int], str]:
    """Finds damage in a rank's share of the cache shards that are there: (kind, shard) -> what is wrong with it.

    Reads all their bytes, on the first rank with a progress bar.
    """
    lacking = set(missing(latent_cache))
    there = {
        path: (kind, shard)
        for kind, paths in latent_cache.paths.items()
        for shard, path in enumerate(paths)
        if (kind, shard) not in lacking
    }
    mine = list(there.items())[rank::world_size]
    with (
        ThreadPoolExecutor(16) as pool,  # reading and checksums let other threads run
        tqdm(total=len(mine), unit="shard", desc="check latent cache", disable=rank > 0 or len(mine) < 2) as bar,
    ):
        found = {}
        for (_, where), fault in zip(mine, pool.map(_fault, (path for path, _ in mine)), strict=True):
            bar.update()
            if fault:
                found[where] = fault
    return found


def _fault(path: Path) -> str | None:
    """Says what has changed in a cache shard since it was written; returns None where nothing has."""
    try:
        opened = _OpenShard(path)
        for sample, parts in zip(opened.index.samples, opened.index.parts, strict=True):
            for part in parts[parts["offset"] > 0]:
                _read_part(opened, sample, part)
    except ValueError as error:
        return str(error)
    return None


def read_stated(folder: Path) -> dict[str, Any] | None:
    """Reads columns.json: `identities` of all kinds, and `computed`, a list of the machines' facts.

    Returns None where there is none. Raises ValueError where it cannot be read.
    """
    try:
        return json.loads((folder / STATED).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / STATED} cannot be read ({error}): delete {folder} and compute it again") from error


def check_stated(folder: Path, identities: Mapping[str, Identity]) -> None:
    """Raises ValueError where the folder has a cache of another identity, which would stay as bytes nobody reads."""
    stated = read_stated(folder)
    if stated and (different := differences(stated, identities)):
        raise UserError(
            f"{folder} holds a latent cache of something else: {different}. Name another folder in data.latent_cache, "
            "or delete it"
        )


def state(folder: Path, identities: Mapping[str, Identity], computed: Mapping[str, Any]) -> None:
    """Writes columns.json before the first cache shard, or adds where more of them are computed, such as those of one
    more condition. See `check_stated`."""
    stated = read_stated(folder) or {"identities": {}, "computed": []}
    stated["identities"] = {**identities, **stated["identities"]}
    if dict(computed) not in stated["computed"]:
        stated["computed"].append(dict(computed))
    write_whole(folder / STATED, json.dumps(stated, indent=2).encode() + b"\n")


def differences(stated: Mapping[str, Any], identities: Mapping[str, Identity]) -> str:
    """Says, for people, how the stated identities differ from these; returns "" where they are equal. The latents of a
    condition that are not there at all are no difference: they can be added."""
    found = []
    for kind, identity in identities.items():
        if kind.startswith(CONDITION) and kind not in stated["identities"]:
            continue
        there, wanted = stated["identities"].get(kind, {}), json.loads(json.dumps(identity))
        for name in sorted(there.keys() | wanted.keys()):
            if there.get(name) != wanted.get(name):
                found.append(f"{kind} have {name}={there.get(name)!r} there, and here {wanted.get(name)!r}")
    return "; ".join(found)


def latents_parts(dtype: str, flipped: bool) -> list[str]:
    """Returns the extensions of mean and standard deviation."""
    mirrored = "flipped." if flipped else ""
    return [f"{name}.{mirrored}{dtype}.npy" for name in ("mean", "std")]


def condition_parts(dtype: str, flipped: bool) -> list[str]:
    """Returns the extension of the mean, which is all that is kept of a condition: ControlNets read the mode."""
    return latents_parts(dtype, flipped)[:1]


def text_parts(dtype: str, caption: int, pooled: bool) -> list[str]:
    """Returns the extensions of a caption's hidden states, and of its pooled embedding where there is one."""
    return [f"{name}.{caption}.{dtype}.npy" for name in ("hidden_states", "pooled")[: 1 + pooled]]


def stored_bytes(arrays: Sequence[np.ndarray]) -> int:
    """Counts the bytes that these arrays of one sample take in a cache shard and its index."""
    return sum(BLOCK + -(-len(_npy(array)) // BLOCK) * BLOCK + PART.itemsize for array in arrays) + SAMPLE.itemsize


Add = Callable[[int, str, Mapping[str, np.ndarray]], None]
"""(row of the original's index, key, extension -> array)"""


@contextmanager
def written_cache_shard(path: Path, original: ShardIndex, stated: Mapping[str, Any]) -> Iterator[Add]:
    """Writes a cache shard, which gets its name when the block ends well, and otherwise leaves nothing behind.

    Gives the function that adds a sample. original: of the shard whose rows are added, each at most once and in any
    order. stated: kept in the tar under a name that is no sample's. Raises OSError with a remedy on a full disk.
    """
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):  # of a killed one; nobody else computes this shard
        leftover.unlink(missing_ok=True)
    temporary = temporary_path(path)
    rows: dict[int, tuple[int, int, dict[str, tuple[int, int, int]]]] = {}
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                _add(tar, "__columns__", json.dumps(stated).encode())

                def add(row: int, key: str, arrays: Mapping[str, np.ndarray]) -> None:
                    start, parts = tar.offset, {}
                    for extension, array in arrays.items():
                        data = _npy(array)
                        payload = _add(tar, f"{key}.{extension}", data)
                        parts[extension] = (payload - start, len(data), zlib.crc32(data))
                    rows[row] = (start, tar.offset - start, parts)

                yield add
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        index_path(path).unlink(missing_ok=True)  # of a damaged one: nothing is whole until its own index is there
        os.replace(temporary, path)
        write_index(_index(size, original, rows), index_path(path))
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a write, which names no file
            said = f"{os.strerror(error.errno)}. What is finished is kept: make room and start again"
            raise OSError(error.errno, said, str(temporary)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a member to a tar; returns the byte at which its payload begins."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o444
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - -(-len(data) // BLOCK) * BLOCK


def _index(size: int, original: ShardIndex, rows: Mapping[int, tuple[int, int, Mapping]]) -> ShardIndex:
    extensions = tuple(sorted({extension for _, _, parts in rows.values() for extension in parts}))
    samples = np.zeros(len(original.samples), SAMPLE)
    samples["key_hash"] = original.samples["key_hash"]
    parts = np.zeros((len(samples), len(extensions)), PART)
    for row, (start, length, found) in rows.items():
        samples[row]["offset"], samples[row]["size"] = start, length
        for extension, part in found.items():
            parts[row, extensions.index(extension)] = part
    return make_index(size, extensions, samples, parts)


class _OpenShard:
    """A cache shard and its index, closed when the last thread that reads from it has let it go."""

    def __init__(self, path: Path):
        self.path, self.index = path, load_index(index_path(path), REPAIR)
        self.column = {extension: i for i, extension in enumerate(self.index.extensions)}
        self.descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(self.descriptor).st_size
        if size != self.index.shard_bytes:
            raise UserError(f"{path} has {size} bytes, its index says {self.index.shard_bytes}: {REPAIR}")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


REPAIR = "run `controlbooth data precompute` again, which finds what is damaged and computes it anew"


class LatentCacheReader:
    """Reads a latent cache from any thread; keeps the `most_open` shards that were used last open."""

    def __init__(self, latent_cache: LatentCache, most_open: int = 256):
        self.cache, self.most_open = latent_cache, most_open
        self.latents_stored = STORED[latent_cache.identities["latents"]["dtype"]]
        self._open: OrderedDict[Path, _OpenShard] = OrderedDict()
        self._lock = Lock()

    def latents(self, shard: int, row: int, key: str, key_hash: int, flipped: bool) -> list[np.ndarray]:
        """Reads mean and standard deviation, (C, h, w) each. row: of the original's index.

        The arrays are read-only. Raises BadSample where the picture could not be encoded, since then a substitute is
        taken without the cache too, and ValueError where the cache shard is damaged or of another one.
        """
        parts = latents_parts(self.cache.identities["latents"]["dtype"], flipped)
        return self._read("latents", shard, row, key, key_hash, parts)

    def condition(self, shard: int, row: int, key: str, key_hash: int, flipped: bool) -> np.ndarray:
        """Reads the mean of a condition's posterior, (C, h, w). Raises what `latents` does."""
        kind = f"{CONDITION}{self.cache.condition}"
        parts = condition_parts(self.cache.identities[kind]["dtype"], flipped)
        return self._read(kind, shard, row, key, key_hash, parts)[0]

    def text(self, shard: int, row: int, key: str, key_hash: int, caption: int) -> list[np.ndarray]:
        """Reads the hidden states (L, D) of a sample's caption, and its pooled embedding (P,) where the base has one.

        Raises what `latents` does.
        """
        identity = self.cache.identities["text"]
        return self._read("text", shard, row, key, key_hash, text_parts(identity["dtype"], caption, identity["pooled"]))

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _read(
        self, kind: str, shard: int, row: int, key: str, key_hash: int, extensions: Sequence[str]
    ) -> list[np.ndarray]:
        opened = self._opened(self.cache.paths[kind][shard])
        sample = opened.index.samples[row]
        if int(sample["key_hash"]) != key_hash:
            raise UserError(f"{opened.path}: row {row} is not of {key!r}: {REPAIR}")
        parts = [opened.index.parts[row, opened.column[name]] for name in extensions if name in opened.column]
        if len(parts) < len(extensions) or not all(part["offset"] for part in parts):
            raise BadSample(key, extensions[0], f"it could not be encoded when {opened.path.name} was computed")
        payloads = [_read_part(opened, sample, part) for part in parts]
        return [_array(data) for data in payloads]

    def _opened(self, path: Path) -> _OpenShard:
        with self._lock:
            if path not in self._open:
                self._open[path] = _OpenShard(path)
            self._open.move_to_end(path)
            while len(self._open) > self.most_open:
                self._open.popitem(last=False)
            return self._open[path]


def _read_part(opened: _OpenShard, sample: np.void, part: np.void) -> bytes:
    """Reads the bytes of one array. Raises ValueError where they are not those that were written."""
    at = int(sample["offset"]) + int(part["offset"])
    data = _pread(opened, int(part["size"]), at)
    if zlib.crc32(data) != part["crc"]:
        raise UserError(f"{opened.path}: the bytes from {at} have changed since they were written: {REPAIR}")
    return data


def _pread(opened: _OpenShard, length: int, offset: int) -> bytes:
    data = b""
    while len(data) < length:  # a read may be short, on network disks above all
        more = os.pread(opened.descriptor, length - len(data), offset + len(data))
        if not more:
            raise UserError(f"{opened.path} became shorter while it was open: {REPAIR}")
        data += more
    return data


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _array(data: bytes) -> np.ndarray:
    """Returns the array of bytes that `_npy` made, read-only and without a copy."""
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, dtype = _npy_header(data[:start])
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


@lru_cache
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Reads shape and type of a header. A cache has a few different ones, and each takes longer than its array."""
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _fingerprint(tree: Any) -> str:
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()
