"""What can be packed: a folder of images and the embedded scenes; rows of tables and data sets are in tables.py.

A source knows how many samples it has and gives any range of them, so that shards can be written by many processes.
What can be told beforehand (captions and conditions that are missing, names that collide) is told when it is opened.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from controlbooth.data.condition_names import SCENE_KINDS
from controlbooth.data.conditions.functions import CONDITIONS
from controlbooth.data.errors import UserError
from controlbooth.data.packing.folders import IMAGE_SUFFIXES, files_below, is_picture, left_out, splits_among
from controlbooth.data.packing.text_tables import columns_of, read_text, text_rows
from controlbooth.data.pictures.images import encode_png
from controlbooth.data.scenes import render
from controlbooth.data.shards.captions import cell_captions
from controlbooth.data.shards.index import split_name

CAPTION_TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
_KNOWN = ", ".join(IMAGE_SUFFIXES)
SEGMENTATION_STEP = 31
"""Scene classes are stored this many gray levels apart, since levels 0 to 8 of 255 would look all black to a model."""


@dataclass(frozen=True)
class SourceSample:
    key: str
    origin: str
    """Where it comes from, for messages: a path, or a file and row."""
    image: bytes
    conditions: dict[str, bytes]
    captions: list[str]
    fault: tuple[str, str] | None = None
    """The part that cannot be used, as a column, and why not; then the others say nothing."""


class Source(Protocol):
    @property
    def count(self) -> int: ...

    @property
    def computed(self) -> tuple[str, ...]:
        """Lists the condition kinds that the source does not hold and that are computed from its images."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Lists what people should know of the source and would not see otherwise, such as files that are left out."""
        ...

    def describe(self) -> str:
        """Returns one line that names the source and its options; it is equal for equal arguments."""
        ...

    def identity(self, start: int, stop: int) -> str:
        """Hashes what samples start .. stop - 1 are made from: text by what it says, images by `file_identity`."""
        ...

    def read(self, start: int, stop: int) -> Iterator[SourceSample]: ...

    def read_rows(self, rows: Sequence[int]) -> Iterator[SourceSample]:
        """Yields the samples with these numbers, which ascend."""
        ...


@dataclass(frozen=True)
class FolderItem:
    key: str
    image: str
    conditions: tuple[tuple[str, str], ...]
    captions: tuple[str, ...] | None
    """None where one stands in a .txt beside the image."""


@dataclass(frozen=True)
class FolderSource:
    """Images matched by name with conditions/<kind>/ and captions. Items are sorted by key."""

    root: str
    items: tuple[FolderItem, ...] = field(repr=False)
    kinds: tuple[str, ...]
    computed: tuple[str, ...]
    caption_template: str | None
    notes: tuple[str, ...] = field(default=(), repr=False)

    @property
    def count(self) -> int:
        return len(self.items)

    def describe(self) -> str:
        conditions = f"conditions {self.kinds}, computed {self.computed}"
        return f"folder {self.root}, {conditions}, caption {self.caption_template!r}"

    def identity(self, start: int, stop: int) -> str:
        parts = []
        for item in self.items[start:stop]:
            paths = [item.image, *(path for _, path in item.conditions)]
            parts.append((item.key, _caption_identity(item), [file_identity(Path(path)) for path in paths]))
        return stable_hash(parts)

    def read(self, start: int, stop: int) -> Iterator[SourceSample]:
        return self.read_rows(range(start, stop))

    def read_rows(self, rows: Sequence[int]) -> Iterator[SourceSample]:
        for item in map(self.items.__getitem__, rows):
            try:
                captions = _captions(item)
            except ValueError as error:
                yield SourceSample(item.key, item.image, b"", {}, [], ("caption", str(error)))
                continue
            conditions = {kind: Path(path).read_bytes() for kind, path in item.conditions}
            yield SourceSample(item.key, item.image, Path(item.image).read_bytes(), conditions, captions)


def _captions(item: FolderItem) -> list[str]:
    """Returns the captions of an item. Raises ValueError where the file that holds them is not UTF-8."""
    if item.captions is not None:
        return list(item.captions)
    return [read_text(Path(item.image).with_suffix(".txt")).strip()]


def _caption_identity(item: FolderItem) -> str | list[str]:
    try:
        captions = _captions(item)
    except ValueError as error:
        return str(error)
    return captions[0] if len(captions) == 1 else captions


def open_folder(root: Path, kinds: Sequence[str], caption_template: str | None) -> FolderSource:
    """Opens root/images/ (or root itself), root/conditions/<kind>/, and .txt files or a caption table.

    kinds: the conditions wanted, from their folder or else computed; empty for all folders in conditions/.
    caption_template: may hold {folder} and {name}, underscores there read as spaces. Raises ValueError where captions
    or conditions are missing, and where names collide.
    """
    image_root = root / "images" if (root / "images").is_dir() else root
    condition_root = root / "conditions"
    stored = sorted(path.name for path in condition_root.iterdir() if path.is_dir()) if condition_root.is_dir() else []
    kinds = tuple(kinds) or tuple(stored)
    computed = computed_kinds(kinds, stored, f"there is no folder {condition_root}/")
    _refuse_listed_conditions(root, image_root, condition_root)
    files = list(files_below(image_root, skip=condition_root))
    _refuse_splits(image_root, files)
    images = _images_by_name(image_root, files)
    others = left_out(files)
    if not images:
        there = f", but {others}" if others else ""
        raise UserError(f"no images ({', '.join(IMAGE_SUFFIXES)}) below {image_root}{there}")
    conditions = {
        kind: _images_by_name(condition_root / kind, files_below(condition_root / kind))
        for kind in kinds
        if kind not in computed
    }
    for kind, there in conditions.items():
        remedy = f"put them in {condition_root / kind}/ under the image's name"
        refuse_missing(f"{kind} condition", [name for name in images if name not in there], len(images), remedy)
    captions, notes = _folder_captions(root, image_root, images, caption_template)
    if others:
        notes.insert(0, f"{image_root}: left out {others}: they are no pictures that can be read ({_KNOWN})")
    items = []
    for name, path in images.items():
        paths = tuple((kind, str(there[name])) for kind, there in conditions.items())
        items.append(FolderItem(_safe_key(name), str(path), paths, captions[name]))
    _refuse_collisions(items)
    return FolderSource(str(root), tuple(items), kinds, computed, caption_template, tuple(notes))


def _refuse_splits(image_root: Path, files: Sequence[Path]) -> None:
    """Raises ValueError where pictures lie in folders of the names of parts of a data set, as `train` and `test`."""
    inside = [path.relative_to(image_root).parts for path in files if is_picture(path)]
    if splits := splits_among(parts[0] for parts in inside if len(parts) > 1):
        raise UserError(
            f"{image_root} holds the splits {', '.join(splits)}, which would become one data set: name one, such as "
            f"{image_root / splits[-1]}, or give the folders other names if they belong together"
        )


def _images_by_name(root: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Returns {path below root without its suffix: path}, sorted. Raises ValueError for two images of one name."""
    found: dict[str, Path] = {}
    for path in sorted(filter(is_picture, files)):
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {path} have the same name: rename one, or remove it")
        found[name] = path
    return found


def _folder_captions(
    root: Path, image_root: Path, images: Mapping[str, Path], template: str | None
) -> tuple[dict[str, tuple[str, ...] | None], list[str]]:
    """Returns {image name: captions, or None where a .txt has one}, and what people should know of the table.

    Raises ValueError where images have no caption, and where there are several caption tables.
    """
    if template is not None:
        return {name: (_fill_template(template, path),) for name, path in images.items()}, []
    tables = _caption_tables(root, image_root)
    if len(tables) > 1:
        raise UserError(f"{', '.join(map(str, tables))} all hold captions: keep one of them")
    listed = _caption_table(tables[0]) if tables else {}
    roots = (image_root, root)
    names = {name: [path.relative_to(one).as_posix() for one in roots] for name, path in images.items()}
    captions = {name: listed.get(inner, listed.get(outer)) for name, (inner, outer) in names.items()}
    unlisted = [name for name in images if captions[name] is None]
    missing = [name for name in unlisted if not images[name].with_suffix(".txt").exists()]
    remedy = "put a .txt beside each image, a captions.csv with columns image,caption, or pass --caption"
    refuse_missing("caption", missing, len(images), f"{remedy} 'a photo of a {{folder}}'")
    if unused := sorted(listed.keys() - {place for both in names.values() for place in both}):
        note = f"{tables[0]}: {len(unused)} of its names are no pictures of this folder, as {unused[0]!r}; left out"
        return captions, [note]
    return captions, []


def _caption_tables(root: Path, image_root: Path) -> list[Path]:
    places = [folder / name for folder in dict.fromkeys((root, image_root)) for name in CAPTION_TABLES]
    return [path for path in places if path.exists()]


def _refuse_listed_conditions(root: Path, image_root: Path, condition_root: Path) -> None:
    """Raises ValueError where a table of captions names more pictures than its targets: conditions, as in the image
    folders of `datasets`, which would be left out without a word."""
    for table in _caption_tables(root, image_root):
        rows = text_rows(str(table))
        image, caption = _table_columns(rows)
        for column, value in (rows[0] if rows else {}).items():
            named = table.parent / value if isinstance(value, str) and value else None
            if (
                image in (None, column)
                or named is None
                or named.suffix.lower() not in IMAGE_SUFFIXES
                or not named.is_file()
            ):
                continue
            if not named.is_relative_to(condition_root):
                raise UserError(
                    f"{table} names a second picture of each sample in its column {column!r}, which would be left out. "
                    f"Pack the table, as a condition of the kind that it is: controlbooth data pack '{table}' "
                    f"--image-column {image} --caption-column {caption or 'COLUMN'} --condition KIND={column} "
                    "(without the last to leave it out)"
                )


def _fill_template(template: str, path: Path) -> str:
    try:
        return template.format(folder=path.parent.name.replace("_", " "), name=path.stem.replace("_", " "))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"--caption {template!r} may hold {{folder}} and {{name}} and no other braces") from error


def _caption_table(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads {file name: captions} from columns image or file_name, and caption or text.

    A picture may have several rows. Raises ValueError where columns are missing, and with the row whose cells are not a
    name and a caption, or several.
    """
    rows = text_rows(str(path))
    image, caption = _table_columns(rows)
    if image is None or caption is None:
        columns = ", ".join(columns_of(rows))
        raise UserError(f"{path} has columns {columns}; it needs image and caption (or file_name and text)")
    found: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(rows, 1):
        name, cell = row.get(image), row.get(caption)
        if name in (None, "") or cell in (None, "", []):
            continue  # a picture without a caption is told by its name
        if not isinstance(name, str):
            raise UserError(f"{path}, row {number}, column {image}: {name!r:.40} is no name of a picture")
        try:
            found[name] = found.get(name, ()) + tuple(cell_captions(cell))
        except ValueError as error:
            raise UserError(f"{path}, row {number}, column {caption}: the caption {error}") from error
    return found


def _table_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """Returns the names of the columns of images and of captions, each None where there is none."""
    columns = columns_of(rows)
    image = next((name for name in ("image", "file_name") if name in columns), None)
    return image, next((name for name in ("caption", "text") if name in columns), None)


@dataclass(frozen=True)
class SceneSource:
    """The embedded world, `count` scenes of a seed from `start` on."""

    count: int
    seed: int
    start: int
    size: int
    kinds: tuple[str, ...]
    computed: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        return f"scenes of seed {self.seed} from {self.start}, {self.size} px, {self.kinds}, computed {self.computed}"

    def identity(self, start: int, stop: int) -> str:
        return stable_hash([self.describe(), start, stop])

    def read(self, start: int, stop: int) -> Iterator[SourceSample]:
        return self.read_rows(range(start, stop))

    def read_rows(self, rows: Sequence[int]) -> Iterator[SourceSample]:
        for index in (self.start + row for row in rows):
            what = render.scene(self.seed, index)
            drawn = render.render(what, self.size)
            conditions = {kind: encode_png(getattr(drawn, kind)) for kind in self.kinds if kind != "segmentation"}
            if "segmentation" in self.kinds:
                conditions["segmentation"] = encode_png(drawn.segmentation * np.uint8(SEGMENTATION_STEP))
            key = f"scene-{self.seed}-{index:08d}"
            yield SourceSample(key, key, encode_png(drawn.image), conditions, [what.caption])


def open_scenes(count: int, seed: int, start: int, size: int, kinds: Sequence[str]) -> SceneSource:
    """Opens `count` scenes of a seed, from `start` on, as pictures with sides of `size` pixels.

    kinds: of SCENE_KINDS, exact, or of CONDITIONS, computed; empty for edges. Raises ValueError for other kinds, and
    for numbers out of range.
    """
    if count < 1 or start < 0 or size < 8:
        raise UserError(f"--scenes {count} must be 1 or more, --start {start} 0 or more, --size {size} 8 or more")
    kinds = tuple(kinds) or ("edges",)
    computed = computed_kinds(kinds, SCENE_KINDS, f"scenes have {', '.join(SCENE_KINDS)} but no")
    return SceneSource(count, seed, start, size, tuple(kind for kind in kinds if kind not in computed), computed)


def computed_kinds(kinds: Sequence[str], stored: Sequence[str], otherwise: str) -> tuple[str, ...]:
    """Returns the kinds that are not stored. Raises ValueError where one of them cannot be computed.

    Raises ValueError too for a kind that cannot be part of a file extension. otherwise: how the first message begins.
    """
    computed = tuple(kind for kind in kinds if kind not in stored)
    for kind in kinds:
        if not re.fullmatch(r"[a-z0-9_-]+", kind):
            raise UserError(f"condition {kind!r} becomes a file extension: use lower-case letters, digits, _ and -")
        if kind in computed and kind not in CONDITIONS:
            raise UserError(f"{otherwise} {kind}, and only {', '.join(CONDITIONS)} can be computed from the image")
    return computed


def _safe_key(name: str) -> str:
    """Makes a webdataset key of a path without suffix; dots of the base name, at which a key would end, become "_".

    Raises ValueError where webdataset cannot hold a sample of this name.
    """
    folder, slash, base = name.rpartition("/")
    key = f"{folder}{slash}{base.replace('.', '_')}"
    if split_name(f"{key}.jpg") != (key, "jpg"):
        raise UserError(f"webdataset cannot hold a sample named {name!r}: rename the file or its folder")
    return key


def _refuse_collisions(items: Sequence[FolderItem]) -> None:
    first: dict[str, FolderItem] = {}
    for item in items:
        if (other := first.setdefault(item.key, item)) is not item:
            raise UserError(f"{other.image} and {item.image} would both be the sample {item.key!r}: rename one")


def refuse_missing(what: str, missing: Sequence[str], count: int, remedy: str) -> None:
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"{len(missing)} of {count} samples have no {what}: {some}. To mend it, {remedy}.")


def file_identity(path: Path) -> tuple[str, int, int]:
    """Returns path, bytes, and time of the last change in ns, which tell a replaced image without reading it."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def stable_hash(value: object) -> str:
    """Hashes a tree of plain values, and other values by their `repr`: 128-bit blake2b, in hex."""
    return hashlib.blake2b(json.dumps(value, default=repr).encode(), digest_size=16).hexdigest()
