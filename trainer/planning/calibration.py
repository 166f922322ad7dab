"""Measured steps, and what they say about a planned one.

A row is one JSON object: family, resolution, micro_batch_size, precision, attention, gradient_checkpointing, cached,
samples_per_second (of one rank), peak_memory_gib, device, device_kind (cuda or cpu); and, unless it is of one rank
under ZeRO-2 that accumulates nothing, ranks, zero_stage and accumulation_steps.
tests/benchmarks/gpu.py writes such rows, one a line; of a run's folder, speed.json and config.yaml make one.
measured.yaml holds those that we have measured, for GPUs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from controlbooth.data.errors import UserError
from controlbooth.data.files.records import is_number, is_text, is_whole, maybe, read_json
from controlbooth.models.architectures import PUBLISHED
from controlbooth.models.families import identify
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import (
    FlowConfig,
    ModelConfig,
    RunConfig,
    base_path,
    gradient_accumulation_steps,
)
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.planning.accelerators import ACCELERATORS, Accelerator, is_card
from controlbooth.trainer.planning.footprint import WITHOUT_SCORES

COMPARED = ("family", "precision", "cached", "gradient_checkpointing", "resolution", "scores", "micro_batch_size")
"""In the order of how much they matter; `scores`: whether attention keeps a matrix of tokens by tokens."""
COUNTED = (*COMPARED[:5], "attention", "micro_batch_size")
"""The fields of a row on which its footprint depends."""
SPEED = {
    **dict.fromkeys(("samples_per_second", "peak_memory_gib"), is_number),
    "world_size": lambda value: is_whole(value) and value > 0,
    **{"precision": is_text, "attention": is_text, "device": maybe(is_text), "device_kind": maybe(is_text)},
}
"""Fields of speed.json."""
SHIPPED = Path(__file__).with_name("measured.yaml")


@dataclass(frozen=True)
class Measured:
    """Rows, and what is planned by them."""

    rows: Sequence[Mapping[str, Any]]
    """Alike in all but the micro-batch, in its order."""
    planned: Mapping[str, Any]
    """The same fields of the planned run."""
    card: Accelerator
    """What is planned for."""

    @property
    def device(self) -> str | None:
        return self.rows[0].get("device")

    @property
    def measured_card(self) -> Accelerator:
        """Returns the card that was measured, or the planned card where that is none of the table."""
        named = (one for one in ACCELERATORS.values() if self.device and is_card(one, self.device))
        return next(named, self.card)

    @property
    def differs(self) -> tuple[str, ...]:
        """Lists which of COMPARED are other than in the planned run."""
        rows, planned = [_facts(row) for row in self.rows], _facts(self.planned)
        return tuple(name for name in COMPARED if all(row[name] != planned[name] for row in rows))

    def describe(self) -> str:
        first = self.rows[0]
        rates = _listed([f"{row['samples_per_second']:.1f}" for row in self.rows])
        what = f"{rates} samples/s of one rank"
        if len(self.rows) > 1:
            what += f" at micro-batch {_listed([str(row['micro_batch_size']) for row in self.rows])}"
        what += "".join(
            f" {word} {first[name]}"
            for word, name in (("on", "device"), ("in", "folder"), ("of", "measured_on"))
            if name in first
        )
        if not self.differs:
            return f"{what}, measured for this very step"
        measured, planned = _facts(first), _facts(self.planned)
        others = (
            f"{self._measured_in_words(name, measured)} (planned: {_in_words(name, planned)})" for name in self.differs
        )
        return f"{what}, measured with {', '.join(others)}"

    def _measured_in_words(self, name: str, facts: Mapping[str, Any]) -> str:
        if name == "micro_batch_size" and len(self.rows) > 1:
            return "these micro-batches"
        return _in_words(name, facts)

    def warning(self) -> str | None:
        """Returns a warning where the speed was measured on another card than the planned one, or an unknown one."""
        device = self.device
        if _kind(self.rows[0]) is None:
            return (
                "the measured run does not say what it ran on, since an older version trained it: its times hold for "
                f"{self.card.name} only if it ran on one"
            )
        same = self.card.kind == "cpu" and "device_kind" not in self.rows[0]
        if device is None or is_card(self.card, device) or same:
            return None
        told = f"the speed was measured on {device}, which is no {self.card.title}: "
        if self.measured_card is self.card:
            return told + "expect other times on that"
        return told + (
            "what is said of it is an assumption, scaled by peak and memory bandwidth of both cards, with an equally "
            "fast host; --calibration replaces it by a short run there"
        )


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _in_words(name: str, facts: Mapping[str, Any]) -> str:
    """Describes a fact of COMPARED for people."""
    value = facts[name]
    if name == "scores":
        kernel = facts.get("attention", "auto")
        return f"attention {kernel}, which keeps {'its scores' if value else 'no scores'}"
    if name == "cached":
        return "latent cache" if value else "encoders in the step"
    if name == "gradient_checkpointing":
        return "gradient checkpointing" if value else "all activations kept"
    if name == "resolution":
        return f"{value} px"
    return f"{'a base of ' if name == 'family' else name.replace('micro_batch_size', 'micro-batch') + ' '}{value}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads rows from a JSON-lines file, a list in JSON or YAML, or a finished run's folder.

    Leaves out rows without samples_per_second. Raises ConfigError for anything else.
    """
    if path.is_dir():
        return [_run_row(path)]
    try:
        text = path.read_text()
        lines = [] if path.suffix == ".yaml" or text.lstrip().startswith("[") else text.splitlines()
        whole = [json.loads(line) for line in lines if line] or yaml.safe_load(text)
        if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
            raise UserError("it holds no list of rows")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"calibration {path} is not readable ({error}): give a run's folder with speed.json, or rows that "
            "tests/benchmarks/gpu.py has written"
        ) from error
    rows = [row for row in whole if row.get("samples_per_second")]  # the others say why they could not be measured
    for row in rows:
        missing = {"family", "resolution", "micro_batch_size", "precision"} - row.keys()
        if missing:
            raise ConfigError(f"calibration {path} has a row without {', '.join(sorted(missing))}: {row}")
    if not rows:
        raise ConfigError(f"calibration {path} has no row with samples_per_second")
    return rows


def _run_row(folder: Path) -> dict[str, Any]:
    for name in ("speed.json", "config.yaml"):
        if not (folder / name).is_file():
            raise ConfigError(f"calibration {folder} has no {name}: give the folder of a run that has ended")
    speed = read_json(folder / "speed.json", "Give the folder of another run that has ended", SPEED)
    config = load_config(folder / "config.yaml")
    ranks = speed["world_size"]
    return planned_facts(config, speed["precision"], config.micro_batch_size) | {
        "samples_per_second": speed["samples_per_second"] / ranks,
        "ranks": ranks,
        "zero_stage": config.engine.zero_stage,
        "accumulation_steps": gradient_accumulation_steps(config, ranks),
        "peak_memory_gib": speed["peak_memory_gib"],
        "attention": speed["attention"],
        "folder": str(folder),
        **{name: speed[name] for name in ("device", "device_kind") if name in speed},
    }


def rows_for(card: Accelerator, path: Path) -> list[dict[str, Any]]:
    """Reads the rows that say something about such a card: those of the card itself, or else those of its kind.

    Raises ConfigError where all are of the other kind, beside the errors of `read_rows`.
    """
    rows = read_rows(path)
    same = [row for row in rows if _kind(row) in (None, card.kind)]
    if not same:
        device = rows[0].get("device", "an unnamed device")
        measured = "a CPU" if card.kind == "cuda" else "a GPU"
        known = next((name for name, one in ACCELERATORS.items() if is_card(one, device)), "NAME of that card")
        remedy = "cpu" if card.kind == "cuda" else known
        raise ConfigError(
            f"calibration {path} was measured on {measured} ({device}), which says nothing about {card.title}. Plan "
            f"what was measured with --accelerator {remedy}, give a run of {card.name}, or leave --calibration out"
        )
    return [row for row in same if is_card(card, row.get("device", ""))] or same


def _kind(row: Mapping[str, Any]) -> str | None:
    """Returns cuda or cpu, or None for a run that was trained before speed.json noted its device.

    Rows without device_kind name a processor as `cpu, ...`.
    """
    if "device_kind" in row or "device" not in row:
        return row.get("device_kind")
    return "cpu" if row["device"].startswith("cpu") else "cuda"


def planned_facts(
    config: RunConfig, precision: str, micro_batch_size: int, shapes: str | None = None
) -> dict[str, Any]:
    """Returns the fields of a row that say what is measured, for a run."""
    return {
        "family": shapes or family_of(config),
        "resolution": config.data.resolution,
        "micro_batch_size": micro_batch_size,
        "precision": precision,
        "attention": config.model.attention,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "cached": config.data.latent_cache is not None,
    }


def family_of(config: RunConfig) -> str:
    """Finds the family of a run's base: by its folder where that is here, else as the run says."""
    folder = base_path(config)
    found = (folder / denoiser / "config.json" for denoiser in ("unet", "transformer"))
    file = next((one for one in found if one.is_file()), None)
    return config.model.family if file is None else identify(json.loads(file.read_text())).name


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "gradient_checkpointing": False,
        "cached": False,
        **row,
        "scores": row.get("attention", "auto") not in WITHOUT_SCORES,
    }


def nearest(rows: Sequence[Mapping[str, Any]], planned: Mapping[str, Any], card: Accelerator) -> Measured:
    """Finds the rows that have most in common with what is planned: those of one step at all its micro-batches.

    Where several rows have one micro-batch, the fastest is taken.
    """
    wanted = _facts(planned)

    def distance(row: Mapping[str, Any]) -> tuple:
        other = _facts(row)
        apart = [other[name] != wanted[name] for name in COMPARED]
        tuned = row.get("settings", "default") != "default"  # settings of PyTorch that the trainer does not make
        return tuned, *apart[:-1], abs(row["micro_batch_size"] - wanted["micro_batch_size"]), -row["samples_per_second"]

    first = min(rows, key=distance)
    alike = sorted((row for row in rows if _step_of(row) == _step_of(first)), key=lambda row: row["samples_per_second"])
    fastest = {row["micro_batch_size"]: row for row in alike}
    return Measured([fastest[size] for size in sorted(fastest)], planned, card)


def _step_of(row: Mapping[str, Any]) -> list[Any]:
    """Lists everything on which a row's time depends but the micro-batch."""
    facts = {"settings": "default", "device": None, "ranks": 1, "zero_stage": 2, "accumulation_steps": 1} | _facts(row)
    names = (*COMPARED[:-1], "settings", "device", "ranks", "zero_stage", "accumulation_steps")
    return [facts[name] for name in names]


def config_of_row(config: RunConfig, row: Mapping[str, Any]) -> tuple[RunConfig, str | None]:
    """Makes the run that a row was measured of, so that its step can be planned, and names its published shapes.

    It is `config` with the row's base and settings in place of its own; the shapes are None where the base is the run's
    own. Raises ConfigError for a family that is neither published nor that of the run's base.
    """
    facts = _facts(row)
    same = facts["family"] == family_of(config) and base_path(config).is_dir()
    if not same and facts["family"] not in PUBLISHED:
        raise ConfigError(
            f"a row is of the family {facts['family']}, of which only the run's own base could be planned"
        )
    if not same:  # what the run says of its own base may have no meaning with another
        config = config.model_copy(update={"model": ModelConfig(base=config.model.base), "flow": FlowConfig()})
    model = config.model.model_copy(
        update={"attention": facts.get("attention", "auto"), "gradient_checkpointing": facts["gradient_checkpointing"]}
    )
    latent_cache = Path("latent-cache") if facts["cached"] else None
    data = config.data.model_copy(update={"resolution": facts["resolution"], "latent_cache": latent_cache})
    return config.model_copy(update={"model": model, "data": data}), None if same else facts["family"]
