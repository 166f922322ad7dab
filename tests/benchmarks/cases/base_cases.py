"""Lists the cases of base models and ControlNets that train on something else than their files say."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from case import Case, Outcome, Ran, last_line, run

TRAIN = ("controlbooth", "train", "run.yaml")


def refused_with(ran: Ran, *parts: str) -> Outcome:
    """Judges whether a command was refused with all these words in what it said."""
    missing = [part for part in parts if part not in ran.text]
    lines = [line for line in ran.text.splitlines() if parts and parts[0] in line]
    said = f"{ran.status}: {lines[-1].strip()[:220]}" if lines and not missing else last_line(ran)
    return Outcome(ran.refused and not missing, said if not missing else f"{said} (without {missing[0]!r})")


def both(place: Path, words: tuple[str, ...], folder: Path, *parts: str) -> Outcome:
    """Runs a command, and its dry run before it: both must refuse, and neither may begin the run in `folder`."""
    dry = refused_with(run(place, *words, "--dry-run"), *parts)
    seen = refused_with(run(place, *words), *parts)
    if not dry.right:
        return Outcome(False, f"the dry run: {dry.now}")
    if folder.exists():
        return Outcome(False, f"{seen.now}, but {folder.name} has been written")
    return Outcome(seen.right, f"dry run and start: {seen.now}")


def start_refused(name: str, *parts: str, overrides: tuple[str, ...] = ()) -> Callable[[Path], Outcome]:
    """Judges a training on the base of this name, which is to be refused, and leave no folder."""

    def look(place: Path) -> Outcome:
        words = (*TRAIN, f"name={name}", *(overrides or (f"model.base={name}",)))
        return both(place, words, place / "runs" / name, *parts)

    return look


def edited_scheduler(place: Path) -> Outcome:
    words = (*TRAIN, "name=live", "model.base=live")
    began = run(place, *words)
    if began.status:
        return Outcome(False, f"the first start: {last_line(began)}")
    edited = json.loads((place / "live" / "scheduler" / "scheduler_config.json").read_text())
    (place / "live" / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(edited | {"prediction_type": "epsilon"})
    )
    told = "the base's prediction_type was v_prediction at step 2 and is epsilon"
    dry = refused_with(run(place, *words, "max_steps=4", "--dry-run"), told)
    seen = refused_with(run(place, *words, "max_steps=4"), told)
    return Outcome(dry.right and seen.right, seen.now)


DRAWN = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
assert {part.dtype for part in parts} == {torch.float32}, [part.dtype for part in parts]
pipeline("a kcz dog", num_inference_steps=2, height=64, width=64)
print("loaded and drawn")
"""


def half_precision(place: Path) -> Outcome:
    trained = run(place, "controlbooth", "dreambooth", "run", "subjects.yaml", "dreambooth.yaml", "model.base=half")
    pipeline = place / "runs" / "case-subjects" / "subjects" / "rex" / "pipeline"
    loaded = run(place, sys.executable, "-c", DRAWN, str(pipeline))
    return Outcome(trained.status == 0 and "loaded and drawn" in loaded.text, last_line(loaded))


def long_identifier(place: Path) -> Outcome:
    words = ("controlbooth", "dreambooth", "run", "long.yaml", "dreambooth.yaml", "method=lora", "engine={}")
    folder = place / "runs" / "case-subjects"
    return both(place, words, folder, "rex: its instance_prompt has", "'kcz' is not among the first 24")


def stochastic_base(place: Path) -> Outcome:
    unequal = []
    for scheduler in ("ddim", "unipc", "dpm++", "euler"):
        drawn = []
        for number in (1, 2):
            out = place / f"drawn-{scheduler}-{number}"
            words = ("--control", "edges=controlnet", "--condition", "edges=edges.png", "--base", "sde")
            ran = run(place, "controlbooth", "sample", *words, "--scheduler", scheduler, "--count", "1", "-o", str(out))
            if ran.status:
                return Outcome(False, f"{scheduler}: {last_line(ran)}")
            drawn.append((out / "0000.png").read_bytes())
        if drawn[0] != drawn[1]:
            unequal.append(scheduler)
    return Outcome(not unequal, f"unequal: {unequal}" if unequal else "equal pictures with each of four samplers")


def card_of_pndm(place: Path) -> Outcome:
    """The script of the card, as it stands, draws with what the run samples with."""
    trained = run(place, *TRAIN, "name=pndm", "model.base=pndm")
    exported = run(place, "controlbooth", "export", "runs/pndm", "exported")
    if trained.status or exported.status:
        return Outcome(False, last_line(exported))
    card = (place / "exported" / "README.md").read_text()
    line = next((line for line in card.splitlines() if "from_config(pipeline.scheduler.config" in line), "none")
    return Outcome("clip_sample=False, thresholding=False" in line, line)


MISSING = ("renamed/text_encoder does not fit CLIPTextModel", "missing", "unknown", "encoder.blocks.0")
CASES = (
    Case(
        "inputs", "text encoder's tensors under other names", "bases.py",
        "silent: trains on random weights, others at every start", start_refused("renamed", *MISSING),
    ),
    Case(
        "inputs", "text encoder's tensor missing", "bases.py", "silent: the same",
        start_refused("lacking", "lacking/text_encoder", "the tensor encoder.layers.1.mlp.fc1.weight is missing"),
    ),
    Case(
        "inputs", "scheduler edited before a resume", "bases.py",
        "silent: goes on, the loss from .42 to 1.19", edited_scheduler,
    ),
    Case(
        "inputs", "only fp16 files, method=full", "bases.py",
        "silent: a pipeline that diffusers cannot load", half_precision,
    ),
    Case(
        "inputs", "identifier beyond the tokenizer's length", "bases.py",
        "silent: nothing is learned under that word", long_identifier,
    ),
    Case(
        "inputs", "--scheduler dpm++ of a stochastic base", "bases.py",
        "silent: another picture each time", stochastic_base,
    ),
    Case(
        "inputs", "flow-matching scheduler", "bases.py", "silent: read as DDPM",
        start_refused("flow", "the scheduler is a FlowMatchEulerDiscreteScheduler, which says flow matching"),
    ),
    Case(
        "inputs", "scheduler of a model card", "bases.py",
        "silent: the card clips latents to [-1, 1]", card_of_pndm,
    ),
    Case(
        "inputs", "ControlNet of other conditioning_channels", "bases.py",
        "late: a traceback out of the first step",
        start_refused("cond1", "its conditioning_channels is 1", overrides=("model.controlnet=cond1",)),
    ),
)  # fmt: skip
