"""Folders of pictures and studies of them, small enough for tests."""

import json
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from controlbooth.data.scenes.render import render, scene
from controlbooth.launch.commands import study_new
from controlbooth.trainer.study.answers import Answer
from controlbooth.trainer.study.plan import CHECK, Plan, read_plan, screens_of

BLUR = {"crisp": 1, "hazy": 9, "smeared": 25}
"""Method -> side of the Gaussian window in pixels; the truth is that less is better."""


def write_methods(root: Path, items: int = 6, side: int = 64, methods=tuple(BLUR)) -> None:
    """Writes conditions/, targets/, prompts.yaml, and a folder for each method, whose files tell on it."""
    prompts = {}
    for number in range(items):
        what = scene(11, number)
        picture = np.asarray(render(what, side).image)
        prompts[f"scene{number:04d}"] = what.caption
        edges = cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), 80, 160)
        for folder, content in (("targets", picture), ("conditions", edges)):
            save(root / folder / f"scene{number:04d}.png", content)
        for method in methods:
            save(root / method / f"scene{number:04d}.png", cv2.GaussianBlur(picture, (BLUR[method],) * 2, 0), method)
    (root / "prompts.yaml").write_text(json.dumps(prompts))


def save(path: Path, picture: np.ndarray, comment: str = "") -> None:
    """Writes a PNG that carries a comment in its text, as image generators do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text("parameters", f"drawn by {comment} in {path}")
    Image.fromarray(picture).save(path, pnginfo=text)


def make_study(root: Path, *options: str, methods=("smeared", "crisp")) -> tuple[Path, Plan]:
    """Makes a study of folders that `write_methods` wrote, if it is not yet there; -> its folder and plan."""
    if not (root / "conditions").exists():
        write_methods(root)
    study = root / "study"
    beside = ["--conditions", root / "conditions", "--targets", root / "targets", "--prompts", root / "prompts.yaml"]
    named = [f"{name}={root / name}" for name in methods]
    with patch("controlbooth.trainer.study.new.new_secret", lambda: "5e" * 16):  # orders are the same each time
        assert study_new.main([*map(str, [study, "--methods", *named, *beside]), *options]) == 0
    return study, read_plan(study)


def right_ranks(plan: Plan, shown) -> list[int]:
    """The ranks that the truth gives to the pictures of a screen, from left to right."""
    trial = shown.trial
    if trial.kind == CHECK:
        worth = {name: -float(place > 0) - place / 100 for place, name in enumerate(trial.pictures)}
    else:
        worth = {name: -BLUR[method] for name, method in zip(trial.pictures, trial.methods, strict=True)}
    best = sorted(shown.pictures, key=lambda name: -worth[name])
    return [best.index(name) + 1 for name in shown.pictures]


def answers_of(plan: Plan, rater: str, reliability: float = 1.0, most: int | None = None) -> list[Answer]:
    """The answers of a scripted rater, who says with this probability what is true, and else the reverse."""
    draw = np.random.default_rng([*rater.encode()])
    answers = []
    for number, shown in enumerate(screens_of(plan, rater)[:most]):
        ranks = right_ranks(plan, shown)
        if draw.random() > reliability:
            ranks = [len(ranks) + 1 - rank for rank in ranks]
        answers.append(Answer(f"{rater}-{number:06d}", rater, shown.trial.id, shown.pictures, tuple(ranks), 1.5))
    return answers
