"""ControlNet training against diffusers' train_controlnet.py, on equal work, each as the whole program.

    .venv/bin/python tests/benchmarks/controlnet_step.py [--peer-diffusers CHECKOUT --peer-python PYTHON] [--rounds 3]

Both read the base and the pairs of equal_work.py and train at 128 px with batch 8 in one process on all cores: ours
through `controlbooth train` with the encoders in the step and with the latent cache, theirs through accelerate, in
turns. To time both on the same torch, run this with the peer's Python, in which controlbooth is installed too.

Speed is measured from outside, from the end of step `--warm` to the last one; `cpu_seconds` is what all processes
computed for a step, which a busy machine changes less than the time. Memory is the most that all processes of the
program held together (PSS). First, the loss of our step is compared with that of diffusers' modules, called plainly on
the same draws.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from equal_work import write_base, write_pairs
from record import write

BATCH, SIZE = 8, 128


@dataclass
class Measured:
    samples_per_second: float
    cpu_seconds: float
    """Of all processes, for a step."""
    memory_gib: float
    first_step_seconds: float
    """From the command to the end of the first step."""


def measure(command: list[str], steps_done: Callable[[bytes], int], log: Path, steps: int, warm: int) -> Measured:
    """Runs a program. steps_done: what it has printed -> finished steps. Raises SystemExit where it fails."""
    began = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    memory = [0.0]
    ended = threading.Event()

    def watch_memory() -> None:
        while not ended.wait(1.0):  # reading PSS ten times a second took a third of a core from the two there are
            memory[0] = max(memory[0], sum(held(one) for one in tree(process.pid)))

    watcher = threading.Thread(target=watch_memory)
    watcher.start()
    marks: dict[int, tuple[float, float]] = {}
    try:
        while process.poll() is None:
            done = steps_done(log.read_bytes())
            if done not in marks:
                marks[done] = time.perf_counter() - began, sum(computed(one) for one in tree(process.pid))
            if done >= steps:
                break
            time.sleep(0.02)
        process.wait(timeout=120)
    finally:
        ended.set()
        watcher.join()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if steps not in marks or process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    first = min(step for step in marks if step >= warm)
    seconds, cpu = (last - start for last, start in zip(marks[steps], marks[first], strict=True))
    counted = steps - first
    started = marks[min(step for step in marks if step >= 1)][0]
    return Measured(BATCH * counted / seconds, cpu / counted, memory[0] / 2**30, started)


def tree(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def held(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0.0


def computed(process: psutil.Process) -> float:
    try:
        return sum(process.cpu_times()[:2])
    except psutil.Error:
        return 0.0


def our_run(folder: Path, precision: str, steps: int, latent_cache: Path | None) -> list[str]:
    tree = dict(
        name=f"ours-{time.monotonic_ns()}", output=str(folder / "runs"), max_steps=steps, global_batch_size=BATCH,
        micro_batch_size=BATCH, model=dict(base=str(folder / "base")), optimizer=dict(learning_rate=1e-5),
        data=dict(shards=str(folder / "shards"), condition="outline", resolution=SIZE,
                  latent_cache=None if latent_cache is None else str(latent_cache)),
        engine=dict(precision=precision), checkpoint=dict(every_steps=10**6),
    )  # fmt: skip
    path = folder / f"{tree['name']}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return [sys.executable, "-m", "controlbooth.launch.cli", "train", str(path), "--processes", "1"]


def peers_run(python: Path, checkout: Path, folder: Path, precision: str, steps: int) -> list[str]:
    mixed = {"fp32": "no", "bf16": "bf16"}[precision]
    options = dict(
        pretrained_model_name_or_path=folder / "base", train_data_dir=folder / "pairs" / "parquet",
        image_column="image", conditioning_image_column="conditioning_image", caption_column="text",
        proportion_empty_prompts=0.5,
        resolution=SIZE, train_batch_size=BATCH, max_train_steps=steps, learning_rate=1e-5, mixed_precision=mixed,
        dataloader_num_workers=0, checkpointing_steps=10**6, report_to="tensorboard", output_dir=folder / "peer",
    )  # fmt: skip
    launch = [python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1]
    launch += ["--num_cpu_threads_per_process", os.cpu_count(), "--mixed_precision", mixed, "--dynamo_backend", "no"]
    script = [checkout / "examples" / "controlnet" / "train_controlnet.py"]
    return list(map(str, [*launch, *script, *(part for key, value in options.items() for part in (f"--{key}", value))]))


def peers_steps(printed: bytes, steps: int) -> int:
    """Of the last complete state of tqdm's bar, `12/40`."""
    bars = [part for part in printed.split(b"\r") if part.startswith(b"Steps") and f"/{steps} [".encode() in part]
    return int(bars[-1].split(b"|")[-1].split(b"/")[0]) if bars else 0


def our_steps(folder: Path, command: list[str]) -> Callable[[bytes], int]:
    metrics = folder / "runs" / Path(command[4]).stem / "metrics.jsonl"
    return lambda _: metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0


def losses(folder: Path, precision: str) -> list[tuple[float, float]]:
    """(ours, plainly computed) of four micro-batches, with the zero convolutions moved so that control matters."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor2_0
    from plain import plain_loss

    from controlbooth.trainer.config.loading import load_config
    from controlbooth.trainer.controlnet import build
    from controlbooth.trainer.controlnet.step import controlnet_loss, to_device
    from controlbooth.trainer.engine.distributed import join
    from controlbooth.trainer.run.attempt import only_run
    from controlbooth.trainer.run.watchdog import watching

    run_file = Path(our_run(folder, precision, 1, None)[4])
    world = join()
    stack = ExitStack()
    attempt = stack.enter_context(only_run(folder / "runs" / run_file.stem, world))
    watchdog = stack.enter_context(watching(attempt, world, 3600.0))
    run = build.build(load_config(run_file), world, attempt, watchdog, None)
    base, controlnet = run.base, run.engine.module
    unet: Any = base.denoiser
    with torch.no_grad():
        for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            block.weight += 0.02
    found = []
    for _ in range(4):
        batch = next(run.loader).micro_batches[0]
        ours = controlnet_loss(base, controlnet, to_device(batch, world.device), None).item()
        drawn, kept = to_device(batch, world.device), {m: dict(m.attn_processors) for m in (unet, controlnet)}
        for module in kept:
            module.set_attn_processor(AttnProcessor2_0())
        with torch.no_grad():
            found.append((ours, plain_loss(base, controlnet, drawn, autocast=False).item()))
        for module, processors in kept.items():
            module.set_attn_processor(processors)
    run.loader.close()
    stack.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-diffusers", type=Path, help="a checkout of huggingface/diffusers")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable), help="of an environment it runs in")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm", type=int, default=6, help="steps before the measurement")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--losses-of", choices=("fp32", "bf16"), help=argparse.SUPPRESS)  # this file, as a process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.losses_of:
        print(json.dumps(losses(options.folder, options.losses_of)))
        return
    with tempfile.TemporaryDirectory(prefix="controlnet-step-") as temporary:
        rows = compare(Path(temporary), options)
    write("controlnet_step", rows)


def compare(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    write_base(folder / "base")
    write_pairs(folder / "pairs", BATCH * (options.steps + 4))
    table = folder / "pairs" / "parquet" / "train.parquet"
    columns = "--condition outline=conditioning_image --caption-column text --samples-per-shard 64".split()
    controlbooth("data", "pack", str(table), "-o", str(folder / "shards"), *columns)
    rows = []
    for precision in options.precisions.split(","):
        pairs = loss_pairs(folder, precision)
        apart = max(abs(ours - plain) / plain for ours, plain in pairs)
        print(f"{precision}: losses on the same draws differ by at most {apart:.1e} of their size", flush=True)
        cached = folder / f"latents-{precision}"
        run_file = our_run(folder, precision, options.steps, cached)[4]
        controlbooth("data", "precompute", run_file, "--processes", "1")
        measured: dict[str, list[Measured]] = {"ours, encoders in the step": [], "ours, latent cache": []}
        for number in range(options.rounds):
            for name in ("ours, encoders in the step", "ours, latent cache"):
                found = measured[name]
                command = our_run(folder, precision, options.steps, cached if "latent cache" in name else None)
                steps_done = our_steps(folder, command)
                found.append(measure(command, steps_done, folder / "log", options.steps, options.warm))
                print(f"{precision} {number} {name}: {found[-1]}", file=sys.stderr, flush=True)
            if options.peer_diffusers:
                command = peers_run(options.peer_python, options.peer_diffusers, folder, precision, options.steps)
                steps_done = partial(peers_steps, steps=options.steps)
                found = measured.setdefault("diffusers", [])
                found.append(measure(command, steps_done, folder / "log", options.steps, options.warm))
                print(f"{precision} {number} diffusers: {found[-1]}", file=sys.stderr, flush=True)
        rows += [row(precision, name, found, measured.get("diffusers"), apart) for name, found in measured.items()]
        if not options.peer_diffusers:
            rows.append(dict(precision=precision, program="diffusers: no checkout given, see --peer-diffusers"))
    return rows


def row(precision: str, name: str, found: list[Measured], peers: list[Measured] | None, apart: float) -> dict[str, Any]:
    def middle(value: Callable[[Measured], float]) -> float:
        return median(map(value, found))

    def ratio(value: Callable[[Measured], float]) -> float | str:
        """The median of the rounds' ratios."""
        return median(value(a) / value(b) for a, b in zip(found, peers, strict=True)) if peers else "no peer"

    return {
        "precision": precision,
        "program": name,
        "samples_per_second": middle(lambda m: m.samples_per_second),
        "cpu_seconds": middle(lambda m: m.cpu_seconds),
        "memory_gib": middle(lambda m: m.memory_gib),
        "first_step_seconds": middle(lambda m: m.first_step_seconds),
        "speed_ratio": ratio(lambda m: m.samples_per_second),
        "cpu_ratio": ratio(lambda m: 1 / m.cpu_seconds),
        "memory_ratio": ratio(lambda m: m.memory_gib),
        "loss_apart": apart if name.startswith("ours, enc") else "",
        "rounds": len(found),
    }


def loss_pairs(folder: Path, precision: str) -> list[tuple[float, float]]:
    command = [sys.executable, __file__, "--losses-of", precision, "--folder", str(folder)]
    return json.loads(checked(command).splitlines()[-1])


def controlbooth(*arguments: str) -> None:
    checked([sys.executable, "-m", "controlbooth.launch.cli", *arguments])


def checked(command: list[str]) -> str:
    done = subprocess.run(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
