"""Reads the command blocks of docs/, and runs or checks each as the comment above it says.

A comment `<!-- tutorial: KIND WORDS -->` stands above each block of shell:

    run       runs in `make test`, with WORDS behind the command, which make it small
    slow      the same in tests/benchmarks/tutorials.py; `make test` checks its options and fields
    dry       runs with --dry-run in `make test`
    prints    runs with --dry-run where what it would use may be missing; WORDS are in what it prints
    parse     needs what is not here, a GPU or a cluster: its options and fields are checked
    shell     is no command of ours, or one that takes long: `make TARGET` is looked for in the Makefile
    file NAME is no command, but a file that later ones use
    subjects  is no command, but rows of a manifest
"""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUNS, CHECKED = ("run", "dry", "prints"), ("run", "slow", "dry", "prints", "parse")
BLOCK = re.compile(r"(?:<!-- tutorial: (\w+)(?: ([^\n]*?))? -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OVERRIDE = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)*)=")
FINDS_SOMETHING = {"data lint": (0, 1)}
"""Verbs whose status says what they have found."""


@dataclass(frozen=True)
class Block:
    """A block of a page, and what its comment says."""

    page: str
    line: int
    kind: str
    words: str
    language: str
    text: str

    @property
    def place(self) -> str:
        """Says where it is, for people."""
        return f"docs/{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Splits it into commands, as a shell does."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: str) -> list[Block]:
    """Finds all blocks of a page of docs/ in their order. Those without a comment have the kind ""."""
    text = (DOCS / page).read_text()
    return [
        Block(page, text[: found.start(3)].count("\n") + 1, *(part or "" for part in found.groups()))
        for found in BLOCK.finditer(text)
    ]


def pages(folder: str = "tutorials") -> list[str]:
    """Finds the pages of a folder of docs/, in the order of their names."""
    return sorted(str(path.relative_to(DOCS)) for path in (DOCS / folder).glob("*.md") if path.name != "index.md")


class Parsed(BaseException):
    """Ends a command whose words its parser has taken; no handler of ours catches it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options


def options_of(words: list[str]) -> argparse.Namespace:
    """Returns what the parser of a verb makes of a command, and does nothing else. Raises SystemExit as that does."""
    from controlbooth.launch.cli import TABLE

    verb = next(name for name in (" ".join(words[:2]), words[0]) if name in TABLE)
    module, _, function = TABLE[verb][0].partition(":")
    call = getattr(importlib.import_module(f"controlbooth.{module}"), function or "main")

    def ending(original: typing.Callable) -> typing.Callable:
        def parse(parser: argparse.ArgumentParser, *arguments: typing.Any, **named: typing.Any) -> typing.NoReturn:
            raise Parsed(original(parser, *arguments, **named))

        return parse

    names = ("parse_args", "parse_intermixed_args")
    patches = {name: ending(getattr(argparse.ArgumentParser, name)) for name in names}
    try:
        with mock.patch.multiple(argparse.ArgumentParser, **patches):
            call(words[len(verb.split()) :])
    except Parsed as parsed:
        return parsed.options
    raise AssertionError(f"controlbooth {shlex.join(words)} has parsed nothing")


def field_exists(section: typing.Any, path: str) -> bool:
    """Tells whether a dotted name is a field of a tree of sections."""
    name, _, rest = path.partition(".")
    if name not in section.model_fields:
        return False
    return not rest or field_exists(section.model_fields[name].annotation, rest)


def problems(block: Block) -> Iterator[str]:
    """Checks the commands of a block without running them: verbs, options, fields, and files of the repository."""
    from controlbooth.trainer.config.run import RunConfig
    from controlbooth.trainer.config.subjects import SubjectRunConfig

    for words in block.commands:
        if words[0] != "controlbooth":
            yield f"{block.place}: {words[0]} is no command of ours: mark the block as shell"
            continue
        words = [*words[1:], *(shlex.split(block.words) if block.kind in ("run", "slow") else [])]
        try:
            options = options_of(words)
        except (SystemExit, StopIteration):
            yield f"{block.place}: controlbooth {shlex.join(words)} is not understood"
            continue
        of_subjects = words[0] == "dreambooth" or getattr(options, "subjects", None)
        section = SubjectRunConfig if of_subjects else RunConfig
        for override in getattr(options, "overrides", ()):
            found = OVERRIDE.match(override)
            if not found or not field_exists(section, found[1]):
                yield f"{block.place}: there is no field {override}"
        yield from (
            f"{block.place}: there is no {word}"
            for word in words
            if word.startswith("launch/configs/") and not (ROOT / word).exists()
        )


def prepare(folder: Path) -> None:
    """Makes the place in which a tutorial begins: the run files of the repository, and photographs in class folders."""
    from PIL import Image

    from controlbooth.data.scenes.render import render, scene

    (folder / "launch").mkdir(parents=True)
    (folder / "launch" / "configs").symlink_to(ROOT / "launch" / "configs")
    for index in range(160):
        what = scene(7, index)
        place = folder / "photos" / what.objects[0].class_name
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(what, 64).image).save(place / f"{index}.png")


def run(block: Block, folder: Path) -> Iterator[tuple[str, float, str]]:
    """Runs the commands of a block in a folder. Yields command, seconds, and what is wrong, "" where nothing is."""
    if block.kind == "file":
        (folder / block.words).write_text(block.text)
        return
    for words in block.commands:
        verb = " ".join(words[1:3])
        if block.kind in ("run", "slow"):
            words = [*words, *shlex.split(block.words)]
        elif "--dry-run" not in words:
            words = [*words, "--dry-run"]
        began = time.monotonic()
        command = [sys.executable, "-m", "controlbooth.launch.cli", *words[1:]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
        expected = (0, 2) if block.kind == "prints" else FINDS_SOMETHING.get(verb, (0,))
        wrong = ""
        if done.returncode not in expected or "Traceback" in done.stderr:
            wrong = f"{block.place}: status {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        elif block.kind == "prints" and block.words not in done.stdout:
            wrong = (
                f"{block.place}: {block.words} is not in what it prints\n{done.stdout[-2000:]}\n{done.stderr[-1000:]}"
            )
        yield shlex.join(words), time.monotonic() - began, wrong


def as_yaml(block: Block) -> typing.Any:
    """Reads a block of YAML."""
    return yaml.safe_load(block.text)
