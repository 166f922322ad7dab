"""`controlbooth compare A B`: what B gains over A, sample by sample."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from controlbooth.data.sidecar import write_whole
from controlbooth.trainer import command_lines
from controlbooth.trainer.config import ConfigError
from controlbooth.trainer.evaluate.evaluate import DISCS, NOISE, REAL, WITHOUT
from controlbooth.trainer.evaluate.figures import title
from controlbooth.trainer.evaluate.kinds import LOWER_IS_BETTER
from controlbooth.trainer.evaluate.statistics import LEVEL, mean_and_interval

SAME = ("data_fingerprint", "condition", "resolution", "base_digest", "sampler", "networks", "metrics_version")
"""What two evaluations must have in common for their pictures to be paired: contents, wherever they lie."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = command_lines.compare().parse_args(arguments)
    differences = compare(read_evaluation(options.a), read_evaluation(options.b))
    print(table(differences, options.a, options.b))
    if options.json:
        write_whole(options.json, json.dumps(differences, indent=2).encode())
    return 0


Figures = dict[tuple[str, tuple[int, int]], dict[str, Any]]
"""(way, place of the sample in its data set) -> what was measured of a picture."""


def read_evaluation(where: Path) -> tuple[dict[str, Any], Figures]:
    """-> what was measured, and the figures of each picture. Raises ConfigError where there is none.

    Samples are told by their places, as keys repeat: evaluations are compared on one data set alone.
    """
    folder = where if (where / "evaluation.json").is_file() else where / "evaluation"
    if not (folder / "evaluation.json").is_file():
        raise ConfigError(f"{where} holds no evaluation: run `controlbooth evaluate {where}` first")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    if any("place" not in row for row in rows):
        raise ConfigError(
            f"{folder} was measured by an older version, which told samples by keys that may repeat. Measure it by "
            f"`controlbooth evaluate {where}` again. One in a retraining's evaluations/ is measured by the next tick "
            "when it is deleted"
        )
    figures = {(row["way"], tuple(row["place"])): row for row in rows}
    return json.loads((folder / "evaluation.json").read_text()), figures


def compare(
    a: tuple[dict[str, Any], Figures],
    b: tuple[dict[str, Any], Figures],
    level: float = LEVEL,
) -> dict[str, dict[str, dict[str, float]]]:
    """way -> figure -> mean of A and of B, mean of B - A with its interval, and the share of samples where B is better.

    level: of the intervals. Raises ConfigError where they were measured differently, or by a version that did not note
    how, or have no sample in common.
    """
    for letter, (facts, _) in (("A", a), ("B", b)):
        if unknown := [name for name in SAME if name not in facts]:
            raise ConfigError(
                f"{letter} was measured by an older version, which did not note {', '.join(unknown)}. Measure it by "
                f"`controlbooth evaluate {facts['where']}` again. One in a retraining's evaluations/ is measured by "
                "the next tick when it is deleted"
            )
    for name in SAME:
        if a[0][name] != b[0][name]:
            raise ConfigError(
                f"the two were not measured alike: {name} is {told(a[0], name)} in A and {told(b[0], name)} in B. "
                "Evaluate one of them again as the other one was"
            )
    result: dict[str, dict[str, dict[str, float]]] = {}
    for way in dict.fromkeys(way for way, _ in a[1]):
        if way in (WITHOUT, DISCS, NOISE, REAL):  # the same in both
            continue
        shared = [place for one, place in a[1] if one == way and (way, place) in b[1]]
        if not shared:
            raise ConfigError("the two evaluations have no sample in common: were they made of other shards?")
        figures = [name for name, value in a[1][way, shared[0]].items() if isinstance(value, float)]
        result[way] = {}
        for name in (name for name in figures if name in b[1][way, shared[0]]):
            ours, theirs = (np.array([one[1][way, place][name] for place in shared]) for one in (a, b))
            better = theirs < ours if name in LOWER_IS_BETTER else theirs > ours
            result[way][name] = dict(
                a=float(ours.mean()),
                b=float(theirs.mean()),
                samples=len(shared),
                better=float(better.mean()),
                **{f"difference_{key}": value for key, value in mean_and_interval(theirs - ours, level).items()},
            )
    return result


def told(facts: dict[str, Any], name: str) -> str:
    """For people: a digest with the path that it is of."""
    of = {"data_fingerprint": "data", "base_digest": "base"}.get(name)
    return repr(facts[name]) if of is None else f"{facts[name]:.12} ({facts[of]})"


def table(differences: dict[str, dict[str, dict[str, float]]], a: Path, b: Path) -> str:
    rows = [(f"{way}, {title(name)}", one) for way, figures in differences.items() for name, one in figures.items()]
    width = max((len(label) for label, _ in rows), default=0)
    lines = [f"A {a}", f"B {b}", f"{'':<{width}}{'A':>8}{'B':>8}{'B - A':>9}   95 % interval     B better"]
    for label, one in rows:
        low, high = one["difference_low"], one["difference_high"]
        mark = " *" if low > 0 or high < 0 else "  "
        lines.append(
            f"{label:<{width}}{one['a']:>8.3f}{one['b']:>8.3f}{one['difference_mean']:>+9.3f}"
            f"   {low:+.3f} to {high:+.3f}{mark}{one['better']:>9.0%}"
        )
    return "\n".join([*lines, "* the interval excludes 0"])
