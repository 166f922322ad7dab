"""What a run of subjects tells while it trains: a run in MLflow for the job, and below it one for each subject.

    RUN/metrics.jsonl, tracking.json                of the job: speed, memory, how many subjects are finished
        subjects/NAME/metrics.jsonl, tracking.json  of a subject: its losses, figures and pictures
        tracking/rank-1/...                         of the job, as another rank sees it
        rows/0-16/...                               of the job, as a task of an array sees it

A subject's lines lie with the subject, since another rank or task may train it after a restart; one writes there at a
time, the one that trains it. All ranks and tasks log to one run of the job: they agree on its key in RUN/tracking.json
before they know a server, and on its id in RUN/.mlflow-run-KEY. What each of several measures of itself has its name in
it (train/rank-1/step_seconds, train/rows-0-16/step_seconds). One thread of a process sends for all of them.
"""

import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from controlbooth.data.files.records import is_text, read_json_list
from controlbooth.trainer.config.run import tracking_uri
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.manifest import Task
from controlbooth.trainer.dreambooth.status import status_of
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.markdown import code, plain
from controlbooth.trainer.run.attempt import Attempt, is_superseded
from controlbooth.trainer.tracking import tracker as tracking
from controlbooth.trainer.tracking.spool import read_metrics
from controlbooth.trainer.tracking.system import system_metrics
from controlbooth.trainer.tracking.tracker import Status, Tracker

logger = logging.getLogger(__name__)

SHARE_OF_SENDING = 0.005
"""Of the time, that sending may take of a processor while subjects are trained: rounds come less often the more a round
costs, which is most where MLflow's own database code runs in this process, for a SQLite file."""
LONGEST_PAUSE_SECONDS = 60.0
"""Between two rounds of sending, however much they cost."""
QUEUED_AT_ONCE = 8
"""Subjects whose runs are made in MLflow between two rounds of sending, while they wait for their training."""
ENDED: dict[str, Status] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
"""States in which a subject's run in MLflow has ended."""


@dataclass
class Closing:
    """How the training of a process has ended."""

    stopped: bool = False
    """Before all was done, as it was asked to."""


class Untracked:
    """What the training of subjects calls to be tracked; this one leaves it to another rank, and does nothing."""

    @contextlib.contextmanager
    def open(self, faults: Mapping[str, str]) -> Iterator[Closing]:
        """Keeps tracking open until the training inside has ended, well or not.

        faults: by name, what is wrong with the subjects that cannot be trained.
        """
        yield Closing()

    def queue(self, tasks: Sequence[Task]) -> None:
        """Announces the subjects that this process will train and has not begun."""

    def begin(self, task: Task, step: int) -> None:
        """Begins the run of a subject that is trained from here on.

        step: how many steps it has made up to now; what was logged of later ones is forgotten.
        """

    def log(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the figures of a subject that has begun, except those that are not finite."""

    def log_image(self, name: str, path: Path, series: str, step: int) -> None:
        """Logs a picture in a series of a subject. The file must stay until it is sent."""

    def set_tags(self, name: str, tags: Mapping[str, str]) -> None:
        """Sets tags of a subject that has begun."""

    def describe(self, name: str, **parts: str) -> None:
        """Sets parts of the description of a subject that has begun, as Markdown."""

    def log_step(self, metrics: Mapping[str, float]) -> None:
        """Logs what a step of all subjects together has cost.

        It is logged by the number of steps of this process, in which repeated ones count.
        """

    def end(self, task: Task, state: str, reason: str = "") -> None:
        """Ends the run of a subject. state: finished, failed or stopped. reason: why it has failed."""


class SubjectTracking(Untracked):
    """Tracks one process's part of the job's run, and the runs of the subjects that this process trains.

    What is logged is in files on return, and only the end of `open` waits for a server.
    """

    def __init__(
        self,
        config: SubjectRunConfig,
        folder: Path,
        attempt: Attempt,
        world: World,
        tags: Mapping[str, str],
        tell: Callable[[Sequence[str]], None] | None = None,
    ):
        """Opens the job's run, and starts a thread that sends to MLflow.

        The first rank of each machine starts another one, which measures the machine.
        folder: the folder of the run. attempt.run is the same, or the part of it that belongs to a task of an array.
        tell: is called once, from a thread, with how to open the job's run, when MLflow has it.
        """
        self._config, self._folder, self._attempt = config, folder, attempt
        own = attempt.run if world.rank == 0 else attempt.run / "tracking" / f"rank-{world.rank}"
        names = [] if attempt.run == folder else [f"rows-{attempt.run.name}"]
        names += [f"rank-{world.rank}"] if world.rank else []
        self._part = "".join(f"{'-'.join(names)}/" if names else "")
        self._lock = threading.RLock()
        self._children: dict[str, Tracker] = {}
        self._ended: set[str] = set()
        self._queued: list[Task] = []
        self._changed = True
        params = config.model_dump(mode="json")
        self._parent = self._tracker(
            f"run-{world.rank}", own, config.name, params, tags, "RUNNING", shared=folder, tell=tell
        )
        self._parent.describe(what=describe_job(config, folder))
        self._step = last_step(own)
        self._closing = threading.Event()
        self._deadline = float("inf")
        seconds = config.tracking.system_metrics_seconds
        self._sampler = threading.Thread(target=self._sample, args=(seconds,), name="system metrics", daemon=True)
        self._sender = threading.Thread(target=self._send, name="tracking", daemon=True)
        if world.local_rank == 0:
            self._sampler.start()
        self._sender.start()

    @contextlib.contextmanager
    def open(self, faults: Mapping[str, str]) -> Iterator[Closing]:
        how = Closing()
        try:
            for name, reason in faults.items():
                self._end(name, {}, {}, "failed", reason)
            yield how
        except BaseException:
            if not is_superseded(self._attempt):  # else the runs in MLflow are the other's too
                self._abandon(10.0)
            raise
        self._finish(how.stopped, 30.0)

    def queue(self, tasks: Sequence[Task]) -> None:
        with self._lock:
            self._queued = list(tasks)

    def begin(self, task: Task, step: int) -> None:
        child = self._open(task.name, subject_params(self._config, task), subject_tags(task), "RUNNING")
        child.cut_back(step or -1)
        child.set_status("RUNNING")
        child.set_tags({"state": "running", "reason": ""})

    def log(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        self._children[name].log(step, finite(metrics))

    def log_image(self, name: str, path: Path, series: str, step: int) -> None:
        self._children[name].log_image(path, series, step)

    def set_tags(self, name: str, tags: Mapping[str, str]) -> None:
        self._children[name].set_tags(tags)

    def describe(self, name: str, **parts: str) -> None:
        self._children[name].describe(**parts)

    def log_step(self, metrics: Mapping[str, float]) -> None:
        self._step += 1
        self._parent.log(self._step, {self._named(name): value for name, value in finite(metrics).items()})

    def end(self, task: Task, state: str, reason: str = "") -> None:
        self._end(task.name, subject_params(self._config, task), subject_tags(task), state, reason)

    def is_sent(self) -> bool:
        """Tells whether MLflow has all that was logged up to now."""
        with self._lock:
            return not self._queued and all(one.is_sent() for one in (self._parent, *self._children.values()))

    def _finish(self, stopped: bool, timeout_seconds: float) -> None:
        counts = count_states(self._folder)
        self._log_counts()
        if not counts["left"]:
            self._parent.set_status("FAILED" if counts["failed"] else "FINISHED")
        elif stopped and not counts["training"]:  # else others are at work on the job
            self._parent.set_status("KILLED")
        self._close(timeout_seconds)

    def _abandon(self, timeout_seconds: float) -> None:
        """Closes after an error that ends this process, and marks the job as failed.

        The job of an array is not marked, since its other tasks go on.
        """
        if self._attempt.run == self._folder:
            self._parent.set_status("FAILED")
        self._close(timeout_seconds)

    def _close(self, timeout_seconds: float) -> None:
        """Tries to send what is left; the next start sends what remains."""
        self._deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        if self._sampler.ident is not None:
            self._sampler.join()
        self._sender.join(timeout_seconds)
        with self._lock:
            for tracker in (self._parent, *self._children.values()):
                tracker.close(0.0)

    def _end(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], state: str, reason: str) -> None:
        child = self._open(name, params, tags, "RUNNING")
        child.set_tags({"state": state, "reason": reason})
        child.set_status(ENDED[state])
        self._changed = True
        with self._lock:
            self._ended.add(name)

    def _named(self, name: str) -> str:
        """Puts this process's part, where the run has others, into a metric's name: train/loss -> train/rank-1/loss."""
        group, _, own = name.partition("/")
        return f"{group}/{self._part}{own}"

    def _open(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], status: Status) -> Tracker:
        """Returns a subject's tracker, which is opened where it is not open yet. status: of a run that is opened."""
        self._changed = True
        with self._lock:
            self._queued = [task for task in self._queued if task.name != name]
            self._ended.discard(name)
            if name not in self._children:
                own = self._folder / "subjects" / name
                self._children[name] = self._tracker(
                    f"subject-{name}", own, name, params, tags, status, parent=self._parent
                )
                if params:
                    self._children[name].describe(what=describe_subject(params))
            return self._children[name]

    def _tracker(
        self,
        place: str,
        own: Path,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        status: Status,
        **family: Any,
    ) -> Tracker:
        """Makes a Tracker with the settings of this run.

        family: what Tracker is given about the runs above and beside this one.
        """
        made_in = self._attempt.folder / f"tracking-{place}"
        made_in.mkdir(exist_ok=True)  # without its parents: those are gone where a newer start has taken the run
        return Tracker(
            own,
            tracking_uri(self._config),
            self._config.tracking.experiment,
            name,
            params,
            tags,
            self._config.tracking.system_metrics_seconds,
            made_in,
            status=status,
            threads=False,
            **family,
        )

    def _send(self) -> None:
        """Sends, in the sending thread, until tracking is closed and everything is sent, or its time is up."""
        while self._parent.is_ours():
            closing = self._closing.is_set()
            usual, began = self._is_connected(), time.thread_time()
            taken = self._send_round(closing)
            if closing and (taken or time.monotonic() > self._deadline):
                return
            self._closing.wait(pause_seconds(time.thread_time() - began if usual else 0.0))
            if closing:
                time.sleep(min(tracking.FIRST_RETRY_SECONDS, max(0.0, self._deadline - time.monotonic())))

    def _is_connected(self) -> bool:
        """Tells whether all runs are made in MLflow, so that a round costs what later ones will."""
        with self._lock:
            return not self._queued and all(one.is_connected() for one in (self._parent, *self._children.values()))

    def _send_round(self, closing: bool) -> bool:
        """Sends what each run has to send, and returns whether the server has taken all of it."""
        if self._changed and not closing:
            self._log_counts()
        taken = self._parent.send_pending(closing)
        with self._lock:
            children = dict(self._children)
        for name, child in children.items():
            if closing and not taken and time.monotonic() > self._deadline:
                return False
            taken &= child.send_pending(closing)
            self._retire(name)
        while self._queued and taken and not (closing and time.monotonic() > self._deadline):
            with self._lock:
                some = self._queued[:QUEUED_AT_ONCE]
                opened = {task.name: self._open_queued(task) for task in some}
                self._ended.update(opened)  # closed again once they are sent, until their training begins
            for name, child in opened.items():
                taken &= child.send_pending(closing)
                self._retire(name)
            if not closing:
                break
        return taken

    def _open_queued(self, task: Task) -> Tracker:
        tags = subject_tags(task) | {"state": "queued"}
        return self._open(task.name, subject_params(self._config, task), tags, "SCHEDULED")

    def _retire(self, name: str) -> None:
        """Closes the files of a subject that has ended, or only waits, once everything is sent."""
        with self._lock:
            child = self._children.get(name)
            if child is not None and name in self._ended and child.is_sent():
                child.close(0.0)
                self._ended.discard(name)
                del self._children[name]

    def _log_counts(self) -> None:
        """Logs how many subjects of the whole run are finished, failed, in training and left, as their statuses say."""
        self._changed = False
        try:
            counts = {state: float(count) for state, count in count_states(self._folder).items()}
        except (OSError, ValueError) as error:  # of a disk that is away for a moment: it must not end the sending
            logger.warning("how many subjects are finished cannot be told now: %s", error)
            self._changed = True
            return
        self._parent.log_timed("subjects", counts)

    def _sample(self, seconds: float) -> None:
        psutil.cpu_percent()  # the first call only starts the measurement
        while not self._closing.wait(seconds) and self._parent.is_ours():
            metrics = {f"{self._part}{name}": value for name, value in system_metrics(self._folder).items()}
            self._parent.log_timed("system", metrics)


def pause_seconds(spent: float) -> float:
    """Returns how long to wait after a round of sending that took so many seconds of a processor."""
    return max(tracking.SEND_EVERY_SECONDS, min(spent / SHARE_OF_SENDING, LONGEST_PAUSE_SECONDS))


def subject_params(config: SubjectRunConfig, task: Task) -> dict[str, Any]:
    """Returns the params by which the runs of subjects are compared in MLflow."""
    own = dict(
        class_noun=task.class_noun,
        identifier=task.identifier,
        instance_prompt=task.instance_prompt,
        class_prompt=task.class_prompt,
        pictures=len(task.images),
        steps=task.steps,
        learning_rate=task.learning_rate,
        method=config.method,
        base=config.model.base,
        prior_weight=config.prior.weight,
    )
    return own | ({"rank": task.rank} if config.method == "lora" else {})


def subject_tags(task: Task) -> dict[str, str]:
    return {"task": "dreambooth subject", "class_noun": task.class_noun, "identifier": task.identifier}


def describe_job(config: SubjectRunConfig, folder: Path) -> str:
    """Describes the job in Markdown, for the page of its run."""
    how = "all layers" if config.method == "full" else f"LoRA of rank {config.adapter.rank} on {config.adapter.layers}"
    return (
        f"**DreamBooth subjects** on {code(config.model.base)}: {how}, {config.steps} steps unless a subject has its "
        "own. Each subject is a child run, with its losses, its pictures and its state. Folder: "
        f"{code(folder.absolute())} on {socket.gethostname()}"
    )


def describe_subject(params: Mapping[str, Any]) -> str:
    """Describes a subject in Markdown, for the page of its run. params: as `subject_params` returns them."""
    return (
        f"**{plain(params['class_noun'])}**, drawn by {code(params['instance_prompt'])}: {params['pictures']} "
        f"pictures, {params['steps']} steps at {params['learning_rate']:g}. `samples.png` among the artifacts is "
        "the newest grid of its validations, where prompts are given; the others are under Model metrics"
    )


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def last_step(folder: Path) -> int:
    """Returns the largest step in a folder's metrics.jsonl, or 0 where there is none."""
    return max((step for step, _, _ in read_metrics(folder)), default=0)


def count_states(folder: Path) -> dict[str, int]:
    """Counts the subjects of a run that are finished, failed, in training, and left: all that have not ended."""
    record = folder / "subjects.json"
    known = {one["name"] for one in read_json_list(record, "Start the run again", {"name": is_text}, missing=[])}
    names = known | {path.parent.name for path in folder.glob("subjects/*/status.json")}
    states = [status_of(folder, name).get("state") for name in names]
    finished, failed = states.count("finished"), states.count("failed")
    return dict(
        finished=finished, failed=failed, training=states.count("training"), left=len(names) - finished - failed
    )
