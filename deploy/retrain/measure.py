"""Champion and challenger on the frozen set, through `controlbooth evaluate`; each is measured once."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controlbooth.deploy.retrain.lease import Holding
from controlbooth.deploy.retrain.rounds import CLI
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.chance import METRICS_VERSION
from controlbooth.trainer.evaluation.record import read_result

KEPT = ("samples.jsonl", "evaluation.png", "evaluation.json")
"""Of an evaluation. The last one is written last, and says that the others are there."""


@dataclass(frozen=True)
class Question:
    """What is measured, and how: the same for both that are compared."""

    data: str
    fingerprint: str
    """Of the data."""
    samples: int
    sampling_steps: int
    guidance_scale: float


def measure(folder: Path, run: Path, step: int, digest: str, asked: Question, holding: Holding) -> Path:
    """Returns the folder with the evaluation of a run's checkpoint. It is evaluated first unless that was done before.

    digest: of the checkpoint's weights. Raises ConfigError where it cannot be measured, and LeaseLost.
    """
    # One that was measured by other definitions has another name, and is not taken for this one.
    key = f"{digest[:12]}-{asked.fingerprint[:12]}-{asked.samples}-{asked.sampling_steps}-{asked.guidance_scale:g}"
    key += f"-metrics{METRICS_VERSION}"
    where, drawing = folder / "evaluations" / key, folder / "evaluations" / "drawing"
    if (where / KEPT[-1]).is_file():
        return where
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is gone, so its checkpoint of step {step} cannot be measured. Put it back")
    drawing.mkdir(parents=True, exist_ok=True)
    command = [*CLI, "evaluate", str(run), "--step", str(step), "--data", asked.data, "--samples", str(asked.samples)]
    command += ["--steps", str(asked.sampling_steps), "--guidance", str(asked.guidance_scale), "-o", str(drawing)]
    status = holding.run(command, drawing / "output.txt")
    if status:
        lines = (drawing / "output.txt").read_text(errors="replace").strip().splitlines()
        raise ConfigError(
            f"measuring {run} failed with status {status}: {(lines or ['without a word'])[-1]}. What it printed is in "
            f"{drawing / 'output.txt'}; the next tick tries again"
        )
    result = read_result(drawing, "digest", "data_fingerprint")
    if result is None:
        raise ConfigError(f"measuring {run} has written no {drawing / KEPT[-1]}; the next tick tries again")
    if (result["digest"], result["data_fingerprint"]) != (digest, asked.fingerprint):
        raise ConfigError(
            f"{run} or {asked.data} changed while it was measured: the weights are {result['digest']:.12}, not "
            f"{digest:.12}, and the data {result['data_fingerprint']:.12}, not {asked.fingerprint:.12}. The next tick "
            "tries again"
        )
    where.mkdir(exist_ok=True)
    for name in KEPT:
        (drawing / name).replace(where / name)
    for pictures in (drawing / "pictures").glob("with-control*"):  # those without control serve the next one too
        shutil.rmtree(pictures)
    return where


def differences(champion: Path | None, challenger: Path, level: float) -> dict[str, dict[str, float]]:
    """Computes what the challenger gains with control, by metric, as `trainer.evaluate.compare.compare` returns it.

    champion, challenger: folders of evaluations. Without a champion (None), the comparison is with the base alone,
    drawn from the same noise without control.
    """
    from controlbooth.trainer.evaluation.compare import (
        compare,
        read_evaluation,  # torch, for this rare moment
    )
    from controlbooth.trainer.evaluation.record import REAL, WITH, WITHOUT

    tree, rows = read_evaluation(challenger)
    ours = {key: row for key, row in rows.items() if key[0] in (WITH, REAL)}
    if champion is None:
        drawn = {(WITH, key): row for (variant, key), row in rows.items() if variant == WITHOUT}
        theirs = tree, drawn | {key: row for key, row in rows.items() if key[0] == REAL}
    else:
        theirs = read_evaluation(champion)
        theirs = theirs[0], {key: row for key, row in theirs[1].items() if key[0] in (WITH, REAL)}
    return compare(theirs, (tree, ours), level)[WITH]


def values(evaluation: Path, metric: str) -> np.ndarray:
    """Reads a metric of each picture with control, (N,) float64; of a share, what each picture adds to it.

    metric: such as edge_f1, or edge_f1_share, the share of what is possible. Raises ConfigError where the metric was
    not measured, or where real pictures are not certainly better than chance, so that there is no share.
    """
    from controlbooth.trainer.evaluation.compare import read_evaluation
    from controlbooth.trainer.evaluation.record import REAL, WITH
    from controlbooth.trainer.evaluation.statistics import per_picture, tells_apart

    figures = read_evaluation(evaluation)[1]
    rows: list[Mapping[str, Any]] = [row for (variant, _), row in figures.items() if variant == WITH]
    reals: list[Mapping[str, Any]] = [figures[REAL, place] for variant, place in figures if variant == WITH]
    known = [name for name, value in rows[0].items() if isinstance(value, float)]
    if metric in known:
        return np.array([row[metric] for row in rows])
    name = metric.removesuffix("_share")
    if name == metric or name not in rows[0]["chance"]:
        known += [f"{name}_share" for name in rows[0]["chance"]]
        raise ConfigError(
            f"drift asks for {metric!r}, which was not measured; there are: {', '.join(known)}. Correct the policy"
        )
    chances = np.array([row["chance"][name] for row in rows])
    best = np.array([row[name] for row in reals])
    if not tells_apart(chances, best, lower_is_better=name in lower_is_better()):
        raise ConfigError(
            f"drift asks for {metric!r}, and in {evaluation} real pictures are not certainly better than chance by "
            f"{name}: measure more samples, or another figure"
        )
    return per_picture(np.array([row[name] for row in rows]), chances, best)


def lower_is_better() -> tuple[str, ...]:
    from controlbooth.trainer.evaluation.kinds import LOWER_IS_BETTER

    return LOWER_IS_BETTER
