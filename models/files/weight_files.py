"""The files of a network: which of a folder's are to be read, and what their headers say, without torch.

A safetensors file begins with a JSON header that names every tensor with its dtype and shape, so that what a network
lacks can be told before a single weight is read.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlbooth.data.errors import MissingFile, UserError

MOST_HEADER_BYTES = 100 * 2**20
"""The limit of the safetensors library: a longer header is none."""
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Of one value, by the names that safetensors gives to dtypes."""
_FILE = re.compile(
    r"(?P<stem>[^.]+?)(?P<early>-\d{5}-of-\d{5})?(?:\.(?P<variant>[^.]+?)(?P<late>-\d{5}-of-\d{5})?)?\.safetensors"
)
"""Both model.fp16-00001-of-00002.safetensors and, of older versions, model-00001-of-00002.fp16.safetensors."""


def safetensors_header(file: Path) -> dict[str, Any]:
    """Reads name -> {dtype, shape, data_offsets} of every tensor from a file's header.

    Raises ValueError for a file that is not a safetensors file, is damaged or is incomplete.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        try:
            header = json.loads(stream.read(length)) if length < min(size, MOST_HEADER_BYTES) else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise UserError(f"{file} is not a safetensors file; a pointer of git-lfs is not its content. Fetch it again")
    header.pop("__metadata__", None)
    end = 0
    for name, entry in sorted(header.items(), key=lambda one: _begin(one[1])):
        if not _is_entry(entry) or entry["data_offsets"][0] != end:
            raise UserError(f"{file} is damaged: its header says {_short(entry)} of {name!r}. Fetch it again")
        end = entry["data_offsets"][1]
    if 8 + length + end != size:
        raise UserError(f"{file} has {size} bytes where its header says {8 + length + end}. Fetch it again")
    return header


def _begin(entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and isinstance(offsets[0], int) else -1


def _is_entry(entry: Any) -> bool:
    """Tells whether an entry of a header states a dtype, a shape and offsets, and these agree.

    Of a dtype that is not known the size is not compared, only the form of shape and offsets.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)) or offsets[1] < offsets[0]:
        return False
    bits = BITS.get(entry["dtype"])
    return bits is None or 8 * (offsets[1] - offsets[0]) == bits * math.prod(shape)


def _short(entry: Any) -> str:
    text = json.dumps(entry)
    return text if len(text) < 80 else f"{text[:79]}…"


def variant_of(file: Path) -> str | None:
    """Returns the variant in a file's name, or None: fp16 for diffusion_pytorch_model.fp16.safetensors and for
    diffusion_pytorch_model.fp16-00001-of-00002.safetensors."""
    match = _FILE.fullmatch(file.name)
    return match["variant"] if match else None


def weights_files(folder: Path, stem: str) -> list[Path]:
    """Finds the .safetensors files of a network: the full-precision ones, or else those of its only variant.

    stem: what the library that wrote them calls them, `diffusion_pytorch_model` or `model`. A file that holds all is
    preferred to shards of it, as in the libraries. Raises FileNotFoundError where there is none, or a shard is missing,
    and ValueError for several variants and for shards of several downloads.
    """
    groups: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        match = _FILE.fullmatch(file.name)
        if match and match["stem"] == stem:
            if not file.is_file():
                target = f"a link to {file.readlink()}, which is not there" if file.is_symlink() else "no file"
                raise MissingFile(f"{file} is {target}: the model is not whole. Download the rest of it")
            groups.setdefault(match["variant"], []).append(file)
    if not groups:
        raise MissingFile(_nothing_to_read(folder, stem))
    if None not in groups and len(groups) > 1:
        raise UserError(f"{folder} holds the variants {', '.join(map(str, groups))}; keep the one to be used")
    variant = None if None in groups else next(iter(groups))
    files = groups[variant]
    whole = [file for file in files if not _shard_of(file)]
    return whole or _shards(folder, stem, variant, files)


def _nothing_to_read(folder: Path, stem: str) -> str:
    if not folder.is_dir():
        return f"{folder} does not exist: the model is not whole. Download the rest of it"
    pickled = next(iter(sorted(folder.glob("*.bin"))), None)
    if pickled:
        return (
            f"{pickled} is a pickle, which can run code when it is read, and there is no .safetensors beside it. "
            "Convert it with save_pretrained(..., safe_serialization=True), or download the safetensors files."
        )
    others = [file.name for file in sorted(folder.glob("*.safetensors"))]
    if others:
        return f"{folder} holds no {stem}.safetensors, which the libraries read, but {', '.join(others[:3])}. Rename it"
    return f"{folder} holds no .safetensors file"


def _shard_of(file: Path) -> tuple[int, int] | None:
    """Returns (number, how many there are) of a shard, counted from 1, or None for a file that holds all."""
    found = re.search(r"-(\d{5})-of-(\d{5})", file.name)
    return (int(found[1]), int(found[2])) if found else None


def _shards(folder: Path, stem: str, variant: str | None, files: Sequence[Path]) -> list[Path]:
    """Returns the files if they are all shards that there should be. Raises FileNotFoundError if one is missing, and
    ValueError if they are of several downloads."""
    numbers = [number for file in files if (number := _shard_of(file))]
    totals = sorted({total for _, total in numbers})
    if len(totals) > 1:
        raise UserError(
            f"{folder} holds shards of {' and of '.join(map(str, totals))} files of {stem}: delete those of the other "
            "download"
        )
    there = {number for number, _ in numbers}
    missing = [number for number in range(1, totals[0] + 1) if number not in there]
    index = folder / f"{stem}.safetensors.index{'' if variant is None else f'.{variant}'}.json"
    named: set[str] = set()
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        named = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    absent = sorted(named - {file.name for file in files}) or [f"number {number}" for number in missing]
    if absent:
        raise MissingFile(
            f"{folder} holds {len(there)} of the {totals[0]} shards of {stem}; {', '.join(absent[:3])} is not there. "
            "Download the rest"
        )
    return list(files)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a model's folder. Raises FileNotFoundError, and ValueError for a file that holds none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFile(f"{path} does not exist: the model is not whole. Download the rest of it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, and no JSON: {error}. Fetch it again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {_short(tree)} where the model's settings belong. Fetch it again")
    return tree


def shapes_of(files: Sequence[Path]) -> Mapping[str, tuple[int, ...]]:
    """Reads name -> shape of the tensors of several files from headers. Raises ValueError as `safetensors_header`."""
    return {name: tuple(entry["shape"]) for file in files for name, entry in safetensors_header(file).items()}
