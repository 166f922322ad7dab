"""`controlbooth train`: checks a run, starts its ranks on this machine, and stops them cleanly."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from controlbooth.data.errors import UserError
from controlbooth.data.processes.cpus import usable_cpus
from controlbooth.data.processes.parent import LAUNCHER, adopt
from controlbooth.launch.ranks import child_process
from controlbooth.launch.ranks.torchrun import (
    GRACE_SECONDS,
    WORKER,
    Node,
    single_rank_command,
    single_rank_environment,
    torchrun_command,
    torchrun_environment,
    world_size,
)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OVER = "it is finished, and its ranks are ending; once more ends them now"


def signal_of(status: int) -> str | None:
    """Returns the name of the signal that an exit status of more than 128 stands for; None where it stands for none."""
    try:
        return signal.Signals(status - 128).name
    except ValueError:
        return None


def this_node(processes: int | None = None) -> Node:
    """Returns the facts of this machine. processes: ranks on it; None for one per GPU, or 1 without. Raises ValueError
    for fewer than 1, and where MASTER_PORT cannot be used or nvidia-smi hangs."""
    gpus = gpu_count()
    if processes is not None and processes < 1:
        raise UserError(f"--processes is {processes}, but a run has at least one rank")
    return Node(processes=processes or max(1, gpus), cores=usable_cpus(), gpus=gpus, head_port=head_port())


def gpu_count() -> int:
    """Counts the NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible, without torch. Raises ValueError where
    nvidia-smi hangs."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):  # no driver, or a driver without a device
        return 0
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"nvidia-smi -L gave no answer in {error.timeout:.0f} s, so the driver hangs. Look at `dmesg`, or set "
            "PATH without nvidia-smi to run on the CPU"
        ) from error
    installed = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed
    return min(installed, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def head_port() -> int:
    """Returns MASTER_PORT if it is set, otherwise a free port that the system chooses. Raises ValueError for a
    MASTER_PORT that is no number or is taken."""
    configured = os.environ.get("MASTER_PORT", "")
    if configured and not configured.isdecimal():
        raise UserError(f"MASTER_PORT is {configured!r}, but a port is a number. Unset it to have a free one chosen")
    with socket.socket() as probe:
        try:
            probe.bind(("", int(configured or 0)))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"MASTER_PORT={configured} cannot be used on this machine ({error}). "
                "Unset it to have a free one chosen, or end the program that listens there"
            ) from error
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Start:
    """How the ranks of this machine are started: several through torchrun, one by itself."""

    command: list[str]
    environment: dict[str, str]
    """To be set on top of this process's."""
    single_rank: bool
    """Whether what is started is the rank, and not torchrun."""

    def __str__(self) -> str:
        """Returns the command as it is typed in a shell, with its variables before it."""
        words = (f"{key}={shlex.quote(value)}" for key, value in self.environment.items())
        return " ".join([*words, shlex.join(self.command)])


def start_of(node: Node, run_file: str, overrides: Sequence[str], name: str, worker: str = WORKER) -> Start:
    """Returns how the ranks of this machine are started. name: of the run. worker: the module that each rank runs."""
    environment = torchrun_environment(node, os.environ)
    if world_size(node) == 1:
        return Start(
            single_rank_command(run_file, overrides, worker), environment | single_rank_environment(), single_rank=True
        )
    return Start(torchrun_command(run_file, overrides, name, node, worker), environment, single_rank=False)


def run(
    start: Start,
    stopping: str = "after this step with a checkpoint",
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    """Starts the ranks and waits. The first stop signal is handed to them as SIGTERM; the second one kills them.

    stopping: what the ranks do at the first one, for people. On Linux they get it too when this process is killed.
    is_over: whether they are done and only clearing up, so that there is nothing left to stop.
    Returns the exit status; 128 + signal where a signal stopped a run that ended well. No rank is left then: those of
    an agent that was killed have been asked to stop, waited for, and after GRACE_SECONDS been killed.
    """
    with adopting(not start.single_rank) as left_behind:
        started = child_process.start(start.command, os.environ | start.environment | {LAUNCHER: str(os.getpid())})
        received: list[int] = []
        too_late = False

        def forward(number: int, _frame: object) -> None:
            nonlocal too_late
            received.append(number)
            if len(received) > 1 or left_behind(started):  # which are stopping already
                _kill(started)
                for process in left_behind(started):
                    _signal(process.pid, signal.SIGKILL)
            elif too_late := is_over():
                print(f"controlbooth: {OVER}", file=sys.stderr)
            else:
                print(f"controlbooth: stopping {stopping}; once more stops now", file=sys.stderr)
                _terminate(started, start.single_rank)

        with handling_stops(forward):
            status = started.wait()
            if ranks := left_behind(started):
                _end_ranks(ranks, f"torchrun was ended by {signal_of(128 - status) or f'status {status}'}", stopping)
    if received and status <= 0 and not (too_late and status == 0):
        return 128 + received[0]
    if status < 0:  # of several ranks, torchrun says it
        what = "rank 0" if start.single_rank else "torchrun"
        print(f"controlbooth: {what} was ended by {signal_of(128 - status)}", file=sys.stderr)
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def handling_stops(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Sends the signals that stop a command to a handler while the block runs; those that are ignored, as SIGHUP is
    under nohup, stay so."""
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        if previous[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def adopting(whether: bool) -> Iterator[Callable[[subprocess.Popen], list[psutil.Process]]]:
    """Makes this process, while the block runs, the parent of what a started program leaves behind.

    The function that the block is given returns these processes. whether: False for a program that leaves nothing
    behind of ours. On other systems than Linux nothing is taken in.
    """
    before = {process.pid for process in psutil.Process().children()}

    def left_behind(started: subprocess.Popen) -> list[psutil.Process]:
        if not whether or started.poll() is None:
            return []
        return [process for process in psutil.Process().children() if process.pid not in before | {started.pid}]

    adopt(whether)
    try:
        yield left_behind
    finally:
        adopt(False)


def _end_ranks(ranks: Sequence[psutil.Process], why: str, stopping: str) -> None:
    """Asks ranks to stop, as a signal to the launcher would, and waits; kills what has not ended in GRACE_SECONDS."""
    named = ", ".join(str(rank.pid) for rank in ranks)
    print(
        f"controlbooth: {why}; its ranks (processes {named}) are stopping {stopping}; Ctrl-C ends them now",
        file=sys.stderr,
    )
    for rank in ranks:
        _signal(rank.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(ranks, timeout=GRACE_SECONDS)
    for rank in left:
        print(f"controlbooth: process {rank.pid} has not stopped in {GRACE_SECONDS} s, and is killed", file=sys.stderr)
        _signal(rank.pid, signal.SIGKILL)
    psutil.wait_procs(left, timeout=GRACE_SECONDS)


def _terminate(started: subprocess.Popen, single_rank: bool) -> None:
    """Sends SIGTERM to the ranks: torchrun itself would end with status 1 and a traceback though they all end well."""
    try:
        ranks = [] if single_rank else psutil.Process(started.pid).children()
    except psutil.NoSuchProcess:
        return
    for process in ranks:
        _signal(process.pid, signal.SIGTERM)
    if not ranks:  # the rank itself, or torchrun, which has not started any yet
        _signal(started.pid, signal.SIGTERM)


def _kill(started: subprocess.Popen) -> None:
    try:
        processes = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        _signal(process.pid, signal.SIGKILL)


def _signal(process_id: int, number: signal.Signals) -> None:
    try:
        os.kill(process_id, number)
    except ProcessLookupError:
        return  # it ended by itself meanwhile, which is what was asked for
