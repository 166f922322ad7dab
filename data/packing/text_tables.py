"""Tables that are text, CSV and JSONL: each row as it is meant, or a message with the line in which it is not.

A row that does not fit its header is never made to fit: it would lose cells, or give them to other columns.
"""

import csv
import functools
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from controlbooth.data.errors import UserError

TEXT_TABLES = (".csv", ".jsonl", ".ndjson", ".json")
"""All but the first have one JSON object a line, as `prompt.json` of fill50k does."""

csv.field_size_limit(2**31 - 1)  # other columns may be long; of captions `prompts` tells what is too long


@functools.lru_cache(maxsize=2)
def text_rows(path: str) -> list[dict[str, Any]]:
    """Reads the rows of a CSV or JSONL file. Raises ValueError with the line that cannot be read, or does not fit."""
    text = read_text(Path(path))
    try:
        return list(_csv_rows(text) if path.lower().endswith(".csv") else _json_rows(text))
    except ValueError as error:
        raise UserError(f"{path}, {error}") from error


def read_text(path: Path) -> str:
    """Reads a UTF-8 file without its byte order mark. Raises ValueError for a file in another encoding."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lists all columns, in the order in which they are met, as rows of JSONL need not have the same ones."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _csv_rows(text: str) -> Iterator[dict[str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    first_line = 1
    try:
        for cells in reader:
            if header is None and cells:
                header = cells
                if twice := [name for name, count in Counter(header).items() if name and count > 1]:
                    raise UserError(f"line {first_line} names the column {twice[0]!r} twice: rename or remove one")
            elif header is not None and cells:
                if len(cells) != len(header):
                    raise UserError(
                        f"line {first_line} has {len(cells)} cells, the header {len(header)}: put quotes around a cell "
                        "that holds commas, and leave none out"
                    )
                yield dict(zip(header, cells, strict=True))
            first_line = reader.line_num + 1
    except csv.Error as error:
        line = _open_quote(text, first_line)
        if line is None:
            raise UserError(f"line {reader.line_num} cannot be read: {error}") from error
        raise UserError(
            f"line {line}: the quote that opens there is not closed before line {reader.line_num} ({error}): close it, "
            "or write a quote that belongs to the text twice"
        ) from error


def _open_quote(text: str, first_line: int) -> int | None:
    """Finds the quote that spoils a row, which begins in first_line; returns the quote's line, None if there is none.

    It is the last one that opens before the row ends, or before a quote is closed and followed by something else.
    """
    opened, line, inside, fresh = None, first_line, False, True
    rest = "".join(text.splitlines(keepends=True)[first_line - 1 :])
    at = 0
    while at < len(rest):
        letter = rest[at]
        if inside and letter == '"' and rest[at + 1 : at + 2] == '"':
            at += 1
        elif inside and letter == '"':
            inside = False
            if rest[at + 1 : at + 2] not in (",", "\n", "\r", ""):
                return opened
        elif not inside and fresh and letter == '"':
            inside, opened = True, line
        fresh = not inside and letter in ",\r\n"
        line += letter == "\n"
        at += 1
    return opened if inside else None


def _json_rows(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} is not a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} is not a JSON object but {type(row).__name__}: write an object a line")
        yield row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(row := dict(pairs)) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UserError(f"it has {twice!r} twice")
    return row
