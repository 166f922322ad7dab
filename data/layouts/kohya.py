"""kohya's layouts: folders named `10_sks dog`, and the dataset TOML."""

import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlbooth.data.errors import UserError
from controlbooth.data.layouts.rows import Part, Row, Understood, caption_file, caption_lines
from controlbooth.data.packing.folders import files_below, is_picture
from controlbooth.data.packing.text_tables import read_text, text_rows

FOLDER = re.compile(r"(\d+)_(.*)", re.DOTALL)
SUFFIXES = (".caption", ".txt")
MOST_WILDCARDS = 64
"""Captions that one line with {a|b} may become."""
CLASS_FOLDERS = ("reg", "regularization", "regularisation", "class")


def numbered_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and FOLDER.fullmatch(path.name))


def is_kohya(root: Path) -> bool:
    """Tells whether a folder holds `10_name` folders, itself or in img/."""
    return root.is_dir() and any(map(numbered_folders, _roots(root)))


def _roots(root: Path) -> list[Path]:
    return [path for path in (root, root / "img", *(root / name for name in CLASS_FOLDERS)) if path.is_dir()]


def read_folders(root: Path) -> Understood:
    """Reads all `REPEATS_words` folders of a folder, of its img/, and as regularisation pictures of its reg/."""
    found = Understood("folders of kohya's scripts")
    for place in _roots(root):
        for folder in numbered_folders(place):
            match = FOLDER.fullmatch(folder.name)
            assert match is not None
            subset = {"num_repeats": int(match[1]), "class_tokens": match[2], "is_reg": place.name in CLASS_FOLDERS}
            _read_subset(found, folder, subset)
    for path in sorted(root.iterdir()):
        if (
            path.is_dir()
            and path not in _roots(root)
            and not FOLDER.fullmatch(path.name)
            and not path.name.startswith(".")
        ):
            found.leave(path, "the folder's name does not begin with repeats, as 10_sks dog does")
    return found


def read_toml(path: Path) -> Understood:
    """Reads a dataset TOML, whose inner values win. Raises ValueError where it is none."""
    try:
        tree = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from error
    datasets = tree.get("datasets")
    if not isinstance(datasets, list) or not all(isinstance(one, dict) for one in datasets):
        raise UserError(f"{path} has no [[datasets]], so it is no dataset configuration")
    found = Understood("a dataset TOML of kohya's scripts")
    told: set[str] = set()
    for dataset in datasets:
        subsets = dataset.get("subsets", [])
        for subset in subsets if isinstance(subsets, list) else []:
            merged = {**tree.get("general", {}), **{k: v for k, v in dataset.items() if k != "subsets"}, **subset}
            told |= merged.keys()
            if not isinstance(merged.get("image_dir"), str):
                found.leave(f"a subset with {', '.join(subset) or 'nothing'}", "it has no image_dir")
                continue
            _read_subset(found, path.parent / merged["image_dir"], merged, path.parent)
    found.notes += [f"key {name}" for name in sorted(told)]
    return found


def _read_subset(found: Understood, folder: Path, subset: Mapping[str, Any], root: Path | None = None) -> None:
    repeat = subset.get("num_repeats", 1)
    if not isinstance(repeat, int) or repeat < 1:
        found.leave(folder, f"its repeats are {repeat}")
        return
    if not folder.is_dir():
        found.leave(folder, "there is no such folder")
        return
    part = Part(folder.name, repeat=repeat, is_class=bool(subset.get("is_reg")), words=subset.get("class_tokens") or "")
    conditions = subset.get("conditioning_data_dir")
    beside = _by_stem((root or folder.parent) / conditions) if conditions else {}
    listed = _listed(found, (root or folder) / subset["metadata_file"]) if subset.get("metadata_file") else {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if inside := sum(map(is_picture, files_below(path))):
                found.leave(
                    path, f"a folder in a folder of pictures, with {inside} pictures: kohya's scripts read none in it"
                )
        elif is_picture(path) and not path.exists():
            found.leave(path, "a link to nothing")
        elif is_picture(path):
            _read_picture(found, part, path, subset, listed, beside if conditions else None)
    found.parts.append(part)


def _read_picture(
    found: Understood,
    part: Part,
    path: Path,
    subset: Mapping[str, Any],
    listed: Mapping[str, str],
    beside: Mapping[str, Path] | None,
) -> None:
    if beside is not None and path.stem not in beside:
        found.leave(path, "it has no conditioning picture of its name")
        return
    try:
        captions = _captions(path, subset, listed)
    except ValueError as error:
        found.leave(path, str(error))
        return
    if not captions:
        found.leave(path, "it has no caption, and the folder has no words")
        return
    if not subset.get("enable_wildcard") and (more := _further_lines(path, subset)):
        found.leave(
            f"{more} lines beside {path}", "captions after the first line, which are read with enable_wildcard alone"
        )
    conditions = {} if beside is None else {"conditioning": beside[path.stem]}
    part.rows.append(Row(path, tuple(captions), conditions))


def _captions(path: Path, subset: Mapping[str, Any], listed: Mapping[str, str]) -> list[str]:
    own = subset.get("caption_extension")
    file = caption_file(path, (own,) if own else SUFFIXES)
    words = subset.get("class_tokens") or ""
    if path.stem in listed:
        lines = [listed[path.stem]]
    elif file is not None:
        lines = caption_lines(file)
    else:
        return [words] if words else []
    lines = [one for line in lines for one in _wildcards(line)] if subset.get("enable_wildcard") else lines[:1]
    before, after = subset.get("caption_prefix") or "", subset.get("caption_suffix") or ""
    return [" ".join(filter(None, (before, line, after))) for line in lines]


def _further_lines(path: Path, subset: Mapping[str, Any]) -> int:
    own = subset.get("caption_extension")
    file = caption_file(path, (own,) if own else SUFFIXES)
    return 0 if file is None else len(caption_lines(file)) - 1


def _wildcards(line: str) -> list[str]:
    """Writes out {a|b}: each choice is a caption. Raises ValueError where these are too many."""
    pieces = re.split(r"\{([^{}]*\|[^{}]*)\}", line)
    choices = [piece.split("|") if number % 2 else [piece] for number, piece in enumerate(pieces)]
    count = 1
    for one in choices:
        count *= len(one)
    if count > MOST_WILDCARDS:
        raise UserError(f"its wildcards make more than {MOST_WILDCARDS} captions")
    return ["".join(one) for one in itertools.product(*choices)]


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.iterdir()) if is_picture(path)} if folder.is_dir() else {}


def _listed(found: Understood, path: Path) -> dict[str, str]:
    """Reads kohya's metadata file: {stem of a picture: caption}, from JSON or JSONL."""
    if not path.is_file():
        found.leave(path, "there is no such metadata_file")
        return {}
    if path.suffix == ".jsonl":
        rows: Sequence[tuple[str, Any]] = [(str(row.get("image_path", "")), row) for row in text_rows(str(path))]
    else:
        tree = json.loads(read_text(path))
        rows = list(tree.items()) if isinstance(tree, dict) else []
    return {
        Path(name).stem: row["caption"]
        for name, row in rows
        if isinstance(row, dict) and isinstance(row.get("caption"), str)
    }
