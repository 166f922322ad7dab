"""A study of two checkpoints: what is drawn of runs, and where people's judgement of them goes."""

import shutil
from functools import partial

import numpy as np
import pytest
import studies
import torch
from checkpoints import write_run
from inputs import SIZE, disturbed
from mlflow import MlflowClient

from controlbooth.data.errors import UserError
from controlbooth.launch.commands import study_new, study_result
from controlbooth.launch.commands.data_pack import main as pack
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.pretrained import load_base, save_controlnet
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.evaluation.drawing import read_png
from controlbooth.trainer.evaluation.opinions import read_opinions
from controlbooth.trainer.study.answers import Answers
from controlbooth.trainer.study.plan import JUDGED, read_plan, screens_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards, and the runs early/runs/edges and late/runs/edges."""
    folder = tmp_path_factory.mktemp("runs")
    base = load_base("miniature")
    for number, name in enumerate(("early", "late")):
        torch.manual_seed(number)
        network = disturbed(build_controlnet(base.denoiser), 0.05)
        facts = dict(precision="fp32", zero_stage=1, world_size=1)
        write = partial(save_controlnet, network)
        write_run(folder / name, base, {"base": "miniature"}, write, **facts)
    pack(["--scenes", "6", "--condition", "edges", "-o", str(folder / "shards")])
    return folder


def new(root, out, *options, early="early/runs/edges/checkpoints/step-00000300", late="late/runs/edges"):
    methods = [f"early={root / early}", f"late={root / late}"]
    words = [out, "--methods", *methods, "--data", root / "shards", "--items", 3, "--steps", 2, *options]
    return study_new.main(list(map(str, words)))


@pytest.fixture(scope="module")
def study(root):
    assert new(root, root / "study") == 0
    return root / "study", read_plan(root / "study")


def test_runs_draw_the_same_conditions_and_what_is_drawn_is_not_drawn_again(root, study, tmp_path):
    folder, plan = study
    assert plan.questions == ("quality", "fidelity") and [item.name for item in plan.items] == [
        "000000",
        "000001",
        "000002",
    ]
    assert {name: source["step"] for name, source in plan.sources.items()} == dict(early=300, late=300)
    trial = next(one for one in plan.trials if one.kind == JUDGED)
    early, late = (read_png(folder / "pictures" / f"{name}.png") for name in trial.pictures)
    assert early.shape == late.shape == (SIZE, SIZE, 3) and (early != late).any()
    drawn = {path: path.stat().st_mtime_ns for path in (folder / "drawn").glob("with-control-*/*.png")}
    assert len(drawn) == 6
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again" / "plan.json").unlink()
    before = {path: path.stat().st_ino for path in (tmp_path / "again" / "drawn").glob("with-control-*/*.png")}
    assert new(root, tmp_path / "again") == 0
    assert {path: path.stat().st_ino for path in (tmp_path / "again" / "drawn").glob("with-control-*/*.png")} == before


def test_a_folder_of_other_peoples_pictures_of_the_same_conditions_joins_in(root, study, tmp_path):
    folder, _ = study
    shutil.copytree(folder / "drawn" / "targets", tmp_path / "theirs")
    methods = [f"ours={root / 'late/runs/edges'}", f"theirs={tmp_path / 'theirs'}"]
    words = ["--data", str(root / "shards"), "--items", "3", "--steps", "2"]
    assert study_new.main([str(tmp_path / "s"), "--methods", *methods, *words]) == 0
    plan = read_plan(tmp_path / "s")
    trial = next(one for one in plan.trials if one.kind == JUDGED)
    theirs = read_png(tmp_path / "s" / "pictures" / f"{trial.pictures[1]}.png")
    assert (theirs == read_png(tmp_path / "theirs" / f"{trial.item}.png")).all()


def test_the_dry_run_of_runs_draws_nothing(root, tmp_path, capsys):
    assert new(root, tmp_path / "dry", "--dry-run") == 0
    assert "2 methods (early, late), 3 items; questions: quality, fidelity" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


def test_a_step_that_is_not_there_is_refused_with_those_that_are(root, tmp_path):
    (tmp_path / "step").symlink_to(root / "early")
    missing = root / "early/runs/edges/checkpoints/step-00000007"
    missing.mkdir()
    try:
        with pytest.raises((ConfigError, UserError), match="no checkpoint of step 7; it has 300"):
            new(root, tmp_path / "s", early="early/runs/edges/checkpoints/step-00000007")
    finally:
        missing.rmdir()


def test_what_people_said_is_in_the_runs_report_in_mlflow_and_in_result(root, study, capsys, monkeypatch):
    monkeypatch.chdir(root)  # where the runs of write_run keep their mlflow.db, in runs/
    folder, plan = study
    answers = Answers(folder, plan.digest)
    for rater in ("anna", "ben"):
        for number, shown in enumerate(screens_of(plan, rater)):
            right = shown.trial.pictures[1 if shown.trial.methods else 0]  # the late one, and the right one of a check
            ranks = tuple(1 if name == right else 2 for name in shown.pictures)
            answers.add([studies.Answer(f"{rater}-{number:05d}", rater, shown.trial.id, shown.pictures, ranks, 1.0)])
    answers.close()
    assert study_result.main([str(folder)]) == 0
    assert "late is preferred" in capsys.readouterr().out
    for name, rank in (("early", 2.0), ("late", 1.0)):
        run = root / name / "runs" / "edges"
        (said,) = read_opinions(run)
        assert said["method"] == name and said["questions"]["fidelity"]["rank"]["mean"] == rank
        page = (run / "report.html").read_text()
        assert "What people said" in page and f"<b>{rank:.2f}</b>" in page
    client = MlflowClient(f"sqlite:///{root / 'runs' / 'mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "controlbooth")
    logged = client.search_runs([experiment.experiment_id])
    assert {one.data.metrics.get("evaluation/human_rank_quality") for one in logged} <= {1.0, 2.0}
    assert np.isfinite(logged[0].data.metrics["evaluation/human_points_fidelity"])
