"""Trains the built-in base's ControlNet whole and as control-LoRAs of several ranks, and measures them alike.

    .venv/bin/python tests/benchmarks/control_lora.py [--steps 1600] [--sizes 4 8 16 32] [--times 20]

The quickstart's shards, settings and seed, whatever is trained. Told are the bytes of the weights' file, the trained
parameters and their share of the whole copy's, samples a second, the largest memory of a rank, and of the held-out
conditions edge F1 and mask IoU with their chance, what real pictures reach, and the share of what is possible between
the two. --times: the learning rates of low-rank differences to try, in those of whole weights; each is a training of
every size. What is in FOLDER already is not trained or measured again.
"""

import argparse
from pathlib import Path
from typing import Any

from record import write
from safetensors import safe_open

from controlbooth.data.files.records import read_json
from controlbooth.launch.commands.quickstart import CONFIG, packing, verb
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import RunConfig, lora_learning_rate, run_folder
from controlbooth.trainer.evaluation.record import REAL, WITH
from controlbooth.trainer.run.checkpoint import complete_checkpoints

FIGURES = {"edge_f1": "edge F1", "mask_iou": "mask IoU"}


def changes_of(options: argparse.Namespace) -> list[list[str]]:
    """The overrides of each training: the whole one first."""
    folder, steps = options.folder, options.steps
    common = [
        f"output={folder / 'runs'}", f"data.shards={folder / 'train'}", f"data.held_out={folder / 'held-out'}",
        f"max_steps={steps}", f"checkpoint.every_steps={steps}", f"validation.every_steps={steps}",
        f"optimizer.warmup_steps={min(20, steps)}", "validation.at_start=false", *options.overrides,
    ]  # fmt: skip
    rate = load_config(CONFIG, common).optimizer.learning_rate
    small = [
        [f"name=rank-{size}-times-{times:g}-{steps}", "model.method=lora", f"model.rank={size}",
         f"optimizer.lora_learning_rate={times * rate!r}"]
        for times in options.times
        for size in options.sizes
    ]  # fmt: skip
    return [[*common, *own] for own in ([f"name=whole-{steps}"], *small)]


def evaluated(config: RunConfig, changes: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures what is not there yet; -> each figure, its chance, what real pictures reach, its share."""
    run = run_folder(config)
    if not complete_checkpoints(run):
        verb(["train", str(CONFIG), *changes, "--processes", str(options.processes)])
    result = run / "evaluation" / "evaluation.json"
    if not result.is_file():
        verb(["evaluate", str(run), "--samples", str(options.samples)])
    figures, row = read_json(result, "")["figures"], {}
    for key, name in FIGURES.items():
        own = figures[WITH][key]
        row |= {name: own["mean"], f"{name} chance": own["chance"]["mean"], f"{name} real": figures[REAL][key]["mean"]}
        row |= {f"{name} share": own["share"]["mean"]} if "share" in own else {}
    return row


def trained_and_measured(config: RunConfig, changes: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One row: trains and measures what is not there yet."""
    run, figures = run_folder(config), evaluated(config, changes, options)
    weights = complete_checkpoints(run)[-1] / "controlnet" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, "np") as file:
        parameters = sum(file.get_tensor(name).size for name in file.keys())
    speed = read_json(run / "speed.json", "")
    lora = config.model.method == "lora"
    return {
        "trained": f"rank {config.model.rank}" if lora else "whole",
        "rate": lora_learning_rate(config) if lora else config.optimizer.learning_rate,
        "MB": weights.stat().st_size / 1e6,
        "parameters": parameters,
        "samples/s": speed["samples_per_second"],
        "GiB": speed["peak_memory_gib"],
        **figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32], help="ranks of the differences")
    parser.add_argument("--times", type=float, nargs="+", default=[20.0])
    parser.add_argument("--samples", type=int, default=64, help="held-out conditions that are drawn")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build/control-lora"))
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="of all trainings")
    options = parser.parse_intermixed_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    trainings = [(load_config(CONFIG, changes), changes) for changes in changes_of(options)]
    for command in packing(trainings[0][0]):
        verb(command)
    rows: list[dict[str, Any]] = []
    for config, changes in trainings:
        rows.append(trained_and_measured(config, changes, options))
        rows[-1]["share of whole"] = rows[-1]["parameters"] / rows[0]["parameters"]
    write("control_lora", rows)


if __name__ == "__main__":
    main()
