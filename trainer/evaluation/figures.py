"""What `controlbooth evaluate` prints: every figure for people, chance and the share of what is possible beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from controlbooth.trainer.evaluation.kinds import LOWER_IS_BETTER

OF_ALL_KINDS = ("edge_f1", "mask_iou")
"""Measured whatever a run is trained on; shown after the figures of the trained kind."""


def table(result: Mapping[str, Any]) -> str:
    """Writes an evaluation as text: a block for each figure of control, a table of prompt accuracy, and the remarks.

    result: as in evaluation.json.
    """
    figures = result["figures"]
    names = list(dict.fromkeys(name for own in figures.values() for name in own))
    control = [name for name in names if not name.startswith("says_")]
    control = [name for name in control if name not in OF_ALL_KINDS] + [n for n in OF_ALL_KINDS if n in control]
    step = "" if result["step"] is None else f", step {result['step']}"
    sampler = result["sampler"]
    lines = [
        f"{result['samples']} held-out conditions{step}; {sampler['scheduler']}, {sampler['steps']} steps, guidance "
        f"{sampler['guidance']:g}; means with 95 % intervals",
        "chance: the same pictures under the conditions of other samples; possible: (value - chance) / (real pictures "
        "- chance)",
    ]
    if result["samples"] == 1:
        lines[1] = "one held-out sample has no chance beside it: take more, up to all of the shards, with --samples"
    for name in control:
        lines += control_block(name, {variant: own[name] for variant, own in figures.items() if name in own})
    if says := [name for name in names if name.startswith("says_")]:
        lines += ["", *prompt_accuracy_block(says, figures)]
    return "\n".join([*lines, *remarks(result)])


def control_block(name: str, figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Writes one figure of control: a line for each variant of the pictures, with its value, chance and share."""
    lower = " (lower is better)" if name in LOWER_IS_BETTER else ""
    lines = ["", f"{title(name) + lower:<34}{'value':>20}{'chance':>20}{'possible':>24}"]
    for variant, one in figures.items():
        chance = cell(one["chance"]) if "chance" in one else "-"
        lines.append(f"  {variant:<32}{cell(one):>20}{chance:>20}{share_cell(one):>24}")
    told = [one for one in figures.values() if "chance" in one]
    if told and not any("share" in one for one in told):
        lines.append("  tells nothing here: real pictures are not certainly better than chance. More samples may help")
    return lines


def prompt_accuracy_block(names: Sequence[str], figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Writes the prompt accuracy: which share of what captions ask for pictures show.

    That of the real pictures and that of noise bound it.
    """
    width = max(map(len, figures)) + 4
    lines = ["prompt accuracy".ljust(width) + "".join(f"{title(name):>20}" for name in names)]
    for variant, own in figures.items():
        if any(name in own for name in names):
            cells = [cell(own[name]) if name in own else "-" for name in names]
            lines.append(f"  {variant}".ljust(width) + "".join(f"{one:>20}" for one in cells))
    return lines


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Writes the figures of whole sets of pictures, the verdict over the validations, and the speed, a line each."""
    lines = []
    for name, one in result["sets"].items():
        values = ", ".join(f"{variant} {value:.4f}" for variant, value in one["values"].items())
        note = one.get("note", "")
        lines.append(f"{name}: " + (f"{values} ({note})" if values and note else values or note))
    if result.get("told"):  # of a run
        lines.append(f"over the steps: {result['told']}")
    speed = result["speed"]
    if speed["drawn"]:
        rate = (
            f"{speed['drawn']} pictures in {speed['seconds']:.1f} s, {speed['drawn'] / speed['seconds']:.1f} a second"
        )
        lines.append(f"{rate}, on {speed['ranks']} rank{'s' * (speed['ranks'] > 1)}")
    return lines


def title(name: str) -> str:
    """Gives a figure's name for people: without `says_`, and with spaces for underscores."""
    return name.removeprefix("says_").replace("_", " ")


def cell(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.3f} ({figure['low']:.2f}-{figure['high']:.2f})"


def share_cell(figure: Mapping[str, Any]) -> str:
    if "share" not in figure:
        return "-"
    share = figure["share"]
    return f"{share['mean']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def evaluation_table(evaluation: Mapping[str, Any]) -> str:
    """Writes a Markdown table: a row for each figure, a column for each kind of pictures, and for chance and share."""
    variants, sampler = evaluation["figures"], evaluation["sampler"]
    names = list(dict.fromkeys(name for figures in variants.values() for name in figures))
    heads = ["figure", *variants]
    rows = [[_title(name), *(_with_interval(figures.get(name)) for figures in variants.values())] for name in names]
    controlled = variants["with control"]
    if any("chance" in figure for figure in controlled.values()):
        heads += ["chance, with control", "share of what is possible"]
        for row, name in zip(rows, names, strict=True):
            figure = controlled.get(name, {})
            row += [_with_interval(figure.get("chance")), _with_interval(figure.get("share"))]
    explained = (
        f"Of {evaluation['samples']} held-out conditions at {evaluation['resolution']} pixels ({sampler['scheduler']}, "
        f"{sampler['steps']} steps, guidance {sampler['guidance']:g}): means with 95 % bootstrap intervals. Chance is "
        "the figure of the same pictures under the conditions of other samples; the share of what is possible is "
        "(with control - chance) / (real pictures - chance)."
    )
    return f"{explained}\n\n{_markdown_table(heads, rows)}"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def _title(name: str) -> str:
    """Gives a figure's name for people: without `says_`, and with spaces for underscores."""
    return name.removeprefix("says_").replace("_", " ")


def _with_interval(figure: Mapping[str, float] | None) -> str:
    if not figure:
        return ""
    if "low" not in figure:
        return f"{figure['mean']:.3f}"
    return f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
