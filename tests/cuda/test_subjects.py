"""DreamBooth runs on one GPU: many subjects in a stack, and one with all its layers."""

import os
import subprocess
import sys

import cv2
import pytest
import yaml
from studios import run_file, states

from controlbooth.data.scenes import render


@pytest.fixture(scope="module")
def studio(folder):
    rows = []
    for number in range(3):
        name = f"subject-{number}"
        pictures = folder / "pictures" / name
        pictures.mkdir(parents=True)
        for shot in range(2):
            cv2.imwrite(str(pictures / f"{shot}.png"), render.render(render.scene(70 + number, shot), 64).image)
        rows.append(dict(name=name, images=f"pictures/{name}", class_noun="star"))
    (folder / "subjects.yaml").write_text(yaml.safe_dump(rows))
    return folder


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stack", dict(subjects_per_batch=3)),
        ("full", dict(method="full", train_text_encoder=True)),
    ],
)
def test_subjects_are_trained_to_the_end(studio, name, changes):
    changes = dict(precision="auto", steps=4, model=dict(base=str(studio / "base"), attention="auto")) | changes
    path = run_file(studio, name, **changes)
    command = [sys.executable, "-m", "controlbooth.trainer.dreambooth.train", str(studio / "subjects.yaml"), str(path)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert {status["state"] for status in states(studio, name).values()} == {"finished"}
