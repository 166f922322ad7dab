"""Prints how exact a run is: ZeRO stages, world sizes, kills.

    .venv/bin/python tests/benchmarks/exactness.py

Trains tiny real models many times, each on ranks of torchrun; about five minutes on 2 cores. Everything is compared
with a plain PyTorch loop in one process, with the uninterrupted run, or between world sizes.
"""

import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
import trainings


def stages(folder: Path) -> None:
    plain = np.array(tiny.torchrun(1, "plain", folder)["losses"])
    print("losses of 6 steps on the same global batches (8 samples, 2 accumulation steps), fp32")
    print(f"  {'plain PyTorch, 1 process':<28}", *(f"{loss:.7f}" for loss in plain))
    for stage, curve in tiny.torchrun(2, "stages", folder, "fp32").items():
        largest = np.abs(np.array(curve) - plain).max()
        print(
            f"  {f'ZeRO {stage}, 2 ranks':<28}",
            *(f"{loss:.7f}" for loss in curve),
            f" largest difference {largest:.1e}",
        )


def world_sizes(folder: Path) -> None:
    one, two, four = (tiny.torchrun(n, "batches", folder)["batches"] for n in (1, 2, 4))
    rows = sum(map(len, one))
    print(f"world sizes 1, 2 and 4: {rows} samples in {len(one)} global batches")
    for column, name in enumerate(("positions", "keys", "dropout decisions", "timesteps", "noise hashes", "prompts")):
        values = [[row[column] for batch in world for row in batch] for world in (one, two, four)]
        print(f"  {name:<20}", "identical" if values[0] == values[1] == values[2] else "DIFFERENT")


def kills(folder: Path, seed: int) -> None:
    out = folder / "runs"
    trainings.finish(trainings.start(trainings.run_file(folder, "whole", max_steps=8), 2))
    path = trainings.run_file(folder, "killed", max_steps=8)
    for step in sorted(random.Random(seed).sample(range(2, 7), 2)):
        process = trainings.start(path, 2)
        trainings.wait_for_step(out / "killed", step)
        trainings.kill(process)
        print(f"  SIGKILL to all ranks once step {step} was logged")
    trainings.finish(trainings.start(path, 2))
    shutil.copytree(out / "whole", out / "moved")
    for step in (6, 8):
        shutil.rmtree(out / "moved" / "checkpoints" / f"step-{step:08d}")
    trainings.finish(trainings.start(trainings.run_file(folder, "moved", max_steps=8), 1))
    theirs = tiny.weights(out / "whole" / "checkpoints" / "step-00000008")
    for name, what in (("killed", "killed twice, 2 ranks"), ("moved", "2 ranks, from step 4 on 1 rank")):
        ours = tiny.weights(out / name / "checkpoints" / "step-00000008")
        same = all(np.array_equal(ours[key], theirs[key]) for key in theirs)
        largest = max(float(np.abs(ours[key] - theirs[key]).max()) for key in theirs)
        losses = trainings.logged(out / name, "loss") == trainings.logged(out / "whole", "loss")
        print(
            f"  {what:<32} weights {'bitwise equal' if same else f'differ by at most {largest:.1e}'}, "
            f"losses {'bitwise equal' if losses else 'within rounding'}"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny.write_base(folder / "base")
        tiny.write_shards(folder)
        stages(folder)
        world_sizes(folder)
        print("killed and started again, against an uninterrupted run")
        kills(folder, seed=random.randrange(1000))


if __name__ == "__main__":
    main()
