"""Shards that are damaged in every way that we know of, as bytes; shared by tests and tests/benchmarks."""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2

from controlbooth.data.scenes.render import render, scene

SAMPLES = 20
HURT = 10
"""The sample at which the damage lies."""
File = tuple[str, bytes]


@dataclass(frozen=True)
class Damage:
    what: str
    shard: bytes
    written: int = SAMPLES
    """Samples that whoever wrote it meant it to hold."""
    indexed: bytes | None = None
    """The shard as it was when its index was made; None where that was after the damage."""


def key(number: int) -> str:
    return f"k{number:02d}"


def parts(number: int) -> list[File]:
    drawn = render(scene(4, number), 32)
    return [
        (f"{key(number)}.png", cv2.imencode(".png", drawn.image[..., ::-1])[1].tobytes()),
        (f"{key(number)}.cond.edges.png", cv2.imencode(".png", drawn.edges)[1].tobytes()),
        (f"{key(number)}.txt", f"scene {number}".encode()),
    ]


def tar(files: Sequence[File]) -> bytes:
    """With its two end blocks and no more, so that every byte of it means something."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as out:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        end = out.offset
    return buffer.getvalue()[: end + 1024]


def header_of(shard: bytes, name: str) -> int:
    """The byte at which a member's header begins."""
    return shard.index(name.encode().ljust(100, b"\0"))


def damages() -> Iterator[Damage]:
    files = [file for number in range(SAMPLES) for file in parts(number)]
    whole = tar(files)
    picture = header_of(whole, f"{key(HURT)}.png")
    caption = header_of(whole, f"{key(HURT)}.txt")
    corrupt = bytearray(whole)
    corrupt[picture + 30] ^= 0x55
    flipped = bytearray(whole)
    flipped[picture + 512 + 200] ^= 0x10

    yield Damage("cut in a header", whole[: picture + 100])
    yield Damage("cut in a payload", whole[: picture + 512 + 40])
    yield Damage("cut between members", whole[:caption])
    yield Damage("corrupt header in mid-shard", bytes(corrupt))
    yield Damage("missing end blocks", whole[:-1024])
    yield Damage("trailing bytes (two tars joined)", whole + tar(parts(SAMPLES)), written=SAMPLES + 1)
    twice = [*files, *replaced(parts(SAMPLES), key(SAMPLES), key(HURT))]
    yield Damage("duplicate key", tar(twice), written=SAMPLES + 1)
    yield Damage(
        "members not adjacent", tar([*(file for file in files if file != caption_of(files)), caption_of(files)])
    )
    yield Damage("missing part", tar([file for file in files if file != caption_of(files)]))
    yield Damage("picture cut short", tar([altered(file, lambda data: data[: len(data) // 2]) for file in files]))
    yield Damage("picture is an error page", tar([altered(file, lambda data: b"<html>404</html>") for file in files]))
    yield Damage("byte flipped after indexing", bytes(flipped), indexed=whole)
    yield Damage("replaced after indexing", tar(files[:-3]), indexed=whole)


def caption_of(files: Sequence[File]) -> File:
    return next(file for file in files if file[0] == f"{key(HURT)}.txt")


def replaced(files: Sequence[File], old: str, new: str) -> list[File]:
    return [(name.replace(old, new), data) for name, data in files]


def altered(file: File, change: Callable[[bytes], bytes]) -> File:
    """The file, or, if it is the hurt sample's picture, the changed one."""
    name, data = file
    return (name, change(data) if name == f"{key(HURT)}.png" else data)
