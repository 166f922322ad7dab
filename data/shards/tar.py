"""The members of a tar file and the bytes at which they lie, and every way in which such a file can be damaged.

`tarfile` reads on at the next thing that looks like a header, or stops without a word, and webdataset with it: a shard
with a damaged header in its middle silently loses its second half. Here each of these is a `TarDamage` that names the
byte. Read are ustar (with prefixes), GNU long names and PAX headers, POSIX.1-2017 "pax Interchange Format".
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
LONGEST_HEADER = 1 << 20
"""Bytes of a long name or of PAX records. They are read at once, and a wrong size would ask for gigabytes."""
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_PAYLOAD = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders and pipes, whatever size they state


class TarDamage(Exception):
    """kind: header, truncated, end, trailing or unsupported. byte: where in the file it was seen."""

    def __init__(self, kind: str, byte: int, message: str):
        super().__init__(message)
        self.kind, self.byte, self.message = kind, byte, message


class Member(NamedTuple):
    """A regular file inside a tar. All positions are bytes from the start of the tar."""

    name: str
    start: int
    """Its first header, which may be a long-name or PAX header."""
    payload: int
    size: int


def members(file: BinaryIO, file_bytes: int) -> Iterator[Member]:
    """Yields the regular files of a tar, in order; the caller may read payloads from `file` in between.

    Raises TarDamage at the first byte that cannot be right, after every member before it was given.
    """
    at = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    start = 0
    while True:
        if file_bytes - at < BLOCK:
            _raise_end(at, file_bytes)
        file.seek(at)
        block = file.read(BLOCK)
        if block.count(0) == BLOCK:
            _check_end(file, at, file_bytes)
            return
        kind, name, size = _header(block, at)
        payload = at + BLOCK
        if not long_name and not pax:
            start = at
        if kind in _WITHOUT_PAYLOAD:
            size = 0
        elif kind in _REGULAR and "size" in pax:
            size = int(pax["size"])
        end = payload + -(-size // BLOCK) * BLOCK
        if end > file_bytes:
            missing = f"{end - file_bytes} of the {end - payload} bytes of {long_name or name!r} are missing"
            raise TarDamage("truncated", file_bytes, f"the file ends inside a member: {missing}")
        if kind in (b"L", b"x") and size > LONGEST_HEADER:
            raise TarDamage("header", at, f"the header at this byte is {size} bytes long, which no name or record is")
        if kind == b"L":
            long_name = _text(file.read(size))
        elif kind == b"x":
            pax = _pax_records(file.read(size), at)
        elif kind not in (b"g", b"K"):
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in pax):
                raise TarDamage("unsupported", at, f"{name!r} is stored sparse; write the shard without --sparse")
            name = pax.get("path") or long_name or name
            if kind in _REGULAR and not name.endswith("/"):
                yield Member(name, start, payload, size)
            long_name, pax = None, {}
        at = end


def first_name(data: bytes) -> str:
    """Returns the name of the member whose first header is at the start of `data`, as `members` gives it."""
    at, long_name, pax = 0, None, {}
    while True:
        kind, name, size = _header(data[at : at + BLOCK], at)
        payload = data[at + BLOCK : at + BLOCK + size]
        if kind == b"L":
            long_name = _text(payload)
        elif kind == b"x":
            pax = _pax_records(payload, at)
        elif kind not in (b"g", b"K"):
            return pax.get("path") or long_name or name
        at += BLOCK + -(-size // BLOCK) * BLOCK


def _header(block: bytes, at: int) -> tuple[bytes, str, int]:
    """Parses one header block into type flag, name and payload bytes. Raises TarDamage where it is no header."""
    if len(block) < BLOCK:
        raise TarDamage("truncated", at, f"the file ends inside a header, {BLOCK - len(block)} bytes short")
    stated = _number(block[148:156])
    if stated != sum(block) - sum(block[148:156]) + 8 * 32:  # its own field counts as eight spaces
        hint = "; it is compressed: unpack it, random access needs a plain tar" if block[:2] == b"\x1f\x8b" else ""
        raise TarDamage("header", at, f"the checksum of this header is wrong{hint}")
    size = _number(block[124:136])
    if size is None or size < 0:
        raise TarDamage("header", at, f"this header's size field {block[124:136]!r} is not a number")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:  # GNU keeps times where POSIX keeps the prefix
        name = f"{_text(block[345:500])}/{name}"
    return block[156:157], name, size


def _number(field: bytes) -> int | None:
    """Parses a number in octal, or in base 256 when the first bit is set (GNU, for sizes from 8 GiB); else None."""
    if field[0] == 0xFF:  # a negative one
        return None
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _pax_records(data: bytes, at: int) -> dict[str, str]:
    """Parses the records "length key=value\\n" of a PAX header. Raises TarDamage where they cannot be read."""
    records = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not _is_number(length) or not len(length) < int(length) <= len(data):
            raise TarDamage("header", at, f"the PAX header at this byte cannot be read near {data[:20]!r}")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        data = data[int(length) :]
    if not _is_number(records.get("size", "0").encode("utf-8", "surrogateescape")):
        raise TarDamage("header", at, f"the PAX header at this byte states the size {records['size']!r:.60}")
    return records


def _is_number(text: bytes) -> bool:
    """Tells whether a text is a decimal number of a length that a size may have.

    `int` takes signs, spaces and underscores too, and `isdigit` of a str other digits.
    """
    return re.fullmatch(rb"[0-9]{1,20}", text) is not None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _raise_end(at: int, file_bytes: int) -> None:
    if at == file_bytes:
        message = "the file ends without the two zero blocks that close a tar, so members may be missing"
        raise TarDamage("end", at, message)
    short = BLOCK - (file_bytes - at)
    raise TarDamage("truncated", at, f"the file ends inside a header, {short} bytes short")


def _check_end(file: BinaryIO, at: int, file_bytes: int) -> None:
    """Checks that from the first zero block on there are at least two blocks, and nothing but zeros.

    Raises TarDamage otherwise.
    """
    if file_bytes - at < 2 * BLOCK:
        raise TarDamage("end", at, "only one of the two zero blocks that close a tar is there")
    file.seek(at)
    here = at
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            byte = here + next(i for i, value in enumerate(chunk) if value)
            what = f"{file_bytes - byte} bytes follow the end of the tar (two tars joined with cat?)"
            raise TarDamage("trailing", byte, f"{what}; they would never be read")
        here += len(chunk)
