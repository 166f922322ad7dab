"""Whether a checkpoint holds the bytes that were written: a disk or a copy can change some and keep the file's size."""

import json
import struct
import zipfile
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import torch

UNREADABLE = (
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    RuntimeError,
    zlib.error,
    struct.error,
    OSError,
)
"""What `zipfile` raises of an archive whose directory is damaged, as that reads as anything, an encrypted file among
others; and of a disk that has noticed by itself."""
THREADS = 4
"""Files read at once. Checksums of 4 GB take a second of one core, so the disk decides."""


def folder_digest(folder: Path, names: Collection[str] | None = None) -> str:
    """SHA-256 over the names and bytes of the folder's files, hexadecimal. names: of those that count; None for all."""
    digest = sha256()
    for path in sorted(folder.iterdir()):
        if names is not None and path.name not in names:
            continue
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def first_damage(checkpoint: Path, names: Sequence[str], share: int, of: int) -> str | None:
    """What is wrong in each `of`th of the files from number `share` on, beginning with 0; None where nothing is.

    names: of all files, relative, as COMPLETE has them. PyTorch's files are zip archives with a checksum of each
    tensor, which torch.load does not compare; of the trained weights state.json has a digest, which share 0 compares.
    """
    parts = [name for name in sorted(names) if name.endswith(".pt")][share::of]
    with ThreadPoolExecutor(THREADS) as pool:
        for name, fault in zip(parts, pool.map(lambda name: _archive_fault(checkpoint / name), parts), strict=True):
            if fault:
                return f"{name}: {fault}"
    return weights_damage(checkpoint, names) if share == 0 else None


def weights_damage(checkpoint: Path, names: Sequence[str]) -> str | None:
    """As `first_damage`, of state.json and the trained weights."""
    try:
        digest = json.loads((checkpoint / "state.json").read_text()).get("digest")
    except (ValueError, OSError) as error:
        return f"state.json: {error}"
    folders = {Path(name).parts[0] for name in names if "/" in name and name.endswith(".safetensors")}
    for folder in sorted(folders) if digest else ():
        saved = {Path(name).name for name in names if Path(name).parent == Path(folder)}  # what lies beside is others'
        try:
            found = folder_digest(checkpoint / folder, saved)
        except OSError as error:  # as of a disk that has noticed by itself
            return f"{folder}: {error}"
        if found != digest:
            return f"{folder}: its files are not those that were saved, of digest {digest[:12]}"
    return None


def _archive_fault(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
        torch._C.PyTorchFileReader(str(path))  # reads the directory, and minds bytes that zipfile does not
    except UNREADABLE as error:
        return str(error) or type(error).__name__
    return None if record is None else f"the checksum of {record} is another one"
