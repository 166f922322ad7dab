"""One sample's bytes from a shard: a single read at the place its index states, checked by CRC and key.

A shard on a disk is read where it lies. One in a store is fetched whole into a cache and read there; without a cache,
as for looking at some samples, and where the copy is damaged, the sample's own range is asked for.
"""

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

import numpy as np

from controlbooth.data.condition_names import stored_kind
from controlbooth.data.errors import UserError
from controlbooth.data.order.buckets import Buckets
from controlbooth.data.order.draws import hash64
from controlbooth.data.pictures.images import BadSample
from controlbooth.data.shards import storage
from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.index import split_name
from controlbooth.data.shards.manifest import Dataset
from controlbooth.data.shards.sidecar import ShardIndex, index_path, load_index
from controlbooth.data.shards.storage import RemoteShard
from controlbooth.data.shards.tar import TarDamage, first_name


@dataclass(frozen=True)
class SampleBytes:
    """The encoded parts of a sample. Extensions name the parts as the shard does."""

    key: str
    key_hash: int
    row: int
    """Of the shard's index."""
    size: tuple[int, int]
    """(height, width) of the upright target image, as the index has it."""
    image: bytes
    """Empty from a reader without pictures."""
    image_extension: str
    condition: bytes | None
    """None from a reader without conditions."""
    condition_extension: str
    caption: bytes
    caption_extension: str
    seconds: float
    """Spent on opening and reading."""
    cache_hit: bool
    """Whether the shard was in the cache when the sample was asked for."""


@dataclass
class _OpenShard:
    descriptor: int | None
    """None of a shard in a store, which is opened in the cache for each read and pinned no longer."""
    index: ShardIndex
    rows: list[np.ndarray]
    """Of the usable samples of each bucket, by ordinal."""
    users: int = 0


class ShardReader:
    """Reads samples of a data set from any thread; keeps the `most_open` shards that were used last open."""

    def __init__(
        self,
        dataset: Dataset,
        condition_kind: str | None,
        most_open: int = 256,
        cache: Cache | None = None,
        buckets: Buckets | None = None,
        pictures: bool = True,
        conditions: bool = True,
    ):
        """Makes a reader; a shard is opened when a sample of it is read.

        buckets: of the order whose places are read; None where all samples are in one. pictures, conditions: whether to
        read the targets, and conditions where there is a kind: a latent cache may stand for them.
        """
        self.dataset, self.condition_kind, self.most_open = dataset, stored_kind(condition_kind), most_open
        self.cache, self.closing = cache, Event()
        self.buckets, self.pictures = buckets, pictures
        self.conditions = conditions and self.condition_kind is not None
        self._first_shard = np.cumsum([0, *(len(source.rows) for source in dataset.sources)])
        self._dropped: set[int] = set()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = Lock()

    def read(self, shard: int, ordinal: int, bucket: int = 0) -> SampleBytes:
        """Reads the sample with this ordinal among the shard's usable ones of that bucket.

        Raises BadSample where the bytes are not those that were indexed, OSError where they could not be read, and
        ValueError when the file is another one than was indexed.
        """
        where = self.dataset.paths[shard]
        if self.cache is None or isinstance(where, Path):
            return self._read(shard, ordinal, bucket, None)
        try:
            return self._read(shard, ordinal, bucket, self.cache)
        except BadSample:
            # A copy may be bad here and now only, and then a substitute would make this run differ from others. What
            # the store itself says is the same at every attempt and on every node.
            sample = self._read_from_store(where, shard, ordinal, bucket)
        self._drop_copy(self.cache, where, shard)
        return sample

    def _read_from_store(self, where: RemoteShard, shard: int, ordinal: int, bucket: int) -> SampleBytes:
        try:
            return self._read(shard, ordinal, bucket, None)
        except BadSample:
            storage.check_version(where, self.closing)  # bytes of another version say nothing about this one's
            raise

    def _read(self, shard: int, ordinal: int, bucket: int, cache: Cache | None) -> SampleBytes:
        """Reads and checks a sample. Raises as `read` does.

        cache: where to read a shard of a store from; None for the shard itself, on a disk or in the store.
        """
        began = time.perf_counter()
        with self._pinned(shard) as opened:
            index = opened.index
            row = int(opened.rows[bucket][ordinal])
            record, parts = index.samples[row], index.parts[row]
            columns = {role: self._column(index, parts, role) for role in ("caption", "image")[: 1 + self.pictures]}
            if self.conditions:
                columns["condition"] = self._column(index, parts, "condition")
            length = max(int(parts[column]["offset"]) + int(parts[column]["size"]) for column in columns.values())
            data, hit = self._bytes(shard, opened, length, int(record["offset"]), cache)
        key = _key(data, int(record["key_hash"]), f"{self.dataset.paths[shard].name}[{ordinal}]")
        payloads = {}
        for role, column in columns.items():
            offset, size, crc = parts[column].tolist()
            payloads[role] = data[offset : offset + size]
            if zlib.crc32(payloads[role]) != crc:
                raise BadSample(key, index.extensions[column], "its bytes have changed since they were indexed (CRC)")
        return SampleBytes(
            key=key,
            key_hash=int(record["key_hash"]),
            row=row,
            size=(int(record["height"]), int(record["width"])),
            image=payloads.get("image", b""),
            image_extension=index.extensions[columns["image"]] if "image" in columns else "",
            condition=payloads.get("condition"),
            condition_extension=index.extensions[columns["condition"]] if "condition" in columns else "",
            caption=payloads["caption"],
            caption_extension=index.extensions[columns["caption"]],
            seconds=time.perf_counter() - began,
            cache_hit=hit,
        )

    def noted(self, shard: int, ordinal: int, bucket: int = 0) -> tuple[int, str]:
        """Returns by what a ledger identifies a sample: the byte at which it begins in its shard, and its `contents`.

        Both are the same for every condition kind, and the contents stay the same where the shard is moved.
        """
        with self._pinned(shard) as opened:
            row = int(opened.rows[bucket][ordinal])
            return int(opened.index.samples[row]["offset"]), opened.index.contents(row)

    def close(self) -> None:
        """Closes all files; no other thread may be reading any more."""
        with self._lock:
            for opened in self._open.values():
                _close(opened)
            self._open.clear()

    def _drop_copy(self, cache: Cache, where: RemoteShard, shard: int) -> None:
        """Deletes a damaged shard from the cache, so that it is fetched again; once in a process, as a disk that
        damages what it holds would have it fetched for every sample."""
        with self._lock:
            dropped = shard in self._dropped
            self._dropped.add(shard)
        if not dropped:
            cache.discard(where)

    def _bytes(
        self, shard: int, opened: _OpenShard, length: int, offset: int, cache: Cache | None
    ) -> tuple[bytes, bool]:
        """Reads `length` bytes from `offset` on; returns them, and whether the shard was in the cache."""
        where = self.dataset.paths[shard]
        if isinstance(where, Path):
            assert opened.descriptor is not None
            return self._pread(shard, opened.descriptor, length, offset), False
        if cache is None:
            return storage.read(where.uri, offset, offset + length, self.closing), False
        with cache.pinned(where, self.closing) as (descriptor, hit):
            return self._pread(shard, descriptor, length, offset), hit

    def _column(self, index: ShardIndex, parts: np.ndarray, role: str) -> int:
        return next(column for column in index.columns(role, self.condition_kind) if parts[column]["offset"])

    def _pread(self, shard: int, descriptor: int, length: int, offset: int) -> bytes:
        data = b""
        while len(data) < length:  # a read may be short, on network disks above all
            more = os.pread(descriptor, length - len(data), offset + len(data))
            if not more:
                path, size = self.dataset.paths[shard], os.fstat(descriptor).st_size
                raise UserError(f"{path} ends at byte {size}: it became shorter while it was open. Put it back")
            data += more
        return data

    @contextmanager
    def _pinned(self, shard: int) -> Iterator[_OpenShard]:
        """Keeps a shard open until the block ends."""
        with self._lock:
            opened = self._open.get(shard)
            if opened is None:
                opened = self._open[shard] = self._open_shard(shard)
            self._open.move_to_end(shard)
            opened.users += 1
        try:
            yield opened
        finally:
            with self._lock:
                opened.users -= 1
                self._close_idle()

    def _close_idle(self) -> None:
        for shard in list(self._open)[: max(0, len(self._open) - self.most_open)]:
            if self._open[shard].users == 0:
                _close(self._open.pop(shard))

    def _open_shard(self, shard: int) -> _OpenShard:
        path, stated = self.dataset.paths[shard], self.dataset.rows[shard]
        index = load_index(index_path(path))
        if index.digest != stated.index_hash:
            raise UserError(f"{index_path(path)} was replaced while the data set is in use; start again from it")
        if not isinstance(path, Path):
            return _OpenShard(None, index, self._rows(shard, index))
        descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        if size != stated.bytes:
            os.close(descriptor)
            raise UserError(f"{path} has {size} bytes, its index says {stated.bytes}: run `controlbooth data index`")
        return _OpenShard(descriptor, index, self._rows(shard, index))

    def _rows(self, shard: int, index: ShardIndex) -> list[np.ndarray]:
        usable = index.usable(self.condition_kind)
        if self.buckets is None or len(self.buckets.shapes) == 1:
            return [usable]
        source = max(0, int(np.searchsorted(self._first_shard, shard, side="right")) - 1)
        numbers = self.buckets.bucket_of(source, index.aspect_bins(self.condition_kind))
        return [usable[numbers == bucket] for bucket in range(len(self.buckets.shapes))]


def _close(opened: _OpenShard) -> None:
    if opened.descriptor is not None:
        os.close(opened.descriptor)


def _key(data: bytes, key_hash: int, where: str) -> str:
    """Returns the key in the sample's first tar header. Raises BadSample where that is not the one that was indexed."""
    name = _plain_name(data) or _full_name(data)
    split = split_name(name)
    if split is None or hash64(split[0]) != key_hash:
        raise BadSample(where, "header", f"the tar header there, {name!r}, is not the one that was indexed")
    return split[0]


def _plain_name(data: bytes) -> str | None:
    """Returns a short ustar name, the fast way; None with a prefix, or a long-name or PAX header before it."""
    if data[156:157] not in (b"0", b"\0") or data[345]:
        return None
    return data[: data.index(b"\0", 0, 101) if b"\0" in data[:100] else 100].decode("utf-8", "surrogateescape")


def _full_name(data: bytes) -> str:
    try:
        return first_name(data)
    except TarDamage as damage:
        return f"<{damage.message}>"
