"""What every figure of control gives to pictures that obey nothing, for each kind of condition, on scenes.

    python tests/benchmarks/chance_kinds.py [--samples 64]

For each kind and figure: real pictures, whose conditions are exact or computed of them, so that they are perfect
copies; chance, which is what the same pictures score under the conditions of other scenes; random noise; and discs at
the true places, which have the size and place of each object and no outline. 0 is the worst of a figure in [0, 1]; of
an error, it is what a condition picture of one plain level or direction gets, the best of all such. A figure can tell
control where chance is at most a third of the way from that 0 to real pictures. Status 1 where one cannot.
"""

import argparse
import sys
import tempfile

import numpy as np
from tqdm import tqdm

from controlbooth.data.condition_names import COMPUTABLE, COMPUTED
from controlbooth.data.scenes.render import render
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.launch.commands.data_pack import main as pack
from controlbooth.trainer.evaluation.drawing import disc_baseline, noise_pictures
from controlbooth.trainer.evaluation.extract import extractor, fidelity
from controlbooth.trainer.evaluation.figures import OF_ALL_KINDS
from controlbooth.trainer.evaluation.held_out import EDGE_KINDS, HeldOutSet, load_held_out, scenes_of
from controlbooth.trainer.evaluation.kinds import LOWER_IS_BETTER, agreement

STORED = ("edges", "segmentation", "depth", "normals", "keypoints")
SIDE = 64
MOST = 1 / 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    lines, worst = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        conditions = [part for kind in STORED for part in ("--condition", kind)]
        pack(["--scenes", str(options.samples), *conditions, "-o", folder])
        for kind in tqdm((*STORED, *(COMPUTED + name for name in COMPUTABLE)), unit="kind"):
            held = load_held_out(open_dataset(folder), options.samples, kind, SIDE)
            for name, row in measure(held, shown_already=bool(lines)).items():
                worst = max(worst, row["way"])
                lines.append(f"{kind:<24}{name:<20}" + "".join(f"{row[one]:>9.3f}" for one in COLUMNS) + told(row))
    print(f"{options.samples} scenes at {SIDE} pixels")
    print(f"{'kind':<24}{'figure':<20}" + "".join(f"{one:>9}" for one in COLUMNS) + f"{'chance, of the way':>20}")
    print("\n".join(lines))
    print(f"chance is at most {worst:.0%} of the way from 0 to real pictures; {MOST:.0%} may be")
    return int(worst > MOST)


COLUMNS = ("0", "chance", "noise", "discs", "real")


def told(row: dict[str, float]) -> str:
    return f"{row['way']:>20.0%}" + ("  TOO MUCH" if row["way"] > MOST else "")


def measure(held: HeldOutSet, shown_already: bool) -> dict[str, dict[str, float]]:
    """A row for each figure of the kind; those that every kind has only with the first one."""
    rows = range(len(held.keys))
    extract = extractor(held, {}, "cpu")
    round_ones = np.stack([render(disc_baseline(one, SIDE), SIDE).image for one in scenes_of(held)])
    real, noise, disc = (
        fidelity(images, held, rows, extract)
        for images in (held.targets, noise_pictures(rows, (SIDE, SIDE)), round_ones)
    )
    table = {}
    for name in real.values:
        own = held.kind in EDGE_KINDS and name == "edge_f1"
        if shown_already and name in OF_ALL_KINDS and not own:
            continue
        nothing = trivial(held, name) if name in LOWER_IS_BETTER else 0.0
        chance, best = float(real.chances[name].mean()), float(real.values[name].mean())
        way = (chance - nothing) / (best - nothing)
        others = {"noise": float(noise.values[name].mean()), "discs": float(disc.values[name].mean())}
        table[name] = {"0": nothing, "chance": chance, "real": best, "way": way, **others}
    return table


def trivial(held: HeldOutSet, name: str) -> float:
    """The error of the mean of each condition picture, everywhere."""
    plain = [np.broadcast_to(one.mean(axis=(0, 1)).round().astype(np.uint8), one.shape) for one in held.conditions]
    return float(np.mean([agreement(held.kind, a, b)[name] for a, b in zip(plain, held.conditions, strict=True)]))


if __name__ == "__main__":
    sys.exit(main())
