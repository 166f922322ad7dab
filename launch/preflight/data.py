"""Cheap checks of what a run reads: its shards, their manifests and indexes, its cache and its latent cache.

As in preflight.py, whose part this is: without torch, and reading no more than it takes to see that something can be
read at all.
"""

import glob
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from controlbooth.data.arguments import expand_braces, quoted
from controlbooth.data.errors import MissingFile, UserError
from controlbooth.data.files.locks import know_locks
from controlbooth.data.secrets import shown
from controlbooth.launch.ranks.torchrun import Node
from controlbooth.trainer.config.run import RunConfig, lanes, sources

MANIFEST = "manifest.jsonl"
INDEX_HEADER = struct.Struct("<8sIIQ")
"""Of data/shards/sidecar.py: magic, version, length of a table, bytes of the shard."""
TAR_END_BYTES = 2 * 512
INDEX_MAGIC, DIGEST_BYTES = b"CBINDEX\n", 16


def check_data(config: RunConfig, node: Node) -> Iterator[str]:
    shards: dict[str, set[str]] = {"data.shards": set()}
    named = [("data.shards", source.shards) for source in sources(config)]
    for key, location in (*named, ("data.held_out", config.data.held_out)):
        if location is None:
            continue
        try:
            found = find_shards(location)
            shards.setdefault(key, set()).update(uri if is_remote(uri) else str(Path(uri).resolve()) for uri in found)
            remote = [uri for uri in found if is_remote(uri)]
            if remote and key == "data.shards" and config.data.cache is None:
                yield (
                    f"data.shards is {location!r}, with {len(remote)} shards in a store (first: {remote[0]}), and "
                    "data.cache is not set: give a folder on a local disk of each node"
                )
        except (OSError, ValueError) as error:
            yield f"{key} is {location!r}: {error}"
    common = shards["data.shards"] & shards.get("data.held_out", set())
    if common:
        yield (
            f"{len(common)} shards are both in data.shards and in data.held_out (first: {min(common)}), so validation "
            "would measure what was trained on. Name other shards in data.held_out"
        )
    elif config.data.held_out:
        yield from _copies_held_out(config)


def _copies_held_out(config: RunConfig) -> Iterator[str]:
    """Yields a problem where held-out shards are copies of trained ones, as far as they have indexes that tell."""
    try:
        trained = {digest: shard for source in sources(config) for digest, shard in _digests(source.shards).items()}
        held = _digests(config.data.held_out or "")
    except (OSError, ValueError):
        return  # check_data has said what is wrong
    if copies := sorted(held.keys() & trained.keys(), key=held.__getitem__):
        yield (
            f"{len(copies)} shards of data.held_out hold the same samples as ones of data.shards (first: "
            f"{held[copies[0]]} and {trained[copies[0]]}), so validation would measure what was trained on. Name other "
            "shards in data.held_out"
        )


def _digests(location: str) -> dict[str, str]:
    """Returns digest of its index -> the shard, for all shards of a location whose manifest or index tells it."""
    manifest = manifest_of(location)
    if manifest is not None:
        return {row["index_hash"]: shown(row["uri"]) for row in _manifest_rows(manifest) if "index_hash" in row}
    shards = [Path(name) for name in find_shards(location)]
    with ThreadPoolExecutor(16) as pool:
        digests = pool.map(lambda shard: _stated_digest(shard.with_name(f"{shard.name}.idx")), shards)
        return {digest: str(shard) for digest, shard in zip(digests, shards, strict=True) if digest}


def check_shards(config: RunConfig, node: Node) -> Iterator[str]:
    """Checks whether shards are as their manifests say and hold enough samples, and without a manifest whether they are
    cut short. Yields the problems."""
    named = [("data.shards", source.shards) for source in sources(config)]
    held_out = [("data.held_out", config.data.held_out)] if config.data.held_out else []
    stored = config.data.condition if config.data.condition == config.data.condition_name else None
    for key, location in (*named, *held_out):
        manifest = manifest_of(location)
        try:
            rows = _manifest_rows(manifest) if manifest else []
            shards = [] if manifest else [Path(uri) for uri in find_shards(location) if not is_remote(uri)]
        except (OSError, ValueError):
            continue  # check_data has said what is wrong
        with ThreadPoolExecutor(16) as pool:
            if cut := [shard for shard, is_cut in zip(shards, pool.map(_is_cut, shards), strict=True) if is_cut]:
                yield (
                    f"{key} is {location!r}: {len(cut)} of {len(shards)} shards are cut short ({_some(cut)}): "
                    "fetch or pack them again"
                )
        if manifest is None or not all({"bytes", "index_hash", "usable", "conditions"} <= row.keys() for row in rows):
            continue  # what there is to be told is told when the trainer indexes the shards
        if faults := _faults(manifest.parent, rows):
            yield (
                f"{key} is {location!r}: {len(faults)} of {len(rows)} shards are not as they were indexed "
                f"({_some(faults)}): put them back, or `controlbooth data index --rebuild {quoted(manifest.parent)}`"
            )
        listed = {Path(row["uri"]).name for row in rows}
        extra = [path for path in manifest.parent.glob("*.tar") if path.name not in listed]
        if extra and Path(location).is_dir():
            yield (
                f"{key} is {location!r}, whose manifest lists {len(rows)} shards, and the folder holds {len(extra)} "
                f"more ({_some(sorted(extra))}): take them in by `controlbooth data index {quoted(location)}`, or name "
                "the manifest itself to leave them out"
            )
        samples = sum(row["usable"] if stored is None else row["conditions"].get(stored, 0) for row in rows)
        if stored is not None and not samples:
            there = ", ".join(sorted({kind for row in rows for kind in row["conditions"]})) or "none"
            yield (
                f"data.condition is {stored!r}, and no sample of {location} has it; conditions there are: {there}. "
                f"Change it, or add it: `controlbooth data annotate {quoted(location)} -o FOLDER --condition {stored}`"
            )
        elif key == "data.held_out" and samples < config.validation.samples:
            yield (
                f"validation.samples={config.validation.samples}, and {location} holds {samples} usable samples out: "
                f"hold out more, as `controlbooth data pack --held-out {config.validation.samples}` does, or lower "
                "validation.samples, which makes control harder to tell"
            )
        elif key != "data.held_out" and samples < lanes(config):
            yield (
                f"{key} is {location!r} with {samples} usable samples, and each of the {lanes(config)} lanes needs "
                "one: add data, or lower "
                + (f"data.lanes={config.data.lanes}" if config.data.lanes else "global_batch_size, which sets them")
            )


def check_readable(config: RunConfig, node: Node) -> Iterator[str]:
    """Yields a problem for each source on a disk of which no sample can be read; mostly a single one is read for it."""
    from controlbooth.data.inspection.readable import problem  # imports numpy and OpenCV: not for every command

    for location in dict.fromkeys(source.shards for source in sources(config)):
        found = problem(location, config.data.condition, config.data.max_pixels, config.data.latent_cache is None)
        if found is not None:
            yield f"data.shards is {location!r}: {found}"


def _faults(folder: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what differs from a manifest's rows. A shard in a store is compared when it is fetched."""
    local = [row for row in rows if not is_remote(row["uri"])]
    with ThreadPoolExecutor(16) as pool:  # a network disk answers one question in milliseconds, and many at once
        return [fault for fault in pool.map(lambda row: _fault(folder / row["uri"], row), local) if fault]


def _fault(shard: Path, row: dict[str, Any]) -> str | None:
    index = shard.with_name(f"{shard.name}.idx")
    try:
        if shard.stat().st_size != row["bytes"]:
            return f"{shard} has {shard.stat().st_size} bytes, its index says {row['bytes']}"
        digest = _stated_digest(index, missing_ok=False)
    except FileNotFoundError as error:
        return None if error.filename == str(shard) else f"{index} is missing"  # check_data tells of shards
    return None if digest == row["index_hash"] else f"{index} is damaged, or of another manifest"


def _stated_digest(index: Path, missing_ok: bool = True) -> str:
    """Reads what an index says of its contents, at its end, in hexadecimal. Without an index it returns "", or raises
    FileNotFoundError where missing_ok is False."""
    try:
        with index.open("rb") as file:
            file.seek(-min(DIGEST_BYTES, index.stat().st_size), os.SEEK_END)
            return file.read().hex()
    except FileNotFoundError:
        if missing_ok:
            return ""
        raise


def _is_cut(shard: Path) -> bool:
    """Tells whether a shard that has no index, or is shorter than it says, lacks the 1,024 zeros that end a tar."""
    stated, size = _stated_bytes(shard.with_name(f"{shard.name}.idx")), shard.stat().st_size
    if stated is not None and stated <= size:
        return False
    with shard.open("rb") as file:
        file.seek(-min(size, TAR_END_BYTES), os.SEEK_END)
        return file.read() != bytes(TAR_END_BYTES)


def _stated_bytes(index: Path) -> int | None:
    """Reads from an index how many bytes its shard has; None where the index is missing or not whole."""
    try:
        with index.open("rb") as file:
            header = file.read(INDEX_HEADER.size)
    except FileNotFoundError:
        return None
    is_one = len(header) == INDEX_HEADER.size and header.startswith(INDEX_MAGIC)
    return INDEX_HEADER.unpack(header)[3] if is_one else None


def _some(items: Sequence[Any], most: int = 3) -> str:
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


def manifest_of(location: str) -> Path | None:
    """Returns the manifest that a location names, or that lies in the folder that it names; None without any."""
    path = Path(location)
    manifest = path / MANIFEST if path.is_dir() else path
    return manifest if manifest.suffix == ".jsonl" and manifest.exists() else None


def find_shards(location: str) -> list[str]:
    """Finds the tars that a location names, and the URIs that a manifest lists; only the tars are checked to exist.

    Raises FileNotFoundError and ValueError.
    """
    if is_remote(location):
        raise UserError(
            f"remote shards are indexed first: run `controlbooth data index {quoted(shown(location))} --manifest "
            "set.jsonl`, and name set.jsonl here"
        )
    path, remote = Path(location), []
    manifest = manifest_of(location)
    if manifest is not None:
        uris = [row["uri"] for row in _manifest_rows(manifest)]
        remote = [shown(uri) for uri in uris if is_remote(uri)]
        found = [manifest.parent / uri for uri in uris if not is_remote(uri)]
    elif path.is_dir():
        found = sorted(path.glob("*.tar"))
    else:
        names = [sorted(glob.glob(one)) if glob.has_magic(one) else [one] for one in expand_braces(location)]
        found = [Path(name) for group in names for name in group]
    remedy = "correct the path, or write shards with `controlbooth data pack`"
    if not found and not remote:
        raise MissingFile(f"there are no .tar shards; {remedy}")
    if missing := [shard for shard in found if not shard.is_file()]:
        some = f"{len(missing)} of {len(found)} shards do not exist (first: {missing[0]})"
        raise MissingFile(f"{some if len(found) > 1 else 'it does not exist'}; {remedy}")
    return [*map(str, found), *remote]


def is_remote(location: str) -> bool:
    """Tells whether a location is a URI; `data.shards.storage` says which of them are read."""
    return "://" in location


def _manifest_rows(manifest: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(manifest.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(row | {"uri": str(row["uri"])})  # each of which fails where it is no row
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"line {number} of {manifest} is no shard row ({error!r}): "
                f"run `controlbooth data index {quoted(manifest.parent)}`"
            ) from error
    return rows


def check_cache(config: RunConfig, node: Node) -> Iterator[str]:
    """Checks whether the folder of the cache of remote shards can be used, and whether its disk has room for what it
    may come to hold. Yields the problems."""
    cache = config.data.cache
    manifests = [Path(source.shards) for source in sources(config) if source.shards.endswith(".jsonl")]
    if cache is None:
        return
    try:
        rows = [row for manifest in manifests if manifest.is_file() for row in _manifest_rows(manifest)]
        data_set = sum(row.get("bytes", 0) for row in rows if is_remote(row["uri"]))
    except ValueError:
        return  # check_data has said which line is wrong
    existing = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield f"data.cache is {cache}, but {existing} is no folder that can be written to. Change data.cache"
        return
    try:
        if not know_locks(existing):
            yield f"data.cache is {cache}, whose disk knows no locks. Change data.cache to a folder on a local disk"
    except OSError as error:
        yield f"data.cache is {cache}, and nothing can be written to {existing} ({error.strerror}). Change data.cache"
    there = sum(path.stat().st_size for path in cache.glob("*.tar")) if cache.is_dir() else 0
    needed, free = min(data_set, config.data.cache_gib * 2**30) - there, shutil.disk_usage(existing).free
    if needed > free:
        yield (
            f"the cache in {cache} will come to hold {gib(needed)} GiB more, and its disk has {gib(free)} GiB free. "
            f"Free some, change data.cache, or lower data.cache_gib={config.data.cache_gib:g}"
        )


def check_latent_cache(config: RunConfig, node: Node) -> Iterator[str]:
    """Checks whether there is a latent cache, and whether its shards have the size that their indexes say; the trainer
    checks what they were computed from. Yields the problems."""
    folder = config.data.latent_cache
    if folder is None:
        return
    if not (folder / "columns.json").is_file():
        yield (
            f"data.latent_cache is {folder}, which holds no latent cache: write it with `controlbooth data precompute` "
            "and the arguments of this run, or leave data.latent_cache out"
        )
        return
    with ThreadPoolExecutor(16) as pool:
        faults = [fault for fault in pool.map(_cache_shard_fault, sorted(folder.glob("*.tar"))) if fault]
    if faults:
        yield (
            f"data.latent_cache is {folder}, and {len(faults)} of its shards are damaged ({_some(faults)}): run "
            "`controlbooth data precompute` again, which computes them anew, and delete those that it leaves"
        )


def _cache_shard_fault(path: Path) -> str | None:
    """Returns what is wrong with a shard of the latent cache, or None. One without an index was never finished, and
    does not count yet."""
    index = path.with_name(f"{path.name}.idx")
    if not index.exists():
        return None
    stated, size = _stated_bytes(index), path.stat().st_size
    if stated is None:
        return f"{index} is not a whole index"
    return None if size == stated else f"{path} has {size} bytes, its index says {stated}"


def gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f}"
