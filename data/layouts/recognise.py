"""Which layout a path has, and what is in it; and what is written for the packer and for runs of subjects."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from controlbooth.data.errors import MissingFile, UserError
from controlbooth.data.files.whole import write_whole
from controlbooth.data.layouts.kohya import is_kohya, read_folders, read_toml
from controlbooth.data.layouts.rows import Part, Understood
from controlbooth.data.layouts.simpletuner import read_backends
from controlbooth.data.layouts.tables import metadata_table, read_metadata, read_pictures, read_rows
from controlbooth.data.packing.tables import is_rows

PROMPT = "a {identifier} {class_noun}"


def understand(source: Path, words: str = "") -> Understood:
    """Reads a file or folder by the layout that it has. words: the caption of pictures without one.

    Raises ValueError and FileNotFoundError where there is none that is known.
    """
    if not source.exists():
        raise MissingFile(f"there is no {source}")
    suffix = source.suffix.lower()
    if source.is_file() and suffix in (".toml", ".json"):
        return read_toml(source) if suffix == ".toml" else read_backends(source)
    if source.is_file() and suffix in (".jsonl", ".csv"):
        return read_metadata(source)
    if is_kohya(source):
        return read_folders(source)
    if (table := metadata_table(source) if source.is_dir() else None) is not None:
        return read_metadata(table)
    if is_rows(source) and not any(source.glob("*.tar")):  # beside img2dataset's tars are tables of what they hold
        return read_rows(source)
    if not source.is_dir():
        raise UserError(f"{source} is a file of no layout that is known: TOML, JSON, JSONL, CSV, Parquet or a folder")
    if any(source.glob("*.tar")):
        return Understood("tars of img2dataset or webdataset", [Part(source.name, table=source)])
    return read_pictures(source, words)


def folder_names(parts: Sequence[Part]) -> list[str]:
    """Gives each part the name of a folder of its own, as text that every disk and command line takes."""
    names: list[str] = []
    for part in parts:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", part.name).strip("-._") or "part"
        base, number = name, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def write_table(part: Part, path: Path) -> None:
    """Writes the rows of a part as a table that `data pack` reads, with absolute paths."""
    lines = []
    for row in part.rows:
        cells: dict[str, Any] = {"image": str(row.image.absolute()), "caption": list(row.captions)}
        lines.append(json.dumps(cells | {kind: str(one.absolute()) for kind, one in row.conditions.items()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, ("\n".join(lines) + "\n").encode())


def subjects_of(found: Understood, class_noun: str | None) -> tuple[list[dict[str, str]], list[str]]:
    """Makes rows of subjects.yaml, and says what was lost. Raises ValueError where a class noun is missing.

    Of folders such as `10_sks dog` the first word is the identifier and the rest the class noun. Where `class_noun`
    says the class, an identifier before that very word stays what it is.
    """
    rows, lost = [], []
    parts = [part for part in found.parts if not part.is_class and part.rows]
    for part, name in zip(parts, folder_names(parts), strict=True):
        folders = {row.image.parent for row in part.rows}
        if len(folders) > 1:
            raise UserError(
                f"the pictures of {part.name} are in {len(folders)} folders: a subject's are in one, name one"
            )
        first, _, rest = part.words.partition(" ")
        if class_noun is not None:
            first, rest = first if rest.strip() == class_noun else "", class_noun
        if not rest.strip():
            raise UserError(f"{part.name} says of no class what it is: give --class NOUN, such as dog")
        row = {"name": re.sub(r"^\d+-", "", name.replace("_", "-")) or name, "images": str(folders.pop().absolute())}
        rows.append(row | {"class_noun": rest.strip()} | ({"identifier": first} if first else {}))
        if part.repeat > 1:
            lost.append(
                f"{part.name}: its {part.repeat} repeats; steps of a subject say how often its pictures are seen"
            )
        if any(row.captions != (part.words,) for row in part.rows):
            lost.append(f"{part.name}: captions; the prompt of a subject is instance_prompt")
    lost += [f"{part.name}: class pictures; the base draws its own" for part in found.parts if part.is_class]
    if not rows:
        raise UserError("no pictures of a subject were found")
    return rows, lost


def subjects_text(rows: Sequence[dict[str, str]]) -> str:
    return yaml.safe_dump(list(rows), sort_keys=False, allow_unicode=True, width=10**6)
