"""Whether it is time to train again: pure functions of what is known and of the time."""

import datetime
from dataclasses import dataclass

import numpy as np
from croniter import croniter

from controlbooth.deploy.retrain.growth import Changes
from controlbooth.deploy.retrain.lease import CLOCKS_APART
from controlbooth.deploy.retrain.policy import Clock, Drift, Growth, zone
from controlbooth.trainer.evaluation.statistics import resampled_means


@dataclass(frozen=True)
class Trigger:
    due: bool
    reason: str
    """Why, or why not, for people."""


def clock(policy: Clock, last_start: float, now: float) -> Trigger:
    """Decides whether the cron line or the hours since the last round make a new one due.

    last_start, now: in seconds since 1970. last_start is that of the last round, or of the policy's first tick where
    there is none.
    """
    there = zone(policy)

    def shown(seconds: float) -> str:
        return datetime.datetime.fromtimestamp(seconds, there).strftime("%Y-%m-%d %H:%M %Z")

    if policy.every_hours is not None:
        next_time = last_start + 3600.0 * policy.every_hours
        due = now >= next_time
        every = f"{policy.every_hours:g} hours after the start of the last round"
    else:
        assert policy.cron is not None
        after = datetime.datetime.fromtimestamp(last_start, there)
        next_time = croniter(policy.cron, after).get_next(datetime.datetime).timestamp()
        due = now >= next_time
        every = f"cron '{policy.cron}'"
    back = f"; the clock was set back since the last round was started, at {shown(last_start)}"
    ahead = back if last_start > now + CLOCKS_APART else ""
    return Trigger(due, f"clock: {every} {'was due at' if due else 'is due at'} {shown(next_time)}{ahead}")


def growth(policy: Growth, changes: Changes) -> Trigger:
    wanted, enough = [], True
    if policy.samples is not None:
        wanted.append(f"{policy.samples} are wanted")
        enough = enough and changes.new >= policy.samples
    if policy.share is not None:
        wanted.append(f"{policy.share:.0%} of the last round's {changes.before} are wanted")
        enough = enough and changes.new >= policy.share * changes.before and changes.new > 0
    return Trigger(enough, f"growth: {changes.new} new samples; {' and '.join(wanted)}")


def drift(policy: Drift, confidence: float, sign: float, frozen: np.ndarray, fresh: np.ndarray) -> Trigger:
    """Decides whether the champion is worse on fresh data than on the frozen set: by the margin at least, and certainly
    worse.

    frozen: (N,), fresh: (M,) float, the champion's figure of each picture. sign: -1 where lower is better, else 1. The
    two sets hold different samples, so both means are resampled independently to get an interval of their difference.
    """
    loss = sign * float(frozen.mean() - fresh.mean())
    difference = sign * (resampled_means(frozen) - resampled_means(fresh, seed=1))
    low = float(np.quantile(difference, (1 - confidence) / 2))
    due = loss >= policy.margin and low > 0
    return Trigger(
        due,
        f"drift: the champion's {policy.metric} is {frozen.mean():.3f} on the frozen set and {fresh.mean():.3f} on "
        f"fresh data, worse by {loss:+.3f} and at {confidence:.0%} by no less than {low:+.3f}; a margin of "
        f"{policy.margin:g} is {'passed' if due else 'not passed'}",
    )
