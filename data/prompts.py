"""The prompt of a sample: which of its captions, or the empty one."""

import json

from controlbooth.data.decode import BadSample


def read_captions(data: bytes, extension: str, key: str) -> list[str]:
    """The captions of a .txt or .json part, at least one. An empty text is a caption: it trains the empty prompt.

    .txt is one UTF-8 caption; .json is a string, {"caption": "..."} or {"captions": ["...", ...]}. Anything else is a
    BadSample.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text) if extension == "json" else text.strip()
    except ValueError as error:
        raise BadSample(key, extension, f"the caption cannot be read: {error}") from error
    if isinstance(value, dict):
        value = value.get("captions", value.get("caption"))
    given = value if isinstance(value, list) else [value]
    captions = [caption for caption in given if isinstance(caption, str)]
    if not captions or len(captions) < len(given):
        expected = 'a string, {"caption": "..."} or {"captions": ["...", ...]}'
        raise BadSample(key, extension, f"the caption is not {expected}")
    return captions


def prompt(captions: list[str], choice: int, dropped: bool) -> str:
    """The text to train on: captions[choice], or "" where the prompt is dropped."""
    return "" if dropped else captions[choice]
