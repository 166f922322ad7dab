"""Whether a checkpoint holds the bytes that were written: a disk or a copy can change some and keep the file's size.

COMPLETE, the marker of a whole checkpoint, lists the files with their sizes, and vouches for every byte of them:

    of PyTorch's files (.pt, zip archives) it has a digest of the directory, which has a checksum of each tensor
    of the trained weights it has none: state.json has their digest
    of state.json, config.yaml and whatever else there is it has a digest of the file
    of itself, its last entry is a digest of the others
"""

import json
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from controlbooth.data.files.records import Damaged, read_json, read_yaml

COMPLETE = "COMPLETE"
STATE, CONFIG = "state.json", "config.yaml"
NO_MARKER = f"{COMPLETE}: it is missing, or not what was written"
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


@dataclass(frozen=True)
class Marker:
    """What COMPLETE says."""

    sizes: Mapping[str, int]
    """Bytes of each file, by its name relative to the checkpoint."""
    digests: Mapping[str, str]
    """In hex, of the files that have one. Markers that were written before digests have none."""


def write_marker(checkpoint: Path) -> None:
    """Writes COMPLETE for the files that are there; of a checkpoint's weights the digest is in its state.json."""
    sizes = {name: size for name, size in sizes_of(checkpoint).items() if name != COMPLETE}
    digests = {name: _digest(checkpoint / name) for name in sizes if not name.endswith(".safetensors")}
    content = {"sizes": sizes, "digests": digests}
    (checkpoint / COMPLETE).write_text(json.dumps({"files": content, "digest": _digest_of_tree(content)}))


def read_marker(checkpoint: Path) -> Marker | None:
    """Reads COMPLETE; returns None where it is missing, or damaged itself."""
    try:
        tree = read_json(checkpoint / COMPLETE, "")
        if set(tree) == {"files", "digest"}:
            content = tree["files"]
            if tree["digest"] != _digest_of_tree(content):
                return None
            return Marker(dict(content["sizes"]), dict(content["digests"]))
        return Marker({str(name): int(size) for name, size in tree.items()}, {})  # as it was before digests
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def step_of(checkpoint: Path) -> int:
    """Returns the step in a checkpoint's name: 400 for step-00000400."""
    return int(checkpoint.name.removeprefix("step-"))


def what_is_missing(checkpoint: Path, share: int = 0, of: int = 1) -> str | None:
    """Says which of the files that were committed is missing or has another size, or which file of PyTorch's among them
    was not committed; returns None where there is none of that.

    Of several that look together each looks for its share: each `of`th file from number `share` on, counted from 0, and
    for share 0 at what else lies there.
    """
    marker = read_marker(checkpoint)
    if marker is None:
        return NO_MARKER
    for name, size in list(marker.sizes.items())[share::of]:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, and had {size}"
    return _what_is_besides(checkpoint, marker) if share == 0 else None


def _what_is_besides(folder: Path, marker: Marker) -> str | None:
    """Finds a file of PyTorch's that lies among those that were committed and is not one of them: DeepSpeed takes all
    that it finds by their endings. Returns what is wrong, or None."""
    for place in {(folder / name).parent for name in marker.sizes if name.endswith(".pt")}:
        for path in sorted(place.glob("*.pt")):
            if str(name := path.relative_to(folder)) not in marker.sizes:
                return f"{name} is none of its files"
    return None


def sizes_of(folder: Path) -> dict[str, int]:
    """Returns the bytes of every file below the folder, by relative name."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def folder_digest(folder: Path, names: Collection[str] | None = None) -> str:
    """Computes a SHA-256, in hex, over the names and bytes of the folder's files. names: of those that count; None for
    all."""
    digest = sha256()
    for path in sorted(folder.iterdir()):
        if names is not None and path.name not in names:
            continue
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def first_damage(checkpoint: Path, share: int, of: int) -> str | None:
    """Says what is wrong in this share of a complete checkpoint's files; None where nothing is.

    The share is each `of`th of PyTorch's files from number `share` on, counted from 0, and for share 0 all other files
    too.
    """
    marker = read_marker(checkpoint)
    if marker is None:
        return NO_MARKER
    found = _archives_damage(checkpoint, marker, share, of)
    return weights_damage(checkpoint) if found is None and share == 0 else found


def files_damage(folder: Path, share: int, of: int) -> str | None:
    """Checks as `first_damage` does, by the folder's marker alone, so any folder that has one."""
    marker = read_marker(folder)
    if marker is None:
        return NO_MARKER
    found = _archives_damage(folder, marker, share, of)
    if found is None and share == 0:
        return _other_files_damage(folder, marker) or _what_is_besides(folder, marker)
    return found


def _archives_damage(folder: Path, marker: Marker, share: int, of: int) -> str | None:
    """Says what is wrong in PyTorch's files, each `of`th from number `share` on; None where nothing is."""
    parts = [name for name in sorted(marker.sizes) if name.endswith(".pt")][share::of]
    with ThreadPoolExecutor(THREADS) as pool:
        faults = pool.map(lambda name: _archive_fault(folder / name, marker.digests.get(name)), parts)
        for name, fault in zip(parts, faults, strict=True):
            if fault:
                return f"{name}: {fault}"
    return None


def _other_files_damage(folder: Path, marker: Marker) -> str | None:
    """Says what is wrong in the files with a digest that are not PyTorch's; None where nothing is."""
    for name, digest in marker.digests.items():
        if name.endswith(".pt"):
            continue
        try:
            found = _digest(folder / name)
        except OSError as error:  # as of a disk that has noticed by itself
            return f"{name}: {error}"
        if found != digest:
            return f"{name}: it is not what was written, of digest {digest[:12]}"
    return None


def records_damage(checkpoint: Path) -> str | None:
    """Checks, as `first_damage` does, state.json, config.yaml, and what else is neither weights nor PyTorch's."""
    marker = read_marker(checkpoint)
    if marker is None:
        return NO_MARKER
    if damage := _other_files_damage(checkpoint, marker):
        return damage
    # A marker that was written before digests tells no more than sizes.
    try:
        step = read_json(checkpoint / STATE, "").get("step")
    except (Damaged, OSError) as error:
        return f"{STATE}: {getattr(error, 'reason', error)}"
    try:
        read_yaml(checkpoint / CONFIG, "")
    except (Damaged, OSError) as error:
        return f"{CONFIG}: {getattr(error, 'reason', error)}"
    return None if step == step_of(checkpoint) else f"{STATE}: its step is {step!r}"


def weights_damage(checkpoint: Path) -> str | None:
    """Checks, as `first_damage` does, everything but PyTorch's files."""
    if damage := records_damage(checkpoint):
        return damage
    marker = read_marker(checkpoint)
    assert marker is not None
    digest = read_json(checkpoint / STATE, "").get("digest", "")
    folders = {Path(name).parts[0] for name in marker.sizes if "/" in name and name.endswith(".safetensors")}
    for folder in sorted(folders) if digest else ():
        # what lies beside is others'
        saved = {Path(name).name for name in marker.sizes if Path(name).parent == Path(folder)}
        try:
            found = folder_digest(checkpoint / folder, saved)
        except OSError as error:
            return f"{folder}: {error}"
        if found != digest:
            return f"{folder}: its files are not those that were saved, of digest {digest[:12]}"
    return None


def _digest(path: Path) -> str:
    """Computes a SHA-256, in hex, of a file's bytes; of PyTorch's file, of its directory, which has the checksums of
    the rest."""
    if path.suffix == ".pt":
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            file.seek(archive.start_dir)
            return sha256(file.read()).hexdigest()
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()


def _digest_of_tree(tree: object) -> str:
    return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _archive_fault(path: Path, digest: str | None) -> str | None:
    import torch  # takes seconds, and whoever looks at the small files does without

    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
        torch._C.PyTorchFileReader(str(path))  # reads the directory, and minds bytes that zipfile does not
        if digest is not None and _digest(path) != digest:
            return f"it is not the file that was written, of digest {digest[:12]}"
    except UNREADABLE as error:
        return str(error) or type(error).__name__
    return None if record is None else f"the checksum of {record} is another one"
