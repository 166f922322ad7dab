"""What control is said to be on photographs, whose edges are dense, after a training that is too short for it.

    python tests/benchmarks/chance_photos.py PHOTOS [--folder FOLDER] [--steps 120]

PHOTOS holds a folder of JPEGs for each class, such as Caltech 101. 60 of them to train on and 60 held out, spread over
the classes, are packed with Canny edges at their own size; the built-in base is trained on them at 64 pixels, validated
six times, and evaluated on all that are held out. Prints the evaluation's table, how dense the edges are that the run
was given, and whether noise scores at chance; status 1 where its share of what is possible is not 0 to a few percent.
FOLDER keeps everything, and what it holds is not trained again. Three minutes on two cores.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from controlbooth.data.shards.manifest import open_dataset
from controlbooth.launch.cli import main as controlbooth
from controlbooth.trainer.evaluation.control import edge_map
from controlbooth.trainer.evaluation.held_out import load_held_out

PICTURES, SIDE = 60, 64
MOST_OF_NOISE = 0.03
"""Share of what is possible that noise may be given."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        run = folder / "runs" / "photos"
        for part, first in (("train", 0), ("held-out", 1)):
            if not (folder / "shards" / part).exists():
                pack(options.photos, folder, part, first)
        write_run(folder, options.steps)
        finish("train", str(folder / "run.yaml"))
        finish("evaluate", str(run), "--samples", str(PICTURES))
        return told(folder, json.loads((run / "evaluation" / "evaluation.json").read_text()))


def pack(photos: Path, folder: Path, part: str, first: int) -> None:
    """PICTURES of all classes in turn. first: 0 takes the even ones of each class, 1 the odd ones."""
    classes = [sorted(path.glob("*.jpg"))[first::2] for path in sorted(photos.iterdir()) if path.is_dir()]
    turns = [one[turn] for turn in range(max(map(len, classes))) for one in classes if turn < len(one)]
    for picture in turns[:PICTURES]:
        place = folder / part / picture.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, place / picture.name)
    where = [str(folder / part), "-o", str(folder / "shards" / part)]
    finish("data", "pack", *where, "--condition", "canny", "--caption", "a photo of a {folder}")


def write_run(folder: Path, steps: int) -> None:
    every = max(1, steps // 6)
    shards = folder / "shards"
    tree = dict(
        name="photos", output=str(folder / "runs"), max_steps=steps, global_batch_size=16, micro_batch_size=8,
        model=dict(base="miniature", hint_channels=[16, 32, 64, 96]), optimizer=dict(learning_rate=3e-4),
        data=dict(
            shards=str(shards / "train"), held_out=str(shards / "held-out"), condition="canny", resolution=SIDE
        ),
        checkpoint=dict(every_steps=every),
        validation=dict(every_steps=every, samples=8, grid=6, sampling_steps=10, guidance_scale=2.0),
    )  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))


def finish(*arguments: str) -> None:
    if status := controlbooth(list(arguments)):
        raise SystemExit(f"controlbooth {' '.join(arguments)} ended with {status}")


def told(folder: Path, result: dict) -> int:
    held = load_held_out(open_dataset(folder / "shards" / "held-out"), PICTURES, "canny", SIDE)
    assert held.edges is not None
    found = np.mean([edge_map(target).mean() for target in held.targets])
    print(f"\nedges are {(held.edges > 0).mean():.0%} of the pixels of conditions, and {found:.0%} of real pictures")
    print(f"{'edge f1':<26}{'value':>8}{'chance':>8}{'possible':>10}")
    for way, own in result["figures"].items():
        one = own["edge_f1"]
        share = f"{one['share']['mean']:.1%}" if "share" in one else "-"
        print(f"{way:<26}{one['mean']:>8.3f}{one['chance']['mean']:>8.3f}{share:>10}")
    noise = result["figures"]["random noise"]["edge_f1"]["share"]
    at_chance = abs(noise["mean"]) <= MOST_OF_NOISE
    verdict = "noise scores at chance" if at_chance else "NOISE DOES NOT SCORE AT CHANCE"
    print(f"{verdict}: {noise['mean']:.1%} of what is possible")
    return int(not at_chance)


if __name__ == "__main__":
    sys.exit(main())
