"""Prints what failures of machines cost a run: steps redone, seconds lost, and nothing else.

    .venv/bin/python tests/benchmarks/failures.py [links] [nodes] [kills] [stale] [mlflow]

Trains tiny real models on ranks of torchrun, which are killed, stopped and cut off; about 15 minutes on 2 cores for all
of it. links and nodes need root, for network namespaces. Everything is compared with an undisturbed run.
"""

import argparse
import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import mlflow_server
import tiny
import trainings
from hosts import Hosts, why_not

HANG = re.compile(r"controlbooth: the ranks hang|  rank \d+ on |  no answer from|  all stacks")
"""How the lines of a hanging rank's message begin."""
ENDLESS = 100_000
"""As max_steps of a run whose end is decided later."""


def last_step(run: Path) -> int:
    """The last one in metrics.jsonl, which may be in the middle of a line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record.get("metrics", {}):
            steps.append(record["step"])
    return max(steps, default=0)


def status(run: Path) -> dict:
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def wait(until, process: subprocess.Popen | None = None, seconds: float = 900.0) -> bool:
    """Until it is true; False if the process has ended before."""
    end = time.monotonic() + seconds
    while not until():
        if process is not None and process.poll() is not None:
            return bool(until())
        if time.monotonic() > end:
            raise TimeoutError("it did not happen in time")
        time.sleep(0.02)
    return True


def further(run: Path, steps: int, process: subprocess.Popen) -> bool:
    """Waits for so many more steps than there are now; False if the process has ended before."""
    step = last_step(run) + steps
    return wait(lambda: last_step(run) >= step, process)


def everybody(process: subprocess.Popen) -> list[psutil.Process]:
    """The agent and its ranks."""
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def compare(ours: Path, theirs: Path, step: int) -> str:
    a, b = (tiny.weights(run / "checkpoints" / f"step-{step:08d}") for run in (ours, theirs))
    largest = max(float(np.abs(a[name] - b[name]).max()) for name in b)
    losses = [trainings.logged(run, "loss") for run in (ours, theirs)]
    curve = max(abs(losses[0][s] - losses[1][s]) for s in range(1, step + 1))
    every = losses[0].keys() == losses[1].keys() == set(range(1, step + 1))
    return (
        f"weights {'bitwise equal' if largest == 0 else f'differ by at most {largest:.1e}'}; losses of {step} steps "
        f"{'bitwise equal' if curve == 0 else f'differ by at most {curve:.1e}'}, each step logged "
        f"{'once' if every else 'NOT once'}"
    )


def kills(folder: Path, count: int, seed: int) -> None:
    """A supervisor starts the run again, at once, whatever has ended it."""
    print(f"{count} random kills of one run on 2 ranks, with a checkpoint every 2 steps (seed {seed})")
    print("  kill                 at step  went on from  steps redone  seconds until it was further")
    rng, run, rows, redone = random.Random(seed), folder / "runs" / "killed", [], 0
    settings = dict(checkpoint=dict(every_steps=2, keep=3))
    path = trainings.run_file(folder, "killed", max_steps=ENDLESS, **settings)
    began, start, killed = time.monotonic(), 0, None
    while True:
        start += 1
        process = trainings.start(path, 2, CONTROLBOOTH_ATTEMPT=str(start))
        furthest = last_step(run)
        while status(run).get("attempt") != start:  # ranks whose agent was killed may still be training
            furthest = max(furthest, last_step(run))
            assert process.poll() is None, process.communicate()[0][-4000:]
            time.sleep(0.02)
        from_step = status(run)["step"]
        wait(lambda at=furthest: last_step(run) > at, process)
        if killed is not None:
            what, at_step, when = killed
            lost = max(0, furthest - from_step)
            rows.append((lost, time.monotonic() - when))
            print(f"  {what:<20} {at_step:>7}  {from_step:>12}  {lost:>12}  {rows[-1][1]:>6.1f}", flush=True)
        if start > count:
            break
        further(run, rng.randint(1, 3), process)
        agent, *ranks = everybody(process)
        last = start == count  # then nobody may stay, since the run gets its end
        victim, whose = (rng.choice(ranks), "rank") if last or rng.random() < 0.5 else (agent, "agent")
        number = signal.SIGKILL if last else rng.choice([signal.SIGKILL, signal.SIGTERM])
        killed = (f"{whose} by {number.name}", last_step(run), time.monotonic())
        victim.send_signal(number)
        process.wait()
    for one in everybody(process):
        one.send_signal(signal.SIGTERM)
    process.wait()
    end = status(run)["step"]
    seconds = time.monotonic() - began
    began = time.monotonic()
    trainings.finish(trainings.start(trainings.run_file(folder, "calm", max_steps=end, **settings), 2))
    redone, waited = sum(lost for lost, _ in rows), sum(waited for _, waited in rows)
    print(
        f"  {end} steps: {redone} done twice; {seconds:.0f} s, of which {waited:.0f} s from a kill until the run was "
        f"further than before; undisturbed {time.monotonic() - began:.0f} s"
    )
    print(f"  against the undisturbed run: {compare(run, folder / 'runs' / 'calm', end)}")


def digests(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


def stale(folder: Path) -> None:
    """The processes of start 1 sleep while start 2 takes the run over and finishes it, and then wake up."""
    print("a stale writer: start 1 asleep (SIGSTOP), start 2 trains on and ends, start 1 wakes (SIGCONT)")
    run = folder / "runs" / "stale"
    settings = dict(checkpoint=dict(every_steps=2, keep=3))
    endless = trainings.run_file(folder, "stale", max_steps=ENDLESS, **settings)
    old = trainings.start(endless, 2, CONTROLBOOTH_ATTEMPT="1", PYTHONUNBUFFERED="1")
    wait(lambda: last_step(run) >= 5, old)
    sleepers = everybody(old)
    for one in sleepers:
        one.send_signal(signal.SIGSTOP)
    at, end = last_step(run), last_step(run) + 6
    successor = trainings.run_file(folder, "stale", max_steps=end, **settings)
    trainings.finish(trainings.start(successor, 2, CONTROLBOOTH_ATTEMPT="2"))
    before = digests(run)
    for one in sleepers:
        one.send_signal(signal.SIGCONT)
    output, _ = old.communicate(timeout=600)
    after = digests(run)
    said = [line for line in output.splitlines() if "has taken" in line]
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    print(f"  asleep at step {at}; its successor ended at step {end} with {len(before)} files in the run's folder")
    print(f"  torchrun of start 1 ended with status {old.returncode}; it said, {len(said)} time(s):")
    print(*(f"    {line}" for line in said), sep="\n")
    print(f"  files that changed after it woke: {', '.join(changed) or 'none'}")


def links(folder: Path) -> None:
    """One cable between two hosts: cut for 3 s, made slow, and cut for good."""
    print("two hosts with a rank each, ZeRO-2; one cable between them")
    run = folder / "runs" / "linked"
    settings = dict(checkpoint=dict(every_steps=2, keep=3), engine=dict(hang_timeout_seconds=20.0))
    with Hosts() as hosts:
        path = trainings.run_file(folder, "linked", max_steps=ENDLESS, **settings)
        both = [hosts.start(number, path) for number in (0, 1)]
        wait(lambda: last_step(run) >= 4, both[0])

        at = last_step(run)
        hosts.cut(1)
        time.sleep(3)
        hosts.mend(1)
        began = time.monotonic()
        wait(lambda: last_step(run) > at + 1, both[0])
        print(f"  cut for 3 s at step {at}: training went on {time.monotonic() - began:.1f} s after the mending")

        seconds, at = per_step(run, 4, both[0]), last_step(run)
        hosts.slow(1, "5mbit")
        slow = per_step(run, 4, both[0])
        hosts.hasten(1)
        print(f"  5 Mbit/s from step {at} on: {slow:.2f} s a step, before {seconds:.2f} s")
        assert status(run)["attempt"] == 1, "the run was started again"
        print("  lost by both: no step, no process")

        further(run, 3, both[0])
        at = last_step(run)
        hosts.cut(1)
        began = time.monotonic()
        output = [process.communicate(timeout=900)[0] for process in both]
        print(f"  cut for good at step {at}: both hosts ended {time.monotonic() - began:.1f} s later, and said")
        for number, text in enumerate(output):
            told = [line for line in text.splitlines() if HANG.match(line)]
            print(*(f"    host {number} | {line}" for line in told), sep="\n")
        hosts.mend(1)

        end = at + 6
        path = trainings.run_file(folder, "linked", max_steps=end, **settings)
        began = time.monotonic()
        both = [hosts.start(number, path) for number in (0, 1)]
        wait(lambda: status(run).get("state") == "running" and status(run).get("attempt", 1) > 1, both[0])
        from_step = status(run)["step"]
        wait(lambda: last_step(run) > at, both[0])
        print(
            f"  mended and started again: went on from step {from_step} ({at - from_step} steps redone), further than "
            f"before after {time.monotonic() - began:.1f} s"
        )
        [trainings.finish(process) for process in both]
        path = trainings.run_file(folder, "unlinked", max_steps=end, **settings)
        [trainings.finish(process) for process in [hosts.start(number, path) for number in (0, 1)]]
    print(f"  against the undisturbed run: {compare(run, folder / 'runs' / 'unlinked', end)}")


def per_step(run: Path, count: int, process: subprocess.Popen) -> float:
    """Mean seconds of the next steps."""
    first, began = last_step(run), time.monotonic()
    further(run, count, process)
    return (time.monotonic() - began) / (last_step(run) - first)


def world_sizes(run: Path) -> dict[int, int]:
    """step -> ranks that saved it, of the checkpoints that are there."""
    states = [path / "state.json" for path in (run / "checkpoints").glob("step-*")]
    found = {}
    for path in states:
        try:
            state = json.loads(path.read_text())
        except FileNotFoundError:
            continue  # pruned meanwhile
        found[state["step"]] = state["world_size"]
    return found


def nodes(folder: Path) -> None:
    """One torchrun job with --nnodes=1:2: a host is lost, and comes back."""
    print("2 -> 1 -> 2 hosts in one elastic job (--nnodes=1:2), the global batch stays 8")
    run = folder / "runs" / "elastic"
    settings = dict(checkpoint=dict(every_steps=4, keep=1000))
    path = trainings.run_file(folder, "elastic", max_steps=ENDLESS, **settings)
    with Hosts() as hosts:
        first, second = (hosts.start(number, path, nodes="1:2", restarts=5) for number in (0, 1))
        wait(lambda: last_step(run) >= 9, first)
        for one in everybody(second):
            one.send_signal(signal.SIGKILL)
        began, at = time.monotonic(), last_step(run)
        wait(lambda: 1 in world_sizes(run).values(), first)
        print(f"  host 1 killed at step {at}: a checkpoint of 1 rank {time.monotonic() - began:.1f} s later")
        second = hosts.start(1, path, nodes="1:2", restarts=5)
        began, at = time.monotonic(), last_step(run)
        joined = wait(lambda: any(s > at and n == 2 for s, n in world_sizes(run).items()), first)
        print(f"  host 1 started again at step {at}: a checkpoint of 2 ranks {time.monotonic() - began:.1f} s later")
        assert joined, first.communicate()[0]
        further(run, 4, first)
        for one in everybody(first)[1:]:
            one.send_signal(signal.SIGTERM)
        trainings.finish(first)
        trainings.finish(second)
        steps = status(run)["step"]
        path = trainings.run_file(folder, "steady", max_steps=steps, **settings)
        [trainings.finish(process) for process in [hosts.start(number, path) for number in (0, 1)]]
    sizes = sorted(world_sizes(run).items())
    spans = [f"{n} from step {s}" for i, (s, n) in enumerate(sizes) if not i or sizes[i - 1][1] != n]
    print(f"  ranks of the checkpoints: {', '.join(spans)}")
    positions = {
        json.loads((path / "state.json").read_text())["order"]["position"] - 8 * step
        for step in world_sizes(run)
        for path in [run / "checkpoints" / f"step-{step:08d}"]
    }
    print(f"  samples consumed at every checkpoint: {'8 a step' if positions == {0} else f'DIFFERENT {positions}'}")
    print(f"  against the undisturbed run on 2 hosts: {compare(run, folder / 'runs' / 'steady', steps)}")


def mlflow(folder: Path, away: float = 60.0) -> None:
    """A real server, killed in mid-run and started again on its port."""
    print(f"an MLflow server killed for {away:.0f} s in mid-run")
    port, run = trainings.free_port(), folder / "runs" / "tracked"
    tracking = dict(uri=f"http://127.0.0.1:{port}", system_metrics_seconds=1.0)
    path = trainings.run_file(folder, "tracked", max_steps=ENDLESS, tracking=tracking)
    server = mlflow_server.start(folder, port)
    process = trainings.start(path, 1)
    try:
        wait(lambda: json.loads((run / "tracking.json").read_text())["run_id"] if status(run) else None, process)
        further(run, 10, process)
        mlflow_server.stop(server)
        killed = last_step(run)
        time.sleep(away)
        back = last_step(run)
        server = mlflow_server.start(folder, port)
        wait(lambda: newest_point(run, tracking["uri"]) > back, process)  # a slow machine's server takes its time
        further(run, 10, process)
        for one in everybody(process)[1:]:
            one.send_signal(signal.SIGTERM)
        trainings.finish(process)
        report_points(run, tracking["uri"], killed, back)
    finally:
        mlflow_server.stop(server)


def history(run: Path, uri: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric that MLflow has; its client asks for all pages."""
    from mlflow import MlflowClient

    from controlbooth.trainer.tracking.mlflow_run import metric_name

    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, metric_name(name))]


def newest_point(run: Path, uri: str) -> int:
    """Returns the last step whose loss MLflow has, a second after it was asked."""
    newest = max((step for step, _ in history(run, uri, "loss")), default=-1)
    time.sleep(1.0)
    return newest


def report_points(run: Path, uri: str, killed: int, back: int) -> None:
    from mlflow import MlflowClient

    client, seconds = MlflowClient(uri), trainings.logged(run, "step_seconds")
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    lost, twice = 0, 0
    losses = trainings.logged(run, "loss")
    names = ("loss", "step_seconds", "grad_norm")
    for name in names:
        there = history(run, uri, name)
        ours = trainings.logged(run, name)
        lost += len(set(ours.items()) - set(there))
        twice += len(there) - len(set(there))
    during = [seconds[step] for step in range(killed + 2, back)]
    other = [seconds[step] for step in seconds if 3 < step <= killed]
    print(f"  away from step {killed} to step {back} of {max(losses)}; MLflow now has the run as")
    print(f"    {client.get_run(run_id).info.status}, points lost {lost} of {len(losses) * len(names)}, twice {twice}")
    for what, some in (("before", other), ("without server", during)):
        print(f"    seconds a step {what:<15} median {np.median(some):.3f}, slowest {max(some):.3f}")


def main(arguments: Sequence[str] | None = None) -> None:
    sections = dict(links=links, nodes=nodes, kills=kills, stale=stale, mlflow=mlflow)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(sections), default=list(sections))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(sections):
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(sections)}")
    for name in options.sections:
        if name in ("links", "nodes") and (missing := why_not()):
            print(f"{name}: left out, since it {missing}")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            tiny.write_base(folder / "base")
            tiny.write_shards(folder)
            sections[name](folder, options.kills, options.seed) if name == "kills" else sections[name](folder)


if __name__ == "__main__":
    main()
