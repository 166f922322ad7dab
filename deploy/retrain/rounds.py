"""What a policy remembers between ticks: state.json with its rounds, and each round's run and its processes or job.

STATE/NAME/state.json                  rounds/0003/manifest.jsonl   the data set as it was when the round began
           audit.jsonl                             run.yaml         the run, complete
           lease-00000012.json                     output.txt       what its processes have printed
           evaluations/DIGEST-.../     evaluation.json, samples.jsonl, evaluation.png

A round of the engine `slurm` or `kubernetes` is a job of `controlbooth launch`: what was submitted is in RUN/job/, and
that counts, so a tick that is killed between submitting and writing state.json submits nothing twice.
"""

import json
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import TypeAdapter, ValidationError

from controlbooth.data.arguments import quoted
from controlbooth.data.errors import UserError
from controlbooth.data.files.locks import is_locked
from controlbooth.data.files.records import (
    Damaged,
    each,
    having,
    is_moment,
    is_text,
    is_whole,
    maybe,
    read_json,
    read_note,
)
from controlbooth.data.files.whole import write_whole
from controlbooth.deploy.retrain.policy import Policy, cluster_of
from controlbooth.launch.follow import describe_states, log_words, next_submission
from controlbooth.launch.job.cluster import Engine
from controlbooth.launch.job.job import Job, job_logs, recorded_job
from controlbooth.launch.job.outcome import ANEW, STATUS, failure_reasons
from controlbooth.launch.preflight.run import preflight
from controlbooth.launch.ranks.local import this_node
from controlbooth.launch.submit import at_work, last_record, launch, rendered, run_job, shown_job, states
from controlbooth.trainer.config.loading import dump, load_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.config.section import ConfigError

RoundState = Literal["training", "promoting", "promoted", "refused", "failed"]
CLI = [sys.executable, "-m", "controlbooth.launch.cli"]


@dataclass(frozen=True)
class Round:
    number: int
    state: RoundState
    run: str
    """Its folder."""
    trigger: str
    """Why it was started, for people."""
    started: float
    """Seconds since 1970."""
    identity: str
    """Digest of all that determines the weights; a round that was decided is not trained again."""
    dataset_fingerprint: str
    samples: int
    start: str
    """`scratch`, or the digest of the champion whose weights it started from."""
    working_directory: str
    """That relative paths of its run start from."""
    engine: Engine = "local"
    submissions: int = 0
    """How often its command was started, or its job submitted."""
    host: str | None = None
    """Of engine=local, as the two below."""
    process: int | None = None
    process_started: float | None = None
    champion: int | None = None
    """While promoting: the version that was measured against, None where there was none."""
    version: int | None = None
    """Its own version in the registry, once it was measured."""
    reason: str = ""
    """Of its end, for people."""

    @property
    def closed(self) -> bool:
        return self.state in ("promoted", "refused", "failed")


@dataclass(frozen=True)
class State:
    created: float
    """Seconds since 1970, of the first tick."""
    evaluation_fingerprint: str | None = None
    """Of the frozen set, as first found."""
    rounds: tuple[Round, ...] = field(default=())


ROUND = {
    **{"number": is_whole, "started": is_moment, "process": maybe(is_whole), "process_started": maybe(is_moment)},
    **dict.fromkeys(("version", "champion", "submissions", "samples"), maybe(is_whole)),
}
"""Of a round, what must be more than a number or a text, which State says."""


def read_state(folder: Path, now: float) -> State:
    path = folder / "state.json"
    remedy = f"Put back a copy, or take the folder {folder} away to begin anew: the champion stays in the registry"
    tree = read_json(path, remedy, {"created": is_moment, "rounds": each(having(ROUND))}, missing=None)
    if tree is None:
        return State(created=now)
    try:
        return TypeAdapter(State).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(path, f"its {where!r} is {first['input']!r:.60}", remedy) from None


def write_state(folder: Path, state: State) -> None:
    """Writes state.json whole or not at all; it is on the disk on return."""
    write_whole(folder / "state.json", json.dumps(asdict(state), indent=1).encode())


def with_round(state: State, changed: Round) -> State:
    """Returns the state with a round replaced, or added where its number is new."""
    others = tuple(one for one in state.rounds if one.number != changed.number)
    return replace(state, rounds=tuple(sorted((*others, changed), key=lambda one: one.number)))


def round_folder(folder: Path, number: int) -> Path:
    return folder / "rounds" / f"{number:04d}"


def training_command(policy: Policy, run_file: Path) -> list[str]:
    """Returns the command that trains a round on this machine, or goes on with it."""
    processes = [] if policy.processes is None else ["--processes", str(policy.processes)]
    return [*CLI, "train", str(run_file), *processes]


def first_submission(policy: Policy, config: RunConfig, frozen: RunConfig) -> tuple[str, list[str]]:
    """Returns what the engine would be given for a new round (empty with engine=local), and what is wrong with the
    round.

    config: of data that is there, and is checked. frozen: of the manifest that the round will train on.
    """
    cluster = cluster_of(policy)
    if cluster is None:
        return "", preflight(config, this_node(policy.processes))
    job, _, problems = run_job(config, cluster)
    return rendered(shown_job(job), {"run.yaml": dump(frozen)})[1], problems


def job_of_round(policy: Policy, folder: Path, one: Round) -> tuple[Job, dict[str, str]] | None:
    """Returns the round's next job and the files of the job's folder, name -> text; None with engine=local.

    Raises ConfigError where it cannot be submitted, and ValueError where the engine does not answer.
    """
    if one.engine != policy.engine:
        raise ConfigError(
            f"round {one.number} was begun with engine={one.engine}, and the policy says {policy.engine}. Set it back "
            "until this round has ended"
        )
    cluster = cluster_of(policy)
    if cluster is None:
        return None
    if last_record(Path(one.run)) is None:
        job, files, problems = run_job(load_config(round_folder(folder, one.number) / "run.yaml"), cluster)
    else:
        job, files, problems = next_submission(Path(one.run), cluster_file=policy.cluster)
    if problems:
        raise ConfigError(f"round {one.number} cannot be submitted: {'; '.join(problems)}")
    return job, files


def submit(policy: Policy, folder: Path, one: Round) -> Round:
    """Starts the round, or starts it again, so that it outlives the tick; -> the round with its process or job.

    Raises as `job_of_round` does, and ValueError with the engine's own words where it refuses the job.
    """
    given = job_of_round(policy, folder, one)
    if given is not None:
        launch(*given)
        return as_submitted(one)
    where = round_folder(folder, one.number)
    with open(where / "output.txt", "ab") as output:
        process = subprocess.Popen(
            training_command(policy, where / "run.yaml"),
            cwd=one.working_directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return replace(
        one,
        submissions=one.submissions + 1,
        host=socket.gethostname(),
        process=process.pid,
        process_started=psutil.Process(process.pid).create_time(),
    )


def as_submitted(one: Round) -> Round:
    """Returns the round with the number of submissions that its job's record counts, since people may have added some
    by `launch resume`; with engine=local, or before the first one, the round as it is."""
    record = None if one.engine == "local" else last_record(Path(one.run))
    return one if record is None else replace(one, submissions=record["submission"])


def is_alive(one: Round) -> bool:
    """Tells whether the round's job waits or runs; with engine=local, whether its command or anything else trains in
    the run's folder.

    Raises ValueError with engine=local on another machine than the one that trains, which cannot see its processes, and
    with other engines where the scheduler does not answer.
    """
    if one.engine != "local":
        record = last_record(Path(one.run))
        return record is not None and bool(at_work(record, recorded_job(Path(one.run), record).cluster))
    if one.host not in (None, socket.gethostname()):
        raise UserError(
            f"round {one.number} trains on {one.host}, and this is {socket.gethostname()}: engine=local is ticked on "
            "one machine. Tick there"
        )
    if one.process is not None:
        try:
            process = psutil.Process(one.process)
            same = abs(process.create_time() - (one.process_started or 0.0)) < 1.0
            if same and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            pass  # it has ended; its ranks have the lock below for as long as they live
    return is_locked(Path(one.run) / ".lock")


def run_status(one: Round) -> dict[str, Any]:
    """Reads status.json of the round's run; its state is `none` where the run has not come so far or the file is
    damaged."""
    fields = {**STATUS, "state": is_text}
    return read_note(Path(one.run) / "status.json", ANEW, fields) or dict(state="none")


def was_cancelled(one: Round) -> bool:
    """Tells whether a person has ended the round's job by `controlbooth launch cancel` and has not resumed it."""
    return one.engine != "local" and (Path(one.run) / "job" / "cancelled").exists()


def job_words(one: Round) -> str:
    """Says for people what state the engine reports for the round's job; empty with engine=local, or before it was
    submitted."""
    record = None if one.engine == "local" else last_record(Path(one.run))
    if record is None:
        return ""
    asked = states(record, recorded_job(Path(one.run), record).cluster)
    return f"{record['engine']} job {record['id']}: {describe_states(asked)}"


def last_words(folder: Path, one: Round) -> str:
    """Says why the round died, as far as is known: what its ranks have noted, or the last line that was printed."""
    silent = "it has printed nothing"
    if one.engine == "local":
        return run_status(one).get("error") or log_words(round_folder(folder, one.number) / "output.txt") or silent
    record = last_record(Path(one.run))
    if record is None:
        return "it was never submitted"
    reasons = failure_reasons(Path(one.run), since=record["submitted"])
    return f"{job_words(one)}; {'; '.join(reasons) or log_words(job_logs(Path(one.run))[0]) or silent}"


def where_to_look(folder: Path, one: Round) -> str:
    """Says for people where all that the round has printed can be read: a file, or a command that shows it."""
    if one.engine == "local":
        return str(round_folder(folder, one.number) / "output.txt")
    return f"`controlbooth launch logs {quoted(one.run)}`"
