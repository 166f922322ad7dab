"""Pure: the pieces of shell that the scripts of all engines are made of, written to be read by people."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controlbooth.launch.job.cluster import one_node
from controlbooth.launch.job.job import Job
from controlbooth.launch.ranks.torchrun import (
    SUBJECTS_WORKER,
    WORKER,
    rendezvous,
    torchrun_arguments,
    torchrun_environment,
)


@dataclass(frozen=True)
class Expanded:
    """A word of the script's own, in which the shell puts the values of its variables. No text of a user is in it."""

    text: str


Word = str | Expanded


def shell(words: Sequence[Word]) -> str:
    """Writes a command, each option on a line of its own. What is not Expanded reaches the program as it is."""
    text, before = "", ""
    for word in words:
        plain = word.text if isinstance(word, Expanded) else word
        own_line = plain.startswith("--") or (plain == "-m" and before.startswith("--"))
        text += " \\\n  " if own_line else " " * bool(text)
        text += f'"{plain}"' if isinstance(word, Expanded) and "$" in plain else shlex.quote(plain)
        before = plain
    return text


def echoing(*words: str) -> str:
    """Writes a line that prints these words as a command that can be copied. The words reach the reader as they are."""
    return f"echo {shlex.quote(shlex.join(words))}"


def preamble(job: Job) -> list[str]:
    """Returns lines of shell that enter the folder where the run starts and set the environment of its ranks."""
    environment = torchrun_environment(one_node(job.cluster), job.cluster.environment) | job.cluster.environment
    return [
        f"cd {shlex.quote(str(job.working_directory))} || exit 1",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items())),
        *job.cluster.setup,  # before the next line: `module` and `conda activate` read variables that nobody has set
        "set -u",
    ]


def training(job: Job, endpoint: str, is_host: str, folder: Path | None = None) -> list[Word]:
    """Returns the command that starts the ranks of one node.

    folder: that holds run.yaml there, where it is not the job's. endpoint, is_host: as for `rendezvous`, with variables
    of the script.
    """
    folder = folder or job.job_folder
    run = str(folder / "run.yaml")
    arguments: list[Word] = [run]
    worker, meeting = WORKER, [Expanded(word) for word in rendezvous(endpoint, is_host)]
    if job.subjects:
        worker, arguments = SUBJECTS_WORKER, [str(folder / "subjects.jsonl"), run, "--rows", Expanded("$ROWS")]
    return [job.python, *torchrun_arguments(one_node(job.cluster), meeting, job.name, worker, arguments)]


def checking(job: Job, head: str, port: str, node_rank: str, folder: Path | None = None) -> list[Word]:
    """Returns the command that checks one node, together with all others, before the ranks start."""
    return [
        job.python,
        "-m",
        "controlbooth.launch.cli",
        "launch",
        "check",
        str((folder or job.job_folder) / "run.yaml"),
        f"--nodes={job.cluster.nodes}",
        f"--processes={job.cluster.processes_per_node}",
        f"--gpus={job.cluster.gpus_per_node}",
        Expanded(f"--node-rank={node_rank}"),
        Expanded(f"--head={head}"),
        Expanded(f"--port={port}"),
        f"--least-mbit={job.cluster.least_network_mbit:g}",
    ]


def judging(job: Job, folder: Path | None = None) -> list[Word]:
    """Returns the command that says what the attempt has come to: finished, failed or again."""
    words: list[Word] = [
        job.python,
        "-m",
        "controlbooth.launch.job.outcome",
        str(job.folder),
        Expanded("--since=$STARTED"),
    ]
    if job.subjects:
        words += [f"--subjects={(folder or job.job_folder) / 'subjects.jsonl'}", Expanded("--rows=$ROWS")]
    return words


def rows(job: Job, index: str) -> list[str]:
    """Returns lines of shell that set which rows of the manifest a task of an array trains; none for a single run.
    index: the engine's variable that numbers the tasks."""
    if not job.subjects:
        return []
    first = f"{index} * {job.subjects_per_task}"
    return [
        f"FIRST=$(({first}))",
        f"END=$((FIRST + {job.subjects_per_task} < {job.subjects} ? FIRST + {job.subjects_per_task} : {job.subjects}))",
        'export ROWS="$FIRST:$END"',
    ]


def indented(lines: Sequence[str]) -> str:
    """Returns the text of a script with the blocks of functions, loops and cases indented; an entry of several lines is
    moved as one."""
    text, depth = [], 0
    for line in lines:
        depth -= line in ("done", "esac", "}", "fi")
        text += [f"{'  ' * depth}{part}" if part else "" for part in line.split("\n")]
        depth += line.endswith(("; do", " in", "() {", "; then"))
    return "\n".join(text) + "\n"
