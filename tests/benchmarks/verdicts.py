"""How often control is announced, and at which step: runs with control, and runs without.

    .venv/bin/python tests/benchmarks/verdicts.py [--folder DIR] [--steps 150] [--every 25] [--only NAME ...]
    .venv/bin/python tests/benchmarks/verdicts.py --simulate 2000 [--folder DIR]

Trained, on the built-in base at 64 pixels under edges, each with seeds 0 to 4:

    scenes        a ControlNet that can learn; to be announced at the step where the curve rises most
    rate-0        the same at a learning rate of 1e-12, at which nothing is learnt; not to be announced
    strangers     trained on pictures under the conditions of other samples, and validated on true pairs; not either

Runs in DIR that are finished are not trained again, so that it can be stopped. About 25 minutes on 2 cores.

--simulate asks instead how often the rule is wrong: of runs without control, made of what the base draws of 256
held-out captions without any ControlNet, four times from other noise. One drawing stands for the base, the others for
a network that changes the pictures without obeying. A run has 32 validations of the same samples, drawn from the 256:
of `drifting` ones each validation has other pictures, of `still` ones all have the same, so that what is wrong once
stays wrong. Intervals are of 1,000 resamples.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from record import write
from tqdm import tqdm

from controlbooth.data.shards.manifest import open_dataset
from controlbooth.launch.commands.quickstart import CONFIG, HELD_OUT_SEED
from controlbooth.models.pretrained import MINIATURE, load_base
from controlbooth.models.sampling import sample
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.evaluation.extract import extractor, fidelity
from controlbooth.trainer.evaluation.held_out import HeldOutSet, load_held_out
from controlbooth.trainer.evaluation.verdict import Validation, judge, read_verdict, validation_curve

SCENES, HELD_OUT = 4096, 256
CASES = ("scenes", "rate-0", "strangers")
SEEDS = 5
KINDS = {"edges": "edge_f1", "depth": "depth_delta", "segmentation": "segmentation_miou"}
SIMULATED_SAMPLES = (8, 16, 64)
SIMULATED_VALIDATIONS = 32
DRAWN_AT_ONCE = 32
DRAWINGS = 4
RESAMPLES = 1000


def controlbooth(*arguments: str) -> None:
    command = [sys.executable, "-m", "controlbooth.launch.cli", *arguments]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def pack(folder: Path) -> None:
    """Shards of scenes with all conditions that the base's reader finds, and those with strangers' edges."""
    kinds = [word for kind in ("edges", "segmentation", "depth") for word in ("--condition", kind)]
    controlbooth("data", "pack", *kinds, "--scenes", str(SCENES), "-o", str(folder / "train"))
    held = ["--scenes", str(HELD_OUT), "--seed", str(HELD_OUT_SEED), "-o", str(folder / "held-out")]
    controlbooth("data", "pack", *kinds, *held)
    strange = folder / "strangers"
    if not strange.exists():
        strange.mkdir()
        for shard in sorted((folder / "train").glob("*.tar")):
            swap_conditions(shard, strange / shard.name)
        controlbooth("data", "index", str(strange))


def swap_conditions(source: Path, target: Path) -> None:
    """A shard in which each sample has the conditions of the one half a shard away."""
    with tarfile.open(source) as tar:
        parts = [(member, tar.extractfile(member).read()) for member in tar if member.isfile()]  # type: ignore[union-attr]
    keys = list(dict.fromkeys(member.name.split(".", 1)[0] for member, _ in parts))
    other = dict(zip(keys, keys[len(keys) // 2 :] + keys[: len(keys) // 2], strict=True))
    content = {member.name: data for member, data in parts}
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in parts:
            key, _, extension = member.name.partition(".")
            if extension.startswith("cond."):
                data = content[f"{other[key]}.{extension}"]
            member.size = len(data)
            tar.addfile(member, BytesIO(data))


def train(folder: Path, case: str, seed: int, steps: int, every: int, processes: int) -> Path:
    """-> the folder of the run, which is finished."""
    name = f"{case}-{steps}-{every}-{seed}"
    run = folder / "runs" / name
    status = run / "status.json"
    if status.is_file() and json.loads(status.read_text())["state"] == "finished":
        return run
    tree = yaml.safe_load(CONFIG.read_text())
    shards = folder / ("strangers" if case == "strangers" else "train")
    tree |= dict(name=name, output=str(folder / "runs"), seed=seed, max_steps=steps)
    tree["data"] |= dict(shards=str(shards), held_out=str(folder / "held-out"))
    tree["validation"] |= dict(every_steps=every, samples=16)
    tree["checkpoint"] = dict(every_steps=steps, keep=1, keep_best=0)
    if case == "rate-0":
        tree["optimizer"]["learning_rate"] = 1e-12
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    controlbooth("train", str(path), "--processes", str(processes))
    return run


def told(run: Path, case: str, seed: int) -> dict[str, Any]:
    verdict = read_verdict(run)
    assert verdict is not None and verdict.last is not None
    curve = validation_curve(run, str(verdict.figure))
    steps = sorted(curve)
    rises = {after: curve[after] - curve[before] for before, after in zip(steps, steps[1:], strict=False)}
    one = verdict.announced
    return {
        "run": case, "seed": seed, "validations": verdict.judged, "announced": one.step if one else "no",
        "told_at": one.told_at if one else "", "largest_rise": max(rises, key=lambda step: rises[step]),
        "first": curve[steps[0]], "last": curve[steps[-1]], "share": verdict.last.share,
        "share_low": verdict.last.low, "corrections": max(0, len(verdict.events) - 1),
    }  # fmt: skip


def simulate(folder: Path, runs: int) -> list[dict[str, Any]]:
    """How many of so many runs without control are announced, by kind, held-out samples and sort of run."""
    rows = []
    for kind, figure, values, chances, reals in tqdm(populations(folder), total=len(KINDS), unit="kind"):
        for samples in SIMULATED_SAMPLES:
            draw = np.random.default_rng(0)
            wrong, highest = dict.fromkeys(("drifting", "still"), 0), -np.inf
            for sort in wrong:
                for _ in range(runs):
                    chosen = draw.choice(HELD_OUT, samples, replace=False)
                    shape = (SIMULATED_VALIDATIONS, samples) if sort == "drifting" else (1, samples)
                    which = 1 + draw.integers(0, DRAWINGS - 1, shape)
                    found = shares(values[which, chosen], chances[which, chosen], reals[chosen])
                    alone = shares(values[:1, chosen], chances[:1, chosen], reals[chosen])[0, 0]
                    found = np.broadcast_to(found, (SIMULATED_VALIDATIONS, 3)).tolist()
                    seen = [Validation(step, one[0], *one, alone, alone) for step, one in enumerate(found)]
                    highest = max(highest, max(one.low - one.bound for one in seen))
                    wrong[sort] += bool(judge(seen, samples))
            mean = float((values[0] - chances[0]).mean() / (reals - chances[0]).mean())
            rows.append(
                {
                    "kind": kind,
                    "figure": figure,
                    "without_control": mean,
                    "samples": samples,
                    "validations": SIMULATED_VALIDATIONS,
                    "runs": runs,
                    "nearest_to_bound": float(highest),
                    **{f"announced_{sort}": count for sort, count in wrong.items()},
                }  # fmt: skip
            )
    return rows


def shares(values: np.ndarray, chances: np.ndarray, reals: np.ndarray) -> np.ndarray:
    """(V, N), (V, N), (N,) of V validations of N samples -> (V, 3): the share of what is possible, and its interval."""
    rows = np.random.default_rng(1).integers(0, len(reals), (RESAMPLES, len(reals)))
    gained, possible = values - chances, reals - chances
    ratio = gained[:, rows].mean(axis=2) / possible[:, rows].mean(axis=2)
    low, high = np.quantile(ratio, [0.025, 0.975], axis=1)
    return np.stack([gained.mean(axis=1) / possible.mean(axis=1), low, high], axis=1)


def populations(folder: Path) -> Iterator[tuple[str, str, np.ndarray, np.ndarray, np.ndarray]]:
    """Kind, figure, values and chances of each drawing, (DRAWINGS, HELD_OUT); of real pictures, (HELD_OUT,)."""
    dataset = open_dataset(folder / "held-out")
    drawings = None
    for kind, figure in KINDS.items():
        held = load_held_out(dataset, HELD_OUT, kind, 64)
        if drawings is None:
            drawings = [drawing(folder / f"without-control-{number}.npy", held, number) for number in range(DRAWINGS)]
        extract = extractor(held, {}, "cpu")
        *found, real = (fidelity(images, held, range(HELD_OUT), extract) for images in (*drawings, held.targets))
        values, chances = (np.stack([getattr(one, part)[figure] for one in found]) for part in ("values", "chances"))
        yield kind, figure, values, chances, real.values[figure]


def drawing(kept: Path, held: HeldOutSet, number: int) -> np.ndarray:
    """(HELD_OUT, 64, 64, 3) uint8: what the base draws of the captions as a validation does, from noise of its own."""
    if not kept.is_file():
        base = load_base(MINIATURE)
        own = load_config(CONFIG).validation
        parts = []
        for first in tqdm(range(0, HELD_OUT, DRAWN_AT_ONCE), desc=f"drawing {number}", unit="batch"):
            rows = range(first, min(first + DRAWN_AT_ONCE, HELD_OUT))
            seeds = [row + number * HELD_OUT for row in rows]
            how = dict(steps=own.sampling_steps, guidance_scale=own.guidance_scale, picture_size=held.picture_size)
            parts.append(sample(base, [held.captions[row] for row in rows], [], seeds=seeds, **how).numpy())
        np.save(kept, np.concatenate(parts))
    return np.load(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep shards and runs there")
    parser.add_argument("--steps", type=int, default=150, help="of each run")
    parser.add_argument("--every", type=int, default=25, help="steps between validations")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each case")
    parser.add_argument("--processes", type=int, default=2, help="ranks of each run")
    parser.add_argument("--only", action="append", choices=CASES, help="of the cases; may be repeated")
    parser.add_argument("--simulate", type=int, metavar="RUNS", help="simulate so many runs instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="verdicts-") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        pack(folder)
        if options.simulate:
            write("verdicts-simulated", simulate(folder, options.simulate))
            return
        rows = []
        for case in options.only or CASES:
            for seed in range(options.seeds):
                rows.append(
                    told(train(folder, case, seed, options.steps, options.every, options.processes), case, seed)
                )
                print(rows[-1], file=sys.stderr, flush=True)
        write("verdicts", rows)


if __name__ == "__main__":
    main()
