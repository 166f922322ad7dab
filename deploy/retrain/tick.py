"""One tick: looks at the data set, the last round and the registry under a lease, and does at most one thing.

    no round is open      a trigger fires -> start one;  none does -> nothing
    one trains            alive -> nothing;  dead -> reap and resume it;  finished -> measure, and promote or refuse;
                          cancelled by a person -> give it up
    one is promoting      a tick died between its decision and the alias -> move the alias

Each step may be repeated, and what is to be done is in state.json before it is done: a tick may be killed at any point,
and the next one goes on.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from controlbooth.data.files.records import is_text, maybe, read_json, read_note, write_json
from controlbooth.deploy.retrain import audit, growth, registry
from controlbooth.deploy.retrain.gate import judge
from controlbooth.deploy.retrain.lease import Holding, holder, take
from controlbooth.deploy.retrain.measure import differences, lower_is_better, measure, values
from controlbooth.deploy.retrain.policy import Drift, Policy, cluster_of, round_config, state_folder
from controlbooth.deploy.retrain.proposal import Proposal, check_frozen, check_start, propose, question
from controlbooth.deploy.retrain.registry import CHAMPION, Registry, RegistryAway, Version
from controlbooth.deploy.retrain.rounds import (
    Round,
    State,
    as_submitted,
    first_submission,
    is_alive,
    job_of_round,
    job_words,
    last_words,
    read_state,
    round_folder,
    run_status,
    submit,
    was_cancelled,
    where_to_look,
    with_round,
    write_state,
)
from controlbooth.launch.submit import recover, rendered, shown_job
from controlbooth.trainer.config.loading import dump, load_config
from controlbooth.trainer.config.run import RunConfig, run_folder, tracking_uri
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.tracking.spool import read_metrics

DONE, AGAIN, FAILED = 0, 3, 4
"""Exit statuses: whatever there was to do is done; MLflow is away, try again; a round has failed for good."""


@dataclass
class Tick:
    """What one tick works with."""

    policy: Policy
    folder: Path
    holding: Holding
    state: State
    there: Registry
    now: float

    def note(self, decision: str, reason: str, one: Round | None, **facts: Any) -> None:
        """Appends a decision to the audit log and prints it."""
        number = None if one is None else one.number
        audit.append(self.folder, self.holding.lease.generation, number, decision, reason, **facts)
        print(f"{decision}: {reason}" if number is None else f"round {number} {decision}: {reason}", flush=True)

    def keep(self, one: Round) -> Round:
        self.holding.renew()
        self.state = with_round(self.state, one)
        write_state(self.folder, self.state)
        return one


def tick(policy: Policy, by_hand: bool = False) -> int:
    """Takes the lease and does what there is to do; -> an exit status, DONE where another tick is at it.

    Raises ValueError and OSError for what a person must correct, which the audit log has too; RegistryAway; LeaseLost.
    """
    folder = state_folder(policy)
    cluster_of(policy)  # what is wrong with it is said before a round is due
    there = open_registry_of(policy)
    lease = take(folder, policy.lease_seconds)
    if lease is None:
        other = holder(folder)
        print(f"another tick is at it: process {other.process} on {other.host}" if other else "another tick is at it")
        return DONE
    with Holding(folder, lease, policy.lease_seconds) as holding:
        try:
            now = time.time()
            one = Tick(policy, folder, holding, read_state(folder, now), there, now)
            write_state(folder, one.state)
            return go_on(one, by_hand)
        except RegistryAway:
            raise
        except (ValueError, OSError) as error:
            audit.append(folder, holding.lease.generation, None, "stopped", str(error))
            raise


def open_registry_of(policy: Policy) -> Registry:
    config = round_config(policy, policy.name, policy.data, None)
    return Registry(tracking_uri(config), policy.name)


def go_on(now: Tick, by_hand: bool) -> int:
    one = now.state.rounds[-1] if now.state.rounds else None
    if one is None or one.closed:
        return consider(now, by_hand)
    if one.state == "promoting":
        return finish_promotion(now, one)
    if one.engine != "local":
        recover(Path(one.run))
    one = as_submitted(one)
    if is_alive(one):
        print(f"round {one.number} trains: {progress(one)}", flush=True)
        return DONE
    if run_status(one)["state"] == "finished":
        return decide(now, one)
    return resume(now, one)


def progress(one: Round) -> str:
    step = max((step for step, _, _ in read_metrics(one.run)), default=0) if Path(one.run).is_dir() else 0
    shown = f"step {step} in {one.run}, started {one.submissions} time{'s' * (one.submissions != 1)}"
    return ", ".join(filter(None, (shown, job_words(one))))


def consider(now: Tick, by_hand: bool) -> int:
    """Starts a round, or says why not."""

    def measured(drift: Drift, champion: Version) -> tuple[np.ndarray, np.ndarray]:
        config = load_config(champion.run / "config.yaml")
        fresh = growth.current(drift.data).fingerprint
        frozen = check_frozen(now.policy, now.state, config)
        asked = [
            question(now.policy, config, now.policy.evaluation.data, frozen, now.policy.evaluation.samples),
            question(now.policy, config, drift.data, fresh, drift.samples),
        ]
        found = [
            values(measure(now.folder, champion.run, champion.step, champion.digest, one, now.holding), drift.metric)
            for one in asked
        ]
        return found[0], found[1]

    proposed = propose(now.policy, now.folder, now.state, now.there, now.now, by_hand, measured)
    if not proposed.start:
        now.note("nothing", proposed.reason, None, dataset_fingerprint=proposed.dataset.fingerprint)
        return DONE
    check_start(now.policy, proposed)
    return start(now, proposed)


def start(now: Tick, proposed: Proposal) -> int:
    """Writes down what the round is to see, and submits it. Raises LeaseLost before it has written anything."""
    now.holding.renew()
    where = round_folder(now.folder, proposed.number)
    growth.freeze(proposed.dataset, where / "manifest.jsonl")
    weights = proposed.weights
    config = frozen_config(now.policy, now.folder, proposed)
    if problems := first_submission(now.policy, config, config)[1]:
        raise cannot_start(proposed, problems)
    (where / "run.yaml").write_text(dump(config))
    registry.claim(now.there, now.folder)
    one = Round(
        number=proposed.number,
        state="training",
        run=str(run_folder(config).absolute()),
        trigger=proposed.reason,
        started=now.now,
        identity=proposed.identity,
        dataset_fingerprint=proposed.dataset.fingerprint,
        samples=proposed.found.now,
        start=weights.digest if weights else "scratch",
        working_directory=str(Path.cwd()),
        engine=now.policy.engine,
    )
    now.state = replace(now.state, evaluation_fingerprint=check_frozen(now.policy, now.state, config))
    now.keep(one)
    begins = f"from the champion, version {weights.number}" if weights else "from scratch"
    now.note(
        "started",
        f"{proposed.reason}; {begins}",
        one,
        dataset_fingerprint=one.dataset_fingerprint,
        evaluation_fingerprint=now.state.evaluation_fingerprint,
        samples=one.samples,
        run=one.run,
    )
    now.keep(submit(now.policy, now.folder, one))
    return DONE


def frozen_config(policy: Policy, folder: Path, proposed: Proposal) -> RunConfig:
    """Builds the configuration of a proposed round's run, on the round's own manifest of the data set as it is now."""
    manifest = round_folder(folder, proposed.number) / "manifest.jsonl"
    controlnet = str(proposed.weights.checkpoint / "controlnet") if proposed.weights else None
    return round_config(policy, proposed.config.name, str(manifest), controlnet)


def cannot_start(proposed: Proposal, problems: list[str]) -> ConfigError:
    return ConfigError(f"round {proposed.number} cannot be started: {'; '.join(problems)}")


def resume(now: Tick, one: Round) -> int:
    """Deals with a round whose processes or job are gone before it was finished: marks it dead, and starts it again or
    gives it up."""
    status, words = run_status(one), last_words(now.folder, one)
    if one.submissions:
        was = {
            "stopped": "it had stopped",
            "failed": "it had failed",
            "finished": "MLflow has not got its checkpoint",
        }.get(status["state"], "its processes are gone")
        if run_id := mlflow_run_id(one):
            registry.mark_dead(now.there, run_id)
        if status["state"] == "running":
            mark_status(one)
        now.note("reaped", f"{was} ({words}), {progress(one)}", one, run=one.run, times=one.submissions)
    if one.submissions > now.policy.resumes or was_cancelled(one):
        ended = f"it died {one.submissions} times, and resumes={now.policy.resumes}"
        reason = (
            f"{'its job was cancelled' if was_cancelled(one) else ended}. {words}. See "
            f"{where_to_look(now.folder, one)}; then `controlbooth retrain tick --now`"
        )
        now.note("failed", reason, one, run=one.run)
        now.keep(replace(one, state="failed", reason=reason))
        return FAILED
    now.holding.renew()
    started = now.keep(submit(now.policy, now.folder, one))
    now.note("resumed", f"start {started.submissions}; it goes on from its latest checkpoint", started, run=one.run)
    return DONE


def mlflow_run_id(one: Round) -> str | None:
    remedy = "Delete it, and the run is sent to MLflow anew"
    return read_json(Path(one.run) / "tracking.json", remedy, {"run_id": maybe(is_text)}, missing={}).get("run_id")


def mark_status(one: Round) -> None:
    """Writes into status.json that a killed run has failed: the file says `running` until somebody notices."""
    path = Path(one.run) / "status.json"
    write_json(path, run_status(one) | dict(state="failed", error="its processes were gone", time=time.time()))


def decide(now: Tick, one: Round) -> int:
    """Measures a finished round and the champion on the frozen set, and lets the gate decide."""
    from controlbooth.trainer.run.checkpoint import (
        complete_checkpoints,
        read_state,  # torch, for this rare moment
    )

    registry.claim(now.there, now.folder)
    champion = registry.aliases(now.there).get(CHAMPION)
    config = load_config(Path(one.run) / "config.yaml")
    frozen = check_frozen(now.policy, now.state, config)
    saved = read_state(complete_checkpoints(Path(one.run))[-1])
    fingerprints = dict(dataset_fingerprint=one.dataset_fingerprint, evaluation_fingerprint=frozen)
    facts: dict[str, Any] = fingerprints | dict(run=one.run)
    run_id = mlflow_run_id(one)
    tags = fingerprints | dict(round=str(one.number))
    version = registry.register(now.there, run_id, saved["digest"], tags) if run_id else None
    if version is None:
        print(f"round {one.number}: MLflow has not got its checkpoint yet; its run is asked to send it", flush=True)
        return resume(now, one)  # a finished run that is started again sends what is left, and ends
    if champion is not None and champion.number == version.number:
        return refuse(now, one, version, f"its weights are the champion's, version {champion.number}", facts)
    asked = question(now.policy, config, now.policy.evaluation.data, frozen, now.policy.evaluation.samples)
    theirs = None
    if champion is not None:
        theirs = measure(now.folder, champion.run, champion.step, champion.digest, asked, now.holding)
    ours = measure(now.folder, Path(one.run), saved["step"], saved["digest"], asked, now.holding)
    gained = differences(theirs, ours, now.policy.gate.confidence)
    verdict = judge(now.policy.gate, gained, lower_is_better())
    against = f"against version {champion.number}" if champion else "against the base without control"
    reason = f"{against}, {asked.samples} pictures at {now.policy.gate.confidence:.0%}: {verdict.reason}"
    weighed = (now.policy.gate.metric, *now.policy.gate.no_regression)
    facts |= dict(step=saved["step"], figures={name: gained[name] for name in weighed})
    if not verdict.promote:
        now.holding.renew()
        registry.note_verdict(now.there, version.number, "refused", reason)
        return refuse(now, one, version, reason, facts)
    # What the audit log will say, whichever tick ends it
    (round_folder(now.folder, one.number) / "verdict.json").write_text(json.dumps(facts))
    against_number = champion.number if champion else None
    decided = replace(one, state="promoting", version=version.number, champion=against_number, reason=reason)
    return finish_promotion(now, now.keep(decided))


def refuse(now: Tick, one: Round, version: Version, reason: str, facts: dict[str, Any]) -> int:
    now.note("refused", reason, one, version=version.number, **facts)
    now.keep(replace(one, state="refused", version=version.number, reason=reason))
    return DONE


def finish_promotion(now: Tick, one: Round) -> int:
    """Moves the alias, unless somebody else has moved it since the decision: then the round is measured anew."""
    named = registry.aliases(now.there)
    champion, version = named.get(CHAMPION), one.version
    assert version is not None
    current = champion.number if champion else None
    if current not in (one.champion, version):
        print(f"the champion is version {current} and no longer {one.champion}: measuring anew", flush=True)
        return decide(now, now.keep(replace(one, state="training")))
    now.holding.renew()
    registry.promote(now.there, version, one.champion)
    registry.note_verdict(now.there, version, "promoted", one.reason)
    # They are for the log; what was decided is in state.json.
    facts = read_note(round_folder(now.folder, one.number) / "verdict.json", "The audit log has less of it")
    now.note("promoted", one.reason, one, version=version, previous_version=one.champion, **facts)
    now.keep(replace(one, state="promoted"))
    return DONE


def describe(policy: Policy, by_hand: bool = False) -> tuple[str, str]:
    """Returns what a tick would do now and why, and what it would submit; changes nothing. Raises as `tick` does.

    What would be submitted is a batch script or manifests; it is empty where there is nothing, and with engine=local.
    """
    folder, now = state_folder(policy), time.time()
    cluster_of(policy)
    there, state = open_registry_of(policy), read_state(folder, now)
    other = holder(folder)
    if other is not None and other.expires > now:
        return f"nothing: process {other.process} on {other.host} is at it", ""
    one = state.rounds[-1] if state.rounds else None
    if one is not None and one.state == "promoting":
        return f"would make round {one.number} the champion, as was decided: {one.reason}", ""
    if one is not None and not one.closed:
        one = as_submitted(one)
        if is_alive(one):
            return f"nothing: round {one.number} trains, {progress(one)}", ""
        if run_status(one)["state"] == "finished":
            return f"would measure round {one.number} and the champion on {policy.evaluation.data}, and decide", ""
        if was_cancelled(one):
            return f"would give up round {one.number}, whose job was cancelled", ""
        if one.submissions > policy.resumes:
            return f"would give up round {one.number}, which died {one.submissions} times", ""
        given = job_of_round(policy, folder, one)
        again = f"would start round {one.number} again, whose processes are gone: {last_words(folder, one)}"
        return again, rendered(shown_job(given[0]), given[1])[1] if given else ""
    proposed = propose(policy, folder, state, there, now, by_hand, None)
    if not proposed.start:
        return f"nothing: {proposed.reason}", ""
    check_start(policy, proposed)
    given, problems = first_submission(policy, proposed.config, frozen_config(policy, folder, proposed))
    if problems:
        raise cannot_start(proposed, problems)
    return f"would start round {proposed.number} in {run_folder(proposed.config)}: {proposed.reason}", given
