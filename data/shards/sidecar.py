"""The index beside a shard: `x.tar.idx` says at which byte of `x.tar` every part of every sample lies.

Layout, little-endian: magic (8 bytes), version u32, length of the extension table u32, shard bytes u64, samples u64,
the extension table as JSON padded to 8 bytes, samples x SAMPLE, samples x extensions x PART, and a blake2b-128 of all
before it: 34 bytes a sample and 12 for each of its parts.
"""

import hashlib
import json
import os
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from controlbooth.data.arguments import quoted
from controlbooth.data.condition_names import IMAGE_EXTENSIONS, stored_kind
from controlbooth.data.errors import UserError
from controlbooth.data.files.whole import write_whole
from controlbooth.data.order.buckets import aspect_bins
from controlbooth.data.order.draws import hash64
from controlbooth.data.shards.storage import RemoteShard, Shard

MAGIC = b"CBINDEX\n"
VERSION = 1
DIGEST_BYTES = 16
_HEADER = struct.Struct("<8sIIQQ")

SAMPLE = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header in the shard
        ("size", "<u8"),  # to the end of its last payload
        ("key_hash", "<u8"),  # draws.hash64(key)
        ("width", "<u4"),  # of the upright target image, 0 where it cannot be told
        ("height", "<u4"),
        ("flags", "<u2"),
    ],
)
PART = np.dtype([("offset", "<u4"), ("size", "<u4"), ("crc", "<u4")])
"""offset: of the payload from the sample's offset, 0 where the sample lacks the part. crc: zlib.crc32 of the bytes."""

MISSING_IMAGE, MISSING_CAPTION, MISSING_CONDITION, DUPLICATE, BAD_IMAGE, QUARANTINED = 1, 2, 4, 8, 16, 32
FLAG_NAMES = {
    MISSING_IMAGE: "no target image",
    MISSING_CAPTION: "no caption",
    MISSING_CONDITION: "a condition is missing",
    DUPLICATE: "its key was there before",
    BAD_IMAGE: "its target image has no readable header",
    QUARANTINED: "quarantined",
}
_UNUSABLE = MISSING_IMAGE | MISSING_CAPTION | DUPLICATE | BAD_IMAGE | QUARANTINED

CAPTION_EXTENSIONS = ("txt", "json")
_CONDITION = re.compile(rf"(?:cond\.)?([^.]+)\.(?:{'|'.join(IMAGE_EXTENSIONS)})")


def condition_kind(extension: str) -> str | None:
    """Returns the kind of condition that a part holds, or None where it is no condition.

    It is "canny" for cond.canny.png, and also for canny.png, as shards of others have it.
    """
    match = _CONDITION.fullmatch(extension)
    return match.group(1) if match else None


@dataclass(frozen=True)
class ShardIndex:
    """What is known of a shard without reading it."""

    shard_bytes: int
    extensions: tuple[str, ...]
    samples: np.ndarray
    """(n,) SAMPLE"""
    parts: np.ndarray
    """(n, len(extensions)) PART"""
    digest: str
    """In hex; equal digests mean equal contents, sizes and places of all samples."""

    @cached_property
    def condition_kinds(self) -> tuple[str, ...]:
        return tuple(sorted({kind for kind in map(condition_kind, self.extensions) if kind}))

    def columns(self, role: str, kind: str | None = None) -> list[int]:
        """Lists columns of `parts` for role "image", "caption" or "condition" (of this kind), the preferred first."""
        if role == "condition":
            return [i for i, extension in enumerate(self.extensions) if condition_kind(extension) == kind]
        wanted = IMAGE_EXTENSIONS if role == "image" else CAPTION_EXTENSIONS
        return [self.extensions.index(extension) for extension in wanted if extension in self.extensions]

    def usable(self, kind: str | None = None) -> np.ndarray:
        """Returns the rows of the samples to train on, int64; the order's ordinals count along this array.

        They have image and caption, no known fault, and the condition if one is asked for.
        """
        good = (self.samples["flags"] & _UNUSABLE) == 0
        kind = stored_kind(kind)
        if kind is not None:
            good = good & (self.parts["offset"][:, self.columns("condition", kind)] > 0).any(axis=1)
        return np.flatnonzero(good)

    def part_contents(self, role: str, rows: np.ndarray) -> np.ndarray:
        """Returns size and CRC of the part that each of these rows has in a role: (n,) uint64, 0 without one.

        The size is in the upper 32 bits. role: see `columns`.
        """
        found = np.zeros(len(rows), np.uint64)
        for column in reversed(self.columns(role)):  # the first one that is there is taken
            part = self.parts[rows, column]
            value = part["size"].astype(np.uint64) << np.uint64(32) | part["crc"].astype(np.uint64)
            found = np.where(part["offset"] > 0, value, found)
        return found

    def contents(self, row: int) -> str:
        """Hashes a sample's key and its parts' names, sizes and CRCs to 16 hex digits, as its key may repeat.

        The result is equal for copies of the sample in any shard, whatever its flags, and another one where a part has
        changed.
        """
        parts = zip(self.extensions, self.parts[row], strict=True)
        there = [(name, int(part["size"]), int(part["crc"])) for name, part in parts if part["offset"]]
        return f"{hash64(int(self.samples['key_hash'][row]), *(fact for part in there for fact in part)):016x}"

    def aspect_bins(self, kind: str | None = None) -> np.ndarray:
        """Returns the aspect-ratio bin of each of the usable samples: (n,) int64."""
        used = self.samples[self.usable(kind)]
        return aspect_bins(used["width"], used["height"])


def index_path(shard: Shard) -> Path:
    """Returns where a shard's index lies: beside it on a disk, and for one in a store where its manifest says."""
    return shard.index if isinstance(shard, RemoteShard) else shard.with_name(shard.name + ".idx")


def make_index(shard_bytes: int, extensions: tuple[str, ...], samples: np.ndarray, parts: np.ndarray) -> ShardIndex:
    """Makes an index from samples, (n,) SAMPLE, and parts, (n, len(extensions)) PART."""
    body = _encode(shard_bytes, extensions, samples, parts)
    return ShardIndex(shard_bytes, extensions, samples, parts, _digest(body).hex())


def write_index(index: ShardIndex, path: Path) -> None:
    body = _encode(index.shard_bytes, index.extensions, index.samples, index.parts)
    write_whole(path, body + _digest(body))


def load_index(path: Path, remedy: str = "") -> ShardIndex:
    """Reads an index and checks that it is whole. Raises FileNotFoundError, and ValueError if it is not.

    remedy: what to do then, where `controlbooth data index` is not what helps.

    It is read and not memory-mapped: the digest needs all of it, and each of Python's maps holds a file descriptor.
    """
    data = path.read_bytes()
    if len(data) < _HEADER.size + DIGEST_BYTES:
        raise UserError(_damaged(path, remedy))
    magic, version, table_bytes, shard_bytes, count = _HEADER.unpack_from(data)
    if magic != MAGIC or data[-DIGEST_BYTES:] != _digest(memoryview(data)[:-DIGEST_BYTES]):
        raise UserError(_damaged(path, remedy))
    if version != VERSION:
        said = f"{path} is an index of version {version}, this is version {VERSION}"
        raise UserError(f"{said}: {remedy or _remedy(path)}")
    try:
        extensions = _extensions(data[_HEADER.size : _HEADER.size + table_bytes])
        at = _HEADER.size + table_bytes
        samples = np.frombuffer(data, SAMPLE, count, at)
        parts = np.frombuffer(data, PART, count * len(extensions), at + samples.nbytes)
        parts = parts.reshape(count, len(extensions))
        if at + samples.nbytes + parts.nbytes + DIGEST_BYTES != len(data) or not _inside(samples, parts, shard_bytes):
            raise UserError("its tables do not fit its header, or the shard")
    except (ValueError, RecursionError, OverflowError) as error:  # of a digest that is right: not of our making
        raise UserError(_damaged(path, remedy)) from error
    return ShardIndex(shard_bytes, extensions, samples, parts, data[-DIGEST_BYTES:].hex())


def _extensions(table: bytes) -> tuple[str, ...]:
    names = json.loads(table)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("its extensions are no list of names")
    return tuple(names)


def _inside(samples: np.ndarray, parts: np.ndarray, shard_bytes: int) -> bool:
    """Tells whether every part lies in its shard."""
    if not parts.size:
        return True
    ends = (parts["offset"].astype(np.uint64) + parts["size"]).max(axis=1)
    room = np.uint64(shard_bytes) - np.minimum(samples["offset"], np.uint64(shard_bytes))
    return bool((ends <= room).all())


def read_digest(path: Path) -> str:
    """Reads the digest that an index file states, in hex, and nothing else of it. Raises ValueError without one."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) < _HEADER.size + DIGEST_BYTES:
            raise UserError(_damaged(path))
        file.seek(-DIGEST_BYTES, os.SEEK_END)
        return file.read().hex()


def _encode(shard_bytes: int, extensions: tuple[str, ...], samples: np.ndarray, parts: np.ndarray) -> bytes:
    table = json.dumps(extensions).encode()
    table += b" " * (-len(table) % 8)
    header = _HEADER.pack(MAGIC, VERSION, len(table), shard_bytes, len(samples))
    return header + table + samples.tobytes() + parts.tobytes()


def _digest(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def _damaged(path: Path, remedy: str = "") -> str:
    return f"{path} is not a whole index: {remedy or _remedy(path)}"


def _remedy(path: Path) -> str:
    return f"delete it and run `controlbooth data index {quoted(path.with_suffix(''))}`"
