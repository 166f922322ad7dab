"""What tracking costs each step of eight subjects; with --screenshots what a reader of MLflow sees of such a job.

    .venv/bin/python tests/benchmarks/subject_tracking.py [--rounds 6] [--seconds 30]
    .venv/bin/python tests/benchmarks/subject_tracking.py --screenshots OUT [--steps 200]

Eight unseen subjects on the built-in base, as `controlbooth dreambooth demo` trains them. Cost: one process makes steps
in turns with and without tracking, each turn so many seconds, and sends to its own SQLite store meanwhile, as a run
without a server does; what is left to send after a turn is waited for, and counts in neither. Screenshots: a job with
pictures of three prompts every 50 steps, compared by the EfficientNet of the `measure` extra, on a server, whose pages
Debian's Chromium shows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("tracking", "e2e", "unit"))

import torch

from controlbooth.data.subjects import write_subjects
from controlbooth.launch.dreambooth_demo import CONFIG
from controlbooth.models.pretrained import load_base
from controlbooth.trainer.attempt import only_run
from controlbooth.trainer.config import base_folder
from controlbooth.trainer.distributed import join, leave
from controlbooth.trainer.dreambooth import fill_slots, log_stack, make_stack, plan_ranks, step_stack
from controlbooth.trainer.studio import draw_prior
from controlbooth.trainer.subject_tracking import SubjectTracking, Untracked
from controlbooth.trainer.subject_validation import open_studio
from controlbooth.trainer.subjects import load_run, load_subjects, settle
from controlbooth.trainer.train import quiet_libraries

SUBJECTS, PICTURES = 8, 5
WARM_UP = 5
"""Steps before the first turn."""
PROMPTS = ["a {identifier} {class_noun} on a red background", "a {identifier} {class_noun} on a blue background",
           "a {class_noun}"]  # fmt: skip


def cost(folder: Path, rounds: int, seconds: float) -> None:
    """Prints seconds a step with and without tracking of each round, and the medians of their ratios.

    Those of processors can be read on a machine that is busy with other things too.
    """
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
            stack = make_stack(config, base, tasks, {}, tasks, run, attempt, world, studio)
            fill_slots(config, stack, run, attempt)

            def turn(tracked: bool) -> tuple[float, float]:
                """-> seconds a step, by the clock and of processors; these with what is sent after the turn."""
                stack.tracking = tracking if tracked else Untracked()
                began, steps, used = time.perf_counter(), 0, time.process_time()
                while (took := time.perf_counter() - began) < seconds:
                    at = time.perf_counter()
                    metrics = step_stack(config, stack)
                    log_stack(config, stack, time.perf_counter() - at, 0.0, metrics, world)
                    steps += 1
                while not tracking.is_sent():
                    time.sleep(0.5)
                return took / steps, (time.process_time() - used) / steps

            for _ in range(WARM_UP):
                step_stack(config, stack)
            turn(True)  # connects, and makes the runs, which each run does once
            ratios, busy = [], []
            for number in range(rounds):
                order = (True, False) if number % 2 == 0 else (False, True)
                measured = {tracked: turn(tracked) for tracked in order}
                (one, own), (other, alone) = measured[True], measured[False]
                ratios.append(one / other)
                busy.append(own / alone)
                print(
                    f"with tracking {one:.4f} s a step and {own:.4f} s of processors, without {other:.4f} and "
                    f"{alone:.4f}: {ratios[-1]:.4f}x and {busy[-1]:.4f}x",
                    flush=True,
                )
            print(
                f"{SUBJECTS} subjects, {rounds} rounds of {seconds:g} s: median ratio {median(ratios):.4f} by clock, "
                f"{median(busy):.4f} of processors"
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
