"""Makes a run file of what another trainer was told, and accounts for each of its flags."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from controlbooth.models.recognition import base_remedy
from controlbooth.trainer.config.loading import build_config, explain_errors
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.imports.command_lines import Given
from controlbooth.trainer.imports.tables import KINDS, TRAINERS, Entry, table
from controlbooth.trainer.imports.values import READERS, number, run_name, whole

UNKNOWN = "unknown"
"""What becomes of a flag that no table has."""


@dataclass(frozen=True)
class Account:
    """What became of one flag that was given."""

    flag: str
    value: Any
    kind: str
    """Of KINDS, or UNKNOWN."""
    told: str

    def __str__(self) -> str:
        value = "" if self.value is True else f" {self.value}"
        value = " (not shown)" if re.search("token|api_key|secret", self.flag) and "max" not in self.flag else value
        return f"--{self.flag}{value}: {self.kind}; {self.told}"


@dataclass
class Imported:
    """A run file in the making."""

    subjects: bool
    fields: dict[str, Any] = field(default_factory=dict)
    """section.key -> value."""
    origin: dict[str, str] = field(default_factory=dict)
    """section.key -> where it came from."""
    accounts: list[Account] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, origin: str) -> None:
        self.fields[name], self.origin[name] = value, origin

    def counts(self) -> dict[str, int]:
        found = Counter(account.kind for account in self.accounts)
        return {kind: found[kind] for kind in (*KINDS, UNKNOWN) if kind in KINDS or found[kind]}


@dataclass(frozen=True)
class Asked:
    """What people say beside the other trainer's flags, as these do not tell it."""

    shards: str = "shards"
    condition: str | None = None
    held_out: str | None = None
    processes: int | None = None
    samples: int | None = None
    subjects: bool | None = None


def import_run(given: Given, asked: Asked) -> Imported:
    """Converts all flags. Raises ConfigError where a field of the run can be taken from nowhere, or is refused."""
    subjects = is_of_subjects(given) if asked.subjects is None else asked.subjects
    made = Imported(subjects)
    made.notes += given.unread
    for flag, value in given.flags.items():
        entry = table(given.trainer).get(flag)
        if entry is None:
            made.accounts.append(Account(flag, value, UNKNOWN, f"{TRAINERS[given.trainer]} has no such flag"))
        else:
            _take(made, flag, value, entry)
    _join(made, given, asked)
    _complete(made, given, asked)
    check(made)
    return made


def is_of_subjects(given: Given) -> bool:
    """Tells a run of subjects from that of a ControlNet, by the program and by flags that only one of them has."""
    control = "control" in given.script or str(given.flags.get("controlnet", False)).lower() == "true"
    return not (control or "controlnet_model_name_or_path" in given.flags or "conditioning_data_dir" in given.flags)


def _take(made: Imported, flag: str, value: Any, entry: Entry) -> None:
    name = entry.field(made.subjects)
    if entry.kind == "missing" and _is_off(value):
        made.accounts.append(Account(flag, value, "not needed", "it is off, as here"))
    elif entry.kind == "taken" and name is None:
        elsewhere = f"it is a field of the other kind of run, {entry.field(not made.subjects)}"
        made.accounts.append(Account(flag, value, "missing", entry.why or elsewhere))
    elif name is not None and entry.read_as in READERS:
        _read(made, flag, value, entry, name)
    else:
        made.accounts.append(Account(flag, value, entry.kind, entry.why or f"becomes {name}"))


def _is_off(value: Any) -> bool:
    return value is None or value == [] or str(value).lower() in ("0", "0.0", "false", "none", "")


def _read(made: Imported, flag: str, value: Any, entry: Entry, name: str) -> None:
    if value is None or value == "":
        made.accounts.append(Account(flag, value, "not needed", "no value was given"))
        return
    if entry.read_as == "density" and value in ("sigma_sqrt", "cosmap"):
        made.put("flow.weighting", value, f"--{flag} {value}")
        made.put("flow.density", "uniform", f"--{flag} {value}")
        made.accounts.append(Account(flag, value, "equivalent", f"flow.weighting: {value} and flow.density: uniform"))
        return
    try:
        found = READERS[entry.read_as or ""](value)
    except ValueError as error:
        made.accounts.append(Account(flag, value, "missing", f"{name} is left alone: {error}"))
        return
    if found is None:
        made.accounts.append(Account(flag, value, "not needed", entry.why or f"{name} is left at its default"))
    elif made.fields.get(name, found) != found:
        told = f"{name} is {made.fields[name]} already, from {made.origin[name]}"
        made.accounts.append(Account(flag, value, "missing", told))
    else:
        told = "" if value is True else f" {value}"
        made.put(name, _base(found, made) if entry.read_as == "base" else found, f"--{flag}{told}")
        made.accounts.append(Account(flag, value, entry.kind, f"{name}: {made.fields[name]}"))


def _base(base: str, made: Imported) -> str:
    """Returns where a base will lie on this machine, with a note of the command that brings it there."""
    remedy = base_remedy(base)
    if remedy is None:
        return base
    made.notes.append(f"the base {base}: first run `{remedy[0]}`")
    return remedy[1]


def _join(made: Imported, given: Given, asked: Asked) -> None:
    """Sets the fields that several flags make: betas, the global batch, steps of epochs, copied blocks."""
    flags = given.flags
    for name, places in {
        "optimizer.betas": (("adam_beta1", "optimizer_beta1"), ("adam_beta2", "optimizer_beta2"))
    }.items():
        found = [next((flags[one] for one in place if flags.get(one) is not None), None) for place in places]
        if any(one is not None for one in found) and not made.subjects:
            betas = [default if one is None else number(one) for one, default in zip(found, (0.9, 0.999), strict=True)]
            made.put(name, betas, "the two betas of Adam")
    if not made.subjects and {"num_double_layers", "num_single_layers"} & set(flags):
        blocks = [whole(flags.get("num_double_layers", 4)), whole(flags.get("num_single_layers", 4))]
        made.put("model.copied_blocks", blocks, "--num_double_layers and --num_single_layers")
    accumulation = whole(flags.get("gradient_accumulation_steps") or 1)
    processes = asked.processes or given.processes or 1
    batch = made.fields.get("instance_batch_size" if made.subjects else "micro_batch_size", 1)
    total = batch * accumulation * processes
    told = f"batch {batch} x accumulation {accumulation} x {processes} processes"
    if made.subjects:
        if accumulation > 1:
            made.put("instance_batch_size", batch * accumulation, f"batch {batch} x accumulation {accumulation}")
    else:
        made.put("micro_batch_size", batch, made.origin.get("micro_batch_size", "the other trainer's default"))
        made.put("global_batch_size", total, told)
    _steps(made, given, asked, total)


def _steps(made: Imported, given: Given, asked: Asked, total: int) -> None:
    name = "steps" if made.subjects else "max_steps"
    epochs = given.flags.get("num_train_epochs", given.flags.get("max_train_epochs"))
    if name in made.fields or epochs is None:
        return
    if asked.samples is None:
        raise ConfigError(
            f"{epochs} epochs are steps once the number of samples is known: give --samples N (`controlbooth data "
            "info` counts those of shards)"
        )
    steps = max(1, -(-asked.samples // total)) * whole(epochs)
    made.put(name, steps, f"{epochs} epochs of {asked.samples} samples in batches of {total}")


def _complete(made: Imported, given: Given, asked: Asked) -> None:
    """Sets what a run needs and the flags did not say. Raises ConfigError for what cannot be guessed."""
    if "name" not in made.fields:
        output = str(given.flags.get("output_dir") or "")
        made.put(
            "name", run_name(Path(output).name or "imported") if output.strip("./") else "imported", "the output folder"
        )
    if "model.base" not in made.fields:
        raise ConfigError("the command names no base: give --pretrained_model_name_or_path, or --set its variable")
    made.notes.append(
        "fields that no flag named keep their defaults here, which may be others than the other trainer's"
    )
    if made.subjects:
        _settle_method(made, given)
        asked_for = any(not _is_off(given.flags.get(one)) for one in ("with_prior_preservation", "reg_data_dir"))
        if not asked_for:
            made.put("prior.weight", 0.0, "no class pictures were asked for")
        made.notes.append(
            "pictures, prompts and class nouns are rows of subjects.yaml: controlbooth import data --class"
        )
        return
    if asked.condition is None:
        raise ConfigError(
            "a ControlNet's run names its kind of condition, which the flags do not: give --condition KIND, the one "
            "that was packed, or computed:canny"
        )
    if "data.prompt_dropout" not in made.fields:
        made.put("data.prompt_dropout", 0.0, "the other trainer's default")
    made.put("data.condition", asked.condition, "--condition of import config")
    made.put("data.shards", asked.shards, "what `controlbooth import data` writes")
    if asked.held_out:
        made.put("data.held_out", asked.held_out, "--held-out of import config")
    if "max_steps" not in made.fields:
        raise ConfigError("neither steps nor epochs are given: add --max_train_steps N to the command")


def _settle_method(made: Imported, given: Given) -> None:
    """Sets method to full for programs that train all layers, and leaves adapters their one optimizer."""
    is_full = given.script.startswith("train_dreambooth") and "lora" not in given.script
    is_full |= given.trainer == "kohya" and given.script != "" and "network_module" not in given.flags
    if is_full and "method" not in made.fields:
        made.put("method", "full", f"{given.script} trains all layers")
    if made.fields.get("method") != "full" and made.fields.get("optimizer", "adamw") != "adamw":
        name, origin = made.fields.pop("optimizer"), made.origin.pop("optimizer")
        for number, account in enumerate(made.accounts):
            if account.told == f"optimizer: {name}":
                told = "adapters of subjects are moved by AdamW; other optimizers are for method: full"
                made.accounts[number] = replace(account, kind="missing", told=told)
        made.notes.append(f"the optimizer of {origin} is not taken: adapters of subjects are moved by AdamW")


def check(made: Imported) -> None:
    """Raises ConfigError where the run's own validation refuses the file."""
    tree = tree_of(made)
    if not made.subjects:
        build_config(tree, "the run that the flags make")
        return
    try:
        SubjectRunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"the run that the flags make: {explain_errors(error, SubjectRunConfig)}") from None


def tree_of(made: Imported) -> dict[str, Any]:
    """Returns the fields as a tree, in the order in which sections were met."""
    tree: dict[str, Any] = {}
    for name, value in sorted(made.fields.items(), key=lambda one: "." in one[0]):
        section, dot, key = name.rpartition(".")
        (tree.setdefault(section, {}) if dot else tree)[key if dot else name] = value
    return tree


def text_of(made: Imported, given: Given) -> str:
    """Writes the run file: each line with where it came from, and at its end the flags that became no line."""
    lines = [f"# Made by `controlbooth import config` of flags of {TRAINERS[given.trainer]}."]
    for key, value in tree_of(made).items():
        if isinstance(value, dict):
            lines += ["", f"{key}:", *(_line(made, f"{key}.{name}", one, name, "  ") for name, one in value.items())]
        else:
            lines.append(_line(made, key, value, key, ""))
    lines += ["", *(f"# {one}" for one in map(_plain, (*made.notes, *rest(made))))]
    return "\n".join(lines) + "\n"


def rest(made: Imported) -> list[str]:
    """Lists the flags that were not taken as they are, with what is to be said of each."""
    return [str(account) for account in made.accounts if account.kind != "taken"]


def _line(made: Imported, name: str, value: Any, key: str, indent: str) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return f"{indent}{key}: {written.removesuffix(chr(10)).removesuffix('...').strip()}  # {_plain(made.origin[name])}"


def _plain(text: str) -> str:
    """Makes one line of printable text for a comment."""
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", text)
