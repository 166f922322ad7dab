"""Reads how other trainers are started: shell commands and scripts, TOML and JSON, as flags and their values."""

import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlbooth.data.packing.text_tables import read_text
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.imports.tables import TRAINERS, table

VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")
LAUNCHER = ("accelerate", "python", "python3", "torchrun", "deepspeed", "simpletuner")


@dataclass(frozen=True)
class Given:
    """What somebody has told another trainer."""

    trainer: str
    script: str
    """The file name of the program, or nothing where a file of settings was read."""
    flags: dict[str, Any]
    """Flags without dashes; True where no value follows, a list where several do."""
    processes: int | None = None
    """What accelerate was told."""
    unread: tuple[str, ...] = ()
    """What was met and not understood, each with the reason."""


def read_given(source: str | Sequence[str], variables: Mapping[str, str], trainer: str | None = None) -> Given:
    """Reads a file (a shell script, TOML or JSON) or the words of a command line.

    variables: values of shell variables that the text does not set itself. trainer: of TRAINERS, found by the flags
    where it is None. Raises ConfigError for what cannot be read.
    """
    if not isinstance(source, str):
        return _command(list(source), trainer, ())
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"there is no file {source}: give a script, a TOML or a JSON file, or a command line after --"
        )
    suffix = path.suffix.lower()
    if suffix in (".toml", ".json") or path.name.endswith(".json.example"):
        return _settings(path, trainer)
    commands, unread = shell_commands(read_text(path), variables)
    training = [words for words in commands if any(_is_script(word) for word in words)]
    if not training:
        raise ConfigError(f"{source} starts no training: no command in it has a program train*.py with flags")
    more = [f"another command, of {_script(words)}: give it by itself" for words in training[1:]]
    return _command(training[0], trainer, (*unread, *more))


def shell_commands(text: str, variables: Mapping[str, str]) -> tuple[list[list[str]], list[str]]:
    """Splits a shell script into commands of words, and says which variables nothing sets.

    Comments are left out, lines that end in a backslash go on, and `NAME=value` sets a variable.
    """
    known, commands, unread = dict(variables), [], []
    text = text.replace("\r\n", "\n").replace("\\\n", " ")
    try:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
        lexer.whitespace, lexer.whitespace_split = " \t", True
        tokens = list(lexer)
    except ValueError as error:
        raise ConfigError(f"the command cannot be read as a shell would: {error}") from error
    words: list[str] = []
    for token in [*tokens, "\n"]:
        if token and set(token) <= set(";&|\n"):
            if words:
                commands.append(words)
            words = []
            continue
        value = _filled(token, known, unread)
        name, equals, rest = value.partition("=")
        if equals and re.fullmatch(r"\w+", name) and words in ([], ["export"]):
            if name not in variables:
                known[name] = rest
            continue
        words.append(value)
    return commands, list(dict.fromkeys(unread))


def _filled(token: str, known: Mapping[str, str], unread: list[str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        if name in known:
            return known[name]
        if match[2] is not None:
            return match[2]
        unread.append(f"the variable ${name} is not set: give --set {name}=VALUE")
        return match[0]

    return VARIABLE.sub(value, token)


def _is_script(word: str) -> bool:
    return bool(re.search(r"train[\w-]*(\.py)?$", word)) and not word.startswith("-")


def _script(words: Sequence[str]) -> str:
    return next((Path(word).name for word in words if word.endswith(".py") and _is_script(word)), "")


def _command(words: list[str], trainer: str | None, unread: tuple[str, ...]) -> Given:
    script = _script(words)
    at = next((n for n, word in enumerate(words) if script and Path(word).name == script), -1)
    before, own = words[: max(at, 0)], words[at + 1 :]
    names = [word[2:].partition("=")[0].replace("-", "_") for word in own if word.startswith("--")]
    trainer = trainer or _trainer_of(names)
    flags, strange = _flags(own, trainer)
    flags = {name: value for name, value in _flags(before, trainer)[0].items() if name == "mixed_precision"} | flags
    processes = next((n for n in map(_processes, before, [*before[1:], ""]) if n), None)
    return Given(trainer, script, flags, processes, (*unread, *strange))


def _processes(word: str, following: str) -> int | None:
    name, equals, value = word.partition("=")
    if name not in ("--num_processes", "--nproc_per_node", "--nproc-per-node", "--num_gpus"):
        return None
    value = value if equals else following
    return int(value) if value.isdigit() else None


def _trainer_of(names: Sequence[str]) -> str:
    """Finds the trainer whose table knows the most of some flags. Raises ConfigError where none knows one."""
    known = {name: sum(flag in table(name) for flag in names) for name in TRAINERS}
    best = max(known, key=lambda name: known[name])
    if not known[best]:
        raise ConfigError(f"no flag of diffusers, kohya or SimpleTuner is among {', '.join(names) or 'these words'}")
    return best


def _flags(words: Sequence[str], trainer: str) -> tuple[dict[str, Any], list[str]]:
    known, flags, strange = table(trainer), {}, []
    values: list[str] = []
    name = ""
    for word in [*words, "--"]:
        if not (word.startswith("--") or word.startswith("-") and word[1:2].isalpha()):
            values.append(word)
            continue
        if name:
            many = known[name].values if name in known else "one"
            kept = values if many == "many" else values[: many != "none"]
            flags[name] = (values or True) if many == "many" else (kept[0] if kept else True)
            values = values[len(kept) :]
        strange += [f"the word {value!r}, which belongs to no flag" for value in values]
        name, equals, value = word.lstrip("-").partition("=")
        name, values = name.replace("-", "_"), [value] if equals else []
    return flags, strange


def _settings(path: Path, trainer: str | None) -> Given:
    try:
        tree = tomllib.loads(read_text(path)) if path.suffix.lower() == ".toml" else json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}: settings are a table of names and values")
    if "datasets" in tree and "general" in tree or isinstance(tree.get("datasets"), list):
        raise ConfigError(f"{path} describes data, not a run: controlbooth import data {path} -o OUT")
    flat: dict[str, Any] = {}
    for name, value in tree.items():  # kohya's sections have names for people alone
        flat |= value if isinstance(value, dict) and path.suffix.lower() == ".toml" else {name: value}
    flags = {str(name).lstrip("-").replace("-", "_"): value for name, value in flat.items()}
    return Given(trainer or _trainer_of(list(flags)), "", flags)
