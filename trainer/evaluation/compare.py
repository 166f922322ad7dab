"""`controlbooth compare A B`: what B gains over A, sample by sample."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from controlbooth.data.arguments import quoted
from controlbooth.data.files.whole import write_whole
from controlbooth.models.identity import describe_differences
from controlbooth.models.identity import differences as base_differences
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.figures import title
from controlbooth.trainer.evaluation.kinds import LOWER_IS_BETTER
from controlbooth.trainer.evaluation.opinions import between
from controlbooth.trainer.evaluation.record import DISCS, NOISE, REAL, WITHOUT, read_result, read_samples
from controlbooth.trainer.evaluation.statistics import LEVEL, mean_and_interval, per_picture, share_difference

SAME = (
    "data_fingerprint",
    "condition",
    "resolution",
    "base_digest",
    "base_identity",
    "sampler",
    "networks",
    "metrics_version",
)
"""What two evaluations must have in common for their pictures to be paired: contents, wherever they lie."""


def run(options: argparse.Namespace) -> int:
    """Does what `controlbooth compare` is asked, and returns its exit status."""
    differences = compare(read_evaluation(options.a), read_evaluation(options.b))
    print(table(differences, options.a, options.b))
    for line in between(run_of(options.b), run_of(options.a)):
        print(line)
    if options.json:
        write_whole(options.json, json.dumps(differences, indent=2).encode())
    return 0


def run_of(where: Path) -> Path:
    """Returns the folder of the run whose evaluation is named, as `read_evaluation` takes it."""
    return where.resolve().parent if (where / "evaluation.json").is_file() else where


Figures = dict[tuple[str, tuple[int, int]], dict[str, Any]]
"""(variant, place of the sample in its data set) -> what was measured of a picture."""


def read_evaluation(where: Path) -> tuple[dict[str, Any], Figures]:
    """Reads an evaluation: what was measured, and the figures of each picture.

    where: the folder of the evaluation, or of its run. Samples are identified by their places, since keys may repeat,
    so only evaluations on the same data set are compared. Raises ConfigError where there is no evaluation, or one by an
    older version that did not note places.
    """
    folder = where if (where / "evaluation.json").is_file() else where / "evaluation"
    result = read_result(folder)
    if result is None:
        raise ConfigError(f"{where} holds no evaluation: run `controlbooth evaluate {quoted(where)}` first")
    rows = read_samples(folder)
    if any("place" not in row for row in rows):
        raise ConfigError(
            f"{folder} was measured by an older version, which told samples by keys that may repeat. Measure it by "
            f"`controlbooth evaluate {quoted(where)}` again. One in a retraining's evaluations/ is measured by "
            "the next tick when it is deleted"
        )
    figures = {(row["way"], tuple(row["place"])): row for row in rows}
    return result, figures


def compare(
    a: tuple[dict[str, Any], Figures],
    b: tuple[dict[str, Any], Figures],
    level: float = LEVEL,
) -> dict[str, dict[str, dict[str, float]]]:
    """Compares two evaluations: variant of the pictures -> figure -> what is known of A, B and their difference.

    That is the mean of A and of B, the mean of B - A with its interval, and the share of samples where B is better.
    level: the confidence level of the intervals. Ways that do not depend on the ControlNet are left out. Raises
    ConfigError where the two were measured differently, or by a version that did not note how, or have no sample in
    common.
    """
    for letter, (facts, _) in (("A", a), ("B", b)):
        if unknown := [name for name in SAME if name not in facts]:
            raise ConfigError(
                f"{letter} was measured by an older version, which did not note {', '.join(unknown)}. Measure it by "
                f"`controlbooth evaluate {quoted(facts['where'])}` again. One in a retraining's evaluations/ is "
                "measured by the next tick when it is deleted"
            )
    for name in (name for name in SAME if name != "base_identity"):
        if a[0][name] != b[0][name]:
            raise ConfigError(
                f"the two were not measured alike: {name} is {describe_fact(a[0], name)} in A and "
                f"{describe_fact(b[0], name)} in B. Evaluate one of them again as the other one was"
            )
    if changed := base_differences(a[0]["base_identity"], b[0]["base_identity"]):
        what = describe_differences(changed, "in A", "in B it is")
        raise ConfigError(f"the two were not measured alike: {what}. Evaluate one of them again as the other one was")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for variant in dict.fromkeys(variant for variant, _ in a[1]):
        if variant in (WITHOUT, DISCS, NOISE, REAL):  # the same in both
            continue
        shared = [place for one, place in a[1] if one == variant and (variant, place) in b[1]]
        if not shared:
            raise ConfigError("the two evaluations have no sample in common: were they made of other shards?")
        result[variant] = compare_variant(a[1], b[1], variant, shared, level)
    return result


def compare_variant(
    a: Figures, b: Figures, variant: str, shared: Sequence[tuple[int, int]], level: float
) -> dict[str, dict[str, float]]:
    """Computes what B gains over A in each figure, on the samples that both have of one variant of the pictures.

    shared: the places of these samples. A figure NAME of control also has chance_a and chance_b, and beside it stands
    NAME_share, the share of what is possible (`statistics.share_of_possible`), where real pictures are certainly better
    than chance.
    """
    result: dict[str, dict[str, float]] = {}
    first, other = a[variant, shared[0]], b[variant, shared[0]]
    for name in [name for name, value in first.items() if isinstance(value, float) and name in other]:
        lower = name in LOWER_IS_BETTER
        ours, theirs = (np.array([one[variant, place][name] for place in shared]) for one in (a, b))
        result[name] = differences(ours, theirs, lower) | named(mean_and_interval(theirs - ours, level))
        if name not in first["chance"]:
            continue
        chances = [np.array([one[variant, place]["chance"][name] for place in shared]) for one in (a, b)]
        result[name] |= dict(chance_a=float(chances[0].mean()), chance_b=float(chances[1].mean()))
        reals = np.array([a[REAL, place][name] for place in shared])
        more = share_difference((ours, chances[0]), (theirs, chances[1]), reals, level, lower)
        if not np.isfinite(more["mean"]):
            continue
        shares = (per_picture(*one, reals) for one in ((ours, chances[0]), (theirs, chances[1])))
        result[f"{name}_share"] = differences(*shares, lower_is_better=False) | named(more)
    return result


def differences(ours: np.ndarray, theirs: np.ndarray, lower_is_better: bool) -> dict[str, float]:
    """Computes the means of A's and of B's values, (N,) each, and the share of samples where B is better."""
    better = theirs < ours if lower_is_better else theirs > ours
    return dict(a=float(ours.mean()), b=float(theirs.mean()), samples=len(ours), better=float(better.mean()))


def named(interval: Mapping[str, float]) -> dict[str, float]:
    return {f"difference_{key}": value for key, value in interval.items()}


def describe_fact(facts: dict[str, Any], name: str) -> str:
    """Formats a fact of an evaluation for an error message; a digest is followed by the path that it belongs to."""
    of = {"data_fingerprint": "data", "base_digest": "base"}.get(name)
    return repr(facts[name]) if of is None else f"{facts[name]:.12} ({facts[of]})"


def table(differences: dict[str, dict[str, dict[str, float]]], a: Path, b: Path) -> str:
    rows = [
        (f"{variant}, {title(name)}", one) for variant, figures in differences.items() for name, one in figures.items()
    ]
    width = max((len(label) for label, _ in rows), default=0)
    heads = f"{'A':>8}{'chance':>8}{'B':>8}{'chance':>8}{'B - A':>9}   95 % interval     B better"
    lines = [f"A {a}", f"B {b}", f"{'':<{width}}{heads}"]
    for label, one in rows:
        low, high = one["difference_low"], one["difference_high"]
        mark = " *" if low > 0 or high < 0 else "  "
        chance_a, chance_b = (f"{one[end]:.3f}" if end in one else "" for end in ("chance_a", "chance_b"))
        lines.append(
            f"{label:<{width}}{one['a']:>8.3f}{chance_a:>8}{one['b']:>8.3f}{chance_b:>8}{one['difference_mean']:>+9.3f}"
            f"   {low:+.3f} to {high:+.3f}{mark}{one['better']:>9.0%}"
        )
    lines.append("* the interval excludes 0")
    if any("chance_a" in one for _, one in rows):
        lines.append(
            "chance: the same pictures under the conditions of other samples; share: (value - chance) / (real pictures "
            "- chance)"
        )
    return "\n".join(lines)
