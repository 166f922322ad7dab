"""Real subjects through everything: manifest, dry run, class pictures, training, measuring. Prints times and memory.

    .venv/bin/python tests/benchmarks/real_subjects.py PHOTOS BASE [--classes FILE] [--folder DIR]

PHOTOS: a folder of photographs for each subject, such as those of github.com/google/dreambooth; --classes their list of
`subject_name,class` lines. BASE: a diffusers folder of the shapes of Stable Diffusion. Its weights may be random, and
then the subjects' figures say nothing; those of the photographs themselves, which come last, do.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import yaml
from cost import run

ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def read_classes(path: Path) -> dict[str, str]:
    """Lines of `name,class` -> the class of each name; other lines are passed over."""
    pairs = (line.split(",") for line in path.read_text().splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--classes", type=Path, help="default: PHOTOS/prompts_and_classes.txt")
    parser.add_argument("--folder", type=Path, help="for the run, which is kept there (default: temporary)")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--together", type=int, default=10, help="subjects in a batch (default: 10)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=5, help="measured, of the 25 of the protocol (default: 5)")
    parser.add_argument("--images", type=int, default=2, help="of each prompt (default: 2)")
    options = parser.parse_args()
    classes = read_classes(options.classes or options.photos / "prompts_and_classes.txt")
    rows = [
        dict(name=one.name.replace(" ", "-"), images=str(one.absolute()), class_noun=classes[one.name])
        for one in sorted(options.photos.iterdir())
        if one.is_dir()
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "subjects.yaml").write_text(yaml.safe_dump(rows))
        tree = dict(
            name="real", output=str(folder), model=dict(base=str(options.base.absolute())), steps=options.steps,
            resolution=options.resolution, subjects_per_batch=options.together, learning_rate=1e-4,
            adapter=dict(rank=4), prior=dict(images=8, sampling_steps=10),
            identifiers=[chr(code) for code in range(ord("a"), ord("a") + len(rows))],
        )  # fmt: skip
        (folder / "real.yaml").write_text(yaml.safe_dump(tree))
        cli = [sys.executable, "-m", "controlbooth.launch.cli", "dreambooth"]
        train = [*cli, "run", str(folder / "subjects.yaml"), str(folder / "real.yaml")]
        train += ["--processes", str(options.processes)]
        few = ["--prompts", str(options.prompts), "--images", str(options.images)]
        commands = {
            "dry run": [*train, "--dry-run"],
            "run": train,
            "run again": train,
            "measure": [*cli, "measure", str(folder / "real"), *few],
            "real pictures": [*cli, "measure", "--real", str(options.photos)],
        }
        costs = {name: run(command, environment=ENVIRONMENT) for name, command in commands.items()}
        for name in ("measure", "real pictures"):
            print(f"\n{costs[name].output.strip()}")
        print(
            f"\n{len(rows)} subjects, {options.steps} steps at {options.resolution} px, {options.together} in a batch"
        )
        print(f"{'':14} {'seconds':>8} {'CPU seconds':>12} {'peak GiB':>9}")
        for name, cost in costs.items():
            print(f"{name:14} {cost.seconds:8.1f} {cost.cpu_seconds:12.1f} {cost.peak_bytes / 2**30:9.2f}")


if __name__ == "__main__":
    main()
