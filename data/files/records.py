"""Small files that a program wrote and reads back: JSON, JSON lines and YAML, read in one way.

Whatever lies in the place of such a file, its reader gets what it asked for, or Damaged, which names the file, what is
wrong with it and what to do: a disk, a copy or a person can leave anything there, cut, of another kind or of no kind,
a pipe that would be waited for for ever, a number that is none, text that cannot be printed.

    status = read_json(run / "status.json", "Delete it", {"state": text, "time": moment}, missing={})

What a field must be is said by a function value -> whether it is that; `maybe` lets it be null or absent. Fields that
nobody asks for stay as they are, as other versions may have written them. A file that is missing is no damage.
"""

import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from controlbooth.data.errors import UserError
from controlbooth.data.files.whole import write_whole

Check = Callable[[Any], bool]
Fields = Mapping[str, Check]
DEEPEST = 100
"""Levels of lists and mappings in each other; ours have fewer than ten."""
_TOO_DEEP = f"it has more than {DEEPEST} levels"
MOST = 10_000_000
"""Values, which a manifest of a million subjects has."""
LARGEST = 2**63
LAST_MOMENT = 253_370_764_800.0
"""Seconds since 1970 at the beginning of the year 9999, the last one that dates can be made of."""


class Damaged(UserError):
    """A file that cannot be used; the message names it, what is wrong, and the remedy."""

    def __init__(self, where: Path | str, reason: str, remedy: str):
        super().__init__(f"{where} cannot be read ({reason})" + (f". {remedy}" if remedy else ""))
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how the error is pickled when one rank sends it to another: as a ValueError with its message, since
        the message alone is too little for the constructor."""
        return ValueError, self.args


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_whole(value: Any) -> bool:
    """Tells whether a value is an integer below 2**63, as a count, a step or a process id is, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def is_count(value: Any) -> bool:
    """Tells whether a value is an integer greater than 0."""
    return is_whole(value) and value > 0


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite number."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_figure(value: Any) -> bool:
    """Tells whether a value is a number, NaN and infinity included, as a measurement may give them."""
    return is_whole(value) or isinstance(value, float)


def are_points(value: Any) -> bool:
    """Tells whether a value maps names to figures, as in metrics.jsonl. What is not finite is written there as text,
    since JSON has no number for it."""
    return isinstance(value, dict) and all(is_figure(one) or one in _NOT_FINITE for one in value.values())


def is_moment(value: Any) -> bool:
    """Tells whether a value is a time in seconds since 1970 of which a date can be made."""
    return is_number(value) and 0 <= value < LAST_MOMENT


def is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def maybe(check: Check) -> Check:
    """Makes a check that accepts what `check` accepts, and null or an absent field too."""
    return lambda value: value is None or check(value)


def each(check: Check) -> Check:
    """Makes a check that accepts a list of values that `check` accepts."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def having(fields: Fields) -> Check:
    """Makes a check that accepts a mapping with these fields."""
    return lambda value: isinstance(value, dict) and all(check(value.get(name)) for name, check in fields.items())


_NONE: Fields = {}
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_told: set[Path] = set()
"""Notes of which this process has said that they cannot be used."""
_REFUSED = object()


def read_json(path: Path, remedy: str, fields: Fields = _NONE, missing: Any = _REFUSED) -> dict[str, Any]:
    """Reads a JSON object with these fields. missing: what to return where there is no such file.

    Raises Damaged, FileNotFoundError without `missing`, and OSError where the system does not let it be read.
    """
    try:
        content = read_text(path, remedy)
    except FileNotFoundError:
        if missing is _REFUSED:
            raise
        return missing
    return parse_json(content, str(path), remedy, fields)


def read_note(path: Path, remedy: str, fields: Fields = _NONE) -> dict[str, Any]:
    """Reads a JSON object that tells something and decides nothing: empty where there is none, and where it cannot be
    used, which is said once. remedy: what becomes of it, as "The next start writes it anew"."""
    try:
        return read_json(path, remedy, fields, missing={})
    except (Damaged, OSError) as error:
        if path not in _told:
            _told.add(path)
            print(f"warning: {error}", file=sys.stderr, flush=True)
        return {}


def write_json(path: Path, tree: Any) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    write_whole(path, json.dumps(tree).encode())


def read_json_list(path: Path, remedy: str, entry: Fields | Check = _NONE, missing: Any = _REFUSED) -> list[Any]:
    """Reads a JSON list, each entry of which has these fields, or passes the check; else as `read_json`."""
    try:
        content = read_text(path, remedy)
    except FileNotFoundError:
        if missing is _REFUSED:
            raise
        return missing
    return parse_json_list(content, str(path), remedy, entry)


def parse_json_list(content: str | bytes, where: str, remedy: str, entry: Fields | Check = _NONE) -> list[Any]:
    """Reads a JSON list out of text, each entry of which has these fields, or passes the check. Raises Damaged."""
    entries = _tree(content, where, remedy)
    if not isinstance(entries, list):
        raise Damaged(where, "it holds no list", remedy)
    for place, one in enumerate(entries, 1):
        if not callable(entry):
            check_fields(one, entry, f"{where}, entry {place},", remedy)
        elif not entry(one):
            raise Damaged(where, f"entry {place} is {one!r:.60}", remedy)
    return entries


def read_json_lines(path: Path, remedy: str, fields: Fields = _NONE) -> Iterator[dict[str, Any]]:
    """Reads a JSON object with these fields from each line; else as `read_json`."""
    for place, line in enumerate(read_text(path, remedy).splitlines(), 1):
        yield parse_json(line, f"{path}, line {place},", remedy, fields)


def parse_json(content: str | bytes, where: str, remedy: str, fields: Fields = _NONE) -> dict[str, Any]:
    """Reads a JSON object with these fields out of text. where: what the message calls it. Raises Damaged."""
    tree = _tree(content, where, remedy)
    check_fields(tree, fields, where, remedy)
    return tree


def read_yaml(path: Path, remedy: str) -> Any:
    """Reads a YAML file, whatever it holds. Raises as `read_json` does without `missing`."""
    return parse_yaml(read_text(path, remedy), str(path), remedy)


def parse_yaml(content: str, where: str, remedy: str) -> Any:
    """Reads YAML out of text. where: what the message calls it. Raises Damaged."""
    import yaml  # not needed by those who read JSON, some of which start often

    try:
        tree = yaml.safe_load(content)  # not libyaml, which is faster: deep nesting ends the process in it
        _look(tree)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # What is not YAML, and what PyYAML raises of dates, numbers and tags that are none.
        raise Damaged(where, _reason(error), remedy) from error
    return tree


def read_text(path: Path, remedy: str) -> str:
    """Reads a file of UTF-8. Raises Damaged for what is no file or no text, and OSError; it waits for no pipe."""
    with open_file(path, remedy) as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise Damaged(path, f"byte {error.start} is no text", remedy) from error


def open_file(path: Path, remedy: str) -> BinaryIO:
    """Opens a file for reading. Raises Damaged for what is no file, and OSError; it waits for no pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise Damaged(path, "it is no file", remedy)


def _tree(content: str | bytes, where: str, remedy: str) -> Any:
    try:
        text = content.decode() if isinstance(content, bytes) else content  # of bytes json would guess the encoding
        tree = json.loads(text, parse_float=_finite)
        # ASCII without escapes has no half of a surrogate pair, few brackets and characters make little of anything
        if "\\u" in text or text.count("{") + text.count("[") > DEEPEST or len(text) > MOST or not text.isascii():
            _look(tree)
        return tree
    except (ValueError, RecursionError) as error:
        raise Damaged(where, _reason(error), remedy) from error


def check_fields(tree: Any, fields: Fields, where: str, remedy: str) -> None:
    """Raises Damaged where it is no mapping, or one of the fields is not what it must be."""
    if not isinstance(tree, dict):
        raise Damaged(where, "it holds no mapping", remedy)
    for name, check in fields.items():
        value = tree.get(name)
        if not check(value):
            said = f"its {name!r} is {value!r:.60}" if name in tree else f"it has no {name!r}"
            raise Damaged(where, said, remedy)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise UserError(f"the number {digits:.20} is larger than any that is written")
    return value


def _look(tree: Any) -> None:
    """Raises ValueError for text that cannot be written, and for what lies deeper than DEEPEST or has more than MOST
    values, as YAML's references can make of a few lines."""
    known: dict[int, tuple[int, int]] = {}  # what was looked at -> its values, and its levels; 0 while it is looked at

    def look(one: Any) -> tuple[int, int]:
        if isinstance(one, str):
            one.encode()  # half of a surrogate pair, which JSON can say and UTF-8 cannot
        if not isinstance(one, (dict, list)):
            return 1, 0
        if id(one) not in known:
            known[id(one)] = 1, DEEPEST + 1  # for whoever finds it in itself
            inside = [look(inner) for inner in ([*one, *one.values()] if isinstance(one, dict) else one)]
            known[id(one)] = 1 + sum(count for count, _ in inside), 1 + max((levels for _, levels in inside), default=0)
        return known[id(one)]

    count, levels = look(tree)
    if levels > DEEPEST:
        raise UserError(_TOO_DEEP)
    if count > MOST:
        raise UserError(f"it has more than {MOST:,} values")


def _reason(error: BaseException) -> str:
    """Returns what an error says on one line of at most 200 characters."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if isinstance(error, UnicodeEncodeError):
        return "it holds text that cannot be written, as half of a surrogate pair"
    return " ".join(str(error).split())[:200] or type(error).__name__
