"""What one GPU gives: samples a second, share of its peak, memory beside the plan, waits, and the tests that need one.

    make bench-gpu                                                     nine minutes, or in small without a GPU
    .venv/bin/python tests/benchmarks/gpu.py [--seconds 540] [--output rows.jsonl] [--only "sdxl"] [--in-small]

The most telling rows come first: Stable Diffusion 1.5, 512 px, bf16, from a latent cache, at micro-batch 8, 32 and 1.
Every row is written as soon as it is measured, so that what was measured stays when the program is cut off; started
again with the same --output it goes on with the rows that are missing there. A row that fails, runs out of memory or
takes too long says so, and the next one begins in a fresh process. Tests of tests/cuda come last, in time that is kept
for them.

Without a GPU, or with --in-small, each kind of row is measured once on tiny bases: those figures say nothing but that
the program works. `controlbooth plan --calibration` reads the rows.
"""

import argparse
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from gpu_rows import (
    FOOTNOTES,
    START_SECONDS,
    Case,
    Row,
    append,
    cases,
    head,
    is_larger,
    line,
    read_whole_rows,
    small_cases,
    table,
)
from record import ROOT, machine

from controlbooth.data.processes.parent import dying_with

HERE = Path(__file__).parent
TESTS = "tests of a GPU: bitwise resume, pictures of the CPU"
WHICH_TESTS = "resumed_run or pictures_are_those"
TESTS_SHARE, TESTS_SECONDS = 0.25, 120.0
"""Of the budget, and at most so many seconds, are kept for the tests."""
STARTS = 3
"""So many processes in a row that fail before their first answer end the benchmark."""


class Worker:
    """The process that measures (gpu_step.py), and its answers, read by a thread."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.answers: queue.Queue[str | None] = queue.Queue()
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_step.py"), str(folder)],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                preexec_fn=dying_with(os.getpid()),
            )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for text in self.process.stdout:
            self.answers.put(text)
        self.answers.put(None)

    def answer(self, seconds: float) -> Row:
        """Waits for its next answer, or says why none came. With `ended` the process is of no use any more."""
        try:
            text = self.answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return {"error": f"took longer than {seconds:.0f} s", "ended": True}
        if text is None:
            return {"error": f"its process ended with status {self.process.wait()}", "ended": True}
        return json.loads(text)

    def ask(self, case: Case, in_small: bool, seconds: float) -> Row:
        if seconds <= 0.0:
            return {"error": "no time was left"}
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"case": asdict(case), "in_small": in_small}) + "\n")
        self.process.stdin.flush()
        return self.answer(seconds)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Plans:
    """What the planner counts of cases, computed ahead in a thread: it needs no GPU, and seconds for each base."""

    def __init__(self, wanted: list[Case], folder: Path, kind: str) -> None:
        self.of: dict[Case, Future[Row]] = {case: Future() for case in wanted}
        threading.Thread(target=self._count, args=(folder, kind), daemon=True).start()

    def _count(self, folder: Path, kind: str) -> None:
        from gpu_step import planned, quiet_libraries  # only here: seconds, during which the first row is measured

        quiet_libraries()

        for case, future in self.of.items():
            try:
                future.set_result(planned(case, folder, kind))
            except Exception as error:  # told in the row
                future.set_result({"plan_error": f"{type(error).__name__}: {error}"})


class Benchmark:
    """A budget, a file of rows, and the process that measures at the moment."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        self.ends = psutil.Process().create_time() + options.seconds
        self.output: Path = options.output
        self.log = self.output.with_suffix(".log")
        self.scratch = scratch
        self.rows = read_whole_rows(self.output)
        self.told = machine()
        self.facts: Row = {}
        self.worker: Worker | None = None
        self.in_small: bool = options.in_small
        self.unreached: list[str] = []

    def left(self) -> float:
        return self.ends - time.time()

    def start(self) -> str | None:
        """Starts the process that measures and asks what it runs on; returns why that has failed."""
        for _ in range(STARTS):
            self.worker = Worker(self.scratch, self.log)
            self.facts = self.worker.answer(min(START_SECONDS, self.left()))
            if "error" not in self.facts:
                self.in_small = self.options.in_small or self.facts["device_kind"] == "cpu"
                return None
            self.stop()
        return self.facts["error"]

    def stop(self) -> None:
        if self.worker:
            self.worker.end()
        self.worker = None

    def record(self, row: Row) -> None:
        self.rows.append(row)
        append(self.output, row)
        print(line(row), flush=True)

    def wanted(self) -> list[Case]:
        listed = small_cases() if self.in_small else cases()
        return [case for case in listed if all(word in case.name for word in self.options.only)]

    def measure(self) -> None:
        """Measures all rows that are not there yet, until what is left is kept for the tests."""
        kept = min(TESTS_SECONDS, TESTS_SHARE * self.options.seconds)
        wanted = self.wanted()
        done = {row["name"] for row in self.rows}
        missing = [case for case in wanted if case.name not in done]
        plans = Plans(missing, self.scratch, self.facts["device_kind"])
        if len(missing) < len(wanted):
            print(f"{len(wanted) - len(missing)} rows are in {self.output} already\n")
        print(head(), flush=True)
        family = None
        for place, case in enumerate(missing):
            if any(is_larger(case, other) for other in self._too_large(wanted)):
                self.record(self._described(case) | {"error": "out of memory at a smaller micro-batch already"})
                continue
            if self.worker is None:
                family, why = None, self.start()
                if why:
                    self.unreached += [f"{one.name} (no process could be started: {why})" for one in missing[place:]]
                    return
            assert self.worker
            seconds = case.seconds + (START_SECONDS if (case.family, case.precision) != family else 0.0)
            found = self.worker.ask(case, self.in_small, min(seconds, self.left() - kept))
            if "error" in found and self.left() <= kept:  # not its own fault: another start may measure it
                self.unreached += [one.name for one in missing[place:]]
                return
            if found.pop("ended", False):
                self.stop()
            self._keep(case, found, plans)
            family = case.family, case.precision

    def _keep(self, case: Case, found: Row, plans: Plans) -> None:
        """Records a row, with what the planner counts of it where that is known in time."""
        row = self._described(case) | found
        try:
            row |= with_shares(row, plans.of[case].result(timeout=max(0.0, self.left())), self.facts)
        except TimeoutError:
            row["plan_error"] = "not counted within the budget"
        finally:  # also when the program is told to end just now
            self.record(row)

    def _described(self, case: Case) -> Row:
        fields = {name: value for name, value in asdict(case).items() if name != "seconds"}
        told = {name: self.facts[name] for name in ("device", "device_kind", "torch")}
        return {"name": case.name} | fields | told | {name: self.told[name] for name in ("commit", "date")}

    def _too_large(self, wanted: list[Case]) -> Iterator[Case]:
        full = {row["name"] for row in self.rows if "OutOfMemoryError" in row.get("error", "")}
        return (case for case in wanted if case.name in full)

    def test(self) -> None:
        """Runs the tests of a GPU that take longest, and counts them."""
        self.stop()
        if any(row["name"] == TESTS for row in self.rows) or not all(word in TESTS for word in self.options.only):
            return
        if self.left() < 5.0:
            self.unreached.append(TESTS)
            return
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/cuda/test_steps.py"]
        lines: queue.Queue[str] = queue.Queue()
        with open(self.log, "ab") as errors:
            process = subprocess.Popen(
                [*command, "-k", WHICH_TESTS], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
                preexec_fn=dying_with(os.getpid()),
            )  # fmt: skip
            assert process.stdout
            reader = threading.Thread(target=lambda: [lines.put(one) for one in process.stdout or ()], daemon=True)
            reader.start()
            found: Row = {}
            try:
                process.wait(timeout=max(1.0, self.left() - 1.0))
            except subprocess.TimeoutExpired:
                found = {"error": "ran out of time"}
            finally:
                process.kill()
                process.wait()
            reader.join(5.0)
            text = "".join(lines.queue)
            errors.write(text.encode())
        self.record({"name": TESTS} | found | counts_of(text) | self.facts | {"commit": self.told["commit"]})

    def finish(self) -> None:
        """Shows all rows that there are, and writes them beside the rows as Markdown."""
        self.stop()
        text = f"{self.title()}\n\n{table(self.rows)}\n\n{FOOTNOTES}\n"
        if self.unreached:
            text += "\nNot reached: " + "; ".join(self.unreached) + ".\n"
        self.output.with_suffix(".md").write_text(text)
        print(f"\n{text}\nrows: {self.output}; this table: {self.output.with_suffix('.md')}", flush=True)

    def title(self) -> str:
        if not self.facts:
            return "Nothing could be measured."
        told = self.facts | self.told
        words = f"{told['device']}, PyTorch {told['torch']}, commit {told['commit']}, {told['date']}"
        return words + (", in small: these figures are no measurement" if self.in_small else "")


def with_shares(row: Row, plan: Row, facts: Row) -> Row:
    """Adds to a row what was planned, and what share of the device's speed the training products are."""
    added = dict(plan)
    if "samples_per_second" in row and "training_flops_per_sample" in plan:
        flops = plan["training_flops_per_sample"] * row["samples_per_second"]
        added["share_of_gemm"] = flops / row["gemm_flops_per_second"]
        if facts["peak_flops"]:
            added["share_of_peak"] = flops / facts["peak_flops"][row["precision"]]
    return added


def counts_of(text: str) -> Row:
    """Counts the tests in what `pytest -v` prints, line by line: also one that was ended has told of those before."""
    found = re.findall(r"^\S*?::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    said = [verdict for _, verdict in found]
    which = [name for name, verdict in found if verdict in ("FAILED", "ERROR")]
    return {"passed": said.count("PASSED"), "failed": len(which), "skipped": said.count("SKIPPED"), "which": which}


def told_to_end(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540.0, help="from the start of the process (%(default).0f)")
    fresh = ROOT / "build" / "bench" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    parser.add_argument("--output", type=Path, default=fresh, help="the file of rows; those that it has are skipped")
    parser.add_argument("--only", action="append", default=[], help="rows whose names have this in them; repeatable")
    parser.add_argument("--in-small", action="store_true", help="tiny bases, as without a GPU")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told_to_end)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        benchmark = Benchmark(options, Path(scratch))
        try:
            if why := benchmark.start():
                print(f"no process that measures could be started: {why}; see {benchmark.log}")
                return 1
            benchmark.measure()
            benchmark.test()
        except SystemExit as ended:
            return int(str(ended.code))
        finally:
            benchmark.finish()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the planner's thread may be at work still, which Python would end in a crash
