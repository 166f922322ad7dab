"""The benchmark of one GPU, without one: its rows, what becomes of them when it is cut off, and a start after that."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_rows
from gpu import counts_of, with_shares

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"
ONE_KIND = "micro-batch 2, cached"
SECONDS = "600"


def test_rows_have_names_of_their_own_and_begin_with_those_that_have_an_aim():
    for cases in (gpu_rows.cases(), gpu_rows.small_cases()):
        assert len({case.name for case in cases}) == len(cases)
    assert gpu_rows.cases()[:3] == [replace(gpu_rows.SD15, micro_batch_size=size) for size in (8, 32, 1)]
    assert set(gpu_rows.AIMS) == set(gpu_rows.cases()[:3])


def test_a_file_that_was_cut_off_is_read_and_left_as_whole_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert gpu_rows.read_whole_rows(path) == []
    gpu_rows.append(path, {"name": "one"})
    gpu_rows.append(path, {"name": "two", "error": "out of memory"})
    whole = path.read_bytes()
    for cut in range(1, len(whole) + 1):
        path.write_bytes(whole[:cut])
        rows = gpu_rows.read_whole_rows(path)
        assert [row["name"] for row in rows] == ["one", "two"][: whole[:cut].count(b"\n")]
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[: len(rows)])


def test_a_larger_micro_batch_alone_makes_a_case_larger():
    one = gpu_rows.SD15
    assert gpu_rows.is_larger(replace(one, micro_batch_size=32), one)
    assert not gpu_rows.is_larger(one, one)
    assert not gpu_rows.is_larger(one, replace(one, micro_batch_size=32))
    assert not gpu_rows.is_larger(replace(one, micro_batch_size=32, cached=False), one)


def test_shares_are_of_the_products_that_training_asks_for():
    row = {"samples_per_second": 105.0, "gemm_flops_per_second": 790e12, "precision": "bf16"}
    plan = {"training_flops_per_sample": 2.265e12, "planned_memory_gib": 15.2}
    shares = with_shares(row, plan, {"peak_flops": {"bf16": 989.4e12}})
    assert shares["share_of_gemm"] == pytest.approx(0.301, abs=1e-3)
    assert shares["share_of_peak"] == pytest.approx(0.240, abs=1e-3)
    shown = gpu_rows.line({"name": gpu_rows.SD15.name} | row | shares)
    assert "| 105.00 | 105 |" in shown and "| 30.1 % | 24.0 % |" in shown
    assert "share_of_peak" not in with_shares(row, plan, {"peak_flops": None})


def test_tests_are_counted_also_where_they_did_not_come_to_their_end():
    printed = (
        "tests/cuda/test_steps.py::test_resumed[stage-2] PASSED [ 25%]\n"
        "tests/cuda/test_steps.py::test_resumed[stage-3] FAILED [ 50%]\n"
        "tests/cuda/test_steps.py::test_pictures "
    )
    assert counts_of(printed) == {"passed": 1, "failed": 1, "skipped": 0, "which": ["test_resumed[stage-3]"]}


@pytest.mark.slow
def test_a_wait_for_the_device_is_told_with_our_line():
    from gpu_step import waits_of

    from controlbooth.trainer.losses import weighted_mse

    class Waiting:
        """A tensor, as far as the loss asks, on a device that it waits for."""

        def __sub__(self, other):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            raise ArithmeticError

        def float(self):
            return self

    def work():
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                weighted_mse(Waiting(), Waiting(), Waiting())  # type: ignore[arg-type]

    (place,), (count,) = zip(*waits_of(work).items(), strict=True)
    assert count == 2 and place.startswith("trainer/losses.py:") and " in test_gpu_benchmark.py:" in place


@pytest.mark.slow
def test_every_case_is_a_run_with_a_setting_that_there_is(tmp_path):
    from gpu_step import config_of

    for case in (*gpu_rows.cases(), *gpu_rows.small_cases()):
        config, shapes = config_of(case, tmp_path)
        assert config.micro_batch_size == case.micro_batch_size and config.engine.precision == case.precision
        assert (shapes == case.family) == (case in gpu_rows.cases())


@pytest.mark.slow
def test_the_planner_reads_the_rows_of_every_published_shape(tmp_path):
    from controlbooth.trainer.planning.accelerators import ACCELERATORS
    from controlbooth.trainer.planning.calibration import nearest, read_rows
    from controlbooth.trainer.planning.choices import known_footprint

    path = tmp_path / "rows.jsonl"
    case = next(case for case in gpu_rows.cases() if case.family == "sd35-medium")
    fields = {name: value for name, value in vars(case).items() if name != "seconds"}
    gpu_rows.append(path, {"name": "waits", "waits": {"step.py:1": 1}})
    gpu_rows.append(path, fields | {"resolution": 64, "samples_per_second": 1.0, "by_shape": {}})
    (row,) = read_rows(path)
    one = known_footprint(nearest([row], row, ACCELERATORS["h200"]))
    assert one.micro_batch_size == case.micro_batch_size and one.encoder_flops == 0  # all is in the cache


def started(output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--in-small", "--seconds", SECONDS, "--only", ONE_KIND]
    return subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def until_a_row(process: subprocess.Popen[str]) -> str:
    """Returns what it has printed up to its first row, with it."""
    printed = ""
    assert process.stdout
    for text in process.stdout:
        printed += text
        if text.startswith("| miniature"):
            return printed
    raise AssertionError(printed)


@pytest.mark.slow
def test_what_was_measured_stays_when_it_is_cut_off_and_another_start_goes_on(tmp_path):
    output = tmp_path / "rows.jsonl"
    process = started(output)
    until_a_row(process)
    process.kill()
    process.wait()
    before = gpu_rows.read_whole_rows(output)
    assert before[0]["samples_per_second"] > 0 and before[0]["planned_memory_gib"] > 0
    assert before[0]["training_flops_per_sample"] > 0 and before[0]["device_kind"] == "cpu"
    with open(output, "a") as file:
        file.write('{"name": "cut o')

    process = started(output)
    printed = until_a_row(process)
    assert f"{len(before)} rows are in {output} already" in printed
    process.terminate()
    printed += process.communicate(timeout=60)[0]
    assert process.returncode == 128 + 15
    after = [json.loads(line) for line in output.read_text().splitlines()]
    names = [row["name"] for row in after]
    assert after[: len(before)] == before and len(after) > len(before) and len(set(names)) == len(names)
    table = output.with_suffix(".md").read_text()
    assert all(gpu_rows.line(row) in table for row in after) and table in printed


@pytest.mark.slow
def test_a_budget_that_is_too_small_for_a_row_is_kept_and_what_was_not_reached_is_named(tmp_path):
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--in-small", "--seconds", "1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ), cwd=ROOT)
    assert done.returncode == 1 and "no process that measures could be started: took longer than" in done.stdout
    assert gpu_rows.read_whole_rows(output) == []
