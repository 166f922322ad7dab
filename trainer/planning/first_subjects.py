"""The first run file of DreamBooth subjects that `controlbooth init --subjects` writes."""

import argparse

import yaml

from controlbooth.data.arguments import quoted
from controlbooth.data.errors import UserError
from controlbooth.models.families import FAMILIES
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.manifest import load_subjects
from controlbooth.trainer.engine.deepspeed import cpu_multiplies_bf16
from controlbooth.trainer.planning.accelerators import card_to_fit
from controlbooth.trainer.planning.commented import Line, commented
from controlbooth.trainer.planning.first_base import Base, say
from controlbooth.trainer.planning.subjects import best_stack, stack_choices
from controlbooth.trainer.planning.subjects_report import subject_speed


def subjects_file(options: argparse.Namespace, base: Base, card_name: str) -> tuple[str, list[str]]:
    """Makes the text of a run file of subjects; -> the text, and the lines to print.

    Raises UserError where the manifest has no subject that can be trained, and where not one fits the card.
    """
    subjects, faults = load_subjects(options.subjects)
    for name, fault in faults.items():
        say(f"warning: {name} is left out: {fault}")
    if not subjects:
        raise UserError(f"{options.subjects} has no subject that can be trained: see above")
    card = card_to_fit(card_name)
    precision = "bf16" if card.kind == "cuda" or cpu_multiplies_bf16() else "fp32"
    lines = subject_lines(options.out.stem, base)
    config = SubjectRunConfig.model_validate(yaml.safe_load(commented(lines)))
    say("steps of one and of two subjects on fake tensors")
    speed, source = subject_speed(card)
    share = -(-len(subjects) // options.gpus)
    choices = stack_choices(config, card, precision, speed, base.shapes, share)
    chosen = best_stack(choices)
    if chosen is None:
        least = min(choices, key=lambda one: one.needed_bytes)
        raise UserError(
            f"not one subject at {config.resolution} px fits {card_name}: it takes "
            f"{least.needed_bytes / 2**30:.1f} GiB. Give a larger --card"
        )
    lines.append(
        Line(
            "subjects_per_batch", chosen.subjects, f"trained together on a card: {chosen.needed_bytes / 2**30:.1f} GiB"
        )
    )
    if chosen.gradient_checkpointing:
        why = "activations are computed again: about a third more work, and less memory"
        lines.append(Line("model.gradient_checkpointing", True, why))
    for name, value in chosen.frozen.asked().items():
        why = "not one subject fits with the whole base on the card; extra `quantized`" if "precision" in name else ""
        lines.append(Line(name, value, why or "nor with all of it there: its blocks wait in host memory"))
    text = commented(lines)
    SubjectRunConfig.model_validate(yaml.safe_load(text))
    steps = sum(subject.steps or config.steps for subject in subjects)
    hours = steps / options.gpus / chosen.subject_steps_per_second / 3600
    run, manifest = quoted(options.out), quoted(options.subjects)
    told = [
        f"wrote {options.out}: {len(subjects)} subjects on {base.name}, {config.resolution} px",
        f"time  {steps:,} steps of single subjects take {hours:.1f} hours on {options.gpus} x {card.title}, class "
        f"pictures besides: estimated, speed {source}",
        "next",
    ]
    if any(subject.identifier is None for subject in subjects):
        told.append(f"  controlbooth dreambooth identifiers {quoted(base.name)}    words for `identifiers` in the file")
    processes = f" --processes {options.gpus}" if options.gpus > 1 else ""
    shapes = f" --shapes {base.shapes}" if base.shapes else ""
    told += [
        f"  controlbooth plan {run} --subjects {manifest} --fit {quoted(card_name)} --gpus {options.gpus}{shapes}",
        f"  controlbooth dreambooth run {manifest} {run}{processes} --dry-run",
        f"  controlbooth dreambooth run {manifest} {run}{processes}",
    ]
    return text, told


def subject_lines(name: str, base: Base) -> list[Line]:
    """Makes the lines of a run of subjects before the plan has added to them."""
    small = base.is_small
    shipped = "as the shipped run on the built-in base has it"
    unet = not FAMILIES[base.family].is_transformer
    lines = [
        Line("name", name, "names the folder of the run below runs/"),
        Line("resolution", base.side, "the side that the base draws, at which class pictures are drawn too"),
        Line("steps", 400 if small else 1000, shipped if small else "the paper's: about 1000 of each subject"),
        Line("learning_rate", 1e-3 if small else 1e-4,
             shipped if small else "of LoRA; all layers (method: full) take the paper's 5e-6"),
        Line("checkpoint_every_steps", 100, "what a kill costs at most"),
        Line("model.base", base.name, "what learns the subjects; its own weights stay as they are"),
        Line("adapter.rank", 8, "small files; 4 is diffusers' default, more learns finer detail and overfits sooner"),
        Line("prior.weight", 1.0, "lambda of the paper: keeps the class from becoming the subject"),
        Line("prior.images", 64 if small else 200, "class pictures, which the base draws first; the paper: about 1000"),
    ]  # fmt: skip
    if small and unet:
        lines.append(Line("adapter.layers", "attention+convolutions", "attention alone learns no colours here"))
        lines.append(Line("prior.sampling_steps", 20, shipped))
        lines.append(Line("prior.guidance_scale", 2.0, "what suits the built-in base"))
    return lines
