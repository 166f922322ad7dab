"""How long a step takes on many cards, pure arithmetic: micro-batches, communication, counters, the optimizer, data.

A micro-batch takes what `speed` says of it. Communication is not overlapped with the backward pass, as
engine.deepspeed_config says; ranks add up their counters through gloo after it, on the host.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from controlbooth.data.errors import UserError
from controlbooth.trainer.config.run import EngineConfig
from controlbooth.trainer.planning.accelerators import Layout, with_nodes
from controlbooth.trainer.planning.footprint import Footprint
from controlbooth.trainer.planning.rank_memory import BUCKET_ELEMENTS
from controlbooth.trainer.planning.speed import BANDWIDTH, Speed, device_seconds, host_seconds

NETWORK = 0.7
"""Share of a link's rate that large collectives reach."""
HOP_SECONDS = 2e-5
"""Latency of a collective between GPUs, for each doubling of the ranks. An assumption."""
GLOO_HOP_SECONDS = 4e-5
"""Latency of a message of gloo, which sends 2 (N - 1) in turn around a ring of N ranks: of every collective between
CPUs. An estimate; two collectives of two ranks on loopback took 0.34 ms."""
COUNTERS = 2
"""Collectives of the CPU in every step, whatever the device: the trainer's sums and maxima of losses and times."""
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
    device_seconds: float
    host_seconds: float
    """Launches, and under ZeRO-3 the gathering of weights."""
    communication_seconds: float
    """Of gradients and weights."""
    counting_seconds: float
    """Of the trainer's counters."""
    optimizer_seconds: float

    @property
    def compute_seconds(self) -> float:
        """Adds up the seconds of forward and backward of all its micro-batches."""
        return self.device_seconds + self.host_seconds

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.communication_seconds + self.counting_seconds + self.optimizer_seconds

    @property
    def samples_per_second(self) -> float:
        return self.global_batch_size / self.seconds

    @property
    def communication_share(self) -> float:
        return (self.communication_seconds + self.counting_seconds) / self.seconds


def step_time(
    one: Footprint,
    layout: Layout,
    engine: EngineConfig,
    precision: str,
    global_batch_size: int,
    speed: Speed,
) -> Step:
    """Computes the time of one optimizer step of global_batch_size samples.

    Raises UserError where that is not a multiple of the micro-batch times the ranks.
    """
    samples = one.micro_batch_size * layout.ranks
    if global_batch_size % samples:
        raise UserError(f"{global_batch_size} samples are not a multiple of {one.micro_batch_size} * {layout.ranks}")
    accumulation = global_batch_size // samples
    return Step(
        global_batch_size,
        one.micro_batch_size,
        accumulation,
        accumulation * device_seconds(one, layout.accelerator, precision, speed),
        accumulation * host_seconds(one, layout.accelerator, speed, engine.zero_stage),
        communication_seconds(one, layout, engine, precision, accumulation),
        COUNTERS * gloo_seconds(layout.ranks),
        optimizer_seconds(one, layout, engine, precision),
    )


def gloo_seconds(ranks: int) -> float:
    """Computes the latency of one collective of CPUs: a reduction around a ring, and its result around again."""
    return 2 * (ranks - 1) * GLOO_HOP_SECONDS


def communication_bytes(one: Footprint, stage: int, precision: str, ranks: int, accumulation: int) -> float:
    """Computes the bytes that each rank sends in one optimizer step.

    A ring all-reduce of n bytes among N ranks sends 2 n (N - 1) / N.
    """
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
    latency = gloo_seconds(layout.ranks) if card.kind == "cpu" else HOP_SECONDS * math.log2(layout.ranks)
    return sent / (NETWORK * slowest) + collectives * latency


def optimizer_seconds(one: Footprint, layout: Layout, engine: EngineConfig, precision: str) -> float:
    """Computes the seconds of the optimizer's step on this rank's share of the parameters.

    AdamW reads and writes masters and moments, and reads gradients: 28 bytes a parameter. With offload it runs at
    HOST_ADAM on the node's CPU, and gradients and weights travel to it and back.
    """
    share = one.trained_parameters / (1 if engine.zero_stage == 0 else layout.ranks)
    if engine.offload_optimizer:
        rate = HOST_ADAM / layout.processes_per_node
        return share / rate + share * (4 + (4 if precision == "fp32" else 2)) / HOST_BANDWIDTH
    return share * 28 / (BANDWIDTH * layout.accelerator.memory_bandwidth)


@dataclass(frozen=True)
class Data:
    """What samples a run can be given in a second."""

    sample_bytes: float
    """That come from storage."""
    storage_bandwidth: float
    """Bytes a second, of all nodes together."""
    decoded_samples: float
    """Samples a second that the loader's threads of one rank decode; infinite where nothing is decoded."""

    @property
    def stored_samples(self) -> float:
        return self.storage_bandwidth / self.sample_bytes


@dataclass(frozen=True)
class Point:
    """One point of the scaling curve."""

    ranks: int
    step: Step
    data_bytes_per_second: float
    limited_samples_per_second: float
    """What storage and decoding leave of it."""
    limit: str
    """What keeps it from as many times the samples that one card at its best computes: see `limit_of`."""


def scaling_curve(
    at: Mapping[int, Footprint],
    layout: Layout,
    engine: EngineConfig,
    precision: str,
    global_batch_size: int,
    data: Data,
    speed: Speed,
) -> list[Point]:
    """Computes the points of the scaling curve at 1, 2, 4, ... 1,024 cards.

    at: micro-batch -> footprint, of those that fit. Where the cards divide the global batch, it is kept, with the
    largest micro-batch that divides each card's samples; else every card takes one micro-batch of the smallest size,
    and they make up the global batch.
    """
    points = []
    alone = with_nodes(layout, 1)
    best = min(
        (step_time(one, alone, engine, precision, size, speed).compute_seconds / size for size, one in at.items())
    )
    for ranks in (2**power for power in range(11)):
        whole = global_batch_size if global_batch_size % ranks == 0 else min(at) * ranks
        size = max((one for one in at if whole % (one * ranks) == 0), default=min(at))
        whole = whole if whole % (size * ranks) == 0 else size * ranks
        step = step_time(at[size], with_nodes(layout, ranks), engine, precision, whole, speed)
        rate = min(step.samples_per_second, data.stored_samples, ranks * data.decoded_samples)
        limit = limit_of(step, ranks, best, data)
        points.append(Point(ranks, step, step.samples_per_second * data.sample_bytes, rate, limit))
    return points


def limit_of(step: Step, ranks: int, best_seconds: float, data: Data) -> str:
    """Finds what costs most of the time that a step takes beyond that of its samples at best_seconds a sample and card.

    For a step that loses at most LIMIT, it is the card or the host, whichever takes more of it.
    """
    storage = step.global_batch_size / data.stored_samples
    decoding = step.global_batch_size / ranks / data.decoded_samples
    lost = {
        "the global batch": step.compute_seconds - step.global_batch_size / ranks * best_seconds,
        "the network": step.communication_seconds,
        "counters (gloo)": step.counting_seconds,
        "the optimizer": step.optimizer_seconds,
        "storage": storage - step.seconds if storage >= decoding else 0.0,
        "decoding": decoding - step.seconds if decoding > storage else 0.0,
    }
    largest = max(lost, key=lambda name: lost[name])
    if sum(seconds for seconds in lost.values() if seconds > 0) > LIMIT * max(step.seconds, storage, decoding):
        return largest
    return "the card" if step.device_seconds >= step.host_seconds else "the host"


def first_limits(points: list[Point], storage_bandwidth: float) -> tuple[int | None, int | None]:
    """Finds the least numbers of cards at which communication, and at which data, limits the run; None for no limit.

    Communication then takes more than LIMIT of a step, and data more bytes a second than the storage gives.
    """
    network = next((p.ranks for p in points if p.step.communication_share > LIMIT), None)
    data = next((p.ranks for p in points if p.data_bytes_per_second > storage_bandwidth), None)
    return network, data
