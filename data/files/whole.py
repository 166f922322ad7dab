"""Writes files whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """Returns a name beside `path` that no other writer has: `path.*.tmp`.

    It is not made from the process's id, which writers in containers may share: one would rename the other's half file.
    """
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and renames it to `path` after the block, so a file with the right name is whole.

    It is on the disk by then: after a crash of the machine the name would else stand for an empty file. Where the block
    raises, what was written is deleted, and `path` stays as it was.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, private: bool = False) -> None:
    """Writes bytes as `replaced` does. private: readable by its owner alone, from the first byte on."""
    with replaced(path) as temporary, open(temporary, "wb", opener=_private if private else None) as file:
        file.write(data)


def _private(path: str, flags: int) -> int:
    """Opens a file as `open` does, made with the rights of its owner alone."""
    return os.open(path, flags, 0o600)
