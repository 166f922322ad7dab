"""`controlbooth train`: checks a run, starts its ranks on this machine, and stops them cleanly."""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from controlbooth.data.locks import is_locked
from controlbooth.data.parent import LAUNCHER, REFUSED, adopt
from controlbooth.data.records import is_text, read_note, write_json
from controlbooth.launch import orphans
from controlbooth.launch.outcome import ANEW, STATUS, failure_notes
from controlbooth.launch.preflight import preflight
from controlbooth.launch.torchrun import (
    GRACE_SECONDS,
    WORKER,
    Node,
    lone_command,
    lone_environment,
    threads_per_process,
    torchrun_command,
    torchrun_environment,
    world_size,
)
from controlbooth.trainer.config import (
    RunConfig,
    base_folder,
    data_set_name,
    gradient_accumulation_steps,
    load_config,
    run_folder,
    sources,
    tracking_uri,
)
from controlbooth.trainer.continuing import describe_start
from controlbooth.trainer.evaluate.verdict import cannot_announce
from controlbooth.trainer.network_check import network_problems

TOLD = {**STATUS, "state": is_text}
"""Fields of a status.json that tells of a run."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OVER = "it is finished, and its ranks are ending; once more ends them now"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="controlbooth train",
        description="Runs a training on this machine. Started again, it goes on from its latest checkpoint.",
        epilog="examples:\n  controlbooth train launch/configs/quickstart.yaml max_steps=200 name=short\n"
        "  controlbooth train run.yaml --processes 8 --dry-run\n"
        "  controlbooth train run.yaml data.shards=shards/train data.held_out=null",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN.yaml", help="the run; launch/configs/ holds complete ones")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, set here")
    parser.add_argument("--processes", type=int, help="ranks (default: one per GPU, or 1 on a machine without)")
    parser.add_argument("--dry-run", action="store_true", help="check the run and print the command; start nothing")
    options = parser.parse_intermixed_args(arguments)
    return train(options.run, options.overrides, options.processes, options.dry_run)


def train(run_file: str, overrides: Sequence[str] = (), processes: int | None = None, dry_run: bool = False) -> int:
    """Runs to the end and returns the exit status: of the rank if it is alone (trainer/failures.py), else torchrun's; 2
    where the checks found problems; 128 + signal if stopped.

    processes: ranks on this machine; None for one per GPU, or 1 without. Raises ConfigError and ValueError.
    """
    config = load_config(run_file, overrides)
    node = this_node(processes)
    if problems := preflight(config, node):
        for problem in problems:
            print(f"controlbooth train: {problem}", file=sys.stderr)
        if not dry_run:
            mend_status(run_folder(config), problems)
        return 2
    print(plan(config, node), flush=True)
    start = start_of(node, run_file, overrides, config.name)
    if dry_run:
        problems = list(network_problems(config))
        for problem in problems:
            print(f"controlbooth train: {problem}", file=sys.stderr)
        if problems:
            return 2
        warn_of_shrunk_lines(config)
        warn_of_cut_captions(config)
        print(f"command    {start}")
        return 0
    began, killed = time.time(), out_of_memory_kills()
    with tempfile.TemporaryDirectory(prefix="controlbooth-refused-") as refused:
        start.environment[REFUSED] = refused
        status = run(start, is_over=lambda: is_finished(run_folder(config), began))
        early = failures(Path(refused), began)
    if status not in (0, *(128 + number for number in STOP_SIGNALS)):
        told = early | failures(run_folder(config), began)
        say_again("controlbooth train", start, told)
        reason = stopped_well(run_folder(config), began) if not start.lone and not told else None
        by_signal = signal_of(status) if start.lone else "SIGKILL"  # torchrun has named it above
        if reason is None and by_signal and (start.lone or status < 128):  # else its agent's, which `run` has told
            reason = why_silent(config, told, world_size(node), out_of_memory_kills() - killed, by_signal)
        if reason:
            print(f"controlbooth train: {reason}", file=sys.stderr)
    return status


def mend_status(folder: Path, problems: Sequence[str]) -> None:
    """Puts a whole status.json in the place of one that says nothing; one that tells of a run stays, as the start that
    was refused has changed nothing of that."""
    path = folder / "status.json"
    if path.is_file() and not is_locked(folder / ".lock") and not read_note(path, "It is written anew", TOLD):
        write_json(path, {"state": "failed", "error": "; ".join(problems), "time": time.time()})


def warn_of_shrunk_lines(config: RunConfig) -> None:
    """What the start says of lines that were packed much larger than they are read; of shards that are indexed."""
    from controlbooth.data.condition_sizes import warnings  # imports numpy and OpenCV: not for every start

    data, shards = config.data, [source.shards for source in sources(config)]
    try:
        for warning in warnings(shards, data.condition, data.resolution):
            print(f"controlbooth train: warning: {warning}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"controlbooth train: conditions were not looked at: {error}", file=sys.stderr)


def warn_of_cut_captions(config: RunConfig) -> None:
    """What the start says of captions and prompts that are longer than the base reads; of shards that are indexed."""
    from controlbooth.data.long_captions import cut_captions_of  # imports transformers: not for every start

    base = base_folder(config.model.base)
    locations = [source.shards for source in sources(config)]
    try:
        told = cut_captions_of(locations, base if base.is_dir() else base.parent, config.validation.prompts)
    except (ValueError, OSError) as error:
        print(f"controlbooth train: captions were not counted: {error}", file=sys.stderr)
    else:
        if told is not None:
            print(f"controlbooth train: warning: {told}", file=sys.stderr)


def is_finished(folder: Path, since: float) -> bool:
    """Whether a start of this run has written, since a time in seconds since 1970, that it has done all its steps."""
    status = read_note(folder / "status.json", ANEW, STATUS)
    return status.get("state") == "finished" and (status.get("time") or 0.0) >= since


def stopped_well(folder: Path, since: float) -> str | None:
    """What to say where the ranks have ended with a checkpoint, as a signal asks them to that torchrun hands on."""
    status = read_note(folder / "status.json", ANEW, STATUS)
    if status.get("state") != "stopped" or (status.get("time") or 0.0) < since:
        return None
    saved = f"with step {status.get('step')} saved"
    return f"the ranks were stopped from outside, {saved}. Started again, the run goes on there"


def failures(folder: Path, since: float) -> dict[int, str]:
    """rank -> what it has said about its failure since a time in seconds since 1970."""
    notes = sorted(failure_notes(folder, since), key=lambda note: note["rank"])
    return {note["rank"]: note["error"] for note in notes}


def say_again(program: str, start: "Start", told: dict[int, str]) -> None:
    """What the ranks have said, below torchrun's own report; what a rank alone has said stands last already."""
    if not start.lone:
        for rank, error in told.items():
            print(f"{program}: rank {rank}: {error}", file=sys.stderr)


def signal_of(status: int) -> str | None:
    """The name of the signal that an exit status of more than 128 stands for."""
    try:
        return signal.Signals(status - 128).name
    except ValueError:
        return None


def why_silent(
    config: RunConfig, told: dict[int, str], ranks: int, kills: int, by_signal: str = "SIGKILL"
) -> str | None:
    """What to make of ranks that ended without a word, as a signal ends them.

    told: what the others said. kills: processes that the kernel has killed for memory meanwhile. None where the others
    say enough: torchrun ends those that are still there when one has failed.
    """
    silent = [rank for rank in range(ranks) if rank not in told]
    if not silent or not all("lost another rank" in error for error in told.values()):
        return None
    who = f"rank {', '.join(map(str, silent))} ended without a word"
    if kills:
        return (
            f"{who}, and the kernel has killed {kills} process{'es' if kills > 1 else ''} for memory meanwhile. Lower "
            f"micro_batch_size={config.micro_batch_size}, set model.gradient_checkpointing=true, start fewer ranks on "
            "this machine with --processes, or leave it to this run alone; then start again"
        )
    return f"{who}: something has killed it ({by_signal}). Started again, the run goes on from its checkpoint"


def out_of_memory_kills() -> int:
    """Processes that this machine's kernel has killed for memory since it was started; 0 where it does not say."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))


def this_node(processes: int | None = None) -> Node:
    """The facts of this machine. Raises ValueError where MASTER_PORT names a port that is taken."""
    gpus = gpu_count()
    if processes is not None and processes < 1:
        raise ValueError(f"--processes is {processes}, but a run has at least one rank")
    return Node(processes=processes or max(1, gpus), cores=core_count(), gpus=gpus, head_port=head_port())


def core_count() -> int:
    """Cores that this process may use, which is less than the machine's inside a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count() -> int:
    """NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible, counted without torch."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):  # no driver, or a driver without a device
        return 0
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"nvidia-smi -L gave no answer in {error.timeout:.0f} s, so the driver hangs. Look at `dmesg`, or set "
            "PATH without nvidia-smi to run on the CPU"
        ) from error
    installed = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed
    return min(installed, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))


def head_port() -> int:
    """MASTER_PORT if it is set and free, otherwise a free port that the system chooses."""
    configured = os.environ.get("MASTER_PORT", "")
    if configured and not configured.isdecimal():
        raise ValueError(f"MASTER_PORT is {configured!r}, but a port is a number. Unset it to have a free one chosen")
    with socket.socket() as probe:
        try:
            probe.bind(("", int(configured or 0)))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"MASTER_PORT={configured} cannot be used on this machine ({error}). "
                "Unset it to have a free one chosen, or end the program that listens there"
            ) from error
        return probe.getsockname()[1]


def plan(config: RunConfig, node: Node) -> str:
    """What is about to run, for a person to check at a glance."""
    accumulation = gradient_accumulation_steps(config, world_size(node))
    devices = f"{node.gpus} GPUs" if node.gpus else f"CPU, {threads_per_process(node)} threads each"
    held_out = f"held out: {config.data.held_out}" if config.data.held_out else "nothing is held out or validated"
    return "\n".join(
        [
            *label("run", describe_start(config)),
            f"model      ControlNet for '{config.data.condition}' on {config.model.base}",
            f"data       {data_set_name(config)}; {held_out}",
            f"ranks      {world_size(node)} ({devices}), ZeRO stage {config.engine.zero_stage}",
            f"batch      {config.global_batch_size} = {config.micro_batch_size} a rank x {world_size(node)} ranks "
            f"x {accumulation} accumulation steps",
            f"steps      {config.max_steps}, {config.max_steps * config.global_batch_size} samples",
            f"tracking   {tracking_uri(config)}",
            *label("warning", [why] if (why := cannot_announce(config)) else []),
        ]
    )


def label(name: str, lines: Sequence[str]) -> list[str]:
    """Lines of a plan, the first of them with its name."""
    return [f"{name if number == 0 else '':<11}{line}" for number, line in enumerate(lines)]


@dataclass(frozen=True)
class Start:
    """How the ranks of this machine are started: several through torchrun, one by itself."""

    command: list[str]
    environment: dict[str, str]
    """To be set on top of this process's."""
    lone: bool
    """Whether what is started is the rank, and not torchrun."""

    def __str__(self) -> str:
        """For a shell."""
        words = (f"{key}={shlex.quote(value)}" for key, value in self.environment.items())
        return " ".join([*words, shlex.join(self.command)])


def start_of(node: Node, run_file: str, overrides: Sequence[str], name: str, worker: str = WORKER) -> Start:
    """name: of the run. worker: the module that each rank runs."""
    environment = torchrun_environment(node, os.environ)
    if world_size(node) == 1:
        return Start(lone_command(run_file, overrides, worker), environment | lone_environment(), lone=True)
    return Start(torchrun_command(run_file, overrides, name, node, worker), environment, lone=False)


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
    with adopting(not start.lone) as left_behind:
        started = orphans.start(start.command, os.environ | start.environment | {LAUNCHER: str(os.getpid())})
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
                _terminate(started, start.lone)

        with handling_stops(forward):
            status = started.wait()
            if ranks := left_behind(started):
                _end_ranks(ranks, f"torchrun was ended by {signal_of(128 - status) or f'status {status}'}", stopping)
    if received and status <= 0 and not (too_late and status == 0):
        return 128 + received[0]
    if status < 0:  # of several ranks, torchrun says it
        what = "rank 0" if start.lone else "torchrun"
        print(f"controlbooth: {what} was ended by {signal_of(128 - status)}", file=sys.stderr)
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def handling_stops(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, the signals that stop a command go to a handler; not SIGHUP where nohup has it ignored."""
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
    """Inside, what a started program leaves behind becomes this process's, and the function given tells what that is.

    whether: False for a program that leaves nothing behind of ours. On other systems than Linux nothing is taken in.
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
    """Has them stop as a signal to the launcher would, and waits; what has not ended in time is killed."""
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


def _terminate(started: subprocess.Popen, lone: bool) -> None:
    """SIGTERM to the ranks: torchrun itself would end with status 1 and a traceback although all of them ended well."""
    try:
        ranks = [] if lone else psutil.Process(started.pid).children()
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
