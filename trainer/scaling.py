"""How long a step takes on many cards, pure arithmetic: products, memory traffic, communication, data.

A micro-batch takes the time of its products at PRODUCTS of the card's peak, and of its other operations at BANDWIDTH of
its memory's; or, where that is less, the time in which Python launches them, and under ZeRO-3 gathers weights. All are
assumptions, close to what mosaicml/diffusion publishes for Stable Diffusion 2 on A100 (tests/benchmarks/plan_table.py
compares); a measured run replaces them by a factor, but for ZeRO-3's. Communication is not overlapped with the backward
pass, as engine.deepspeed_config says.
"""

import math
from dataclasses import dataclass, replace

from controlbooth.trainer.accelerators import Accelerator, Layout
from controlbooth.trainer.config import EngineConfig
from controlbooth.trainer.footprint import Footprint
from controlbooth.trainer.rank_memory import BUCKET_ELEMENTS

PRODUCTS, BANDWIDTH = 0.6, 0.8
LAUNCH_SECONDS = {"cuda": 6e-6, "cpu": 12e-6}
"""Of one operation of PyTorch without a graph, by kind of device. On a GPU launches and work run side by side; on a CPU
they add up, and a core that is busy with other work launches no faster: steps of two micro-batches in
tests/benchmarks/plan_check.py give 10 to 16 us."""
GATHER_SECONDS = {"cuda": 1e-3, "cpu": 2e-3}
"""Of the hooks with which ZeRO-3 gathers and lets go of a module's weights, in both passes of a micro-batch: Python,
beside which a CPU computes nothing. 1.8 to 2.5 ms with 191 and 77 modules on two ranks of tests/benchmarks/
plan_check.py, with gloo's collectives; half of it is assumed of a GPU's host."""
NETWORK = 0.7
"""Share of a link's rate that large collectives reach."""
HOP_SECONDS = 2e-5
"""Latency of a collective, for each doubling of the ranks."""
HOST_BANDWIDTH = 25e9
"""Bytes a second between host and card, PCIe 4.0 x16: what offloaded states travel over."""
HOST_ADAM = 2e9
"""Parameters a second that PyTorch's AdamW moves on a node's CPU."""
DECODED_PER_CORE = 441.0
"""512 px triples that a core decodes in a second, as uint8: measured on a 2-core Xeon with the loader's decoders."""
LIMIT = 0.1
"""Communication limits where it takes a larger share of a step than this."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, and what it moves."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    compute_seconds: float
    communication_seconds: float
    optimizer_seconds: float

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.communication_seconds + self.optimizer_seconds

    @property
    def samples_per_second(self) -> float:
        return self.global_batch_size / self.seconds

    @property
    def communication_share(self) -> float:
        return self.communication_seconds / self.seconds


def micro_batch_seconds(
    one: Footprint, card: Accelerator, precision: str, factor: float = 1.0, stage: int = 0
) -> float:
    """Forward and backward. factor: of `calibrated_factor`, where something was measured. stage: of ZeRO."""
    work, launches = _work_and_launches(one, card, precision)
    gathering = one.trained_modules * GATHER_SECONDS[card.kind] if stage == 3 else 0.0
    if card.kind == "cpu":
        return factor * work + launches + gathering
    return max(factor * max(work, launches), launches + gathering)


def calibrated_factor(one: Footprint, card: Accelerator, precision: str, measured_seconds: float) -> float:
    """With it, `micro_batch_seconds` are those that were measured.

    Of a CPU at least half of them count as work: where launches take less than they are assumed to, a larger
    micro-batch would be free otherwise.
    """
    work, launches = _work_and_launches(one, card, precision)
    if card.kind == "cpu":
        return max(measured_seconds - launches, measured_seconds / 2) / work
    return measured_seconds / max(work, launches)


def _work_and_launches(one: Footprint, card: Accelerator, precision: str) -> tuple[float, float]:
    """Seconds of each."""
    peak = card.single_flops if precision == "fp32" else card.half_flops
    work = one.flops / (PRODUCTS * peak) + one.traffic_bytes / (BANDWIDTH * card.memory_bandwidth)
    return work, one.operations * LAUNCH_SECONDS[card.kind]


def step_time(
    one: Footprint,
    layout: Layout,
    engine: EngineConfig,
    precision: str,
    global_batch_size: int,
    factor: float = 1.0,
) -> Step:
    """One optimizer step of global_batch_size samples, which micro_batch_size * ranks divides. Raises ValueError."""
    samples = one.micro_batch_size * layout.ranks
    if global_batch_size % samples:
        raise ValueError(f"{global_batch_size} samples are not a multiple of {one.micro_batch_size} * {layout.ranks}")
    accumulation = global_batch_size // samples
    return Step(
        global_batch_size,
        one.micro_batch_size,
        accumulation,
        accumulation * micro_batch_seconds(one, layout.accelerator, precision, factor, engine.zero_stage),
        communication_seconds(one, layout, engine, precision, accumulation),
        optimizer_seconds(one, layout, engine, precision),
    )


def communication_bytes(one: Footprint, stage: int, precision: str, ranks: int, accumulation: int) -> float:
    """Bytes that each rank sends in one optimizer step. A ring all-reduce of n bytes sends 2 n (N - 1) / N."""
    total, width = one.trained_parameters, 4 if precision == "fp32" else 2
    once = (ranks - 1) / ranks
    reduced = 2 * once * total * (width if stage == 0 else 4)  # from stage 1 on gradients travel in fp32
    if stage == 0:
        return reduced
    if stage == 1:
        return reduced + once * width * total
    if stage == 2:
        return accumulation * reduced + once * width * total
    return accumulation * (reduced / 2 + 2 * once * width * total)  # scattered, and gathered for both passes


def communication_seconds(one: Footprint, layout: Layout, engine: EngineConfig, precision: str, steps: int) -> float:
    if layout.ranks == 1:
        return 0.0
    card = layout.accelerator
    slowest = card.node_bandwidth
    if layout.nodes > 1:  # a ring for each port: what goes from node to node is shared among the cards of one
        slowest = min(slowest, layout.processes_per_node * card.network_bandwidth)
    sent = communication_bytes(one, engine.zero_stage, precision, layout.ranks, steps)
    collectives = (2 + one.trained_parameters // BUCKET_ELEMENTS) * (steps if engine.zero_stage >= 2 else 1)
    return sent / (NETWORK * slowest) + collectives * HOP_SECONDS * math.log2(layout.ranks)


def optimizer_seconds(one: Footprint, layout: Layout, engine: EngineConfig, precision: str) -> float:
    """AdamW reads and writes masters and moments, and reads gradients: 28 bytes a parameter, of this rank's share."""
    share = one.trained_parameters / (1 if engine.zero_stage == 0 else layout.ranks)
    if engine.offload_optimizer:
        rate = HOST_ADAM / layout.processes_per_node
        return share / rate + share * (4 + (4 if precision == "fp32" else 2)) / HOST_BANDWIDTH
    return share * 28 / (BANDWIDTH * layout.accelerator.memory_bandwidth)


def with_nodes(layout: Layout, ranks: int) -> Layout:
    """The same cards in another number: full nodes, or a part of one."""
    per_node = min(ranks, layout.accelerator.cards_per_node)
    return replace(layout, nodes=-(-ranks // per_node), processes_per_node=per_node)


@dataclass(frozen=True)
class Point:
    """Of the scaling curve."""

    ranks: int
    step: Step
    data_bytes_per_second: float
    limited_samples_per_second: float
    """What storage leaves of it."""


def scaling_curve(
    at: "dict[int, Footprint]",
    layout: Layout,
    engine: EngineConfig,
    precision: str,
    global_batch_size: int,
    sample_bytes: float,
    storage_bandwidth: float,
    factor: float = 1.0,
) -> list[Point]:
    """1, 2, 4, ... cards. at: micro-batch -> footprint, those that fit.

    The global batch is kept as long as each card has a sample of it, with the largest micro-batch that divides; beyond,
    every card takes one micro-batch of the smallest size and the global batch grows.
    """
    points = []
    for ranks in (2**power for power in range(11)):
        whole = global_batch_size if global_batch_size % ranks == 0 else min(at) * ranks
        size = max((one for one in at if whole % (one * ranks) == 0), default=min(at))
        whole = whole if whole % (size * ranks) == 0 else size * ranks
        step = step_time(at[size], with_nodes(layout, ranks), engine, precision, whole, factor)
        wanted = step.samples_per_second * sample_bytes
        points.append(Point(ranks, step, wanted, step.samples_per_second * min(1.0, storage_bandwidth / wanted)))
    return points


def first_limits(points: list[Point], storage_bandwidth: float) -> tuple[int | None, int | None]:
    """Numbers of cards from which communication takes more than LIMIT of a step, and data more than storage gives."""
    network = next((p.ranks for p in points if p.step.communication_share > LIMIT), None)
    data = next((p.ranks for p in points if p.data_bytes_per_second > storage_bandwidth), None)
    return network, data
