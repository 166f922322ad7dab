"""`controlbooth quickstart`: the main job from data to a usable checkpoint, on this machine, in minutes."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser
from controlbooth.data.files.records import read_json
from controlbooth.launch.commands.train import train
from controlbooth.launch.ranks import child_process
from controlbooth.launch.ranks.local import gpu_count
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig, run_folder, sources, tracking_uri
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.run.continuing import found_before, is_finished
from controlbooth.trainer.tracking.mlflow_address import how_to_open_saved, how_to_serve

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
TRAINING_SCENES = 8192
HELD_OUT_SCENES = 64
HELD_OUT_SEED = 1_000_003
"""data.scenes.HELD_OUT_SEED: scenes that neither this run nor the base model has seen."""

OF_NO_WEIGHT = ("tracking.", "checkpoint.", "engine.hang_timeout_seconds")
"""What settings begin with on which the trained weights do not depend."""
COLUMNS = "condition | without control | with control | with control, no prompt | target"
"""Of a validation's grid of pictures."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = verb_parser(
        "quickstart",
        "Packs scenes into shards, trains a ControlNet on two ranks, measures its control and exports it. "
        "Stopped at any point, the same command goes on.",
        "example:\n  controlbooth quickstart\n  controlbooth quickstart max_steps=100 engine.zero_stage=3",
    )
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="a field of launch/configs/quickstart.yaml"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands; start nothing")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(CONFIG, options.overrides)
    refuse_another_model(config)
    run, data = run_folder(config), Path(sources(config)[0].shards).parent
    export = run / "export"
    before = packing(config)
    after = [["evaluate", str(run)], ["export", str(run), str(export), "--force"]]
    processes = 1 if gpu_count() == 1 else 2
    training = train_command(str(CONFIG), options.overrides, processes)
    if options.dry_run:
        for command in (*before, training, *after):
            print(shown(command))
        return 0

    seconds = {}
    for name, command in (("data", before[0]), ("held-out data", before[1])):
        heading(f"{name}: {shown(command)}")
        seconds[name] = verb(command)
    heading(f"training: {shown(training)}")
    started = time.monotonic()
    status = train(str(CONFIG), options.overrides, processes)
    seconds["training"] = time.monotonic() - started
    if status:
        return status
    for name, command in (("measuring", after[0]), ("export", after[1])):
        heading(f"{name}: {shown(command)}")
        seconds[name] = verb(command)
    print(summary(run, data, export, tracking_uri(config), seconds))
    return 0


def packing(config: RunConfig) -> list[list[str]]:
    """Returns the commands that write the run's shards, training and held-out; they keep what is there already."""
    pack = ["data", "pack", "--condition", "edges", "--condition", "segmentation"]
    shards = sources(config)[0].shards
    return [
        [*pack, "--scenes", str(TRAINING_SCENES), "--samples-per-shard", "256", "-o", shards],
        [*pack, "--scenes", str(HELD_OUT_SCENES), "--seed", str(HELD_OUT_SEED), "-o", str(config.data.held_out)],
    ]


def train_command(run_file: str, overrides: Sequence[str], processes: int | None) -> list[str]:
    """Returns the command that trains a run by itself. processes: ranks; None for what this machine has."""
    return ["train", run_file, *overrides, *(["--processes", str(processes)] if processes else [])]


def shown(command: Sequence[str]) -> str:
    """Returns a command as it is typed, with `controlbooth` before its verb and arguments."""
    return f"controlbooth {shlex.join(command)}"


def refuse_another_model(config: RunConfig) -> None:
    """Raises ConfigError where the run's folder holds a model with all the steps that are asked for, trained otherwise.

    Nothing would be trained then, and the old model measured and exported as if it were the one asked for.
    """
    folder, before = run_folder(config), found_before(config)
    if before is None or not is_finished(before, config):
        return
    if changed := [one for one in before.changed if not one.startswith(OF_NO_WEIGHT)]:
        raise ConfigError(
            f"{folder} has been trained up to step {before.step} with other settings than are asked for: "
            f"{'; '.join(changed)}. Train into another folder with name=NAME, delete {folder}, or leave the change out"
        )


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def verb(command: Sequence[str]) -> float:
    """Runs `controlbooth ...` and returns its seconds. Exits with its status where it fails; it has said why."""
    started = time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    status = child_process.call([sys.executable, "-m", "controlbooth.launch.cli", *command], environment)
    if status:
        raise SystemExit(status)
    return time.monotonic() - started


def beside_python(program: str) -> str:
    """Returns how to call a program of this environment from here, whether or not the environment is active."""
    return os.path.relpath(Path(sys.executable).with_name(program))


def summary(run: Path, data: Path, export: Path, uri: str, seconds: dict[str, float]) -> str:
    """Returns the closing table: what was made, where it lies, how to open it, what to do next."""
    evaluation = read_json(run / "evaluation" / "evaluation.json", "Start it again")
    speed = read_json(run / "speed.json", "Start it again")
    rows = [("", "mask IoU", "edge F1")]
    rows += [
        (name, f"{figures['mask_iou']['mean']:.3f}", f"{figures['edge_f1']['mean']:.3f}")
        for name, figures in evaluation["figures"].items()
    ]
    us = beside_python("controlbooth")
    made = {
        f"{data}/": "WebDataset shards with edges and segmentation, and their indexes",
        f"{run}/checkpoints/": "the run: started again, it goes on from here",
        f"{max((run / 'samples').glob('step-*.png'))}": COLUMNS,
        f"{run}/report.html": "all of it on one page: curves, figures, pictures over the steps",
        f"{export}/": "a diffusers ControlNet with a model card: ControlNetModel.from_pretrained",
        uri: "curves, figures, pictures, checkpoints",
    }
    width = max(map(len, made))
    lines = [
        "",
        f"== control fidelity on {evaluation['samples']} held-out scenes",
        *(f"  {name:<28}{iou:>10}{f1:>10}" for name, iou, f1 in rows),
        f"  {evaluation['told']}",
        "",
        "== what was made",
        *(f"  {place.ljust(width)}  {what}" for place, what in made.items()),
        "",
        "== speed",
        f"  training {speed['samples_per_second']:.1f} samples/s, stall {speed['stall_percent']:.1f} %, "
        f"peak memory {speed['peak_memory_gib']:.2f} GiB a rank, {speed['precision']}",
        "  " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()),
        "",
        "== next",
        *(f"  {way}" for way in how_to_open_saved(run, beside_python("mlflow")) or [how_to_serve(uri)]),
        "  your own pictures:",
        f"    {us} data pack PHOTOS/ -o shards --held-out 5% --caption 'a photo of a {{folder}}'",
        f"    {us} data show shards/train --condition computed:canny --resolution 64 -o sheet.png",
        f"    {us} train launch/configs/photos.yaml data.shards=shards/train data.held_out=shards/held-out",
        "  full size: launch/configs/sd15-edges.yaml",
    ]
    return "\n".join(lines)
