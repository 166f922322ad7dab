"""Imports a small folder of every layout, packs it and trains it for three steps; counts flags by what becomes of them.

    python tests/benchmarks/import_layouts.py [LAYOUT ...]

Each training is of the built-in base on this machine, with the run file that `import config` makes of a command line.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import foreign

from controlbooth.trainer.imports.tables import DATA_TABLES, TRAINERS, counts, table

COMMAND = "accelerate launch train_controlnet.py --pretrained_model_name_or_path=miniature --resolution=64"
COMMAND += " --max_train_steps=3 --train_batch_size=2 --learning_rate=1e-4 --mixed_precision=no --output_dir={}"
SUBJECT = "accelerate launch train_dreambooth_lora.py --pretrained_model_name_or_path=miniature --resolution=64"
SUBJECT += " --max_train_steps=3 --train_batch_size=1 --learning_rate=1e-4 --mixed_precision=no --output_dir={}"


def controlbooth(*words: object) -> None:
    """Runs a verb. Raises CalledProcessError, after showing what it said, where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "controlbooth.launch.cli", *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        done.check_returncode()


def train_layout(name: str, folder: Path) -> None:
    """Imports a layout, and trains a ControlNet on it for three steps."""
    source, out, run = foreign.LAYOUTS[name](folder / "source"), folder / "shards", folder / "run.yaml"
    has_conditions = name not in ("kohya_folders", "img2dataset")
    controlbooth("import", "data", source, "-o", out)
    condition = "conditioning" if has_conditions else "computed:canny"
    command = COMMAND.format(folder / "runs").split()
    controlbooth("import", "config", "--condition", condition, "--shards", out, "-o", run, "--", *command)
    tree = yaml.safe_load(run.read_text())
    del tree["data"]["shards"]
    tree["data"] |= yaml.safe_load((out / "data.yaml").read_text())["data"]
    tree["model"]["hint_channels"] = [16, 32, 64, 96]
    run.write_text(yaml.safe_dump(tree))
    controlbooth("train", run)


def train_subject(folder: Path) -> None:
    """Imports a DreamBooth folder, and trains its subject for three steps."""
    source, subjects, run = foreign.dreambooth(folder / "rex"), folder / "subjects.yaml", folder / "run.yaml"
    controlbooth("import", "data", source, "--class", "dog", "-o", subjects)
    controlbooth("import", "config", "-o", run, "--", *SUBJECT.format(folder / "runs").split())
    controlbooth("dreambooth", "run", subjects, run, "identifiers=[kcz]", "subjects_per_batch=1")


def main() -> None:
    for name in (*TRAINERS, *DATA_TABLES.values()):
        print(f"{name}: {len(table(name))} flags or keys, {counts(name)}")
    for name in sys.argv[1:] or (*foreign.LAYOUTS, "dreambooth"):
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            train_subject(Path(folder)) if name == "dreambooth" else train_layout(name, Path(folder))
            print(f"{name}: imported, packed, trained 3 steps in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
