"""Whether a round is to be started now, on what and from where: read only, so that --dry-run and `status` share it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlbooth.deploy.retrain import growth, registry, triggers
from controlbooth.deploy.retrain.growth import Changes, Dataset
from controlbooth.deploy.retrain.measure import Question, lower_is_better
from controlbooth.deploy.retrain.policy import Drift, Policy, round_config
from controlbooth.deploy.retrain.registry import CHAMPION, Registry, Version
from controlbooth.deploy.retrain.rounds import Round, State, round_folder
from controlbooth.deploy.retrain.triggers import Trigger
from controlbooth.trainer.config.families import guidance_of
from controlbooth.trainer.config.loading import without_later_fields
from controlbooth.trainer.config.renamed import with_old_names
from controlbooth.trainer.config.run import RunConfig, run_folder
from controlbooth.trainer.config.section import ConfigError

Measured = Callable[[Drift, Version], tuple[np.ndarray, np.ndarray]]
"""The champion's figure of each picture on the frozen set and on fresh data."""


@dataclass(frozen=True)
class Proposal:
    start: bool
    reason: str
    """Why, or why not, for people."""
    number: int
    config: RunConfig
    """Of the round, but that its shards are the policy's and not yet frozen."""
    dataset: Dataset
    found: Changes
    weights: Version | None
    """The champion that it starts from; None starts as the template does."""
    identity: str


def propose(
    policy: Policy, folder: Path, state: State, there: Registry, now: float, by_hand: bool, measured: Measured | None
) -> Proposal:
    """Decides whether a round is to be started now, on which data and from which weights.

    by_hand: start whatever the triggers say. measured: None leaves drift unmeasured. Raises ConfigError and other
    ValueErrors for what a person must correct, FileNotFoundError, and RegistryAway.
    """
    number = max((one.number for one in state.rounds), default=0) + 1
    name = f"{policy.name}-{number:04d}"
    config = round_config(policy, name, policy.data, None)
    dataset = growth.current(policy.data)
    last = last_decided(state)
    before = growth.frozen(round_folder(folder, last.number) / "manifest.jsonl") if last else []
    found = growth.changes(before, dataset, config.data.condition)
    told = growth.describe(found)
    check_frozen(policy, state, config)

    fired = quick_triggers(policy, state, last, found, now, by_hand)
    due = [one for one in fired if one.due]
    champion = None
    if due or policy.triggers.drift:
        champion = registry.aliases(there).get(CHAMPION)
    if not due and policy.triggers.drift and champion is not None:
        if measured is None:
            fired.append(Trigger(False, "drift: is measured by a tick"))
        else:
            drift = policy.triggers.drift
            sign = -1.0 if drift.metric in lower_is_better() else 1.0
            frozen, fresh = measured(drift, champion)
            fired.append(triggers.drift(drift, policy.gate.confidence, sign, frozen, fresh))
        due = [one for one in fired if one.due]
    weights = champion if policy.start == "champion" else None
    if weights is not None:
        config = round_config(policy, name, policy.data, str(weights.checkpoint / "controlnet"))
    start = "scratch" if weights is None else weights.digest
    identity = identity_of(config, dataset.fingerprint, start)

    def proposal(start: bool, reason: str) -> Proposal:
        return Proposal(start, f"{reason}; {told}", number, config, dataset, found, weights, identity)

    if not due:
        return proposal(False, "; ".join(one.reason for one in fired))
    reason = due[0].reason
    same = next((one for one in state.rounds if one.closed and one.identity == identity), None)
    if same and not by_hand:
        return proposal(
            False,
            f"{reason}, but round {same.number}, which was {same.state}, had the same run, data and start, so the "
            "result would be the same. New data, another run, or `controlbooth retrain tick --now` start another",
        )
    return proposal(True, reason)


def quick_triggers(
    policy: Policy, state: State, last: Round | None, found: Changes, now: float, by_hand: bool
) -> list[Trigger]:
    """Evaluates the triggers that need no measurement."""
    if by_hand:
        return [Trigger(True, "by hand")]
    if last is None:
        return [Trigger(True, "no round was decided yet")]
    fired = []
    if policy.triggers.growth:
        fired.append(triggers.growth(policy.triggers.growth, found))
    if policy.triggers.clock:
        started = max((one.started for one in state.rounds), default=state.created)
        fired.append(triggers.clock(policy.triggers.clock, started, now))
    return fired


def last_decided(state: State) -> Round | None:
    """Returns the last round that was promoted or refused, from which growth is counted; None where there is none. A
    round that failed does not count: it has not learned its data."""
    return next((one for one in reversed(state.rounds) if one.state in ("promoted", "refused")), None)


def check_frozen(policy: Policy, state: State, config: RunConfig) -> str:
    """Returns the fingerprint of the frozen evaluation set. Raises ConfigError where the set has changed or is too
    small."""
    held = growth.current(policy.evaluation.data)
    wanted = policy.evaluation.fingerprint or state.evaluation_fingerprint
    if wanted not in (None, held.fingerprint):
        raise ConfigError(
            f"the frozen evaluation set {policy.evaluation.data} is not what it was: its fingerprint is "
            f"{held.fingerprint}, and {wanted} was measured on. Put it back, or write the new fingerprint into "
            "evaluation.fingerprint of the policy, which measures champions and challengers anew"
        )
    there = int(held.samples_per_shard(config.data.condition).sum())
    if there < policy.evaluation.samples:
        raise ConfigError(
            f"evaluation.samples={policy.evaluation.samples} pictures are asked for, and {policy.evaluation.data} has "
            f"{there} with {config.data.condition!r}. Lower the one, or add to the other and write down its fingerprint"
        )
    return held.fingerprint


def check_start(policy: Policy, proposed: Proposal) -> None:
    """Raises ConfigError where the round would be worthless: its data overlap the evaluation set, the folder of its run
    exists already, or the champion's weights are gone."""
    growth.check_apart(proposed.dataset, growth.current(policy.evaluation.data))
    folder = run_folder(proposed.config)
    if folder.exists():
        raise ConfigError(
            f"{folder} exists and is no round of this policy: was its state folder lost? Move the run away, or give "
            "the policy another name"
        )
    if proposed.weights and not (proposed.weights.checkpoint / "controlnet").is_dir():
        raise ConfigError(
            f"the round would start from the champion in {proposed.weights.checkpoint}, which is not there. Put it "
            "back, use start=scratch, or return to an earlier champion by `controlbooth retrain rollback`"
        )


def identity_of(config: RunConfig, fingerprint: str, start: str) -> str:
    """Computes a digest (SHA-256, in hex) of what determines the weights: configuration, data and where the round
    starts."""
    tree = with_old_names(without_later_fields(config.model_dump(mode="json", exclude={"name", "output", "tracking"})))
    tree["data"]["shards"], tree["model"]["controlnet"] = fingerprint, start
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def question(policy: Policy, config: RunConfig, data: str, fingerprint: str, samples: int) -> Question:
    asked = policy.evaluation
    return Question(
        data,
        fingerprint,
        samples,
        asked.sampling_steps or config.validation.sampling_steps,
        asked.guidance_scale or guidance_of(config),
    )
