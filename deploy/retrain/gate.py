"""Whether a challenger may take the champion's place: a pure function of paired differences."""

from collections.abc import Mapping
from dataclasses import dataclass

from controlbooth.deploy.retrain.policy import Gate
from controlbooth.trainer.config.section import ConfigError

Figure = Mapping[str, float]
"""Of one metric: a (the champion's mean), b (the challenger's), difference_mean, _low and _high of b - a, samples; of a
figure of control also chance_a and chance_b, what the pictures of each score under the conditions of other samples."""


@dataclass(frozen=True)
class Verdict:
    promote: bool
    reason: str
    """All that was weighed, for people."""


def judge(gate: Gate, differences: Mapping[str, Figure], lower_is_better: tuple[str, ...]) -> Verdict:
    """Decides whether the challenger takes the champion's place.

    differences: by metric, with intervals at gate.confidence, as `trainer.evaluate.compare.compare` returns them.
    Raises ConfigError for a metric that was not measured on each picture.
    """
    held, broken = [], []
    for metric, needed, what in [
        (gate.metric, gate.margin, "the margin"),
        *((name, -tolerance, "the tolerance") for name, tolerance in gate.no_regression.items()),
    ]:
        if metric not in differences:
            raise ConfigError(
                f"the gate asks for {metric!r}, which was not measured; there are: {', '.join(differences)}. "
                "Correct the policy: the next tick decides about the same round"
            )
        one = differences[metric]
        sign = -1.0 if metric in lower_is_better else 1.0
        low = min(sign * one["difference_low"], sign * one["difference_high"])
        holds = low >= needed
        text = (
            f"{metric} {one['a']:.3f} -> {one['b']:.3f}, {one['difference_mean']:+.3f} "
            f"({one['difference_low']:+.3f} to {one['difference_high']:+.3f})"
        )
        if "chance_b" in one:
            text += f", chance {one['chance_a']:.3f} -> {one['chance_b']:.3f}"
        (held if holds else broken).append(f"{text}, {'clears' if holds else 'misses'} {what} of {needed:+g}")
    return Verdict(not broken, "; ".join(broken + held))
