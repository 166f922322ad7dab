"""Shards that lie on web servers and in object stores: their size and version, and ranges of their bytes.

A URI is http://, https://, s3:// or gs://, read through fsspec; anything without `://` is a path. Credentials and
endpoints are those of the store's own tools (AWS_* and ~/.aws, gcloud; of web servers ~/.netrc, or the file that NETRC
names), so there is nothing to configure here. A password in a URI is refused; the signature of a presigned one is
used, and never shown.

Transient faults (connections that break or time out, answers 408, 425, 429 and 5xx, fewer bytes than were asked for)
are repeated with delays that double, always the same ones; everything else is raised at once. fsspec's own repeating
is off where it can be, so that what a run waits for is what this file says.
"""

import errno
import io
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec

from controlbooth.data.errors import MissingFile, UnusableFile, UserError
from controlbooth.data.order.draws import hash64
from controlbooth.data.secrets import CREDENTIALS, shown, without_secrets

SCHEMES = ("http", "https", "s3", "gs")
CHUNK_BYTES = 8 << 20
"""Read at a time: what a break of the connection costs, and what each fetch holds in memory."""
ATTEMPTS = 10
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 60.0
"""Waits of 0.5, 1, 2, ... 32, 60, 60 s: a store may be away for three minutes."""
CONNECT_SECONDS, SILENT_SECONDS = 10, 60
"""Time limits for a connection, and for a gap inside an answer."""

_VERSIONS = ("generation", "ETag", "Content-MD5", "Last-Modified")
"""What names an object's version, the surest first. A generation is Google's; its etag changes with the labels too."""
_TRANSIENT_STATUS = (408, 425, 429, *range(500, 600))
_TRANSIENT_ERRNO = (errno.EBUSY, errno.EREMOTEIO, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
"""EBUSY and EREMOTEIO are s3fs's words for 503 Slow Down and 500 Internal Error."""
_log = logging.getLogger(__name__)
T = TypeVar("T")


class StorageError(UnusableFile):
    """A store that does not give what was asked for; the message names the URI, what was tried and the remedy."""


class _ShortRead(Exception):
    """Fewer bytes than were asked for, which not every client library notices."""


@dataclass(frozen=True)
class ObjectStat:
    size: int
    """Bytes"""
    etag: str
    """The store's name for this version of the object; "" where it gives none."""


@dataclass(frozen=True)
class RemoteShard:
    """A shard in a store as it was when it was indexed. `str` of it is the URI, without a signature, for people."""

    uri: str
    bytes: int
    etag: str
    index: Path
    """Its sidecar, on a disk of this machine."""

    @property
    def name(self) -> str:
        return base_name(self.uri)

    def __str__(self) -> str:
        return shown(self.uri)


Shard = Path | RemoteShard


def is_remote(location: str | Path) -> bool:
    """Tells whether a location is a URI. Raises ValueError for unknown schemes, and for a user or a password in it."""
    scheme, separator, _ = str(location).partition("://")
    if separator and "@" in without_query(str(location)) and without_secrets(str(location)) != str(location):
        raise UserError(
            f"{shown(str(location))}: a user or a password was given in it, not shown here, which would be kept in "
            f"files and messages. Leave it out: {CREDENTIALS.get(scheme, 'give it to the tools of the store')}"
        )
    if separator and scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{shown(str(location))}: shards are read from paths and from {known}, not from {scheme}://")
    return bool(separator)


def without_query(uri: str) -> str:
    """Returns a URI without its query, the part from "?" on."""
    return uri.partition("?")[0]


def base_name(uri: str) -> str:
    """Returns the last part of a URI's path, without the query, such as a signature, behind it."""
    return uri.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]


def version_name(uri: str, size: int, etag: str) -> str:
    """Returns 16 hex digits that name one version of one object: equal base names in different buckets differ."""
    return f"{hash64('shard', uri, size, etag):016x}"


def stat(uri: str, closing: threading.Event | None = None) -> ObjectStat:
    """Asks for size and version of an object. Raises FileNotFoundError and StorageError."""
    info = _repeated(uri, "its size", lambda store: store.info(uri), closing)
    if info.get("type") != "file":
        raise MissingFile(errno.ENOENT, "there is no such object", shown(uri))
    if info.get("size") is None:
        raise StorageError(f"{shown(uri)}: the server states no size; serve shards as plain files, with Content-Length")
    etag = next((info[name] for name in _VERSIONS if info.get(name)), "")
    return ObjectStat(int(info["size"]), str(etag).strip('"'))


def read(uri: str, start: int, stop: int, closing: threading.Event | None = None) -> bytes:
    """Reads the bytes [start, stop) of an object, all of them. Raises FileNotFoundError and StorageError.

    closing: ends the waiting between attempts, with a StorageError.
    """

    def once(store: Any) -> bytes:
        data = store.cat_file(uri, start=start, end=stop)
        if len(data) > stop - start:
            raise StorageError(
                f"{shown(uri)}: asked for {stop - start} bytes, the server sent {len(data)}: it knows no byte ranges. "
                "Serve the shards with one that does (nginx, Apache, an object store), or copy them to a disk"
            )
        if len(data) < stop - start:
            raise _ShortRead(f"{len(data)} of {stop - start} bytes came")
        return data

    if start >= stop:
        return b""  # which HTTP has no range for
    return _repeated(uri, f"bytes {start} to {stop}", once, closing)


def download(shard: RemoteShard, descriptor: int, closing: threading.Event | None = None) -> None:
    """Writes a whole shard to an open file, chunk by chunk; a break costs the chunk and not the shard.

    Raises ValueError where the object is not, or not any more, the version that was indexed; OSError of writing.
    """
    check_version(shard, closing)
    for start in range(0, shard.bytes, CHUNK_BYTES):
        data = read(shard.uri, start, min(start + CHUNK_BYTES, shard.bytes), closing)
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], start + written)
    check_version(shard, closing)  # a version that was uploaded meanwhile would have been mixed in


def open_sequential(shard: RemoteShard) -> BinaryIO:
    """Opens the shard as a file that is read forwards, a chunk in memory at a time."""
    return io.BufferedReader(_Ranges(shard), CHUNK_BYTES)


def find(location: str) -> list[str]:
    """Lists the URIs of the tars that a folder or a glob in s3:// or gs:// names, sorted.

    A URI of http, which has no listings, or of a single tar is returned as it is. Raises FileNotFoundError where there
    are none.
    """
    scheme = location.partition("://")[0]
    if scheme in ("http", "https"):
        return [location]
    if not any(character in location for character in "*?["):
        if location.endswith(".tar"):
            return [location]
        location = location.rstrip("/") + "/*.tar"
    found = _repeated(location, "a listing", lambda store: store.glob(location), None)
    if not found:
        raise MissingFile(errno.ENOENT, "there are no .tar shards", shown(location))
    return [f"{scheme}://{name}" for name in sorted(found)]


class _Ranges(io.RawIOBase):
    """Lets io.BufferedReader read a shard by ranges."""

    def __init__(self, shard: RemoteShard):
        self.shard, self.at = shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.shard.bytes}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = read(self.shard.uri, self.at, max(self.at, min(self.at + len(buffer), self.shard.bytes)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def check_version(shard: RemoteShard, closing: threading.Event | None = None) -> None:
    """Raises ValueError where the object is not the version that was indexed."""
    now = stat(shard.uri, closing)
    if (now.size, now.etag) != (shard.bytes, shard.etag):
        raise UserError(
            f"{shard} has {now.size} bytes and version {now.etag!r}, it was indexed with {shard.bytes} and "
            f"{shard.etag!r}. Put that version back, or run `controlbooth data index` again (a new data set)"
        )


def _repeated(uri: str, what: str, once: Callable[[Any], T], closing: threading.Event | None) -> T:
    store, waited, name = _store(uri.partition("://")[0]), 0.0, shown(uri)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return once(store)
        except StorageError:
            raise
        except Exception as error:
            fault = _cause(error)
            if isinstance(fault, FileNotFoundError):
                raise MissingFile(errno.ENOENT, "there is no such object", name) from None
            said = shown(f"{type(fault).__name__}: {fault}".strip(": "))
            if not _is_transient(fault):
                raise StorageError(
                    f"{name}: {what} cannot be read ({said}). Check the URI, the credentials and the rights"
                ) from None  # whose message has the whole URI
            if attempt == ATTEMPTS:
                raise StorageError(
                    f"{name}: {what} could not be read in {attempt} attempts over {waited:.0f} s, at last with {said}. "
                    "Check the network and the store, then start again: what was fetched and trained is kept"
                ) from None
            delay = min(FIRST_DELAY_SECONDS * 2 ** (attempt - 1), LONGEST_DELAY_SECONDS)
            _log.warning("%s: %s: %s; attempt %d of %d in %g s", name, what, said, attempt + 1, ATTEMPTS, delay)
            if (closing or threading.Event()).wait(delay):
                raise StorageError(f"{name}: given up after {attempt} attempts, as the reader was closed") from None
            waited += delay
    raise AssertionError("the last attempt returns or raises")


def _cause(error: Exception) -> BaseException:
    """Returns the true cause of an error.

    fsspec reports every failed request for a size over HTTP as a file that was not found, and hides why.
    """
    hidden = error.__cause__
    if isinstance(error, FileNotFoundError) and hidden is not None and type(hidden).__module__.startswith("aiohttp."):
        return error if getattr(hidden, "status", None) in (404, 410) else hidden
    return error


def _is_transient(error: BaseException | None) -> bool:
    if isinstance(error, (_ShortRead, ConnectionError, TimeoutError)):
        return True
    status = getattr(error, "status", None) or getattr(error, "code", None)  # aiohttp's name for it, and gcsfs's
    if str(status).isdecimal():
        return int(str(status)) in _TRANSIENT_STATUS
    return isinstance(error, _broken_connections()) or (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO)


@lru_cache
def _broken_connections() -> tuple[type[Exception], ...]:
    """Lists the errors that the installed client libraries raise for broken connections; all stores use aiohttp."""
    import aiohttp

    kinds: list[type[Exception]] = [aiohttp.ClientConnectionError, aiohttp.ClientPayloadError]
    try:
        from botocore import exceptions as s3

        kinds += [s3.HTTPClientError, s3.ConnectionError, s3.ReadTimeoutError, s3.IncompleteReadError]
    except ModuleNotFoundError:  # https alone is in use
        return tuple(kinds)
    return tuple(kinds)


@lru_cache
def _store(scheme: str) -> Any:
    """Opens the fsspec file system of a scheme. Raises StorageError where its package is not installed."""
    try:
        return _OPEN[scheme]()
    except ImportError as error:
        remedy = 'pip install "controlbooth[remote]"'
        raise StorageError(f"{scheme}:// needs a package that is not installed ({error.name}): {remedy}") from error


def _open_http() -> Any:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
    plain = {"Accept-Encoding": "identity"}  # a compressed answer has other bytes at each place
    client = {"timeout": timeout, "trust_env": True}  # ~/.netrc or NETRC, and the proxies of the environment
    return fsspec.filesystem("http", client_kwargs=client, headers=plain, use_listings_cache=False)


def _open_s3() -> Any:
    options = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS, "retries": {"total_max_attempts": 1}}
    store = fsspec.filesystem("s3", config_kwargs=options, use_listings_cache=False)
    store.retries = 1
    return store


def _open_gs() -> Any:
    # The plain JSON API. What gcsfs opens by default asks Google's control API, over gRPC, about each bucket first.
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem(use_listings_cache=False)  # its six quick attempts of its own cannot be turned off


_OPEN: dict[str, Callable[[], Any]] = {"http": _open_http, "https": _open_http, "s3": _open_s3, "gs": _open_gs}
