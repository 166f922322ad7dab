"""What is evaluated: finds the ControlNet, base, held-out samples and networks that a command names."""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlbooth.data.conditions.networks import network_folders
from controlbooth.data.shards.manifest import Dataset
from controlbooth.models.pretrained import UNET_FOLDER
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.record import USUAL_SAMPLES
from controlbooth.trainer.run.checkpoint import check_weights, complete_checkpoints, read_state


@dataclass(frozen=True)
class Evaluated:
    """A ControlNet, and everything that its pictures depend on."""

    where: Path
    weights: Path
    digest: str
    step: int | None
    base: str
    family: str
    data: str
    condition: str
    resolution: int
    samples: int | None
    """Held-out conditions; None where nobody said how many."""
    steps: int
    guidance: float | None
    """None: the base's usual one."""
    scheduler: str | None
    """None: the first of the base's own."""
    config: RunConfig | None
    """Of the run, where it is one."""
    saved: Mapping[str, Any] | None = None
    """What its checkpoint notes of the base, where the run's own is taken."""


def resolve(options: argparse.Namespace) -> Evaluated:
    """Finds all that an evaluation needs, from the command's options. Raises ConfigError for what cannot be used."""
    where: Path = options.where
    if (where / "config.yaml").is_file():
        return resolve_run(options, where)
    if not (where / "config.json").is_file():
        raise ConfigError(
            f"{where} holds neither a run's config.yaml nor a ControlNet's config.json. Give the folder that "
            "`controlbooth train` made, or one in the format of diffusers"
        )
    missing = [f"--{name}" for name in ("data", "condition", "base") if getattr(options, name) is None]
    if missing:
        raise ConfigError(f"{where} is a ControlNet without its run: say {', '.join(missing)} too")
    if options.step is not None:
        raise ConfigError(f"--step {options.step} is of a run's checkpoints, and {where} is no run")
    return Evaluated(
        where=where,
        weights=where,
        digest=file_digest(where),
        step=None,
        base=options.base,
        family="auto",
        data=options.data,
        condition=options.condition,
        resolution=options.resolution or 0,
        samples=options.samples,
        steps=options.steps or 20,
        guidance=options.guidance,
        scheduler=options.scheduler,
        config=None,
    )


def resolve_run(options: argparse.Namespace, where: Path) -> Evaluated:
    whole = complete_checkpoints(where)
    if not whole:
        load_config(where / "config.yaml")  # which refuses a DreamBooth run by its name
        raise ConfigError(f"{where} holds no whole checkpoint yet. Train it further")
    if options.step is not None:
        steps = [read_state(one)["step"] for one in whole]
        if options.step not in steps:
            raise ConfigError(f"{where} has no checkpoint of step {options.step}; it has {', '.join(map(str, steps))}")
        whole = [whole[steps.index(options.step)]]
    checkpoint = whole[-1]
    config = load_config(checkpoint / "config.yaml")
    data = options.data or config.data.held_out
    if data is None:
        raise ConfigError(f"{where} has no held-out shards: name some by --data SHARDS")
    if options.condition and options.condition != config.data.condition:
        raise ConfigError(
            f"{where} was trained on {config.data.condition!r}, and --condition says {options.condition!r}"
        )
    state = read_state(checkpoint)
    check_weights(checkpoint)
    return Evaluated(
        where=where,
        weights=checkpoint / "controlnet",
        digest=state["digest"],
        step=state["step"],
        base=options.base or config.model.base,
        family=config.model.family,
        data=data,
        condition=config.data.condition,
        resolution=options.resolution or config.data.resolution,
        samples=options.samples,
        steps=options.steps or config.validation.sampling_steps,
        guidance=options.guidance or config.validation.guidance_scale,
        scheduler=options.scheduler,
        config=config,
        saved=None if options.base else state,
    )


def file_digest(folder: Path) -> str:
    """Computes the SHA-256 over the names and bytes of a ControlNet's weight files and its config.json."""
    total = hashlib.sha256()
    files = [*folder.glob("*.safetensors"), *folder.glob(f"{UNET_FOLDER}/*.safetensors")]
    for path in sorted(files) + [folder / "config.json"]:
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def samples_to_draw(target: Evaluated, dataset: Dataset) -> int:
    """Counts the samples to draw: as many as were asked for, or else up to USUAL_SAMPLES.

    Raises ConfigError where the data set has fewer, or none.
    """
    there = int(dataset.samples_per_shard(target.condition).sum())
    if there == 0:
        raise ConfigError(f"{target.data} has no sample with the condition {target.condition!r}: name others by --data")
    if target.samples is None:
        return min(USUAL_SAMPLES, there)
    if target.samples > there:
        raise ConfigError(
            f"--samples {target.samples} is more than the {there} that {target.data} has with the condition "
            f"{target.condition!r}: ask for fewer, or leave it out"
        )
    return target.samples


def named_networks(given: Sequence[str], trained: str) -> dict[str, str]:
    """Parses the values of --network: ["depth=/path"] -> {"depth": "/path"}.

    trained: the kind of condition that pictures are compared in. Raises ConfigError for what cannot be parsed, is no
    model's folder, or would not be used.
    """
    named = {}
    for one in given:
        kind, equals, folder = one.partition("=")
        if not (kind and equals and folder):
            raise ConfigError(f"--network {one!r} is not understood; write KIND=FOLDER")
        try:
            network_folders(kind, folder)
        except ValueError as error:
            raise ConfigError(f"--network {one!r}: {error}") from None
        if kind != trained:
            raise ConfigError(f"--network {one!r} finds {kind}, and pictures are compared in {trained}: leave it out")
        named[kind] = folder
    return named
