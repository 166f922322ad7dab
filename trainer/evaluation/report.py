"""`controlbooth report RUN ...`: one page that shows what a run was, how it went and whether it obeys.

Several runs stand side by side, on the same axes. The page needs no other file and no network: pictures and curves are
inside it.
"""

import argparse
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlbooth.data.arguments import quoted
from controlbooth.data.files.records import each, having, is_figure, is_text, is_whole, maybe, read_note
from controlbooth.data.files.whole import write_whole
from controlbooth.trainer.config.loading import dump, load_config
from controlbooth.trainer.config.run import data_set_name
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.curves import (
    Figure,
    limits,
    plot_figure,
    plot_loss,
    plot_shares,
    plot_standing,
    read_figures,
    share_at,
)
from controlbooth.trainer.evaluation.page import figures_table, page, picture, prose, side_by_side
from controlbooth.trainer.evaluation.record import read_result
from controlbooth.trainer.evaluation.strips import STRIPS, read_strips
from controlbooth.trainer.evaluation.verdict import (
    Verdict,
    bound_beyond,
    certain_low,
    describe_run,
    in_words,
    read_verdict,
    title,
)
from controlbooth.trainer.run.best import FIGURES
from controlbooth.trainer.run.checkpoint import complete_checkpoints, read_state
from controlbooth.trainer.tracking.spool import read_metrics

ANEW = "The next start writes it anew"
SHOWN = ("step", "samples", "figures", "sets", "sampler", "encoders")
"""Of an evaluation."""
SPEED = {"samples_per_second": is_figure, "peak_memory_gib": is_figure}
ENDS = each(having({"pictures": each(is_text), "figure": is_text, "value": is_figure, "caption": is_text}))
MOST_STEPS = 10
MOST_STEPS_BESIDE = 4
"""Of the pictures over the steps: of a run alone, and of each of several."""
WITH, WITHOUT = "with control", "without control"
"""Rows of an evaluation: the one that is asked about, and what the captions reach alone."""
NOT_MEASURED = (
    "<p>Not measured yet: <code>controlbooth evaluate {run}</code> measures control on more samples, beside random "
    "noise, the base alone and real pictures.</p>"
)
READING = (
    "<p><small>Each cell: the figure with its 95 % interval; what the same pictures score against the conditions of "
    "other samples (chance); and the share of what is possible, from 0 % at chance to 100 % at the real "
    "pictures.</small></p>"
)


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth report` is asked, and returns its exit status."""
    first, *others = options.runs
    beside = "-".join(["report", *(run.resolve().name for run in others)])
    path = options.out or first / f"{beside}.html"
    write_report(options.runs, path)
    print(path)
    return 0


def write_report(runs: Sequence[Path], path: Path) -> None:
    """The page, whole or not at all. Raises ConfigError for a folder that is no run."""
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise ConfigError(
                f"{run} holds no config.yaml, so it is no run: give the folder that `controlbooth train` made"
            )
    parts = [obeys, convergence, fidelity, over_the_steps, ends, configuration]
    sections = [part(runs) for part in parts]
    names = [load_config(run / "config.yaml").name for run in runs]
    made = page(" and ".join(names), heading(runs), [one for one in sections if one], wide=len(runs) > 1)
    write_whole(path, made.encode())


def heading(runs: Sequence[Path]) -> str:
    return f"<header>{side_by_side([_heading(run) for run in runs])}</header>"


def _heading(run: Path) -> str:
    config = load_config(run / "config.yaml")
    speed = read_note(run / "speed.json", ANEW, SPEED)
    status = read_note(run / "status.json", ANEW, {"state": maybe(is_text), "step": maybe(is_whole)})
    facts = [
        f"ControlNet for {config.data.condition_name} on {config.model.base}",
        f"{status.get('state') or 'not started'} at step {status.get('step') or 0:,} of {config.max_steps:,}",
        f"{config.global_batch_size} samples a step",
    ]
    if speed:
        facts.append(f"{speed['samples_per_second']:.1f} samples/s, {speed['peak_memory_gib']:.2f} GiB a rank")
    return f"<h1>{html.escape(config.name)}</h1><p>{html.escape(' · '.join(facts))}</p>"


def obeys(runs: Sequence[Path]) -> str:
    """The verdict, and where the pictures stand between chance and the real ones."""
    boxes, drawn = zip(*map(_obeys, runs), strict=True)
    return f"<h2>Does it obey?</h2>{side_by_side(boxes)}{side_by_side(drawn)}"


def _obeys(run: Path) -> tuple[str, str]:
    """(the box with the verdict, the drawing below it)."""
    verdict, measured = read_verdict(run), read_result(run / "evaluation", *SHOWN) or {}
    kind, largest = headline(verdict)
    told = f"<p>{prose(describe_run(run))}.</p>"
    figure, shares = standing(measured, verdict)
    bound = bound_beyond(shares[WITHOUT]["mean"] if WITHOUT in shares else 0.0)
    if figure and WITH in shares and measured:
        share = shares[WITH]
        agrees = "obeys" if share["low"] > bound else "does not obey"
        seen = in_words(share["mean"], share["low"], share["high"])
        told += (
            f"<p>Evaluated at step {measured['step']} on {measured['samples']} held-out samples: {seen} of what is "
            f"possible in {html.escape(title(figure))}: it {agrees}.</p>"
        )
    drawn = ""
    if shares:
        caption = f"{title(figure)}, from chance to the real pictures, with 95 % intervals"
        drawn = f'<h3>{html.escape(caption)}</h3><div class="standing">{plot_standing(shares, WITH, bound)}</div>'
    return f'<div class="told {kind}"><b>{largest}</b>{told}</div>', drawn


def headline(verdict: Verdict | None) -> tuple[str, str]:
    """(class of the box, what is written in it largest)."""
    if verdict is None or verdict.last is None:
        return "unknown", "Not known whether it obeys"
    if verdict.announced:
        return "obeys", f"It obeys, from step {verdict.announced.step:,} on"
    if verdict.events:
        return "withdrawn", "It obeyed, and does no longer"
    if certain_low(verdict.last, verdict.samples) > verdict.last.bound:
        return "unknown", "It may obey: too few validations say so"
    return "not", "It does not obey" if np.isfinite(verdict.last.share) else "Not known whether it obeys"


def standing(measured: dict[str, Any], verdict: Verdict | None) -> tuple[str, dict[str, dict[str, float]]]:
    """(figure, share of what is possible by way): of the evaluation, or else of the last validation."""
    own = measured.get("figures", {})
    told = [verdict.figure] if verdict and verdict.figure else []
    for figure in [*told, *FIGURES]:
        shares = {way: one[figure]["share"] for way, one in own.items() if "share" in one.get(figure, {})}
        if shares:
            return figure, shares
    if verdict and verdict.figure and verdict.last and np.isfinite(verdict.last.share):
        without = {end: verdict.last.without for end in ("mean", "low", "high")}
        return verdict.figure, {WITHOUT: without, WITH: share_at(verdict.last)}
    return "", {}


def convergence(runs: Sequence[Path]) -> str:
    """The curves of the validations, the runs on the same axes; the named step is marked."""
    figures = [read_figures(run) for run in runs]
    losses = [{step: m["loss"] for step, _, m in read_metrics(run) if "loss" in m} for run in runs]
    last = max([step for curve in losses for step in curve] + [1])
    axes = {name: limits(f for own in figures for f in own if f.name == name) for own in figures for name in names(own)}
    parts = []
    for run, own, loss in zip(runs, figures, losses, strict=True):
        drawn = []
        shared = [one for one in own if "_share" in one.series]
        if shared:
            drawn.append(plot_shares(shared[0], read_verdict(run), last))
        drawn += [plot_figure(one, last, axes[one.name]) for one in own]
        drawn += [plot_loss(loss, last)] if loss else []
        parts.append(f'<div class="curves">{"".join(drawn)}</div>' if drawn else "<p>nothing was logged</p>")
    return f"<h2>Over the steps</h2>{side_by_side(parts)}"


def names(figures: Sequence[Figure]) -> list[str]:
    return [one.name for one in figures]


def fidelity(runs: Sequence[Path]) -> str:
    return f"<h2>Fidelity</h2>{side_by_side([_fidelity(run) for run in runs])}"


def _fidelity(run: Path) -> str:
    result = read_result(run / "evaluation", *SHOWN)
    if not result:
        return NOT_MEASURED.format(run=html.escape(quoted(run)))
    sampler = result["sampler"]
    what = (
        f"{result['samples']} held-out conditions at step {result['step']}; {sampler['scheduler']}, {sampler['steps']} "
        f"steps, guidance {sampler['guidance']:g}; 95 % bootstrap intervals"
    )
    sets = "".join(
        f"<tr><td>{html.escape(name)}<td>{', '.join(f'{html.escape(w)} {v:.4f}' for w, v in one['values'].items())}"
        f"<td><small>{html.escape(one.get('note') or '')}</small>"
        for name, one in result["sets"].items()
    )
    encoders = "<br>".join(f"{html.escape(name)}: {html.escape(text)}" for name, text in result["encoders"].items())
    beside = any("chance" in figure for own in result["figures"].values() for figure in own.values())
    old = "<p>Measured before chance was: evaluate again to have it beside each figure.</p>"
    beside_them = f"<h3>Sets of pictures</h3><table>{sets}</table><p><small>{encoders}</small></p>" if sets else ""
    return (
        f"<p><small>{html.escape(what)}</small></p>{figures_table(result['figures'], WITH)}{READING if beside else old}"
        f"{beside_them}"
    )


def over_the_steps(runs: Sequence[Path]) -> str:
    """One row a held-out condition, one column a validation."""
    most = MOST_STEPS if len(runs) == 1 else MOST_STEPS_BESIDE
    parts = [_over_the_steps(run, most) for run in runs]
    return f"<h2>Pictures over the steps</h2>{side_by_side(parts)}" if any(parts) else ""


def _over_the_steps(run: Path, most: int) -> str:
    strips, verdict = read_strips(run / STRIPS), read_verdict(run)
    if strips is None or not strips.steps:
        return ""
    announced = verdict.announced if verdict else None
    around = [announced.step, *([] if announced.after is None else [announced.after])] if announced else []
    columns = {"condition": strips.conditions, "target": strips.targets}
    columns |= {f"step {step}": strips.steps[step] for step in shown_steps(sorted(strips.steps), around, most)}
    mark = f"step {announced.step}" if announced else None
    head = "".join(f'<th class="mark">{name}' if name == mark else f"<th>{name}" for name in columns)
    rows = "".join(
        f'<tr><td class="caption">{html.escape(caption)}'
        + "".join(f"<td>{picture(images[row])}" for images in columns.values())
        for row, caption in enumerate(strips.captions)
    )
    return f'<div class="grid"><table><tr><th>{head}{rows}</table></div>'


def shown_steps(steps: Sequence[int], around: Sequence[int], most: int) -> list[int]:
    """At most so many of the validated steps, evenly spread, with those between which control came."""
    chosen = set(around) & set(steps)
    others = [step for step in steps if step not in chosen]
    count = min(len(others), most - len(chosen))
    return sorted({*chosen, *(others[i] for i in np.linspace(0, len(others) - 1, count).round().astype(int))})


def ends(runs: Sequence[Path]) -> str:
    parts = [_ends(run) for run in runs]
    return side_by_side(parts) if any(parts) else ""


def _ends(run: Path) -> str:
    """Best and worst pictures of the evaluation."""
    folder = run / "evaluation"
    chosen = read_note(folder / "ends.json", "Measure again by `controlbooth evaluate`", {"best": ENDS, "worst": ENDS})
    if not chosen:
        return ""
    parts = []
    for name in ("best", "worst"):
        figures = []
        for one in chosen[name]:
            pictures = "".join(picture(np.asarray(Image.open(folder / "ends" / file))) for file in one["pictures"])
            text = f"{one['figure'].replace('_', ' ')} {one['value']:.3f} · {one['caption']}"
            figures.append(f"<figure><div>{pictures}</div><figcaption>{html.escape(text)}</figcaption></figure>")
        parts.append(f'<h2>{name.capitalize()} samples</h2><div class="ends">{"".join(figures)}</div>')
    return "<p><small>condition, with control, target</small></p>" + "<br>".join(parts)


def configuration(runs: Sequence[Path]) -> str:
    return f"<h2>Configuration</h2>{side_by_side([_configuration(run) for run in runs])}"


def _configuration(run: Path) -> str:
    config = load_config(run / "config.yaml")
    whole = complete_checkpoints(run)
    facts = {"data": data_set_name(config), "held out": config.data.held_out or "nothing"}
    if whole:
        state = read_state(whole[-1])
        facts |= {
            "data fingerprint": state["dataset_fingerprint"],
            "base digest": state["base_digest"],
            "weights digest": state["digest"],
            "checkpoint": f"{whole[-1].name}, {state['precision']}, ZeRO-{state['zero_stage']}, "
            f"{state['world_size']} ranks",
        }
    rows = "".join(f"<tr><th>{name}<td>{html.escape(str(value))}" for name, value in facts.items())
    text = html.escape(dump(config))
    return f"<table>{rows}</table><details><summary>all of it</summary><pre>{text}</pre></details>"
