"""What fewer bits of the frozen base cost: losses, control and subjects' figures beside those on a base in bf16.

    .venv/bin/python tests/benchmarks/frozen_curves.py [--steps 200] [--precisions bf16 int8 fp8 nf4] [--subjects 4]

The quickstart's ControlNet and subjects of `dreambooth demo`, on the built-in base, with the same shards, settings and
seeds whatever the base is held in. `loss to N` is the mean of the steps up to N, from the row above's N on; `apart` is
the mean difference of a step's loss from the first precision's, in per cent of its mean loss: the draws are the same.
Then control of the held-out conditions, between its chance and what real pictures reach, and the subjects' figures
beside those of their real pictures. Both are drawn with the whole base, as users of the weights have it. The curves
are drawn in FOLDER/curves.png. What is in FOLDER already is not trained or measured again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from record import write

sys.path.append(str(Path(__file__).parents[1] / "support"))

from control_lora import evaluated
from trainings import logged

from controlbooth.data.files.records import read_json
from controlbooth.launch.commands.dreambooth_demo import CONFIG as SUBJECTS
from controlbooth.launch.commands.quickstart import CONFIG, packing, verb
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import run_folder
from controlbooth.trainer.config.subjects import load_run

WINDOWS = 4
"""Parts of a run of which the mean loss is told."""


def losses_of(run: Path, name: str) -> np.ndarray:
    """The losses of all steps, (steps,) float64, of a folder's metrics.jsonl."""
    found = logged(run, name)
    return np.array([found[step] for step in sorted(found)])


def told(losses: np.ndarray, first: np.ndarray) -> dict[str, float]:
    parts = np.array_split(losses, WINDOWS)
    ends = np.cumsum([len(part) for part in parts])
    row = {f"loss to {end}": float(part.mean()) for end, part in zip(ends, parts, strict=True)}
    return row | {"apart, %": 100 * float(np.abs(losses - first).mean() / first.mean())}


def controlled(precision: str, options: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    """Trains and measures a ControlNet; -> its losses, and its figures with chance and what real pictures reach."""
    folder, steps = options.folder, options.steps
    changes = [
        f"name=control-{precision}-{steps}", f"output={folder / 'runs'}", f"data.shards={folder / 'train'}",
        f"data.held_out={folder / 'held-out'}", f"max_steps={steps}", f"checkpoint.every_steps={steps}",
        f"validation.every_steps={steps}", "validation.at_start=false",
        f"model.frozen.precision={precision}", *options.overrides,
    ]  # fmt: skip
    config = load_config(CONFIG, changes)
    for command in packing(config):
        verb(command)
    figures = evaluated(config, changes, options)
    return losses_of(run_folder(config), "loss"), figures


def subjects(precision: str, options: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    """Trains and measures subjects; -> the mean of their losses, and of their figures."""
    changes = [
        f"name=subjects-{precision}-{options.steps}", f"output={options.folder / 'runs'}", f"steps={options.steps}",
        f"model.frozen.precision={precision}", *options.subject_overrides,
    ]  # fmt: skip
    config = load_run(SUBJECTS, changes)
    run, pictures = config.output / config.name, options.folder / "subjects"
    if not (pictures / "subjects.yaml").is_file():
        verb(["dreambooth", "subjects", "-o", str(pictures), "--count", str(options.subjects)])
    if not (run / "measures.json").is_file():
        verb(["dreambooth", "run", str(pictures / "subjects.yaml"), str(SUBJECTS), *changes])
        verb(["dreambooth", "measure", str(run), "--prompts", "8"])
    folders = sorted(path.parent for path in (run / "subjects").glob("*/metrics.jsonl"))
    losses = np.mean([losses_of(folder, "train/instance_loss") for folder in folders], 0)
    return losses, read_json(run / "measures.json", "")["mean"]


def draw_curves(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draws running means over a tenth of the steps, a panel for what is trained and a line for each precision."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, losses in lines.items():
            width = max(1, len(losses) // 10)
            axes.plot(
                np.arange(width, len(losses) + 1), np.convolve(losses, np.ones(width) / width, "valid"), label=name
            )
        axes.set(title=title, xlabel="step", ylabel=f"loss, mean of {width} steps")
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int8", "fp8", "nf4"])
    parser.add_argument("--subjects", type=int, default=4, help="0 leaves them out")
    parser.add_argument("--samples", type=int, default=64, help="held-out conditions that are drawn")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build/frozen-curves"))
    parser.add_argument("--overrides", nargs="*", default=[], help="of the ControlNets")
    parser.add_argument("--subject-overrides", nargs="*", default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kinds = {"ControlNet": controlled} | ({"subjects": subjects} if options.subjects else {})
    curves: dict[str, dict[str, np.ndarray]] = {}
    rows = []
    for kind, trained in kinds.items():
        lines = curves.setdefault(kind, {})
        for precision in options.precisions:
            lines[precision], figures = trained(precision, options)
            rows.append(
                {"trained": kind, "base": precision, **told(lines[precision], lines[options.precisions[0]]), **figures}
            )
    write("frozen_curves", rows)
    draw_curves(curves, options.folder / "curves.png")


if __name__ == "__main__":
    main()
