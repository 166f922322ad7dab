"""`controlbooth train`: checks a run, starts its ranks on this machine, and tells how they ended."""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser
from controlbooth.data.files.locks import is_locked
from controlbooth.data.files.records import is_text, read_note, write_json
from controlbooth.data.processes.parent import REFUSED
from controlbooth.launch.job.outcome import ANEW, STATUS, failure_notes
from controlbooth.launch.preflight.run import preflight
from controlbooth.launch.ranks.local import STOP_SIGNALS, Start, run, signal_of, start_of, this_node
from controlbooth.launch.ranks.torchrun import Node, threads_per_process, world_size
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import (
    RunConfig,
    base_folder,
    data_set_name,
    gradient_accumulation_steps,
    run_folder,
    sources,
    tracking_uri,
)
from controlbooth.trainer.controlnet.network_check import network_problems
from controlbooth.trainer.evaluation.verdict import cannot_announce
from controlbooth.trainer.run.continuing import describe_start

TOLD = {**STATUS, "state": is_text}
"""Fields of a status.json that tells of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = verb_parser(
        "train",
        "Runs a training on this machine. Started again, it goes on from its latest checkpoint.",
        "examples:\n  controlbooth train launch/configs/quickstart.yaml max_steps=200 name=short\n"
        "  controlbooth train run.yaml --processes 8 --dry-run\n"
        "  controlbooth train run.yaml data.shards=shards/train data.held_out=null",
    )
    parser.add_argument("run", metavar="RUN.yaml", help="the run; launch/configs/ holds complete ones")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, set here")
    parser.add_argument("--processes", type=int, help="ranks (default: one per GPU, or 1 on a machine without)")
    parser.add_argument("--dry-run", action="store_true", help="check the run and print the command; start nothing")
    options = parser.parse_intermixed_args(arguments)
    return train(options.run, options.overrides, options.processes, options.dry_run)


def train(run_file: str, overrides: Sequence[str] = (), processes: int | None = None, dry_run: bool = False) -> int:
    """Runs to the end and returns the exit status: of a single rank (trainer/run/failures.py), else torchrun's;
    2 where the checks found problems; 128 + signal if stopped.

    processes: ranks on this machine; None for one per GPU, or 1 without. Raises ConfigError and ValueError.
    """
    config = load_config(run_file, overrides)
    node = this_node(processes)
    if problems := preflight(config, node):
        for problem in problems:
            print(f"controlbooth train: {problem}", file=sys.stderr)
        if not dry_run:
            mend_status(run_folder(config), problems)
        return 2
    print(plan(config, node), flush=True)
    start = start_of(node, run_file, overrides, config.name)
    if dry_run:
        problems = list(network_problems(config))
        for problem in problems:
            print(f"controlbooth train: {problem}", file=sys.stderr)
        if problems:
            return 2
        warn_of_shrunk_lines(config)
        warn_of_cut_captions(config)
        print(f"command    {start}")
        return 0
    began, killed = time.time(), out_of_memory_kills()
    with tempfile.TemporaryDirectory(prefix="controlbooth-refused-") as refused:
        start.environment[REFUSED] = refused
        status = run(start, is_over=lambda: is_finished(run_folder(config), began))
        early = failures(Path(refused), began)
    if status not in (0, *(128 + number for number in STOP_SIGNALS)):
        told = early | failures(run_folder(config), began)
        say_again("controlbooth train", start, told)
        reason = stopped_well(run_folder(config), began) if not start.single_rank and not told else None
        by_signal = signal_of(status) if start.single_rank else "SIGKILL"  # torchrun has named it above
        is_own = start.single_rank or status < 128  # else its agent's, which `run` has told
        if reason is None and by_signal and is_own:
            reason = why_silent(config, told, world_size(node), out_of_memory_kills() - killed, by_signal)
        if reason:
            print(f"controlbooth train: {reason}", file=sys.stderr)
    return status


def mend_status(folder: Path, problems: Sequence[str]) -> None:
    """Puts a whole status.json in the place of one that says nothing; one that tells of a run stays, as the start that
    was refused has changed nothing of that."""
    path = folder / "status.json"
    if path.is_file() and not is_locked(folder / ".lock") and not read_note(path, "It is written anew", TOLD):
        write_json(path, {"state": "failed", "error": "; ".join(problems), "time": time.time()})


def warn_of_shrunk_lines(config: RunConfig) -> None:
    """Warns of lines of indexed shards that were packed much larger than they are read, as the start does."""
    from controlbooth.data.conditions.sizes import warnings  # imports numpy and OpenCV: not for every start

    data, shards = config.data, [source.shards for source in sources(config)]
    try:
        for warning in warnings(shards, data.condition, data.resolution):
            print(f"controlbooth train: warning: {warning}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"controlbooth train: conditions were not looked at: {error}", file=sys.stderr)


def warn_of_cut_captions(config: RunConfig) -> None:
    """Warns of prompts, and captions of indexed shards, that are longer than the base reads, as the start does."""
    from controlbooth.data.loading.long_captions import cut_captions_of  # imports transformers: not for every start

    base = base_folder(config.model.base)
    locations = [source.shards for source in sources(config)]
    try:
        told = cut_captions_of(locations, base if base.is_dir() else base.parent, config.validation.prompts)
    except (ValueError, OSError) as error:
        print(f"controlbooth train: captions were not counted: {error}", file=sys.stderr)
    else:
        if told is not None:
            print(f"controlbooth train: warning: {told}", file=sys.stderr)


def is_finished(folder: Path, since: float) -> bool:
    """Tells whether the run has written since then, in seconds since 1970, that it has done all its steps."""
    status = read_note(folder / "status.json", ANEW, STATUS)
    return status.get("state") == "finished" and (status.get("time") or 0.0) >= since


def stopped_well(folder: Path, since: float) -> str | None:
    """Returns what to say where the ranks have ended with a checkpoint, as they do at a signal that torchrun passes on
    to them; None where they have not. since: in seconds since 1970."""
    status = read_note(folder / "status.json", ANEW, STATUS)
    if status.get("state") != "stopped" or (status.get("time") or 0.0) < since:
        return None
    saved = f"with step {status.get('step')} saved"
    return f"the ranks were stopped from outside, {saved}. Started again, the run goes on there"


def failures(folder: Path, since: float) -> dict[int, str]:
    """Returns rank -> what it has said about its failure since a time in seconds since 1970."""
    notes = sorted(failure_notes(folder, since), key=lambda note: note["rank"])
    return {note["rank"]: note["error"] for note in notes}


def say_again(program: str, start: "Start", told: dict[int, str]) -> None:
    """Prints what the ranks have said, below torchrun's own report; of a single rank it is the last output already."""
    if not start.single_rank:
        for rank, error in told.items():
            print(f"{program}: rank {rank}: {error}", file=sys.stderr)


def why_silent(
    config: RunConfig, told: dict[int, str], ranks: int, kills: int, by_signal: str = "SIGKILL"
) -> str | None:
    """Explains why ranks ended without a word, as a signal ends them.

    told: what the others said. ranks: how many there were. kills: processes that the kernel has killed for memory
    meanwhile. by_signal: the name of the signal. Returns None where the others say enough: torchrun ends those that are
    still there when one has failed.
    """
    silent = [rank for rank in range(ranks) if rank not in told]
    if not silent or not all("lost another rank" in error for error in told.values()):
        return None
    who = f"rank {', '.join(map(str, silent))} ended without a word"
    if kills:
        return (
            f"{who}, and the kernel has killed {kills} process{'es' if kills > 1 else ''} for memory meanwhile. Lower "
            f"micro_batch_size={config.micro_batch_size}, set model.gradient_checkpointing=true, start fewer ranks on "
            "this machine with --processes, or leave it to this run alone; then start again"
        )
    return f"{who}: something has killed it ({by_signal}). Started again, the run goes on from its checkpoint"


def out_of_memory_kills() -> int:
    """Counts the processes that the kernel has killed for memory since it was started; 0 where it does not say."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))


def plan(config: RunConfig, node: Node) -> str:
    """Describes what is about to run, for a person to check at a glance."""
    accumulation = gradient_accumulation_steps(config, world_size(node))
    devices = f"{node.gpus} GPUs" if node.gpus else f"CPU, {threads_per_process(node)} threads each"
    held_out = f"held out: {config.data.held_out}" if config.data.held_out else "nothing is held out or validated"
    return "\n".join(
        [
            *label("run", describe_start(config)),
            f"model      ControlNet for '{config.data.condition}' on {config.model.base}",
            f"data       {data_set_name(config)}; {held_out}",
            f"ranks      {world_size(node)} ({devices}), ZeRO stage {config.engine.zero_stage}",
            f"batch      {config.global_batch_size} = {config.micro_batch_size} a rank x {world_size(node)} ranks "
            f"x {accumulation} accumulation steps",
            f"steps      {config.max_steps}, {config.max_steps * config.global_batch_size} samples",
            f"tracking   {tracking_uri(config)}",
            *label("warning", [why] if (why := cannot_announce(config)) else []),
        ]
    )


def label(name: str, lines: Sequence[str]) -> list[str]:
    """Returns lines of a plan, the first of them with its name."""
    return [f"{name if number == 0 else '':<11}{line}" for number, line in enumerate(lines)]
