"""`controlbooth launch local|slurm|kubernetes`: renders a run as a job, checks it, and hands it to the engine.

Everything about a job lies in the run's own folder, below job/; `launch.job` lists it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from controlbooth.launch import background, kubernetes, slurm
from controlbooth.launch.cluster import Cluster, Engine, dump_cluster, load_cluster
from controlbooth.launch.cluster_preflight import (
    engine_problems,
    job_problems,
    kubernetes_problems,
    path_here,
    record_problems,
)
from controlbooth.launch.job import Job, JobState, read_record, settled_manifest, write_job, write_record
from controlbooth.launch.preflight import base_problems
from controlbooth.trainer.config import BUILT_IN, dump, load_config, run_folder
from controlbooth.trainer.subjects import (
    SubjectRunConfig,
    Task,
    check_words,
    load_run,
    load_subjects,
    settle,
)
from controlbooth.trainer.subjects import write_record as write_subjects

CLUSTER_FILE = Path("cluster.yaml")
EXAMPLES = """examples:
  controlbooth launch {engine} run.yaml --dry-run
  controlbooth launch {engine} run.yaml max_steps=20000 --cluster {engine}.yaml
  controlbooth launch {engine} dreambooth.yaml --subjects subjects.yaml --subjects-per-task 16
  controlbooth launch status runs/first"""


def local_main(arguments: Sequence[str] | None = None) -> int:
    return main("local", arguments)


def slurm_main(arguments: Sequence[str] | None = None) -> int:
    return main("slurm", arguments)


def kubernetes_main(arguments: Sequence[str] | None = None) -> int:
    return main("kubernetes", arguments)


def main(engine: Engine, arguments: Sequence[str] | None) -> int:
    what = {
        "local": "Runs in the background of this machine",
        "slurm": "Submits to Slurm",
        "kubernetes": "Submits to Kubernetes",
    }[engine]
    parser = argparse.ArgumentParser(
        prog=f"controlbooth launch {engine}",
        description=f"{what} a run, or a batch of DreamBooth subjects as an array of tasks. It goes on by itself after "
        "whatever interrupts it; `controlbooth launch status|logs|cancel|resume RUN_FOLDER` follow it.",
        epilog=EXAMPLES.format(engine=engine),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="the run; of subjects, what they share")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, set here")
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE", help=f"where it runs (default: {CLUSTER_FILE}, where there is one)"
    )
    parser.add_argument("--subjects", type=Path, metavar="SUBJECTS", help="a manifest of DreamBooth subjects")
    parser.add_argument("--subjects-per-task", type=int, metavar="K", help="default: what the ranks train at once")
    parser.add_argument("--dry-run", action="store_true", help="check it and print what would be submitted")
    options = parser.parse_intermixed_args(arguments)
    found = CLUSTER_FILE if CLUSTER_FILE.is_file() and engine != "local" else None
    cluster = load_cluster(options.cluster or found, engine)
    if options.subjects:
        config = load_run(options.run, options.overrides)
        per_task = options.subjects_per_task or config.subjects_per_batch * cluster.processes_per_node
        job, files, problems = subjects_job(config, options.subjects, cluster, per_task)
    else:
        if options.subjects_per_task:
            raise ValueError("--subjects-per-task is for a batch of subjects: give its manifest with --subjects")
        job, files, problems = run_job(options.run, options.overrides, cluster)
    problems += record_problems(job.here) if engine == "kubernetes" else ()  # of others the output is checked
    for problem in problems:
        print(f"controlbooth launch {engine}: {problem}", file=sys.stderr)
    if options.dry_run:
        print(rendered(job, files)[1], end="")
    if problems or options.dry_run:
        return 2 if problems else 0
    return launch(job, files)


def run_job(run_file: Path, overrides: Sequence[str], cluster: Cluster) -> tuple[Job, dict[str, str], list[str]]:
    """-> the job of a single run, the files of its folder, and what is wrong with it."""
    config = load_config(run_file, overrides)
    job = place(config.name, run_folder(config), cluster)
    return job, {"run.yaml": dump(config)}, job_problems(config, cluster)


def subjects_job(
    config: SubjectRunConfig, manifest: Path, cluster: Cluster, per_task: int
) -> tuple[Job, dict[str, str], list[str]]:
    """-> the job of an array, the files of its folder, and what is wrong with it.

    Raises ValueError where no subject can be trained. What is wrong with single ones is told, and they are left out.
    """
    if per_task < 1:
        raise ValueError(f"--subjects-per-task is {per_task}, but a task trains at least one")
    if config.method != "lora":
        raise ValueError("method=full trains one subject with all ranks: use `controlbooth dreambooth run`")
    problems = list(base_problems(config.model.base, config.model.family))
    if problems:
        raise ValueError("; ".join(problems))
    tasks = settled_subjects(config, manifest)
    job = place(config.name, config.output / config.name, replace_nodes(cluster))
    job = replace(job, subjects=len(tasks), subjects_per_task=per_task)
    problems += engine_problems(job.cluster)
    if cluster.engine == "kubernetes":
        named = {f"images of {task.name}": task.images[0].parent.absolute() for task in tasks}
        named |= {"output": job.folder} | ({} if config.model.base == BUILT_IN else {"base": Path(config.model.base)})
        problems += kubernetes_problems(cluster, named)
    tree = config.model_dump(mode="json")
    files = {
        "run.yaml": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
        "subjects.jsonl": settled_manifest(tasks),
    }
    return job, files, problems


def settled_subjects(config: SubjectRunConfig, manifest: Path) -> list[Task]:
    subjects, faults = load_subjects(manifest)
    tasks, more = settle(subjects, config)
    split, warnings = check_words(tasks, config.model.base)
    for name, message in [*(faults | more | split).items(), *((n, f"warning: {text}") for n, text in warnings.items())]:
        print(f"controlbooth launch: {name}: {message}", file=sys.stderr)
    tasks = [task for task in tasks if task.name not in split]
    if not tasks:
        raise ValueError(f"{manifest} has no subject that can be trained")
    return tasks


def replace_nodes(cluster: Cluster) -> Cluster:
    """Of an array: each task has one node. On Kubernetes `nodes` is how many run at once."""
    return cluster if cluster.engine == "kubernetes" else cluster.model_copy(update={"nodes": 1})


def place(name: str, folder: Path, cluster: Cluster) -> Job:
    """Where a job's files lie, and the number of this submission."""
    if cluster.engine == "kubernetes":
        here, working_directory = path_here(folder, cluster.kubernetes.storage), Path("/")
    else:
        folder = here = folder.absolute()
        working_directory = Path.cwd()
    before = read_record(here)["submission"] if (here / "job" / "job.json").is_file() else 0
    return Job(
        name=name,
        folder=folder,
        here=here,
        working_directory=working_directory,
        cluster=cluster,
        submission=before + 1,
    )


def rendered(job: Job, files: dict[str, str]) -> tuple[str, str]:
    """-> the name and the text of what the engine is given."""
    if job.cluster.engine == "kubernetes":
        return "manifests.yaml", kubernetes.render(job, files)
    return "script.sh", (slurm if job.cluster.engine == "slurm" else background).render(job)


def launch(job: Job, files: dict[str, str]) -> int:
    """Writes the job's folder, submits, and says how to follow it. Raises ValueError where it is at work already."""
    check_ended(job)
    name, text = rendered(job, files)
    write_job(job, files | {"cluster.yaml": dump_cluster(job.cluster), name: text})
    if job.subjects:
        config = load_run(job.here / "job" / "run.yaml")
        tasks, _ = settle(load_subjects(job.here / "job" / "subjects.jsonl")[0], config)
        write_subjects(job.here, config, tasks)
    script = job.here / "job" / name
    engine = job.cluster.engine
    if engine == "kubernetes":
        job_id = kubernetes.submit(script, job)
    else:
        job_id = (slurm if engine == "slurm" else background).submit(script)
    write_record(job, job_id, time.time())
    what = f"{job.subjects} subjects in {job.tasks} tasks" if job.subjects else "the run"
    print(f"{job.name}: {what} as {engine} job {job_id}; everything about it is in {job.here / 'job'}")
    print(f"  controlbooth launch status {job.here}\n  controlbooth launch logs {job.here} --follow")
    return 0


def check_ended(job: Job) -> None:
    """Raises ValueError where the engine still has an earlier submission of the job."""
    if not (job.here / "job" / "job.json").is_file():
        return
    record = read_record(job.here)
    if busy := [one for one in states(record, job.cluster) if one.state in ("waiting", "running")]:
        raise ValueError(
            f"{job.here} is being trained by {record['engine']} job {record['id']} ({busy[0].said}). Wait for it, "
            f"or end it: controlbooth launch cancel {job.here}"
        )


def states(record: dict, cluster: Cluster) -> list[JobState]:
    """What the engine says of a recorded job."""
    if record["engine"] == "kubernetes":
        return kubernetes.states(record["id"], cluster.kubernetes.namespace)
    return (slurm if record["engine"] == "slurm" else background).states(record["id"])
