"""Where else the figures of a study go: into the runs that it compared, their reports, and MLflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlbooth.data.files.locks import open_lock, take_lock
from controlbooth.data.files.records import is_text, read_note
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.evaluation.opinions import write_opinion
from controlbooth.trainer.evaluation.report import write_report
from controlbooth.trainer.run.checkpoint import complete_checkpoints, read_state
from controlbooth.trainer.run.failures import STATUS
from controlbooth.trainer.study.plan import Plan
from controlbooth.trainer.study.sources import RUN
from controlbooth.trainer.tracking.mlflow_run import EVALUATION
from controlbooth.trainer.tracking.open import IN_MLFLOW, open_tracker


def publish(study: Path, plan: Plan, result: Mapping[str, Any]) -> None:
    """Writes what is said of each run into it, and logs it; a run that is not there any more is told."""
    for method in plan.methods:
        source = plan.sources[method]
        if source["kind"] != RUN:
            continue
        run = Path(source["where"])
        if not (run / "config.yaml").is_file():
            print(f"{run} of {method} is not there any more, so its report does not show what people said")
            continue
        said = opinion(study, plan, result, method)
        if not said["questions"]:
            continue
        write_opinion(run, said)
        write_report([run], run / "report.html")
        _log(run, study, said)


def opinion(study: Path, plan: Plan, result: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Makes what a run is told of one of its methods, see evaluation/opinions.py."""
    questions = {
        name: dict(
            rank=own["methods"][method]["rank"],
            points=own["methods"][method]["points"],
            answers=own["answers"],
            raters=own["raters"],
            against=[against(one, method) for one in own["preferences"] if method in (one["first"], one["second"])],
        )
        for name, own in result["questions"].items()
        if own["answers"]
    }
    return dict(
        study=str(study.resolve()),
        title=plan.title,
        digest=plan.digest,
        method=method,
        methods=len(plan.methods),
        step=plan.sources[method]["step"],
        questions=questions,
    )


def against(preference: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Returns a preference as seen by one of its two methods."""
    share = preference["share"]
    if preference["first"] == method:
        return dict(method=preference["second"], share=dict(share), answers=preference["answers"])
    turned = {
        end: None if share[other] is None else 1 - share[other]
        for end, other in (("mean", "mean"), ("low", "high"), ("high", "low"))
    }
    return dict(method=preference["first"], share=turned, answers=preference["answers"])


def _log(run: Path, study: Path, said: Mapping[str, Any]) -> None:
    """Logs the average human rank and the points of each question; a training run keeps MLflow to itself."""
    with open_lock(run / ".lock") as lock:
        if not take_lock(lock, "publish a study when nothing trains in the run"):
            print(f"{run} is training, so MLflow gets what people said by `study result` after that")
            return
        step = said["step"]
        if step is None:
            step = read_state(complete_checkpoints(run)[-1])["step"] if complete_checkpoints(run) else 0
        figures = {
            f"{EVALUATION}human_{what}_{name}": own[what]["mean"]
            for name, own in said["questions"].items()
            for what in ("rank", "points")
            if own[what]["mean"] is not None
        }
        tracker = open_tracker(run, load_config(run / "config.yaml"), {})
        tracker.log(step, figures)
        for file in (study / "report.html", study / "result.json"):
            tracker.log_artifact(file)
        status = read_note(run / STATUS, "The next start writes it anew", {"state": is_text})
        tracker.finish(IN_MLFLOW.get(status.get("state", ""), "KILLED"))
        tracker.close(timeout_seconds=60.0)
        if ways := tracker.how_to_open():
            print(f"MLflow: {', then '.join(ways)}")
