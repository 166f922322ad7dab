"""Reads the samples of a tar one after another, without an index."""

from collections.abc import Iterator

from controlbooth.data.shards import storage
from controlbooth.data.shards.index import split_name
from controlbooth.data.shards.storage import RemoteShard, Shard
from controlbooth.data.shards.tar import members


def samples_of(shard: Shard) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields key and parts {extension: bytes} of each sample of a tar, in its order, even those an index would flag."""
    remote = isinstance(shard, RemoteShard)
    size = shard.bytes if isinstance(shard, RemoteShard) else shard.stat().st_size
    key, parts = "", dict[str, bytes]()
    with storage.open_sequential(shard) if isinstance(shard, RemoteShard) else open(shard, "rb") as file:
        for member in members(file, size):
            split = split_name(member.name)
            if split is None:
                continue
            if parts and (split[0] != key or split[1] in parts):
                yield key, parts
                parts = {}
            key = split[0]
            file.seek(member.payload)
            parts[split[1]] = file.read(member.size)
    if parts:
        yield key, parts
    if remote:
        storage.check_version(shard)
