"""SimpleTuner's layout: multidatabackend.json, a list of backends."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlbooth.data.errors import UserError
from controlbooth.data.layouts.rows import Part, Row, Understood, caption_file, caption_lines
from controlbooth.data.packing.folders import files_below, is_picture
from controlbooth.data.packing.text_tables import read_text


def read_backends(path: Path) -> Understood:
    """Reads the local backends of pictures, with their conditions and captions. Raises ValueError for no list."""
    try:
        backends = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(backends, list) or not all(isinstance(one, dict) for one in backends):
        raise UserError(f"{path} is no list of backends")
    found = Understood("backends of SimpleTuner")
    found.notes += [f"key {name}" for name in sorted({str(name) for one in backends for name in one})]
    by_id = {one.get("id"): one for one in backends}
    for backend in backends:
        kind = backend.get("dataset_type") or "image"
        if kind in ("text_embeds", "image_embeds", "conditioning"):
            continue  # caches are written anew; conditions are read with their pictures
        reason = _why_not(path, backend) if kind == "image" else f"it holds {kind}"
        if reason is not None:
            found.leave(f"backend {backend.get('id')}", reason)
            continue
        _read(found, path, backend, _condition(path, found, backend, by_id))
    return found


def _why_not(path: Path, backend: Mapping[str, Any]) -> str | None:
    if backend.get("disabled") or backend.get("disable"):
        return "it is disabled"
    if backend.get("type", "local") != "local":
        return f"its type is {backend.get('type')}: only files of this machine are read, copy them here"
    if not _folder(path, backend).is_dir():
        return f"there is no folder {_folder(path, backend)}"
    repeats = backend.get("repeats", 0)
    return None if isinstance(repeats, int) and repeats >= 0 else f"its repeats are {repeats!r}"


def _folder(path: Path, backend: Mapping[str, Any]) -> Path:
    """Returns a backend's folder: relative to where the training starts, or else to the file."""
    given = Path(str(backend.get("instance_data_dir") or "no instance_data_dir"))
    return given if given.is_dir() else path.parent / given


def _condition(
    path: Path, found: Understood, backend: Mapping[str, Any], by_id: Mapping[Any, Mapping[str, Any]]
) -> Path | None:
    named = backend.get("conditioning_data")
    several = named if isinstance(named, list) else [named] if named else []
    several = [one for one in by_id.values() if one.get("id") in several] or [
        one for one in by_id.values() if backend.get("id") is not None and one.get("source_dataset_id") == backend["id"]
    ]
    for extra in several[1:]:
        found.leave(
            f"backend {extra.get('id')}", "a picture has one condition of a layout: add others by data annotate"
        )
    if several and _why_not(path, several[0]) is None:
        return _folder(path, several[0])
    if named and not several:
        found.leave(f"conditioning_data {named}", "there is no backend of this id")
    return None


def _read(found: Understood, path: Path, backend: Mapping[str, Any], condition: Path | None) -> None:
    root = _folder(path, backend)
    part = Part(str(backend.get("id") or root.name), repeat=1 + backend.get("repeats", 0))
    part.is_class = bool(backend.get("is_regularisation_data"))
    part.words = str(backend.get("instance_prompt") or "")
    for picture in sorted(filter(is_picture, files_below(root))):
        conditions = {}
        if condition is not None:
            beside = _same_place(condition, picture.relative_to(root))
            if beside is None:
                found.leave(picture, "it has no conditioning picture of its name")
                continue
            conditions["conditioning"] = beside
        try:
            captions = _captions(picture, backend)
        except ValueError as error:
            found.leave(picture, str(error))
            continue
        part.rows.append(Row(picture, tuple(captions), conditions))
    found.parts.append(part)


def _same_place(root: Path, place: Path) -> Path | None:
    exact = root / place
    if exact.is_file():
        return exact
    folder = exact.parent
    near = (
        sorted(one for one in folder.iterdir() if one.stem == place.stem and is_picture(one)) if folder.is_dir() else []
    )
    return near[0] if near else None


def _captions(picture: Path, backend: Mapping[str, Any]) -> Sequence[str]:
    """Makes captions as the backend's strategy says. Raises ValueError for none, or an unknown one."""
    strategy, prompt = backend.get("caption_strategy", "filename"), str(backend.get("instance_prompt") or "")
    if backend.get("only_instance_prompt") or strategy == "instanceprompt":
        if not prompt:
            raise UserError("its backend has no instance_prompt")
        return [prompt]
    if strategy == "filename":
        lines = [picture.stem.replace("_", " ").strip()]
    elif strategy == "textfile":
        file = caption_file(picture, (".txt",))
        if file is None:
            raise UserError("it has no caption")
        lines = caption_lines(file)
        lines = [" ".join(lines)] if backend.get("disable_multiline_split") else lines
    else:
        raise UserError(f"captions by the strategy {strategy} are not read: write .txt files or a table")
    return [f"{prompt} {line}" if prompt and backend.get("prepend_instance_prompt") else line for line in lines]
