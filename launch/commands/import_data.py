"""`controlbooth import data`: its command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlbooth.data.arguments import quoted, verb_parser

SHOWN = 5
"""Things that are named of those left out for one reason; the rest is counted, or listed with --all."""


def command_line() -> argparse.ArgumentParser:
    parser = verb_parser(
        "import data",
        "Read data in the layout of another trainer, and pack it into shards, or write the rows of subjects. What was "
        "understood is told, and everything that is left out, with the reason.",
        """layouts:
  diffusers    an image folder with metadata.jsonl or .csv, also with a column of conditioning pictures; Parquet with
               paths or bytes; a folder of save_to_disk
  kohya        folders such as `10_sks dog`, also in img/ and reg/; a dataset TOML
  SimpleTuner  multidatabackend.json
  img2dataset  its folders of pictures, and its tars, which are indexed where they lie
  DreamBooth   a folder of pictures, with --class

examples:
  controlbooth import data fill50k/ --dry-run
  controlbooth import data fill50k/ -o shards/ --condition fill --held-out 5%
  controlbooth import data dataset_config.toml -o shards/
  controlbooth import data photos-of-rex/ --class dog -o subjects.yaml""",
    )
    parser.add_argument("source", type=Path, help="file or folder")
    parser.add_argument("-o", "--out", type=Path, help="folder for the shards, or a .yaml for subjects")
    parser.add_argument("--class", dest="noun", metavar="NOUN", help="what the pictures of a subject show")
    parser.add_argument(
        "--to", choices=("shards", "subjects"), help="(default: subjects with --class or -o FILE.yaml, or else shards)"
    )
    parser.add_argument(
        "--condition",
        metavar="KIND",
        help="what the conditioning pictures are, or a condition to be computed from pictures",
    )
    parser.add_argument("--caption", default="", help="of pictures that have none")
    parser.add_argument("--held-out", metavar="SHARE", help="as in data pack")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read, and list them")
    parser.add_argument("--all", action="store_true", help="name everything that is left out, not the first of a kind")
    parser.add_argument("--dry-run", action="store_true", help="say what was understood, and write nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Imports one source; returns 0, or 1 where pictures cannot be packed."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.out is None and not options.dry_run:
        parser.error("give -o OUT, or --dry-run")
    from controlbooth.data.layouts.recognise import understand

    wants_list = options.out is not None and options.out.suffix in (".yaml", ".yml")
    if wants_list and options.to == "shards":
        parser.error(f"-o {options.out} names a list of subjects: for shards give a folder")
    found = understand(options.source, options.caption or options.noun or "")
    _tell(found, options)
    if (options.to or ("subjects" if options.noun or wants_list else "shards")) == "subjects":
        return _subjects(found, options)
    return _shards(found, options)


def _tell(found: Any, options: argparse.Namespace) -> None:
    from controlbooth.data.arguments import visible

    print(f"{options.source}: {found.layout}")
    for part in found.parts:
        rows = "rows of its own" if part.table else f"{len(part.rows)} pictures"
        repeats = f", {part.repeat} times each" if part.repeat > 1 else ""
        words = f", {part.words!r}" if part.words else ""
        print(visible(f"  {part.name}: {rows}{repeats}{words}{', of the class' if part.is_class else ''}"))
    for note in found.notes:
        if told := _of_key(note):
            print(visible(f"  {told}"))
    for why, things in found.reasons().items():
        print(visible(f"left out {len(things)}: {why}"))
        shown = things if options.all else things[:SHOWN]
        print("\n".join(visible(f"  {one}") for one in shown))
        if len(shown) < len(things):
            print(f"  and {len(things) - len(shown)} more (--all names them)")


def _of_key(note: str) -> str | None:
    """Tells what becomes of a key of a description of data; nothing of one that is taken or not needed."""
    from controlbooth.trainer.imports.tables import DATA_TABLES, table

    if not note.startswith("key "):
        return note
    key = note.removeprefix("key ")
    entry = next((table(name)[key] for name in DATA_TABLES.values() if key in table(name)), None)
    if entry is None:
        return f"{key}: unknown, and left out"
    return f"{key}: {entry.kind}; {entry.why}" if entry.kind in ("equivalent", "missing") else None


def _subjects(found: Any, options: argparse.Namespace) -> int:
    from controlbooth.data.files.whole import write_whole
    from controlbooth.data.layouts.recognise import subjects_of, subjects_text

    rows, lost = subjects_of(found, options.noun)
    for line in lost:
        print(f"left out: {line}")
    text = subjects_text(rows)
    if options.dry_run:
        print(text, end="")
        return 0
    out = options.out if options.out.suffix in (".yaml", ".yml") else options.out / "subjects.yaml"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text.encode())
    print(f"{out} is written: controlbooth dreambooth run {quoted(out)} RUN.yaml")
    return 0


def _shards(found: Any, options: argparse.Namespace) -> int:
    from controlbooth.data.errors import UserError
    from controlbooth.data.files.whole import write_whole
    from controlbooth.data.layouts.recognise import folder_names

    parts = [part for part in found.parts if part.rows or part.table]
    if not parts:
        raise UserError(f"nothing of {options.source} can be packed")
    if options.out is None or options.dry_run:
        return 0
    folder: Path = options.out
    sources = []
    for part, name in zip(parts, folder_names(parts), strict=True):
        place = _write(part, folder / name if len(parts) > 1 else folder, folder / "tables" / f"{name}.jsonl", options)
        if place is None:
            return 1
        sources.append({"shards": str(place), "repeat": part.repeat})
    if len(sources) == 1 and parts[0].repeat > 1:
        print(f"left out: {parts[0].repeat} repeats of a single source, which change neither order nor shares")
    text = _data_text(sources)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "data.yaml", text.encode())
    print(f"for the section data of a run ({folder / 'data.yaml'}):\n{text}", end="")
    return 0


def _write(part: Any, out: Path, table: Path, options: argparse.Namespace) -> Path | None:
    """Packs a part, or indexes the tars that it is; returns where the shards to train on are, None where it failed."""
    from controlbooth.data.layouts.recognise import write_table
    from controlbooth.launch.commands import data_index

    if part.table and any(part.table.glob("*.tar")):
        return None if data_index.main([str(part.table)]) else part.table
    if part.table is None:
        write_table(part, table)
    if _pack(part, part.table or table, out, options):
        return None
    if options.held_out:
        print(f"held out: {out / 'held-out'}, for data.held_out")
        return out / "train"
    return out


def _data_text(sources: list[dict[str, Any]]) -> str:
    import yaml

    one = len(sources) == 1
    tree = {"data": {"shards": sources[0]["shards"]} if one else {"sources": sources}}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _pack(part: Any, table: Path, out: Path, options: argparse.Namespace) -> int:
    from controlbooth.launch.commands import data_pack

    words = [str(table), "-o", str(out), "--image-column", part.columns[0], "--caption-column", part.columns[1]]
    stored = [column for _, column in part.condition_columns] or ["conditioning"] * any(
        row.conditions for row in part.rows
    )
    if stored:
        words += ["--condition", f"{options.condition or 'conditioning'}={stored[0]}"]
    elif options.condition:
        words += ["--condition", options.condition]
    if options.held_out:
        words += ["--held-out", options.held_out]
    return data_pack.main([*words, *(["--skip-bad"] if options.skip_bad else [])])
