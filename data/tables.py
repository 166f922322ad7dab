"""Packing rows: CSV and JSONL tables, Parquet files, and the folders that Hugging Face `datasets` writes.

Arrow and Parquet are read with pyarrow alone, a few rows in memory at a time.
"""

import functools
import glob
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from controlbooth.data.sources import (
    SourceSample,
    computed_kinds,
    file_identity,
    refuse_missing,
    stable_hash,
    text_rows,
)


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

    @property
    def count(self) -> int:
        return sum(rows for _, rows in self.files)

    def describe(self) -> str:
        columns = f"image {self.image_column}, caption {self.caption_column}, conditions {self.condition_columns}"
        return f"rows of {len(self.files)} files from {min(self.files)[0]} on, {columns}, computed {self.computed}"

    def identity(self, start: int, stop: int) -> str:
        """By the rows' captions and the images that they name; images that a file holds itself go by the file."""
        return stable_hash([self.describe(), start, self._row_identities[start:stop]])

    @functools.cached_property
    def _row_identities(self) -> list[str]:
        """Of all rows in one pass, as a range of rows of a Parquet file is not read without those before it."""
        identities = []
        images = [self.image_column, *(column for _, column in self.condition_columns)]
        for path, _ in self.files:
            named = _text_columns(path, images)
            holder = file_identity(Path(path)) if len(named) < len(images) else None
            for row in _rows(path, list(dict.fromkeys([self.caption_column, *named])), 0, None):
                files = [file_identity(Path(path).parent / row[column]) for column in named]
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
        caption = row[self.caption_column]
        return SourceSample(
            key=f"{number:08d}",
            origin=origin,
            image=_cell_bytes(row[self.image_column], path, f"{origin}, column {self.image_column}"),
            conditions={
                kind: _cell_bytes(row[column], path, f"{origin}, column {column}")
                for kind, column in self.condition_columns
            },
            captions=list(caption) if isinstance(caption, list) else [caption],
        )


def open_rows(
    location: Path, kinds: Mapping[str, str | None], image_column: str = "image", caption_column: str = "caption"
) -> RowSource:
    """A .csv, .jsonl or .parquet file, a glob of Parquet files, or a folder that `datasets` wrote.

    kinds: {condition kind: its column}; None stands for the column of that name, or else computes the condition.
    """
    paths = _row_files(location)
    columns = _columns(str(paths[0]))
    stored = {kind: column or kind for kind, column in kinds.items() if column or kind in columns}
    remedy = "name it with --image-column, --caption-column or --condition KIND=COLUMN"
    for column in (image_column, caption_column, *stored.values()):
        if column not in columns:
            raise ValueError(f"{location} has no column {column!r} but {', '.join(columns)}: {remedy}")
    counts = []
    missing: dict[str, list[str]] = {column: [] for column in (image_column, caption_column, *stored.values())}
    for path in map(str, paths):
        counts.append(0)
        checked = [caption_column, *_text_columns(path, list(missing))]
        for row in _rows(path, list(dict.fromkeys(checked)), 0, None):
            counts[-1] += 1
            for column, value in row.items():
                there = value not in (None, "", [])
                if there and column != caption_column:
                    there = (Path(path).parent / value).exists()
                if not there:
                    missing[column].append(f"row {counts[-1]} of {path}" + (f" ({value})" if value else ""))
    for column, rows in missing.items():
        remedy = "fill the cells; paths are relative to the table"
        refuse_missing(f"{column} (empty cell, or no such file)", rows, sum(counts), remedy)
    if not sum(counts):
        raise ValueError(f"{location} has no rows")
    computed = computed_kinds(tuple(kinds), list(stored), f"{location} has no column")
    files = tuple(zip(map(str, paths), counts, strict=True))
    return RowSource(files, image_column, caption_column, tuple(stored.items()), computed)


def is_rows(location: Path) -> bool:
    """Whether `open_rows` is the way to read a path, rather than `open_folder`."""
    if location.suffix in (".csv", ".jsonl", ".parquet"):
        return True
    names = ("state.json", "dataset_dict.json", "*.arrow", "*.parquet", "data/*.parquet")
    return location.is_dir() and any(any(location.glob(name)) for name in names)


def _row_files(location: Path) -> list[Path]:
    if location.is_file():
        return [location]
    if not location.is_dir():
        if found := sorted(glob.glob(str(location))):
            return [Path(path) for path in found]
        raise FileNotFoundError(f"there is no {location}")
    if (location / "dataset_dict.json").exists():
        splits = json.loads((location / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{location} holds the splits {', '.join(splits)}: name one, such as {location / splits[0]}")
    if (location / "state.json").exists():
        state = json.loads((location / "state.json").read_text())
        return [location / file["filename"] for file in state["_data_files"]]
    found = sorted(location.rglob("*.arrow")) or sorted(location.rglob("*.parquet"))
    splits = sorted({match.group(1) for path in found if (match := re.match(r"(.+)-\d+-of-\d+\.", path.name))})
    if len(splits) > 1:
        example = found[0].parent / f"{splits[0]}-*{found[0].suffix}"
        raise ValueError(f"{location} holds the splits {', '.join(splits)}: name one, such as '{example}'")
    return found


def _columns(path: str) -> list[str]:
    if path.endswith(".parquet"):
        return pq.read_schema(path).names
    if path.endswith(".arrow"):
        return _arrow_table(path).schema.names
    rows = text_rows(path)
    return list(rows[0]) if rows else []


def _text_columns(path: str, columns: list[str]) -> list[str]:
    """Those of the columns that hold text, such as paths."""
    if path.endswith((".csv", ".jsonl")):
        return columns
    schema = pq.read_schema(path) if path.endswith(".parquet") else _arrow_table(path).schema
    return [name for name in columns if pa.types.is_string(schema.field(name).type)]


def _rows(path: str, columns: list[str], start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
    """Rows start .. stop of a file, a few in memory at a time; stop None for all."""
    if path.endswith(".parquet"):
        yield from _parquet_rows(path, columns, start, stop)
    elif path.endswith(".arrow"):
        table = _arrow_table(path).select(columns)
        stop = len(table) if stop is None else stop
        for low in range(start, stop, 64):
            yield from table.slice(low, min(64, stop - low)).to_pylist()
    else:
        for row in text_rows(path)[start:stop]:
            yield {column: row.get(column) for column in columns}


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
                        yield from batch.slice(skipped, min(high, len(batch)) - skipped).to_pylist()
                    low, high = low - len(batch), high - len(batch)
            before += rows


@functools.lru_cache(maxsize=4)
def _arrow_table(path: str) -> pa.Table:
    """Memory-mapped; `datasets` writes the stream format, other tools the file format."""
    with open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
    source = pa.memory_map(path)
    return (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()


def _cell_bytes(cell: Any, table: str, origin: str) -> bytes:
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str):
        return (Path(table).parent / cell).read_bytes()
    raise ValueError(f"{origin} is {type(cell).__name__}, not an image: a path, bytes, or a struct of bytes and path")
