"""`controlbooth report RUN ...`: one page that shows what a run was, how it went and whether it obeys.

Several runs stand side by side, on the same axes. The page needs no other file and no network: pictures and curves are
inside it. report.html is its template; here is gathered what it shows.
"""

import argparse
import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlbooth.data.arguments import quoted
from controlbooth.data.files.records import each, having, is_figure, is_text, is_whole, maybe, read_note
from controlbooth.data.files.whole import write_whole
from controlbooth.data.pages.rendering import render_page
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
from controlbooth.trainer.evaluation.opinions import read_opinions
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
TILE = 112
"""Pixels on the page of a picture of the evaluation."""
TEMPLATE = Path(__file__).with_name("report.html")


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth report` is asked, and returns its exit status."""
    first, *others = options.runs
    beside = "-".join(["report", *(run.resolve().name for run in others)])
    path = options.out or first / f"{beside}.html"
    write_report(options.runs, path)
    print(path)
    return 0


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Writes the page, whole or not at all. Raises ConfigError for a folder that is no run."""
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise ConfigError(
                f"{run} holds no config.yaml, so it is no run: give the folder that `controlbooth train` made"
            )
    most = MOST_STEPS if len(runs) == 1 else MOST_STEPS_BESIDE
    shown = [
        dict(
            heading=heading(run),
            obeys=obeys(run),
            curves=curves,
            fidelity=fidelity(run),
            opinions=read_opinions(run),
            strips=over_the_steps(run, most),
            ends=ends(run),
            configuration=configuration(run),
        )
        for run, curves in zip(runs, convergence(runs), strict=True)
    ]
    write_whole(path, render_page(TEMPLATE, runs=shown).encode())


def heading(run: Path) -> dict[str, Any]:
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
    return dict(name=config.name, facts=facts)


def obeys(run: Path) -> dict[str, Any]:
    """Returns the verdict in words, and a drawing of where the pictures stand between chance and the real ones."""
    verdict, measured = read_verdict(run), read_result(run / "evaluation", *SHOWN) or {}
    kind, largest = headline(verdict)
    told = describe_run(run)
    figure, shares = standing(measured, verdict)
    bound = bound_beyond(shares[WITHOUT]["mean"] if WITHOUT in shares else 0.0)
    evaluated = drawn = None
    if figure and WITH in shares and measured:
        share = shares[WITH]
        agrees = "obeys" if share["low"] > bound else "does not obey"
        seen = in_words(share["mean"], share["low"], share["high"])
        evaluated = (
            f"Evaluated at step {measured['step']} on {measured['samples']} held-out samples: {seen} of what is "
            f"possible in {title(figure)}: it {agrees}."
        )
    if shares:
        caption = f"{title(figure)}, from chance to the real pictures, with 95 % intervals"
        drawn = dict(caption=caption, svg=plot_standing(shares, WITH, bound))
    # What stands in backquotes is code: every second part.
    parts = re.split("`([^`]*)`", f"{told[:1].upper()}{told[1:]}.")
    return dict(kind=kind, headline=largest, told=parts, evaluated=evaluated, standing=drawn)


def headline(verdict: Verdict | None) -> tuple[str, str]:
    """Chooses the CSS class of the verdict's box, and the largest text in it."""
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
    """Finds (figure, share of what is possible by variant), from the evaluation or else from the last validation.

    Both are empty where neither has any.
    """
    own = measured.get("figures", {})
    told = [verdict.figure] if verdict and verdict.figure else []
    for figure in [*told, *FIGURES]:
        shares = {variant: one[figure]["share"] for variant, one in own.items() if "share" in one.get(figure, {})}
        if shares:
            return figure, shares
    if verdict and verdict.figure and verdict.last and np.isfinite(verdict.last.share):
        without = {end: verdict.last.without for end in ("mean", "low", "high")}
        return verdict.figure, {WITHOUT: without, WITH: share_at(verdict.last)}
    return "", {}


def convergence(runs: Sequence[Path]) -> list[list[str]]:
    """Returns each run's curves of its validations, as SVG, on the same axes; the named step is marked."""
    figures = [read_figures(run) for run in runs]
    losses = [{step: m["loss"] for step, _, m in read_metrics(run) if "loss" in m} for run in runs]
    last = max([step for curve in losses for step in curve] + [1])
    axes = {name: limits(f for own in figures for f in own if f.name == name) for own in figures for name in names(own)}
    parts = []
    for run, own, loss in zip(runs, figures, losses, strict=True):
        shared = [one for one in own if "_share" in one.series]
        drawn = [plot_shares(shared[0], read_verdict(run), last)] if shared else []
        drawn += [plot_figure(one, last, axes[one.name]) for one in own]
        drawn += [plot_loss(loss, last)] if loss else []
        parts.append(drawn)
    return parts


def names(figures: Sequence[Figure]) -> list[str]:
    return [one.name for one in figures]


def fidelity(run: Path) -> dict[str, Any]:
    result = read_result(run / "evaluation", *SHOWN)
    if not result:
        return dict(measured=False, run=quoted(run))
    sampler, figures = result["sampler"], result["figures"]
    what = (
        f"{result['samples']} held-out conditions at step {result['step']}; {sampler['scheduler']}, {sampler['steps']} "
        f"steps, guidance {sampler['guidance']:g}; 95 % bootstrap intervals"
    )
    return dict(
        measured=True,
        what=what,
        figures=figures,
        titles={name: title(name) for own in figures.values() for name in own},
        marked=WITH,
        beside=any("chance" in figure for own in figures.values() for figure in own.values()),
        sets=result["sets"],
        encoders=result["encoders"],
    )


def over_the_steps(run: Path, most: int) -> dict[str, Any] | None:
    """Makes a table of pictures: a row for each held-out condition, a column for each validation.

    most: how many validations are shown at most. Returns None where none has been drawn.
    """
    strips, verdict = read_strips(run / STRIPS), read_verdict(run)
    if strips is None or not strips.steps:
        return None
    announced = verdict.announced if verdict else None
    around = [announced.step, *([] if announced.after is None else [announced.after])] if announced else []
    columns = {"condition": strips.conditions, "target": strips.targets}
    columns |= {f"step {step}": strips.steps[step] for step in shown_steps(sorted(strips.steps), around, most)}
    rows = [
        dict(caption=caption, pictures=[encode_picture(images[row]) for images in columns.values()])
        for row, caption in enumerate(strips.captions)
    ]
    return dict(columns=list(columns), marked=f"step {announced.step}" if announced else None, rows=rows)


def shown_steps(steps: Sequence[int], around: Sequence[int], most: int) -> list[int]:
    """Chooses at most `most` of the validated steps, evenly spread.

    Those in `around`, between which control came, are always among them.
    """
    chosen = set(around) & set(steps)
    others = [step for step in steps if step not in chosen]
    count = min(len(others), most - len(chosen))
    return sorted({*chosen, *(others[i] for i in np.linspace(0, len(others) - 1, count).round().astype(int))})


def ends(run: Path) -> dict[str, Any]:
    """Reads the best and the worst pictures of the evaluation; returns nothing where none were chosen."""
    folder = run / "evaluation"
    chosen = read_note(folder / "ends.json", "Measure again by `controlbooth evaluate`", {"best": ENDS, "worst": ENDS})
    return {
        name: [
            dict(
                text=f"{one['figure'].replace('_', ' ')} {one['value']:.3f} · {one['caption']}",
                pictures=[encode_picture(np.asarray(Image.open(folder / "ends" / file))) for file in one["pictures"]],
            )
            for one in chosen[name]
        ]
        for name in ("best", "worst")
        if chosen
    }


def configuration(run: Path) -> dict[str, Any]:
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
    return dict(facts=facts, text=dump(config))


def encode_picture(image: np.ndarray) -> str:
    """Encodes a picture as PNG in base64, at most twice as wide and high as TILE, at which it is shown."""
    made = Image.fromarray(image)
    made.thumbnail((2 * TILE, 2 * TILE))
    data = io.BytesIO()
    made.save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()
