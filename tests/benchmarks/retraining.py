"""Shows retraining over five rounds of growing data, one of them poisoned, and prints the audit log.

    .venv/bin/python tests/benchmarks/retraining.py [--folder DIR] [--processes 2]

A ControlNet for edges on the built-in base, 150 steps a round from the last champion. Expected: promoted,
promoted, refused (the captions of what came were shuffled), promoted (a person has taken them out), nothing (nothing
came). The first round is asked for by two ticks at the same instant. Then bad input. About ten minutes on 2 cores; ends
with status 1 where anything is decided otherwise. DIR is kept.
"""

import argparse
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import yaml

from controlbooth.data.scenes.render import HELD_OUT_SEED
from controlbooth.deploy.retrain import audit
from controlbooth.deploy.retrain.policy import load_policy, state_folder
from controlbooth.deploy.retrain.rounds import is_alive, read_state

CLI = [sys.executable, "-m", "controlbooth.launch.cli"]
CONFIG = Path(__file__).parents[2] / "launch" / "configs" / "quickstart.yaml"
EXPECTED = ["promoted", "promoted", "refused", "promoted", "nothing"]
DELIVERIES = {"first": (0, 1024), "second": (1024, 1024), "poisoned": (2048, 2048), "fourth": (4096, 1024)}
"""name -> number of the first scene, and how many."""
STEPS = 150


def pack(out: Path, start: int, count: int, seed: int = 0) -> None:
    kinds = ["--condition", "edges", "--condition", "segmentation"]
    scenes = ["--scenes", str(count), "--start", str(start), "--seed", str(seed)]
    command = [*CLI, "data", "pack", *scenes, *kinds, "--samples-per-shard", "256", "-o", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def shuffle_captions(folder: Path) -> None:
    """Gives each sample of a shard the caption of another one: pictures and conditions stay whole."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            parts = [(member, tar.extractfile(member).read()) for member in tar]  # pyright: ignore
        captions = [payload for member, payload in parts if member.name.endswith(".txt")]
        random.Random(0).shuffle(captions)
        with tarfile.open(shard, "w") as tar:
            for member, payload in parts:
                payload = captions.pop() if member.name.endswith(".txt") else payload
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    subprocess.run([*CLI, "data", "index", str(folder)], check=True, stdout=subprocess.DEVNULL)


def deliver(folder: Path, name: str) -> None:
    """New shards come into the folder that grows."""
    (folder / "growing").mkdir(exist_ok=True)
    for path in sorted((folder / "packed" / name).glob("shards-*")):
        shutil.copy2(path, folder / "growing" / f"{list(DELIVERIES).index(name) + 1}-{name}-{path.name}")


def write_policy(folder: Path, name: str = "edges", processes: int = 2, **changes) -> Path:
    tree = dict(
        name=name,
        state=str(folder / "state"),
        run=str(CONFIG),
        changes=[
            f"output={folder / 'runs'}",
            f"max_steps={STEPS}",
            "optimizer.schedule=constant",
            "data.held_out=null",
            "checkpoint.every_steps=50",
        ],
        data=f"{folder / 'growing'}/*.tar",
        processes=processes,
        triggers=dict(growth=dict(samples=512, share=0.1), clock=dict(every_hours=24)),
        evaluation=dict(data=str(folder / "packed" / "frozen"), samples=64, sampling_steps=10, guidance_scale=2.0),
        gate=dict(metric="edge_f1", no_regression=dict(mask_iou=0.02, says_object_class=0.1, says_background=0.05)),
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | changes, sort_keys=False))
    return path


def tick(policy: Path, *options: str) -> list[str]:
    return [*CLI, "retrain", "tick", str(policy), *options]


def until_decided(policy: Path) -> None:
    """Ticks as cron would, but at the right moments: the benchmark has not got its patience."""
    folder = state_folder(load_policy(policy))
    while not (one := read_state(folder, 0.0).rounds[-1]).closed:
        while is_alive(one):
            time.sleep(1.0)
        subprocess.run(tick(policy), check=True)


def two_at_once(policy: Path) -> int:
    """-> how many runs two ticks at the same instant have started."""
    ticks = [subprocess.Popen(tick(policy), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for number, one in enumerate(ticks, 1):
        print(f"tick {number} of 2: {one.communicate()[0].strip()}")
    rounds = read_state(state_folder(load_policy(policy)), 0.0).rounds
    print(f"two ticks at the same instant: {len(rounds)} round, started {rounds[0].submissions} time")
    return len(rounds)


def bad_input(folder: Path) -> None:
    """What a person is told, with the exit status."""
    here = dict(triggers=dict(growth=dict(samples=1)))
    cases = {
        "unknown key": write_policy(folder, "unknown", gates=dict(metric="edge_f1")),
        "overlap": write_policy(
            folder, "overlap", evaluation=dict(data=str(folder / "packed" / "first"), samples=8), **here
        ),
        "registry away": write_policy(
            folder, "away", changes=[f"output={folder / 'runs'}", "tracking.uri=http://127.0.0.1:9"], **here
        ),
    }
    for name, policy in cases.items():
        done = subprocess.run(tick(policy), capture_output=True, text=True)
        print(f"{name}: status {done.returncode}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for everything (default: temporary)")
    parser.add_argument("--processes", type=int, default=2, help="ranks; what is decided does not depend on it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        began = time.monotonic()
        for name, (start, count) in DELIVERIES.items():
            pack(folder / "packed" / name, start, count)
        pack(folder / "packed" / "frozen", 0, 96, HELD_OUT_SEED)
        shuffle_captions(folder / "packed" / "poisoned")
        policy = write_policy(folder, processes=options.processes)
        one_run = False
        for number, name in enumerate([*DELIVERIES, None], 1):
            comes = "nothing comes" if name is None else f"the {name} delivery comes"
            print(f"\n== round {number}: {comes}", flush=True)
            if name == "fourth":
                for shard in (folder / "growing").glob("*-poisoned-*"):
                    shard.unlink()
            if name is not None:
                deliver(folder, name)
            if number == 1:
                one_run = two_at_once(policy) == 1
            else:
                subprocess.run(tick(policy), check=True)
            until_decided(policy)
        print("\n== controlbooth retrain history", flush=True)
        subprocess.run([*CLI, "retrain", "history", str(policy)], check=True)
        print("\n== controlbooth retrain status", flush=True)
        subprocess.run([*CLI, "retrain", "status", str(policy)], check=True)
        print("\n== controlbooth retrain rollback", flush=True)
        subprocess.run([*CLI, "retrain", "rollback", str(policy), "--reason", "to show it"], check=True)
        print("\n== bad input", flush=True)
        bad_input(folder)
        decided = [
            one["decision"]
            for one in audit.read(state_folder(load_policy(policy)))
            if one["decision"] in ("promoted", "refused", "nothing", "failed")
        ]
        print(f"\nexpected {', '.join(EXPECTED)}\ndecided  {', '.join(decided)}")
        print(f"one run from two ticks: {'yes' if one_run else 'NO'}; {time.monotonic() - began:.0f} s in all")
        print(json.dumps(dict(decided=decided, one_run=one_run)))
        return 0 if decided == EXPECTED and one_run else 1


if __name__ == "__main__":
    sys.exit(main())
