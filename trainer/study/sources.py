"""What a study compares: folders of pictures, runs, checkpoints and subjects, brought into one form.

Pictures of one name are of one item: `0001.png` of one folder and `0001.jpg` of another stand beside each other.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controlbooth.data.arguments import quoted
from controlbooth.data.errors import MissingFile, UserError
from controlbooth.data.files.records import read_yaml
from controlbooth.data.packing.folders import files_below, is_picture
from controlbooth.models.recognition import recognise
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.dreambooth.manifest import Task, read_record
from controlbooth.trainer.dreambooth.measuring.protocol import prompts_for

FOLDER, RUN, SUBJECTS = "pictures", "run", "subjects"
MOST_NAME = 40
MOST_REFERENCES = 4
"""Photographs of a subject that stand beside its pictures."""


@dataclass(frozen=True)
class Source:
    """A method of the command line, and what its path is."""

    name: str
    where: Path
    kind: str
    step: int | None = None
    """Of a run's checkpoint; None is the latest."""


@dataclass(frozen=True)
class Gathered:
    """One item's files, as far as there are any."""

    pictures: Mapping[str, Path]
    """By method."""
    prompt: str = ""
    condition: Path | None = None
    references: tuple[Path, ...] = ()
    target: Path | None = None
    """The real picture, of which checks are made."""


@dataclass(frozen=True)
class Beside:
    """Folders and files that belong to folders of pictures; with runs, what was drawn beside them."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Path] = field(default_factory=dict)
    targets: Mapping[str, Path] = field(default_factory=dict)
    references: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """By item, or by the part of its name before the first /; "" are those of all items."""


def parse_methods(words: Sequence[str]) -> list[Source]:
    """Reads values of --methods, such as ["early=runs/a/checkpoints/step-00000100", "late=runs/a"].

    Raises UserError for what cannot be understood, MissingFile for a path that is not there.
    """
    sources = []
    for word in words:
        name, equals, path = word.partition("=")
        if not (equals and path and re.fullmatch(rf"[^\s/\\=]{{1,{MOST_NAME}}}", name)):
            raise UserError(
                f"--methods {word!r} is not understood: write NAME=PATH, the name without spaces and slashes and of at "
                f"most {MOST_NAME} letters"
            )
        sources.append(find_source(name, Path(path)))
    if len({source.name for source in sources}) < len(sources):
        raise UserError("two methods have the same name: give each its own")
    if len(sources) < 2:
        raise UserError("a study compares at least two methods: --methods NAME=PATH NAME=PATH")
    return sources


def find_source(name: str, where: Path) -> Source:
    """Finds out what a path is. Raises UserError and MissingFile."""
    if not where.is_dir():
        raise MissingFile(f"--methods {name}={where}: there is no such folder")
    if (where / "subjects.json").is_file():
        return Source(name, where, SUBJECTS)
    step = re.fullmatch(r"step-(\d+)", where.resolve().name)
    if step and where.resolve().parent.name == "checkpoints":
        return Source(name, where.resolve().parents[1], RUN, int(step[1]))
    if (where / "config.yaml").is_file():
        return Source(name, where, RUN)
    if (where / "config.json").is_file():
        raise UserError(
            f"--methods {name}={where} is a ControlNet without its run: draw its pictures by `controlbooth evaluate`, "
            "and give the folder of those"
        )
    return Source(name, where, FOLDER)


def pictures_below(folder: Path) -> dict[str, Path]:
    """Finds pictures by their paths below a folder without suffix.

    Raises UserError where two have one name, and MissingFile where there is none.
    """
    if not folder.is_dir():
        raise MissingFile(f"there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(files_below(folder)):
        if not is_picture(path):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {path} have one name, by which items are told: rename one of them")
        found[name] = path
    if not found:
        raise MissingFile(f"{folder} holds no pictures")
    return found


def pictures_of_subjects(run: Path) -> tuple[dict[str, Path], Beside]:
    """Finds what `dreambooth measure` drew of a run's subjects under the paper's prompts, by SUBJECT/FILE.

    Pictures of the class are left out. A prompt is told without the identifier, which means nothing to people. Raises
    UserError where nothing is drawn.
    """
    config, tasks = read_record(run)
    embedded = recognise(base_folder(config.model.base), config.model.family).name.startswith("miniature")
    found: dict[str, Path] = {}
    prompts: dict[str, str] = {}
    references: dict[str, tuple[Path, ...]] = {}
    for task in tasks:
        for path in sorted((run / "subjects" / task.name / "pictures").glob("[0-9]*-[0-9]*.png")):
            name = f"{task.name}/{path.stem}"
            found[name], prompts[name] = path, _prompt(task, path, embedded)
            references[task.name] = task.images[:MOST_REFERENCES]
    if not found:
        raise UserError(
            f"{run} has no pictures of its subjects yet: `controlbooth dreambooth measure {quoted(run)}` draws them"
        )
    return found, Beside(prompts=prompts, references=references)


def _prompt(task: Task, path: Path, embedded: bool) -> str:
    templates = prompts_for(task.class_noun, embedded)
    number = int(path.stem.partition("-")[0])
    return templates[number].format(thing=task.class_noun) if number < len(templates) else ""


def read_prompts(path: Path) -> dict[str, str]:
    """Reads a YAML or JSON mapping from the names of items to texts. Raises UserError and MissingFile."""
    remedy = 'It is a mapping from names of pictures to texts, as {"0001": "a red ball"}'
    if not path.is_file():
        raise MissingFile(f"there is no file {path}")
    tree = read_yaml(path, remedy)
    if not isinstance(tree, dict) or not all(isinstance(text, str) for text in tree.values()):
        raise UserError(f"{path} cannot be used. {remedy}")
    return {str(name): text for name, text in tree.items()}


def read_references(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Reads photographs of subjects: a folder of them for all items, or one folder for each item or group of items."""
    groups: dict[str, list[Path]] = {}
    for name, path in pictures_below(folder).items():
        groups.setdefault(name.rpartition("/")[0], []).append(path)
    return {name: tuple(paths[:MOST_REFERENCES]) for name, paths in groups.items()}


def gather(pictures: Mapping[str, Mapping[str, Path]], beside: Beside) -> tuple[dict[str, Gathered], int]:
    """Puts together what belongs to each item that every method has a picture of.

    pictures: by method and item. -> (item name -> what it has, how many names some method lacks). Raises UserError
    where no item is common to all.
    """
    names = [set(found) for found in pictures.values()]
    common = sorted(set.intersection(*names))
    if not common:
        shown = "; ".join(f"{name} has {min(found)!r} and {len(found) - 1} more" for name, found in pictures.items())
        raise UserError(f"no name of a picture is common to all methods: {shown}. Pictures of one name are of one item")
    items = {
        name: Gathered(
            pictures={method: found[name] for method, found in pictures.items()},
            prompt=beside.prompts.get(name, ""),
            condition=beside.conditions.get(name),
            references=_references(beside.references, name),
            target=beside.targets.get(name),
        )
        for name in common
    }
    return items, len(set.union(*names)) - len(common)


def _references(found: Mapping[str, tuple[Path, ...]], name: str) -> tuple[Path, ...]:
    for group in (name, name.partition("/")[0], ""):
        if group in found:
            return found[group]
    return ()
