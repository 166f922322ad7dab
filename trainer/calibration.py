"""Measured steps, and what they say about a planned one.

A row is one JSON object: family, resolution, micro_batch_size, precision, attention, gradient_checkpointing, cached,
samples_per_second (of one rank), step_seconds, peak_memory_gib, device. tests/benchmarks/throughput.py writes such
rows, one a line; of a run's folder, speed.json and config.yaml make one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlbooth.models.families import FAMILIES, identify
from controlbooth.trainer.config import ConfigError, RunConfig, base_path, gradient_accumulation_steps, load_config
from controlbooth.trainer.footprint import WITHOUT_SCORES

COMPARED = ("family", "precision", "cached", "gradient_checkpointing", "resolution", "scores", "micro_batch_size")
"""In the order of how much they matter; `scores`: whether attention keeps a matrix of tokens by tokens."""


@dataclass(frozen=True)
class Measured:
    """One row, with what it was measured on."""

    row: Mapping[str, Any]
    differs: tuple[str, ...]
    """Which of COMPARED are other than in the planned run."""

    def describe(self) -> str:
        row = self.row
        what = f"{row['samples_per_second']:.1f} samples/s of one rank on {row.get('device', 'an unnamed device')}"
        if not self.differs:
            return f"{what}, measured for this very step"
        others = ", ".join(f"{name} {_facts(row)[name]}" for name in self.differs)
        return f"{what}, measured with another {others}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, a JSON list, or a finished run's folder. Raises ConfigError for anything else."""
    if path.is_dir():
        return [_run_row(path)]
    try:
        text = path.read_text()
        whole = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"calibration {path} is not readable ({error}): give a run's folder with speed.json, or rows that "
            "tests/benchmarks/throughput.py has written"
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
    config, speed = load_config(folder / "config.yaml"), json.loads((folder / "speed.json").read_text())
    ranks = speed["world_size"]
    return planned_facts(config, speed["precision"], config.micro_batch_size) | {
        "samples_per_second": speed["samples_per_second"] / ranks,
        "step_seconds": speed["step_seconds"] / gradient_accumulation_steps(config, ranks),
        "peak_memory_gib": speed["peak_memory_gib"],
        "attention": speed["attention"],
        "device": f"the device of {folder}",
    }


def planned_facts(
    config: RunConfig, precision: str, micro_batch_size: int, shapes: str | None = None
) -> dict[str, Any]:
    """The fields of a row that say what was measured, of a run."""
    return {
        "family": shapes or family_of(config),
        "resolution": config.data.resolution,
        "micro_batch_size": micro_batch_size,
        "precision": precision,
        "attention": config.model.attention,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "cached": config.data.columns is not None,
    }


def family_of(config: RunConfig) -> str:
    unet = base_path(config) / "unet" / "config.json"
    return identify(json.loads(unet.read_text())).name if unet.is_file() else config.model.family


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "gradient_checkpointing": False,
        "cached": False,
        **row,
        "scores": row.get("attention", "auto") not in WITHOUT_SCORES,
    }


def nearest(rows: Sequence[Mapping[str, Any]], planned: Mapping[str, Any]) -> Measured:
    """The row that has most in common with what is planned; of equals the one with the nearest micro-batch, and the
    fastest of those."""
    wanted = _facts(planned)

    def distance(row: Mapping[str, Any]) -> tuple:
        other = _facts(row)
        apart = [other[name] != wanted[name] for name in COMPARED]
        tuned = row.get("settings", "default") != "default"  # settings of PyTorch that the trainer does not make
        return tuned, *apart[:-1], abs(row["micro_batch_size"] - wanted["micro_batch_size"]), -row["samples_per_second"]

    best = min(rows, key=distance)
    return Measured(best, tuple(name for name in COMPARED if _facts(best)[name] != wanted[name]))


def config_of_row(config: RunConfig, row: Mapping[str, Any]) -> tuple[RunConfig, str | None]:
    """The run with the row's base and settings in place of its own, so that its step can be planned like the run's; and
    the family whose published shapes it has, or None where it is the run's base."""
    facts = _facts(row)
    model = config.model.model_copy(
        update={"attention": facts.get("attention", "auto"), "gradient_checkpointing": facts["gradient_checkpointing"]}
    )
    columns = Path("columns") if facts["cached"] else None
    data = config.data.model_copy(update={"resolution": facts["resolution"], "columns": columns})
    same = facts["family"] == family_of(config) and base_path(config).is_dir()
    if not same and FAMILIES[facts["family"]].architecture is None:
        raise ConfigError(
            f"a row is of the family {facts['family']}, of which only the run's own base could be planned"
        )
    return config.model_copy(update={"model": model, "data": data}), None if same else facts["family"]
