"""`controlbooth report RUN`: one page that shows what a run was, how it went and what it can do.

The page needs no other file and no network: pictures and curves are inside it.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlbooth.data.sidecar import write_whole
from controlbooth.trainer import command_lines
from controlbooth.trainer.checkpoint import complete_checkpoints, read_state
from controlbooth.trainer.config import ConfigError, data_set_name, dump, load_config
from controlbooth.trainer.evaluate.convergence import FIGURES, Convergence, describe, find_convergence, validation_curve
from controlbooth.trainer.evaluate.strips import STRIPS, read_strips
from controlbooth.trainer.spool import read_metrics

SHOWN = 6
"""Pictures from the best and from the worst end."""
MOST_STEPS = 10
TILE = 112

_STYLE = """
:root { color-scheme: light; --ink: #1d2530; --soft: #5b6675; --line: #e3e7ec; --mark: #0f766e }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: var(--ink); background: #f6f7f9 }
main { max-width: 74rem; margin: 2rem auto; padding: 0 1.2rem }
header h1 { margin: 0; font-size: 1.7rem } header p { color: var(--soft); margin: .2rem 0 1.4rem }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.3rem }
section { margin: 0 0 1.1rem; overflow-x: auto }
h2 { font-size: 1.1rem; margin: 0 0 .6rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 } td.figure, th.figure { text-align: right } small { color: var(--soft) }
.told { border-left: 4px solid var(--mark); padding: .2rem .8rem; margin: 0 0 .9rem; background: #f0fdfa }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
.curves svg { width: 100%; height: auto }
.grid { overflow-x: auto } .grid td, .grid th { padding: 2px 3px; border: 0; text-align: center; font-size: 12px }
.grid img, .ends img { width: 112px; height: 112px; image-rendering: pixelated; border-radius: 4px; display: block }
.grid img { width: 72px; height: 72px }
.grid td.caption { text-align: left; width: 8.5rem; min-width: 8.5rem; color: var(--soft); vertical-align: middle }
.ends { display: flex; flex-wrap: wrap; gap: .9rem } figure { margin: 0 } figure div { display: flex; gap: 3px }
figcaption { font-size: 12px; max-width: 346px; color: var(--soft) } summary { cursor: pointer }
pre { font-size: 12.5px; overflow-x: auto }
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_lines.report().parse_args(arguments)
    path = options.out or options.run / "report.html"
    write_report(options.run, path)
    print(path)
    return 0


def write_report(run: Path, path: Path) -> None:
    """The page, whole or not at all. Raises ConfigError for a folder that is no run."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run} holds no config.yaml, so it is no run: give the folder that `controlbooth train` made"
        )
    parts = [heading(run), convergence(run), fidelity(run), over_the_steps(run), ends(run), configuration(run)]
    body = "".join(f"<section>{part}</section>" for part in parts[1:] if part)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(run.name)}</title><style>{_STYLE}</style><main>{parts[0]}{body}</main></html>\n"
    )
    write_whole(path, page.encode())


def heading(run: Path) -> str:
    config = load_config(run / "config.yaml")
    speed = read_json(run / "speed.json")
    status = read_json(run / "status.json")
    facts = [
        f"ControlNet for {config.data.condition_name} on {config.model.base}",
        f"{status.get('state', 'not started')} at step {status.get('step', 0):,} of {config.max_steps:,}",
        f"{config.global_batch_size} samples a step",
    ]
    if speed:
        facts.append(f"{speed['samples_per_second']:.1f} samples/s, {speed['peak_memory_gib']:.2f} GiB a rank")
    return f"<header><h1>{html.escape(config.name)}</h1><p>{html.escape(' · '.join(facts))}</p></header>"


def convergence(run: Path) -> str:
    """The curves, with the step of sudden convergence marked in them."""
    rows = list(read_metrics(run))
    loss = {step: metrics["loss"] for step, _, metrics in rows if "loss" in metrics}
    curve = validation_curve(run)
    found = find_convergence(curve)
    figures = {
        name: validation_curve(run, name)
        for name in dict.fromkeys(n for _, _, metrics in rows for n in validated(metrics))
    }
    told = html.escape(describe(found, list(curve))) if figures else "nothing was validated"
    fidelities = {name: one for name, one in figures.items() if name.removesuffix("_empty_prompt") in FIGURES}
    drawn = [plot("training loss, smoothed", {"loss": smooth(loss)}, None)] if loss else []
    if fidelities:
        drawn.append(plot("control fidelity on held-out conditions", fidelities, found))
    return f'<h2>Convergence</h2><p class="told">{told}</p><div class="curves">{"".join(drawn)}</div>'


def validated(metrics: Mapping[str, float]) -> list[str]:
    return [name.removeprefix("validation/") for name in metrics if name.startswith("validation/")]


def smooth(curve: Mapping[int, float]) -> dict[int, float]:
    """A running mean over a 50th of the run."""
    steps = sorted(curve)
    width = max(1, len(steps) // 50)
    values = np.convolve([curve[step] for step in steps], np.ones(width) / width, mode="valid")
    return dict(zip(steps[width - 1 :], values.tolist(), strict=True))


def plot(title: str, curves: Mapping[str, Mapping[int, float]], found: Convergence | None) -> str:
    """An SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        steps = sorted(curve)
        dashed = name.endswith("_empty_prompt")
        label = name.removesuffix("_empty_prompt").replace("_", " ") + (", no prompt" if dashed else "")
        mark = None if len(steps) > 60 else "o"
        axes.plot(
            steps,
            [curve[s] for s in steps],
            "--" if dashed else "-",
            marker=mark,
            markersize=3.5,
            linewidth=1.6,
            label=label,
        )
    if found:
        axes.axvspan(found.after, found.step, color="#0f766e", alpha=0.15, linewidth=0)
        axes.axvline(found.step, color="#0f766e", linewidth=1.2)
        axes.annotate(
            f" step {found.step}", (found.step, 0.02), xycoords=("data", "axes fraction"), color="#0f766e", fontsize=9
        )
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def fidelity(run: Path) -> str:
    result = read_json(run / "evaluation" / "evaluation.json")
    if not result:
        return f"<h2>Fidelity</h2><p>Not measured yet: <code>controlbooth evaluate {html.escape(str(run))}</code></p>"
    names = list(dict.fromkeys(name for own in result["figures"].values() for name in own))
    heads = "".join(f'<th class="figure">{html.escape(n.removeprefix("says_").replace("_", " "))}' for n in names)
    lines = []
    for way, own in result["figures"].items():
        cells = "".join(f'<td class="figure">{interval(own.get(name))}' for name in names)
        lines.append(f"<tr><td>{html.escape(way)}{cells}")
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
    encoders = "".join(f"<br>{html.escape(title)}: {html.escape(text)}" for title, text in result["encoders"].items())
    return (
        f"<h2>Fidelity</h2><p><small>{html.escape(what)}</small></p><table><tr><th>{heads}{''.join(lines)}</table>"
        f"<h2 style='margin-top:1.2rem'>Sets of pictures</h2><table>{sets}</table><p><small>{encoders[4:]}</small></p>"
    )


def interval(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    if "low" not in figure:
        return f"{figure['mean']:.3f}"
    return f"{figure['mean']:.3f}<br><small>{figure['low']:.3f} – {figure['high']:.3f}</small>"


def over_the_steps(run: Path) -> str:
    """One row a held-out condition, one column a validation."""
    strips = read_strips(run / STRIPS)
    if strips is None or not strips.steps:
        return ""
    found = find_convergence(validation_curve(run))
    steps = shown_steps(sorted(strips.steps), found)
    columns = {
        "condition": strips.conditions,
        "target": strips.targets,
        **{f"step {s}": strips.steps[s] for s in steps},
    }
    head = "".join(f"<th>{name}" for name in columns)
    rows = "".join(
        f'<tr><td class="caption">{html.escape(caption)}'
        + "".join(f"<td>{picture(images[row])}" for images in columns.values())
        for row, caption in enumerate(strips.captions)
    )
    return f'<h2>Over the steps</h2><div class="grid"><table><tr><th>{head}{rows}</table></div>'


def shown_steps(steps: Sequence[int], found: Convergence | None) -> list[int]:
    """At most MOST_STEPS of the validated steps, evenly spread, with those between which control snapped into place."""
    around = {found.after, found.step} & set(steps) if found else set()
    count = min(len(steps), MOST_STEPS) - len(around)
    others = [step for step in steps if step not in around]
    spread = [others[i] for i in np.linspace(0, len(others) - 1, min(count, len(others))).round().astype(int)]
    return sorted({*around, *spread})


def ends(run: Path) -> str:
    """Best and worst pictures of the evaluation."""
    folder = run / "evaluation"
    if not (folder / "ends.json").is_file():
        return ""
    chosen = read_json(folder / "ends.json")
    parts = []
    for name in ("best", "worst"):
        figures = []
        for one in chosen[name]:
            pictures = "".join(picture(np.asarray(Image.open(folder / "ends" / file))) for file in one["pictures"])
            text = f"{one['figure'].replace('_', ' ')} {one['value']:.3f} · {one['caption']}"
            figures.append(f"<figure><div>{pictures}</div><figcaption>{html.escape(text)}</figcaption></figure>")
        parts.append(f'<h2>{name.capitalize()} samples</h2><div class="ends">{"".join(figures)}</div>')
    return "<p><small>condition, with control, target</small></p>" + "<br>".join(parts)


def picture(image: np.ndarray) -> str:
    """An <img> with the picture inside, at most twice as wide as it is shown."""
    made = Image.fromarray(image)
    made.thumbnail((2 * TILE, 2 * TILE))
    data = io.BytesIO()
    made.save(data, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def configuration(run: Path) -> str:
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
    return (
        f"<h2>Configuration</h2><table>{rows}</table><details><summary>all of it</summary><pre>{text}</pre></details>"
    )


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
