"""One training step on random weights, as gpu.py measures it and as the planner counts it.

As a program it is the process that gpu.py starts: it says what it runs on, then answers each case that comes on its
standard input with a row, one JSON object a line. It ends after a row that failed, since an engine that stopped
half-way through a backward pass, or a GPU with an error, is of no use to the next one.

Bases have the shapes of their configurations and random weights, made on the device. Each step is the product's own:
controlnet_step and a DeepSpeed engine under ZeRO-2, from uint8 pictures, or what the latent cache holds, and tokens to
moved weights.
"""

import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_LOG_LEVEL", "error")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import bases
import numpy as np
import torch
from gpu_rows import Case, Row
from gpu_settings import SETTINGS
from random_weights import materialise
from torch import nn
from transformers.utils.logging import disable_progress_bar

from controlbooth.data.errors import UserError
from controlbooth.data.loading.batches import MicroBatch
from controlbooth.data.order import draws
from controlbooth.data.order.settings import DrawSettings
from controlbooth.data.shards.latent_cache import EncodedBatch
from controlbooth.models.architectures import PUBLISHED
from controlbooth.models.attention import JOINT_KERNELS, KERNELS, AttentionChoice, apply_attention, choose_attention
from controlbooth.models.base import Base
from controlbooth.models.denoisers.registry import reads_latents
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.controlnet.build import make_controlnet
from controlbooth.trainer.controlnet.step import controlnet_step
from controlbooth.trainer.controlnet.trial import base_attention_shapes
from controlbooth.trainer.encoding import as_array, dtype_name, encode_captions
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.device import device_name
from controlbooth.trainer.engine.distributed import World, end_process, join
from controlbooth.trainer.planning.accelerators import ACCELERATORS, is_card
from controlbooth.trainer.planning.footprint import WITHOUT_SCORES, Footprint, footprint, scaled, shapes_of
from controlbooth.trainer.planning.rank_memory import rank_memory
from controlbooth.trainer.run.process import peak_memory_gib, quiet_libraries

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / folder) + os.sep for folder in ("data", "models", "trainer"))
CAPTIONS = ("a large red star on a blue background", "")  # half of the prompts are dropped
GIB = 2**30


@dataclass(frozen=True)
class Effort:
    """How long a row is measured: the median of STRETCHES stretches of steps, each of so many seconds or steps."""

    warm_up: int = 3
    seconds: float = 1.5
    most_steps: int = 10
    gemm_side: int | None = None


STRETCHES = 3
SMALL = Effort(warm_up=1, seconds=0.2, most_steps=2, gemm_side=256)


@dataclass(frozen=True)
class Trained:
    """A base and the engine that trains a ControlNet of it, and what both were made for."""

    base: Base
    engine: Any
    key: tuple[Any, ...]


def config_of(case: Case, folder: Path) -> tuple[RunConfig, str | None]:
    """Makes the run that a case is a step of, and names its published shapes; None of a base that is read."""
    name = case.family
    published = name in PUBLISHED
    base = "published" if published else name if name == "miniature" else str(tiny_base(name, folder))
    model = dict(base=base, attention=case.attention, gradient_checkpointing=case.gradient_checkpointing)
    if name == "miniature":
        model["hint_channels"] = (16, 32, 64, 96)
    data = dict(shards="none", condition="edges", resolution=case.resolution)
    if case.cached:
        data["latent_cache"] = "latent-cache"
    size = case.micro_batch_size
    engine = dict(precision=case.precision, **SETTINGS[case.settings].engine)
    tree = dict(name="gpu", max_steps=1, global_batch_size=size, micro_batch_size=size)
    return build_config(tree | dict(model=model, data=data, engine=engine)), name if published else None


@cache
def tiny_base(family: str, folder: Path) -> Path:
    """Writes one of the tests' tiny bases, for this process."""
    disable_progress_bar()
    return bases.write_base(folder / f"{family}-{os.getpid()}", family)


def planned(case: Case, folder: Path, kind: str) -> Row:
    """Counts a case: floating-point operations of a sample, and memory at the peak. kind: cuda or cpu."""
    plain = replace(case, micro_batch_size=1, settings="default", work="speed", attention="auto")
    once = counted(replace(plain, gradient_checkpointing=False), folder)
    scores = case.attention not in WITHOUT_SCORES
    kept = counted(replace(plain, **(dict(attention="math") if scores else {})), folder)
    engine = config_of(case, folder)[0].engine
    size = case.micro_batch_size
    memory = rank_memory(scaled(kept, size), engine, case.precision, 1, kind, global_batch_size=size)
    return {
        "training_flops_per_sample": once.training_flops,
        "encoder_flops_per_sample": once.encoder_flops,
        "planned_memory_gib": memory.peak / GIB,
    }


@cache
def counted(case: Case, folder: Path) -> Footprint:
    config, shapes = config_of(case, folder)
    return footprint(config, case.precision, case.micro_batch_size, case.attention, shapes)


def random_base(config: RunConfig, shapes: str | None, precision: str, device: torch.device) -> Base:
    """Makes a base of the shapes that the planner counts, with random weights. Its tokenizers are the planner's, which
    give as many tokens as real ones."""
    base, _ = shapes_of(config, precision, shapes)
    for module in (base.vae, base.denoiser, *base.text_encoders):
        materialise(module, device)
    return base


def make_engine(config: RunConfig, base: Base, precision: str) -> Any:
    """Makes a fresh ControlNet of the base and its engine, as the product's build.py does."""
    torch.manual_seed(config.seed)
    controlnet = make_controlnet(config, base).to(base.device)
    return engines.initialize(
        controlnet, config.engine, config.optimizer, engines.batch_sizes(config, 1), precision, False
    )


def make_batch(case: Case, base: Base, controlnet: nn.Module) -> MicroBatch:
    """Makes what the loader would bring, on the CPU."""
    latents = case.cached and reads_latents(controlnet)  # of conditions, which the cache then holds
    count, side = case.micro_batch_size, case.resolution // base.family.vae_factor
    shape = (base.latent_channels, side, side)
    positions = np.arange(count, dtype=np.int64)
    pictures = np.random.default_rng(0).integers(0, 256, (2, count, 3, case.resolution, case.resolution), np.uint8)
    captions = [CAPTIONS[row % 2] for row in range(count)]
    drawn = DrawSettings(0.5, False, False, base.process.levels, base.process.thresholds)
    return MicroBatch(
        positions=positions,
        keys=[str(position) for position in positions],
        places=np.stack([positions * 0, positions], axis=1),
        pixel_values=None if case.cached else pictures[0],
        conditioning=None if latents else pictures[1],
        encoded=cached_batch(base, (count, *shape), sum(map(bool, captions)), latents) if case.cached else None,
        captions=captions,
        dropped=np.array([not caption for caption in captions]),
        timesteps=draws.noise_levels(0, positions, drawn),
        noise=draws.noise(0, positions, shape),
        posterior_noise=draws.posterior_noise(0, positions, shape),
        weights=np.ones(count, np.float32),
    )


def cached_batch(base: Base, shape: tuple[int, ...], kept: int, condition: bool) -> EncodedBatch:
    """Makes what a latent cache would hold, of random numbers: latents of `shape`, and text of `kept` captions.

    condition: whether it holds latents of conditions too.
    """
    states, pooled = base.empty_prompt(encode_captions)

    def drawn(shape: Any, like: Any) -> np.ndarray:
        return as_array(torch.randn(*shape).to(like.dtype))

    return EncodedBatch(
        mean=drawn(shape, base.vae),
        std=drawn(shape, base.vae),
        condition=drawn(shape, base.vae) if condition else None,
        latents_dtype=dtype_name(base.vae),
        hidden_states=drawn((kept, *states.shape[1:]), states),
        pooled=None if pooled is None else drawn((kept, *pooled.shape[1:]), pooled),
        text_dtype=dtype_name(base.text_encoders[0]),
    )


def choose(config: RunConfig, base: Base) -> AttentionChoice:
    """Chooses kernels as a run of the product does. Raises UserError where the kernel cannot run."""
    kernels = JOINT_KERNELS if base.family.is_transformer else ("xformers", *KERNELS)
    shapes = base_attention_shapes(config, base)
    return choose_attention(config.model.attention, base.device, base.dtype, shapes, kernels)


def prepare(trained: Trained, attention: AttentionChoice, gradient_checkpointing: bool) -> None:
    for module in (trained.base.denoiser, trained.engine.module):
        apply_attention(module, attention)
        if gradient_checkpointing:
            module.enable_gradient_checkpointing()
        else:
            module.disable_gradient_checkpointing()


def step(trained: Trained, batch: MicroBatch, world: World) -> bool:
    """Takes one optimizer step, and tells whether it was skipped."""
    backward = partial(engines.accumulate, trained.engine)
    controlnet_step(trained.base, trained.engine, backward, [batch], None, world.device)
    return bool(engines.apply_gradients(trained.engine, 1e-5).skipped)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Measures the seconds that `work` takes, of several in a row without a wait between them."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / times


def speed_of(case: Case, trained: Trained, batch: MicroBatch, effort: Effort, world: World) -> Row:
    """Measures seconds and memory of a step."""
    skipped = 0

    def one() -> None:
        nonlocal skipped
        skipped += step(trained, batch, world)

    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    for _ in range(effort.warm_up):
        one()
    times = max(1, min(effort.most_steps, int(effort.seconds / seconds_of(one, 1, world.device))))
    stretches = [seconds_of(one, times, world.device) for _ in range(STRETCHES)]
    return {
        "samples_per_second": case.micro_batch_size / median(stretches),
        "step_seconds": median(stretches),
        "fastest_step_seconds": min(stretches),
        "slowest_step_seconds": max(stretches),
        "steps": times * STRETCHES,
        "skipped_steps": skipped,
        "peak_memory_gib": peak_memory_gib(world),
    }


def waits_of(work: Callable[[], object]) -> Counter[str]:
    """Counts where the host waits for the device: by our line, and the innermost line where that is not ours.

    Sees what PyTorch warns of under torch.cuda.set_sync_debug_mode.
    """
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            found[place_of(traceback.extract_stack()[:-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        work()
    return found


def place_of(stack: traceback.StackSummary) -> str:
    """Names the innermost line of ours, and after it the innermost of all."""
    frames = [frame for frame in stack if Path(frame.filename).name != "warnings.py"]
    ours = [frame for frame in frames if os.path.realpath(frame.filename).startswith(OURS)]
    inner = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    if not ours:
        return inner
    line = f"{os.path.relpath(os.path.realpath(ours[-1].filename), ROOT)}:{ours[-1].lineno}"
    return line if ours[-1] is frames[-1] else f"{line} in {inner}"


def waits_in_a_step(trained: Trained, batch: MicroBatch, effort: Effort, world: World) -> Row:
    for _ in range(effort.warm_up):
        step(trained, batch, world)
    torch.cuda.set_sync_debug_mode("warn")
    found = waits_of(lambda: step(trained, batch, world))
    torch.cuda.set_sync_debug_mode("default")
    return {"waits": dict(found)}


def measure(case: Case, trained: Trained, chosen: AttentionChoice, effort: Effort, world: World) -> Row:
    """Measures a case with the attention kernels that were chosen for it."""
    prepare(trained, chosen, case.gradient_checkpointing)
    batch = make_batch(case, trained.base, trained.engine)
    with SETTINGS[case.settings].around(trained.base, trained.engine):
        if case.work == "waits":
            found = waits_in_a_step(trained, batch, effort, world)
        else:
            found = speed_of(case, trained, batch, effort, world)
    return found | {"kernel": chosen.name, "by_shape": dict(chosen.by_shape), "reason": chosen.reason}


@cache
def gemm_flops_per_second(device: torch.device, precision: str, side: int | None = None) -> float:
    """Measures one large square product of random numbers, once in a process: what the device reaches at best.

    side: of the matrices; by default large enough for the device.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(side, side, device=device).to(engines.DTYPES[precision]) for _ in range(2))

    def product() -> None:
        left @ right

    seconds_of(product, 2, device)
    times = max(1, min(20, int(0.5 / seconds_of(product, 1, device))))
    return 2 * side**3 / seconds_of(product, times, device)


def facts(world: World) -> Row:
    """Describes what it runs on."""
    name = device_name(world.device)
    card = next((card for card in ACCELERATORS.values() if world.device.type == "cuda" and is_card(card, name)), None)
    return {
        "device": name,
        "device_kind": world.device.type,
        "torch": torch.__version__,
        "peak_flops": card and {"bf16": card.half_flops, "fp32": card.single_flops},
    }


@dataclass
class Bench:
    """What one case leaves behind for the next."""

    world: World
    folder: Path
    trained: Trained | None = None
    chosen: dict[tuple[Any, ...], AttentionChoice] = field(default_factory=dict)

    def answer(self, case: Case, effort: Effort) -> Row:
        """Measures a case, on the base and the engine of the case before where they are what it needs."""
        if self.world.device.type == "cpu" and (SETTINGS[case.settings].needs_gpu or case.work == "waits"):
            return {"error": "needs a GPU"}
        config, shapes = config_of(case, self.folder)
        key = (case.family, case.precision, config.engine)
        if self.trained is None or self.trained.key != key:
            if self.trained is not None:
                engines.release(self.trained.engine)
            self.trained = None
            engines.reclaim(self.world.device)
            base = random_base(config, shapes, case.precision, self.world.device)
            self.trained = Trained(base, make_engine(config, base, case.precision), key)
        try:
            chosen = self._chosen(case, config, self.trained.base)
        except UserError as error:  # of a kernel that is not for this device: nothing was begun
            return {"error": str(error).strip().splitlines()[0]}
        found = measure(case, self.trained, chosen, effort, self.world)
        best = gemm_flops_per_second(self.world.device, case.precision, effort.gemm_side)
        return found | {"gemm_flops_per_second": best}

    def _chosen(self, case: Case, config: RunConfig, base: Base) -> AttentionChoice:
        """Chooses kernels once for each step's shapes: `auto` times them all."""
        key = (case.family, case.precision, case.resolution, case.micro_batch_size, case.attention)
        if key not in self.chosen:
            self.chosen[key] = choose(config, base)
        return self.chosen[key]


def main() -> None:
    rows = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no row
    try:
        quiet_libraries()
        world = join()
        print(json.dumps(facts(world)), file=rows)
        bench = Bench(world, Path(sys.argv[1]))
        for line in sys.stdin:
            asked = json.loads(line)
            row = bench.answer(Case(**asked["case"]), SMALL if asked["in_small"] else Effort())
            print(json.dumps(row), file=rows)
    except Exception as error:
        traceback.print_exc()
        words = str(error).strip().splitlines() or [""]
        print(json.dumps({"error": f"{type(error).__name__}: {words[0]}"[:300], "ended": True}), file=rows)
        end_process(1)
    end_process(0)


if __name__ == "__main__":
    main()
