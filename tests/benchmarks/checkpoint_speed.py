"""Saving and loading the state of a training, ours against accelerate's `save_state`, which diffusers' programs call.

    .venv/bin/python tests/benchmarks/checkpoint_speed.py [--shapes small|sd15] [--precision bf16] [--rounds 3]

Each program is a process with a ControlNet and its AdamW after one step, on this disk, in turns, on a GPU where there
is one: ours in ZeRO-2 on one rank in the environment that `controlbooth train` sets, theirs as train_controlnet.py has
it, weights and moments in fp32. `stands_still_s` is for how long training waits for a save: ours copies and has threads
write, theirs writes. `saved_s` is until the checkpoint is whole, ours with fsync, theirs as the system likes. `load_s`
reads it again, from the page cache. `gib` is what is on the disk; ours also holds the ControlNet as diffusers reads it.
`ratio` is theirs over ours of `stands_still_s` and `load_s`, the median of the rounds. small: the 35.0M base of
equal_work.py, of which 15.2M are trained; sd15: 361.3M.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import UNet2DConditionModel
from equal_work import small_unet
from random_weights import random_module
from record import write

from controlbooth.launch.ranks.torchrun import Node, single_rank_environment, torchrun_environment
from controlbooth.models.architectures import SD15
from controlbooth.models.denoisers.registry import control_residuals
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.text import TextEncoding

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
SHAPES = {"small": small_unet, "sd15": lambda: UNet2DConditionModel(**SD15.denoiser)}


def loss_of(controlnet: Any, width: int) -> torch.Tensor:
    """Of one small picture, so that every weight that learns has a gradient."""
    with DEVICE:
        text, timesteps = TextEncoding(torch.zeros(1, 77, width)), torch.zeros(1, dtype=torch.int64)
        latents, picture = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 64, 64)
    residuals = control_residuals(controlnet, latents, timesteps, text, picture)
    return torch.stack([one.float().mean() for one in residuals.each()]).sum()


def ours(shapes: str, precision: str, folder: Path) -> dict[str, float]:
    from controlbooth.trainer.config.loading import build_config
    from controlbooth.trainer.engine import deepspeed as engines
    from controlbooth.trainer.engine.distributed import join, leave
    from controlbooth.trainer.run import checkpoint as checkpoints
    from controlbooth.trainer.run import saving
    from controlbooth.trainer.run.attempt import only_run

    world = join()
    unet: Any = random_module(SHAPES[shapes], engines.DTYPES[precision])
    controlnet = build_controlnet(unet).to(DEVICE)
    tree = dict(
        name="save", max_steps=1, global_batch_size=1, micro_batch_size=1,
        model=dict(base="random"), data=dict(shards="none", condition="edges"),
    )  # fmt: skip
    config = build_config(tree)
    sizes = engines.batch_sizes(config, 1)
    engine = engines.initialize(controlnet, config.engine, config.optimizer, sizes, precision, False)
    engines.accumulate(engine, loss_of(engine, unet.config.cross_attention_dim))
    engines.apply_gradients(engine, 1e-5)
    state = dict(step=1, zero_stage=config.engine.zero_stage, world_size=1)
    with only_run(folder, world) as attempt:
        saving.save_checkpoint(engine, folder, state | dict(step=0), "", None, world, attempt)  # warms up
        settle()
        began = time.perf_counter()
        save = saving.begin_save(engine, folder, state, "", None, world, attempt)
        stood = time.perf_counter() - began
        written = saving.finish_save(save, world)
        saved = time.perf_counter() - began
        began = time.perf_counter()
        checkpoints.load_checkpoint(engine, written, None, world, attempt)
        load = time.perf_counter() - began
    leave()
    return dict(stands_still_s=stood, saved_s=saved, load_s=load, gib=size_of(written))


def theirs(shapes: str, precision: str, folder: Path) -> dict[str, float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=DEVICE.type == "cpu", mixed_precision={"fp32": "no", "bf16": "bf16"}[precision])
    unet: Any = random_module(SHAPES[shapes], torch.float32)
    width = unet.config.cross_attention_dim
    controlnet = build_controlnet(unet)
    del unet
    optimizer = torch.optim.AdamW(controlnet.parameters(), 1e-5)
    controlnet, optimizer = accelerator.prepare(controlnet, optimizer)
    accelerator.backward(loss_of(controlnet, width))
    optimizer.step()
    optimizer.zero_grad()
    accelerator.save_state(str(folder / "0"))  # warms up
    settle()
    began = time.perf_counter()
    accelerator.save_state(str(folder / "1"))
    saved = time.perf_counter() - began
    began = time.perf_counter()
    accelerator.load_state(str(folder / "1"))
    load = time.perf_counter() - began
    return dict(stands_still_s=saved, saved_s=saved, load_s=load, gib=size_of(folder / "1"))


def settle() -> None:
    """Until a GPU has done what it was asked for: what is timed begins with nothing under way."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


PROGRAMS = {"ours": ours, "accelerate": theirs}


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


def run(program: str, options: argparse.Namespace) -> dict[str, float]:
    folder = tempfile.mkdtemp(prefix="checkpoint-speed-", dir=options.folder)
    command = [sys.executable, __file__, "--shapes", options.shapes, "--precision", options.precision]
    command += ["--program", program, "--folder", folder]
    environment = dict(os.environ)
    if program == "ours":
        node = Node(processes=1, cores=os.cpu_count() or 1, gpus=torch.cuda.device_count(), head_port=0)
        environment |= torchrun_environment(node, environment) | single_rank_environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    shutil.rmtree(folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="small")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: this machine's temporary folder)")
    parser.add_argument("--program", choices=tuple(PROGRAMS), help=argparse.SUPPRESS)  # this file, as a process
    options = parser.parse_args()
    if options.program:
        print(json.dumps(PROGRAMS[options.program](options.shapes, options.precision, options.folder)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(options.rounds):
        for name, own in found.items():
            own.append(run(name, options))
            print(f"{name}: {own[-1]}", file=sys.stderr, flush=True)
    rows = []
    for name, own in found.items():
        row: dict[str, Any] = dict(shapes=options.shapes, precision=options.precision, program=name)
        row |= {figure: median(one[figure] for one in own) for figure in own[0]}
        for figure in ("stands_still_s", "load_s"):
            pairs = zip(found["accelerate"], own, strict=True)
            row[f"{figure.removesuffix('_s')}_ratio"] = median(them[figure] / us[figure] for them, us in pairs)
        rows.append(row)
    write(f"checkpoint_speed_{options.shapes}", rows)


if __name__ == "__main__":
    main()
