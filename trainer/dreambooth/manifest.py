"""Reads the manifest of a job, a row for each subject, and settles what each one trains on."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from controlbooth.data.files.records import Fields, each, is_number, is_text, is_whole, maybe, read_json_list, read_yaml
from controlbooth.data.packing.folders import IMAGE_SUFFIXES, is_picture, left_out
from controlbooth.trainer.config.loading import explain_errors
from controlbooth.trainer.config.run import Name, base_folder, rate_problem
from controlbooth.trainer.config.section import ConfigError, Section
from controlbooth.trainer.config.subjects import SubjectRunConfig, fill, load_run

PICTURES = ("images", "held_out")
"""Fields of a Task that are paths of pictures."""


class Subject(Section):
    """One row of a manifest. What is left out is taken from the run."""

    name: Name
    """Names the subject's folder, and its run in MLflow."""
    images: Path
    """A folder of its pictures, 3 to 5 of them, relative to the manifest."""
    class_noun: str = Field(min_length=1)
    """What it is, as the base calls it: dog, backpack, stuffed animal."""
    identifier: str | None = None
    """The rare word that comes to mean it: one token. Default: one of the run's that no other subject has."""
    instance_prompt: str | None = None
    class_prompt: str | None = None
    steps: int | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0.0)
    rank: int | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class Task:
    """A subject with everything settled."""

    name: str
    images: tuple[Path, ...]
    class_noun: str
    identifier: str
    instance_prompt: str
    class_prompt: str
    steps: int
    learning_rate: float
    rank: int
    held_out: tuple[Path, ...] = ()
    """Its pictures that are not trained on."""


RECORDED: Fields = {
    **dict.fromkeys(("name", "class_noun", "identifier", "instance_prompt", "class_prompt"), is_text),
    **{"images": each(is_text), "held_out": maybe(each(is_text))},
    **{"steps": is_whole, "learning_rate": is_number, "rank": is_whole},
}
"""Fields of each entry of subjects.json."""


def load_subjects(path: Path) -> tuple[list[Subject], dict[str, str]]:
    """Reads the rows of a manifest: a YAML list, CSV, JSONL or Parquet.

    Returns the rows that are valid, and what is wrong with each of the others by the subject's name, or by `row N`
    where it has no usable name. Raises ConfigError where the file itself cannot be read.
    """
    subjects: list[Subject] = []
    faults: dict[str, str] = {}
    named: list[str] = []
    for number, row in enumerate(_rows(path), 1):
        name = folder_name(row.get("name")) if isinstance(row, dict) else None
        named += [name] if name else []
        if not isinstance(row, dict):
            faults[f"row {number}"] = f"it is {row!r}, and no mapping with name, images and class_noun"
            continue
        try:
            subject = Subject.model_validate({key: value for key, value in row.items() if value not in ("", None)})
        except ValidationError as error:
            faults[name or f"row {number}"] = explain_errors(error, Subject)
            continue
        subjects.append(subject.model_copy(update={"images": path.absolute().parent / subject.images}))
    alike: dict[str, list[str]] = {}
    for name in named:
        alike.setdefault(same_folder(name), []).append(name)
    faults |= {name: _named_alike(name, others) for others in alike.values() if len(others) > 1 for name in others}
    return [subject for subject in subjects if subject.name not in faults], faults


def folder_name(value: object) -> str | None:
    """Returns the name that a row gives its subject, or None where no folder can have that name.

    Where it is None, the row's number stands in for the name.
    """
    try:
        return TypeAdapter(Name).validate_python(value)
    except ValidationError:
        return None


def same_folder(name: str) -> str:
    """Returns a text that is equal for names of one folder on disks that ignore case or drop final dots."""
    return name.casefold().rstrip(".")


def _named_alike(name: str, others: Sequence[str]) -> str:
    names = [repr(other) for other in dict.fromkeys(others)]
    if len(names) == 1:
        return f"{len(others)} subjects are named {name!r}; give each its own name"
    return f"subjects are named {', '.join(names)}, which some disks take for one folder; give them other names"


def settle(subjects: Sequence[Subject], config: SubjectRunConfig) -> tuple[list[Task], dict[str, str]]:
    """Gives subjects their identifiers, prompts and pictures.

    Returns them as tasks, and what is wrong with each of the others by name. Identifiers are given out in the order of
    the manifest, so adding a subject at its end changes none before it.
    """
    tasks: list[Task] = []
    faults: dict[str, str] = {}
    taken = Counter(subject.identifier for subject in subjects if subject.identifier)
    free = [word for word in config.identifiers if word not in taken]
    for subject in subjects:
        identifier = subject.identifier or (free.pop(0) if free else None)
        if identifier is None:
            faults[subject.name] = (
                f"it has no identifier, and all {len(config.identifiers)} of the run are given out. Add some: "
                "`controlbooth dreambooth identifiers` finds them"
            )
            continue
        if taken[subject.identifier or ""] > 1:
            faults[subject.name] = f"the identifier {identifier!r} is another subject's too; leave it out or change it"
            continue
        try:
            images = find_images(subject.images)
        except OSError as error:
            faults[subject.name] = f"{subject.images} cannot be read: {error.strerror or error}"
            continue
        if not images:
            there = "has no pictures" if subject.images.is_dir() else "is no folder"
            if subject.images.is_dir() and (others := left_out(subject.images.iterdir())):
                there += f" but {others}"
            faults[subject.name] = f"{subject.images} {there} ({', '.join(IMAGE_SUFFIXES)})"
            continue
        kept = len(images) - config.validation.hold_out
        if kept < 1:
            faults[subject.name] = (
                f"it has {len(images)} pictures, and validation.hold_out={config.validation.hold_out} leaves none to "
                "train on. Add some, or hold out fewer"
            )
            continue
        rate = subject.learning_rate or config.default_learning_rate
        if problem := rate_problem(config.optimizer, "learning_rate", rate):
            faults[subject.name] = problem
            continue
        words = dict(identifier=identifier, class_noun=subject.class_noun)
        try:
            instance_prompt = fill("instance_prompt", subject.instance_prompt or config.instance_prompt, **words)
            class_prompt = fill("class_prompt", subject.class_prompt or config.class_prompt, **words)
        except ValueError as error:
            faults[subject.name] = str(error)
            continue
        tasks.append(
            Task(
                name=subject.name,
                images=tuple(images[:kept]),
                class_noun=subject.class_noun,
                identifier=identifier,
                instance_prompt=instance_prompt,
                class_prompt=class_prompt,
                steps=subject.steps or config.steps,
                learning_rate=rate,
                rank=subject.rank or config.adapter.rank,
                held_out=tuple(images[kept:]),
            )
        )
    return tasks, faults


def check_full(config: SubjectRunConfig, world_size: int) -> None:
    """Raises ConfigError where the ranks cannot share a step's pictures, or the base is not a diffusers folder."""
    if config.instance_batch_size % world_size:
        raise ConfigError(
            f"instance_batch_size={config.instance_batch_size} cannot be shared by {world_size} ranks, which all train "
            f"the same subject with method=full. Set it to {world_size} or a multiple, or start fewer ranks"
        )
    if not base_folder(config.model.base).is_dir():
        raise ConfigError(
            f"method=full writes a pipeline, for which the rest is copied from the base, and {config.model.base} is a "
            "single file. Give a diffusers folder"
        )


def check_pictures(tasks: Sequence[Task], resolution: int) -> dict[str, str]:
    """Opens every picture as training will.

    Returns what is wrong with each subject whose pictures cannot be used, by name.
    """
    from controlbooth.trainer.dreambooth.images import (
        SubjectError,
        read_pictures,  # numpy, which starting a run does without
    )

    faults: dict[str, str] = {}
    for task in tasks:
        try:
            read_pictures((*task.images, *task.held_out), resolution)
        except SubjectError as error:
            faults[task.name] = str(error)
    return faults


def record_texts(config: SubjectRunConfig, tasks: Sequence[Task]) -> dict[str, str]:
    """Returns the texts of config.yaml and subjects.json, which record in the run's folder what it trains.

    Whoever looks at the run later reads them, so the paths of pictures and of the output are absolute.
    """
    rows = [asdict(task) | {name: absolute(getattr(task, name)) for name in PICTURES} for task in tasks]
    tree = config.model_dump(mode="json") | {"output": str(config.output.absolute())}
    return {
        "config.yaml": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
        "subjects.json": json.dumps(rows, indent=1),
    }


def read_record(folder: Path) -> tuple[SubjectRunConfig, list[Task]]:
    """Reads what `record_texts` has recorded in a run's folder. Raises ConfigError where there is no subjects.json."""
    if not (folder / "subjects.json").is_file():
        raise ConfigError(
            f"{folder} holds no subjects.json, so it is no run of subjects, or one of before they wrote it. Start it "
            "with `controlbooth dreambooth run`: what is finished is not trained again"
        )
    remedy = "Start the run again by `controlbooth dreambooth run`, which writes it anew"
    rows = read_json_list(folder / "subjects.json", remedy, RECORDED)
    fields = Task.__dataclass_fields__
    known: list[dict[str, Any]] = [{name: one[name] for name in fields if name in one} for one in rows]
    for one in known:
        one |= {name: tuple(map(Path, one.get(name) or ())) for name in PICTURES}
    tasks = [Task(**one) for one in known]
    return load_run(folder / "config.yaml"), tasks


def absolute(paths: Sequence[Path]) -> list[str]:
    return [str(path.absolute()) for path in paths]


def find_images(folder: Path) -> list[Path]:
    """Returns the files that are named like readable pictures and are not hidden, ordered by name.

    Returns none where there is no such folder. Raises OSError where it cannot be read.
    """
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_picture(path))


def share_of_rank(tasks: Sequence[Task], rank: int, world_size: int) -> list[Task]:
    """Returns what a rank trains: the longest subjects are dealt out first, each to the rank that has least to do.

    The result depends on the list alone, so ranks need not talk. Ties go to the name that sorts first and to the lower
    rank.
    """
    load = [0] * world_size
    mine = []
    for task in sorted(tasks, key=lambda task: (-task.steps, task.name)):
        least = load.index(min(load))
        load[least] += task.steps
        if least == rank:
            mine.append(task)
    return mine


def _rows(path: Path) -> list[Any]:
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        if path.suffix == ".parquet":
            import pyarrow.parquet  # seldom, and heavy

            return pyarrow.parquet.read_table(path).to_pylist()
        rows = read_yaml(path, "Correct it")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Give a list of subjects with name, images and class_noun") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as a list of subjects: {error}") from error
    rows = rows.get("subjects") if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise ConfigError(f"{path} holds no list of subjects; write `- name: ...` with images and class_noun for each")
    return rows
