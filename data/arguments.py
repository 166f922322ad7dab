"""What people write on command lines: numbers with bounds, and ranges of names. Imports nothing heavy.

The types are for argparse, which puts the option before their message: `argument --steps: 0 is less than 1`.
"""

import argparse
import math
import re
import shlex
import unicodedata
from collections.abc import Callable
from pathlib import Path

import braceexpand

from controlbooth.data.condition_names import MAX_PIXELS
from controlbooth.data.errors import UserError

MOST_NAMES = 1_000_000
"""That a range may stand for. A longer one is a slip of the keyboard, and would fill the memory with names."""
SEEDS = 2**63
"""Seeds are smaller: torch's and numpy's generators take 64 bits with a sign."""
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def verb_parser(verb: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Makes the parser of `controlbooth VERB`. epilog: its examples, shown as they are written."""
    return argparse.ArgumentParser(
        prog=f"controlbooth {verb}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def quoted(word: object) -> str:
    """Quotes a word of a command that is printed for people to copy, so that their shell takes it as it is."""
    return shlex.quote(str(word))


def visible(text: object) -> str:
    """Returns text of a data set, such as a caption or a key, with control characters and lone surrogates written as
    escapes, so that it cannot steer the terminal."""
    return "".join(ascii(one)[1:-1] if unicodedata.category(one) in ("Cc", "Cs") else one for one in str(text))


def whole_number(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """Makes a type for argparse that accepts integers from `least` to `most`, or from `least` on where that is None."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        _check_within(text, value, least, most)
        return value

    return parse


def finite_number(
    least: float | None = None, most: float | None = None, above: float | None = None
) -> Callable[[str], float]:
    """Makes a type for argparse that accepts finite numbers from `least` to `most`, both included, and greater than
    `above`; None sets no such limit."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not more than {above:g}")
        _check_within(text, value, least, most)
        return value

    return parse


def _check_within(text: str, value: float, least: float | None, most: float | None) -> None:
    if least is not None and value < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most}")


seed_number = whole_number(0, SEEDS - 1)
"""A type for argparse."""


def folder_to_write(text: str) -> Path:
    """Returns the path of a folder to write into, which exists or can be made. A type for argparse: raises
    ArgumentTypeError where a file is in the way."""
    path = Path(text)
    above = next((one for one in (path, *path.absolute().parents) if one.exists()), path)
    if above.exists() and not above.is_dir():
        raise argparse.ArgumentTypeError(f"{above} is a file, and a folder is wanted: give another name")
    return path


def file_to_write(text: str) -> Path:
    """Returns the path of a file to write, in a folder that exists. A type for argparse: raises ArgumentTypeError for a
    folder, and where the parent folder is missing."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, and a file is wanted: give {path / 'NAME'}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}: make it, or give another name")
    return path


def expand_braces(text: str) -> list[str]:
    """Returns the names that a text such as x-{000..009} or x-{a,b} stands for. Raises ValueError where its braces do
    not match, and where its ranges make more than MOST_NAMES names, before they are made."""
    count = 1
    for first, last, step in _RANGE.findall(text):
        count *= abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1
    if count > MOST_NAMES:
        raise UserError(f"{text!r} stands for {count:,} names, and may for {MOST_NAMES:,}: correct its range")
    try:
        return list(braceexpand.braceexpand(text))
    except ValueError as error:
        raise UserError(f"the braces of {text!r} do not match; write shards-{{000..009}}.tar") from error


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Gives a verb the limit that a run has as data.max_pixels."""
    parser.add_argument(
        "--max-pixels",
        type=whole_number(),
        default=MAX_PIXELS,
        help=f"pictures with more are not decoded, as data.max_pixels of a run (default: {MAX_PIXELS})",
    )


def add_run_numbers(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which order of samples is meant: that of a run, or that of numbers given here."""
    parser.add_argument("--run", type=Path, help="the folder of a run, whose numbers are taken")
    instead = parser.add_argument_group("without a run")
    instead.add_argument("--global-batch-size", type=whole_number())
    instead.add_argument("--condition", help="kind that the run trains on (default: none, as for DreamBooth)")
    instead.add_argument("--lanes", type=whole_number(), help="(default: the global batch size)")
    instead.add_argument("--shards-per-block", type=whole_number(), default=2, help="(default: 2)")
    instead.add_argument("--seed", type=seed_number, default=0, help="(default: 0)")
    instead.add_argument("--prompt-dropout", type=finite_number(0, 1), default=0.0, help="(default: 0)")
    instead.add_argument("--random-flip", action="store_true")
