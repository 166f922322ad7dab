"""Whether a checkpoint holds the bytes that were written: a disk or a copy can change some and keep the file's size."""

import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

THREADS = 4
"""Files read at once. Checksums of 4 GB take a second of one core, so the disk decides."""


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of the files, hexadecimal."""
    digest = sha256()
    for path in sorted(folder.iterdir()):
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
    except ValueError as error:
        return f"state.json: {error}"
    folders = {Path(name).parts[0] for name in names if "/" in name and name.endswith(".safetensors")}
    for folder in sorted(folders) if digest else ():
        if folder_digest(checkpoint / folder) != digest:
            return f"{folder}: its files are not those that were saved, of digest {digest[:12]}"
    return None


def _archive_fault(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:  # a damaged directory reads as anything
        return str(error) or type(error).__name__
    return None if record is None else f"the checksum of {record} is another one"
