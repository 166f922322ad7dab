"""Prints of every optimizer.name: what it keeps beside the plan, how it learns, and how exactly it goes on.

    .venv/bin/python tests/benchmarks/optimizers.py [--steps 60]

Trains a tiny base on 2 ranks (Prodigy on 1) with each, then from the middle again, on as many ranks and on one; about
six minutes on 2 cores. Bytes are those of the states in the last checkpoint, and those that `plan` counts.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
import trainings
import yaml

from controlbooth.trainer.engine.optimizers import state_bytes

RATES = {"adamw": 1e-3, "adamw8bit": 1e-3, "adafactor": 1e-2, "muon": 1e-3, "prodigy": 1.0}
"""optimizer.learning_rate of each."""


def ranks_of(name: str) -> int:
    return 1 if name == "prodigy" else 2


def train(folder: Path, run: str, name: str, steps: int, ranks: int) -> Path:
    """Trains, or goes on with what the run's folder holds; returns the last checkpoint."""
    path = trainings.run_file(
        folder, run, max_steps=steps, optimizer=dict(name=name, learning_rate=RATES[name], ema_decay=None),
        checkpoint=dict(every_steps=steps // 2), validation=dict(every_steps=10 * steps),
    )  # fmt: skip
    tree = yaml.safe_load(path.read_text())
    del tree["data"]["held_out"]
    path.write_text(yaml.safe_dump(tree))
    trainings.finish(trainings.start(path, ranks))
    return folder / "runs" / run / "checkpoints" / f"step-{steps:08d}"


def from_the_middle(folder: Path, run: str, again: str, steps: int) -> None:
    """Copies a run without its last checkpoint."""
    shutil.copytree(folder / "runs" / run, folder / "runs" / again)
    shutil.rmtree(folder / "runs" / again / "checkpoints" / f"step-{steps:08d}")


def saved_state_bytes(checkpoint: Path) -> int:
    """Counts the bytes of the optimizer's tensors in a checkpoint, of all ranks together; without their padding."""
    own = sorted((checkpoint / "optimizer").glob("*.pt"))
    files = own or sorted((checkpoint / "deepspeed").glob("*_optim_states.pt"))
    found: dict[int, int] = {}
    held = []  # so that no address comes twice
    for path in files:
        tree = torch.load(path, map_location="cpu", weights_only=False)  # written here, a moment ago
        states: Any = tree["tensors"] if own else tree["optimizer_state_dict"]["base_optimizer_state"]["state"]
        for state in states.values():
            for value in state.values():
                if torch.is_tensor(value):
                    storage = value.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
        held.append(tree)
    return sum(found.values())


def planned_bytes(name: str, checkpoint: Path) -> int:
    return sum(state_bytes(name, key, tensor.shape) for key, tensor in tiny.weights(checkpoint).items())


def apart(one: Path, other: Path) -> float:
    ours, theirs = tiny.weights(one), tiny.weights(other)
    return max(float(np.abs(ours[key] - theirs[key]).max()) for key in theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of each run; a multiple of 2")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny.write_base(folder / "base")
        tiny.write_shards(folder)
        heads = ("resumed", "on 1 rank: largest difference", "state bytes", "planned", "loss of first and last tenth")
        print(f"{'':<11}{heads[0]:>10}{heads[1]:>32}{heads[2]:>13}{heads[3]:>10}  {heads[4]}, at rate", flush=True)
        for name, rate in RATES.items():
            whole = train(folder, name, name, steps, ranks_of(name))
            from_the_middle(folder, name, f"{name}-again", steps)
            again = train(folder, f"{name}-again", name, steps, ranks_of(name))
            alone = "refused: 1 rank alone"
            if ranks_of(name) > 1:
                from_the_middle(folder, name, f"{name}-alone", steps)
                alone = f"{apart(train(folder, f'{name}-alone', name, steps, 1), whole):.1e}"
            losses = [loss for _, loss in sorted(trainings.logged(folder / "runs" / name, "loss").items())]
            tenth = max(1, steps // 10)
            resumed = "bitwise" if apart(again, whole) == 0.0 else "DIFFERS"
            print(
                f"{name:<11}{resumed:>10}{alone:>32}{saved_state_bytes(whole):>13,}{planned_bytes(name, whole):>10,}"
                f"  {np.mean(losses[:tenth]):.4f} {np.mean(losses[-tenth:]):.4f}, {rate:g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
