"""Subjects per hour: K in one batch against one after another, and against diffusers' train_dreambooth_lora.py.

    .venv/bin/python tests/benchmarks/subjects.py [BASE] [--stacks 1,2,4,8,16]
        [--peer-diffusers CHECKOUT --peer-python PYTHON]

BASE: a diffusers folder. All train at the base's own size, rank 4 on attention, batch 1 + 1 class picture, one process.
Ours trains 16 subjects to the end with each K, reading and encoding included, in turns; the peer trains one subject in
a process, as its users do, and takes 16 times as long for 16. Peak memory is that of the process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import yaml
from equal_work import write_base

SUBJECTS = 16


def write_subjects(folder: Path, size: int) -> Path:
    """16 folders of 4 pictures of coloured noise, as what is in them costs nothing; and a manifest."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(SUBJECTS):
        where = folder / "pictures" / f"subject-{number:02d}"
        where.mkdir(parents=True)
        for shot in range(4):
            small = rng.integers(0, 256, (8, 8, 3), np.uint8)
            cv2.imwrite(str(where / f"{shot}.png"), cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC))
        rows.append(dict(name=where.name, images=str(where), class_noun="dog", identifier=chr(ord("a") + number)))
    path = folder / "subjects.yaml"
    path.write_text(yaml.safe_dump(rows))
    return path


def timed(command: list[str]) -> tuple[float, float]:
    """-> seconds, and the peak memory of the process in GiB. Raises with its output where it fails."""
    began = time.perf_counter()
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read()[-3000:]}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def ours(base: Path, manifest: Path, folder: Path, stack: int, size: int, steps: int, precision: str) -> list[str]:
    tree = dict(
        name=f"stack-{stack}", output=str(folder / f"runs-{time.monotonic_ns()}"), model=dict(base=str(base)),
        precision=precision, resolution=size, subjects_per_batch=stack, steps=steps, learning_rate=1e-4,
        prior=dict(images=4, sampling_steps=2, cache=str(folder / "prior")), checkpoint_every_steps=10**6,
    )  # fmt: skip
    path = folder / f"stack-{stack}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return [sys.executable, "-m", "controlbooth.trainer.dreambooth.train", str(manifest), str(path)]


def peers(python: Path, script: Path, base: Path, folder: Path, size: int, steps: int, precision: str) -> list[str]:
    prior = next((folder / "prior").iterdir())
    mixed = {"fp32": "no", "bf16": "bf16"}[precision]
    arguments = dict(
        pretrained_model_name_or_path=base, instance_data_dir=folder / "pictures" / "subject-00",
        instance_prompt="a a dog", with_prior_preservation="", class_data_dir=prior, class_prompt="a dog",
        num_class_images=4, resolution=size, train_batch_size=1, max_train_steps=steps, learning_rate=1e-4, rank=4,
        mixed_precision=mixed, checkpointing_steps=10**6, output_dir=folder / "peer", seed=0, dataloader_num_workers=0,
    )  # fmt: skip
    flags = [str(part) for key, value in arguments.items() for part in (f"--{key}", value) if part != ""]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_cpu_threads_per_process", str(os.cpu_count()), "--mixed_precision", mixed]
    return [str(python), *launch, str(script), *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?", help="default: that of equal_work.py, written anew")
    parser.add_argument("--stacks", default="1,2,4,8,16")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer-diffusers", type=Path, help="a checkout of huggingface/diffusers")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable), help="of an environment it runs in")
    options = parser.parse_args()
    stacks = [int(stack) for stack in options.stacks.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = options.base or write_base(folder / "base")
        manifest = write_subjects(folder, options.size)
        common = (options.size, options.steps, options.precision)
        timed(ours(base, manifest, folder, SUBJECTS, options.size, 1, options.precision))  # class pictures, caches
        seconds: dict[str, list[float]] = {}
        memory: dict[str, float] = {}
        for _ in range(options.rounds):
            commands = {f"K = {k}": ours(base, manifest, folder, k, *common) for k in stacks}
            if options.peer_diffusers:
                script = options.peer_diffusers / "examples" / "dreambooth" / "train_dreambooth_lora.py"
                commands["diffusers"] = peers(options.peer_python, script, base, folder, *common)
            for name, command in commands.items():
                took, peak = timed(command)
                seconds.setdefault(name, []).append(took * (SUBJECTS if name == "diffusers" else 1))
                memory[name] = max(memory.get(name, 0.0), peak)
                print(f"{name}: {took:.1f} s, {peak:.2f} GiB", file=sys.stderr, flush=True)
        alone = median(seconds.get("K = 1", [float("nan")]))
        peer = median(seconds.get("diffusers", [float("nan")]))
        print(f"{SUBJECTS} subjects of {options.steps} steps at {options.size} px, {options.precision}")
        print(f"{'':10} {'seconds':>8} {'subjects/h':>11} {'peak GiB':>9} {'over K = 1':>11} {'over diffusers':>15}")
        for name, took in seconds.items():
            mine = median(took)
            print(
                f"{name:10} {mine:8.1f} {3600 * SUBJECTS / mine:11.0f} {memory[name]:9.2f} {alone / mine:10.2f}x"
                + (f"{peer / mine:15.2f}x" if options.peer_diffusers else f"{'no peer':>16}")
            )
        if not options.peer_diffusers:
            print("diffusers: no checkout given, see --peer-diffusers")


if __name__ == "__main__":
    main()
