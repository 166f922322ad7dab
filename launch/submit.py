"""`controlbooth launch local|slurm|kubernetes`: renders a run as a job, checks it, and hands it to the engine.

Everything about a job lies in the run's own folder, below job/; `launch.job.job` lists it.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from controlbooth.data.arguments import verb_parser, whole_number
from controlbooth.data.errors import UserError
from controlbooth.data.files.whole import write_whole
from controlbooth.data.secrets import HIDDEN, is_secret, shown_script
from controlbooth.launch.engines import background, kubernetes, slurm
from controlbooth.launch.job.cluster import CLUSTER_FILE, Cluster, Engine, dump_cluster, load_cluster
from controlbooth.launch.job.job import (
    Job,
    JobState,
    job_texts,
    read_intent,
    read_record,
    record_of,
    recorded_job,
    restore_job,
    settled_manifest,
    write_intent,
    write_job,
    write_record,
)
from controlbooth.launch.preflight import subjects
from controlbooth.launch.preflight.cluster import (
    engine_problems,
    job_problems,
    kubernetes_problems,
    mount_of,
    path_here,
    record_problems,
)
from controlbooth.trainer.config.loading import dump, load_config
from controlbooth.trainer.config.run import BUILT_IN, RunConfig, run_folder
from controlbooth.trainer.config.section import ConfigError, control_character
from controlbooth.trainer.config.subjects import SubjectRunConfig, load_run
from controlbooth.trainer.controlnet.network_check import network_problems
from controlbooth.trainer.dreambooth.manifest import load_subjects, record_texts, settle
from controlbooth.trainer.dreambooth.network_check import subjects_network_problems

SCRIPT, MANIFESTS = "script.sh", "manifests.yaml"
"""What the engine is given, in RUN/job/."""
PLAIN_VARIABLES = (
    "CUDA_", "DS_ACCELERATOR", "FI_", "GLIBC_TUNABLES", "GLOO_", "GOMP_", "HF_HUB_OFFLINE", "KMP_", "LANG", "LC_",
    "LD_", "MALLOC_", "MKL_", "NCCL_", "NVIDIA_", "NVTE_", "OMP_", "OPENBLAS_", "PATH", "PYTHON", "PYTORCH_", "TMPDIR",
    "TORCH", "TZ", "UCX_", "XDG_",
)  # fmt: skip
"""How names of variables begin whose values may be printed."""
AT_WORK = ("waiting", "running")
"""States of a job that has not ended."""
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
    parser = verb_parser(
        f"launch {engine}",
        f"{what} a run, or a batch of DreamBooth subjects as an array of tasks. It goes on by itself after "
        "whatever interrupts it; `controlbooth launch status|logs|cancel|resume RUN_FOLDER` follow it.",
        EXAMPLES.format(engine=engine),
    )
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="the run; of subjects, what they share")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, set here")
    default = "all GPUs and cores of this machine" if engine == "local" else f"{CLUSTER_FILE}, where there is one"
    parser.add_argument("--cluster", type=Path, metavar="FILE", help=f"where it runs (default: {default})")
    parser.add_argument("--subjects", type=Path, metavar="SUBJECTS", help="a manifest of DreamBooth subjects")
    parser.add_argument(
        "--subjects-per-task", type=whole_number(), metavar="K", help="default: what the ranks train at once"
    )
    parser.add_argument("--dry-run", action="store_true", help="check it and print what would be submitted")
    options = parser.parse_intermixed_args(arguments)
    found = CLUSTER_FILE if CLUSTER_FILE.is_file() and engine != "local" else None
    cluster = load_cluster(options.cluster or found, engine)
    if options.subjects:
        config = load_run(options.run, options.overrides)
        per_task = options.subjects_per_task or config.subjects_per_batch * cluster.processes_per_node
        job, files, problems, faults = subjects_job(config, options.subjects, cluster, per_task, options.dry_run)
    else:
        if options.subjects_per_task:
            raise UserError("--subjects-per-task is for a batch of subjects: give its manifest with --subjects")
        config = load_config(options.run, options.overrides)
        job, files, problems = run_job(config, cluster)
        faults = {}
        if options.dry_run and not problems and cluster.engine != "kubernetes":  # whose pods see what is not here
            problems += network_problems(config)
    problems += busy_problems(job)
    for problem in problems:
        print(f"controlbooth launch {engine}: {problem}", file=sys.stderr)
    if options.dry_run:
        print(rendered(shown_job(job), files)[1], end="")
        if hidden := [name for name, value in job.cluster.environment.items() if may_hide(name, value)]:
            print(f"controlbooth launch {engine}: values of {', '.join(hidden)} are not shown here", file=sys.stderr)
    if problems or options.dry_run:
        return 2 if problems or faults else 0
    return launch(job, files)


def shown_job(job: Job) -> Job:
    """Returns a job as it may be printed: without the secrets of its setup, and with the values of its environment
    hidden but for those that are known to be no secrets."""
    environment = {name: HIDDEN if may_hide(name, value) else value for name, value in job.cluster.environment.items()}
    setup = tuple(map(shown_script, job.cluster.setup))
    return replace(job, cluster=job.cluster.model_copy(update=dict(environment=environment, setup=setup)))


def may_hide(variable: str, value: str) -> bool:
    """Tells whether the value of a variable may be a secret: it is, unless name and value are known to be plain."""
    return is_secret(variable, value) or not variable.startswith(PLAIN_VARIABLES)


def run_job(config: RunConfig, cluster: Cluster) -> tuple[Job, dict[str, str], list[str]]:
    """Returns the job of a single run, the files of its folder, and what is wrong with it."""
    job = place(config.name, run_folder(config), cluster)
    return job, {"run.yaml": dump(config)}, job_problems(config, cluster) + folder_problems(job)


def subjects_job(
    config: SubjectRunConfig, manifest: Path, cluster: Cluster, per_task: int, open_pictures: bool
) -> tuple[Job, dict[str, str], list[str], dict[str, str]]:
    """Returns the job of an array, the files of its folder, what is wrong with it, and with single subjects, by name.

    What is wrong with single subjects is printed, and they are left out. open_pictures: whether their pictures and the
    base are opened and checked too. Raises ValueError where no subject can be trained.
    """
    if per_task < 1:
        raise UserError(f"--subjects-per-task is {per_task}, but a task trains at least one")
    if config.method != "lora":
        raise UserError("method=full trains one subject with all ranks: use `controlbooth dreambooth run`")
    seen_here = () if cluster.engine == "kubernetes" else subjects.folder_problems(config)
    if problems := [*seen_here, *subjects.run_problems(config)]:
        raise UserError("; ".join(problems))
    if open_pictures and (problems := list(subjects_network_problems(config))):
        raise UserError("; ".join(problems))
    tasks, faults = subjects.checked_subjects(config, manifest, f"launch {cluster.engine}", open_pictures)
    job = place(config.name, config.output / config.name, replace_nodes(cluster))
    job = replace(job, subjects=len(tasks), subjects_per_task=per_task)
    problems = engine_problems(job.cluster) + folder_problems(job)
    if cluster.engine == "kubernetes":
        named = {f"images of {task.name}": task.images[0].parent.absolute() for task in tasks}
        named |= {"output": job.folder} | ({} if config.model.base == BUILT_IN else {"base": Path(config.model.base)})
        problems += kubernetes_problems(cluster, named)
    tree = config.model_dump(mode="json")
    files = {
        "run.yaml": yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
        "subjects.jsonl": settled_manifest(tasks),
    }
    return job, files, problems, faults


def folder_problems(job: Job) -> list[str]:
    """Returns the problems of a job's folder: on Slurm of its name, and on Kubernetes of where the job's own files are
    to lie. Elsewhere that is in the output, which has been looked at."""
    if job.cluster.engine != "kubernetes":
        return list(slurm.folder_problems(job.folder)) if job.cluster.engine == "slurm" else []
    return list(record_problems(job.here, mount_of(job.folder, job.cluster.kubernetes.storage)))


def replace_nodes(cluster: Cluster) -> Cluster:
    """Returns the cluster for an array: each task has one node. On Kubernetes `nodes` stays: how many run at once."""
    return cluster if cluster.engine == "kubernetes" else cluster.model_copy(update={"nodes": 1})


def place(name: str, folder: Path, cluster: Cluster) -> Job:
    """Makes the job of a run: finds where its files lie, and the number of this submission.

    Raises ConfigError for a folder whose name would end a line of a script.
    """
    if cluster.engine == "kubernetes":
        here, working_directory = path_here(folder, cluster.kubernetes.storage), Path("/")
    else:
        folder = here = folder.absolute()
        working_directory = Path.cwd()
    if (control := control_character(str(folder))) is not None:
        raise ConfigError(f"the run's folder is {str(folder)!r}, with {control} in it. Start it in another place")
    before = last_record(here)
    return Job(
        name=name,
        folder=folder,
        here=here,
        working_directory=working_directory,
        cluster=cluster,
        submitted=time.time(),
        submission=before["submission"] + 1 if before else 1,
    )


def rendered(job: Job, files: dict[str, str]) -> tuple[str, str]:
    """Returns the name and the text of the file that the engine is given."""
    if job.cluster.engine == "kubernetes":
        return MANIFESTS, kubernetes.render(job, files)
    return SCRIPT, (slurm if job.cluster.engine == "slurm" else background).render(job)


def launch(job: Job, files: dict[str, str]) -> int:
    """Writes the job's folder, submits, and says how to follow it. Raises ValueError where it is at work already."""
    check_ended(job)
    name, text = rendered(job, files)
    before = job_texts(job.here)
    write_job(job, files | {"cluster.yaml": dump_cluster(job.cluster), name: text})
    if job.subjects:
        config = load_run(job.here / "job" / "run.yaml")
        tasks, _ = settle(load_subjects(job.here / "job" / "subjects.jsonl")[0], config)
        for file, content in record_texts(config, tasks).items():
            write_whole(job.here / file, content.encode())
    script = job.here / "job" / name
    engine = job.cluster.engine
    record = record_of(job)
    write_intent(job.here, record)
    if engine == "kubernetes":
        try:
            job_id = kubernetes.submit(script, job)
        except ValueError:
            if is_refused(job):
                restore_job(job.here, before)
            raise
    else:
        job_id = (slurm if engine == "slurm" else background).submit(script)
    write_record(job.here, record | {"id": job_id})
    what = f"{job.subjects} subjects in {job.tasks} tasks" if job.subjects else "the run"
    print(f"{job.name}: {what} as {engine} job {job_id}; everything about it is in {job.here / 'job'}")
    where = shlex.quote(str(job.here))
    print(f"  controlbooth launch status {where}\n  controlbooth launch logs {where} --follow")
    return 0


def is_refused(job: Job) -> bool:
    """Tells whether the API server has no such job; False where it does not say, and may have taken it."""
    try:
        return kubernetes.find(job) is None
    except ValueError:
        return False


def busy_problems(job: Job) -> list[str]:
    """Returns the problem of an earlier submission that has not ended, or whose engine does not answer; an empty list
    where there is none."""
    try:
        check_ended(job)
    except ValueError as error:
        return [str(error)]
    return []


def check_ended(job: Job) -> None:
    """Raises ValueError where the engine still has an earlier submission of the job."""
    record = last_record(job.here)
    if record is not None and (busy := at_work(record, job.cluster)):
        raise UserError(
            f"{job.here} is being trained by {record['engine']} job {record['id']} ({busy[0].said}). Wait for it, "
            f"or end it: controlbooth launch cancel {shlex.quote(str(job.here))}"
        )


def last_record(folder: Path) -> dict[str, Any] | None:
    """Returns what was submitted last from a run's folder, as job.json has it; None where nothing was.

    Whoever submitted may have been killed between the engine's answer and job.json: then the engine is asked for the
    job, by its script or name. Nothing is written. Raises ValueError where the engine does not answer.
    """
    record, begun = read_record(folder), read_intent(folder)
    if begun is None:
        return record
    job = recorded_job(folder, begun)
    found = None  # engine local: a second start finds the lock of the first one's ranks, and ends
    try:
        if begun["engine"] == "kubernetes":
            found = kubernetes.find(job)
        elif begun["engine"] == "slurm":
            found = slurm.find(folder.absolute() / "job" / SCRIPT, job.name)
    except ValueError as error:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun["submitted"]))
        raise UserError(
            f"whether {begun['engine']} has taken the job of {folder}, which it was given at {when} and has not "
            f"confirmed, cannot be told now: {error}"
        ) from error
    if found is None or (record is not None and found == record["id"]):
        return record
    return begun | {"id": found}


def recover(folder: Path) -> None:
    """Writes job.json of a job that `last_record` had to ask the engine for, while the engine still remembers it."""
    record = last_record(folder)
    if record is not None and record != read_record(folder):
        write_record(folder, record)


def last_submission(folder: Path) -> tuple[Job, dict[str, Any]]:
    """Returns the job that was last submitted for a run's folder, and its record. Raises ConfigError without any."""
    record = last_record(folder)
    if record is None:
        raise ConfigError(
            f"{folder} has no job/job.json, so no job was submitted for it: give the folder of a run that "
            "`controlbooth launch` has started"
        )
    return recorded_job(folder, record), record


def at_work(record: dict[str, Any], cluster: Cluster) -> list[JobState]:
    """Returns the states of a recorded job, or of its tasks, that have not ended; an empty list where all have."""
    return [one for one in states(record, cluster) if one.state in AT_WORK]


def states(record: dict[str, Any], cluster: Cluster) -> list[JobState]:
    """Returns what the engine says of a recorded job. Raises ValueError where it does not answer."""
    if record["engine"] == "kubernetes":
        return kubernetes.states(record["id"], cluster.kubernetes.namespace)
    return (slurm if record["engine"] == "slurm" else background).states(record["id"])
