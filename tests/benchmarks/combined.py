"""Two ControlNets, of edges and of depth, trained apart and added up: fidelity to both conditions, against each alone.

    .venv/bin/python tests/benchmarks/combined.py [--folder DIR] [--processes 2] [--samples 64] [section.key=value ...]

Each is the quickstart's run on its own kind of condition, on the same scenes; runs in DIR are kept and gone on with.
Pictures are drawn from the same noise by all ways. Depth is found in them by the reader of the built-in base, whose
figure on real pictures is the last row. About twelve minutes on 2 cores.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from controlbooth.data.shards.manifest import open_dataset
from controlbooth.launch.cli import main as controlbooth
from controlbooth.launch.commands.quickstart import CONFIG, HELD_OUT_SCENES, HELD_OUT_SEED, TRAINING_SCENES
from controlbooth.models.base import Base
from controlbooth.models.pretrained import MINIATURE, load_base, load_controlnet
from controlbooth.models.sampling import Control, sample
from controlbooth.trainer.evaluation.control import control_fidelity
from controlbooth.trainer.evaluation.grids import draw_grid
from controlbooth.trainer.evaluation.held_out import AT_ONCE, load_held_out
from controlbooth.trainer.evaluation.kinds import agreement
from controlbooth.trainer.evaluation.scenes.reader import load_reader, read
from controlbooth.trainer.evaluation.statistics import mean_and_interval
from controlbooth.trainer.run.checkpoint import complete_checkpoints

KINDS = ("edges", "depth")
WAYS: dict[str, dict[str, float]] = {  # kind -> scale
    "the base alone": {},
    "edges alone": {"edges": 1.0},
    "depth alone": {"depth": 1.0},
    "both": {"edges": 1.0, "depth": 1.0},
    "both, 0.7 each": {"edges": 0.7, "depth": 0.7},
    "both, 0.5 each": {"edges": 0.5, "depth": 0.5},
}
FIGURES = ("edge_f1", "mask_iou", "depth_delta", "depth_rmse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="a field of both runs")
    parser.add_argument("--folder", type=Path, help="keep shards and runs there")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("-o", "--out", type=Path, default=Path("combined.png"))
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for kind in KINDS:
            train(kind, folder, options.processes, options.overrides)
        measure(folder, options.samples, options.out)


def train(kind: str, folder: Path, processes: int, overrides: list[str]) -> None:
    train_shards, held_out = folder / "train", folder / "held-out"
    pack = ["data", "pack", *(word for one in (*KINDS, "segmentation") for word in ("--condition", one))]
    finish(*pack, "--scenes", str(TRAINING_SCENES), "--samples-per-shard", "256", "-o", str(train_shards))
    finish(*pack, "--scenes", str(HELD_OUT_SCENES), "--seed", str(HELD_OUT_SEED), "-o", str(held_out))
    changes = [f"name={kind}", f"output={folder}", f"data.condition={kind}", "validation.every_steps=200"]
    changes += [f"data.shards={train_shards}", f"data.held_out={held_out}"]
    finish("train", str(CONFIG), *changes, *overrides, "--processes", str(processes))


def finish(*arguments: str) -> None:
    if status := controlbooth(list(arguments)):
        raise SystemExit(f"controlbooth {' '.join(arguments)} ended with {status}")


def measure(folder: Path, samples: int, out: Path) -> None:
    base = load_base(MINIATURE, "miniature", device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    networks: dict[str, Any] = {
        kind: load_controlnet(complete_checkpoints(folder / kind)[-1] / "controlnet", base.denoiser)
        .eval()
        .to(base.device)
        for kind in KINDS
    }
    dataset = open_dataset(folder / "held-out")
    held = {kind: load_held_out(dataset, samples, kind, base.picture_size[0]) for kind in KINDS}
    edges, depth = held["edges"], held["depth"].conditions[..., 0]
    reader = load_reader()

    def figures(pictures: np.ndarray) -> dict[str, np.ndarray]:
        found = [agreement("depth", *pair) for pair in zip(read(reader, "depth", pictures), depth, strict=True)]
        own = {name: np.array([one[name] for one in found]) for name in found[0]}
        return control_fidelity(pictures, edges.edges, edges.segmentation) | own

    print(f"\n{samples} held-out scenes, guidance 2, 20 steps; means with 95 % intervals")
    print(f"{'':18}" + "".join(f"{name.replace('_', ' '):>22}" for name in FIGURES))
    columns = {kind: one.conditions[:8] for kind, one in held.items()}
    for way, scales in WAYS.items():
        conditions = {networks[kind]: (held[kind].conditions, scale) for kind, scale in scales.items()}
        pictures = draw(base, conditions, edges.captions, way)
        columns[way] = pictures[:8]
        print(row(way, figures(pictures)))
    print(row("real pictures", figures(edges.targets)))
    draw_grid(out, columns | {"target": edges.targets[:8]}, edges.captions[:8])
    print(f"pictures: {out}")


def draw(base: Base, conditions: dict[Any, tuple[np.ndarray, float]], captions: list[str], way: str) -> np.ndarray:
    """(N, H, W, 3) uint8. conditions: network -> its condition of each picture, and its scale."""
    made = []
    for first in tqdm(range(0, len(captions), AT_ONCE), desc=way, unit="batch", leave=False):
        rows = slice(first, first + AT_ONCE)
        controls = [
            Control(network, torch.from_numpy(given[rows]).permute(0, 3, 1, 2).float() / 255.0, scale)
            for network, (given, scale) in conditions.items()
        ]
        seeds = range(first, first + len(captions[rows]))
        made.append(sample(base, captions[rows], controls, seeds=seeds, steps=20, guidance_scale=2.0).numpy())
    return np.concatenate(made)


def row(name: str, figures: dict[str, np.ndarray]) -> str:
    means = {key: mean_and_interval(values) for key, values in figures.items()}
    cells = [f"{means[key]['mean']:.3f} ({means[key]['low']:.3f}-{means[key]['high']:.3f})" for key in FIGURES]
    return f"{name:18}" + "".join(f"{cell:>22}" for cell in cells)


if __name__ == "__main__":
    main()
