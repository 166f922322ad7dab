"""What tracking costs each step of eight subjects; with --screenshots what a reader of MLflow sees of such a job.

    .venv/bin/python tests/benchmarks/subject_tracking.py [--rounds 6] [--seconds 30]
    .venv/bin/python tests/benchmarks/subject_tracking.py --screenshots OUT [--steps 200]

Eight unseen subjects on the built-in base, as `controlbooth dreambooth demo` trains them. Cost: one process makes steps
for so many seconds and sends to its own SQLite store, as a run without a server does; counted are the seconds that the
training thread spends in calls of the tracking, and the seconds of processors of the threads that sample the machine
and send, with what is left to send after the turn. The system keeps them by thread, so that other programs on the
machine do not disturb the figures, as they would a comparison of turns. Screenshots: a job with pictures of three
prompts every 50 steps, compared by the EfficientNet of the `measure` extra, on a server, whose pages Debian's Chromium
shows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import psutil
import torch

from controlbooth.data.scenes.unseen_subjects import write_subjects
from controlbooth.launch.commands.dreambooth_demo import CONFIG
from controlbooth.models.attention import AttentionChoice
from controlbooth.models.pretrained import load_base
from controlbooth.trainer.config.run import base_folder
from controlbooth.trainer.config.subjects import load_run
from controlbooth.trainer.dreambooth.batches import draw_prior
from controlbooth.trainer.dreambooth.manifest import load_subjects, settle
from controlbooth.trainer.dreambooth.session import SubjectRun
from controlbooth.trainer.dreambooth.stack import fill_slots, log_stack, make_stack, step_stack
from controlbooth.trainer.dreambooth.stack_state import plan_ranks
from controlbooth.trainer.dreambooth.tracking import SubjectTracking
from controlbooth.trainer.dreambooth.validation import open_studio
from controlbooth.trainer.engine.distributed import join, leave
from controlbooth.trainer.run.attempt import only_run
from controlbooth.trainer.run.process import StopRequest, quiet_libraries

SUBJECTS, PICTURES = 8, 5
WARM_UP = 5
"""Steps before the first turn."""
PROMPTS = ["a {identifier} {class_noun} on a red background", "a {identifier} {class_noun} on a blue background",
           "a {class_noun}"]  # fmt: skip


def own_threads() -> float:
    """Returns the seconds of processors that the threads of the tracking have used up to now."""
    ours = {thread.native_id for thread in threading.enumerate() if thread.name in ("tracking", "system metrics")}
    return sum(used.user_time + used.system_time for used in psutil.Process().threads() if used.id in ours)


def cost(folder: Path, rounds: int, seconds: float) -> None:
    """Prints what tracking takes of the training thread and of a processor, round by round, and the medians."""
    settings = [f"output={folder}", "steps=1000000", "prior.images=8", "prior.sampling_steps=4", "precision=fp32"]
    config = load_run(CONFIG, settings)
    tasks, _ = settle(load_subjects(write_subjects(folder / "pictures", SUBJECTS, PICTURES, 0))[0], config)
    world = join()
    run = config.output / config.name
    with only_run(run, world) as attempt:
        base = load_base(base_folder(config.model.base), config.model.family, torch.float32, world.device)
        draw_prior(config, base, tasks, world)
        tracking = SubjectTracking(config, run, attempt, world, {})
        with tracking.open({}):
            studio = open_studio(config, run, attempt, tracking, world.device, True)
            plan_ranks(attempt, config, tasks, {}, 1)
            kernels = AttentionChoice("math", "as they come")
            ours = SubjectRun(config, base, kernels, "fp32", run, attempt, world, StopRequest(), studio)
            stack = make_stack(ours, tasks, {}, tasks)
            fill_slots(ours, stack)

            for _ in range(WARM_UP):
                step_stack(config, stack)
                log_stack(ours, stack, 1.0, 0.0, {"loss": 0.0, "prior_loss": 0.0})
            while not tracking.is_sent():  # connects, and makes the runs, which each run does once
                time.sleep(0.5)
            shares = []
            for _ in range(rounds):
                began, steps, calls, used = time.perf_counter(), 0, 0.0, own_threads()
                while (took := time.perf_counter() - began) < seconds:
                    at = time.perf_counter()
                    metrics = step_stack(config, stack)
                    stepped = time.perf_counter()
                    log_stack(ours, stack, stepped - at, 0.0, metrics)
                    calls += time.perf_counter() - stepped
                    steps += 1
                while not tracking.is_sent():
                    time.sleep(0.5)
                behind = own_threads() - used
                shares.append((calls / took, behind / took))
                print(
                    f"{steps} steps of {took / steps:.3f} s: {1e3 * calls / steps:.2f} ms a step in the training "
                    f"thread ({100 * calls / took:.2f} %), {behind:.3f} s of a processor behind it "
                    f"({100 * behind / took:.2f} %)",
                    flush=True,
                )
            step, thread = (100 * median(column) for column in zip(*shares, strict=True))
            print(
                f"{SUBJECTS} subjects, {rounds} rounds of {seconds:g} s: tracking takes {step:.2f} % of the steps' "
                f"time and {thread:.2f} % of one processor beside them (medians)"
            )
    leave()


def screenshots(out: Path, folder: Path, steps: int) -> None:
    """Trains the job and writes pictures of its pages: the job, its subjects in the list of runs, and one of them."""
    import mlflow_server
    from browser import browser, furnish, open_page, screenshot
    from mlflow import MlflowClient
    from stores import free_port

    port = free_port()
    server = f"http://127.0.0.1:{port}"
    process = mlflow_server.start(folder, port)
    try:
        manifest = write_subjects(folder / "pictures", SUBJECTS, PICTURES, 0)
        asked = f"{{prompts: {PROMPTS}, every_steps: 50, sampling_steps: 20, guidance_scale: 2.0}}"
        command = [sys.executable, "-m", "controlbooth.launch.cli", "dreambooth", "run", str(manifest), str(CONFIG)]
        command += [f"output={folder / 'runs'}", f"steps={steps}", "prior.images=32", f"tracking.uri={server}"]
        command += [f"validation={asked}", "validation.encoders.efficientnet=true", "--processes", "1"]
        subprocess.run(command, check=True)
        subprocess.run([*command[:3], "launch", "status", str(folder / "runs" / "dreambooth")], check=True)
        client = MlflowClient(server)
        (experiment,) = [one for one in client.search_experiments() if one.name == "controlbooth"]
        job, child = job_and_child(client, experiment.experiment_id)
        pages = f"{server}/#/experiments/{experiment.experiment_id}/runs"
        looks = {
            "runs": (pages, [job.info.run_name]),
            "job": (f"{pages}/{job.info.run_id}", [job.info.run_name]),
            "job-metrics": (f"{pages}/{job.info.run_id}/model-metrics", [job.info.run_name]),
            "subject": (f"{pages}/{child.info.run_id}", [child.info.run_name]),
            "subject-metrics": (f"{pages}/{child.info.run_id}/model-metrics", [child.info.run_name]),
            "subject-pictures": (f"{pages}/{child.info.run_id}/artifacts/samples.png", ["samples.png"]),
        }
        with browser(1600, 1200) as driver:
            furnish(driver, server)
            for name, (url, words) in looks.items():
                open_page(driver, url, *words)
                print(screenshot(driver, out / f"{name}.png"), flush=True)
    finally:
        mlflow_server.stop(process)


def job_and_child(client: Any, experiment_id: str) -> tuple[Any, Any]:
    runs = client.search_runs([experiment_id])
    (job,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return job, max((run for run in runs if run is not job), key=lambda run: str(run.info.run_name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each turn")
    parser.add_argument("--steps", type=int, default=200, help="of each subject, for the screenshots")
    parser.add_argument("--screenshots", type=Path, metavar="OUT", help="a folder to write them to")
    parser.add_argument("--folder", type=Path, help="that keeps the job; default: one that is deleted")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.screenshots:
            screenshots(options.screenshots, folder, options.steps)
        else:
            cost(folder, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
