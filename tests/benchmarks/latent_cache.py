"""The latent cache: training throughput with and without, and that a run with them takes the same steps.

    python tests/benchmarks/latent_cache.py [--data runs/quickstart-data/train] [--steps 100] [--turns 2]

Packs scenes where there is no data, computes the latent cache with `controlbooth data precompute`, and then compares,
at the settings of the quickstart: latents, text embeddings, dropout and draws of every sample of an epoch, bit for bit;
then trainings of `--steps` steps on two ranks with and without the latent cache, in turns: losses and samples per
second.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

from controlbooth.data.loading.loader import Loader
from controlbooth.launch.ranks.torchrun import Node, torchrun_environment
from controlbooth.models.pretrained import load_base
from controlbooth.trainer.config.loading import load_config
from controlbooth.trainer.config.run import base_path
from controlbooth.trainer.controlnet.build import make_loader, open_run_latent_cache
from controlbooth.trainer.controlnet.data import open_data
from controlbooth.trainer.controlnet.step import to_device
from controlbooth.trainer.encoding import encode_kept, encode_posterior, with_empty_prompts
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.distributed import join
from controlbooth.trainer.tracking.spool import read_metrics

CONFIG = Path(__file__).parents[2] / "launch" / "configs" / "quickstart.yaml"
RANKS, SCENES = 2, 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="runs/quickstart-data/train", help="shards; scenes are packed without them")
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--turns", type=int, default=2, help="trainings with and without")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="latent-cache-") as folder:
        return measure(Path(folder), Path(options.data), options.steps, options.turns)


def measure(folder: Path, shards: Path, steps: int, turns: int) -> int:
    if not shards.is_dir():
        shards = folder / "shards"
        command("data", "pack", "--scenes", str(SCENES), "--condition", "edges", "-o", str(shards))
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    latent_cache = folder / "latents"
    overrides = [f"data.shards={shards}", "data.held_out=null", f"output={folder}", f"max_steps={steps}"]
    overrides += ["optimizer.warmup_steps=0", "checkpoint.every_steps=1000000"]
    began = time.perf_counter()
    command(
        "data", "precompute", str(CONFIG), *overrides, f"data.latent_cache={latent_cache}", "--processes", str(RANKS)
    )
    seconds = time.perf_counter() - began
    took = sum(path.stat().st_size for path in latent_cache.iterdir())
    print(f"computed in {seconds:.0f} s with the start: {took / 2**20:.1f} MiB of it for {size / 2**20:.1f} MiB")

    different = compare_epoch([*overrides, f"data.latent_cache={latent_cache}"])
    speeds: dict[str, list[float]] = {"without": [], "with": []}
    losses: dict[str, list[float]] = {}
    for turn in range(turns):
        for name, more in (("without", []), ("with", [f"data.latent_cache={latent_cache}"])):
            run = f"{name}-{turn}"
            command("train", str(CONFIG), *overrides, *more, f"name={run}", "--processes", str(RANKS))
            speeds[name].append(json.loads((folder / run / "speed.json").read_text())["samples_per_second"])
            found = [metrics["loss"] for _, _, metrics in read_metrics(folder / run) if "loss" in metrics]
            different += found != losses.setdefault("first", found)
            print(f"{run:10} {speeds[name][-1]:6.1f} samples/s, last loss {found[-1]:.9g}")
            shutil.rmtree(folder / run)
    plain, cached = median(speeds["without"]), median(speeds["with"])
    print(f"without a latent cache {plain:.1f} samples/s, with it {cached:.1f} ({cached / plain:.2f} times)")
    print(f"losses of {2 * turns} trainings of {steps} steps: {'EQUAL' if not different else 'see above'}")
    return int(different > 0)


def compare_epoch(overrides: list[str]) -> int:
    """How many kinds of value differ between an epoch with a cache and one without; 0 where all bits are equal."""
    config = load_config(CONFIG, overrides)
    world = join()
    torch.set_num_threads(int(torchrun_environment(node(), {})["OMP_NUM_THREADS"]))
    precision = engines.resolve_precision(config.engine.precision, world.device, config.engine.zero_stage)
    base = load_base(base_path(config), config.model.family, engines.DTYPES[precision], world.device)
    dataset, _ = open_data(config, world)
    latent_cache = open_run_latent_cache(config, world, base, dataset)
    steps = -(-int(dataset.samples_per_shard(config.data.condition).sum()) // config.global_batch_size)
    differ = dict.fromkeys(("keys", "dropout", "timesteps", "noise", "conditions", "mean", "std", "text"), 0)
    samples = dropped = 0

    def loader(chosen) -> Loader:
        return make_loader(config, world, base, dataset, 0, config.output, latent_cache=chosen)

    with loader(None) as plain, loader(latent_cache) as cached, torch.no_grad():
        for _ in tqdm(range(steps), unit="step", desc="compare"):
            for one, other in zip(next(plain).micro_batches, next(cached).micro_batches, strict=True):
                there, here = (to_device(batch, world.device) for batch in (one, other))
                assert there.pixel_values is not None and here.posterior is not None
                size = (config.data.resolution, config.data.resolution)
                computed = with_empty_prompts(base, there.captions, encode_kept(base, there.captions), size)
                taken = with_empty_prompts(base, here.captions, here.text, size)
                mean, std = encode_posterior(base, there.pixel_values)
                equal = {
                    "keys": one.keys == other.keys,
                    "dropout": np.array_equal(one.dropped, other.dropped) and one.captions == other.captions,
                    "timesteps": np.array_equal(one.timesteps, other.timesteps),
                    "noise": np.array_equal(one.noise, other.noise),
                    "conditions": np.array_equal(one.conditioning, other.conditioning),  # type: ignore[arg-type]
                    "mean": torch.equal(mean, here.posterior[0]),
                    "std": torch.equal(std, here.posterior[1]),
                    "text": torch.equal(computed.encoder_hidden_states, taken.encoder_hidden_states),
                }
                for name, same in equal.items():
                    differ[name] += not same
                samples, dropped = samples + len(one.keys), dropped + int(one.dropped.sum())
    found = ", ".join(f"{name} {'equal' if not count else f'DIFFER in {count}'}" for name, count in differ.items())
    print(f"{samples} samples, {dropped} prompts dropped, {precision}, {config.micro_batch_size} a pass: {found}")
    return sum(count > 0 for count in differ.values())


def node() -> Node:
    from controlbooth.data.processes.cpus import usable_cpus

    return Node(processes=RANKS, cores=usable_cpus(), gpus=0, head_port=0)


def command(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "controlbooth.launch.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"controlbooth {' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
