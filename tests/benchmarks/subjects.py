"""Subjects per hour: K in one batch against one after another, and against diffusers' own programs.

    .venv/bin/python tests/benchmarks/subjects.py [BASE | --family sd3] [--stacks 1,2,4,8,16] [--subjects 16]
        [--peer-diffusers CHECKOUT --peer-python PYTHON]

BASE: a diffusers folder, of a U-Net or a transformer; --family: a base of the tests in its place, of SD3 and FLUX.1
with blocks of the width and number in LARGER, beside which starting a process is less. All train at the base's own
size, rank 4 on attention, batch 1 + 1 class picture, one process. Ours trains all subjects to the end with
each K, reading and encoding included, in turns; the peer trains one subject in a process, as its users do, and takes as
many times as long for all. Peak memory is that of the process. "from K = 1" is the largest difference of a weight from
the same subject's trained alone, as a share of the largest weight of B there.
"""

import argparse
import json
import os
import string
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
from safetensors.numpy import load_file

sys.path.append(str(Path(__file__).parents[1] / "support"))

import bases

from controlbooth.data.scenes import render
from controlbooth.models.pretrained import load_tokenizers
from controlbooth.trainer.dreambooth.stack import LORA_FILE
from controlbooth.trainer.dreambooth.words import pieces_of

WORDS = [*render.COLOURS, "small", "large"]
"""Of the built-in vocabulary; other bases read letters."""


LARGER = {
    "sd3": dict(
        num_layers=8, attention_head_dim=32, num_attention_heads=8, caption_projection_dim=256, sample_size=16,
        pos_embed_max_size=16, dual_attention_layers=(),
    ),
    "flux": dict(
        num_layers=4, num_single_layers=8, attention_head_dim=32, num_attention_heads=8, axes_dims_rope=(8, 12, 12)
    ),
}  # fmt: skip
"""Shapes of some 20 to 30 million parameters."""
SCRIPTS = {"StableDiffusion3Pipeline": "_sd3", "FluxPipeline": "_flux", "StableDiffusionXLPipeline": "_sdxl"}
"""Pipeline of a base -> what the name of diffusers' program for it ends in."""


def words_of(base: Path, count: int) -> list[str]:
    """An identifier for each subject, one token of all of the base's tokenizers."""
    tokenizers = load_tokenizers(base)
    known = [
        word for word in [*WORDS, *string.ascii_lowercase] if all(len(pieces_of(one, word)) == 1 for one in tokenizers)
    ]
    if len(known) < count:
        raise SystemExit(f"the base's tokenizers know {len(known)} words for {count} subjects: give fewer --subjects")
    return known[:count]


def write_subjects(folder: Path, size: int, words: list[str]) -> Path:
    """A folder for each word of 4 pictures of coloured noise, as what is in them costs nothing; and a manifest."""
    rng = np.random.default_rng(0)
    rows = []
    for number, word in enumerate(words):
        where = folder / "pictures" / f"subject-{number:02d}"
        where.mkdir(parents=True)
        for shot in range(4):
            small = rng.integers(0, 256, (8, 8, 3), np.uint8)
            cv2.imwrite(str(where / f"{shot}.png"), cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC))
        rows.append(dict(name=where.name, images=str(where), class_noun="dog", identifier=word))
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


def weights_of(command: list[str]) -> dict[str, np.ndarray]:
    """All weights that a run has written, by subject and name."""
    tree = yaml.safe_load(Path(command[-1]).read_text())
    files = sorted((Path(tree["output"]) / tree["name"]).glob(f"subjects/*/{LORA_FILE}"))
    return {f"{path.parent.name}/{name}": own for path in files for name, own in load_file(path).items()}


def difference(ours: dict[str, np.ndarray], alone: dict[str, np.ndarray]) -> float:
    if ours.keys() != alone.keys():
        raise SystemExit(f"{len(ours.keys() ^ alone.keys())} tensors are in one run alone")
    largest = max(float(np.abs(own).max()) for name, own in alone.items() if "lora_B" in name)
    return max(float(np.abs(ours[name] - own).max()) for name, own in alone.items()) / largest


def ours(base: Path, manifest: Path, folder: Path, stack: int, size: int, steps: int, precision: str) -> list[str]:
    tree = dict(
        name=f"stack-{stack}", output=str(folder / f"runs-{time.monotonic_ns()}"), model=dict(base=str(base)),
        precision=precision, resolution=size, subjects_per_batch=stack, steps=steps, learning_rate=1e-4,
        prior=dict(images=4, sampling_steps=2, cache=str(folder / "prior")), checkpoint_every_steps=10**6,
    )  # fmt: skip
    if pipeline_of(base) in ("StableDiffusion3Pipeline", "FluxPipeline"):
        tree["model"] = dict(base=str(base), text_tokens=bases.T5_TOKENS)
    path = folder / f"stack-{stack}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return [sys.executable, "-m", "controlbooth.trainer.dreambooth.train", str(manifest), str(path)]


def pipeline_of(base: Path) -> str:
    return json.loads((base / "model_index.json").read_text())["_class_name"]


def peers(python: Path, script: Path, base: Path, folder: Path, size: int, steps: int, precision: str) -> list[str]:
    prior = next((folder / "prior").iterdir())
    mixed = {"fp32": "no", "bf16": "bf16"}[precision]
    arguments = dict(
        pretrained_model_name_or_path=base, instance_data_dir=folder / "pictures" / "subject-00",
        instance_prompt="a a dog", with_prior_preservation="", class_data_dir=prior, class_prompt="a dog",
        num_class_images=4, resolution=size, train_batch_size=1, max_train_steps=steps, learning_rate=1e-4, rank=4,
        mixed_precision=mixed, checkpointing_steps=10**6, output_dir=folder / "peer", seed=0, dataloader_num_workers=0,
    )  # fmt: skip
    if pipeline_of(base) in ("StableDiffusion3Pipeline", "FluxPipeline"):
        arguments |= dict(max_sequence_length=bases.T5_TOKENS)
    flags = [str(part) for key, value in arguments.items() for part in (f"--{key}", value) if part != ""]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_cpu_threads_per_process", str(os.cpu_count()), "--mixed_precision", mixed]
    return [str(python), *launch, str(script), *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?", help="default: that of equal_work.py, written anew")
    parser.add_argument(
        "--family",
        choices=sorted({*bases.UNETS, *bases.TRANSFORMERS}),
        help="a tiny, random base of the tests, written anew",
    )
    parser.add_argument("--subjects", type=int, default=16)
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
        if options.family:
            base = bases.write_base(folder / "base", options.family, **LARGER.get(options.family, {}))
        else:
            base = options.base or write_base(folder / "base")
        count = options.subjects
        manifest = write_subjects(folder, options.size, words_of(base, count))
        common = (options.size, options.steps, options.precision)
        timed(ours(base, manifest, folder, count, options.size, 1, options.precision))  # class pictures, caches
        seconds: dict[str, list[float]] = {}
        memory: dict[str, float] = {}
        weights: dict[str, dict[str, np.ndarray]] = {}
        for _ in range(options.rounds):
            commands = {f"K = {k}": ours(base, manifest, folder, k, *common) for k in stacks}
            if options.peer_diffusers:
                name = f"train_dreambooth_lora{SCRIPTS.get(pipeline_of(base), '')}.py"
                script = options.peer_diffusers / "examples" / "dreambooth" / name
                commands["diffusers"] = peers(options.peer_python, script, base, folder, *common)
            for name, command in commands.items():
                took, peak = timed(command)
                seconds.setdefault(name, []).append(took * (count if name == "diffusers" else 1))
                if name != "diffusers":
                    weights[name] = weights_of(command)
                memory[name] = max(memory.get(name, 0.0), peak)
                print(f"{name}: {took:.1f} s, {peak:.2f} GiB", file=sys.stderr, flush=True)
        alone = median(seconds.get("K = 1", [float("nan")]))
        peer = median(seconds.get("diffusers", [float("nan")]))
        print(f"{count} subjects of {options.steps} steps at {options.size} px, {options.precision}")
        heads = f"{'over K = 1':>11} {'from K = 1':>11} {'over diffusers':>15}"
        print(f"{'':10} {'seconds':>8} {'subjects/h':>11} {'peak GiB':>9} {heads}")
        for name, took in seconds.items():
            mine, apart = median(took), ""
            if name in weights and "K = 1" in weights:
                apart = f"{difference(weights[name], weights['K = 1']):.1e}"
            beside = f"{peer / mine:15.2f}x" if options.peer_diffusers else f"{'no peer':>16}"
            rate = f"{3600 * count / mine:11.0f} {memory[name]:9.2f} {alone / mine:10.2f}x {apart:>11}"
            print(f"{name:10} {mine:8.1f} {rate}{beside}")
        if not options.peer_diffusers:
            print("diffusers: no checkout given, see --peer-diffusers")


if __name__ == "__main__":
    main()
