"""What the prior loss and the class noun do, as tables 3 and 4 of DreamBooth (arXiv 2208.12242) show it, on the CPU.

    .venv/bin/python tests/benchmarks/prior.py [--folder DIR] [--subjects 8] [--prompts 8] [--images 4]

Unseen subjects of the embedded world, trained with and without prior preservation, without a class noun and with a
wrong one; the rest of launch/configs/dreambooth.yaml stays. Beside our figures stand the paper's, whose encoders and
base are others: directions compare, values do not. About twenty minutes on 2 cores; runs in DIR are kept.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from controlbooth.data.scenes.render import CLASSES

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "controlbooth.launch.cli", "dreambooth"]
RUNS = {
    "with-prior": [],
    "no-prior": ["prior.weight=0"],
    "no-noun": ["instance_prompt=a {identifier}"],
    "wrong-noun": [],
}
# figure -> name, and the paper's values: Imagen with and without prior loss; SD with a correct, no and a wrong noun
FIGURES = {
    "subject": ("subject fidelity", (0.684, 0.712), (0.744, 0.303, 0.454)),
    "judge_background": ("prompt fidelity", (0.308, 0.306), None),
    "pres": ("PRES", (0.493, 0.664), None),
    "div": ("DIV", (0.391, 0.371), None),
}


def measured(folder: Path, name: str, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Trains and measures a run; -> each figure of each subject."""
    subjects = folder / "subjects" / "subjects.yaml"
    if name == "wrong-noun":
        rows = yaml.safe_load(subjects.read_text())
        nouns = list(CLASSES)
        for row in rows:
            row["class_noun"] = nouns[(nouns.index(row["class_noun"]) + 3) % len(nouns)]
        subjects = folder / "subjects" / "wrong.yaml"
        subjects.write_text(yaml.safe_dump(rows))
    config = str(ROOT / "launch" / "configs" / "dreambooth.yaml")
    train = ["run", str(subjects), config, f"output={folder}", f"name={name}", *RUNS[name]]
    subprocess.run([*CLI, *train, *options.overrides], check=True, stdout=sys.stderr)
    few = ["--prompts", str(options.prompts), "--images", str(options.images)]
    subprocess.run([*CLI, "measure", str(folder / name), *few], check=True, stdout=sys.stderr)
    rows = list(json.loads((folder / name / "measures.json").read_text())["subjects"].values())
    encoder = next(key.removeprefix("pres_") for key in rows[0] if key.startswith("pres_"))
    keys = {"subject": encoder, "judge_background": "judge_background", "pres": f"pres_{encoder}"}
    keys["div"] = next(key for key in rows[0] if key.startswith("feature_distance"))
    return {figure: np.array([row[key] for row in rows]) for figure, key in keys.items()}


def cell(values: np.ndarray) -> str:
    return f"{values.mean():.3f} +- {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def compare(figure: str, runs: list[dict[str, np.ndarray]], paper: tuple[float, ...] | None) -> str:
    """A row: ours, the paper's, and the paired difference of each run to the first with the paper's direction."""
    name = FIGURES[figure][0]
    verdicts = []
    for number, other in enumerate(runs[1:], 1):
        change = other[figure] - runs[0][figure]
        error = change.std(ddof=1) / np.sqrt(len(change))
        text = f"{change.mean():+.3f} +- {error:.3f}"
        if paper is not None:
            same = (change.mean() > 0) == (paper[number] > paper[0])
            text += " as in the paper" if same else " NOT as in the paper"
            text += "" if abs(change.mean()) > 2 * error else ", within two errors of none"
        verdicts.append(text)
    theirs = " / ".join(f"{value:.3f}" for value in paper) if paper else "-"
    return f"{name:17} {'   '.join(cell(run[figure]) for run in runs)}   {theirs:22} {'; '.join(verdicts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="for all runs")
    parser.add_argument("--folder", type=Path, help="keeps the runs there (default: temporary)")
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        draw = ["subjects", "-o", str(folder / "subjects"), "--count", str(options.subjects)]
        subprocess.run([*CLI, *draw], check=True, stdout=sys.stderr)
        found = {name: measured(folder, name, options) for name in RUNS}
        print(f"{options.subjects} subjects, {options.prompts} prompts x {options.images}; mean +- standard error")
        print("\nprior loss: with, without; the paper's; change without it")
        for figure, (_, table3, _) in FIGURES.items():
            print(compare(figure, [found["with-prior"], found["no-prior"]], table3))
        print("\nclass noun: correct, none, wrong; the paper's; changes against the correct one")
        print(compare("subject", [found[n] for n in ("with-prior", "no-noun", "wrong-noun")], FIGURES["subject"][2]))


if __name__ == "__main__":
    main()
