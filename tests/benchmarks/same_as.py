"""Whether this version makes bit for bit what another commit makes, and goes on with what that one has begun.

    .venv/bin/python tests/benchmarks/same_as.py COMMIT            about twenty minutes on 2 cores
    .venv/bin/python tests/benchmarks/same_as.py COMMIT --only subjects

Both versions are started through their `controlbooth` command, each from a checkout of its own, on one tiny base and
the same shards. Printed for each run: the steps that were compared, and how many losses, order states and weights
differ (moments of the optimizer included for ControlNets, as they are in the checkpoint). `goes on` was begun by COMMIT
and ended by this version; it is compared with the run that this version made alone. Times are those of the whole
command, imports included, both versions one after the other. Exits with 1 where anything differs or is refused.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import studios
import tiny
import torch
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """-> a folder for PYTHONPATH in which `controlbooth` is another commit."""
    tree = folder / "other" / "controlbooth"
    tree.parent.mkdir()
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(tree), commit], check=True, capture_output=True)
    try:
        yield tree.parent
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def call(code: Path, *words: object) -> tuple[int, str, float]:
    """Runs `controlbooth` of a version; -> its status, what it said, and seconds."""
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    began = time.perf_counter()
    command = [sys.executable, "-m", "controlbooth.launch.cli", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - began


def write_tree(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run: Path) -> dict[int, float]:
    """step -> loss, as metrics.jsonl has them last."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        metrics = entry.get("metrics", entry)
        loss = metrics.get("loss", metrics.get("train/loss"))
        if loss is not None:
            found[entry["step"]] = loss
    return found


def tensors(run: Path) -> dict[str, str]:
    """Digest of every tensor of the run's last checkpoint or finished subjects, by file and name."""
    checkpoints = sorted(run.glob("checkpoints/step-*"))
    files = sorted((checkpoints[-1] if checkpoints else run / "subjects").rglob("*"))
    found: dict[str, str] = {}
    for path in files:
        if path.suffix == ".safetensors":
            named: dict[str, Any] = dict(load_file(path))
        elif path.suffix == ".pt" and "universal" not in path.parts:
            named = flat(torch.load(path, map_location="cpu", weights_only=False))  # written by this benchmark's runs
        else:
            continue
        where = path.relative_to(run)
        found |= {f"{where}:{name}": hashlib.sha256(value.tobytes()).hexdigest() for name, value in named.items()}
    return found


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The tensors in nested dicts and lists, as arrays, by their places."""
    if isinstance(value, torch.Tensor):
        return {name: value.detach().float().numpy()}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: one for place, inner in pairs for key, one in flat(inner, f"{name}/{place}").items()}


def orders(run: Path) -> list[Any]:
    return [json.loads(path.read_text())["order"] for path in sorted(run.glob("checkpoints/step-*/state.json"))]


def compare(name: str, one: Path, other: Path, seconds: str = "") -> bool:
    """Prints what differs between two runs; -> whether nothing does."""
    losses_a, losses_b = (losses(run) if (run / "metrics.jsonl").exists() else {} for run in (one, other))
    a, b = tensors(one), tensors(other)
    weights = sum(a.get(key) != b.get(key) for key in a.keys() | b.keys())
    lost = sum(losses_a.get(step) != losses_b.get(step) for step in losses_a.keys() | losses_b.keys())
    order = orders(one) != orders(other)
    print(
        f"{name:28} {len(losses_a):3} losses, {lost} differ; order {'differs' if order else 'the same'}; "
        f"{len(a)} tensors, {weights} differ{seconds}",
        flush=True,
    )
    return bool(a) and not weights and not lost and not order


def runs(folder: Path) -> dict[str, tuple[str, dict[str, Any], int]]:
    """name -> kind, its tree without name and output, and ranks."""
    trees: dict[str, tuple[str, dict[str, Any], int]] = {}
    for stage in (0, 1, 2, 3):
        tree = tiny.run_tree(folder, "")
        tree["engine"]["zero_stage"] = stage
        tree["validation"]["every_steps"] = 3
        if stage == 3:
            tree["optimizer"].pop("ema_decay")
        trees[f"controlnet-zero{stage}"] = ("controlnet", tree, 2)
    subjects = dict(
        model=dict(base=str(folder / "base"), attention="math"), precision="fp32", resolution=64, subjects_per_batch=4,
        steps=6, learning_rate=1e-3, identifiers=["red", "blue", "green", "teal", "pink", "gray"],
        checkpoint_every_steps=3, prior=dict(images=4, sampling_steps=2),
    )  # fmt: skip
    trees["subjects-stacked"] = ("subjects", subjects, 1)
    trees["subjects-full"] = ("subjects", subjects | dict(method="full", learning_rate=1e-4, instance_batch_size=2), 2)
    return trees


def start(code: Path, folder: Path, kind: str, tree: dict[str, Any], ranks: int) -> tuple[int, str, float]:
    path = write_tree(folder / f"{tree['name']}.yaml", tree)
    words = ["train", path] if kind == "controlnet" else ["dreambooth", "run", folder / "subjects.yaml", path]
    return call(code, *words, "--processes", ranks)


def retrain(before: Path, now: Path, folder: Path) -> bool:
    """Has COMMIT train and promote the first round of a policy, and this version the second; -> whether it can."""
    from retrainings import Retraining

    place = folder / "retraining"
    place.mkdir()
    policy = Retraining(folder, place, "same")

    def tick_until(code: Path, decided: int) -> None:
        for _ in range(60):
            status, said, _ = call(code, "retrain", "tick", policy.path)
            if status not in (0, 3) or len([one for one in policy.decisions if one[1] == "promoted"]) >= decided:
                print(f"  {said.strip().splitlines()[-1]}" if said.strip() else "", flush=True)
                return
            time.sleep(2.0)

    policy.add_shard(0)
    tick_until(before, 1)
    known = policy.aliases()
    status, said, _ = call(now, "retrain", "status", policy.path)
    print(f"retraining: after COMMIT's round {known}; this version's status ends with {status}")
    policy.add_shard(1)
    tick_until(now, 2)
    print(f"retraining: after a round of this version {policy.aliases()}; decisions {policy.decisions}")
    return status == 0 and policy.aliases()["champion"] != known["champion"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--only", default="", metavar="WORD", help="runs whose names hold it")
    options = parser.parse_args()
    right = True
    with tempfile.TemporaryDirectory() as temporary, checked_out(options.commit, Path(temporary)) as other:
        folder, here = Path(temporary), Path(temporary) / "here"
        here.mkdir()
        (here / "controlbooth").symlink_to(ROOT)
        (folder / "base").mkdir()
        tiny.write_base(folder / "base")
        tiny.write_shards(folder)
        studios.write_subjects(folder)
        for name, (kind, tree, ranks) in runs(folder).items():
            if options.only not in name:
                continue
            made: dict[str, Path] = {}
            took: dict[str, float] = {}
            for version, code in (("before", other), ("now", here)):
                output = folder / version
                status, said, took[version] = start(
                    code, folder, kind, tree | dict(name=name, output=str(output)), ranks
                )
                if status:
                    sys.exit(f"{name} {version} ended with {status}:\n{said[-3000:]}")
                made[version] = output / name
            seconds = f"; {took['before']:.1f} s before, {took['now']:.1f} now"
            right &= compare(name, made["before"], made["now"], seconds)
            steps = "max_steps" if kind == "controlnet" else "steps"
            first = tree | dict(name=name, output=str(folder / "both"))
            if kind == "controlnet":
                begun = start(other, folder, kind, first | {steps: 4}, ranks)
                ended = start(here, folder, kind, first, ranks)
                if begun[0] or ended[0]:
                    sys.exit(f"{name} does not go on:\n{begun[1][-1500:]}\n{ended[1][-3000:]}")
                right &= compare(f"  {name} goes on", folder / "both" / name, made["now"])
        if options.only in "retraining":
            right &= retrain(other, here, folder)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
