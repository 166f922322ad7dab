"""`controlbooth dreambooth demo`: subjects that the built-in base has never seen, from pictures to measures."""

import json
from collections.abc import Sequence
from pathlib import Path

from controlbooth.data.arguments import verb_parser, whole_number
from controlbooth.launch.commands.quickstart import beside_python, heading, shown, verb
from controlbooth.launch.ranks.local import gpu_count
from controlbooth.trainer.config.subjects import load_run

CONFIG = Path(__file__).parents[1] / "configs" / "dreambooth.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = verb_parser(
        "dreambooth demo",
        "Draws subjects that the built-in base has never seen, trains them together with prior "
        "preservation, and measures them as the paper does. Stopped at any point, the same command goes on.",
        "examples:\n  controlbooth dreambooth demo\n  controlbooth dreambooth demo prior.weight=0 name=no-prior",
    )
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="a field of launch/configs/dreambooth.yaml"
    )
    parser.add_argument("--subjects", type=whole_number(), default=8, help="how many (default: 8)")
    parser.add_argument(
        "--prompts", type=whole_number(1, 25), default=8, help="measured, of the 25 of the protocol (default: 8)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands; start nothing")
    options = parser.parse_intermixed_args(arguments)
    config = load_run(CONFIG, options.overrides)
    run, subjects = config.output / config.name, config.output / f"{config.name}-subjects"
    manifest = str(subjects / "subjects.yaml")
    processes = ["--processes", str(gpu_count() or 1)]
    commands = {
        "subjects": ["dreambooth", "subjects", "-o", str(subjects), "--count", str(options.subjects)],
        "training": ["dreambooth", "run", manifest, str(CONFIG), *options.overrides, *processes],
        "measuring": ["dreambooth", "measure", str(run), "--prompts", str(options.prompts)],
    }
    if options.dry_run:
        for command in commands.values():
            print(shown(command))
        return 0
    seconds = {}
    for name, command in commands.items():
        heading(f"{name}: {shown(command)}")
        seconds[name] = verb(command)
    print(summary(run, subjects, options.subjects, config.steps, seconds))
    return 0


def summary(run: Path, subjects: Path, count: int, steps: int, seconds: dict[str, float]) -> str:
    """Returns the closing table: what was made, where it lies, how to open it, what to do next."""
    figures = json.loads((run / "measures.json").read_text())
    us = beside_python("controlbooth")
    made = {
        f"{subjects}/": "the subjects' pictures and their manifest",
        f"{run}/subjects/*/pytorch_lora_weights.safetensors": "for diffusers' load_lora_weights",
        f"{run}/subjects/*/samples.png": "real | drawn, one row a prompt",
        f"{run}/measures.json": "every figure",
    }
    width = max(map(len, made))
    lines = [
        "",
        f"== {count} subjects, means",
        *(f"  {name:<28}{value:>8.3f}" for name, value in figures["mean"].items()),
        "",
        "== what was made",
        *(f"  {place.ljust(width)}  {what}" for place, what in made.items()),
        "",
        "== speed",
        f"  {3600 * count / seconds['training']:.0f} subjects of {steps} steps an hour, class pictures included",
        "  " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()),
        "",
        "== next",
        f"  {us} dreambooth demo prior.weight=0 name=no-prior       what the prior loss does",
        f"  {us} dreambooth run SUBJECTS.yaml {beside_config()} model.base=/models/sd15 resolution=512",
    ]
    return "\n".join(lines)


def beside_config() -> str:
    """Returns the configuration's path as a person would type it here."""
    try:
        return str(CONFIG.relative_to(Path.cwd()))
    except ValueError:
        return str(CONFIG)


if __name__ == "__main__":
    raise SystemExit(main())
