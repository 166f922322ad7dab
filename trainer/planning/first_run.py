"""`controlbooth init`: a first run file, with a reason in each line.

What fits and how fast it is comes from the plan; learning rates and steps from arXiv 2302.05543 (ControlNet) and
2208.12242 (DreamBooth) and from how many samples there are. The built-in base, which is small and was trained on
scenes, has the numbers of the shipped runs on it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import yaml

from controlbooth.data.arguments import quoted
from controlbooth.data.condition_names import COMPUTED
from controlbooth.data.errors import UserError
from controlbooth.data.files.whole import write_whole
from controlbooth.data.packing.folders import files_below, is_picture
from controlbooth.data.shards.manifest import find_shards, open_dataset
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import ValidationConfig
from controlbooth.trainer.planning.commented import Line, commented
from controlbooth.trainer.planning.first_base import Base, base_of, say

CONTROLNET_RATE, SMALL_RATE = 1e-5, 3e-4
MEASURED = ValidationConfig.model_fields["samples"].default
"""Held-out samples that a validation draws where a run says nothing."""
EPOCHS = 100
"""After which a small data set has been seen often enough."""


@dataclass(frozen=True)
class Data:
    """What a run is to be trained on."""

    shards: str
    held_out: str | None
    condition: str
    samples: int
    why_condition: str
    held_out_samples: int | None = None
    """None where it is not known."""
    pack: str | None = None
    """The command that writes the shards; None where they are there."""


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth init` is asked, and returns its exit status.

    Raises UserError where the file is there already, for data that is neither shards nor pictures, for a base of which
    nothing is known, and where nothing fits the card.
    """
    if options.out.exists():
        raise UserError(f"{options.out} is there already, and is not overwritten: give another name by -o")
    if (options.data is None) == (options.subjects is None):
        raise UserError("give DATA, shards or a folder of pictures, or --subjects MANIFEST, and not both")
    base = base_of(options.base, options.shapes)
    if options.subjects:
        from controlbooth.trainer.planning.first_subjects import subjects_file

        text, told = subjects_file(options, base, options.card or card_here())
    else:
        text, told = controlnet_file(options, data_of(options.data), base, options.card or card_here())
    write_whole(options.out, text.encode())
    print("\n".join(told))
    return 0


def card_here() -> str:
    """Names the card of this machine as --card does: cpu where there is none."""
    import torch

    from controlbooth.trainer.planning.accelerators import ACCELERATORS, is_card

    if not torch.cuda.is_available():
        return "cpu"
    device = torch.cuda.get_device_name(0)
    known = next((name for name, card in ACCELERATORS.items() if is_card(card, device)), None)
    return known or f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}GiB"


def data_of(path: Path) -> Data:
    """Finds what is at a place: shards, those of `data pack --held-out` in train and held-out, or pictures.

    Raises UserError where there is neither.
    """
    if not path.exists() and not any(sign in str(path) for sign in "*{"):
        raise UserError(f"{path} does not exist: give shards of `controlbooth data pack`, or a folder of pictures")
    inner = path / "train"
    shards = inner if _has_shards(inner) else path
    if _has_shards(shards):
        dataset = open_dataset(shards)
        kinds: dict[str, int] = {}
        for row in dataset.rows:
            for kind, count in row.conditions.items():
                kinds[kind] = kinds.get(kind, 0) + count
        beside = shards.parent / "held-out"
        held_out = str(beside) if shards.name == "train" and _has_shards(beside) else None
        stored = max(kinds, key=lambda kind: kinds[kind], default=None)
        why = "the shards hold it" if stored else "the shards hold none: edges are made of each picture while loading"
        samples = sum(row.usable for row in dataset.rows)
        held = sum(row.usable for row in open_dataset(beside).rows) if held_out else None
        return Data(str(shards), held_out, stored or f"{COMPUTED}canny", samples, why, held)
    pictures = [one for one in files_below(path) if is_picture(one)] if path.is_dir() else []
    if not pictures:
        raise UserError(f"{path} holds neither tar shards nor pictures: give what `controlbooth data pack` has written")
    out = f"{path.resolve().name}-shards"
    captioned = any(one.with_suffix(".txt").is_file() for one in pictures)
    held = max(MEASURED, round(0.05 * len(pictures)))
    if len(pictures) <= held:
        raise UserError(f"{path} holds {len(pictures)} pictures, and {held} are held out to measure control: give more")
    words = ["controlbooth", "data", "pack", path, "-o", out, "--held-out", str(held)]
    words += [] if captioned else ["--caption", "a photo of a {folder}"]
    pack = " ".join(map(quoted, words))
    why = "edges are made of each picture while loading, which needs nothing packed"
    samples = len(pictures) - held
    return Data(f"{out}/train", f"{out}/held-out", f"{COMPUTED}canny", samples, why, held, pack)


def _has_shards(path: Path) -> bool:
    try:
        return bool(find_shards(path))
    except (OSError, ValueError):
        return False


def batch_and_steps(samples: int, gpus: int, is_small: bool) -> tuple[int, int, str, str]:
    """Chooses the global batch and the steps by the papers and the size of the data, each with its reason.

    The batch is a multiple of the cards.
    """
    if is_small:
        wanted, why = 16, "as the shipped runs on the built-in base have it"
    elif samples >= 10_000:
        wanted, why = (
            64,
            "the authors advise 64 to 128 by accumulation rather than more steps; beyond 256 nothing gains",
        )
    else:
        wanted, why = 32, "of a small data set: the authors advise 64 to 128 for large ones"
    batch = -(-wanted // gpus) * gpus
    least, most = (100, 1000) if is_small else (1000, 10_000)
    steps = min(most, max(least, EPOCHS * samples // batch))
    seen = steps * batch / samples
    reason = f"{samples:,} samples are seen {seen:.3g} times"
    if not is_small:
        reason += "; control sets in suddenly, usually before step 10,000, and the loss does not show it"
    return batch, steps, why, reason


def controlnet_file(options: argparse.Namespace, data: Data, base: Base, card: str) -> tuple[str, list[str]]:
    """Makes the text of a run file of a ControlNet; -> the text, and the lines to print.

    Raises UserError where nothing fits the card.
    """
    from controlbooth.trainer.planning.accelerators import Layout, card_to_fit, with_nodes
    from controlbooth.trainer.planning.fit import find_fit

    batch, steps, why_batch, why_steps = batch_and_steps(data.samples, options.gpus, base.is_small)
    layout = with_nodes(Layout(card_to_fit(card), 1, 1), options.gpus)
    tried: list[str] = []
    for side, method in tries(base):
        lines = first_lines(options.out.stem, data, base, side, method, (batch, steps, why_batch, why_steps))
        config = build_config(yaml.safe_load(commented(lines)))
        fit = find_fit(config, layout, base.shapes, say)
        if fit.chosen:
            break
        tried.append(f"{side} px, model.method={method}: {fit.least.choice.needed_bytes / 2**30:.1f} GiB at least")
    else:
        raise UserError(f"nothing fits {card}: {'; '.join(tried)}. Give a larger --card, or more --gpus")
    chosen, seconds = fit.chosen, fit.chosen.seconds
    fits = f"of {layout.accelerator.memory_bytes / 2**30:.1f} GiB it takes {chosen.choice.needed_bytes / 2**30:.1f}"
    changed = dict(one.split("=", 1) for one in chosen.changes)
    reasons = {
        "micro_batch_size": f"samples that a card computes at once, by the plan: {fits}",
        "model.gradient_checkpointing": "activations are computed again: about a third more work, and less memory",
        "model.frozen.precision": "the frozen base in fewer bits, without which it fits less or is slower",
        "model.frozen.shards": "each card holds a share of the frozen base; results are the same, bit for bit",
        "model.frozen.stream": "the frozen base waits in host memory; results are the same, bit for bit",
        "engine.zero_stage": "what of the optimizer, gradients and weights is split over the cards",
        "engine.offload_optimizer": "the optimizer's states are in host memory: slower, and it fits",
        "engine.activations": "activations wait in host memory: slower, and it fits",
        "optimizer.name": "moments of 8 bits: with AdamW's own nothing fits",
    }
    lines = [line for line in lines if line.field not in changed]
    lines += [Line(field, yaml.safe_load(value), reasons[field]) for field, value in changed.items()]
    text = commented(lines)
    made = build_config(yaml.safe_load(text))
    assert made == chosen.config, "the file says another run than was planned"
    hours = steps * seconds / 3600
    price = hours * layout.ranks * layout.accelerator.price
    time = f"{steps:,} steps of {seconds:.2f} s take {hours:.1f} hours" + (f" and ${price:,.0f}" if price else "")
    time += f" on {layout.ranks} x {layout.accelerator.title}: estimated, speed {fit.speed_source}"
    if layout.accelerator.kind == "cpu":  # whose speed is a guess, which can be many times too slow
        time = f"{steps:,} steps; how long they take on this processor, `controlbooth train` shows after some of them"
    told = [
        f"wrote {options.out}: {base.name}, {data.condition}, {made.data.resolution} px, {data.samples:,} samples",
        f"time  {time}",
        *(f"note  {one} do not fit" for one in tried),
        "next",
    ]  # fmt: skip
    if data.pack:
        told.append(f"  {data.pack}")
    shapes = f" --shapes {base.shapes}" if base.shapes else ""
    file = quoted(options.out)
    processes = f" --processes {options.gpus}" if options.gpus > 1 else ""
    told += [
        f"  controlbooth plan {file} --fit {quoted(card)} --gpus {options.gpus}{shapes}",
        f"  controlbooth train {file}{processes} --dry-run",
        f"  controlbooth train {file}{processes}",
        f"  controlbooth report {quoted(made.output / made.name)}",
    ]
    return text, told


def tries(base: Base) -> list[tuple[int, str]]:
    """Lists (side in pixels, model.method) in the order in which they are tried on a card."""
    sides = [base.side] + ([512] if base.side > 512 else [])
    from controlbooth.models.families import FAMILIES

    methods = ["full"] if FAMILIES[base.family].is_transformer else ["full", "lora"]
    return [(side, method) for side in sides for method in methods]


def first_lines(
    name: str, data: Data, base: Base, side: int, method: str, chosen: tuple[int, int, str, str]
) -> list[Line]:
    """Makes the lines of a run before the plan has changed them. chosen: as `batch_and_steps` returns it."""
    batch, steps, why_batch, why_steps = chosen
    often = max(1, steps // 10)
    lines = [
        Line("name", name, "names the folder of the run below runs/"),
        Line("max_steps", steps, why_steps),
        Line("global_batch_size", batch, why_batch),
        Line("micro_batch_size", 1, "samples that a card computes at once; the plan found no larger one faster"),
        Line("model.base", base.name, "what the ControlNet is copied from and drawn with; it stays as it is"),
    ]
    if base.family == "miniature":
        lines.append(Line("model.hint_channels", [16, 32, 64, 96], "widths that this small base was tuned with"))
    if method == "lora":
        lines.append(Line("model.method", "lora", "a whole copy does not fit: low-rank differences of it do"))
    lines += [
        Line("data.shards", data.shards, "what is trained on"),
        Line("data.condition", data.condition, data.why_condition),
        Line("data.resolution", side,
             "the side that the base draws" if side == base.side else f"the base draws {base.side}, which fits not"),
        Line("data.prompt_dropout", 0.5, "half of the prompts are left empty, so that the condition itself is read"),
        Line("optimizer.learning_rate", SMALL_RATE if base.is_small else CONTROLNET_RATE,
             "as the shipped runs on the built-in base have it" if base.is_small else "that of the ControlNet paper"),
        Line("engine.precision", "auto", "bf16 where the device multiplies in it, as cards of the plan do"),
        Line("checkpoint.every_steps", often, "ten in the run: what a kill costs at most"),
    ]  # fmt: skip
    if data.held_out:
        lines.append(Line("data.held_out", data.held_out, "never trained on; control is measured there"))
        lines.append(Line("validation.every_steps", often, "shows when control sets in"))
        if data.held_out_samples is not None and data.held_out_samples < MEASURED:
            lines.append(Line("validation.samples", data.held_out_samples, "all that are held out"))
    if base.is_small:
        lines.append(Line("validation.guidance_scale", 2.0, "what suits the built-in base"))
        lines.append(Line("validation.sampling_steps", 10, "enough for the built-in base, and quick"))
    return lines
