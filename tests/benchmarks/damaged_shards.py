"""Prints, for each way in which a shard can be damaged, what plain webdataset delivers of it, and what we do.

    .venv/bin/python tests/benchmarks/damaged_shards.py

Every shard has about 20 samples of picture, condition and caption, the 11th of which is hurt. webdataset reads it as
its documentation shows, decoding included, with its default handler, which raises, and with warn_and_continue.
"""

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import webdataset

sys.path += [str(Path(__file__).parents[1] / name) for name in ("support", "unit/data")]

from damage import Damage, damages
from test_damaged_shards import put, read_all

from controlbooth.data.shards.index import STRUCTURAL, ensure_index
from controlbooth.data.shards.manifest import open_dataset

PARTS = {"png", "cond.edges.png", "txt"}


def webdataset_delivers(path: Path, handler) -> str:
    """How many samples, and how it ended: with an error, or as if all were well."""
    complete, torn, end = [], [], ""
    stream = webdataset.WebDataset(str(path), shardshuffle=False, handler=handler).decode("rgb8", handler=handler)
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        try:
            for sample in stream:
                if sample.keys() >= PARTS:
                    complete.append(sample["__key__"])
                else:
                    torn.append(sample["__key__"])
        except Exception as error:  # whatever kind it is, it is what the table shows
            end = f", then {type(error).__name__}"
    handled = [warning for warning in caught if not issubclass(warning.category, ResourceWarning)]
    said = f", {len(handled)} warnings" if handled else ", no word"
    twice = len(complete) - len(set(complete))
    extra = f" + {len(torn)} torn" if torn else f", {twice} key twice" if twice else ""
    return f"{len(complete)}{extra}{end or said}"


def we_deliver(folder: Path, damage: Damage) -> tuple[str, list[str]]:
    path = put(folder, damage)
    try:
        problems = [] if damage.indexed is not None else ensure_index(path)
        said = [f"{problem.kind}: byte {problem.byte}, key {problem.key!r}: {problem.message}" for problem in problems]
        if any(problem.kind in STRUCTURAL for problem in problems):
            return "refused", said
        open_dataset(folder)
    except ValueError as error:
        return "refused", [str(error).replace(f"{folder}/", "")]
    delivered = read_all(folder)
    said += [f"ledger: {e['key']!r}, {e['part']}: {e['error']}; {e['substitute']} stands in" for e in delivered.ledger]
    return f"{len(set(delivered.keys))}", said


def print_row(columns: Sequence[str]) -> None:
    print(f"{columns[0]:<38} {columns[1]:<30} {columns[2]:<30} {columns[3]}")


def main() -> None:
    print("whole samples delivered")
    print_row(["damage (samples written)", "webdataset, default", "webdataset, warn_and_continue", "controlbooth"])
    for damage in damages():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "x.tar").write_bytes(damage.shard)
            theirs = [
                webdataset_delivers(folder / "x.tar", handler)
                for handler in (webdataset.reraise_exception, webdataset.warn_and_continue)
            ]
            ours, said = we_deliver(folder, damage)
        print_row([f"{damage.what} ({damage.written})", *theirs, ours])
        for line in said:
            print(f"{'':38} {line}")


if __name__ == "__main__":
    main()
