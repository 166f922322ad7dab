"""diffusers' layouts: folders with a table of metadata, Parquet, save_to_disk; and folders of pictures."""

from pathlib import Path

from controlbooth.data.errors import UserError
from controlbooth.data.layouts.rows import Part, Row, Understood, caption_file, caption_lines
from controlbooth.data.packing.folders import IMAGE_SUFFIXES, files_below, is_picture, left_out
from controlbooth.data.packing.tables import column_names
from controlbooth.data.packing.text_tables import columns_of, text_rows

TABLES = ("metadata.jsonl", "metadata.csv", "train.jsonl")
IMAGES = ("image", "file_name", "image_file_name", "jpg", "image_path", "target")
CAPTIONS = ("caption", "text", "prompt", "captions")
CONDITIONS = (
    "conditioning_image",
    "conditioning_image_file_name",
    "conditioning_file_name",
    "conditioning",
    "control_image",
    "control",
    "source",
)


def metadata_table(root: Path) -> Path | None:
    """Finds the table of an image folder, in it or in its train/."""
    places = [folder / name for folder in (root, root / "train") for name in TABLES]
    return next((path for path in places if path.is_file()), None)


def read_metadata(table: Path) -> Understood:
    """Reads a table that names pictures, relative to it or absolute; rows without one of their parts are left out."""
    found = Understood("an image folder with a table of metadata")
    rows = text_rows(str(table))
    image, caption, condition = columns(columns_of(rows), str(table))
    found.notes.append(f"columns: image {image}, caption {caption}, condition {condition or 'none'}")
    part = Part(table.parent.name)
    named: set[Path] = set()
    for number, row in enumerate(rows, 1):
        origin = f"row {number} of {table.name}"
        if not isinstance(row.get(image), str) or not row[image]:
            found.leave(origin, f"its {image} is empty")
            continue
        picture = table.parent / row[image]
        named.add(picture)
        given = row.get(caption)
        texts = [given] if isinstance(given, str) else given if isinstance(given, list) else []
        texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
        conditions = {}
        if condition is not None:
            cell = row.get(condition)
            conditions["conditioning"] = table.parent / cell if isinstance(cell, str) and cell else Path()
        missing = [path for path in (picture, *conditions.values()) if not _is_file(path)]
        if missing:
            what = "its picture" if missing[0] == picture else "its conditioning picture"
            found.leave(f"{origin} ({row[image]:.100})", f"{what} is not there")
        elif not texts:
            found.leave(f"{origin} ({row[image]:.100})", "it has no caption")
        else:
            part.rows.append(Row(picture, tuple(texts), conditions))
    named |= {path for row in part.rows for path in row.conditions.values()}
    for path in sorted(files_below(table.parent)):
        if is_picture(path) and path not in named:
            found.leave(path, "no row of the table names it")
    found.parts.append(part)
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def columns(names: list[str], where: str) -> tuple[str, str, str | None]:
    """Finds the columns of pictures, captions and conditions. Raises ValueError without one of the first two."""
    image, caption, condition = (
        next((name for name in known if name in names), None) for known in (IMAGES, CAPTIONS, CONDITIONS)
    )
    if image is None or caption is None:
        lacking = "pictures" if image is None else "captions"
        raise UserError(
            f"{where} has columns {', '.join(names)}, none of which is known as that of {lacking}: pack it by "
            "controlbooth data pack --image-column and --caption-column"
        )
    return image, caption, condition


def read_rows(location: Path) -> Understood:
    """Reads the columns of Parquet files, or of a folder that `datasets` wrote: it is packed as it is."""
    found = Understood("a data set of Hugging Face `datasets`, or Parquet")
    image, caption, condition = columns(column_names(location), str(location))
    found.notes.append(f"columns: image {image}, caption {caption}, condition {condition or 'none'}")
    conditions = (("conditioning", condition),) if condition else ()
    part = Part(location.stem, table=location, columns=(image, caption), condition_columns=conditions)
    found.parts.append(part)
    return found


def read_pictures(root: Path, words: str) -> Understood:
    """Reads pictures with .txt beside them at any depth, as img2dataset writes files; words: where there is none."""
    found = Understood("a folder of pictures")
    part = Part(root.name, words=words)
    files = sorted(files_below(root))
    for path in filter(is_picture, files):
        file = caption_file(path, (".txt", ".caption"))
        try:
            captions = [" ".join(caption_lines(file))] if file else [words] if words else []
        except ValueError as error:
            found.leave(path, str(error))
            continue
        if captions:
            part.rows.append(Row(path, tuple(captions)))
        else:
            found.leave(path, "it has no caption")
    if others := left_out(files):
        found.leave(others, f"no pictures that can be read ({', '.join(IMAGE_SUFFIXES)})")
    found.parts.append(part)
    return found
