"""What a command costs, for the benchmarks beside this file: seconds, CPU seconds, peak memory of its process tree."""

import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Cost:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Resident memory of all its processes at one time."""
    output: str


def run(command: Sequence[str], statuses: Sequence[int] = (0,), environment: Mapping[str, str] | None = None) -> Cost:
    """Runs a command to its end, with its progress bars shown. Exits where its status is none of these."""
    with tempfile.TemporaryFile("w+") as output:
        before, began, peak = _cpu_seconds(), time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=output, env=environment)
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read()
    if process.returncode not in statuses:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{text[-2000:]}")
    return Cost(seconds, _cpu_seconds() - before, peak, text)


def _cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _resident(pid: int) -> int:
    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:  # it ended while it was looked at; the next look is soon
        return 0
    return total
