"""The arguments of those verbs whose programs import torch and diffusers, which takes seconds.

Free of both: `launch.cli` parses here first, so that help comes, and a slip of the finger is told, before they pass.
"""

import argparse
from pathlib import Path

from controlbooth.data.arguments import (
    file_to_write,
    finite_number,
    folder_to_write,
    seed_number,
    whole_number,
)
from controlbooth.models.guidance import CONDITIONAL, SCHEDULES

SCHEDULERS = ("ddim", "unipc", "dpm++", "euler")
"""Those of models.sampling."""
SAMPLES = 64
"""Held-out conditions that are drawn where nobody says how many, and the shards hold as many."""


def sample() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlbooth sample",
        description="Draw pictures with one ControlNet or several, whose residuals are added up. A ControlNet is a "
        "run's folder, whose latest checkpoint is taken, or a folder in the format of diffusers.",
        epilog=f"""schedules, which weigh the residuals from shallow to deep: {", ".join(SCHEDULES)}

examples:
  controlbooth sample --control edges=runs/quickstart --data runs/quickstart-data/held-out --count 8
  controlbooth sample --control canny=runs/photos:0.8 --condition canny=edges.png --prompt "a house in the snow"
  controlbooth sample --control edges=RUN1:0.8 --control depth=RUN2 --data shards/held-out
  controlbooth sample --control canny=runs/photos --guess --condition canny=edges.png     no prompt at all""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--control", action="append", default=[], metavar="KIND=FOLDER[:SCALE]", help="may be repeated")
    parser.add_argument(
        "--schedule",
        action="append",
        default=[],
        metavar="[KIND=]NAME",
        help=f"(default: uniform); {' and '.join(CONDITIONAL)} act in the conditional branch alone",
    )
    parser.add_argument("--guess", action="store_true", help="logspace, control of the conditional branch alone")
    parser.add_argument(
        "--start", type=finite_number(0, 1), default=0.0, help="share of the steps before control acts (default: 0)"
    )
    parser.add_argument(
        "--end", type=finite_number(0, 1), default=1.0, help="share of the steps after which it does not (default: 1)"
    )
    parser.add_argument("--condition", action="append", default=[], metavar="KIND=PICTURE", help="one for each control")
    parser.add_argument("--data", metavar="SHARDS", help="take conditions and prompts from these instead")
    parser.add_argument(
        "--prompt", action="append", default=[], help="may be repeated (default: those of --data, or none)"
    )
    parser.add_argument("--negative", help="what to guide away from")
    parser.add_argument(
        "--count", type=whole_number(), default=4, help="pictures of each prompt, or samples of --data (default: 4)"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the first picture (default: 0)")
    parser.add_argument("--steps", type=whole_number(), default=25, help="(default: 25)")
    parser.add_argument("--guidance", type=finite_number(1), default=5.0, help="1 is without (default: 5)")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim", help="(default: ddim)")
    parser.add_argument("--base", help="a diffusers folder, a single file or miniature (default: that of the run)")
    parser.add_argument("-o", "--out", type=folder_to_write, default=Path("samples"), help="folder (default: samples)")
    return parser


def evaluate() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlbooth evaluate",
        description="Samples held-out conditions without control, with control, and with control and no prompt, finds "
        "the condition again in each picture, and prints how well it matches, how well by chance (against the "
        "conditions of other samples), and the share of what is possible; random noise and real pictures bound it. "
        "WHERE is a run's folder, whose latest checkpoint and held-out shards are taken, or a folder with any "
        "ControlNet in the format of diffusers.",
        epilog="""examples:
  controlbooth evaluate runs/quickstart --samples 64
  controlbooth evaluate /models/sd-controlnet-canny --data shards/held-out --condition canny --base /models/sd15
  controlbooth evaluate runs/depth --network depth=/models/dpt --encoder clip=/models/clip-vit-b-32
  torchrun --nproc-per-node 8 -m controlbooth.trainer.evaluate.evaluate runs/photos --samples 5000""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("where", type=Path, metavar="WHERE")
    parser.add_argument("--data", metavar="SHARDS", help="held-out shards (default: those of the run)")
    parser.add_argument("--condition", metavar="KIND", help="which condition (default: the one that was trained)")
    parser.add_argument("--base", help="a diffusers folder, a single file or miniature (default: that of the run)")
    parser.add_argument("--resolution", type=whole_number(8), help="side in pixels (default: the run's, or the base's)")
    parser.add_argument(
        "--samples", type=whole_number(), help=f"held-out conditions (default: {SAMPLES}, or all of fewer)"
    )
    parser.add_argument("--step", type=whole_number(0), help="of the run's checkpoint (default: the latest)")
    parser.add_argument("--steps", type=whole_number(), help="of the sampler (default: the run's validation, or 20)")
    parser.add_argument("--guidance", type=finite_number(1), help="(default: the run's validation, or 7.5)")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim", help="(default: ddim)")
    parser.add_argument(
        "--network", action="append", default=[], metavar="KIND=FOLDER", help="finds the condition in photographs"
    )
    parser.add_argument(
        "--encoder", action="append", default=[], metavar="clip|dino=FOLDER", help="for KID, CLIP score"
    )
    parser.add_argument("--aesthetic", type=Path, metavar="FILE", help="linear head on CLIP, .safetensors")
    parser.add_argument("-o", "--out", type=folder_to_write, help="folder (default: WHERE/evaluation)")
    return parser


def compare() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlbooth compare",
        description="Paired differences between two evaluations of the same held-out conditions: each condition was "
        "drawn from the same noise with both ControlNets, so what differs is the ControlNet. Intervals are 95 % "
        "bootstrap intervals of the mean difference; one that excludes 0 is marked.",
        epilog="example:\n  controlbooth evaluate runs/a && controlbooth evaluate runs/b\n"
        "  controlbooth compare runs/a runs/b --json difference.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A", help="a run that was evaluated, or the folder of an evaluation")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the differences there too")
    return parser


def report() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlbooth report",
        description="Writes one HTML page about a run: whether it obeys and since when, its curves between chance and "
        "the real pictures, fidelity, pictures over the steps, best and worst samples. What `controlbooth evaluate` "
        "measured is in it. Several runs stand side by side, on the same axes.",
        epilog="examples:\n  controlbooth report runs/quickstart && xdg-open runs/quickstart/report.html\n"
        "  controlbooth report runs/without runs/with -o side-by-side.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "-o",
        "--out",
        type=file_to_write,
        metavar="FILE",
        help="(default: RUN/report.html; of several, RUN/report-OTHERS.html in the first one's folder)",
    )
    return parser


def dreambooth_export() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlbooth dreambooth export",
        description="Write the LoRA of a trained subject: `diffusers` for load_lora_weights, `kohya` with the names of "
        "kohya's scripts (lora_unet_..., with alphas), which the common image UIs read.",
        epilog="""examples:
  controlbooth dreambooth export runs/pets rex rex.safetensors --format kohya
  controlbooth dreambooth export runs/pets rex rex.safetensors
  controlbooth dreambooth export runs/pets rex rex.safetensors --best     of the step that validations found best""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run of subjects")
    parser.add_argument("subject", metavar="NAME")
    parser.add_argument("out", type=file_to_write, metavar="OUT.safetensors")
    parser.add_argument("--format", choices=("diffusers", "kohya"), default="diffusers", help="(default: diffusers)")
    parser.add_argument("--best", action="store_true", help="of the step between learnt and copied, and not the last")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    return parser


def dreambooth_identifiers() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlbooth dreambooth identifiers",
        description="Find words without a meaning for subjects: rare single tokens of the base's tokenizer that are no "
        "words, and with --draw, words for which the base draws nothing special. Prints them as a run takes them.",
        epilog="""examples:
  controlbooth dreambooth identifiers /models/sd15 --count 100
  controlbooth dreambooth identifiers miniature --count 8 --draw --class-noun star --class-noun house""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", help="a diffusers folder, a single .safetensors file, or miniature")
    parser.add_argument("--count", type=whole_number(), default=20, help="how many (default: 20)")
    parser.add_argument("--draw", action="store_true", help="ask the base too; needs --class-noun")
    parser.add_argument("--class-noun", action="append", default=[], metavar="NOUN", help="may be repeated")
    parser.add_argument("--images", type=whole_number(2), default=8, help="drawn of each prompt (default: 8)")
    parser.add_argument("--steps", type=whole_number(), default=20, help="of sampling (default: 20)")
    parser.add_argument("--guidance", type=finite_number(1), default=3.0, help="(default: 3)")
    parser.add_argument("--encoder", action="append", default=[], metavar="dino=FOLDER", help="compares the pictures")
    return parser


def dreambooth_measure() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="controlbooth dreambooth measure",
        description="Draws pictures of each finished subject of a run and measures subject fidelity (DINO, CLIP-I), "
        "prompt fidelity (CLIP-T), preservation of the class (PRES, lower is better) and diversity (DIV). Encoders are "
        "folders that transformers reads; without them a substitute is used, by its own name. Writes "
        "RUN/measures.json, grids of samples and runs in MLflow. Pictures that are there are not drawn again.",
        epilog="""examples:
  controlbooth dreambooth measure runs/dreambooth --prompts 6 --images 4
  controlbooth dreambooth measure runs/pets --encoder dino=/models/dino-vits16 --encoder clip=/models/clip-vit-b-32
  controlbooth dreambooth measure --real photos     what the encoders say of real pictures, a folder for each subject
  torchrun --nproc-per-node 8 -m controlbooth.trainer.evaluate.measure runs/pets""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="the folder of a run of subjects")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="measure folders of real pictures, and no run")
    parser.add_argument("--encoder", action="append", default=[], metavar="dino|clip=FOLDER")
    parser.add_argument(
        "--prompts", type=whole_number(1, 25), default=25, help="of the 25 of the protocol, evenly chosen (default: 25)"
    )
    parser.add_argument("--images", type=whole_number(), default=4, help="pictures of each prompt (default: 4)")
    return parser
