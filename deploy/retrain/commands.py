"""`controlbooth retrain tick | status | rollback | history`: training again when it is time, under a gate."""

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser
from controlbooth.deploy.retrain import audit, registry
from controlbooth.deploy.retrain.lease import Holding, LeaseLost, holder, take
from controlbooth.deploy.retrain.policy import Policy, load_policy, state_folder
from controlbooth.deploy.retrain.registry import CHAMPION, PREVIOUS, RegistryAway
from controlbooth.deploy.retrain.rounds import as_submitted, is_alive, read_state
from controlbooth.deploy.retrain.tick import AGAIN, describe, open_registry_of, progress, tick
from controlbooth.trainer.config.section import ConfigError

EXIT_STATUSES = """exit statuses, of all four:
  0  done, whatever there was to do: started, waiting, promoted, refused, nothing, or another tick is at it
  2  a person must correct something: the policy, the data, a full disk. It is in the audit log too
  3  MLflow does not answer, or another tick took over. Nothing was changed; call it again
  4  a round was given up: after policy.resumes new starts, or because a person has cancelled its job"""


def main_tick(arguments: Sequence[str] | None = None) -> int:
    parser = _parser(
        "tick",
        "Looks at the data set, the last round and the registry, does at most one thing, and ends: starts a training, "
        "resumes a dead one, or measures a finished one and makes it the champion if the gate holds. Call it as often "
        "as you like, from cron, a CronJob, `sbatch --begin` or Airflow; two at once do what one does. What it starts "
        "outlives it: processes of this machine (under a systemd timer: KillMode=process), or with `engine: slurm` or "
        "`engine: kubernetes` in the policy a job, which `controlbooth launch status RUN_FOLDER` tells about.",
        "controlbooth retrain tick policy.yaml\n  controlbooth retrain tick policy.yaml --dry-run\n"
        "  */10 * * * *  cd /srv/retraining && controlbooth retrain tick policy.yaml        (a line of a crontab)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tell what would be done now, and why, and print what would be submitted; change nothing",
    )
    parser.add_argument("--now", action="store_true", help="start a round whatever the triggers say")
    options = parser.parse_args(arguments)
    policy = load_policy(options.policy)

    def work() -> int:
        if options.dry_run:
            told, submitted = describe(policy, options.now)
            print(f"{told}\n{submitted}", end="")
            return 0
        return tick(policy, options.now)

    return _or_again("tick", work)


def main_status(arguments: Sequence[str] | None = None) -> int:
    parser = _parser(
        "status",
        "Shows the champion, the open round, the last decision, and what a tick would do now.",
        "controlbooth retrain status policy.yaml",
    )
    policy = load_policy(parser.parse_args(arguments).policy)
    return _or_again("status", lambda: _status(policy))


def _status(policy: Policy) -> int:
    folder = state_folder(policy)
    named = registry.aliases(open_registry_of(policy))
    print(f"policy      {policy.name}, state in {folder}")
    for alias in (CHAMPION, PREVIOUS):
        version = named.get(alias)
        shown = "none" if version is None else f"version {version.number}, {version.checkpoint}"
        print(f"{alias.replace('_champion', ''):<12}{shown}")
    for one in read_state(folder, time.time()).rounds:
        running = progress(as_submitted(one)) if one.state == "training" and is_alive(one) else ""
        began = datetime.datetime.fromtimestamp(one.started).astimezone().strftime("%Y-%m-%d %H:%M %Z")
        print(f"{f'round {one.number}':<12}{one.state}, {one.samples} samples, begun {began}  {running}".rstrip())
    if decided := audit.read(folder):
        print(f"last        {decided[-1]['decision']}: {decided[-1]['reason']}")
    print(f"a tick now  {describe(policy)[0]}")
    return 0


def main_rollback(arguments: Sequence[str] | None = None) -> int:
    parser = _parser(
        "rollback",
        "Gives the alias `champion` back to the version that had it before. Repeated, it goes back further.",
        "controlbooth retrain rollback policy.yaml --reason 'hands look wrong'",
    )
    parser.add_argument("--reason", default="by hand", help="for the audit log")
    parser.add_argument("--dry-run", action="store_true", help="tell which version would return; change nothing")
    options = parser.parse_args(arguments)
    policy = load_policy(options.policy)
    return _or_again("rollback", lambda: _rollback(policy, options.reason, options.dry_run))


def _rollback(policy: Policy, reason: str, dry_run: bool) -> int:
    folder, there = state_folder(policy), open_registry_of(policy)
    if dry_run:
        leaving, returning = registry.way_back(there)
        print(f"would return from version {leaving.number} to version {returning.number}, {returning.checkpoint}")
        return 0
    lease = take(folder, policy.lease_seconds)
    if lease is None:
        other = holder(folder)
        who = f"process {other.process} on {other.host}" if other else "another process"
        raise ConfigError(f"{who} is at a tick of {policy.name}, which may be promoting: try again when it has ended")
    with Holding(folder, lease, policy.lease_seconds) as holding:
        holding.renew()
        leaving, returning = registry.rollback(there)
        text = f"version {leaving.number} leaves, version {returning.number} returns: {reason}"
        facts = dict(version=returning.number, previous_version=leaving.number)
        audit.append(folder, lease.generation, None, "rolled back", text, **facts)
    print(f"rolled back: {text}, {returning.checkpoint}")
    return 0


def main_history(arguments: Sequence[str] | None = None) -> int:
    parser = _parser(
        "history",
        "Prints the audit log: all that was decided, when, why, and on which data. The log itself is audit.jsonl in "
        "the policy's state folder.",
        "controlbooth retrain history policy.yaml",
    )
    folder = state_folder(load_policy(parser.parse_args(arguments).policy))
    print(audit.describe(audit.read(folder)) or f"nothing was decided yet: {folder / audit.NAME} does not exist")
    return 0


def _parser(verb: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = verb_parser(
        f"retrain {verb}",
        description,
        f"examples:\n  {example}\n\n{EXIT_STATUSES}",
    )
    parser.add_argument("policy", type=Path, metavar="POLICY.yaml", help="launch/configs/retrain.yaml is one")
    return parser


def _or_again(verb: str, work: Callable[[], int]) -> int:
    """Returns the exit status of `work`. Where MLflow is away or the lease is lost, prints one line and returns AGAIN:
    calling again later is all that is needed."""
    try:
        return work()
    except (RegistryAway, LeaseLost) as error:
        print(f"controlbooth retrain {verb}: {error}", file=sys.stderr)
        return AGAIN
