"""How the training keeps its verdict: written after each validation, cut back with the steps, the end of a run."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet.build import check_measurable
from controlbooth.trainer.controlnet.session import Run
from controlbooth.trainer.controlnet.validation import converged_long_ago, note_verdict
from controlbooth.trainer.engine.distributed import join
from controlbooth.trainer.evaluation.verdict import CONTROL, describe_run, read_verdict
from controlbooth.trainer.run.attempt import only_run

SHARES = [0.02, 0.05, 0.41, 0.70, 0.78, 0.83]


def config(folder, **validation):
    settings = dict(every_steps=50, samples=16, grid=1) | validation
    return build_config(
        dict(
            name="run", output=str(folder), max_steps=300, global_batch_size=1, micro_batch_size=1,
            model=dict(base="miniature"), validation=settings,
            data=dict(shards="train", held_out="held", condition="edges", resolution=64),
        )
    )  # fmt: skip


def log(folder, shares):
    rows = []
    for number, share in enumerate(shares):
        name = "validation/edge_f1"
        ends = {"_chance": 0.2, "_share": share, "_share_low": share - 0.05, "_share_high": share + 0.05}
        figures = {name: 0.2 + 0.7 * share} | {f"{name}{end}": value for end, value in ends.items()}
        rows.append(json.dumps({"step": 50 * number, "time": 0.0, "metrics": figures}) + "\n")
    (folder / "run" / "metrics.jsonl").write_text("".join(rows))


@contextmanager
def begun(folder, shares, **validation):
    """A start of a run that has been validated so, without what it trains."""
    world = join()
    with only_run(folder / "run", world) as attempt:
        log(folder, shares)
        held = SimpleNamespace(keys=list("abcdefghijklmnop"))
        run: Run = SimpleNamespace(  # type: ignore[assignment]
            config=config(folder, **validation), world=world, attempt=attempt, folder=folder / "run", held=held,
            tracker=None, step=50 * (len(shares) - 1), verdict=None, warned=False,
        )  # fmt: skip
        yield run


def test_it_is_said_once_written_whole_and_stays_the_same(tmp_path, capsys):
    with begun(tmp_path, SHARES[:1]) as run:
        for known in range(1, len(SHARES) + 1):
            log(tmp_path, SHARES[:known])
            note_verdict(run, validated=True)
            assert read_verdict(run.folder) == run.verdict
            assert (run.verdict.announced is not None) == (known >= 4)
            if run.verdict.announced:
                assert run.verdict.announced.step == 100
    said = [line for line in capsys.readouterr().err.splitlines() if "control" in line]
    assert len(said) == 1 and "control is there: it came between step 50 and 100" in said[0]
    assert describe_run(tmp_path / "run") == json.loads((tmp_path / "run" / CONTROL).read_text())["told"]


def test_a_start_from_an_earlier_step_takes_the_verdict_of_the_later_ones_back(tmp_path, capsys):
    with begun(tmp_path, SHARES) as run:
        note_verdict(run, validated=True)
    assert read_verdict(tmp_path / "run").announced
    with begun(tmp_path, SHARES[:3]) as run:
        note_verdict(run, validated=False)
        assert run.verdict.announced is None and read_verdict(run.folder) == run.verdict
        assert "as of step 100: control is not announced by step 100" in capsys.readouterr().err
        log(tmp_path, SHARES)
        note_verdict(run, validated=True)
        assert run.verdict.announced.step == 100
    with begun(tmp_path, SHARES) as run:
        note_verdict(run, validated=False)
    assert capsys.readouterr().err.count("control is there") == 2  # when it came again, and at the last start


def test_an_early_stop_counts_from_the_announced_step_and_not_from_a_withdrawn_one(tmp_path):
    with begun(tmp_path, SHARES, stop_after_convergence=120) as run:
        note_verdict(run, validated=True)
        ended = []
        for run.step in (200, 219, 220):
            ended.append(converged_long_ago(run))
        assert ended == [False, False, True]
        log(tmp_path, [*SHARES, 0.1, 0.1])
        note_verdict(run, validated=True)
        assert not converged_long_ago(run)


def test_a_folder_from_before_chance_was_measured_goes_on(tmp_path):
    with begun(tmp_path, []) as run:
        rows = [{"step": step, "time": 0.0, "metrics": {"validation/edge_f1": 0.8}} for step in (0, 50, 100, 150)]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        note_verdict(run, validated=False)
        assert "validated before chance was measured" in describe_run(run.folder)
        assert run.verdict.announced is None


def test_a_run_that_can_never_announce_is_told_at_its_start_and_refused_where_it_is_to_end_by_that(tmp_path, capsys):
    check_measurable(config(tmp_path, samples=4), SimpleNamespace(), None, join())
    assert "warning: control cannot be announced by validation.samples=4" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="stop_after_convergence=9 would never end the run: control cannot be .*=4"):
        check_measurable(config(tmp_path, samples=4, stop_after_convergence=9), SimpleNamespace(), None, join())
