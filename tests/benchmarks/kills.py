"""Kills, stops and interrupts every long command at random moments, starts it again until it is done, and compares.

    .venv/bin/python tests/benchmarks/kills.py [--count 100] [--seed 0] [--folder DIR] [--memory] [--only WORD ...]

Each kill is drawn from the seed: the command, the process (launcher, torchrun agent, rank, worker, the script of a
background job), the signal (SIGKILL, SIGTERM, SIGSTOP and later SIGCONT, SIGSTOP and later SIGKILL) and the moment.
What the command has made in the end is compared with what an undisturbed one made: weights bit for bit, every step
logged once with the same loss, every sample packed once, files byte for byte. No process may be left behind.

Tiny models and pictures; where the launcher is not hit, ranks are forked from a process that has imported everything,
as in the tests. About ten seconds a kill on 2 cores that nobody else uses. DIR keeps the results (results.jsonl):
started again, it goes on. Exits with 1 where anything was lost, repeated, different or left behind.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import forked
import studios
import tiny

CLI = [sys.executable, "-m", "controlbooth.launch.cli"]
MARK = "CONTROLBOOTH_KILLS"
"""Environment: which experiment a process belongs to, however far it has come from who started it."""
PATIENCE_SECONDS = 300.0
"""For anything to end; what takes longer hangs."""
END_SECONDS = 60.0
"""For what is left of a command that was killed: a step and a checkpoint."""
STARTS = 60
"""Of one command until it is done; one that is refused while the old ranks still save is tried again."""
SIGNALS = ("KILL", "KILL", "KILL", "TERM", "TERM", "STOP+CONT", "STOP+KILL")


@dataclass(frozen=True)
class Command:
    """One command line that is killed.

    words: of an experiment's own folder and the world. began: whether the work itself has begun there, as opposed to
    the imports. look: what it has made, to be compared. victims: roles that may be hit. share: of all kills.
    """

    name: str
    words: Callable[[Path, Path], list[str]]
    began: Callable[[Path], bool]
    look: Callable[[Path], dict[str, Any]]
    victims: tuple[str, ...]
    share: int
    prepare: Callable[[Path, Path], None] = lambda folder, world: None
    until: Callable[[Path], bool] = lambda folder: True
    """Whether all is done once the command has ended well; what runs in the background is waited for."""
    ranks: int = 0
    """Of torchrun, which is forked, and the words are those of its program; 0 starts a command of controlbooth."""


# The world


def prepare_world(world: Path) -> None:
    """A base, shards, photographs, subjects and a finished run, all tiny; made once."""
    if (world / "ready").exists():
        return
    shutil.rmtree(world, ignore_errors=True)
    world.mkdir(parents=True)
    tiny.write_base(world / "base")
    tiny.write_shards(world)
    studios.write_subjects(world)
    rng = np.random.default_rng(0)
    (world / "photos").mkdir()
    for number in range(80):
        picture = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        cv2.imwrite(str(world / "photos" / f"{number:03d}.png"), picture)
        (world / "photos" / f"{number:03d}.txt").write_text(f"picture {number}")
    tree = tiny.run_tree(world, "whole") | dict(max_steps=2)
    (world / "whole.yaml").write_text(yaml.safe_dump(tree))
    subprocess.run([*CLI, "train", str(world / "whole.yaml"), "--processes", "1"], check=True)
    (world / "ready").touch()


def run_file(folder: Path, world: Path) -> Path:
    tree = tiny.run_tree(world, "run") | dict(output=str(folder / "runs"), max_steps=8, global_batch_size=4)
    tree["data"]["held_out"] = None
    tree["checkpoint"] = dict(every_steps=2, keep=3)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def policy_file(folder: Path, world: Path) -> Path:
    """A policy with a first round to train from scratch and to measure."""
    if (folder / "policy.yaml").exists():
        return folder / "policy.yaml"
    run = tiny.run_tree(world, "template") | dict(output=str(folder / "runs"), max_steps=4)
    del run["data"]["shards"], run["data"]["held_out"]
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "data").mkdir(exist_ok=True)
    for number in range(2):
        for suffix in ("tar", "tar.idx"):
            name = f"shards-{number:06d}.{suffix}"
            shutil.copy2(world / "train" / name, folder / "data" / name)
    tree = dict(
        name="policy", state=str(folder / "state"), run="run.yaml", data=f"{folder / 'data'}/*.tar", processes=1,
        triggers=dict(growth=dict(samples=12)), resumes=3, lease_seconds=5,
        evaluation=dict(data=str(world / "held"), samples=4, sampling_steps=2, guidance_scale=1.0),
        gate=dict(metric="edge_f1", margin=-1.0, no_regression={"says_count": 1.0}),
    )  # fmt: skip
    (folder / "policy.yaml").write_text(yaml.safe_dump(tree))
    return folder / "policy.yaml"


# What was made


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def tree_of(folder: Path, pattern: str = "*", but: tuple[str, ...] = ()) -> dict[str, str]:
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): digest(path) for path in files if path.name not in but}


def of_training(folder: Path) -> dict[str, Any]:
    """Weights and moving average of the last step; losses by step, with how often each was logged."""
    run = folder / "runs" / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss" in row.get("metrics", {})]
    last = run / "checkpoints" / "step-00000008"
    return {
        "losses": {str(row["step"]): row["metrics"]["loss"] for row in logged},
        "logged": dict(Counter(str(row["step"]) for row in logged)),
        "weights": tree_of(last / "controlnet", "*.safetensors"),
        "position": json.loads((last / "state.json").read_text())["order"],
        "status": json.loads((run / "status.json").read_text())["state"],
    }


def of_shards(folder: Path) -> dict[str, Any]:
    """Bytes of tars and indexes, and no file that is half made."""
    return tree_of(folder / "out", but=(".lock", "pack.lock"))


def of_subjects(folder: Path) -> dict[str, Any]:
    run = folder / "runs" / "many"
    states = {path.parent.name: json.loads(path.read_text())["state"] for path in run.glob("subjects/*/status.json")}
    return {"states": states, "weights": tree_of(run / "subjects", "pytorch_lora_weights.safetensors")}


def of_evaluation(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "out" / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (folder / "out" / "samples.jsonl").read_text().splitlines()]
    return {"figures": found["figures"], "samples": rows}


def of_retraining(folder: Path) -> dict[str, Any]:
    """Decisions that matter, each once, and the weights that were trained."""
    audit = [json.loads(line) for line in (folder / "state" / "policy" / "audit.jsonl").read_text().splitlines()]
    told = [one["decision"] for one in audit if one["decision"] in ("promoted", "refused", "failed")]
    weights = sorted(folder.glob("runs/policy-*/checkpoints/step-00000004/controlnet/*.safetensors"))
    return {"decisions": told, "weights": [digest(path) for path in weights]}


def of_export(folder: Path) -> dict[str, Any]:
    return tree_of(folder / "out")


def any_file(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(next(folder.glob(pattern), None) for pattern in patterns)


def retrained(folder: Path) -> bool:
    """Whether the round is decided; else the next tick is due when nothing of it trains."""
    audit = folder / "state" / "policy" / "audit.jsonl"
    if audit.exists() and any(word in audit.read_text() for word in ('"promoted"', '"refused"')):
        return True
    time.sleep(1.0)
    return False


def trained(folder: Path) -> bool:
    status = folder / "runs" / "run" / "status.json"
    return status.exists() and json.loads(status.read_text()).get("state") == "finished"


def subjects_trained(folder: Path) -> bool:
    states = [json.loads(path.read_text()).get("state") for path in folder.glob("runs/many/subjects/*/status.json")]
    return states == ["finished"] * 3


def subject_words(folder: Path, world: Path) -> list[str]:
    path = studios.run_file(world, "many", output=str(folder / "runs"), steps=8, validation=dict(every_steps=100))
    own = folder / "subjects-run.yaml"
    shutil.copy2(path, own)
    rows = yaml.safe_load((world / "subjects.yaml").read_text())[:3]
    rows = [row | dict(images=str(world / row["images"])) for row in rows]
    (folder / "subjects.yaml").write_text(yaml.safe_dump(rows))
    return ["dreambooth", "run", str(folder / "subjects.yaml"), str(own), "--processes", "2"]


def launch_words(folder: Path, world: Path) -> list[str]:
    """Of a background job: submitted first, later resumed."""
    run = folder / "runs" / "run"
    (folder / "cluster.yaml").write_text("engine: local\nprocesses_per_node: 2\ngrace_seconds: 60\n")
    if (run / "job" / "job.json").exists():
        return ["launch", "resume", str(run)]
    return ["launch", "local", str(run_file(folder, world)), "--cluster", str(folder / "cluster.yaml")]


THREE = ("launcher", "agent", "rank")
TRAINING = any_file("runs/run/metrics.jsonl")
COMMANDS = (
    Command(
        "ranks",
        lambda folder, world: ["-m", "controlbooth.trainer.controlnet.train", str(run_file(folder, world))],
        TRAINING,
        of_training,
        ("agent", "rank"),
        32,
        until=trained,  # a rank that is told to stop ends the command well, before its last step
        ranks=2,
    ),
    Command(
        "ranks-precompute",
        lambda folder, world: ["-m", "controlbooth.trainer.controlnet.precompute", str(run_file(folder, world)),
                               f"data.latent_cache={folder / 'out'}"],
        any_file("out/*"),
        of_shards,
        ("agent", "rank"),
        8,
        ranks=2,
    ),
    Command(
        "ranks-dreambooth",
        lambda folder, world: ["-m", "controlbooth.trainer.dreambooth.train", *subject_words(folder, world)[2:4]],
        any_file("runs/many/state/*"),
        of_subjects,
        ("agent", "rank"),
        14,
        until=subjects_trained,
        ranks=2,
    ),
    Command(
        "train",
        lambda folder, world: ["train", str(run_file(folder, world)), "--processes", "2"],
        TRAINING,
        of_training,
        THREE,
        6,
        until=trained,
    ),
    Command(
        "train-alone",
        lambda folder, world: ["train", str(run_file(folder, world)), "--processes", "1"],
        TRAINING,
        of_training,
        ("launcher", "rank"),
        4,
        until=trained,
    ),
    Command("launch", launch_words, TRAINING, of_training, ("script", "agent", "rank"), 3, until=trained),
    Command(
        "pack",
        lambda folder, world: ["data", "pack", str(world / "photos"), "-o", str(folder / "out"), "--condition", "canny",
                               "--samples-per-shard", "8", "--workers", "2"],
        any_file("out/*"),
        of_shards,
        ("launcher", "worker"),
        11,
    ),  # fmt: skip
    Command(
        "annotate",
        lambda folder, world: ["data", "annotate", str(world / "train"), "-o", str(folder / "out"), "--condition",
                               "soft_edges", "--condition", "canny", "--workers", "2"],
        any_file("out/*"),
        of_shards,
        ("launcher", "worker"),
        9,
    ),  # fmt: skip
    Command(
        "precompute",
        lambda folder, world: ["data", "precompute", str(run_file(folder, world)),
                               f"data.latent_cache={folder / 'out'}", "--processes", "2"],
        any_file("out/*"),
        of_shards,
        THREE,
        2,
    ),  # fmt: skip
    Command("dreambooth", subject_words, any_file("runs/many/state/*"), of_subjects, THREE, 3, until=subjects_trained),
    Command(
        "export",
        lambda folder, world: ["export", str(world / "runs" / "whole"), str(folder / "out"), "--force"],
        any_file("out*", ".out*"),
        of_export,
        ("launcher",),
        3,
    ),
    Command(
        "evaluate",
        lambda folder, world: ["evaluate", str(world / "runs" / "whole"), "--samples", "4", "--steps", "2", "-o",
                               str(folder / "out")],
        any_file("out/*"),
        of_evaluation,
        ("launcher",),
        3,
    ),  # fmt: skip
    Command(
        "retrain",
        lambda folder, world: ["retrain", "tick", str(policy_file(folder, world))],
        any_file("state/policy/*"),
        of_retraining,
        ("launcher", "measure", "rank"),
        2,
        until=retrained,
    ),  # fmt: skip
)  # fmt: skip


# Processes


def members(mark: str) -> list[psutil.Process]:
    """All processes of an experiment, wherever they hang in the tree, but for those that have ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def role(process: psutil.Process, launcher: int) -> str:
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:
        return "gone"
    if process.pid == launcher:
        return "launcher"
    if "torch.distributed.run" in words:
        return "agent"
    if any(word.startswith("controlbooth.trainer.") for word in words):
        return "measure" if "evaluate" in words else "rank"
    if any("multiprocessing" in word and "resource_tracker" not in word for word in words):
        return "worker"
    if words[:1] == ["bash"]:
        return "script"
    return "measure" if "evaluate" in words else "other"


class Program:
    """A command of controlbooth, and all processes that come of it, which have the mark in their environment."""

    def __init__(self, process: subprocess.Popen, mark: str) -> None:
        self.process, self.mark, self.pid = process, mark, process.pid

    def status(self) -> int | None:
        return self.process.poll()

    def members(self) -> list[psutil.Process]:
        return members(self.mark)

    def role(self, process: psutil.Process) -> str:
        return role(process, self.pid)


class Torchrun:
    """A torchrun that was forked, and its ranks, also when it has ended. Their environment shows no mark."""

    def __init__(self, started: forked.Started, log: Path) -> None:
        self.started, self.pid, self.known = started, started.pid, {}
        threading.Thread(target=self._read, args=(log,), daemon=True).start()

    def _read(self, log: Path) -> None:
        with open(log, "a") as file:
            for line in self.started.stdout:
                file.write(line)

    def status(self) -> int | None:
        return self.started.poll()

    def members(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.pid) if self.status() is None else None
            for one in [agent, *agent.children(recursive=True)] if agent else []:
                self.known[one.pid, one.create_time()] = one
        return [one for one in self.known.values() if is_alive(one)]

    def role(self, process: psutil.Process) -> str:
        return "agent" if process.pid == self.pid else "rank"


Started = Program | Torchrun


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(command: Command, folder: Path, world: Path, mark: str) -> Started:
    log = folder / "log.txt"
    if command.ranks:
        return Torchrun(forked.start(command.ranks, command.words(folder, world), cwd=folder), log)
    return Program(start_program(command, folder, world, mark, log), mark)


def start_program(command: Command, folder: Path, world: Path, mark: str, log: Path) -> subprocess.Popen:
    with open(log, "ab") as file:
        return subprocess.Popen(
            [*CLI, *command.words(folder, world)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def wait(until: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def is_over(started: Started) -> bool:
    """Whether a command has ended, and what it has left in the background too."""
    return started.status() is not None and not started.members()


def strike(rng: random.Random, command: Command, started: Started) -> tuple[str, str] | None:
    """Hits one process; -> its role and the signal. None where nothing of the wished role is there."""
    there = [(started.role(one), one) for one in started.members()]
    wished = rng.choice(command.victims)
    victims = [one for name, one in there if name == wished] or [one for name, one in there if name in command.victims]
    if not victims:
        return None
    victim = rng.choice(sorted(victims, key=lambda one: one.pid))
    name, how = started.role(victim), rng.choice(SIGNALS)
    try:
        if how.startswith("STOP"):
            victim.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0.5, 2.0))
            victim.send_signal(signal.SIGCONT if how.endswith("CONT") else signal.SIGKILL)
        else:
            victim.send_signal(signal.SIGKILL if how == "KILL" else signal.SIGTERM)
    except psutil.NoSuchProcess:
        return None
    return name, how


@dataclass
class Seen:
    """What one undisturbed start took and made."""

    until_it_begins: float
    seconds: float
    made: dict[str, Any]


def undisturbed(command: Command, base: Path, world: Path) -> Seen:
    """Runs the command in a folder of its own, once for all kills of it."""
    kept = base / f"calm-{command.name}.json"
    if kept.exists():
        return Seen(**json.loads(kept.read_text()))
    folder = base / f"calm-{command.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began = time.monotonic()
    started = start(command, folder, world, f"calm-{command.name}")
    wait(lambda: command.began(folder) or is_over(started), PATIENCE_SECONDS)
    first = time.monotonic() - began
    finish(command, started, folder, world, f"calm-{command.name}")
    seen = Seen(first, max(time.monotonic() - began, first + 0.2), command.look(folder))
    kept.write_text(json.dumps(vars(seen)))
    return seen


def finish(command: Command, started: Started, folder: Path, world: Path, mark: str, at_once: bool = False) -> int:
    """Starts the command again until it is done; -> how often. Raises TimeoutError where it hangs or never is.

    at_once: does not wait for what the first start has left to end.
    """
    patience = PATIENCE_SECONDS if command.name in ("launch", "retrain") else END_SECONDS
    for again in range(STARTS):
        if not wait(lambda: started.status() is not None, PATIENCE_SECONDS):  # noqa: B023
            raise TimeoutError(f"hangs: {told(started)}")
        ended_well = started.status() == 0 and command.until(folder)
        if (ended_well or not at_once or again) and not wait(lambda: not started.members(), patience):  # noqa: B023
            raise TimeoutError(f"left behind: {told(started)}")
        if ended_well:
            return again
        time.sleep(0.2)
        started = start(command, folder, world, mark)
    raise TimeoutError(f"was not done after {STARTS} starts")


def told(started: Started) -> list[str]:
    return [f"{started.role(one)} {one.pid}" for one in started.members()]


def differences(made: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {str(made.get(name))[:80]} in place of {str(expected.get(name))[:80]}"
        for name in sorted(made.keys() | expected.keys())
        if made.get(name) != expected.get(name)
    ]


def experiment(number: int, seed: int, command: Command, base: Path, world: Path) -> dict[str, Any]:
    """One kill; -> what was done, and what was wrong."""
    rng = random.Random(f"{seed}-{number}")
    calm = undisturbed(command, base, world)
    work = calm.seconds - calm.until_it_begins
    folder, mark = base / f"kill-{number}", f"{base.name}-{number}-{seed}"
    hit, began, wrong = None, time.monotonic(), []
    started: Started
    for trial in range(6):  # a command that was quicker than its kill is killed anew
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command.prepare(folder, world)
        started = start(command, folder, world, mark)
        early = rng.random() < 0.2
        if not early:
            wait(lambda: command.began(folder) or is_over(started), PATIENCE_SECONDS)  # noqa: B023
        time.sleep(rng.uniform(0, calm.until_it_begins if early else work / (trial + 1)))
        hit = strike(rng, command, started)
        if hit:
            break
        wait(lambda: is_over(started), PATIENCE_SECONDS)  # noqa: B023
    try:
        launcher_hit = hit is not None and hit[0] in ("launcher", "script")
        if not launcher_hit and not command.ranks and command.name not in ("launch", "retrain"):
            wait(lambda: started.status() is not None, PATIENCE_SECONDS)
            if not wait(lambda: not started.members(), 3.0):
                wrong.append(f"at the launcher's end: {told(started)} still there")
        starts = finish(command, started, folder, world, mark, at_once=rng.random() < 0.5)
        wrong += differences(command.look(folder), calm.made)
    except (TimeoutError, OSError, ValueError, KeyError) as error:
        starts = -1
        wrong.append(f"{type(error).__name__}: {error}")
        for one in started.members():
            one.kill()
    if hit is None:
        wrong.append("nothing could be hit")
    if not wrong:
        shutil.rmtree(folder)
    role_hit, how = hit or ("", "")
    seconds = round(time.monotonic() - began, 1)
    return dict(
        number=number, command=command.name, victim=role_hit, signal=how, starts=starts, seconds=seconds, wrong=wrong
    )


# Memory


CGROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)
"""Of version 1 and 2: the folder, and the files of the limit and of the highest use."""


def memory_group(name: str) -> tuple[Path, str, str] | None:
    """A new cgroup with the names of its files; None where none can be made here."""
    for root, limit, peak in CGROUPS:
        folder = root / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError:
            continue
        if (folder / limit).exists() and os.access(folder / limit, os.W_OK):
            return folder, limit, peak
        folder.rmdir()
    return None


def capped(words: list[str], group: Path, limit_file: str, limit: int | None, log: Path) -> int:
    """Runs a command in a cgroup; -> its exit status. limit: bytes, None for none."""
    unlimited = "-1" if limit_file == "memory.limit_in_bytes" else "max"
    (group / limit_file).write_text(str(limit) if limit else unlimited)
    enter = f'echo $$ > {group / "cgroup.procs"}; exec "$@"'
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = ["bash", "-c", enter, "enter", *CLI, *words]
    with open(log, "wb") as file:
        return subprocess.run(command, env=environment, stdout=file, stderr=file).returncode


def memory(base: Path, world: Path) -> bool:
    """Trains under a limit on memory that the run does not fit in, then without: one sentence, and equal weights.

    Returns whether all was right.
    """
    group = memory_group(f"controlbooth-{os.getpid()}")
    if group is None:
        print("memory: no cgroup of one's own can be made here, so nothing was capped")
        return True
    folder, limit_file, peak_file = group
    (train,) = (one for one in COMMANDS if one.name == "train-alone")
    calm, right = undisturbed(train, base, world), True
    probe = base / "memory-probe"
    shutil.rmtree(probe, ignore_errors=True)
    probe.mkdir()
    capped(train.words(probe, world), folder, limit_file, None, probe / "log.txt")
    peak = int((folder / peak_file).read_text())
    for share in (0.95, 0.8, 0.6, 0.4):
        own = base / f"memory-{share}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        status = capped(train.words(own, world), folder, limit_file, int(peak * share), own / "log.txt")
        said = (own / "log.txt").read_text(errors="replace")
        told = [line for line in said.replace("\r", "\n").splitlines() if "memory" in line]
        again = 0
        if status:
            again = capped(train.words(own, world), folder, limit_file, None, own / "again.txt")
        wrong = differences(train.look(own), calm.made) if again == 0 else [f"status {again} without a limit"]
        wrong += ["a traceback"] if "Traceback" in said else []
        wrong += ["no word of memory"] if status and not told else []
        right &= not wrong
        print(f"memory: {share:.0%} of {peak / 2**20:.0f} MiB: status {status}, {told[-1:]}; then {wrong or 'equal'}")
    folder.rmdir()
    return right


def drawn(count: int, seed: int, commands: tuple[Command, ...]) -> Iterator[tuple[int, Command]]:
    """The seeded list: which command each kill is of."""
    pool = [command for command in commands for _ in range(command.share)]
    rng = random.Random(seed)
    order = [pool[number % len(pool)] for number in range(count)] if count >= len(pool) else rng.sample(pool, count)
    rng.shuffle(order)
    yield from enumerate(order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--most", type=int, help="end after so many kills, to go on another time")
    parser.add_argument("--memory", action="store_true", help="cap the memory of a training too, by a cgroup")
    parser.add_argument("--only", nargs="*", default=[], help="commands: " + ", ".join(one.name for one in COMMANDS))
    options = parser.parse_args()
    base = (options.folder or Path(tempfile.mkdtemp())).absolute()
    base.mkdir(parents=True, exist_ok=True)
    prepare_world(base / "world")
    commands = tuple(one for one in COMMANDS if not options.only or one.name in options.only)
    results = base / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    began = time.monotonic()
    known = {one["number"] for one in done}
    left = [one for one in drawn(options.count, options.seed, commands) if one[0] not in known]
    for number, command in left[: options.most]:
        one = experiment(number, options.seed, command, base, base / "world")
        done.append(one)
        with open(results, "a") as file:
            file.write(json.dumps(one) + "\n")
        said = "; ".join(one["wrong"]) or "equal"
        print(f"{number:4} {one['command']:<12} {one['victim']:<9} {one['signal']:<10} {one['starts']:>3} starts more, "
              f"{one['seconds']:6.1f} s: {said}", flush=True)  # fmt: skip
    wrong = [one for one in done if one["wrong"]]
    right = memory(base, base / "world") if options.memory else True
    print(f"\n{len(done)} kills, seed {options.seed}, {sum(one['seconds'] for one in done) / 60:.0f} minutes "
          f"({(time.monotonic() - began) / 60:.0f} now), by what was hit:")  # fmt: skip
    for key in ("command", "victim", "signal"):
        print("  " + ", ".join(f"{name} {count}" for name, count in Counter(one[key] for one in done).most_common()))
    print(f"{len(wrong)} wrong" + "".join(f"\n  {one['number']} {one['command']}: {one['wrong']}" for one in wrong))
    sys.exit(bool(wrong) or not right)


if __name__ == "__main__":
    main()
