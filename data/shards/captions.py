"""The captions of a sample, as shards, tables and files hold them, and the prompt that is made of them."""

import json
from typing import Any

from controlbooth.data.errors import UserError
from controlbooth.data.pictures.images import BadSample

MAX_CHARACTERS = 100_000
"""Of a caption. Encoders read some hundred, and a tokenizer takes half a second for so many and minutes for more."""


def read_captions(data: bytes, extension: str, key: str) -> list[str]:
    """Reads the captions of a .txt or .json part, at least one. An empty text is a caption: it trains the empty prompt.

    .txt is one UTF-8 caption; .json is a string, {"caption": "..."} or {"captions": ["...", ...]}. Raises BadSample for
    anything else, and for a text in which `text_fault` finds something.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text) if extension == "json" else text.strip()
    except (ValueError, RecursionError) as error:
        raise BadSample(key, extension, f"the caption cannot be read: {error}") from error
    if isinstance(value, dict):
        value = value.get("captions", value.get("caption"))
    given = value if isinstance(value, list) else [value]
    captions = [caption for caption in given if isinstance(caption, str)]
    if not captions or len(captions) < len(given):
        expected = 'a string, {"caption": "..."} or {"captions": ["...", ...]}'
        raise BadSample(key, extension, f"the caption is not {expected}")
    for caption in captions:
        if (fault := text_fault(caption)) is not None:
            raise BadSample(key, extension, f"the caption {fault}")
    return captions


def text_fault(text: str) -> str | None:
    """Says why a text cannot be a caption, in words that follow "the caption"; returns None where it can."""
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text)} characters, and the limit is {MAX_CHARACTERS}"
    if "\0" in text:
        return f"holds a NUL at character {text.index(chr(0)) + 1}: it was damaged, or is no text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        return f"holds half of a surrogate pair, {half}, at character {error.start + 1}: it is no Unicode text"
    return None


def cell_captions(cell: Any) -> list[str]:
    """Returns the captions of a table's cell, which is a text or a list of texts. Raises ValueError for anything else.

    Numbers are no captions, as an empty cell of a table often is the number NaN, and a column of them was not meant.
    """
    given = cell if isinstance(cell, list) else [cell]
    if not given:
        raise UserError("is an empty list: give a text, or a list of texts")
    for number, text in enumerate(given, 1):
        if not isinstance(text, str):
            which = f"{text!r:.40}, number {number} of {len(given)}," if isinstance(cell, list) else f"{text!r:.40}"
            raise UserError(f"{which} is {_kind(text)} and no text: write a text, or a list of texts")
        if (fault := text_fault(text)) is not None:
            raise UserError(fault)
    return given


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return "a truth value" if isinstance(value, bool) else "a number"
    return {dict: "an object", list: "a list", bytes: "bytes"}.get(type(value), type(value).__name__)


def prompt(captions: list[str], choice: int, dropped: bool) -> str:
    """Returns the text to train on: captions[choice], or "" where the prompt is dropped."""
    return "" if dropped else captions[choice]
