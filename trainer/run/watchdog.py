"""A thread in each rank that ends it where it hangs: a collective without a peer, a disk that never answers.

The loop tells it what begins (`begin`); what then takes longer than its limit is hung. The first rank that finds so
asks all others through a file in the run's folder, each writes the Python stacks of its threads to stacks-RANK.txt,
the lowest rank of each machine says what every rank waits in, and all end, so that the engine starts the run again.

What holds Python's lock for ever stops this thread too; the other ranks, which wait for that one, still find it.

torchrun's agent asks the rendezvous before it ends, and behind a cable that is cut it waits for the answer as long as
TCP repeats the question: 15 minutes. So each rank leaves a process behind that ends an agent which stays without ranks.
"""

import contextlib
import faulthandler
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run.attempt import Attempt, Superseded, is_superseded, move
from controlbooth.trainer.run.failures import HUNG, SUPERSEDED, RankHung, note_failure

LOOK_EVERY_SECONDS = 1.0
LONGER = 6
"""What is no plain step (the start, the first step, a validation, a checkpoint) may take so many times the limit."""
SLOWER = 10
"""And anything may take so many times what the slowest of its kind has taken in this start."""
REPORT_SECONDS = 20.0
"""For the stacks of all ranks to be written and read, on a disk that may be what hangs."""

LET_SPEAK_SECONDS = 3.0
AGENT_SECONDS = 60.0
"""An agent that has neither ended nor started ranks anew so long after a hang is ended too."""
END_AGENT = """
import sys, time, psutil
agent, created, end = psutil.Process(int(sys.argv[1])), float(sys.argv[2]), time.monotonic() + float(sys.argv[3])
def idle():
    ranks = [one for one in agent.children() if one.status() != psutil.STATUS_ZOMBIE]
    return agent.is_running() and agent.create_time() == created and not ranks
time.sleep(5)
while idle() and time.monotonic() < end:
    time.sleep(1)
if idle():
    agent.kill()
"""


class Watchdog:
    """Of one rank. `begin` and `close` are called by the main thread."""

    def __init__(self, attempt: Attempt, world: World, timeout_seconds: float) -> None:
        self.attempt, self.world, self.timeout_seconds = attempt, world, timeout_seconds
        self._main = threading.get_ident()
        self._longest: dict[str, float] = {}
        self._closing = threading.Event()
        self._activity = ("the start", 0)
        self._spent = 0.0
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, kind: str, step: int) -> None:
        """Begins an activity, such as `the step` or `the validation`; the one before has ended."""
        before, _ = self._activity
        self._longest[before] = max(self._longest.get(before, 0.0), self._spent)
        self._activity, self._spent = (kind, step), 0.0

    def close(self) -> None:
        self._closing.set()

    def limit(self, kind: str) -> float:
        """Returns how many seconds an activity of this kind may take."""
        plain = self.timeout_seconds * (1 if kind == "the step" else LONGER)
        return max(plain, SLOWER * self._longest.get(kind, 0.0))

    def _watch(self) -> None:
        look_every = min(LOOK_EVERY_SECONDS, self.timeout_seconds / 10)
        asked = self.attempt.folder / "hung"
        before = time.monotonic()
        while not self._closing.wait(look_every):
            now = time.monotonic()
            # A process that was stopped, or a machine that slept, has not waited for all that time.
            self._spent += min(now - before, 2 * look_every)
            before = now
            kind, step = self._activity
            if self._spent > self.limit(kind) or asked.exists():
                self._end(kind, step, self._spent)

    def _end(self, kind: str, step: int, seconds: float) -> None:
        """Reports in a thread of its own, since the disk may be what hangs, and ends the process."""
        if is_superseded(self.attempt):
            os._exit(SUPERSEDED)
        report = threading.Thread(target=self._report, args=(kind, step, seconds), daemon=True)
        report.start()
        report.join(REPORT_SECONDS)
        if report.is_alive():
            where = f"{self.attempt.run} did not take its stacks"
            print(f"rank {self.world.rank} hangs in {kind} of step {step}; {where}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        end_agent_later()
        os._exit(HUNG)

    def _report(self, kind: str, step: int, seconds: float) -> None:
        where = waits_in(sys._current_frames()[self._main])
        line = f"rank {self.world.rank} on {socket.gethostname()}: {kind} of step {step}, for {seconds:.0f} s: {where}"
        with contextlib.suppress(Superseded):
            (self.attempt.folder / "hung").touch()
            # before the stacks: the rank that has read all of them speaks and goes, and takes the others with it
            note_failure(self.attempt, self.world.rank, RankHung(line))
            write_stacks(self.attempt, self.world.rank, line)
            told = self._gather()
            mine = [rank for rank, text in told.items() if f" on {socket.gethostname()}: " in text]
            message = describe(told, self.world.world_size, self.attempt.run)
            if self.world.rank == min(mine):
                print(f"\n{message}", file=sys.stderr, flush=True)  # not behind a progress bar
            else:  # the first rank that is gone takes the others with it, and one of them has to speak
                time.sleep(LET_SPEAK_SECONDS)

    def _gather(self) -> dict[int, str]:
        """Collects the first line of the stacks of all ranks that answer, by rank."""
        told: dict[int, str] = {}
        end = time.monotonic() + REPORT_SECONDS / 2
        while len(told) < self.world.world_size and time.monotonic() < end:
            for rank in range(self.world.world_size):
                if rank not in told and (line := _first_line(self.attempt, rank)):
                    told[rank] = line
            time.sleep(0.1)
        return told


def end_agent_later() -> None:
    """Leaves a process behind that looks after torchrun's agent, if that is what has started this rank."""
    agent = psutil.Process(os.getppid())
    if any(word == "torch.distributed.run" or Path(word).name == "torchrun" for word in agent.cmdline()):
        arguments = [str(agent.pid), repr(agent.create_time()), str(AGENT_SECONDS)]
        subprocess.Popen(
            [sys.executable, "-c", END_AGENT, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


@contextlib.contextmanager
def watching(attempt: Attempt, world: World, timeout_seconds: float) -> Iterator[Watchdog]:
    watchdog = Watchdog(attempt, world, timeout_seconds)
    try:
        yield watchdog
    finally:
        watchdog.close()


def waits_in(frame: FrameType | None) -> str:
    """Says which functions of this project or program a thread is in: the three innermost, the innermost first."""
    found = []
    while frame is not None and len(found) < 3:
        if frame.f_globals.get("__name__", "").startswith(("controlbooth.", "__main__")):
            found.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
        frame = frame.f_back
    return " of ".join(found) or "code that is not this project's"


def write_stacks(attempt: Attempt, rank: int, line: str) -> None:
    """Writes stacks-RANK.txt in the run's folder: the line, the start's number, and every thread's Python stack."""
    made = attempt.folder / f"stacks-{rank}.txt"
    with open(made, "w") as file:
        file.write(f"{line}\nstart {attempt.number}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    move(attempt, made, attempt.run / made.name)


def describe(told: dict[int, str], world_size: int, run: Path) -> str:
    """Describes in one message what each rank waits in. told: the line of each rank that has answered, by rank."""
    silent = [str(rank) for rank in range(world_size) if rank not in told]
    lines = ["controlbooth: the ranks hang, and end, so that the run can be started again from its latest checkpoint"]
    lines += [f"  {told[rank]}" for rank in sorted(told)]
    if silent:
        lines.append(f"  no answer from rank {', '.join(silent)}: look at its machine and at the network to it first")
    lines.append(f"  all stacks: {run}/stacks-*.txt. If the steps are only slow, raise engine.hang_timeout_seconds")
    return "\n".join(lines)


def _first_line(attempt: Attempt, rank: int) -> str:
    """Reads the first line of a rank's stacks, if they are of this start; empty where there are none."""
    try:
        first, second, *_ = (attempt.run / f"stacks-{rank}.txt").read_text().splitlines()
    except (OSError, ValueError):
        return ""
    return first if second.startswith(f"start {attempt.number},") else ""
