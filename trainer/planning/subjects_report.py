"""`controlbooth plan --subjects`: how many subjects fit a card at a time, how long all take, and the overrides."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from controlbooth.data.arguments import quoted
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.engine.deepspeed import cpu_multiplies_bf16
from controlbooth.trainer.planning.accelerators import Accelerator
from controlbooth.trainer.planning.calibration import SHIPPED, Measured, rows_for
from controlbooth.trainer.planning.choices import known_footprint, measured_speed
from controlbooth.trainer.planning.speed import UNMEASURED, Speed
from controlbooth.trainer.planning.subjects import StackChoice, best_stack, rows_of, stack_choices

GIB = 2**30


def subject_speed(card: Accelerator) -> tuple[Speed, str]:
    """Returns the speed that stacks are planned by, and by what it is known: the steps of ControlNets."""
    if card.kind == "cpu":
        return UNMEASURED["cpu"], "not measured, but assumed"
    rows = rows_for(card, SHIPPED)
    measured = Measured(rows, rows[0], card)
    speed = measured_speed(known_footprint(measured), measured, UNMEASURED["cuda"])
    return speed, "by measured steps of ControlNets; no step of subjects was measured on a GPU"


def plan_subjects(
    config: SubjectRunConfig,
    manifest: Path,
    steps: Sequence[int],
    card: Accelerator,
    ranks: int,
    shapes: str | None,
    run: str,
    overrides: Sequence[str],
    say: Callable[[str], None],
) -> tuple[list[str], bool]:
    """Plans a run of subjects; -> the lines to print, and whether some number of them fits.

    steps: of each subject of the manifest. ranks: cards, each of which trains its share. run, overrides: as the command
    line has them.
    """
    say("steps of one and of two subjects on fake tensors, without and with gradient checkpointing")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if card.kind == "cuda" or cpu_multiplies_bf16() else "fp32"
    speed, source = subject_speed(card)
    share = math.ceil(len(steps) / ranks)
    choices = stack_choices(config, card, precision, speed, shapes, share)
    chosen = best_stack(choices)
    lines = [
        f"{config.name}: {len(steps)} subjects, LoRA of rank {config.adapter.rank} on {config.adapter.layers}, "
        f"{config.resolution} px, {precision}, shapes of {shapes or config.model.base}, {rows_of(config)} rows a "
        f"subject; {ranks} x {card.memory_bytes / GIB:.1f} GiB, {card.title}",
        f"speed: {source}: estimated",
        "",
        f"{'subjects':>10}{'base':>12}{'checkpointing':>15}{'GiB':>7}{'s a step':>10}{'subject steps/s':>17}"
        f"{'all, hours':>12}",
    ]
    lines += [_row(one, steps, ranks, one is chosen) for one in choices]
    lines += ["", "drawing class pictures and validations come on top"]
    if chosen is None:
        least = min(choices, key=lambda one: one.needed_bytes)
        name, size = max(least.memory.device.items(), key=lambda item: item[1])
        lines.append(
            f"nothing fits, with a base in nf4 and streamed neither: one subject takes "
            f"{least.needed_bytes / GIB:.1f} GiB, of which {name} {size / GIB:.1f}; "
            "what would help: a smaller resolution, model.t5=false on SD3, another base"
        )
        return lines, False
    again = chosen.gradient_checkpointing
    changes = [f"subjects_per_batch={chosen.subjects}"] if chosen.subjects != config.subjects_per_batch else []
    if again != config.model.gradient_checkpointing:
        changes.append(f"model.gradient_checkpointing={str(again).lower()}")
    if chosen.frozen != config.model.frozen:
        changes += [f"{name}={value}" for name, value in chosen.frozen.asked().items()]
    command = ["controlbooth", "dreambooth", "run", manifest, run, *overrides, *changes]
    return [*lines, " ".join(map(quoted, command))], True


def base_in_words(one: StackChoice) -> str:
    """Says how the base is held: its precision, with + where it is streamed."""
    return one.frozen.precision + (" + cpu" if one.frozen.stream == "cpu" else "")


def _row(one: StackChoice, steps: Sequence[int], ranks: int, chosen: bool) -> str:
    hours = sum(steps) / ranks / one.subject_steps_per_second / 3600
    mark = "  chosen" if chosen else "" if one.fits else "  does not fit"
    again = "yes" if one.gradient_checkpointing is True else str(one.gradient_checkpointing).replace("False", "no")
    return (
        f"{one.subjects:10}{base_in_words(one):>12}{again:>15}{one.needed_bytes / GIB:7.1f}{one.seconds:10.3f}"
        f"{one.subject_steps_per_second:17.2f}{hours:12.2f}{mark}"
    )
