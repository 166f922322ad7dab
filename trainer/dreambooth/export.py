"""`controlbooth dreambooth export`: trained subjects as files, by the names that programs read."""

import argparse
import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from controlbooth.data.files.records import is_whole, read_json
from controlbooth.data.files.whole import replaced
from controlbooth.models.files.loading import read_tensors
from controlbooth.models.files.weights import save_weights
from controlbooth.models.lora_files.comfy_form import to_comfy
from controlbooth.models.lora_files.diffusers_form import from_diffusers, to_diffusers
from controlbooth.models.lora_files.kohya_form import to_kohya
from controlbooth.models.lora_files.layers import Lora, Shapes, layer_shapes
from controlbooth.models.pretrained import load_base
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.manifest import Task, read_record
from controlbooth.trainer.dreambooth.stack import LORA_FILE
from controlbooth.trainer.dreambooth.status import status_of
from controlbooth.trainer.dreambooth.validation import BEST, BEST_LORA
from controlbooth.trainer.run.disk_full import named_when_full

DIGEST = "weights_sha256"
"""In a file's header: of the LoRA in the run's folder that it was made of."""
KOHYA_BASES = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}
"""Family -> what kohya's scripts call the base in a header, by which UIs sort LoRAs."""
KOHYA_MODULES = {"sd3": "networks.lora_sd3", "flux": "networks.lora_flux"}


@dataclass(frozen=True)
class Planned:
    """One file to write."""

    task: Task
    form: str
    source: Path
    step: int
    out: Path


@dataclass(frozen=True)
class Layers:
    """What must be known of a base to name its layers."""

    family: str
    shapes: Shapes


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth dreambooth export` is asked, and returns its exit status."""
    config, tasks = read_record(options.run)
    if config.method == "full":
        raise ConfigError(
            f"{options.run} was trained with method=full, which leaves whole pipelines and no LoRA: "
            f"{options.run / 'subjects' / (options.subject or 'NAME') / 'pipeline'}"
        )
    return export_one(options, config, tasks) if options.all is None else export_all(options, config, tasks)


def export_one(options: argparse.Namespace, config: SubjectRunConfig, tasks: Sequence[Task]) -> int:
    """Writes one subject in one form. Raises ConfigError where it is not finished, or the file is there."""
    task = next((task for task in tasks if task.name == options.subject), None)
    if task is None:
        raise ConfigError(
            f"{options.run} has no subject {options.subject!r}; it has {', '.join(t.name for t in tasks)}"
        )
    state = status_of(options.run, task.name).get("state", "waiting")
    if state != "finished" and not options.best:
        raise ConfigError(f"{task.name} is {state}, and has nothing to export before it is finished")
    if len(options.format) > 1:
        raise ConfigError(f"{options.out} is one file, not {len(options.format)}: give one form, or --all FOLDER")
    if options.out.suffix != ".safetensors":
        raise ConfigError(f"{options.out} must end in .safetensors")
    if options.out.exists() and not options.force:
        raise ConfigError(f"{options.out} is there already; --force writes over it")
    form = options.format[0]
    source, step = trained_file(options.run, task.name, options.best), step_of(options.run, task, options.best)
    planned = Planned(task, form, source, step, options.out)
    write(planned, config, layers_for([form], config), options.dry_run)
    said = "would be written" if options.dry_run else f"prompt it with {task.instance_prompt!r}"
    print(f"{options.out}: {task.name}, {form}; {said}")
    return 0


def export_all(options: argparse.Namespace, config: SubjectRunConfig, tasks: Sequence[Task]) -> int:
    """Writes all finished subjects into a folder, and a table of what became of them on the terminal.

    A file that is there and whole is kept where it was made of the same weights. Returns 1 where one of other weights
    is in the way.
    """
    rows, planned = [], []
    for task in tasks:
        state = status_of(options.run, task.name).get("state", "waiting")
        if options.best and not (options.run / "subjects" / task.name / BEST_LORA).is_file():
            rows.append((task.name, "-", "-", "-", f"no best step; it is {state}"))
        elif state != "finished" and not options.best:
            rows.append((task.name, "-", "-", "-", f"not finished: {state}"))
        else:
            source, step = trained_file(options.run, task.name, options.best), step_of(options.run, task, options.best)
            files = [(form, options.all / f"{task.name}.{form}.safetensors") for form in options.format]
            planned += [Planned(task, form, source, step, out) for form, out in files]
    if not planned:
        raise ConfigError(f"none of the {len(tasks)} subjects of {options.run} has a LoRA to export yet")
    layers = layers_for(options.format, config)
    for one in planned[: len(options.format)]:  # what a form cannot hold is told before anything is written
        write(one, config, layers, dry_run=True)
    if not options.dry_run:
        options.all.mkdir(parents=True, exist_ok=True)
    blocked = False
    for one in tqdm(planned, unit="file", desc="exporting", dynamic_ncols=True, disable=options.dry_run):
        found = header_of(one.out)
        if found is not None and found.get(DIGEST) == digest_of(one.source) and not options.force:
            said = "there already"
        elif found is not None and not options.force:
            said, blocked = "of other weights; --force writes over it", True
        else:
            write(one, config, layers, options.dry_run)
            said = "would be written" if options.dry_run else "written"
        rows.append((one.task.name, str(one.step), str(one.task.rank), one.form, f"{one.out.name}: {said}"))
    print(table(("subject", "step", "rank", "form", str(options.all)), rows))
    return 1 if blocked else 0


def trained_file(run: Path, name: str, best: bool) -> Path:
    """Returns the LoRA file of a subject's last step, or with `best` that of its best step.

    Raises ConfigError where no step was found to be the best.
    """
    own = run / "subjects" / name
    if not best:
        return own / LORA_FILE
    if not (own / BEST_LORA).is_file():
        raise ConfigError(
            f"{name} has no {BEST_LORA}: no step of it was seen to be learnt and not copied yet, or its run had no "
            "validation.encoders that could tell. Leave --best out for the last step"
        )
    return own / BEST_LORA


def step_of(run: Path, task: Task, best: bool) -> int:
    """Returns the step of that file."""
    if not best:
        return int(status_of(run, task.name).get("step") or task.steps)
    remedy = "Leave --best out for the last step"
    return read_json(run / "subjects" / task.name / BEST, remedy, {"step": is_whole})["step"]


def layers_for(forms: Sequence[str], config: SubjectRunConfig) -> Layers | None:
    """Returns the base's layers, from the headers of its files, or None where no form needs them."""
    if set(forms) == {"diffusers"}:
        return None
    base = load_base(base_folder(config.model.base), config.model.family, device="meta")
    return Layers(base.family.name, layer_shapes(base))


def write(planned: Planned, config: SubjectRunConfig, layers: Layers | None, dry_run: bool = False) -> None:
    """Writes one file, whole or not at all. Raises ValueError for a layer or base that its form has no name for."""
    lora = from_diffusers(read_tensors([planned.source]))
    tensors = tensors_in(planned.form, lora, layers)
    if dry_run:
        return
    with named_when_full(planned.out), replaced(planned.out) as temporary:
        save_weights(tensors, temporary, header(planned, config, layers))


def tensors_in(form: str, lora: Lora, layers: Layers | None) -> dict[str, Tensor]:
    if form == "diffusers":
        return to_diffusers(lora)
    assert layers is not None
    return (to_kohya if form == "kohya" else to_comfy)(lora, layers.family, layers.shapes)


def header(planned: Planned, config: SubjectRunConfig, layers: Layers | None) -> dict[str, str]:
    """Returns a file's metadata: what it is and where it is from, for kohya's form also by the names of its scripts."""
    task = planned.task
    facts: dict[str, Any] = {
        "format": "pt",
        "form": planned.form,
        "prompt": task.instance_prompt,
        "base_model": config.model.base,
        "identifier": task.identifier,
        "class": task.class_noun,
        "rank": task.rank,
        "alpha": task.rank,
        "step": planned.step,
        DIGEST: digest_of(planned.source),
        "controlbooth_version": importlib.metadata.version("controlbooth"),
    }
    if planned.form == "kohya":
        assert layers is not None
        facts |= {
            "ss_network_module": KOHYA_MODULES.get(layers.family, "networks.lora"),
            "ss_network_dim": task.rank,
            "ss_network_alpha": float(task.rank),
            "ss_output_name": task.name,
            "ss_sd_model_name": Path(config.model.base).name,
            "ss_steps": planned.step,
            "ss_v2": layers.family == "sd21",
        }
        facts |= {"ss_base_model_version": KOHYA_BASES[layers.family]} if layers.family in KOHYA_BASES else {}
    return {name: str(value) for name, value in facts.items()}


def digest_of(path: Path) -> str:
    """Computes the SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_of(path: Path) -> dict[str, str] | None:
    """Reads a file's metadata. Returns None where there is no file, or it is not whole."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:  # which compares the file's length with its header
            return file.metadata() or {}
    except SafetensorError:
        return None


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Returns lines of columns, each as wide as its widest cell."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)
