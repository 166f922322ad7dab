"""What tests of subject runs share: their run files, starting and killing them, reading what they wrote."""

import json
import signal

import forked
import numpy as np
import psutil
import yaml
from safetensors.numpy import load_file

WORKER = ("-m", "controlbooth.trainer.dreambooth.train")
NAMES = [f"subject-{number}" for number in range(6)]


def write_subjects(folder):
    """subjects.yaml: six subjects with three pictures each, in pictures/."""
    import cv2

    from controlbooth.data.scenes import render

    rows = []
    for number, name in enumerate(NAMES):
        pictures = folder / "pictures" / name
        pictures.mkdir(parents=True)
        for shot in range(3):
            picture = render.render(render.scene(70 + number, shot), 64).image
            cv2.imwrite(str(pictures / f"{shot}.png"), picture[..., ::-1])
        rows.append(dict(name=name, images=f"pictures/{name}", class_noun="star"))
    (folder / "subjects.yaml").write_text(yaml.safe_dump(rows))


def run_file(studio, name, **changes):
    tree = dict(
        name=name, output=str(studio / "runs"), model=dict(base=str(studio / "base"), attention="math"),
        precision="fp32", resolution=64, subjects_per_batch=4, steps=12, learning_rate=1e-3,
        identifiers=["red", "blue", "green", "teal", "pink", "gray"], checkpoint_every_steps=4,
        prior=dict(images=4, sampling_steps=2),
    )  # fmt: skip
    path = studio / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def start(studio, path, processes=1, subjects="subjects.yaml", rows=None, worker=WORKER, **environment):
    words = [*worker, studio / subjects, path, *(["--rows", rows] if rows else [])]
    return forked.start(processes, words, forked.BEFORE_IMPORTS | environment)


def finish(process, status=0):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output[-4000:]
    return output


def kill(process):
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(signal.SIGKILL)
    process.communicate()


def weights(studio, run, name):
    return load_file(studio / "runs" / run / "subjects" / name / "pytorch_lora_weights.safetensors")


def states(studio, run):
    files = sorted((studio / "runs" / run / "subjects").glob("*/status.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in files}


def difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)
