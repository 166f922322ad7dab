"""Packing rows: CSV and JSONL tables, Parquet files, and the folders that Hugging Face `datasets` writes.

Arrow and Parquet are read with pyarrow alone, a few rows in memory at a time.
"""

import contextlib
import errno
import functools
import glob
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from controlbooth.data.errors import MissingFile, UserError
from controlbooth.data.packing.folders import files_below, splits_of_paths
from controlbooth.data.packing.sources import SourceSample, computed_kinds, file_identity, refuse_missing, stable_hash
from controlbooth.data.packing.text_tables import TEXT_TABLES, columns_of, text_rows
from controlbooth.data.shards.captions import cell_captions

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of a path that names no file, whatever text it may be."""


@dataclass(frozen=True)
class RowSource:
    """Rows of files. An image cell is a path, bytes, or a struct of both, as Hugging Face stores images."""

    files: tuple[tuple[str, int], ...]
    """(path, rows)"""
    image_column: str
    caption_column: str
    condition_columns: tuple[tuple[str, str], ...]
    """(kind, column)"""
    computed: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return sum(rows for _, rows in self.files)

    def describe(self) -> str:
        columns = f"image {self.image_column}, caption {self.caption_column}, conditions {self.condition_columns}"
        return f"rows of {len(self.files)} files from {min(self.files)[0]} on, {columns}, computed {self.computed}"

    def identity(self, start: int, stop: int) -> str:
        """Hashes the rows' captions and the identities of the images that they name.

        For images that a table holds itself, the identity of the table is taken.
        """
        return stable_hash([self.describe(), start, self._row_identities[start:stop]])

    @functools.cached_property
    def _row_identities(self) -> list[str]:
        """Hashes all rows in one pass, as a range of rows of a Parquet file is not read without those before it."""
        identities = []
        images = [self.image_column, *(column for _, column in self.condition_columns)]
        for path, _ in self.files:
            named = _naming_columns(path, images)
            holder = file_identity(Path(path)) if len(_text_columns(path, images)) < len(images) else None
            for row in _rows(path, list(dict.fromkeys([self.caption_column, *named])), 0, None):
                files = [_named_identity(path, row[column]) for column in named]
                identities.append(stable_hash([row[self.caption_column], files, holder]))
        return identities

    def read(self, start: int, stop: int) -> Iterator[SourceSample]:
        return self.read_rows(range(start, stop))

    def read_rows(self, rows: Sequence[int]) -> Iterator[SourceSample]:
        before = 0
        columns = [self.image_column, self.caption_column, *(column for _, column in self.condition_columns)]
        for path, count in self.files:
            own = rows[bisect_left(rows, before) : bisect_left(rows, before + count)]
            wanted = {row - before for row in own}
            low, high = (own[0] - before, own[-1] + 1 - before) if own else (0, 0)
            for i, row in enumerate(_rows(path, columns, low, high) if own else (), low):
                if i in wanted:
                    yield self._sample(row, before + i, path, i)
            before += count

    def _sample(self, row: Mapping[str, Any], number: int, path: str, i: int) -> SourceSample:
        origin = f"{path}, row {i + 1}"
        key, column = f"{number:08d}", self.caption_column
        try:
            captions = cell_captions(row[column])
            images = {}
            for column in dict.fromkeys([self.image_column, *(own for _, own in self.condition_columns)]):
                images[column] = _cell_bytes(row[column], path)
        except ValueError as error:
            return SourceSample(key, origin, b"", {}, [], (column, str(error)))
        conditions = {kind: images[own] for kind, own in self.condition_columns}
        return SourceSample(key, origin, images[self.image_column], conditions, captions)


def open_rows(
    location: Path,
    kinds: Mapping[str, str | None],
    image_column: str = "image",
    caption_column: str = "caption",
    skip_bad: bool = False,
) -> RowSource:
    """Opens a .csv, .jsonl or .parquet file, a glob of Parquet files, or a folder that `datasets` wrote.

    kinds: {condition kind: its column}; None stands for the column of that name, or else computes the condition. Raises
    ValueError for missing columns, and for rows whose cells cannot be packed; skip_bad leaves such rows to be found,
    and left out, one by one.
    """
    paths = _row_files(location)
    columns = _columns(str(paths[0]))
    stored = {kind: column or kind for kind, column in kinds.items() if column or kind in columns}
    remedy = "name it with --image-column, --caption-column or --condition KIND=COLUMN"
    for column in (image_column, caption_column, *stored.values()):
        if column not in columns:
            raise UserError(f"{location} has no column {column!r} but {', '.join(columns)}: {remedy}")
    counts: list[int] = []
    faults: dict[str, list[str]] = {column: [] for column in (image_column, caption_column, *stored.values())}
    for path in map(str, paths):
        counts.append(0)
        images = [column for column in faults if column != caption_column]
        for row in _rows(path, list(dict.fromkeys([caption_column, *_naming_columns(path, images)])), 0, None):
            counts[-1] += 1
            for column, value in row.items():
                if (fault := _cell_fault(path, value, column == caption_column)) is not None:
                    faults[column].append(f"row {counts[-1]} of {path}" + fault)
    if not skip_bad:
        _refuse_cells(faults, caption_column, sum(counts))
    if not sum(counts):
        raise UserError(f"{location} has no rows")
    computed = computed_kinds(tuple(kinds), list(stored), f"{location} has no column")
    files = tuple(zip(map(str, paths), counts, strict=True))
    return RowSource(files, image_column, caption_column, tuple(stored.items()), computed)


def _refuse_cells(faults: Mapping[str, Sequence[str]], caption_column: str, count: int) -> None:
    for column, rows in faults.items():
        what = "no text" if column == caption_column else "no such file"
        remedy = "fill the cells, or leave these rows out with --skip-bad"
        if column != caption_column:
            remedy += "; paths are relative to the table"
        refuse_missing(f"{column} (empty cell, or {what})", rows, count, remedy)


def _cell_fault(path: str, value: Any, is_caption: bool) -> str | None:
    """Says what is wrong with a cell: " (...)", or "" for an empty one; returns None where nothing is.

    Pictures that are there are not looked at.
    """
    if value in (None, "", []):
        return ""
    try:
        if is_caption:
            cell_captions(value)
        elif isinstance(named := _image_cell(value), str) and not _is_file(Path(path).parent / named):
            return f" ({named:.200})"
    except ValueError as error:
        return f" ({error})"
    return None


def is_rows(location: Path) -> bool:
    """Tells whether `open_rows` is the way to read a path, rather than `open_folder`."""
    if location.suffix.lower() in (*TEXT_TABLES, ".parquet") and not location.is_dir():
        return True
    names = ("state.json", "dataset_dict.json", "*.arrow", "*.parquet", "data/*.parquet")
    return location.is_dir() and any(any(location.glob(name)) for name in names)


def _row_files(location: Path) -> list[Path]:
    if location.is_file():
        if location.suffix.lower() not in (*TEXT_TABLES, ".parquet", ".arrow"):
            known = ", ".join((*TEXT_TABLES, ".parquet", ".arrow"))
            raise UserError(f"{location} is no table that can be read, by its name: {known}. Save it as one of them")
        return [location]
    if not location.is_dir():
        if found := sorted(glob.glob(str(location))):
            return [Path(path) for path in found]
        raise MissingFile(f"there is no {location}")
    if (location / "dataset_dict.json").exists():
        splits = json.loads((location / "dataset_dict.json").read_text())["splits"]
        raise UserError(f"{location} holds the splits {', '.join(splits)}: name one, such as {location / splits[0]}")
    if (location / "state.json").exists():
        state = json.loads((location / "state.json").read_text())
        return [location / file["filename"] for file in state["_data_files"]]
    found = [path for path in files_below(location) if path.suffix in (".arrow", ".parquet")]
    if len(suffixes := {path.suffix for path in found}) > 1:
        raise UserError(f"{location} holds files of both {' and '.join(sorted(suffixes))}: name those that are meant")
    if splits := splits_of_paths(path.relative_to(location) for path in found):
        example = next(iter(sorted(splits.values())))
        named = ", ".join(sorted(splits))
        raise UserError(f"{location} holds the splits {named}: name one, such as '{location / example}'")
    return sorted(found)


def _columns(path: str) -> list[str]:
    return columns_of(text_rows(path)) if _is_text(path) else _schema(path).names


def _is_text(path: str) -> bool:
    return path.lower().endswith(TEXT_TABLES)


def _schema(path: str) -> pa.Schema:
    with _named(path):
        return _arrow_table(path).schema if path.endswith(".arrow") else pq.read_schema(path)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Makes of an error of Arrow, which names no file, a ValueError that does. A lack of memory stays one."""
    try:
        yield
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged, or no file of Arrow or Parquet ({first}): write it again") from error


def _text_columns(path: str, columns: Sequence[str]) -> list[str]:
    """Returns those of the columns that hold text, such as paths, in any of Arrow's types for it."""
    if _is_text(path):
        return list(columns)
    schema = _schema(path)
    return [name for name in columns if _is_text_type(schema.field(name).type)]


def _is_text_type(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _naming_columns(path: str, columns: Sequence[str]) -> list[str]:
    """Returns those of the columns of pictures that may name files, or hold nothing: all but those full of bytes."""
    named = set(_text_columns(path, columns))
    return [column for column in columns if column in named or not _is_full(path, column)]


def _is_full(path: str, column: str) -> bool:
    """Tells whether every cell of a column of bytes, or of structs with bytes, holds them, as its statistics tell.

    Returns False where there are no statistics. Raises ValueError for a column that is neither bytes nor structs.
    """
    kind, name = _schema(path).field(column).type, column
    if pa.types.is_struct(kind):
        name = f"{column}.bytes"
        if "bytes" not in {kind.field(number).name for number in range(kind.num_fields)}:
            return False
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        raise UserError(
            f"{path}, column {column} is {kind}, which is no image: it takes paths, bytes, or structs of bytes and path"
        )
    if path.endswith(".arrow"):
        cells = _arrow_table(path).column(column)
        inside = (chunk.field("bytes").null_count for chunk in cells.chunks) if name != column else ()
        return not (cells.null_count or any(inside))
    with _named(path), pq.ParquetFile(path) as file:
        metadata = file.metadata
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            leaves = [group.column(number) for number in range(group.num_columns)]
            statistics = next(leaf.statistics for leaf in leaves if leaf.path_in_schema == name)
            if statistics is None or not statistics.has_null_count or statistics.null_count:
                return False
    return True


def _rows(path: str, columns: list[str], start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
    """Yields rows start .. stop - 1 of a file, to its end where stop is None.

    A few are in memory at a time, but all of a CSV or JSONL table.
    """
    if path.endswith(".arrow"):
        with _named(path):
            yield from _arrow_rows(path, columns, start, stop)
    elif not _is_text(path):
        with _named(path):
            yield from _parquet_rows(path, columns, start, stop)
    else:
        for row in text_rows(path)[start:stop]:
            yield {column: row.get(column) for column in columns}


def _arrow_rows(path: str, columns: list[str], start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
    table = _arrow_table(path).select(columns)
    stop = len(table) if stop is None else stop
    for low in range(start, stop, 64):
        yield from _values(table.slice(low, min(64, stop - low)))


def _values(rows: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Converts rows to Python values, after checking what Arrow takes on trust.

    That is that text is UTF-8, and that all offsets lie inside the file; Arrow raises an error where they do not.
    """
    rows.validate(full=True)
    return rows.to_pylist()


def _parquet_rows(path: str, columns: list[str], start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
    with pq.ParquetFile(path) as file:
        before = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(start - before, 0), rows if stop is None else min(stop - before, rows)
            if low < high:
                for batch in file.iter_batches(64, row_groups=[group], columns=columns):
                    if low < len(batch) and high > 0:
                        skipped = max(low, 0)
                        yield from _values(batch.slice(skipped, min(high, len(batch)) - skipped))
                    low, high = low - len(batch), high - len(batch)
            before += rows


@functools.lru_cache(maxsize=4)
def _arrow_table(path: str) -> pa.Table:
    """Opens a memory-mapped Arrow file; `datasets` writes the stream format, other tools the file format."""
    with open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
    source = pa.memory_map(path)
    return (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()


def _image_cell(cell: Any) -> bytes | str:
    """Returns the bytes of a picture, or the path that a cell names. Raises ValueError where it holds neither."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, (bytes, str)) and cell:
        return cell
    held = "the cell is empty" if cell in (None, "", b"") else f"{cell!r:.40} is no image"
    raise UserError(f"{held}: it takes a path, bytes, or a struct of bytes and path")


def _cell_bytes(cell: Any, table: str) -> bytes:
    """Returns the bytes of a cell's picture, which it holds itself or in a file, named relative to the table.

    Raises ValueError where the cell names no file, and OSError where that cannot be read.
    """
    named = _image_cell(cell)
    if isinstance(named, bytes):
        return named
    try:
        return (Path(table).parent / named).read_bytes()
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise UserError(f"there is no file {named:.200}") from error


def _named_identity(table: str, cell: Any) -> tuple[str, int, int] | None:
    """Returns the `file_identity` of the file that a cell names; None where it names none, or one that is not there."""
    try:
        named = _image_cell(cell)
    except ValueError:
        return None
    is_named = isinstance(named, str) and _is_file(Path(table).parent / named)
    return file_identity(Path(table).parent / str(named)) if is_named else None


def _is_file(path: Path) -> bool:
    """Tells whether there is a file at a path, which may be any text. Raises OSError where that cannot be told."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return False


def column_names(location: Path) -> list[str]:
    """Lists the columns of what `open_rows` opens. Raises as it does."""
    return _columns(str(_row_files(location)[0]))
