"""Peak memory of one rank by category: the footprint of a micro-batch, and what DeepSpeed keeps around it.

The terms are those of DeepSpeed 0.19 under `engine.deepspeed_config`, found by following the live storages of real
engines (tests/distributed/test_plan.py compares them). With P trained parameters, b bytes of each in the run's
precision, N ranks and B = min(P, bucket) elements that are reduced at once:

    stage        weights  masters  Adam  gradients                    while reducing       in the optimizer's step
    0, fp32      4P       -        8P    4P                           4B                   -
    0, bf16      2P       4P       8P    2P                           2B                   4P, their copy in fp32
    1, 2; flat   bP       4P/N     8P/N  4P in fp32, always           4P, a copy of gloo   -
    2, bf16      2P       4P/N     8P/N  2P, in the bucket            6B + 4P/N            4P/N
    2, fp32      4P       4P/N     8P/N  4P, in the bucket            4B                   8P/N
    3            bP/N     4P/N     8P/N  4P/N, always                 gathered bP, (8-b)B  4P/N

flat: where FlatGradients takes them (engine.keeps_gradients_flat): all but stage 2 of more parameters than a bucket
holds, on several ranks. Under offload, where DeepSpeed takes them, stage 1 in bf16 is counted with 4P in fp32 and 2P.

Adam's 8P/N are AdamW's; of other optimizers it is the state of the tensors that the fullest share holds a part of, and
on several ranks tensors that shares cut are put together in the optimizer's step, gradient and master, 8 bytes each.

A bucket is allocated whole: 5e8 elements, whatever is in it. A CPU's memory is only taken where something was written.
The three moments are compared, since activations are gone when the optimizer steps. On a CPU their memory is not: glibc
keeps freed blocks of less than 32 MiB for others that fit, which are the next step's and gradients that are tensors of
their own. Flat buffers fit between none of them, and lie beside, mapped where they are larger. Of a rank of the 35M
base of tests/benchmarks/plan_check.py that holds 1.40 GiB when its gradients are reduced, 0.30 GiB are free blocks;
told to map every block and give it back (glibc.malloc.mmap_threshold=65536), a rank held 0.11 to 0.15 GiB less.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from controlbooth.trainer.config.run import EngineConfig, FrozenConfig
from controlbooth.trainer.engine.deepspeed import keeps_gradients_flat, sums_gradients
from controlbooth.trainer.planning.footprint import Footprint
from controlbooth.trainer.planning.frozen_memory import frozen_memory

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size."""
PREFETCH_ELEMENTS = 50_000_000
"""DeepSpeed's stage3_prefetch_bucket_size: gathered ahead at stage 3."""
LIVE_ELEMENTS = 500_000_000
"""Half of stage3_max_reuse_distance: parameters nearer than that to the end of the forward pass stay gathered until
their backward pass."""
MASTER, MOMENTS, ACCUMULATED = 4, 8, 4
"""Bytes a parameter: the fp32 copy, Adam's two moments, a gradient in fp32."""
RUNTIME_BYTES = {"cuda": 0, "cpu": 790 * 2**20}
"""What a rank holds that is no tensor of the step. CPU: interpreter and libraries (0.57 GiB after the imports alone),
code and scratch of kernels, gloo, on rank 0 MLflow's store, and blocks of glibc that nothing fits into: 0.70 to 0.84
GiB in the fp32 trainings of tests/benchmarks/plan_check.py, to which this is fitted, and up to 0.89 in its bf16 ones.
CUDA: the allocator counts none of it; see HIDDEN_BYTES."""
ZERO_BYTES = {"cuda": 0, "cpu": 40 * 2**20}
"""The same of ZeRO's optimizer, stages 1 to 3: its code and objects, around a network of one layer."""
HIDDEN_BYTES = round(1.5 * 2**30)
"""CUDA: context, NCCL's buffers and kernels' workspaces, which the allocator does not see. An assumption."""
FRAGMENTATION = 0.05
"""CUDA: share of what is allocated that is reserved besides and is not usable. An assumption."""
WHOLE = FrozenConfig()
"""How the base is held where nothing else is asked for."""

CATEGORIES = (
    "frozen weights",
    "trained weights",
    "gradients",
    "optimizer",
    "moving average",
    "activations",
    "communication",
    "loader",
    "runtime",
)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its peak."""

    device: Mapping[str, int]
    """By category, on the accelerator; on a CPU, everything."""
    host: Mapping[str, int]
    """By category, in the memory of the node beside an accelerator; empty on a CPU."""
    moment: str
    """When it is: the backward pass, the reduction of gradients, or the optimizer's step."""

    @property
    def peak(self) -> int:
        return sum(self.device.values())


def rank_memory(
    one: Footprint,
    engine: EngineConfig,
    precision: str,
    ranks: int,
    kind: str,
    *,
    global_batch_size: int | None = None,
    averaged: bool = False,
    loader_bytes: int = 0,
    frozen: FrozenConfig = WHOLE,
    sharers: int = 1,
) -> RankMemory:
    """Computes the memory of one of `ranks` ranks at its peak.

    kind: cuda or cpu. global_batch_size: None is one micro-batch a rank, without accumulation. averaged: whether a
    moving average is kept. loader_bytes: of decoded batches that wait in host memory. frozen: how the base is held,
    its blocks split over `sharers` ranks.
    """
    stage, total, fp32 = engine.zero_stage, one.trained_parameters, precision == "fp32"
    width = 4 if fp32 else 2
    batch = global_batch_size or ranks * one.micro_batch_size
    native = fp32 or not sums_gradients(stage, batch, one.micro_batch_size)  # gradients have the weights' dtype
    flat = keeps_gradients_flat(engine, ranks, total)
    share = total if stage == 0 else -(-total // ranks)
    masters = 0 if stage == 0 and fp32 else MASTER * share
    weights = width * (share if stage == 3 else total)
    base = frozen_memory(one, frozen, sharers)
    fixed = {
        "frozen weights": base.device,
        "trained weights": weights,
        "optimizer": masters + _states(one, share + share % 2),  # DeepSpeed's shares are even
        "moving average": MASTER * share if averaged else 0,
        "gradients": ACCUMULATED * total if flat else _kept_gradients(stage, native, total, share),
        "runtime": RUNTIME_BYTES[kind] + (ZERO_BYTES[kind] if stage else 0),
    }
    moments: dict[str, dict[str, int]]
    if flat:
        moments = {
            "backward": {"activations": one.activation_bytes, "gradients": width * one.largest_parameter},
            "reduction": {"communication": ACCUMULATED * total if kind == "cpu" and ranks > 1 else 0},
            "optimizer": {"communication": 2 * 4 * _cut_elements(one, share + share % 2)},
        }
    else:
        moments = {
            "backward": max(
                (
                    _backward(one, stage, native, width, activations, gradients, ranks, kind)
                    for activations, gradients in one.profile
                ),
                key=lambda parts: sum(parts.values()),
            ),
            "reduction": _reduction(one, stage, native, width, share, ranks, kind),
            "optimizer": {"gradients": _step_gradients(stage, native, width, total, share)},
        }
        if kind == "cpu":
            apart = width * total if stage == 0 or (stage == 1 and not native) else 0
            for name in ("reduction", "optimizer"):
                moments[name] = _beside_free_blocks(moments[name], one.activation_bytes, apart)
    moments["backward"] = moments["backward"] | {"frozen weights": base.passing}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    device = {name: fixed.get(name, 0) + moments[moment].get(name, 0) for name in CATEGORIES}
    host = dict.fromkeys(CATEGORIES, 0) | {
        "frozen weights": one.host_bytes + base.host,
        "activations": one.host_activation_bytes,
        "loader": loader_bytes,
    }
    _offload(engine, device, host, masters, share, width, one.largest_parameter)
    if kind == "cpu":
        return RankMemory({name: device[name] + host[name] for name in CATEGORIES}, {}, moment)
    return RankMemory(device, host, moment)


def _states(one: Footprint, share: int) -> int:
    """Computes the bytes of the optimizer's state of the fullest share, besides masters. share: elements of one."""
    if not one.states:
        return MOMENTS * share
    shares, start = dict[int, int](), 0
    for elements, size in one.states:
        for number in range(start // share, (start + elements - 1) // share + 1):
            shares[number] = shares.get(number, 0) + size
        start += elements
    return max(shares.values())


def _cut_elements(one: Footprint, share: int) -> int:
    """Counts the elements of tensors that lie in more than one share; 0 with AdamW, which needs none whole."""
    cut, start = 0, 0
    for elements, _ in one.states:
        cut += elements if start // share != (start + elements - 1) // share else 0
        start += elements
    return cut


def needed(memory: RankMemory, kind: str) -> float:
    """Computes the bytes that the device must have: the peak, and on CUDA also what its allocator does not see."""
    return memory.peak if kind == "cpu" else memory.peak * (1 + FRAGMENTATION) + HIDDEN_BYTES


def _kept_gradients(stage: int, native: bool, total: int, share: int) -> int:
    """Computes the bytes of gradient buffers that exist from the first step to the last."""
    if stage == 1 and not native:
        return ACCUMULATED * total
    return ACCUMULATED * share if stage == 3 else 0


def _bucket(stage: int, native: bool, width: int, filled: int, kind: str) -> int:
    """Computes the bytes of the bucket in which gradients wait for their reduction. filled: elements of them so far."""
    if stage == 0 or (stage == 1 and not native):
        return 0
    own = 4 if stage == 3 else width
    return own * (BUCKET_ELEMENTS if kind == "cuda" else min(filled, BUCKET_ELEMENTS))


def _backward(
    one: Footprint, stage: int, native: bool, width: int, activations: int, gradients: int, ranks: int, kind: str
) -> dict[str, int]:
    """Computes the bytes by category at one moment of the backward pass.

    activations: bytes of those that are held. gradients: bytes of those that have been computed.
    """
    filled = gradients // width
    parts = {"activations": activations, "gradients": 0, "communication": 0}
    if stage <= 1:
        parts["gradients"] = gradients
    if stage >= 2:
        begun = filled > 0 or stage == 3
        parts["communication"] = _bucket(stage, native, width, filled, kind) if begun else 0
    if stage == 3 and ranks > 1:
        prefetched = min(one.trained_parameters, PREFETCH_ELEMENTS)
        parts["communication"] += width * (min(one.trained_parameters, LIVE_ELEMENTS) + prefetched)
    return parts


def _reduction(
    one: Footprint, stage: int, native: bool, width: int, share: int, ranks: int, kind: str
) -> dict[str, int]:
    """Computes the bytes by category while a full bucket, or the last one, is reduced.

    A bucket that fills up before the end of the backward pass meets activations.
    """
    total = one.trained_parameters
    reduced = min(total, BUCKET_ELEMENTS)
    activations = max(a for a, gradients in one.profile if gradients >= width * reduced * 0.999)
    bucket = _bucket(stage, native, width, reduced, kind)
    parts = {"activations": activations, "gradients": 0, "communication": 0}
    if stage == 0:
        parts |= {"gradients": width * total, "communication": width * reduced}
    elif stage == 1 and not native:
        parts |= {"gradients": width * total, "communication": ACCUMULATED * one.largest_parameter}
    elif stage <= 2 and native:
        parts["communication"] = bucket + width * reduced
    elif stage <= 2:
        parts |= {"gradients": ACCUMULATED * share, "communication": bucket + (width + 4) * reduced}
    else:
        gathered = width * min(total, LIVE_ELEMENTS) if ranks > 1 else width * reduced
        parts["communication"] = bucket + gathered + (8 - width) * reduced
    return parts


def _step_gradients(stage: int, native: bool, width: int, total: int, share: int) -> int:
    """Computes the bytes of gradients while the optimizer steps; activations and buckets are gone."""
    if stage == 0:
        return width * total + (0 if width == 4 else ACCUMULATED * total)
    if stage == 1 and not native:
        return width * total
    if stage <= 2 and native:
        return 2 * ACCUMULATED * share
    return ACCUMULATED * share


def _beside_free_blocks(parts: dict[str, int], activations: int, apart: int) -> dict[str, int]:
    """Adds the memory of activations, which glibc keeps, to what a CPU holds at a moment after the backward pass.

    apart: bytes of gradients that are tensors of their own, which fit into it.
    """
    reused = min(parts.get("gradients", 0), apart)
    return parts | {"activations": max(parts.get("activations", 0), activations - reused)}


def _offload(
    engine: EngineConfig,
    device: dict[str, int],
    host: dict[str, int],
    masters: int,
    share: int,
    width: int,
    largest: int,
) -> None:
    """Moves to the host what offloading keeps there, with its staging buffers."""
    if engine.offload_optimizer:
        states = masters + MOMENTS * share  # AdamW's: others are not offloaded
        device["optimizer"] -= states
        host["optimizer"] += states
        host["gradients"] += ACCUMULATED * share
        if engine.zero_stage < 3:
            host["communication"] += width * (share + largest)
            device["communication"] += width * largest
        else:  # the flat gradients of stage 3 are on the host too
            device["gradients"] -= min(device["gradients"], ACCUMULATED * share)
            host["gradients"] += ACCUMULATED * share
    if engine.offload_parameters:
        device["trained weights"] -= width * share
        host["trained weights"] += width * share
