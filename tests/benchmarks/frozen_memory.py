"""Memory of a frozen base as `model.frozen` holds it, measured beside planned, on a CPU.

    .venv/bin/python tests/benchmarks/frozen_memory.py [--parameters 1e9] [--engine bf16] [--steps 3] [--only NAME]

A U-Net of SDXL's shape and a transformer of FLUX.1's, of random weights, cut down to about so many parameters with
their ratios kept; the text encoders and the VAE are tiny. One and two ranks take some steps of gradients, without an
optimizer, of a ControlNet that is small beside the base, with the base whole, split over the ranks of the node, or
streamed from host memory, in bf16, int8 and nf4.

A row has, for the rank that takes the most: the bytes of tensors that hold the denoiser, all the time and of the blocks
that were there at once, counted; the same as planned; and by how many per cent the plan is off. Then the growth of
the process's resident size from before the denoiser was made to its peak in the steps, beside what is planned for it:
the base, trained weights, gradients and activations; and the median time of a step after the first one.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import bases
import diffusers
import psutil
import torch

from controlbooth.models.architectures import PUBLISHED
from controlbooth.models.pretrained import load_base
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.controlnet.build import make_controlnet
from controlbooth.trainer.controlnet.trial import trial_loss
from controlbooth.trainer.engine.deepspeed import DTYPES
from controlbooth.trainer.engine.distributed import end_process, gather_objects, join, leave
from controlbooth.trainer.planning.footprint import footprint
from controlbooth.trainer.planning.frozen_memory import frozen_memory
from controlbooth.trainer.run.frozen import bytes_held, hold_base, quantize_encoders

WHOLE = {"sdxl": 2.567e9, "flux": 11.9e9}
"""Parameters of the networks that are cut down."""
HELD: dict[str, dict[str, str]] = {"whole": {}, "node-split": {"shards": "node"}, "streamed": {"stream": "cpu"}}
PRECISIONS = ("bf16", "int8", "nf4")
MIB = 2**20


def cut_down(shape: str, parameters: float) -> dict[str, Any]:
    """Makes the configuration of a denoiser of a published shape with about so many parameters."""
    share = parameters / WHOLE[shape]
    if shape == "flux":  # they grow with the square of the width and with the depth
        heads, double, single = (max(1, round(number * share ** (1 / 3))) for number in (24, 19, 38))
        sizes = dict(num_attention_heads=heads, num_layers=double, num_single_layers=single)
        tiny = dict(in_channels=16, joint_attention_dim=32, pooled_projection_dim=16)
        return dict(PUBLISHED["flux-dev"].denoiser) | sizes | tiny
    heads = max(1, round(5 * share**0.5))
    depth = {} if heads > 1 else dict(transformer_layers_per_block=(1, 1, 2), layers_per_block=1)
    tiny = dict(cross_attention_dim=40, addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 24)
    widths = dict(
        block_out_channels=(64 * heads, 128 * heads, 256 * heads), attention_head_dim=(heads, 2 * heads, 4 * heads)
    )
    return dict(PUBLISHED["sdxl"].denoiser) | widths | depth | tiny


def write_base(folder: Path, shape: str, parameters: float) -> None:
    """Writes a tiny base whose denoiser has no weights, and the configuration of a larger one."""
    bases.write_base(folder, shape)
    part = folder / ("unet" if shape == "sdxl" else "transformer")
    name = json.loads((part / "config.json").read_text())["_class_name"]
    (part / "config.json").write_text(json.dumps(cut_down(shape, parameters) | {"_class_name": name}))


def run_of(folder: Path, shape: str, precision: str, held: str, resolution: int) -> RunConfig:
    own = dict(trainable_copy="lite") if shape == "sdxl" else dict(copied_blocks=[1, 1], text_tokens=bases.T5_TOKENS)
    frozen = dict(precision=precision, **HELD[held])
    return build_config(
        dict(
            name="measured", max_steps=1, global_batch_size=2, micro_batch_size=1,
            model=dict(base=str(folder), attention="math", frozen=frozen, **own),
            data=dict(shards="none", condition="edges", resolution=resolution),
        )
    )  # fmt: skip


class Peak:
    """Follows this process's resident size in a thread, 200 times a second, within the block."""

    def __enter__(self) -> "Peak":
        self.most, self.ended, own = 0, threading.Event(), psutil.Process()

        def watch() -> None:
            while not self.ended.wait(0.005):
                self.most = max(self.most, own.memory_info().rss)

        self.thread = threading.Thread(target=watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def settled() -> int:
    """Gives free memory back, and returns the resident size in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def measure(options: argparse.Namespace) -> None:
    """Measures one case on this rank; rank 0 prints a line of JSON."""
    world, folder, dtype = join(), Path(options.folder), DTYPES[options.engine]
    torch.set_num_threads(options.threads)
    config = run_of(folder, options.shape, options.precision, options.held, options.resolution)
    one = footprint(config, options.engine, 1, "math")
    sharers = world.world_size if options.held == "node-split" else 1
    planned = frozen_memory(one, config.model.frozen, sharers)
    base = load_base(folder.with_name(f"{folder.name}-tiny"), dtype=dtype, text_tokens=bases.T5_TOKENS)
    before = settled()
    torch.manual_seed(0)
    name = "UNet2DConditionModel" if options.shape == "sdxl" else "FluxTransformer2DModel"
    made: Any = getattr(diffusers, name).from_config(
        str(folder / ("unet" if options.shape == "sdxl" else "transformer"))
    )
    base.denoiser = made.to(dtype).requires_grad_(False).eval()
    del made
    controlnet = make_controlnet(config, base).to(dtype)
    quantize_encoders(config, base)
    hold_base(config, base, world)
    settled()
    seconds = []
    with Peak() as peak:
        for _ in range(options.steps):
            began = time.perf_counter()
            trial_loss(config, base, controlnet).backward()
            seconds.append(time.perf_counter() - began)
    kept, passing = bytes_held(base.denoiser)
    beside = sum(bytes_held(network)[0] for network in (base.vae, *base.text_encoders))
    beside += sum(tensor.nbytes for tensor in controlnet.buffers())
    trained = sum(2 * parameter.nbytes for parameter in controlnet.parameters())
    planned_all = planned.device + planned.host
    row = dict(
        kept=kept,
        passing=passing,
        planned_kept=planned_all - beside,
        planned_passing=planned.passing - one.restoring_bytes,
        resident=peak.most - before,
        planned_resident=planned_all - beside + planned.passing + trained + one.activation_bytes,
        seconds=statistics.median(seconds[1:] or seconds),
    )
    rows = gather_objects(row, world)
    if world.rank == 0:
        print(json.dumps(max(rows, key=lambda each: each["resident"])), flush=True)


def measured(
    folder: Path, shape: str, ranks: int, held: str, precision: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Starts the ranks of one case and returns its row."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    case = ["--shape", shape, "--held", held, "--precision", precision, "--folder", str(folder)]
    given = ["--engine", options.engine, "--steps", options.steps, "--resolution", options.resolution]
    given += ["--threads", max(1, (os.cpu_count() or 1) // ranks)]
    done = subprocess.run([*command, *case, *map(str, given)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def off(planned: float, found: float) -> str:
    return f"{100 * (planned / found - 1):+.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9, help="of each denoiser, about")
    parser.add_argument("--engine", choices=DTYPES, default="bf16", help="engine.precision")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=128, help="pixels")
    parser.add_argument("--only", default="", help="a part of the names of the cases to measure")
    parser.add_argument("--json", type=Path, help="a file for all rows")
    for name in ("--shape", "--held", "--precision", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)  # of one case, on a rank
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        measure(options)
        leave()
        end_process(0)
    cases = [
        (shape, ranks, held, precision)
        for shape in WHOLE
        for ranks in (1, 2)
        for held in HELD
        for precision in PRECISIONS
        if held != "node-split" or ranks > 1
    ]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for shape in WHOLE:
            write_base(Path(temporary) / shape, shape, options.parameters)
            bases.write_base(Path(temporary) / f"{shape}-tiny", shape)
        print(
            f"{'case':<28}{'kept MiB':>10}{'planned':>10}{'off':>9}{'blocks':>9}{'planned':>10}{'off':>9}"
            f"{'RSS':>10}{'planned':>10}{'off':>10}{'s/step':>9}"
        )
        for shape, ranks, held, precision in cases:
            name = f"{shape}-{ranks}-{held}-{precision}"
            if options.only not in name:
                continue
            row = measured(Path(temporary) / shape, shape, ranks, held, precision, options)
            rows.append(dict(case=name, **row))
            blocks = off(row["planned_passing"], row["passing"]) if row["passing"] else "-"
            print(
                f"{name:<28}{row['kept'] / MIB:>10.1f}{row['planned_kept'] / MIB:>10.1f}"
                f"{off(row['planned_kept'], row['kept']):>9}{row['passing'] / MIB:>9.1f}"
                f"{row['planned_passing'] / MIB:>10.1f}{blocks:>9}{row['resident'] / MIB:>10.1f}"
                f"{row['planned_resident'] / MIB:>10.1f}{off(row['planned_resident'], row['resident']):>10}"
                f"{row['seconds']:>9.3f}",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps(dict(arguments=vars(options) | {"json": None}, rows=rows), indent=1))


if __name__ == "__main__":
    main()
